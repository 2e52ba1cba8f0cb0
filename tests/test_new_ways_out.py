"""`carnice new` where a model does not fit a format, and where the hub is out of reach."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Finished, TinyCheckpoint
from tiny import read_json
from zoo import FAMILIES, write_family

from carnice_build.commands.build import build_variants
from carnice_build.commands.new import NewRecipe, new_recipe
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.errors import PlanError
from carnice_build.formats.autoround.format import AutoRoundFormat
from carnice_build.models import architecture_of
from carnice_build.planning.repair import endings
from carnice_build.recipe.patterns import Patterns, expression
from carnice_build.recipe.schema import Strict

Carnice = Callable[..., Finished]

UNEVEN = ("llama", {"intermediate_size": 328})
"""Rows of 328 weights, of which neither groups of 64 nor blocks of 16 make all."""

UNEVEN_EXPERTS = ("qwen3_moe", {"moe_intermediate_size": 72})


@pytest.fixture
def model(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> Path:
    """A checkpoint elsewhere, with a chat template."""
    return tiny_checkpoint(tmp_path / "tiny")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Path]:
    """Writes a checkpoint of a family, whose config is changed, once."""
    made: dict[str, Path] = {}

    def write(family: str, changed: dict[str, Any]) -> Path:
        if family not in made:
            entry = FAMILIES[family]
            folder = tmp_path_factory.mktemp("uneven") / family
            config = {**entry.config, **changed}
            made[family] = write_family(folder, replace(entry, config=config), "hub")
        return made[family]

    return write


def written(new: NewRecipe) -> dict[str, Any]:
    """What the file itself says."""
    content = yaml.safe_load(new.path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "section", "why"),
    [
        (
            "mlx-mixed_3_6",
            {"rules+": [{"match": ["*.down_proj"], "skip": True}]},
            "group_size 64 does not divide the 328 inputs",
        ),
        (
            "int4-rtn",
            {"keep": ["*.down_proj.weight"]},
            "group_size 128 does not divide the 328 inputs",
        ),
        (
            "w4a16-rtn",
            {"ignore+": [r"re:.*\.down_proj$"]},
            "group_size 128 does not divide the 328 inputs",
        ),
    ],
)
def test_modules_that_do_not_fit_stay_in_full_precision(
    empty: Path,
    uneven: Callable[..., Path],
    preset: str,
    section: dict[str, Any],
    why: str,
) -> None:
    """In the format's own words, with the reason, and what is written builds as it is."""
    new = new_recipe("mine", str(uneven(*UNEVEN)), preset)
    build_variants(["mine"])
    (checked,) = verify_variants(["mine"], settings=VerifySettings(run=False)).variants

    assert section == written(new)["quantize"]
    sentence = f"4 modules stay in full precision, because {why}"
    assert f"  # {sentence}.\n" in new.path.read_text()
    assert sentence in new.found
    assert not any("down_proj" in module for module in new.plan.conversion.quantized)
    assert checked.passed


def test_blocks_of_nvfp4_may_not_fit_either(empty: Path, uneven: Callable[..., Path]) -> None:
    """They are of 16; the recipe calibrates on a text of the project."""
    (empty / "text.jsonl").write_text('{"text": "one two three four five"}\n' * 20)
    new = new_recipe("mine", str(uneven(*UNEVEN)), "nvfp4", dataset="text.jsonl")

    assert {"keep+": ["*.down_proj.weight"]} == written(new)["quantize"]
    assert "blocks of 16 do not divide the 328 inputs" in new.path.read_text()


def test_what_is_not_calibrated_stays_as_well(empty: Path, tmp_path: Path) -> None:
    """Whatever a plan finds first: here rows that blocks do not fill, then a linear of no layer."""
    entry = FAMILIES["gemma4"]
    text = {**entry.config["text_config"], "hidden_size_per_layer_input": 40}
    entry = replace(entry, config={**entry.config, "text_config": text})
    folder = write_family(tmp_path / "gemma4", entry)
    (empty / "text.jsonl").write_text('{"text": "one two three four five"}\n' * 20)
    new = new_recipe("mine", str(folder), "nvfp4", dataset="text.jsonl")
    kept = written(new)["quantize"]["keep+"]

    assert "*.per_layer_projection.weight" == kept[0]
    assert not any("per_layer_projection" in name for name in new.plan.conversion.quantized)


def test_experts_stay_together_where_an_engine_runs_them_as_one(
    empty: Path, uneven: Callable[..., Path]
) -> None:
    """Of a layer, vLLM takes all linears of all experts in one scheme; mlx-lm does not mind."""
    folder = str(uneven(*UNEVEN_EXPERTS))
    vllm = new_recipe("vllm", folder, "int4-rtn")
    mlx = new_recipe("mlx", folder, "mlx-4bit")
    stacks = [f"*.experts.*.{name}" for name in ("down_proj", "gate_proj", "up_proj")]

    assert [f"{stack}.weight" for stack in stacks] == written(vllm)["quantize"]["keep"]
    assert any(
        "9 modules stay in full precision" in sentence and "run the others as one" in sentence
        for sentence in vllm.found
    )
    assert [{"match": stacks[:1], "skip": True}] == written(mlx)["quantize"]["rules+"]


