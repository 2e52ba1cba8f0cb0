"""Models that engines build of modules with other names than a checkpoint's tensors have.

transformers 5 builds Gemma 3 and Mistral 3 with their towers so.
What it builds is seen in it; vLLM is not installed here, so that of 0.32 stands below what it does
to lists of modules, and what it then looks up in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import skeleton
from family_builds import INT4_WEIGHTS, build_checked, options_of, write_family
from tiny import read_json, write_json
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from verifying import Copy
from zoo import FAMILIES

from carnice_build.formats.folder import ModelFolder, open_folder
from carnice_build.formats.registry import readers_of
from carnice_build.models import architecture_of
from carnice_build.models.base import LINEARS, Architecture, Part

RESPELLED = ("gemma3", "mistral3")

TOWERS = ["re:.*lm_head", r"re:vision_tower\..*", r"re:multi_modal_projector\..*"]
RECIPES = {
    "int4": "quantize: {format: autoround, method: nearest}\n",
    "fp8": "quantize: {format: compressed-tensors, scheme: FP8_DYNAMIC}\n",
    "w4a16": yaml.safe_dump(
        {
            "quantize": {
                "format": "compressed-tensors",
                "algorithm": "nearest",
                "targets": ["Linear"],
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4_WEIGHTS}},
                "ignore": TOWERS,
            }
        }
    ),
}

MAPPERS: Mapping[str, Mapping[str, str]] = {
    "gemma3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "mistral3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
}
"""`hf_to_vllm_mapper.orig_to_new_prefix` of vLLM's `gemma3_mm` and `mistral3`.

Each is tried in turn on the names in `ignore`, `extra_config` and `block_name_to_quantize`, by
`apply_vllm_mapper`, as it is on the names of tensors.
What vLLM then builds is called as in checkpoints of the hub: `SiglipVisionModel` has a
`vision_model`, and the language model its `lm_head` and a `model`.
"""


def in_vllm(family: str, names: list[str]) -> set[str]:
    """What vLLM makes of a list of modules."""
    found = set()
    for name in names:
        for start, instead in MAPPERS[family].items():
            if name.startswith(start):
                name = instead + name.removeprefix(start)
        found.add(name)
    return found


@dataclass(frozen=True)
class Built:
    """A folder with its tower, and what it was built from."""

    family: str
    form: str
    root: Path

    @cached_property
    def folder(self) -> ModelFolder:
        return open_folder(self.root / "out" / self.form)

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.folder.config, self.family)

    @property
    def stated(self) -> dict[str, Any]:
        """How config.json says that the model is quantized."""
        return dict(self.folder.config["quantization_config"])

    @property
    def listed(self) -> list[str]:
        """What it says is not."""
        return list(self.stated["extra_config" if self.form == "int4" else "ignore"])

    def linears(self, *, quantized: bool) -> list[str]:
        """The linears of decoder layers, or all others, as the checkpoint spells them."""
        return [
            fact.module
            for fact in self.architecture.built.values()
            if fact.role in LINEARS and (fact.part is Part.LAYERS) is quantized
        ]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The quantized weights, dequantized, by the names of their modules in transformers."""
        reader, *_ = readers_of(self.folder)
        for module in self.linears(quantized=True):
            values = reader.values(self.folder.tensors, module)
            built, *_ = self.architecture.engine_names(module)
            yield built, torch.from_numpy(values.rows(0, values.shape[0]))


CASES = [(family, form) for family in RESPELLED for form in RECIPES]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family, form = request.param
    root = tmp_path_factory.mktemp(family)
    source = write_family(root / "source", family, {})
    build_checked(root, source, form, RECIPES[form])
    return Built(family, form, root)


def only(*forms: str) -> pytest.MarkDecorator:
    """What is asked of some formats alone."""
    cases = [case for case in CASES if case[1] in forms]
    return pytest.mark.parametrize("built", cases, indirect=True, ids="-".join, scope="module")


@dataclass(frozen=True)
class Loaded:
    """A folder as transformers loads it."""

    model: Any
    report: Mapping[str, Any]


@pytest.fixture(scope="module")
def loaded(built: Built) -> Loaded:
    model, report = AutoModelForImageTextToText.from_pretrained(
        built.folder.path, dtype="bfloat16", output_loading_info=True
    )
    return Loaded(model, report)


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens, [1, tokens, vocabulary]."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(1, 17)[None]).logits.float()
    return found


def test_transformers_finds_every_tensor(loaded: Loaded) -> None:
    """None is missing, and none is left over."""
    assert not {kind: names for kind, names in loaded.report.items() if names}


