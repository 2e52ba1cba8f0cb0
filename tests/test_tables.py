"""The tables that ship, held against transformers' models and checkpoints in both spellings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from families import TABLED, Shapes, Skeleton, skeleton, view_of, zoo_shapes
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from zoo import FAMILIES, Layout

from carnice_build.backends.compressed_layer import offset_norms
from carnice_build.errors import PlanError
from carnice_build.models import architecture_of, known_types
from carnice_build.models.base import OPTIONAL_PARTS, Architecture, Part, Role
from carnice_build.models.table_file import SHIPPED, load_table
from carnice_build.planning.gather import gathered

LAYOUTS: tuple[Layout, ...] = ("transformers", "hub")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints of the zoo are made, each once."""
    return tmp_path_factory.mktemp("zoo")


def respelled(shapes: Shapes, architecture: Architecture) -> Shapes:
    """With names of other spellings as the table has them."""
    known = {
        name for fact in architecture.built.values() if fact.fused for name in fact.fused.names
    }
    return {
        name if name in known else architecture.canonical_name(name) or name: shape
        for name, shape in shapes.items()
    }


# --- checkpoints ----------------------------------------------------------------------------------


def test_every_table_that_ships_is_tried() -> None:
    """The zoo has a checkpoint of each.

    The text types of models with towers stand for no other, and Kimi-K2 is what DeepSeek-V3 is.
    """
    tried = {FAMILIES[name].model_type for name in TABLED}

    assert {"qwen3_5_moe_text", "gemma4_text", "kimi_k2"} == set(known_types()) - tried


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TABLED)
def test_a_checkpoint_of_either_spelling_is_what_the_table_says(
    zoo: Path, family: str, layout: Layout
) -> None:
    """Names and shapes are equal, and all experts of a projection are one stack."""
    config, shapes = zoo_shapes(zoo, family, layout)
    architecture = architecture_of(config, family)
    shapes = respelled(shapes, architecture)
    found = gathered(view_of(shapes), architecture, family)
    optional = {name for name, fact in architecture.tensors.items() if fact.part in OPTIONAL_PARTS}

    assert set(found) | optional == set(architecture.tensors)
    assert {name: ref.spec.shape for name, ref in found.items()} == {
        name: architecture.tensors[name].shape for name in found
    }


def one_of_each_kind(shapes: Shapes) -> Iterator[str]:
    """The last tensor of each kind: of the last layer, of the last expert."""
    last = {re.sub(r"\d+", "*", name): name for name in shapes}
    return iter(last.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TABLED)
def test_a_damaged_checkpoint_is_refused(zoo: Path, family: str, layout: Layout) -> None:
    """Whichever tensor is missing, cut, or there twice under another number is told by name."""
    config, shapes = zoo_shapes(zoo, family, layout)
    architecture = architecture_of(config, family)
    shapes = respelled(shapes, architecture)

    for name in one_of_each_kind(shapes):
        if name in architecture.built and architecture.built[name].optional:
            continue
        kept = {other: shape for other, shape in shapes.items() if other != name}
        missing = _stack_of(name, architecture) or name
        if name not in architecture.built or not architecture.built[name].optional:
            with pytest.raises(PlanError, match=re.escape(missing)):
                gathered(view_of(kept), architecture, family)
        cut = (*shapes[name][:-1], shapes[name][-1] + 1)
        with pytest.raises(PlanError, match=rf"{re.escape(name)}.*\[{cut[0]}"):
            gathered(view_of({**shapes, name: cut}), architecture, family)
        more = f"{name}.more"
        with pytest.raises(PlanError, match=re.escape(more)):
            gathered(view_of({**shapes, more: (1,)}), architecture, family)


def _stack_of(name: str, architecture: Architecture) -> str | None:
    """The first of the stacks that a tensor holds."""
    stacks = (fact for fact in architecture.built.values() if fact.fused)
    return next((fact.name for fact in stacks if fact.fused and name in fact.fused.names), None)


