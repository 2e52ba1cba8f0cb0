"""`carnice new`: a first recipe for a model that nobody here has seen, which builds as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chats import XML, hermes
from conftest import REPOSITORY, Finished, Project, TinyCheckpoint
from tiny import Tensor, bf16, read_json, read_safetensors, write_json, write_safetensors
from zoo import write_zoo

from carnice_build.commands import new
from carnice_build.commands.build import build_variants
from carnice_build.commands.dataset import sample_counts
from carnice_build.commands.new import NewRecipe, new_recipe
from carnice_build.commands.options import Options
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CarniceError, CheckpointError, PlanError
from carnice_build.extras import pip_install
from carnice_build.graph import TensorRef, View
from carnice_build.models import architecture_of
from carnice_build.models.base import Part
from carnice_build.planning.repair import globs, owners, renames
from carnice_build.recipe.presets import FOLDER, presets
from carnice_build.tensors import SourceTensor

Carnice = Callable[..., Finished]

DATA_FREE = ("mlx-mixed_3_6", "fp8-dynamic", "int4-rtn", "w4a16-rtn")


@pytest.fixture
def model(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> Path:
    """A checkpoint elsewhere, with a vision tower and an MTP head, for a test to change."""
    return tiny_checkpoint(tmp_path / "models" / "tiny")


def written(new: NewRecipe) -> dict[str, Any]:
    """What the file itself says."""
    content = yaml.safe_load(new.path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def tensors(folder: Path) -> dict[str, str]:
    """The digest of each tensor of a built folder."""
    record = read_json(folder / "build.json")["tensors"]
    return {name: item["digest"] for name, item in record.items()}


def change(model: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one shard."""
    path = model / "model.safetensors"
    found = read_safetensors(path)
    edit(found)
    write_safetensors(path, found)