def test_a_recipe_is_refused_with_all_that_does_not_fit(
    empty: Path, uneven: Callable[..., Path], carnice: Carnice
) -> None:
    """One sentence names one module, how many more there are, and the entry for them."""
    new = new_recipe("mine", str(uneven(*UNEVEN)), "int4-rtn")
    new.path.write_text(new.path.read_text().replace("*.down_proj", "*.layers.0.*.down_proj"))
    finished = carnice("plan", "mine")

    assert 2 == finished.code
    assert (
        "module model.layers.1.mlp.down_proj: group_size 128 does not divide the 328 inputs; "
        "and 2 more cannot be quantized; expected it among `keep`"
    ) in finished.err


def test_a_list_of_ones_own_keeps_what_the_family_keeps(model: Path) -> None:
    """AutoRound's `keep` takes the place of what the family holds to be too narrow."""
    architecture = architecture_of(read_json(model / "config.json"), "here")
    knobs = {"format": "autoround", "method": "nearest"}
    narrow = list(architecture.narrow_linears)

    assert narrow
    for keep, found in [
        (None, {"keep": [*narrow, "*.odd.weight"]}),
        (["*.x"], {"keep+": ["*.odd.weight"]}),
    ]:
        made: Strict = AutoRoundFormat.model_validate({**knobs, "keep": keep})
        assert isinstance(made, AutoRoundFormat)
        assert found == made.leaving(["*.odd"], architecture)


@pytest.mark.parametrize(
    ("names", "others", "found"),
    [
        (["a.0.x", "a.1.x"], ["a.0.y"], ["*.x"]),
        (["a.0.x"], ["a.1.x"], ["*.0.x"]),
        (["a.x"], ["b.a.x"], ["a.x"]),
        (["a.experts.*.x"], ["a.shared.x"], ["*.experts.*.x"]),
        (["x"], ["y"], ["x"]),
    ],
)
def test_endings_match_nothing_else(names: list[str], others: list[str], found: list[str]) -> None:
    """They are as short as they can be, and none begins with the place of an expert."""
    assert found == endings(names, [*names, *others])
    assert names == Patterns(found).select([*names, *others])


@pytest.mark.parametrize(
    ("glob", "pattern"),
    [("a.b", "a.b"), ("*.b", r"re:.*\.b$"), ("a.*", r"re:a\..*"), ("a.*.b", r"re:a\..*\.b$")],
)
def test_llm_compressor_is_told_in_its_own_words(glob: str, pattern: str) -> None:
    """It knows names and expressions, and no globs."""
    names = ["a.b", "a.c.b", "x.b", "a.b.c", "ab"]

    assert pattern == expression(glob)
    assert Patterns(glob).select(names) == Patterns(pattern).select(names)


def test_other_errors_of_a_plan_stay_what_they_are(empty: Path, model: Path) -> None:
    """Only what does not fit in size has a way out."""
    error = PlanError("something else")

    assert {} == error.unfit
    assert {"a": "why"} == PlanError("x", unfit={"a": "why"}).revised(where="here").unfit


# --- what is calibrated on ------------------------------------------------------------------------


def rows(path: Path, count: int) -> None:
    """Write a dataset of dialogues."""
    turns = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * count, encoding="utf-8")


def test_a_text_of_ones_own_needs_no_hub(empty: Path, model: Path) -> None:
    """A file of the project is named from there, and nothing is asked of anybody."""
    (empty / "data").mkdir()
    rows(empty / "data" / "text.jsonl", 30)
    new = new_recipe("mine", str(model), "nvfp4", dataset="./data/../data/text.jsonl")

    assert {"dataset": "data/text.jsonl"} == written(new)["calibration"]
    assert new.plan.dataset is not None
    assert new.plan.dataset.file is not None


def test_a_folder_stands_for_the_dataset_in_it(empty: Path, model: Path) -> None:
    """Whatever else there is."""
    (empty / "data").mkdir()
    (empty / "data" / "README.md").touch()
    rows(empty / "data" / "text.jsonl", 30)
    new = new_recipe("mine", str(model), "nvfp4", dataset="data")

    assert {"dataset": "data/text.jsonl"} == written(new)["calibration"]


