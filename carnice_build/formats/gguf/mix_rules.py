"""What llama-quantize's mixes do with which tensors, as data; `mixes` applies it.

As in llama.cpp's `src/llama-quant.cpp`, release 11434.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from carnice_build.errors import PlanError


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model's hyperparameters decides about types.

    `layers` counts those that predict further tokens, of which there are `nextn`; heads are
    those of the first layer.
    """

    arch: str
    layers: int
    heads: int = 0
    kv_heads: int = 0
    experts: int = 0
    nextn: int = 0

    @property
    def sharing(self) -> int:
        """How many query heads share a key head in the first layer; 0 without key heads."""
        if not self.layers:
            # llama-quantize ends without a word here.
            raise PlanError(
                f"a model of kind {self.arch!r} without layers cannot have a mix that asks how"
                " many heads share one",
                expected="a mix such as Q4_K_M or Q8_0",
            )
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def of_70b(self) -> bool:
        """Whether llama.cpp takes it for one of its models of 70B parameters."""
        trunk = self.layers - self.nextn
        if self.arch in ("llama", "llama-embed"):
            return trunk == 80 and self.experts != 8 and self.heads != self.kv_heads
        return trunk == SEVENTY.get(self.arch)


SEVENTY: Mapping[str, int] = {"deci": 80, "jais2": 68, "olmo": 80, "qwen2": 80}
"""Layers by which llama.cpp knows models of 70B, by architecture; see `Model.of_70b` for llama."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: the `index`-th of `count` layers or tensors of its role."""

    model: Model
    index: int
    count: int
    importance: bool


def more_bits(index: int, count: int) -> bool:
    """Whether a layer is in the first or last eighth, or a third one between."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


CONDITIONS: Mapping[str, Callable[[Place], bool]] = {
    "falcon": lambda place: place.model.arch == "falcon",
    "not falcon": lambda place: place.model.arch != "falcon",
    "4 share": lambda place: place.model.sharing >= 4,
    "4 experts": lambda place: place.model.experts >= 4,
    "8 experts": lambda place: place.model.experts == 8,
    "not 8 experts": lambda place: place.model.experts != 8,
    "importance": lambda place: place.importance,
    "no importance": lambda place: not place.importance,
    "first 2": lambda place: place.index < 2,
    "first 4": lambda place: place.index < 4,
    "first sixteenth": lambda place: place.index < place.count // 16,
    "first eighth": lambda place: place.index < place.count // 8,
    "inner": lambda place: place.count // 8 <= place.index < 7 * place.count // 8,
    "more bits": lambda place: more_bits(place.index, place.count),
}
"""What a case may ask."""

Case = tuple[str, ...]
"""A type, and the conditions that must all hold for it."""

Cases = tuple[Case, ...]
"""The first case that holds decides; none leaves the mix's own type."""


def decide(cases: Cases, place: Place) -> str | None:
    """The type of the first case that holds at `place`."""
    for kind, *conditions in cases:
        if all(CONDITIONS[condition](place) for condition in conditions):
            return kind
    return None


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix: the number by which files name it, its own type, and what else it uses where.

    `embedding` is for embeddings that are no output layer, `rules` for the roles of `ROLES`.
    With `few_bits`, layers are counted as they come; else those of models with experts are read
    from names, and models of 8 experts or 70B parameters get what `EIGHT` and `BETTER` say.
    With `stacks`, the mix's own type is for stacks of experts alone.
    """

    file_type: int
    default: str
    rules: Mapping[str, Cases] = field(default_factory=dict)
    output: str = "Q6_K"
    embedding: str | None = None
    few_bits: bool = False
    stacks: bool = False


ROLES: tuple[tuple[str, str], ...] = (
    ("attn_v", "attn_qkv.weight"),
    ("attn_v", "attn_kv_b.weight"),
    ("attn_v", "attn_v.weight"),
    ("attn_k", "attn_k.weight"),
    ("attn_q", "attn_q.weight"),
    ("attn_output", "attn_output.weight"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
"""Roles of tensors by what is in their names, the first one counts.