def reconfigure(model: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    write_json(model / "config.json", {**read_json(model / "config.json"), **entries})


# --- what is written builds -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", DATA_FREE)
def test_what_is_written_builds_as_it_is(empty: Path, model: Path, preset: str) -> None:
    """From an empty folder, without a profile or an option, and is what it should be."""
    new_recipe("mine", str(model), preset)
    build_variants(["mine"])
    (checked,) = verify_variants(["mine"], settings=VerifySettings(run=False)).variants

    assert checked.passed
    assert {"recipes", "cache", "build"} == {path.name for path in empty.iterdir()}


@pytest.mark.parametrize("preset", presets())
def test_every_preset_can_be_planned(
    empty: Path, model: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that calibrate do so on a dataset of the hub, whose commit is asked for."""
    monkeypatch.setattr("carnice_build.checkpoint.hub_listing.dataset_commit", lambda *_: "d" * 40)
    (model / "chat_template.jinja").write_text(XML["qwen"])
    # A GGUF has the tokenizer in it, which has to be one that llama.cpp knows.
    source = REPOSITORY / "demo" / "qwen3.6-27b" if preset.startswith("gguf-") else model

    assert f"preset:{preset}" == written(new_recipe("mine", str(source), preset))["extends"]


def test_a_recipe_is_short_and_says_why(empty: Path, model: Path) -> None:
    """The whole file, for a model of which there is little to say."""
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: [de, en]\n---\n# Tiny\n")
    (model / "chat_template.jinja").write_text(hermes("qwen"))
    shutil.move(model, empty / "tiny")
    path = new_recipe("mine", "tiny", "mlx-4bit").path

    assert """\
# tiny as mlx-4bit, written by `carnice new`.
# - qwen3_5: 8 layers, 1,633,840 parameters in BF16, F32
# - mlx-lm leaves the MTP head out
# - tool calls are written as vLLM's parser hermes reads them, thoughts between <think> tags

extends: preset:mlx-4bit

variant: mine

sources:
  body: {model: local/tiny, folder: tiny}

steps:
  # mlx-lm runs the text model alone.
  - drop: {match: model.visual.*, expect: 21}

card:
  license: mit
  language: [de, en]
""" == path.read_text()


def test_a_folder_below_the_project_is_named_from_there(empty: Path, model: Path) -> None:
    """So the project can be moved as a whole."""
    shutil.move(model, empty / "models")
    new = new_recipe("mine", "models", "int4-rtn")

    assert {"model": "local/models", "folder": "models"} == written(new)["sources"]["body"]


def test_a_snapshot_of_the_hubs_cache_keeps_its_name(
    empty: Path, tmp_path: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """The path says which model and which commit it is."""
    commit = "0123456789" * 4
    model = tmp_path / "hub" / "models--some--one--else" / "snapshots" / commit
    model.parent.mkdir(parents=True)
    tiny_checkpoint(model)
    body = written(new_recipe("mine", str(model), "int4-rtn"))["sources"]["body"]

    assert ("some/one--else", commit) == (body["model"], body["revision"])


# --- what the model needs -------------------------------------------------------------------------


def test_prefixes_are_repaired_as_the_shipped_recipe_does(project: Project) -> None:
    """Carnice's three prefixes: the same tensors as by the renames that a person wrote."""
    new_recipe("mine", "demo/carnice-v2-27b", "mlx-4bit", project.options())
    build_variants(["mine", "mlx-4bit"], project.options())

    assert tensors(project.out / "mlx-4bit") == tensors(project.out / "mine")


def shapes_of(config: dict[str, Any], prefix: str, folder: Path) -> View:
    """The names of a model with something before each of them, and no bytes."""
    names = owners(architecture_of(config, str(folder)), ())
    spec = TensorSpec("BF16", (1,))
    return {
        prefix + name: TensorRef(spec, SourceTensor(prefix + name, spec, None, 0)) for name in names
    }


MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "intermediate_size": 4,
    "vocab_size": 16,
}


@pytest.mark.parametrize("prefix", ["language_model.", "model.", "model.language_model."])
def test_experts_are_renamed_with_the_rest(prefix: str, tmp_path: Path) -> None:
    """Of stacks, the checkpoint has one tensor an expert; every name comes out right."""
    import re

    architecture = architecture_of(MOE, "here")
    view = shapes_of(MOE, prefix, tmp_path)
    names = list(view)
    for repair in renames(view, architecture):
        names = [re.sub(repair.params["from"], repair.params["to"], name) for name in names]

    assert set(owners(architecture, names)) == set(names)


@pytest.mark.parametrize(
    ("names", "others", "found"),
    [
        (["a.b.c", "a.b.d"], ["a.e"], ["a.b.*"]),
        (["a.b.c"], ["a.b.d"], ["a.b.c"]),
        (["a.b", "c.d"], ["e"], ["a.*", "c.*"]),
        (["lm_head.weight"], ["lm_head2.weight"], ["lm_head.*"]),
    ],
)
def test_globs_are_short_and_match_nothing_else(
    names: list[str], others: list[str], found: list[str]
) -> None:
    """A path is as long as it must be to be told from the others."""
    assert found == globs(names, [*names, *others])


def test_what_is_no_weight_is_dropped(empty: Path, model: Path) -> None:
    """Buffers, and the copy of a head that config.json ties to the embedding."""
    buffer = Tensor("F32", (4,), bytes(16))
    inner = "model.language_model.layers.{}.self_attn.rotary_emb.inv_freq"
    reconfigure(model, tie_word_embeddings=True)
    change(model, lambda found: found.update({inner.format(i): buffer for i in (3, 7)}))
    new = new_recipe("mine", str(model), "int4-rtn")
    build_variants(["mine"])

    assert [
        {"drop": {"match": "*.inv_freq", "expect": 2}},
        {"drop": {"match": "lm_head.weight", "expect": 1}},
    ] == written(new)["steps"]


def test_a_vision_tower_stays_where_it_can_be_run(empty: Path, model: Path) -> None:
    """And the recipe says how to leave it out."""
    new = new_recipe("mine", str(model), "fp8-dynamic")
    parts = {tensor.fact.part for tensor in new.plan.conversion.tensors}

    assert Part.TOWER in parts
    assert "steps" not in written(new)
    assert "`- drop: {match: 'model.visual.*'}`" in new.path.read_text()


def test_a_vision_tower_without_its_processor_is_dropped(empty: Path, model: Path) -> None:
    """No engine runs it then."""
    (model / "preprocessor_config.json").unlink()

    assert [{"drop": {"match": "model.visual.*", "expect": 21}}] == written(
        new_recipe("mine", str(model), "fp8-dynamic")
    )["steps"]


def test_a_missing_mtp_head_is_told(
    empty: Path, tmp_path: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """Where nobody says what the model was made from, there is no head to take."""
    model = tiny_checkpoint(tmp_path / "model")
    change(
        model,
        lambda found: [found.pop(name) for name in list(found) if name.startswith("mtp.")],
    )
    new = new_recipe("mine", str(model), "int4-rtn")

    assert "there will be no MTP head, which config.json announces: README.md names no model" in (
        " ".join(new.found)
    )
    assert "steps" not in written(new)


def test_linears_outside_of_the_layers_are_ignored(empty: Path, model: Path) -> None:
    """Such as llm-compressor would quantize by the preset's list: here, of another family."""
    mystery = {"model_type": "mystery", "hidden_size": 128, "vocab_size": 256}
    write_json(model / "config.json", mystery)
    names = ("model.embed_tokens", "model.layers.0.mlp.up_proj", "audio_tower.fc", "lm_head")
    weight = Tensor("BF16", (256, 128), bf16(np.ones((256, 128), np.float32)))
    write_safetensors(model / "model.safetensors", {f"{name}.weight": weight for name in names})
    new = new_recipe("mine", str(model), "w4a16-rtn")
    build_variants(["mine"])

    assert "mystery has no table here: whether all of its tensors are there" in new.found[1]
    assert "# - mystery has no table here: " in new.path.read_text()
    assert ["model.layers.0.mlp.up_proj"] == list(new.plan.conversion.quantized)


def test_a_quantized_source_is_decoded(empty: Path, tmp_path: Path) -> None:
    """FP8 in blocks, as DeepSeek's: the recipe says that this is meant, and builds."""
    new = new_recipe("mine", str(write_zoo(tmp_path / "fp8", "deepseek_v3", "hub")), "int4-rtn")
    build_variants(["mine"])

    assert {"decode": {}} == written(new)["steps"][0]
    assert "deepseek_v3: 4 layers, quantized, in BF16, F32, F8_E4M3" == new.found[0]


def test_a_quantized_source_may_stay_so(empty: Path, tmp_path: Path) -> None:
    """MXFP4 for MLX, which has it too: the recipe does not decode, and the plan says what stays."""
    new = new_recipe("mine", str(write_zoo(tmp_path / "oss", "gpt_oss", "hub")), "mlx-4bit")
    build_variants(["mine"])

    assert "steps" not in written(new)
    assert any("stay quantized as they are" in notice for notice in new.plan.notices)


def test_draft_layers_are_ignored(empty: Path, tmp_path: Path) -> None:
    """GLM's MTP head is a layer beyond the last, which the preset cannot know."""
    new = new_recipe("mine", str(write_zoo(tmp_path / "glm", "glm4_moe", "hub")), "w4a16-rtn")

    assert [r"re:model\.layers\.4\..*"] == written(new)["quantize"]["ignore+"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (XML["qwen"], "tool calls are written as vLLM's parser qwen3_xml reads them"),
        (hermes("qwen"), "tool calls are written as vLLM's parser hermes reads them"),
        ("{{ messages }}", "the chat template writes no tool calls in a form that is known here"),
        (None, "there is no chat template"),
    ],
)
def test_the_form_of_tool_calls_is_told(
    empty: Path, model: Path, template: str | None, sentence: str
) -> None:
    """By what the template renders."""
    (model / "chat_template.jinja").unlink()
    if template is not None:
        (model / "chat_template.jinja").write_text(template)

    assert any(sentence in found for found in new_recipe("a", str(model), "int4-rtn").found)


def test_a_template_that_cannot_be_rendered_has_no_launches(empty: Path, model: Path) -> None:
    """The folder is built all the same; the recipe says why nothing says how to serve it."""
    (model / "chat_template.jinja").write_text("{{ strftime('%Y') | nothing }}")
    new = new_recipe("mine", str(model), "int4-rtn")
    build_variants(["mine"])

    assert [] == written(new)["package"]["serve"]
    assert "# No launches, for they follow from the chat template: " in new.path.read_text()


# --- what the source says of itself ---------------------------------------------------------------

SILENT = {
    "nothing": b"",
    "no metadata": b"# A model\n",
    "no end": b"---\nlicense: mit\n",
    "no YAML": b"---\n[: {\n---\n",
    "a list": b"---\n- license\n---\n",
    "an object": b"---\nlicense: !!python/object/apply:os.system [id]\n---\n",
    "a bomb": b"---\na: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c,*%c]\n" % (i, i, *[i - 1] * 5) for i in range(98, 110))
    + b"license: mit\n---\n",
    "no UTF-8": b"---\nlicense: \xff\xfe\n---\n",
    "a number": b"---\nlicense: 7\n---\n",
    "two words": b"---\nlicense: 'mit or not'\n---\n",
    "markup": b"---\nlicense: '<b>mit</b>'\nbase_model: '../../etc'\n---\n",
}


