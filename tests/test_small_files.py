"""What a consumer needs beside the weights is taken over, is there, and is what it is called."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from conftest import REPOSITORY, Finished, Project
from test_bad_input import check_refused_at_once
from test_sources import write_pointer
from tiny import read_json, tiny_tokenizer, write_json
from verifying import Copy

from carnice_build.chat.hermes import to_hermes
from carnice_build.checkpoint.assets import Reads, absent, damaged
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.formats.autoround.format import AutoRoundFormat
from carnice_build.formats.mlx.format import MlxFormat

Carnice = Callable[..., Finished]

MLX = "mlx-4bit"
QWEN = (REPOSITORY / "tests" / "golden" / "qwen.jinja").read_text(encoding="utf-8")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATES = "additional_chat_templates"

TORCH = """\
extends: _base/carnice-text.yaml
variant: torch
description: For an engine that builds the class with the tower, of which the weights are dropped.
quantize: {format: autoround, method: nearest, group_size: 128}
"""
SEEING = TORCH.replace("carnice-text", "carnice").replace("variant: torch", "variant: seeing")


@pytest.fixture
def recipes(project: Project) -> Project:
    """A project with a recipe for torch engines without the tower, and one that keeps it."""
    project.recipe("torch", TORCH)
    project.recipe("seeing", SEEING)
    return project


def test_what_the_class_reads_is_taken_over(recipes: Project) -> None:
    """Processors and named templates are in the folder as the source has them."""
    source = recipes.checkpoint
    for name in PROCESSORS:
        write_json(source / name, {"of": name})
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "rag.jinja").write_text("{{ documents }}")
    (source / TEMPLATES / "notes.txt").write_text("no template")
    build_variants(["torch", "seeing", MLX], recipes.options())

    for variant in ("torch", "seeing"):
        built = recipes.built(variant)
        taken = {*PROCESSORS, f"{TEMPLATES}/rag.jinja"}
        assert {name: (source / name).read_bytes() for name in taken} == {
            name: built.get(name) for name in taken
        }
        assert f"{TEMPLATES}/notes.txt" not in built
    mlx = recipes.built(MLX)
    assert f"{TEMPLATES}/rag.jinja" in mlx
    # mlx-lm's class reads no processor, and its config announces no tower.
    assert set() == set(PROCESSORS) & set(mlx)


NO_NAMES = (b"\xff.jinja", b"\x1b[31m.jinja", b"two\nlines.jinja", b".hidden.jinja", b"a\\b.jinja")


def test_a_template_whose_name_is_no_text_stays_where_it_is(recipes: Project) -> None:
    """Names go into JSON and to terminals: only those that can be read there are taken over."""
    folder = recipes.checkpoint / TEMPLATES
    folder.mkdir()
    for name in NO_NAMES:
        (folder / os.fsdecode(name)).write_text("{{ messages }}")
    (folder / "caf\u00e9.jinja").write_text("{{ messages }}")
    build_variants(["torch"], recipes.options())

    taken = [name for name in recipes.built("torch") if name.startswith(TEMPLATES)]
    assert [f"{TEMPLATES}/caf\u00e9.jinja"] == taken


def test_a_tower_needs_its_processor(recipes: Project, carnice: Carnice) -> None:
    """A folder that keeps the tower and could not be loaded is refused at the plan."""
    (recipes.checkpoint / "preprocessor_config.json").unlink()

    check_refused_at_once(
        carnice("plan", "seeing"), recipes, "there is a vision tower, but no preprocessor_config"
    )
    assert plan_variants(["torch"], recipes.options()).variants
    # As transformers 5 saves it.
    write_json(recipes.checkpoint / "processor_config.json", {"image_processor": {}})
    assert plan_variants(["seeing"], recipes.options()).variants


@pytest.mark.parametrize("variant", [MLX, "torch"])
def test_a_folder_needs_a_tokenizer(recipes: Project, carnice: Carnice, variant: str) -> None:
    """Every one of our engines loads one, so a source without any is refused at the plan."""
    (recipes.checkpoint / "tokenizer.json").unlink()

    check_refused_at_once(
        carnice("plan", variant), recipes, "demo/carnice-v2-27b: there is no tokenizer"
    )


def test_all_that_is_not_there_is_told(recipes: Project, carnice: Carnice) -> None:
    """Tokenizer and processor are missed in one go."""
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (recipes.checkpoint / name).unlink()

    check_refused_at_once(
        carnice("plan", "seeing"),
        recipes,
        "lacks files that the engine reads",
        "no tokenizer",
        "no preprocessor_config",
    )


def test_a_format_says_what_its_engine_reads() -> None:
    """A format whose engine reads neither misses neither, and one that says nothing reads both."""
    assert {Reads.TOKENIZER, Reads.PROCESSOR} == set(
        AutoRoundFormat.model_construct().engine_reads()
    )
    assert {Reads.TOKENIZER} == set(MlxFormat.model_construct().engine_reads())
    assert [] == absent([], [], vision=True)
    assert 2 == len(absent([], list(Reads), vision=True))


COMPLETE = {
    "tokenizer.json": ["tokenizer.json"],
    "a SentencePiece model": ["tokenizer.model"],
    "vocabulary and merges": ["vocab.json", "merges.txt"],
}
INCOMPLETE = {
    "nothing": [],
    "settings alone": ["tokenizer_config.json", "special_tokens_map.json"],
    "a vocabulary without merges": ["vocab.json"],
    "merges without a vocabulary": ["merges.txt"],
}


@pytest.mark.parametrize("names", COMPLETE.values(), ids=COMPLETE)
def test_any_complete_form_is_a_tokenizer(names: list[str]) -> None:
    """transformers makes one of each of these."""
    assert [] == absent(names, [Reads.TOKENIZER], vision=False)


@pytest.mark.parametrize("names", INCOMPLETE.values(), ids=INCOMPLETE)
def test_half_a_tokenizer_is_none(names: list[str]) -> None:
    """Of these alone nothing can be made."""
    (problem,) = absent(names, [Reads.TOKENIZER], vision=False)

    assert problem.startswith("there is no tokenizer")


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("tokenizer.json", b"<!doctype html><p>404", "is not a JSON object"),
    "cut short": ("tokenizer.json", b'{"version": "1.0", "model": {', "is not a JSON object"),
    "empty": ("tokenizer.json", b"", "is not a JSON object"),
    "nested deep": ("tokenizer.json", b"[" * 100_000, "is not a JSON object"),
    "no model": ("tokenizer.json", b'{"version": "1.0"}', "has no model with a vocabulary"),
    "no vocabulary": ("tokenizer.json", b'{"model": {"vocab": {}}}', "has no model with a voc"),
    "a model that is a list": ("tokenizer.json", b'{"model": [1]}', "has no model with a voc"),
    "settings that are a list": ("tokenizer_config.json", b"[]", "is not a JSON object"),
    "a processor that is none": ("preprocessor_config.json", b"null", "is not a JSON object"),
    "a mark before UTF-8": ("tokenizer_config.json", b"\xef\xbb\xbf{}", "is not a JSON object"),
    "UTF-16": ("tokenizer_config.json", "{}".encode("utf-16"), "is not a JSON object"),
    "a template that is no text": ("chat_template.jinja", b"\xff{{ messages }}", "is not UTF-8"),
    "an empty vocabulary": ("vocab.json", b"{}", "has no entry"),
    "empty merges": ("merges.txt", b"\n", "is empty"),
    "an empty SentencePiece model": ("tokenizer.model", b"", "is empty"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_file_is_refused_before_any_work(
    recipes: Project, carnice: Carnice, what: str
) -> None:
    """A file that is not what it is called is named before a weight is read."""
    name, content, problem = BROKEN[what]
    (recipes.checkpoint / name).write_bytes(content)

    check_refused_at_once(
        carnice("build", "torch"), recipes, f"demo/carnice-v2-27b/{name}: {problem}"
    )


def test_all_damaged_files_are_told(recipes: Project, carnice: Carnice) -> None:
    """One line for each."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (recipes.checkpoint / name).write_bytes(b"[]")

    check_refused_at_once(
        carnice("build", "torch"),
        recipes,
        "holds files that are not what they are called",
        "/tokenizer.json: is not a JSON object",
        "/tokenizer_config.json: is not a JSON object",
        "/preprocessor_config.json: is not a JSON object",
    )