Fused projections that hold values have the role, and share the count, of `attn_v`.
"""

LAYERED = ("ffn_down", "ffn_gate", "ffn_up")
"""Roles whose tensors are counted against the layers of the model, not against each other."""

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
"""Tensors for which llama-quantize has options of their own."""
EMBEDDINGS = (EMBEDDING, "per_layer_token_embd.weight")

EIGHT: Mapping[str, str] = {"attn_v": "Q8_0", "attn_k": "Q8_0"}
"""Types by role in models of 8 experts, where they are small."""

BETTER: Mapping[str, str] = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}
"""What `attn_v` of a 70B model gets in place of a type: 8 heads share it."""

KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})

KEPT_PARTS: tuple[str, ...] = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
"""A tensor with one of these in its name stays as it is: small, or worth its bytes."""

KEPT_PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "glm5-next": (
        "hc_",
        "indexer.attn_q_b",
        "indexer.attn_k",
        "indexer.proj",
        "indexer_compressor_gate",
        "indexer_compressor_ape",
        "ssm_f_a.weight",
        "ssm_f_b.weight",
        "ssm_g_a.weight",
        "ssm_g_b.weight",
        "ssm_beta.weight",
        "attn_kv_a_mqa.weight",
        "attn_k_b.weight",
        "attn_v_b.weight",
    )
}
"""The same of one architecture."""

PRECISE_PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")
}
"""What of an architecture mixes give Q8_0."""

STACKS_BY_ROLE = frozenset({"bailingmoe3"})
"""Architectures with stacks that are no experts: those are what has a role of `LAYERED`."""

FALLBACKS: Mapping[str, str] = {
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""The type of smaller blocks for columns that are not whole blocks; F16 where that fits neither."""

NEEDING_IMPORTANCE = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
"""Types that are garbage without an importance matrix."""

NEEDING_IMPORTANCE_ANYWHERE = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})
"""Of these, the ones that ggml makes nothing of without one, of embeddings and heads neither."""

NEEDING_IMPORTANCE_IN: Mapping[str, frozenset[str]] = {"Q2_K_S": frozenset({"Q2_K"})}
"""Further ones, by mix."""


def _four_share(kind: str) -> dict[str, Cases]:
    """Values that four heads share get `kind`."""
    return {"attn_v": ((kind, "4 share"),)}


def _of_eight(*others: Case) -> Cases:
    """Q5_K in models of 8 experts, else the other cases; those of falcon have their own."""
    return (("Q5_K", "8 experts", "not falcon"), *others)


def _two_bits(values: str, output: Cases = ()) -> dict[str, Cases]:
    """The mixes of one and two bits: what values and the first layers get at least."""
    return {
        "attn_v": (("Q4_K", "4 share"), ("Q4_K", "4 experts"), (values,)),
        "attn_k": (("Q4_K", "8 experts"),),
        "attn_output": (("Q5_K", "8 experts"), *output),
        "ffn_down": ((values, "first eighth"),),
    }


_INNER: Cases = (("IQ3_XXS", "inner"),)
_IQ4: dict[str, Cases] = {
    "attn_v": (("Q5_K", "4 share"),),
    "attn_output": _of_eight(),
    "ffn_down": (("Q5_K", "first eighth", "no importance"),),
}
_MORE: Cases = (("Q6_K", "more bits"),)


def _few_bits(number: int, default: str, embedding: str, rules: dict[str, Cases]) -> Mix:
    return Mix(number, default, rules, output="Q5_K", embedding=embedding, few_bits=True)