def test_transformers_quantizes_what_is_quantized(built: Built, loaded: Loaded) -> None:
    """The linears of decoder layers, and neither the tower nor the head."""
    mark = "qweight" if built.form == "int4" else "quantization_scheme"
    found = {name for name, module in loaded.model.named_modules() if hasattr(module, mark)}

    assert {name for name, _ in built.weights()} == found


def test_transformers_computes_with_the_dequantized_weights(built: Built, loaded: Loaded) -> None:
    """As the source's model does with these in place of its own.

    In FP8 activations are rounded as well, of which logits of random weights make more.
    """
    reference = AutoModelForImageTextToText.from_pretrained(built.root / "source", dtype="bfloat16")
    for name, weight in built.weights():
        reference.get_submodule(name).weight.data = weight.bfloat16()
    wanted = logits(reference)
    off = (logits(loaded.model) - wanted).norm() / wanted.norm()

    assert off < (0.2 if built.form == "fp8" else 0.02)
    if built.form == "fp8":
        held = {name: loaded.model.get_submodule(name).weight for name, _ in built.weights()}
        assert all(torch.equal(held[n].bfloat16(), w.bfloat16()) for n, w in built.weights())


def test_vllm_finds_every_plain_linear_in_the_list(built: Built) -> None:
    """By its own name for it, which is also the checkpoint's; and no quantized one."""
    found = in_vllm(built.family, built.listed)

    assert found.issuperset(built.linears(quantized=False))
    assert found.isdisjoint(built.linears(quantized=True))


@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_text_models_are_loaded_too(form: str, tmp_path: Path) -> None:
    """Of Nemotron-H checkpoints of the hub say `backbone`, where engines have `model`."""
    layers = {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3}
    source = write_family(tmp_path / "source", "nemotron_h", layers)
    build_checked(tmp_path, source, form, RECIPES[form])
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / form, dtype="bfloat16", output_loading_info=True
    )

    assert not {kind: names for kind, names in report.items() if names}


def test_the_list_names_what_transformers_builds(built: Built) -> None:
    """All linears that stay plain, by their paths in its model."""
    entry = FAMILIES[built.family]
    modules = skeleton(entry.model_type, entry.model, entry.config).model.named_modules()
    plain = {name for name, module in modules if type(module) is torch.nn.Linear}

    assert plain - {name for name, _ in built.weights()} <= set(built.listed)


@only("int4")
def test_blocks_are_those_of_both_engines(built: Built) -> None:
    """Decoder layers, of which auto-round's loader and vLLM quantize what is not listed."""
    blocks = built.stated["block_name_to_quantize"].split(",")

    assert "model.language_model.layers" in blocks
    assert {"language_model.model.layers"} == in_vllm(built.family, blocks)


@only("fp8", "w4a16")
def test_the_recipe_that_is_published_names_modules_of_transformers(built: Built) -> None:
    """llm-compressor would leave alone what config.json says is plain, and nothing else."""
    from compressed_tensors.utils import match_named_modules

    text = (built.folder.path / "recipe.yaml").read_text(encoding="utf-8")
    stage = yaml.safe_load(text)["default_stage"]["default_modifiers"]
    ignore = stage["QuantizationModifier"]["ignore"]
    entry = FAMILIES[built.family]
    model = skeleton(entry.model_type, entry.model, entry.config).model

    assert {name for name, _ in built.weights()} == {
        name for name, _ in match_named_modules(model, ["Linear"], ignore)
    }


def test_tensors_keep_the_names_of_the_checkpoint(built: Built) -> None:
    """Only lists are spelled otherwise."""
    prefixes = ("language_model.", "vision_tower.", "multi_modal_projector.")

    assert all(name.startswith(prefixes) for name in built.folder.tensors)


def test_verify_refuses_names_of_the_checkpoint_in_lists(built: Built, tmp_path: Path) -> None:
    """transformers looks for others, and loads a folder that has these alone at random."""
    copied = Copy.of(built.form, options_of(built.root, built.root / "source"), tmp_path)
    config = read_json(copied.folder / "config.json")
    stated = config["quantization_config"]
    key = "extra_config" if built.form == "int4" else "ignore"
    plain = built.linears(quantized=False)
    stated[key] = {name: {"bits": 16} for name in plain} if built.form == "int4" else plain
    if built.form == "int4":
        stated["block_name_to_quantize"] = "language_model.model.layers"
    write_json(copied.folder / "config.json", config)
    found = copied.problems()["structure"]

    assert "does not list lm_head, which is not quantized" in found
    assert "does not list model.vision_tower." in found
    if built.form == "int4":
        assert "lists no block that holds language_model.model.layers.0." in found