@pytest.mark.parametrize("content", SILENT.values(), ids=SILENT)
def test_a_page_that_says_nothing_usable_gives_no_licence(
    empty: Path, model: Path, content: bytes
) -> None:
    """A stranger wrote it: what is of no use counts as not said, and never as Apache."""
    (model / "README.md").write_bytes(content)

    assert {"license": "unknown"} == written(new_recipe("a", str(model), "int4-rtn"))["card"]


def test_a_page_gives_licence_and_origin(empty: Path, model: Path) -> None:
    """A folder has no name on the hub, so its card names what it was made from."""
    front = "---\r\nlicense: apache-2.0\r\nbase_model:\r\n- owner/base\r\n- owner/other\r\n---\r\n"
    (model / "README.md").write_text(front, newline="")
    card = written(new_recipe("mine", str(model), "mlx-4bit"))["card"]
    build_variants(["mine"])
    built = Path("build/mine/README.md").read_text()

    assert {"license": "apache-2.0", "base_model": "owner/base"} == card
    assert "base_model: owner/base" in built


# --- what is refused ------------------------------------------------------------------------------


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


def other_tensor(model: Path) -> None:
    change(model, lambda found: found.update({"odd.weight": Tensor("F32", (1,), bytes(4))}))


def differs_from_config(model: Path) -> None:
    text = read_json(model / "config.json")["text_config"]
    reconfigure(model, text_config={**text, "intermediate_size": 512})