MIXES: Mapping[str, Mix] = {
    "F32": Mix(0, "F32"),
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16"),
    "Q8_0": Mix(7, "Q8_0", output="Q8_0"),
    "Q4_0": Mix(2, "Q4_0", {"ffn_down": (("Q4_1", "importance", "first eighth"),)}),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0", {"ffn_down": (("Q5_1", "importance", "first eighth"),)}),
    "Q5_1": Mix(9, "Q5_1"),
    "MXFP4_MOE": Mix(38, "MXFP4", output="Q8_0", stacks=True),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_M": Mix(17, "Q5_K", {"attn_v": _MORE, "ffn_down": _MORE}),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q4_K_M": Mix(
        15,
        "Q4_K",
        {
            "attn_v": _MORE,
            "attn_output": _of_eight(),
            "ffn_down": (
                ("Q6_K", "falcon", "first sixteenth"),
                ("Q5_K", "falcon", "more bits"),
                ("Q6_K", "not falcon", "more bits"),
            ),
        },
    ),
    "Q4_K_S": Mix(
        14,
        "Q4_K",
        {
            "attn_v": (("Q5_K", "first 4"),),
            "attn_output": _of_eight(),
            "ffn_down": (("Q5_K", "not falcon", "first eighth"),),
        },
    ),
    "Q3_K_L": Mix(
        13,
        "Q3_K",
        {
            "attn_v": (("Q5_K",),),
            "attn_output": (("Q4_K", "falcon"), ("Q5_K", "not 8 experts")),
            "ffn_down": (("Q4_K", "falcon"), ("Q5_K",)),
        },
    ),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        {
            "attn_v": (("Q5_K", "first 2"), ("Q4_K",)),
            "attn_output": _of_eight(("Q4_K", "not falcon")),
            "ffn_down": (
                ("Q5_K", "first sixteenth"),
                ("Q4_K", "not falcon"),
                ("Q4_K", "more bits"),
            ),
        },
    ),
    "Q3_K_S": Mix(11, "Q3_K", {"attn_output": _of_eight()}),
    "Q2_K": Mix(
        10,
        "Q2_K",
        {
            "attn_v": (("Q4_K", "4 share"), ("Q3_K",)),
            "attn_output": _of_eight(("Q3_K", "not falcon")),
            "ffn_down": (("Q3_K",),),
        },
    ),
    "Q2_K_S": Mix(21, "Q2_K", {**_four_share("Q4_K"), "ffn_down": (("Q4_K", "first eighth"),)}),
    "IQ4_NL": Mix(25, "IQ4_NL", _IQ4),
    "IQ4_XS": Mix(30, "IQ4_XS", _IQ4),
    "IQ3_M": Mix(
        27,
        "IQ3_S",
        {
            "attn_v": (("Q4_K",),),
            "attn_output": _of_eight(("Q4_K", "not falcon")),
            "ffn_down": (("Q4_K", "first eighth"), ("Q4_K", "8 experts", "more bits")),
        },
    ),
    "IQ3_S": Mix(26, "IQ3_S", {**_four_share("Q4_K"), "attn_output": _of_eight()}),
    "IQ3_XS": Mix(
        22,
        "IQ3_S",
        {
            **_four_share("Q4_K"),
            "attn_k": (("IQ3_XXS",),),
            "attn_q": (("IQ3_XXS",),),
            "attn_output": _of_eight(),
            "ffn_gate": _INNER,
            "ffn_up": _INNER,
        },
    ),
    "IQ3_XXS": Mix(
        23,
        "IQ3_XXS",
        {
            "attn_v": (("Q4_K", "4 share"), ("IQ3_S", "no importance")),
            "attn_k": (("IQ2_S",),),
            "attn_q": (("IQ2_S",),),
            "attn_output": _of_eight(("IQ3_S", "not falcon")),
            "ffn_down": (
                ("Q4_K", "no importance", "first eighth"),
                ("Q3_K", "no importance"),
            ),
        },
        output="Q5_K",
        embedding="IQ3_S",
    ),
    "IQ2_M": _few_bits(29, "IQ2_S", "IQ3_S", _two_bits("IQ3_S", (("IQ3_S",),))),
    "IQ2_S": _few_bits(28, "IQ2_XS", "IQ3_S", _two_bits("IQ3_S", (("IQ3_S",),))),
    "IQ2_XS": _few_bits(20, "IQ2_XS", "Q2_K", _two_bits("Q2_K")),
    "IQ2_XXS": _few_bits(19, "IQ2_XXS", "Q2_K", _two_bits("Q2_K")),
    "IQ1_M": _few_bits(31, "IQ1_M", "Q2_K", _two_bits("Q2_K", (("IQ2_XXS",),))),
    "IQ1_S": _few_bits(24, "IQ1_S", "Q2_K", _two_bits("Q2_K", (("IQ2_XXS",),))),
}
"""By name; the numbers are those of `llama_ftype` in llama.h."""

ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Short names that llama-quantize takes."""