@pytest.mark.parametrize("family", TABLED)
def test_an_expert_or_a_layer_too_many_is_refused(zoo: Path, family: str) -> None:
    """What a config does not announce is no tensor of the model, though its name looks like one."""
    config, shapes = zoo_shapes(zoo, family, "transformers")
    architecture = architecture_of(config, family)
    shapes = respelled(shapes, architecture)
    layers = architecture.num_layers + 3
    first = architecture.layer_prefix(0)
    beyond = {
        f"{architecture.layer_prefix(layers)}{name.removeprefix(first)}": shape
        for name, shape in shapes.items()
        if name.startswith(first)
    }
    stacks = [fact for fact in architecture.built.values() if fact.stacked and not fact.fused]
    for fact in stacks[:1]:
        beyond = {fact.name.replace("*", str(fact.shape[0])): fact.shape[1:]}

    with pytest.raises(PlanError, match=re.escape(next(iter(beyond)))):
        gathered(view_of({**shapes, **beyond}), architecture, family)


def test_copies_in_a_draft_layer_may_be_missing(zoo: Path) -> None:
    """The MTP head of GLM-4.6 is published without the embedding and the head that GLM-4.5 has."""
    config, shapes = zoo_shapes(zoo, "glm4_moe", "hub")
    architecture = architecture_of(config, "glm4_moe")
    copies = {name for name, fact in architecture.built.items() if fact.optional}
    kept = {name: shape for name, shape in shapes.items() if name not in copies}
    found = gathered(view_of(kept), architecture, "glm4_moe")

    assert 2 == len(copies & set(shapes))
    assert set(architecture.tensors) - copies == set(found)


@pytest.mark.parametrize("part", [Part.MTP, Part.TOWER])
@pytest.mark.parametrize("family", TABLED)
def test_a_head_or_a_tower_may_be_left_out(zoo: Path, family: str, part: Part) -> None:
    """As a whole; the config that is published then announces no head, and goes on to be read."""
    config, shapes = zoo_shapes(zoo, family, "hub")
    architecture = architecture_of(config, family)
    shapes = respelled(shapes, architecture)
    whole = gathered(view_of(shapes), architecture, family)
    own = [name for name in whole if architecture.tensors[name].part is part]
    if not own:
        pytest.skip(f"has no {part}")
    names = {re.sub(r"\d+", "*", name) for name in own}
    stacks = [fused for name in own if (fused := architecture.built[name].fused)]
    own += [name for fused in stacks for name in fused.names]
    expanded = {name for name in shapes if name in own or re.sub(r"\d+", "*", name) in names}
    expanded = {name for name in expanded if _part(name, architecture) is part}
    found = gathered(
        view_of({name: shape for name, shape in shapes.items() if name not in expanded}),
        architecture,
        family,
    )

    assert set(whole) - set(found) == {n for n in whole if architecture.tensors[n].part is part}
    parts = {architecture.tensors[name].part for name in found}
    published = architecture_of(architecture.published_config(parts), family)
    assert part is Part.TOWER or part not in {fact.part for fact in published.built.values()}
    again = architecture.published_config(parts)
    assert again == published.published_config(parts)


@pytest.mark.parametrize("family", TABLED)
def test_a_head_has_kinds_of_modules_of_its_own(zoo: Path, family: str) -> None:
    """Whatever its layers are called: those of DeepSeek go on where the decoder's end."""
    architecture = architecture_of(zoo_shapes(zoo, family, "hub")[0], family)
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for fact in architecture.built.values():
        kinds[fact.part is Part.MTP].add(architecture.module_kind(fact.name))

    assert all(kind.startswith("mtp.") for kind in kinds[True])
    assert not any(kind.startswith("mtp.") for kind in kinds[False])


def _part(name: str, architecture: Architecture) -> Part:
    """The part of a tensor that may be of an expert, or hold several stacks."""
    for fact in architecture.built.values():
        stack = re.escape(fact.name).replace(r"\*", r"\d+")
        if re.fullmatch(stack, name) or (fact.fused and name in fact.fused.names):
            return fact.part
    raise AssertionError(name)


# --- transformers' models -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A config that differs from the zoo's: entries at the top, or of sections."""

    family: str
    entries: Mapping[str, Any] = field(default_factory=dict)

    def made(self) -> Skeleton:
        family = FAMILIES[self.family]
        return skeleton(family.model_type, family.model, merged(family.config, self.entries))