def mystery(model: Path) -> None:
    reconfigure(model, model_type="mystery")


REFUSALS: dict[str, tuple[list[str], Callable[[Path], None] | None, tuple[str, ...]]] = {
    "no arguments": ([], None, ("new: lacks an argument", "NAME --from ... --as ...")),
    "no preset": (["a", "--from", "MODEL"], None, ("lacks an argument",)),
    "an unknown preset": (
        ["a", "--from", "MODEL", "--as", "mlx-4bti"],
        None,
        ("--as: there is no preset 'mlx-4bti'", "did you mean 'mlx-4bit'?"),
    ),
    "no file name": (
        ["a/b", "--from", "MODEL", "--as", "mlx-4bit"],
        None,
        ("NAME: 'a/b' is not a plain name",),
    ),
    "a part's name": (
        ["_a", "--from", "MODEL", "--as", "mlx-4bit"],
        None,
        ("NAME: '_a' is not a plain name",),
    ),
    "no folder": (
        ["a", "--from", "./nowhere", "--as", "mlx-4bit"],
        None,
        ("./nowhere: is no folder, and no name on the hub", "FOLDER or OWNER/MODEL"),
    ),
    "no name": (
        ["a", "--from", "", "--as", "mlx-4bit"],
        None,
        ("--from: names no model; expected FOLDER or OWNER/MODEL",),
    ),
    "a file": (
        ["a", "--from", "MODEL/config.json", "--as", "mlx-4bit"],
        None,
        ("config.json: is no folder",),
    ),
    "no model": (["a", "--from", "MODEL", "--as", "mlx-4bit"], no_weights, ("tiny",)),
    "no tokenizer": (
        ["a", "--from", "MODEL", "--as", "int4-rtn"],
        no_tokenizer,
        ("there is no tokenizer",),
    ),
    "nothing to calibrate with": (
        ["a", "--from", "MODEL", "--as", "w4a16-awq"],
        no_template,
        ("tiny: has no chat template", "by which the dialogues that w4a16-awq calibrates on"),
    ),
    "a tensor too many": (
        ["a", "--from", "MODEL", "--as", "mlx-4bit"],
        other_tensor,
        ("tensor 'odd.weight' is not one of qwen3_5",),
    ),
    "a config that lies": (
        ["a", "--from", "MODEL", "--as", "mlx-4bit"],
        differs_from_config,
        ("of other shapes than its config says",),
    ),
    "an unknown family": (
        ["a", "--from", "MODEL", "--as", "w4a16-awq"],
        mystery,
        ("unknown model_type 'mystery'", "fp8-dynamic, build without one"),
    ),
}


