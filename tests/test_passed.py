"""Models whose layers are given more than hidden states, calibrated, built and run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Finished, Project
from driving import Checkpoint
from safetensors.torch import load_file, save_file
from tiny import read_all_tensors
from torch import Tensor, nn
from transformers import AutoTokenizer
from zoo import write_zoo

from carnice_build.backends.awq import AwqSettings, apply_smoothing, smooth_layer
from carnice_build.backends.compressed import WeightScheme
from carnice_build.calibration.beside_files import BesideFiles
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.passes import Forward
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import BackendError, PlanError
from carnice_build.execute.processes import LocalRunner
from carnice_build.graph import Action
from carnice_build.models.base import SmoothingMapping
from carnice_build.tensor_file import TensorFile

EAGER = Arithmetic("bfloat16", "eager", threads=1)

Carnice = Callable[..., Finished]

TEXTS = [f"{number} green bottles hanging on the wall, " * 6 for number in range(3)]
RECIPE = """
variant: {name}
description: A tiny model with embeddings for each layer, and layers without keys
sources: {{body: {{model: tiny/passing}}}}
quantize: {quantize}
calibration:
  dataset: rows.txt
  subset: null
  samples: 3
  length: 40
  threads: 1
  attention: eager
"""
QUANTIZE = {
    "nvfp4": "{format: nvfp4}",
    "awq": """
  format: compressed-tensors
  algorithm: awq
  targets: [Linear]
  config_groups:
    group_0:
      targets: [Linear]
      weights: {num_bits: 4, symmetric: false, strategy: group, group_size: 64, observer: mse}
  ignore: ['re:.*lm_head', 're:.*per_layer_.*']
""",
}


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose variants of a tiny Gemma 4 are built."""
    project = Project(tmp_path_factory.mktemp("passing") / "project")
    write_zoo(project.root / "source", "gemma4")
    project.recipes.mkdir()
    (project.recipes / "_profiles.yaml").write_text("demo:\n  tiny/passing: source\n")
    (project.root / "rows.txt").write_text("\n".join(TEXTS))
    for name, quantize in QUANTIZE.items():
        project.recipe(name, RECIPE.format(name=name, quantize=quantize))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        build_variants(list(QUANTIZE), project.options(jobs=1))
        yield project


def whole(project: Project, how: Arithmetic = EAGER) -> Any:
    """The source as transformers loads it."""
    return Checkpoint(project.root / "source").whole(how)


def samples(project: Project) -> list[Tensor]:
    """The tokens that the calibrations see."""
    tokenizer = AutoTokenizer.from_pretrained(project.root / "source")
    return [torch.tensor(tokenizer(text)["input_ids"][:40]) for text in TEXTS]


def test_input_scales_are_those_of_the_whole_model(passing: Project) -> None:
    """Each is the largest input that hooks on transformers' model see, over 2688, by the bits."""
    model = whole(passing)
    amax: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(f"model.language_model.{name}"))
    for tokens in samples(passing):
        with torch.no_grad():
            model(tokens[None], use_cache=False)
    found = {
        name.removesuffix(".input_scale"): np.frombuffer(tensor.data, "<f4")[0]
        for name, tensor in read_all_tensors(passing.out / "nvfp4").items()
        if name.endswith(".input_scale")
    }

    assert 3 * 9 + 3 * 7 + 1 == len(found)
    assert found == {name: np.float32(amax[name]) / np.float32(2688) for name in found}