def test_a_damaged_file_is_refused_when_all_weights_are_there(
    recipes: Project, carnice: Carnice
) -> None:
    """Neither do finished weights let a broken tokenizer out."""
    build_variants(["torch"], recipes.options())
    before = recipes.built("torch")
    (recipes.checkpoint / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    finished = carnice("build", "torch")

    assert 2 == finished.code
    assert "tokenizer.json: has no model with a vocabulary" in finished.err
    assert before == recipes.built("torch")


def test_every_model_of_a_tokenizer_has_a_vocabulary() -> None:
    """Unigram's is a list; the other models' are tables."""
    unigram = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}
    for tokenizer in (tiny_tokenizer(), unigram):
        assert [] == list(damaged({"tokenizer.json": json.dumps(tokenizer).encode()}))


SMALL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    f"{TEMPLATES}/rag.jinja",
)


def to_nothing(path: Path) -> None:
    """A link whose file is gone."""
    path.symlink_to("gone")


LOST = {"is a Git LFS pointer": write_pointer, "is a link to nothing": to_nothing}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("problem", LOST)
def test_what_is_not_the_file_is_refused_at_the_plan(
    recipes: Project, carnice: Carnice, name: str, problem: str
) -> None:
    """A pointer and a link to nothing are no file, whichever file they stand for."""
    path = recipes.checkpoint / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    LOST[problem](path)

    check_refused_at_once(
        carnice("plan", "torch"), recipes, f"demo/carnice-v2-27b/{name}: {problem}"
    )