def merged(config: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `entries`, section by section."""
    result = dict(config)
    for key, value in entries.items():
        old = result.get(key)
        nested = isinstance(old, dict) and isinstance(value, dict)
        result[key] = merged(old, value) if nested else value
    return result


SIZES = {
    "vocab_size": 96,
    "hidden_size": 120,
    "intermediate_size": 208,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
}
NO_HEAD_DIM = {**SIZES, "head_dim": None}
LINEAR = {
    "linear_num_value_heads": 6,
    "linear_num_key_heads": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 3,
}
SPARSE = {"num_experts": 5, "moe_intermediate_size": 40}
VISION = {"depth": 2, "hidden_size": 48, "intermediate_size": 80, "out_hidden_size": 120}
SIGLIP = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80, "image_size": 48}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
SEEING = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": 8,
    "position_embedding_size": 40,
}
HEARING = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [8, 12],
    "conv_kernel_size": 3,
    "output_proj_dims": 80,
}

CASES = {
    "llama, sizes": Case("llama", {**SIZES, **TIED}),
    "llama, biases": Case("llama", {**NO_HEAD_DIM, "attention_bias": True, "mlp_bias": True}),
    "mistral": Case("mistral", {**NO_HEAD_DIM, **TIED}),
    "ministral3": Case("ministral3", SIZES),
    "mixtral": Case("mixtral", {**SIZES, "num_local_experts": 3}),
    "qwen2": Case("qwen2", {**SIZES, **UNTIED}),
    "qwen2, windows": Case("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": Case("qwen3", {**SIZES, **TIED, "attention_bias": True}),
    "phi3": Case("phi3", {**SIZES, **TIED}),
    "qwen3_moe": Case("qwen3_moe", {**SIZES, **SPARSE, "mlp_only_layers": [1, 3]}),
    "qwen3_moe, every other": Case("qwen3_moe", {"decoder_sparse_step": 2, "attention_bias": True}),
    "qwen3_5": Case(
        "qwen3_5", {"text_config": {**SIZES, **LINEAR}, "vision_config": VISION, **TIED}
    ),
    "qwen3_5_text": Case("qwen3_5_text", {**SIZES, **LINEAR, "full_attention_interval": 2}),
    "qwen3_5, biases": Case("qwen3_5", {"text_config": {"attention_bias": True}}),
    "qwen3_5_moe": Case(
        "qwen3_5_moe",
        {
            "text_config": {
                **SIZES,
                **LINEAR,
                **SPARSE,
                "shared_expert_intermediate_size": 72,
                "layer_types": ["full_attention", "linear_attention"] * 2,
            },
            "vision_config": VISION,
        },
    ),
    "qwen3_next": Case(
        "qwen3_next", {**SIZES, **LINEAR, **SPARSE, "shared_expert_intermediate_size": 72}
    ),
    "qwen3_next, dense": Case("qwen3_next", {"mlp_only_layers": [0, 2], "attention_bias": True}),
    "glm4_moe": Case("glm4_moe", {**SIZES, "n_routed_experts": 6, "n_shared_experts": 2}),
    "glm4_moe, dense": Case(
        "glm4_moe", {"first_k_dense_replace": 3, "use_qk_norm": False, "attention_bias": False}
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        {
            "hidden_size": 120,
            "num_attention_heads": 6,
            "q_lora_rank": None,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 20,
            "first_k_dense_replace": 2,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
        },
    ),
    "deepseek_v3, biases": Case("deepseek_v3", {"attention_bias": True, **TIED}),
    "gpt_oss": Case("gpt_oss", {**SIZES, "num_local_experts": 3, "attention_bias": False}),
    "minimax_m2": Case("minimax_m2", {**SIZES, "num_local_experts": 3, "rotary_dim": 12}),
    "nemotron_h": Case(
        "nemotron_h",
        {
            **SIZES,
            "layers_block_type": ["mlp", "full_attention", "linear_attention", "moe"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 20,
            "n_groups": 3,
            "ssm_state_size": 12,
            "conv_kernel": 3,
            "moe_shared_expert_intermediate_size": 88,
        },
    ),
    "nemotron_h, biases": Case(
        "nemotron_h",
        {"mlp_bias": True, "use_bias": True, "use_conv_bias": False, "moe_latent_size": 96},
    ),
    "gemma3_text": Case("gemma3_text", {**SIZES, **UNTIED, "attention_bias": True}),
    "gemma3": Case(
        "gemma3",
        {
            "text_config": {**SIZES, "layer_types": ["sliding_attention"] * 6},
            "vision_config": SIGLIP,
        },
    ),
    "gemma3, pooled": Case("gemma3", {"vision_config": {"vision_use_head": True}}),
    "mistral3": Case(
        "mistral3",
        {
            "text_config": SIZES,
            "vision_config": {"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2},
            "multimodal_projector_bias": True,
            "spatial_merge_size": 3,
        },
    ),
    "mistral3, ministral3": Case("mistral3", {"text_config": {"model_type": "ministral3"}, **TIED}),
    "gemma4": Case(
        "gemma4",
        {
            "text_config": {**SIZES, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
            "vision_config": {**SEEING, "standardize": True},
            "audio_config": {**HEARING, "use_clipped_linears": False},
        },
    ),
    "gemma4, experts": Case(
        "gemma4_moe",
        {
            "text_config": {**SIZES, "num_global_key_value_heads": 2, "global_head_dim": 40},
            "vision_config": {**SEEING, "use_clipped_linears": True},
            "audio_config": HEARING,
        },
    ),
    "gemma4, values": Case("gemma4_moe", {"text_config": {"attention_k_eq_v": False}}),
}


def expanded(architecture: Architecture, shapes: Shapes) -> Shapes:
    """The table's tensors as a checkpoint with these `shapes` holds them, without an MTP head."""
    found: Shapes = {}
    for fact in architecture.tensors.values():
        if fact.part is Part.MTP:
            continue
        if not fact.stacked:
            found[fact.name] = fact.shape
        elif fact.fused and fact.fused.name in shapes:
            count, rows, *rest = fact.shape
            found[fact.fused.name] = (count, rows * fact.fused.of, *rest)
        elif fact.fused and fact.fused.turned in shapes:
            count, rows, columns = fact.shape
            found[fact.fused.turned] = (count, columns, rows * fact.fused.of)
        else:
            for expert in range(fact.shape[0]):
                found[fact.name.replace("*", str(expert))] = fact.shape[1:]
    return found


@pytest.mark.parametrize("case", CASES)
def test_other_configs_give_what_transformers_builds(case: str) -> None:
    """Sizes, biases, ties, layers and experts of other kinds: names and shapes are equal."""
    made = CASES[case].made()
    architecture = architecture_of(made.config, case)
    shapes = respelled(made.shapes, architecture)

    assert shapes == expanded(architecture, shapes)


FEW = {
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    # Published configs state it, for null is a statement.
    "deepseek_v3": {"num_hidden_layers": 4, "q_lora_rank": 1536},
    "gemma4": {"num_hidden_layers": 7},
    "gemma3": {"num_hidden_layers": 7},
}
PLAIN = [name for name in TABLED if name != "gemma4_moe" and not name.startswith("qwen3_5")]
"""Without those whose reader wants what published configs state."""


@pytest.mark.parametrize("family", PLAIN)
def test_a_silent_config_means_what_transformers_takes_it_for(family: str) -> None:
    """With little more than a number of layers, every size is the default of its class."""
    entry = FAMILIES[family]
    entries = FEW.get(family, {"num_hidden_layers": 4})
    nested = "text_config" in entry.config
    config: dict[str, Any] = {"text_config": entries} if nested else dict(entries)
    if nested:
        config["vision_config"] = {}
    if family == "mistral3":
        config["tie_word_embeddings"] = False
    made = skeleton(entry.model_type, entry.model, config)
    architecture = architecture_of({"model_type": entry.model_type, **config}, family)
    shapes = respelled(made.shapes, architecture)

    assert shapes == expanded(architecture, shapes)


@pytest.mark.parametrize("case", CASES)
def test_roles_follow_from_the_modules_that_own_tensors(case: str) -> None:
    """Linears are linears or routers, and embeddings and norms what they are."""
    made = CASES[case].made()
    built = architecture_of(made.config, case).built
    wrong = {
        name: (fact.role, type(owner).__name__)
        for name, owner in made.owners.items()
        if (fact := built.get(name)) and fact.role not in _roles(name, owner, fact.part)
    }

    assert {} == wrong


def _roles(name: str, owner: nn.Module, part: Part) -> set[Role]:
    weight, kind = name.endswith(".weight"), type(owner).__name__
    if isinstance(owner, nn.Linear):
        plain = {Role.VISION} if part is Part.TOWER else {Role.BIAS}
        return {Role.LINEAR, Role.ROUTER} if weight else plain
    if part is Part.TOWER:
        return {Role.VISION}
    if isinstance(owner, nn.Embedding):
        return {Role.EMBEDDING}
    if "Norm" in kind:
        return {Role.NORM}
    if isinstance(owner, nn.Conv1d):
        return {Role.CONV} if weight else {Role.BIAS}
    if kind.endswith("Router"):
        return {Role.ROUTER} if weight else {Role.BIAS, Role.STATE}
    if kind.endswith("Experts"):
        return {Role.BIAS, Role.LINEAR}
    return {Role.STATE}


@pytest.mark.parametrize("case", CASES)
def test_offsets_of_norms_are_those_that_llm_compressor_knows(case: str) -> None:
    """A norm of a decoder layer stores w for a gain of 1 + w where the library converts it."""
    made = CASES[case].made()
    architecture = architecture_of(made.config, case)
    if not architecture.text_config["model_type"].startswith(("gemma3", "qwen3", "llama")):
        pytest.skip("its norms are of a class that the library does not know")
    prefix = architecture.layer_prefix(0)
    layer = made.model.get_decoder().layers[0]
    ours = {
        fact.module.removeprefix(prefix)
        for fact in architecture.built.values()
        if fact.layer == 0 and architecture.offset_norm(fact.name)
    }

    assert ours == set(offset_norms(layer))


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_keeps_in_float32_keeps_its_type(case: str) -> None:
    """Whatever a model is cast to, the corrections of its routers are not."""
    made = CASES[case].made()
    architecture = architecture_of(made.config, case)
    strict = made.model._keep_in_fp32_modules_strict or ()
    names = [n for n in architecture.built for kept in strict if kept in n.split(".")]

    assert [] == [name for name in names if not architecture.keeps_dtype(name)]


def test_text_configs_are_of_types_that_transformers_runs() -> None:
    """Passes through a model ask transformers for a causal language model of this type."""
    configs = [*(case.made().config for case in CASES.values()), {"model_type": "kimi_k2"}]
    for config in configs:
        architecture = architecture_of(config, config["model_type"])
        config_class = CONFIG_MAPPING[architecture.text_config["model_type"]]
        assert config_class in MODEL_FOR_CAUSAL_LM_MAPPING


@pytest.mark.parametrize(
    ("model_type", "entry"), [("deepseek_v3", "q_lora_rank"), ("mistral", "sliding_window")]
)
def test_null_is_not_silence(model_type: str, entry: str) -> None:
    """Where a config states it, transformers takes no default of its own in its place."""
    architecture = architecture_of({"model_type": model_type, entry: None}, "config.json")

    assert architecture.text_config[entry] is None
    assert CONFIG_MAPPING[model_type]().to_dict()[entry] is not None


@pytest.mark.parametrize(("stated", "told"), [({}, 0.5), ({"partial_rotary_factor": 0.25}, 0.25)])
def test_what_transformers_does_not_know_is_said_in_its_own_words(
    stated: Mapping[str, Any], told: float
) -> None:
    """As how much of a head turns, unless the config says that too; it goes out as it came."""
    config = {"model_type": "minimax_m2", "head_dim": 128, "rotary_dim": 64, **stated}
    architecture = architecture_of(config, "config.json")

    assert told == architecture.text_config["partial_rotary_factor"]
    assert config == architecture.published_config([])


# --- what tables say of modules -------------------------------------------------------------------


@pytest.mark.parametrize("model_type", known_types())
def test_modules_that_a_table_names_are_there(model_type: str) -> None:
    """Inputs, fusions and smoothing speak of modules that some layer of the family has."""
    table = load_table(SHIPPED / f"{model_type}.yaml").table
    rows = {row.name.rpartition(".")[0] for row in table.blocks["layer"]}
    named = {module for group in table.inputs for module in group}
    named |= {module for parts in table.fusions.values() for module in parts}
    for item in table.smoothing:
        named |= {item.smooth, *item.balance}

    assert set() == named - rows


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"model_type": "gemma3_text"}, {"sliding": 8, "full": 8}),
        ({"model_type": "qwen3_next"}, {"linear": 0, "full": 16}),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M*E-"},
            {"linear": 0, "full": 32, "moe": 0, "mlp": 0},
        ),
    ],
)
def test_heads_score_tokens_in_layers_with_attention(
    config: dict[str, Any], heads: dict[str, int]
) -> None:
    """As many as transformers has where the config is silent."""
    architecture = architecture_of(config, "config.json")

    assert heads == {kind: architecture.attention_heads(kind) for kind in heads}


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("qwen3_5_text", ["mtp_num_hidden_layers"]),
        ("glm4_moe", ["num_nextn_predict_layers", "num_mtp_layers"]),
        ("nemotron_h", ["num_nextn_predict_layers"]),
    ],
)
def test_a_layer_is_the_same_with_and_without_a_head(family: str, entries: list[str]) -> None:
    """So variants with the MTP head and without share their calibration."""
    entry = FAMILIES[family]
    config = {"model_type": entry.model_type, **entry.config}
    without = architecture_of(config, "config.json").layer_config
    for name in entries:
        for count in (0, 1):
            found = architecture_of({**config, name: count}, "config.json").layer_config
            assert without == found