def test_layers_are_smoothed_as_when_they_follow_each_other_in_memory(passing: Project) -> None:
    """Through files a search has the bits that it has with what the layers themselves left."""
    checkpoint = Checkpoint(passing.root / "source")
    rows = sorted(samples(passing), key=len, reverse=True)
    beside = [checkpoint.beside(EAGER, tokens) for tokens in rows]
    hidden = [checkpoint.embedded(tokens) for tokens in rows]
    mapping = SmoothingMapping("mlp.up_proj", ("mlp.down_proj",))
    norm = SmoothingMapping("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
    settings = AwqSettings((norm, mapping), WeightScheme(group_size=64))
    found = {}
    for layer in range(checkpoint.layers):
        driver, tensors = LayerDriver(checkpoint.config, layer, EAGER), checkpoint.layer(layer)
        made: dict[int, Tensor] = {}
        scales = smooth_layer(
            driver,
            tensors,
            [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")],
            [driver.enter(state) for state in hidden],
            settings,
            made.__setitem__,
            beside=lambda index, layer=layer: beside[index](layer),
        )
        hidden = [made[index] for index in range(len(rows))]
        smoothed = apply_smoothing(tensors, scales, settings, [])
        name = f"{checkpoint.prefix}layers.{layer}.pre_feedforward_layernorm.weight"
        found[name] = smoothed["pre_feedforward_layernorm.weight"]
    shards = (passing.out / "awq").glob("*.safetensors")
    built = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}

    assert found.keys() <= built.keys()
    assert [] == [name for name in found if not torch.equal(found[name], built[name])]


def test_parts_are_given_their_own_and_find_the_same(passing: Project) -> None:
    """Embeddings, shared keys and values, and linears before the layers: the tensors are equal."""
    before = read_all_tensors(passing.out / "nvfp4")
    options = passing.options(jobs=1, overrides=("calibration.parts=2",), out=passing.root / "two")
    result = build_variants(["nvfp4"], options)

    assert before == read_all_tensors(passing.root / "two" / "nvfp4")
    assert 1 + 2 * (2 + 6) + (6 + 1) == result.actions_run


@pytest.mark.parametrize("variant", ["nvfp4", pytest.param("awq", marks=pytest.mark.wide)])
def test_what_is_built_runs(passing: Project, carnice: Carnice, variant: str) -> None:
    """Checks of the files pass; in a process of its own the model generates and is measured."""
    text = REPOSITORY / "demo" / "heldout.txt"
    finished = carnice("verify", variant, "--text", text, "--samples", 2, "--json")
    (result,) = json.loads(finished.out)["variants"]
    outcomes = {check["name"]: check["outcome"] for check in result["checks"]}

    assert "failed" not in outcomes.values(), result["checks"]
    assert ("passed", "passed") == (outcomes["generate"], outcomes["perplexity"])


def test_auto_round_refuses_to_tune_them(passing: Project) -> None:
    """The plan says it, before anything is read."""
    tune = "{format: autoround, method: tune, group_size: 64}"
    text = RECIPE.format(name="tuned", quantize=tune).replace("eager", "sdpa")
    passing.recipe("tuned", text)

    with pytest.raises(PlanError, match=r"cannot tune layer 0, .* given per_layer_input"):
        plan_variants(["tuned"], passing.options())


def test_a_layer_that_makes_something_else_than_its_table_says_is_an_error() -> None:
    """The layer is named, and what it left for others."""
    made = BesideFiles(
        {"layer": 1, "device": "cpu", "made": [["shared", "keys", [[2, None, 64]]]]},
        [range(5)],
        [],
        [TensorFile(TensorSpec("BF16", (1, 5, 128)), "nowhere")],
    )
    made.given(0)["shared"]["keys"] = (torch.zeros(1, 2, 5, 32),)

    with pytest.raises(BackendError, match=r"layer 1 leaves \[\[1, 2, 5, 32\]\] under 'keys'"):
        made.put(0)


def test_a_changed_layer_makes_nothing_twice_that_others_are_given(
    passing: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What layers before it made is gone with the last build; it is made once more, for all."""
    project = Project(tmp_path / "project")
    shutil.copytree(passing.root, project.root)
    monkeypatch.chdir(project.root)
    path = project.root / "source" / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("layers.3.mlp.down_proj.weight"))
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, path, {"format": "pt"})
    ran: Counter[int] = Counter()
    run = LocalRunner.run

    def counted(self: LocalRunner, action: Action, *files: Any) -> None:
        if isinstance(action.op, Forward):
            ran[action.params["layer"]] += 1
        run(self, action, *files)

    monkeypatch.setattr(LocalRunner, "run", counted)
    build_variants(["nvfp4"], project.options(jobs=1))

    assert dict.fromkeys(range(6), 1) == ran