def test_a_folder_of_templates_that_is_gone_is_named(recipes: Project, carnice: Carnice) -> None:
    """A link in place of the whole folder counts as well."""
    (recipes.checkpoint / TEMPLATES).symlink_to("gone")

    check_refused_at_once(carnice("plan", MLX), recipes, f"{TEMPLATES}: is a link to nothing")


@pytest.mark.parametrize("problem", LOST)
def test_what_the_engine_does_not_read_may_be_lost(recipes: Project, problem: str) -> None:
    """A processor is nothing to mlx-lm, a tokenizer nothing to who only gives tensors."""
    config = read_json(recipes.checkpoint / "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = 1
    write_json(recipes.checkpoint / "config.json", config)
    for name in ("preprocessor_config.json", "vocab.txt"):
        (recipes.checkpoint / name).unlink(missing_ok=True)
        LOST[problem](recipes.checkpoint / name)
    (recipes.base / "tokenizer.json").unlink()
    LOST[problem](recipes.base / "tokenizer.json")
    recipes.recipe(
        "grafted",
        "extends: [_base/carnice-mtp.yaml, preset:mlx-4bit]\nvariant: grafted\ndescription: x\n"
        "quantize: {bits: 4}\n",
    )

    assert plan_variants([MLX, "grafted"], recipes.options()).variants


def test_a_dataset_that_is_a_pointer_is_named(project: Project, carnice: Carnice) -> None:
    """What a calibration reads is looked at as well."""
    write_pointer(project.root / "rows.jsonl")
    finished = carnice("plan", "qwen-nvfp4-text-mtp", "--set", "calibration.dataset=rows.jsonl")

    check_refused_at_once(finished, project, "rows.jsonl: is a Git LFS pointer", "git lfs pull")


# --- templates beside the default one ------------------------------------------------------------


@pytest.fixture
def hermes(recipes: Project) -> Project:
    """A recipe that patches the template, for a source with Qwen3's."""
    (recipes.checkpoint / "chat_template.jinja").write_text(QWEN, encoding="utf-8")
    (recipes.checkpoint / TEMPLATES).mkdir()
    recipes.recipe(
        "patched",
        TORCH.replace("variant: torch", "variant: patched")
        + "steps+:\n  - chat_template: {patch: hermes}\n",
    )
    return recipes


def test_a_named_template_is_patched_too(hermes: Project) -> None:
    """What transformers takes when there are tools must speak as the flags say."""
    named = hermes.checkpoint / TEMPLATES
    (named / "tool_use.jinja").write_text(QWEN, encoding="utf-8")
    (named / "patched.jinja").write_text(to_hermes(QWEN), encoding="utf-8")
    (named / "rag.jinja").write_text("{{ documents[0].title }}", encoding="utf-8")
    build_variants(["patched"], hermes.options())
    built = hermes.built("patched")

    assert to_hermes(QWEN).encode() == built["chat_template.jinja"]
    assert to_hermes(QWEN).encode() == built[f"{TEMPLATES}/tool_use.jinja"]
    assert to_hermes(QWEN).encode() == built[f"{TEMPLATES}/patched.jinja"]
    assert b"{{ documents[0].title }}" == built[f"{TEMPLATES}/rag.jinja"]


def test_a_named_template_of_another_form_is_found(hermes: Project) -> None:
    """`verify` says when the template for tools writes what the folder's parser cannot read."""
    build_variants(["patched"], hermes.options())
    copied = Copy.of("patched", hermes.options(), hermes.root / "copied")
    named = copied.folder / TEMPLATES
    named.mkdir()
    (named / "tool_use.jinja").write_text(QWEN, encoding="utf-8")

    assert {
        "chat": f"{TEMPLATES}/tool_use.jinja writes tool calls in another form than "
        "chat_template.jinja"
    } == copied.problems()


# --- verify --------------------------------------------------------------------------------------


def unlink(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def lose(name: str, how: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        how(folder / name)

    return change


FOLDERS: dict[str, tuple[Callable[[Path], None], Collection[str]]] = {
    "no tokenizer": (
        unlink("tokenizer.json"),
        ("tokenizer.json is missing, which the source has", "there is no tokenizer"),
    ),
    "no processor": (
        unlink("preprocessor_config.json"),
        ("preprocessor_config.json is missing", "there is a vision tower, but no preprocessor"),
    ),
    "a broken tokenizer": (
        write("tokenizer.json", b"{}"),
        ("tokenizer.json has no model with a vocabulary",),
    ),
    "settings that are no object": (
        write("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json is not a JSON object",),
    ),
    "a pointer": (
        lose("tokenizer.json", write_pointer),
        ("tokenizer.json is a Git LFS pointer",),
    ),
    "a shard that is a pointer": (
        lose("model-00001-of-00002.safetensors", write_pointer),
        ("model-00001-of-00002.safetensors: is a Git LFS pointer",),
    ),
    "a config that is a pointer": (
        lose("config.json", write_pointer),
        ("config.json is a Git LFS pointer",),
    ),
    "a link to nothing": (
        lose("chat_template.jinja", to_nothing),
        ("chat_template.jinja is a link to nothing",),
    ),
    "a link to nothing that nobody needs": (
        lose("notes.txt", to_nothing),
        ("notes.txt is a link to nothing",),
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_would_not_load_fails(recipes: Project, what: str) -> None:
    """`structure` says what the engine would miss, or take for something else."""
    build_variants(["seeing"], recipes.options(overrides=("package.shard=300KB",)))
    copied = Copy.of("seeing", recipes.options(), recipes.root / "copied")
    damage, parts = FOLDERS[what]
    damage(copied.folder)

    found = copied.problems()["structure"]
    for part in parts:
        assert part in found