@pytest.mark.parametrize(("arguments", "damage", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_and_nothing_is_written(
    empty: Path,
    model: Path,
    carnice: Carnice,
    arguments: list[str],
    damage: Callable[[Path], None] | None,
    parts: tuple[str, ...],
) -> None:
    """One sentence, exit code 2, and the folder is as empty as it was."""
    if damage is not None:
        damage(model)
    finished = carnice("new", *(text.replace("MODEL", str(model)) for text in arguments))

    assert 2 == finished.code, finished.out
    assert "" == finished.out
    assert finished.err.startswith("carnice: ")
    for part in parts:
        assert part in finished.err
    left = [path for path in empty.rglob("*") if path.name != "cache" and "cache" not in path.parts]
    assert [] == left


OWN_TABLE = """
about: As Qwen3's, but that nobody says what AWQ may smooth.
extends: qwen3
smoothing: []
"""


@pytest.mark.parametrize(
    ("family", "own", "table"),
    [
        ("qwen3", OWN_TABLE, "no entry under `smoothing` of _families/qwen3.yaml is for this"),
        ("nemotron_h", None, "no entry under `smoothing` of tables/nemotron_h.yaml is for this"),
    ],
)
def test_awq_that_would_smooth_nothing_is_refused(
    empty: Path, carnice: Carnice, family: str, own: str | None, table: str
) -> None:
    """It would be mere rounding: for want of a table's word, or of heads that are not grouped."""
    write_zoo(empty / "source", family, "transformers")
    (empty / "text.txt").write_text("Which functions do you have? " * 400)
    if own is not None:
        (empty / "recipes" / "_families").mkdir(parents=True)
        (empty / "recipes" / "_families" / f"{family}.yaml").write_text(own)
    arguments = ("new", "a", "--from", "source", "--dataset", "text.txt", "--as")
    finished = carnice(*arguments, "w4a16-awq")

    assert 2 == finished.code, finished.err
    assert 1 == len(finished.err.splitlines())
    assert table in finished.err
    assert "`algorithm: nearest` or the preset w4a16-rtn" in finished.err
    assert not (empty / "recipes" / "a.yaml").exists()


def test_a_table_of_ones_own_says_what_awq_smooths(empty: Path, carnice: Carnice) -> None:
    """Nemotron-H with grouped heads is smoothed where a project's table says so."""
    write_zoo(empty / "source", "nemotron_h", "transformers")
    (empty / "text.txt").write_text("Which functions do you have? " * 400)
    (empty / "recipes" / "_families").mkdir(parents=True)
    (empty / "recipes" / "_families" / "nemotron_h.yaml").write_text(
        "about: Mine.\nextends: nemotron_h\n"
        "smoothing: [{smooth: norm, balance: [mixer.q_proj, mixer.k_proj, mixer.v_proj]}]\n"
    )
    arguments = ("new", "a", "--from", "source", "--dataset", "text.txt", "--as")
    finished = carnice(*arguments, "w4a16-awq")

    assert 0 == finished.code, finished.err


def test_a_dataset_that_nothing_reads_is_refused(empty: Path, model: Path) -> None:
    """In one sentence, where no module is left that would be calibrated."""
    plan = new_recipe("a", str(model), "w4a16-rtn").plan

    with pytest.raises(PlanError, match="--dataset: nothing would be calibrated"):
        sample_counts(plan)


def test_a_recipe_that_is_there_stays(empty: Path, model: Path, carnice: Carnice) -> None:
    """It may hold a person's work; a link to nothing counts as well."""
    path = empty / "recipes" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("mine\n")
    (path.parent / "lost.yaml").symlink_to("nowhere")
    arguments = ("--from", model, "--as", "mlx-4bit")
    finished = carnice("new", "mine", *arguments)

    assert (2, "mine\n") == (finished.code, path.read_text())
    assert "recipes/mine.yaml: is there already; expected another name" in finished.err
    assert 2 == carnice("new", "lost", *arguments).code


def test_a_source_that_cannot_be_decoded_is_refused(empty: Path, model: Path) -> None:
    """One that says it is quantized and holds floats, and nothing is written."""
    reconfigure(model, quantization_config={"quant_method": "fp8"})

    with pytest.raises(CarniceError):
        new_recipe("mine", str(model), "mlx-4bit")
    assert [] == list(empty.iterdir())


def test_what_ends_it_is_said_though_its_folder_cannot_go(
    empty: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may have put a file there meanwhile, which stays."""

    def planned(*_: object) -> None:
        (empty / "recipes" / "other.yaml").touch()
        raise CheckpointError("is damaged")

    monkeypatch.setattr(new, "plan_variants", planned)

    with pytest.raises(CheckpointError, match="is damaged"):
        new_recipe("mine", str(model), "mlx-4bit")
    assert ["other.yaml"] == [path.name for path in (empty / "recipes").iterdir()]


# --- the command line -----------------------------------------------------------------------------


def test_the_presets_are_listed(carnice: Carnice) -> None:
    """Each with a sentence, as a table and as JSON."""
    table, listed = carnice("new", "--list"), json.loads(carnice("new", "--list", "--json").out)

    assert list(presets()) == list(listed) == [line.split()[0] for line in table.out.splitlines()]
    assert all(listed.values())


def test_what_to_type_next_is_said_and_works(empty: Path, model: Path, carnice: Carnice) -> None:
    """Each of the commands, as it is printed."""
    finished = carnice("new", "mine", "--from", model, "--as", "fp8-dynamic", "--recipes", "mine")
    lines = finished.out.partition("next:\n")[2].splitlines()
    commands = [line.split() for line in lines]

    assert [["carnice", "build"], ["carnice", "verify"]] == [item[:2] for item in commands]
    assert [0, 0] == [carnice(*item[1:]).code for item in commands]
    assert "bits per weight" in finished.out


@pytest.mark.parametrize("there", [False, True])
def test_what_a_build_needs_is_said(
    there: bool, empty: Path, model: Path, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrated preset needs a library, which is installed first where it is missing."""
    monkeypatch.setattr("carnice_build.cli.new.has_extra", lambda extra: there)
    monkeypatch.setattr("carnice_build.checkpoint.hub_listing.dataset_commit", lambda *_: "d" * 40)
    found = json.loads(
        carnice("new", "mine", "--from", model, "--as", "int4-autoround", "--json").out
    )

    assert there == (pip_install("autoround") != found["next"][0])
    assert "recipes/mine.yaml" == found["recipe"]


# --- outside of a clone ---------------------------------------------------------------------------


def packaged() -> Iterator[Path]:
    """The files of a wheel, relative to the repository."""
    root = REPOSITORY / "carnice_build"
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["carnice_build"]
    for pattern in ("**/*.py", *patterns):
        yield from (path.relative_to(REPOSITORY) for path in root.glob(pattern) if path.is_file())


def test_an_installed_package_needs_no_clone(empty: Path, model: Path, tmp_path: Path) -> None:
    """With nothing but what a wheel has: a list, a recipe, a plan and a build.

    Nothing is quantized here, because the kernels would be compiled anew for the copy.
    """
    site = tmp_path / "site"
    for path in packaged():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / path, site / path)

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "carnice_build", *arguments],
            cwd=empty,
            env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    plain = ("--set", "quantize.ignore='*'")
    listed = run("new", "--list")
    run("new", "mine", "--from", str(model), "--as", "fp8-dynamic")
    run("plan", "mine")

    assert len(list(FOLDER.glob("*.yaml"))) == len(listed.splitlines())
    assert run("build", "mine", *plain).startswith("mine: built")
    assert (empty / "build" / "mine" / "serve").is_dir()
    assert run("list").startswith("mine ")


def test_the_page_shows_what_is_written(empty: Path, carnice: Carnice) -> None:
    """The output and the recipe of docs/new.md."""
    (empty / "demo").symlink_to(REPOSITORY / "demo")
    page = (REPOSITORY / "docs" / "new.md").read_text(encoding="utf-8")
    finished = carnice("new", "mine", "--from", "demo/carnice-v2-27b", "--as", "mlx-4bit")

    assert f"--as mlx-4bit\n{finished.out}```" in page
    assert f"```yaml\n# recipes/mine.yaml\n{Path('recipes/mine.yaml').read_text()}```" in page


def test_options_need_no_profile() -> None:
    """Scripts that build what was written name no profile either."""
    assert Options().profile is None


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\n", "\r"])
def test_no_word_of_a_checkpoint_ends_a_comment(empty: Path, model: Path, end: str) -> None:
    """Or a stranger's config.json would write entries of the recipe."""
    reconfigure(model, model_type=f"x{end}description: theirs{end}layers: {{a: []}} #")
    new = new_recipe("mine", str(model), "fp8-dynamic", Options())

    assert "layers" not in written(new)
    assert "theirs" != written(new).get("description")
