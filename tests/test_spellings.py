"""One model is one folder, whatever the spelling of its config.json; what is unclear is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calibrating import BASE, QUICK
from conftest import Finished, Project, TinyCheckpoint
from qwen import EMBEDDING, HEAD
from test_bad_input import check_refused_at_once, rewrite
from tiny import (
    Tensor,
    contents,
    read_all_tensors,
    read_json,
    tiny_config,
    tiny_tensors,
    tiny_tokenizer,
    write_json,
    write_safetensors,
)

from carnice_build.checkpoint.json import to_json
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import CheckpointError
from carnice_build.execute.events import Event, Notice
from carnice_build.models import architecture_of
from carnice_build.models.base import Part

pytest_plugins = ["calibrating"]

Carnice = Callable[..., Finished]
Config = dict[str, Any]
Change = Callable[[Config, Config], object]
"""Takes a config and its text section, and changes them in place."""

MLX, RTN = "mlx-4bit", "rtn"
QUANTIZATION = ("quantization", "quantization_config")

RTN_RECIPE = """
extends: int4-rtn.yaml
variant: rtn
description: INT4 of the whole Qwen stand-in
sources:
  body: {model: Qwen/Qwen3.6-27B}
steps: []
"""


@pytest.fixture(autouse=True)
def recipes(request: pytest.FixtureRequest) -> None:
    """A variant without calibration in a format that keeps every tensor, where recipes are."""
    if "project" in request.fixturenames:
        request.getfixturevalue("project").recipe(RTN, RTN_RECIPE)


def rope_outside(config: Config, text: Config) -> None:
    text["rope_theta"] = text["rope_parameters"].pop("rope_theta")


def rope_of_version_4(config: Config, text: Config) -> None:
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    text["rope_scaling"] = rope


def rope_of_defaults(config: Config, text: Config) -> None:
    rope = text["rope_parameters"]
    text["rope_parameters"] = {key: rope[key] for key in ("mrope_section", "mrope_interleaved")}
    text.pop("partial_rotary_factor")


def rope_type(config: Config, text: Config) -> None:
    rope = text["rope_parameters"]
    rope["type"] = rope.pop("rope_type")


def legacy_layers(config: Config, text: Config) -> None:
    legacy = {"full_attention": "attention", "linear_attention": "mamba"}
    text["layer_types"] = [legacy[kind] for kind in text["layer_types"]]


def nulls(config: Config, text: Config) -> None:
    config |= {"quantization_config": None, "quantization": None, "dtype": None}
    config["eos_token_id"] = None
    text |= {"quantization_config": {}, "rope_scaling": None, "rope_theta": None}


SPELLINGS: dict[str, Change] = {
    "theta beside rope_parameters": rope_outside,
    "rope as transformers 4 has it": rope_of_version_4,
    "rope by transformers' defaults": rope_of_defaults,
    "type for rope_type": rope_type,
    "kinds of layers by their old names": legacy_layers,
    "kinds of layers without an interval": lambda _, text: text.pop("full_attention_interval"),
    "an interval without kinds of layers": lambda _, text: text.pop("layer_types"),
    "kinds of layers beside a wrong interval": lambda _, text: text.update(
        full_attention_interval=3
    ),
    "torch_dtype for dtype": lambda _, text: text.update(torch_dtype=text.pop("dtype")),
    "dtype beside a torch_dtype": lambda _, text: text.update(torch_dtype="float16"),
    "tied by neither section": lambda config, text: (
        config.pop("tie_word_embeddings"),
        text.pop("tie_word_embeddings"),
    ),
    "tied by the root alone": lambda _, text: text.pop("tie_word_embeddings"),
    "tied by the text alone": lambda config, _: config.pop("tie_word_embeddings"),
    "tied by the root, and not by the text": lambda _, text: text.update(tie_word_embeddings=True),
    "nulls": nulls,
    "keys in another order": lambda config, _: config.update(text_config=config.pop("text_config")),
}


def spelled(change: Change, **options: Any) -> Config:
    """A config that says in other words what `tiny_config` says."""
    config = tiny_config(**options)
    change(config, config["text_config"])
    return config


def published(config: Config) -> bytes:
    """The bytes of the config.json of a folder that holds every part of the model."""
    return to_json(architecture_of(config, "tiny").published_config(set(Part)))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_model_has_one_config(spelling: str) -> None:
    """The bytes of the published config.json do not depend on the spelling of the source's."""
    found = published(spelled(SPELLINGS[spelling]))

    assert published(tiny_config()) == found
    assert tiny_config() == json.loads(found)