def test_smoothing_is_that_of_llm_compressor() -> None:
    """For dense models: the mappings that the library resolves for the class, where they fit."""
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import (
        get_layer_mappings_from_model,
    )

    for name in ("llama, sizes", "mistral", "qwen2", "qwen3", "gemma3_text"):
        made = CASES[name].made()
        architecture = architecture_of(made.config, name)
        modules = [module for module, _ in made.model.get_decoder().layers[0].named_modules()]
        theirs = {
            (smooth, tuple(found))
            for mapping in get_layer_mappings_from_model(made.model)
            for smooth in _matching(mapping.smooth_layer, modules)
            if (found := [n for b in mapping.balance_layers for n in _matching(b, modules)])
        }
        # Where queries are grouped, the library finds that this one does not fit.
        theirs.discard(("self_attn.v_proj", ("self_attn.o_proj",)))

        assert theirs == {(item.smooth, item.balance) for item in architecture.smoothing}


def _matching(pattern: str, modules: list[str]) -> list[str]:
    expression = re.compile(pattern.removeprefix("re:"))
    return [module for module in modules if expression.match(module)]


def test_a_stack_is_fused_as_engines_run_it() -> None:
    """Gate and up of all experts of a layer are one module there."""
    made = Case("qwen3_moe").made()
    fusions = {fusion.module: fusion.parts for fusion in architecture_of(made.config, "").fusions}

    prefix = "model.layers.3.mlp.experts.*."
    assert (f"{prefix}gate_proj", f"{prefix}up_proj") == fusions[f"{prefix}gate_up_proj"]


