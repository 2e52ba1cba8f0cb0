"""Qwen3.5 and Qwen3.6: gated delta net and full attention, 3 to 1, with vision tower and MTP head.

The one place that knows this family's names, shapes and roles.
Source: `transformers.models.qwen3_5`, and for MLX names `mlx_lm.models.qwen3_5`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from typing import Any

from carnice_build.models.base import (
    MOST_LAYERS,
    ConfigReader,
    Fusion,
    KvGeometry,
    Part,
    Role,
    SmoothingMapping,
    TensorFact,
)
from carnice_build.models.qwen3_5_config import Qwen35Config

MODEL_TYPE = "qwen3_5"
BODY = "model.language_model."
VISION = "model.visual."
EMBEDDING = f"{BODY}embed_tokens.weight"
HEAD = "lm_head.weight"

_SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "language_model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


_SHARED_INPUTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "full": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    "linear": (
        tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
        ("linear_attn.out_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
}

_FUSIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "full": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    "linear": {
        "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
}
"""What vLLM's `packed_modules_mapping` of this family fuses."""

_SMOOTHING = (
    SmoothingMapping(
        "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ),
    SmoothingMapping(
        "input_layernorm",
        tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
    ),
    SmoothingMapping("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    SmoothingMapping("mlp.up_proj", ("mlp.down_proj",)),
)
"""`build_hybrid_attention_mappings` of llm-compressor's `awq.dynamic_mappings`."""


class Qwen35:
    """The tensors of one checkpoint of the family, derived from its `config.json`."""

    name = MODEL_TYPE

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Read `config`; a missing or ill-typed entry is a CheckpointError naming `where`."""
        self._config = Qwen35Config(config, where)
        self._text = text = self._config.text
        self._vision = self._config.vision
        self.hidden = text.count("hidden_size")
        self.intermediate = text.count("intermediate_size")
        self.vocabulary = text.count("vocab_size")
        self.num_layers = self._config.num_layers
        self.dtype = self._config.dtype
        self.mtp_layers = self._config.mtp_layers
        self._kinds = self._config.kinds

    @cached_property
    def tensors(self) -> Mapping[str, TensorFact]:
        """Every tensor that the config calls for, by its canonical name, in model order.

        The MTP head is listed when the config announces it, whether or not a file holds it.
        """
        return {name: fact for name, fact in self.built.items() if name not in self.ties}

    @cached_property
    def built(self) -> Mapping[str, TensorFact]:
        """See `Architecture.built`."""
        facts = [*self._body(), *self._mtp(), *self._visual()]
        return {fact.name: fact for fact in facts}

    @property
    def ties(self) -> Mapping[str, str]:
        """See `Architecture.ties`."""
        return {HEAD: EMBEDDING} if self._config.tied else {}

    @property
    def text_config(self) -> Mapping[str, Any]:
        """See `Architecture.text_config`; a flat config calls itself by the whole model's type."""
        return {**self._config.text_entries, "model_type": f"{MODEL_TYPE}_text"}

    def published_config(self, parts: Container[Part]) -> dict[str, Any]:
        """See `Architecture.published_config`."""
        return self._config.published(parts)

    @property
    def kv_geometry(self) -> KvGeometry:
        """What the size of a KV cache follows from; linear attention has a state of fixed size."""
        return KvGeometry(
            full_attention_layers=self._kinds.count("full"),
            kv_heads=self._text.count("num_key_value_heads"),
            head_dim=self._text.count("head_dim"),
            draft_layers=self.mtp_layers,
        )

    @property
    def max_positions(self) -> int:
        """The longest context, in tokens."""
        return self._text.count("max_position_embeddings", 262_144)

    @property
    def dimensions(self) -> Mapping[str, int]:
        """What two checkpoints must have in common for tensors of one to fit into the other."""
        return {"hidden_size": self.hidden, "vocab_size": self.vocabulary}

    @cached_property
    def fusions(self) -> tuple[Fusion, ...]:
        """The modules that serving engines fuse, of the MTP head too."""
        layers = [(self.layer_prefix(layer), kind) for layer, kind in enumerate(self._kinds)]
        layers += [(f"mtp.layers.{layer}.", "full") for layer in range(self.mtp_layers)]
        return tuple(
            Fusion(prefix + fused, tuple(prefix + part for part in parts))
            for prefix, kind in layers
            for fused, parts in _FUSIONS[kind].items()
        )

    def shared_inputs(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """The linears of a decoder layer, by module path; those of one group read one input."""
        prefix = self.layer_prefix(layer)
        groups = _SHARED_INPUTS[self.layer_kind(layer)]
        return tuple(tuple(prefix + name for name in group) for group in groups)

    def layer_kind(self, layer: int) -> str:
        """`linear` or `full`, after the layer's attention."""
        return self._kinds[layer]

    def layer_prefix(self, layer: int) -> str:
        """What the names of the layer's tensors begin with."""
        return f"{BODY}layers.{layer}."

    def optional(self, fact: TensorFact) -> bool:
        """True for tensors that a checkpoint may lack: the MTP head and the vision tower."""
        return fact.part in (Part.MTP, Part.VISION)

    def _body(self) -> Iterator[TensorFact]:
        table = (self.vocabulary, self.hidden)
        yield TensorFact(EMBEDDING, table, Part.EMBED, Role.EMBEDDING)
        for layer in range(self.num_layers):
            kind, prefix = self.layer_kind(layer), self.layer_prefix(layer)
            yield from self._layer(prefix, layer, kind, Part.LAYERS)
        yield TensorFact(f"{BODY}norm.weight", (self.hidden,), Part.BODY, Role.NORM)
        yield TensorFact(HEAD, table, Part.HEAD, Role.LINEAR)

    def _layer(self, prefix: str, layer: int | None, kind: str, part: Part) -> Iterator[TensorFact]:
        def linear(name: str, rows: int, columns: int) -> TensorFact:
            return TensorFact(f"{prefix}{name}.weight", (rows, columns), part, Role.LINEAR, layer)

        def norm(name: str, size: int) -> TensorFact:
            return TensorFact(f"{prefix}{name}.weight", (size,), part, Role.NORM, layer)

        yield norm("input_layernorm", self.hidden)
        if kind == "full":
            heads, head = self._text.count("num_attention_heads"), self._text.count("head_dim")
            keys = self._text.count("num_key_value_heads") * head
            yield linear("self_attn.q_proj", 2 * heads * head, self.hidden)
            yield linear("self_attn.k_proj", keys, self.hidden)
            yield linear("self_attn.v_proj", keys, self.hidden)
            yield linear("self_attn.o_proj", self.hidden, heads * head)
            yield norm("self_attn.q_norm", head)
            yield norm("self_attn.k_norm", head)
        else:
            yield from self._delta_net(f"{prefix}linear_attn.", layer, part)
        yield norm("post_attention_layernorm", self.hidden)
        yield linear("mlp.gate_proj", self.intermediate, self.hidden)
        yield linear("mlp.up_proj", self.intermediate, self.hidden)
        yield linear("mlp.down_proj", self.hidden, self.intermediate)

    def _delta_net(self, prefix: str, layer: int | None, part: Part) -> Iterator[TensorFact]:
        count = self._text.count
        value_heads = count("linear_num_value_heads")
        keys = count("linear_num_key_heads") * count("linear_key_head_dim")
        values = value_heads * count("linear_value_head_dim")
        mixed = 2 * keys + values
        for name, rows, columns in (
            ("in_proj_qkv", mixed, self.hidden),
            ("in_proj_z", values, self.hidden),
            ("in_proj_b", value_heads, self.hidden),
            ("in_proj_a", value_heads, self.hidden),
            ("out_proj", self.hidden, values),
        ):
            yield TensorFact(f"{prefix}{name}.weight", (rows, columns), part, Role.LINEAR, layer)
        kernel = count("linear_conv_kernel_dim")
        yield TensorFact(f"{prefix}conv1d.weight", (mixed, 1, kernel), part, Role.CONV, layer)
        yield TensorFact(f"{prefix}A_log", (value_heads,), part, Role.STATE, layer)
        yield TensorFact(f"{prefix}dt_bias", (value_heads,), part, Role.STATE, layer)
        size = count("linear_value_head_dim")
        yield TensorFact(f"{prefix}norm.weight", (size,), part, Role.NORM, layer)

    def _mtp(self) -> Iterator[TensorFact]:
        if not self.mtp_layers:
            return
        yield TensorFact("mtp.fc.weight", (self.hidden, 2 * self.hidden), Part.MTP, Role.LINEAR)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield TensorFact(f"mtp.{name}.weight", (self.hidden,), Part.MTP, Role.NORM)
        for layer in range(self.mtp_layers):
            yield from self._layer(f"mtp.layers.{layer}.", None, "full", Part.MTP)

    def _visual(self) -> Iterator[TensorFact]:
        if self._vision is None:
            return
        for name, shape in _vision_shapes(self._vision):
            role = Role.LINEAR if name.endswith(_VISION_LINEARS) else Role.VISION
            yield TensorFact(VISION + name, shape, Part.VISION, role)

    def module_kind(self, name: str) -> str:
        """What tables call the module of tensor `name`: its path without layer numbers."""
        module = re.sub(r"\.(weight|scales|biases)$", "", name)
        kind = re.sub(r"^.*?\.?(layers|blocks)\.\d+\.", "", module).removeprefix(BODY)
        return f"mtp.{kind}" if module.startswith("mtp.layers.") else kind

    def canonical_name(self, name: str) -> str | None:
        """The name that a misprefixed `name` should have, or None when nothing fits."""
        bare = re.sub(r"^(?:model\.|language_model\.)+", "", name)
        for candidate in (BODY + bare, "model." + bare, bare):
            if candidate in self.built:
                return candidate
        return None

    def mlx_refusal(self) -> str | None:
        """mlx-lm tells linear attention from full by `full_attention_interval` alone.

        It takes its masks from the first layer of each kind, so there must be both.
        """
        if self._config.interval is not None and len(set(self._kinds)) == 2:
            return None
        full = [str(layer) for layer, kind in enumerate(self._kinds) if kind == "full"]
        found = f"layers {', '.join(full)} have" if full else "no layer has"
        return f"{found} full attention, and mlx-lm can only run a model of which every n-th has"

    def mlx_name(self, name: str) -> str | None:
        """The name of canonical tensor `name` in an MLX checkpoint, None when mlx-lm drops it."""
        if name.startswith((VISION, "mtp.")):
            return None
        if name.startswith(BODY):
            return "language_model.model." + name.removeprefix(BODY)
        return "language_model." + name

    def mlx_shifted(self, name: str) -> bool:
        """True for the norms that store w with a gain of 1 + w; mlx-lm stores the gain."""
        return name.endswith(_SHIFTED_NORMS)

    def mlx_keeps_dtype(self, name: str) -> bool:
        """True for the tensors that mlx-lm does not cast to the model's type."""
        return name.endswith("A_log")

    def torch_name(self, name: str) -> str:
        """Without the wrapper around text model and vision tower."""
        return "model." + name.removeprefix(BODY) if name.startswith(BODY) else name

    def offset_norm(self, name: str) -> bool:
        """True for the norms that store w with a gain of 1 + w."""
        return name.endswith(_SHIFTED_NORMS)

    @property
    def smoothing(self) -> tuple[SmoothingMapping, ...]:
        """What AWQ may smooth: no `o_proj`, whose input is gated."""
        return _SMOOTHING

    @property
    def narrow_linears(self) -> tuple[str, ...]:
        """The projections to a number a head."""
        return ("*.linear_attn.in_proj_a.weight", "*.linear_attn.in_proj_b.weight")

    def token_bytes(self, kind: str, width: int) -> int:
        """Fitted to `python -m benchmarks.calibration` on a CPU with torch 2.13.

        In the shapes of the 27B and samples of 1024 to 8192 tokens, with transformers 5.17.
        """
        # gate, up, their product and its activation stand side by side, beside some hidden states.
        bytes_of_mlp = 4 * width * (self.intermediate + self.hidden)
        if kind == "full":
            return bytes_of_mlp
        # transformers' own delta rule makes seven copies of its operands, in float32.
        chunk, count = 64, self._text.count
        head = count("linear_key_head_dim") + count("linear_value_head_dim") + chunk
        return max(bytes_of_mlp, 7 * 4 * count("linear_num_value_heads") * head)

    def draft_head(self, attention: str, tensors: Mapping[str, Any]) -> Any:
        """See `qwen3_5_drafter`."""
        from carnice_build.models.qwen3_5_drafter import Drafter

        return Drafter(self.text_config, attention, tensors)


_VISION_LINEARS = (
    ".attn.qkv.weight",
    ".attn.proj.weight",
    ".linear_fc1.weight",
    ".linear_fc2.weight",
)


def _vision_shapes(config: ConfigReader) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The 12 tensors of each vision block and the 9 around them."""
    hidden, inner = config.count("hidden_size"), config.count("intermediate_size")
    patch = config.count("patch_size")
    merged = hidden * config.count("spatial_merge_size") ** 2
    patch_shape = (
        hidden,
        config.count("in_channels", 3),
        config.count("temporal_patch_size"),
        patch,
        patch,
    )
    yield "patch_embed.proj.weight", patch_shape
    yield "patch_embed.proj.bias", (hidden,)
    yield "pos_embed.weight", (config.count("num_position_embeddings"), hidden)
    for block in range(config.count("depth", least=0, most=MOST_LAYERS)):
        for name, rows, columns in (
            ("attn.qkv", 3 * hidden, hidden),
            ("attn.proj", hidden, hidden),
            ("mlp.linear_fc1", inner, hidden),
            ("mlp.linear_fc2", hidden, inner),
        ):
            yield f"blocks.{block}.{name}.weight", (rows, columns)
            yield f"blocks.{block}.{name}.bias", (rows,)
        for norm in ("norm1", "norm2"):
            yield f"blocks.{block}.{norm}.weight", (hidden,)
            yield f"blocks.{block}.{norm}.bias", (hidden,)
    yield "merger.norm.weight", (hidden,)
    yield "merger.norm.bias", (hidden,)
    yield "merger.linear_fc1.weight", (merged, merged)
    yield "merger.linear_fc1.bias", (merged,)
    yield "merger.linear_fc2.weight", (config.count("out_hidden_size"), merged)
    yield "merger.linear_fc2.bias", (config.count("out_hidden_size"),)