def test_a_short_text_gives_as_many_samples_as_it_has(empty: Path, model: Path) -> None:
    """A recipe that asks for more would not build."""
    rows(empty / "text.jsonl", 7)
    new = new_recipe("mine", str(model), "nvfp4", dataset="text.jsonl")

    assert {"dataset": "text.jsonl", "samples": 7} == written(new)["calibration"]
    assert "it is calibrated on 7 samples, not 20: text.jsonl has no more" in new.found
    assert "  # text.jsonl has no more.\n" in new.path.read_text()


def test_text_needs_no_chat_template(empty: Path, model: Path, carnice: Carnice) -> None:
    """Lines of a file are taken as they are; dialogues are refused in one sentence."""
    (model / "chat_template.jinja").unlink()
    (empty / "text.txt").write_text("one two three four\n" * 30)
    rows(empty / "text.jsonl", 30)
    arguments = ("--from", model, "--as", "nvfp4")
    refused = carnice("new", "other", *arguments, "--dataset", "text.jsonl")

    assert 0 == carnice("new", "mine", *arguments, "--dataset", "text.txt").code
    assert 2 == refused.code
    assert "holds conversations, but there is no chat template" in refused.err
    assert not (empty / "recipes" / "other.yaml").exists()
    assert "or --dataset FILE.txt" in carnice("new", "third", *arguments).err


def test_another_dataset_on_the_hub_has_other_subsets(
    empty: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the preset's own dataset would not be found there."""
    monkeypatch.setattr("carnice_build.checkpoint.hub_listing.dataset_commit", lambda *_: "d" * 40)
    new = new_recipe("mine", str(model), "nvfp4", dataset="some/dataset")

    assert {"dataset": "some/dataset", "subset": None} == written(new)["calibration"]


def test_a_hub_that_is_out_of_reach_is_no_dead_end(
    empty: Path, model: Path, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one sentence names the option, and nothing is written."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("carnice_build.checkpoint.hub_listing._last_commit", lambda *_: "")
    finished = carnice("new", "mine", "--from", model, "--as", "nvfp4")

    assert 2 == finished.code
    assert "calibration.dataset: datasets/neuralmagic/calibration@main: " in finished.err
    assert "--dataset FILE, which takes a .jsonl, .parquet or .txt file of yours" in finished.err
    assert 1 == len(finished.err.splitlines())
    assert not (empty / "recipes").exists()


REFUSED: dict[str, tuple[str, str, str]] = {
    "nothing of that name": ("nvfp4", "nowhere", "'nowhere' is no dataset; expected a .jsonl"),
    "no file of that name": ("nvfp4", "no.jsonl", "there is no file 'no.jsonl'"),
    "no name": ("nvfp4", "", "--dataset: names no dataset; expected a .jsonl"),
    "a loop of links": ("nvfp4", "loop.jsonl", "'loop.jsonl' is a link that is one of a loop"),
    "a link to nothing": ("nvfp4", "gone.jsonl", "'gone.jsonl' is a link that leads to nothing"),
    "a pipe": ("nvfp4", "pipe.txt", "'pipe.txt' is a pipe; expected a .jsonl, .parquet or .txt"),
    "a device": ("nvfp4", "device.txt", "'device.txt' is a device; expected"),
    "another kind of file": ("nvfp4", "two/a.csv", "'two/a.csv' is no dataset"),
    "a folder with two": ("nvfp4", "two", "'two' holds 2 .jsonl, .parquet or .txt files"),
    "a folder with none": ("nvfp4", "none", "'none' holds no .jsonl, .parquet or .txt files"),
    "elsewhere": ("nvfp4", "../text.jsonl", "'../text.jsonl' is outside the project"),
    "no text": ("nvfp4", "bad.jsonl", "bad.jsonl: row 1: holds no text"),
    "less than a sample": ("int4-autoround", "short.txt", "short.txt: gives no sample"),
    "nothing to calibrate": ("mlx-4bit", "short.txt", "mlx-4bit is not calibrated; expected a "),
}


@pytest.mark.parametrize(("preset", "dataset", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bad_dataset_is_refused_and_nothing_is_written(
    empty: Path, model: Path, carnice: Carnice, preset: str, dataset: str, said: str
) -> None:
    """One sentence and exit code 2."""
    for name in ("two", "none"):
        (empty / name).mkdir()
    for name in ("two/a.txt", "two/b.txt", "two/a.csv", "../text.jsonl", "short.txt"):
        (empty / name).write_text("one two three\n")
    (empty / "bad.jsonl").write_text("{}\n")
    (empty / "loop.jsonl").symlink_to("loop.jsonl")
    (empty / "gone.jsonl").symlink_to("elsewhere.jsonl")
    (empty / "device.txt").symlink_to("/dev/null")
    os.mkfifo(empty / "pipe.txt")
    finished = carnice("new", "mine", "--from", model, "--as", preset, "--dataset", dataset)

    assert 2 == finished.code, finished.err
    assert said in finished.err
    assert 1 == len(finished.err.splitlines())
    assert not (empty / "recipes").exists()