def test_a_latent_cache_is_counted_as_what_it_holds() -> None:
    """DeepSeek caches one vector for each token and layer, of both ranks together."""
    made = Case("deepseek_v3").made()
    geometry = architecture_of(made.config, "").kv_geometry

    assert 128 + 64 == 2 * geometry.kv_heads * geometry.head_dim


def test_keys_that_nobody_reads_may_be_there() -> None:
    """Published checkpoints of Gemma 4 have them in layers that read those of earlier ones."""
    made = Case("gemma4").made()
    architecture = architecture_of(made.config, "gemma4")
    shared = {f"{architecture.layer_prefix(layer)}self_attn.k_proj.weight" for layer in (3, 4, 5)}

    assert shared < set(architecture.unread)
    assert not shared & set(architecture.built)


PUBLISHED: Mapping[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": (
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
        },
        8_030_261_248,
    ),
    "Qwen3 8B": (
        {
            "model_type": "qwen3",
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
        8_190_735_360,
    ),
    "Qwen3 235B": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 4096,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "head_dim": 128,
        },
        235_093_634_560,
    ),
    "Qwen3-Next 80B": ({"model_type": "qwen3_next"}, 79_674_391_296),
    "Mixtral 8x7B": ({"model_type": "mixtral"}, 46_702_792_704),
    "Phi-4 mini": (
        {
            "model_type": "phi3",
            "vocab_size": 200064,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        3_836_021_760,
    ),
    "Gemma 3 1B": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
        999_885_952,
    ),
    "DeepSeek-V3": ({"model_type": "deepseek_v3", "q_lora_rank": 1536}, 671_026_419_200),
    "Kimi K2": (
        {
            "model_type": "deepseek_v3",
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "n_routed_experts": 384,
            "first_k_dense_replace": 1,
            "q_lora_rank": 1536,
        },
        1_026_408_232_448,
    ),
    "gpt-oss 120B": ({"model_type": "gpt_oss"}, 116_829_156_672),
}
"""Entries of published configs that differ from the defaults, and how many parameters there are."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_publishers_say(model: str) -> None:
    """The table's tensors at full size, without MTP heads, count them exactly."""
    config, parameters = PUBLISHED[model]
    facts = architecture_of(config, model).tensors.values()

    assert parameters == sum(math.prod(f.shape) for f in facts if f.part is not Part.MTP)