def test_a_strangers_entry_may_be_nested_deeply() -> None:
    """What the parser lets through goes out, whatever Python's stack holds."""
    nested: list[Any] = []
    for _ in range(900):
        nested = [nested]
    config = {**tiny_config(), "strange": nested}

    assert nested == architecture_of(config, "tiny").published_config(set(Part))["strange"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_published_config_says_what_transformers_reads_in_the_source(spelling: str) -> None:
    """Both give one `Qwen3_5Config`, but for entries that transformers does not read."""
    transformers = pytest.importorskip("transformers")

    def read(config: Config) -> Config:
        text = transformers.Qwen3_5Config(**config).text_config.to_dict()
        # What a type of rope was once called stays there beside its new name.
        text["rope_parameters"].pop("type", None)
        unread = {"full_attention_interval", "tie_word_embeddings", *QUANTIZATION, "torch_dtype"}
        return {key: value for key, value in text.items() if key not in unread}

    source = spelled(SPELLINGS[spelling])
    ours = json.loads(published(source))

    assert read(source) == read(ours)


@pytest.mark.parametrize(
    "spelling", ["theta beside rope_parameters", "nulls", "type for rope_type"]
)
def test_mlx_lm_reads_in_the_published_config_what_the_source_means(spelling: str) -> None:
    """It reads rope in `rope_parameters` alone, and layers and ties by the text's entries."""
    qwen = pytest.importorskip("mlx_lm.models.qwen3_5")
    text = json.loads(published(spelled(SPELLINGS[spelling])))["text_config"]
    arguments = qwen.TextModelArgs.from_dict(text)

    assert 10000.0 == arguments.rope_theta
    assert 0.25 == arguments.partial_rotary_factor
    assert 4 == arguments.full_attention_interval
    assert not arguments.tie_word_embeddings


@pytest.mark.parametrize(
    "spelling", ["rope as transformers 4 has it", "kinds of layers by their old names", "nulls"]
)
def test_one_model_gives_one_folder(
    project: Project, tiny_checkpoint: TinyCheckpoint, spelling: str
) -> None:
    """Every file is the same byte for byte, and the second build runs no action."""
    folders = []
    for name in ("usual", "other"):
        source = tiny_checkpoint(project.root / name)
        if name == "other":
            write_json(source / "config.json", spelled(SPELLINGS[spelling]))
        report = build_variants([MLX], project.options(sources={"body": source}))
        folders.append(contents(project.out / MLX))

    assert folders[0] == folders[1]
    assert 0 == report.actions_run


def reconfigure(folder: Path, change: Change) -> None:
    """Change the config.json of a checkpoint."""
    config = read_json(folder / "config.json")
    change(config, config["text_config"])
    write_json(folder / "config.json", config)


def test_one_model_is_calibrated_once(small: Project) -> None:
    """No parameter of any action of a calibration depends on the spelling, nor on an MTP head."""

    def parameters() -> list[Any]:
        plan = plan_variants([BASE], small.options(overrides=QUICK))
        return [(action.op.name, action.params) for action in plan.graph]

    before = parameters()
    for change in (rope_of_version_4, lambda _, text: text.update(mtp_num_hidden_layers=1)):
        reconfigure(small.base, change)
        assert before == parameters()
    small.recipe(
        "headless", f"extends: {BASE}.yaml\nvariant: headless\ndescription: x\n" + HEADLESS
    )
    plan = plan_variants([BASE, "headless"], small.options(overrides=QUICK))

    assert len(before) == len(plan.graph)


HEADLESS = "steps+:\n  - drop: {match: 'mtp.*'}\n"

# --- an end of texts -----------------------------------------------------------------------------


def test_a_null_end_does_not_go_out(project: Project, tiny_checkpoint: TinyCheckpoint) -> None:
    """Neither file of the folder says null, and config.json has the end that the text states."""
    source = tiny_checkpoint(project.root / "source")
    write_json(source / "generation_config.json", {"eos_token_id": None, "top_k": 20})
    reconfigure(source, lambda config, _: config.update(eos_token_id=None))
    build_variants([MLX], project.options(sources={"body": source}))
    config = read_json(project.out / MLX / "config.json")

    assert {"top_k": 20} == read_json(project.out / MLX / "generation_config.json")
    assert "eos_token_id" not in config
    assert 2 == config["text_config"]["eos_token_id"]


def test_a_generation_config_that_says_more_is_copied_as_it_is(
    project: Project, tiny_checkpoint: TinyCheckpoint
) -> None:
    """Its bytes are the source's when there is nothing to leave out."""
    source = tiny_checkpoint(project.root / "source")
    content = b'{"top_k":   20, "eos_token_id": [2]}'
    (source / "generation_config.json").write_bytes(content)
    build_variants([MLX], project.options(sources={"body": source}))

    assert content == (project.out / MLX / "generation_config.json").read_bytes()


@pytest.mark.parametrize("content", ['{"eos_token_id": 2030,\n', "[]", "\x00"])
@pytest.mark.parametrize("variant", [MLX, RTN])
def test_a_broken_generation_config_is_told_by_the_plan(
    project: Project, carnice: Carnice, content: str, variant: str
) -> None:
    """Every format copies the file, so every plan reads it."""
    for folder in (project.checkpoint, project.base):
        (folder / "generation_config.json").write_text(content)

    check_refused_at_once(
        carnice("plan", variant), project, "generation_config.json", "is not a JSON object"
    )


# --- quantized already ---------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["root", "text"])
@pytest.mark.parametrize("key", QUANTIZATION)
def test_what_is_quantized_is_refused_wherever_it_says_so(
    project: Project, carnice: Carnice, section: str, key: str
) -> None:
    """A section that says how weights are quantized means that they are; a null means nothing."""

    def change(config: Config, text: Config) -> None:
        {"root": config, "text": text}[section][key] = {"quant_method": "bitsandbytes"}

    reconfigure(project.checkpoint, change)

    check_refused_at_once(carnice("plan", MLX), project, "is quantized already (bitsandbytes)")


# --- the head ------------------------------------------------------------------------------------


def with_head(folder: Path, head: Callable[[Tensor], Tensor]) -> Path:
    """Put a head beside the embedding of a checkpoint in one file."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = head(tensors[EMBEDDING])

    rewrite(folder / "model.safetensors", change)
    return folder


def test_a_redundant_head_is_left_out_with_a_notice(
    project: Project, tiny_checkpoint: TinyCheckpoint, carnice: Carnice
) -> None:
    """Plan and build say so, and the folder is the one of a checkpoint without it."""
    notice = f"{HEAD} of the source is left out, because config.json ties it to {EMBEDDING}"
    bare = tiny_checkpoint(project.root / "bare", tied=True)
    full = with_head(tiny_checkpoint(project.root / "full", tied=True), lambda table: table)
    folders, events = [], list[Event]()
    for source in (bare, full):
        build_variants([MLX], project.options(sources={"body": source}), events.append)
        folders.append(contents(project.out / MLX))
    shown = carnice("plan", MLX, "--source", f"body={full}", "--json").out

    assert folders[0] == folders[1]
    assert [f"{MLX}: {notice}"] == [event.text for event in events if isinstance(event, Notice)]
    assert [notice] == json.loads(shown)["variants"][0]["notices"]
    assert notice in " ".join(carnice("plan", MLX, "--source", f"body={full}").out.split())


@pytest.mark.parametrize("at", [0, -1])
def test_a_head_that_differs_from_what_it_is_tied_to_is_a_question(
    project: Project, tiny_checkpoint: TinyCheckpoint, carnice: Carnice, at: int
) -> None:
    """transformers would take it and mlx-lm would not: the plan asks which is meant."""

    def other(table: Tensor) -> Tensor:
        data = bytearray(table.data)
        data[at] ^= 1
        return Tensor(table.dtype, table.shape, bytes(data))

    source = with_head(tiny_checkpoint(project.root / "source", tied=True), other)
    finished = carnice("plan", MLX, "--source", f"body={source}")
    kept = tiny_checkpoint(project.root / "kept", tied=True)
    reconfigure(with_head(kept, other), lambda config, _: config.update(tie_word_embeddings=False))
    (variant,) = plan_variants([MLX], project.options(sources={"body": kept})).variants

    check_refused_at_once(
        finished, project, f"tensor '{HEAD}' differs from", "`tie_word_embeddings: false`", "`drop`"
    )
    assert any(tensor.fact.name == HEAD for tensor in variant.conversion.tensors)


@pytest.mark.parametrize(
    ("root", "text", "tied"),
    [
        (True, True, True),
        (True, False, True),
        (True, None, True),
        (None, True, True),
        (False, True, False),
        (False, False, False),
        (None, False, False),
        (None, None, False),
    ],
)
def test_the_root_decides_whether_the_head_is_tied(
    root: bool | None, text: bool | None, tied: bool
) -> None:
    """Where it is silent, the text is asked; both sections of what is published agree."""

    def change(config: Config, section: Config) -> None:
        config["tie_word_embeddings"], section["tie_word_embeddings"] = root, text

    config = spelled(change)
    found = json.loads(published(config))

    assert tied is (HEAD not in architecture_of(config, "tiny").tensors)
    assert tied is found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"]


@pytest.mark.parametrize("says", ["root", "text"])
def test_mlx_lm_ties_the_head_of_a_folder(
    project: Project, tiny_checkpoint: TinyCheckpoint, says: str
) -> None:
    """It loads the folder strictly, and scores tokens by the embedding."""
    mlx_lm = pytest.importorskip("mlx_lm")
    from test_mlx_parity import with_tokenizer

    source = with_tokenizer(tiny_checkpoint(project.root / "source", tied=True))
    silent = {"root": 1, "text": 0}[says]
    reconfigure(source, lambda *sections: sections[silent].pop("tie_word_embeddings"))
    build_variants([MLX], project.options(sources={"body": source}))
    model, _ = mlx_lm.load(str(project.out / MLX))

    assert model.language_model.args.tie_word_embeddings
    assert not any("lm_head" in name for name in read_all_tensors(project.out / MLX))


# --- kinds of layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear_atention", "sliding_attention"])
def test_an_unknown_kind_of_layer_is_an_error(name: str) -> None:
    """It is not taken for linear attention; the message has its number and the nearest name."""

    def change(_: Config, text: Config) -> None:
        text["layer_types"][2] = name

    with pytest.raises(CheckpointError) as caught:
        architecture_of(spelled(change), "tiny")

    assert f"layer_types[2] is {name!r}" in str(caught.value)
    assert "expected full_attention or linear_attention; did you mean" in str(caught.value)


def kinds(letters: str) -> Change:
    """Layers of these kinds, whatever the interval says."""
    names = {"l": "linear_attention", "f": "full_attention"}
    return lambda _, text: text.update(layer_types=[names[letter] for letter in letters])


IRREGULAR = {"pruned": "lflllf", "at the front": "flll", "all full": "ffff", "all linear": "llll"}


@pytest.mark.parametrize("case", IRREGULAR)
def test_layers_that_mlx_lm_cannot_tell_apart_are_refused(
    project: Project, carnice: Carnice, case: str
) -> None:
    """It knows an interval alone; other formats take such a model."""
    letters = IRREGULAR[case]
    config = spelled(kinds(letters), layers=len(letters))
    source = write_odd(project.root / "odd", config)
    found = carnice("plan", MLX, "--source", f"body={source}")
    nothing_to_keep = () if "l" in letters else ("--set", "quantize.keep=[]")
    other = carnice("plan", RTN, "--source", f"body={source}", *nothing_to_keep)

    check_refused_at_once(
        found,
        project,
        "presets/mlx-4bit.yaml:",
        "full attention, and mlx-lm can only run a model of which",
    )
    assert 0 == other.code, other.err


def write_odd(folder: Path, config: Config) -> Path:
    """A checkpoint of random weights with this config."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    write_json(folder / "preprocessor_config.json", {})
    write_safetensors(folder / "model.safetensors", tiny_tensors(config))
    return folder


@pytest.mark.parametrize("case", IRREGULAR)
def test_mlx_lm_cannot_run_them_indeed(case: str) -> None:
    """Its model has other layers than the config's, or fails at its first token."""
    mx = pytest.importorskip("mlx.core")
    qwen = pytest.importorskip("mlx_lm.models.qwen3_5")
    letters = IRREGULAR[case]
    text = spelled(kinds(letters), layers=len(letters))["text_config"]
    text["full_attention_interval"] = letters.find("f") + 1 or 8
    model = qwen.Model(qwen.ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": text}))
    theirs = "".join("l" if layer.is_linear else "f" for layer in model.layers)
    runs = True
    try:
        mx.eval(model(mx.array([[1, 2, 3]]), cache=model.make_cache()))
    except (IndexError, TypeError):
        runs = False

    assert not (runs and theirs == letters)


def test_an_interval_that_only_the_kinds_tell_is_written_for_mlx_lm(project: Project) -> None:
    """mlx-lm loads and runs a folder whose source had no `full_attention_interval`."""
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from test_mlx_parity import with_tokenizer

    def change(config: Config, text: Config) -> None:
        kinds("lflflflf")(config, text)
        text.pop("full_attention_interval")

    source = with_tokenizer(write_odd(project.root / "odd", spelled(change)))
    build_variants([MLX], project.options(sources={"body": source}))
    model, _ = mlx_lm.load(str(project.out / MLX))
    text = read_json(project.out / MLX / "config.json")["text_config"]

    assert 2 == text["full_attention_interval"]
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


# --- the MTP head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "steps", "layers"),
    [(MLX, "", 0), (RTN, "", 1), (RTN, HEADLESS, 0)],
)
def test_a_config_announces_the_head_that_is_there(
    project: Project, variant: str, steps: str, layers: int
) -> None:
    """mlx-lm drops the head, and so may a recipe; the source announces it all the same."""
    project.recipe("odd", f"extends: {variant}.yaml\nvariant: odd\ndescription: x\n{steps}")
    options = project.options(sources={"body": project.base})
    (planned,) = plan_variants(["odd"], options).variants

    assert layers == planned.config["text_config"]["mtp_num_hidden_layers"]
    assert bool(layers) is any("mtp." in name for name in planned.conversion.ignored)
