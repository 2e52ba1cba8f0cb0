"""Hostile checkpoints: whatever a stranger published, a build names it or makes the right model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacking import Attack, check_named
from conftest import Project
from tiny import read_json, write_json, write_raw

from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.commands.build import build_variants
from carnice_build.errors import CheckpointError
from carnice_build.execute.events import Event, Started

pytest_plugins = ["attacking"]

SHARD = "model-00001-of-00002.safetensors"

Damage = Callable[[Path], None]


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the index."""

    def damage(folder: Path) -> None:
        value = read_json(folder / INDEX_NAME)
        change(value)
        write_json(folder / INDEX_NAME, value)

    return damage


def shard_named(name: object) -> Damage:
    """Let the index name another shard for one tensor."""

    def change(value: dict[str, Any]) -> None:
        first = next(iter(value["weight_map"]))
        value["weight_map"][first] = name

    return index(change)


def text(file: str, content: str | bytes) -> Damage:
    """Replace a file."""

    def damage(folder: Path) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (folder / file).write_bytes(raw)

    return damage


def config(section: str | None = "text_config", **changes: Any) -> Damage:
    """Change the config."""

    def damage(folder: Path) -> None:
        value = read_json(folder / "config.json")
        (value[section] if section else value).update(changes)
        write_json(folder / "config.json", value)

    return damage


def instead(file: str, make: Callable[[Path], object]) -> Damage:
    """Put something that is not an ordinary file in place of one."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return damage


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def one_tensor(name: str) -> Damage:
    """A checkpoint without index whose only tensor has this name."""

    def damage(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        write_raw(folder / "model.safetensors", {name: entry}, b"\0")

    return damage


def many_tensors(folder: Path) -> None:
    """Twenty thousand empty tensors."""
    for path in folder.glob("model*"):
        path.unlink()
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    write_raw(folder / "model.safetensors", {f"t{i}.visual": entry for i in range(20_000)})


def terabyte(folder: Path) -> None:
    """A sparse shard of 1 TB."""
    with (folder / SHARD).open("r+b") as file:
        file.truncate(10**12)


def huge_index(folder: Path) -> None:
    with (folder / INDEX_NAME).open("r+b") as file:
        file.truncate(10**12)


NAMED: dict[str, tuple[Damage, str]] = {
    # the index
    "index is a list": (text(INDEX_NAME, "[]"), "is not a JSON object"),
    "index nested 100,000 deep": (text(INDEX_NAME, "[" * 100_000), "is not valid JSON"),
    "index of 1 TB": (huge_index, "too many for JSON"),
    "index without a map": (text(INDEX_NAME, "{}"), "has no weight_map"),
    "index whose map is a list": (text(INDEX_NAME, '{"weight_map":[]}'), "has no weight_map"),
    "index of numbers": (shard_named(7), "has no weight_map of names to shards"),
    "index with a tensor twice": (
        text(INDEX_NAME, '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'),
        "names 'a' twice",
    ),
    "index with an absolute path": (shard_named("/etc/x.safetensors"), "outside the folder"),
    "index with a parent": (shard_named("../x.safetensors"), "outside the folder"),
    "index with a parent inside": (shard_named("a/../x.safetensors"), "outside the folder"),
    "index with a backslash": (shard_named("..\\x.safetensors"), "outside the folder"),
    "index with NUL": (shard_named("x\0.safetensors"), "outside the folder"),
    "index with dots": (shard_named(".."), "outside the folder"),
    "index with an empty name": (shard_named(""), "outside the folder"),
    "index that names a pickle": (shard_named("pytorch_model.bin"), "which is not safetensors"),
    "index that drives the terminal": (shard_named("\x1b[2J\r.safetensors"), r"\x1b[2J"),
    "index with a very long name": (shard_named("x" * 10**6 + ".safetensors"), "is missing"),
    "index with half a surrogate pair": (
        text(INDEX_NAME, '{"weight_map":{"\\ud800":"x.safetensors"}}'),
        "is not valid JSON",
    ),
    # files that are none
    "shard is a folder": (instead(SHARD, Path.mkdir), "which is missing"),
    "shard is a pipe": (instead(SHARD, os.mkfifo), "which is missing"),
    "shard is a device": (instead(SHARD, link_to("/dev/zero")), "which is missing"),
    "shard is a loop of links": (instead(SHARD, link_to(SHARD)), "is a link to nothing"),
    "shard is a link to nowhere": (instead(SHARD, link_to("nowhere")), "is a link to nothing"),
    "config is a pipe": (instead("config.json", os.mkfifo), "has no config.json"),
    "config is a device": (instead("config.json", link_to("/dev/zero")), "has no config.json"),
    "shard is an LFS pointer": (
        text(SHARD, "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "is a Git LFS pointer",
    ),
    "shard is a web page": (text(SHARD, "<!doctype html><p>404"), "not a safetensors file"),
    "shard of 1 TB": (terabyte, "bytes after its last tensor"),
    "twenty thousand tensors": (many_tensors, "t0.visual"),
    # names
    "name with escapes": (one_tensor("\x1b[31mred\x07"), r"\x1b[31mred\x07"),
    "name with lines": (one_tensor("a\ncarnice: all is well\n"), r"a\ncarnice: all is well\n"),
    "name that turns text round": (one_tensor("abc\u202etxt"), r"\u202e"),
    "name with NUL": (one_tensor("a\0b"), r"a\x00b"),
    "name that is a path": (one_tensor("../../etc/passwd"), "is not one of qwen3_5"),
    "name of 10,000 characters": (one_tensor("a" * 10_000), "a name of 10000 characters"),
    # the config
    "config is a list": (text("config.json", "[]"), "is not a JSON object"),
    "config is NaN": (text("config.json", '{"a": NaN}'), "is not valid JSON"),
    "config is not UTF-8": (text("config.json", b'{"a": "\xff"}'), "is not valid JSON"),
    "config with a key twice": (text("config.json", '{"a":1,"a":2}'), "names 'a' twice"),
    "config with half a character": (text("config.json", '{"a":"\\ud800"}'), "not valid JSON"),
    "config nested deep": (text("config.json", '{"a":' * 10**5), "is not valid JSON"),
    "config of huge numbers": (text("config.json", "9" * 10**5), "is not valid JSON"),
    "model type unknown": (config(None, model_type="qwen3_6"), "unknown model_type 'qwen3_6'"),
    "model type with escapes": (config(None, model_type="\x1b]0;x\x07"), r"\x1b]0;x\x07"),
    "model type of 10 MB": (config(None, model_type="q" * 10**7), "unknown model_type"),
    "model type that is a list": (config(None, model_type=[1]), "unknown model_type"),
    "text config that is a list": (config(None, text_config=[]), "expected a section"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "a billion vision blocks": (config("vision_config", depth=10**9), "depth is 1000000000"),
    "a billion MTP layers": (config(mtp_num_hidden_layers=10**9), "mtp_num_hidden_layers is 1000"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "negative heads": (config(num_attention_heads=-2), "num_attention_heads is -2"),
    "no width": (config(hidden_size=0), "hidden_size is 0"),
    "a width that is true": (config(hidden_size=True), "hidden_size is True"),
    "a width that is a float": (config(hidden_size=128.0), "hidden_size is 128.0"),
    "a width of 4,000 digits": (config(hidden_size=10**4000), "hidden_size is"),
    "sizes whose product is huge": (
        config(num_attention_heads=2**31 - 1, head_dim=2**31 - 1),
        "by its config",
    ),
    "every 0th layer": (
        config(full_attention_interval=0, layer_types=None),
        "full_attention_interval is 0",
    ),
    "too few kinds of layers": (config(layer_types=["full_attention"]), "expected 8 entries"),
    "kinds of layers that are numbers": (config(layer_types=[1] * 8), "a list of strings"),
    "tied embeddings by text": (config(tie_word_embeddings="yes"), "expected true or false"),
    "a type that is a number": (config(dtype=16), "dtype is 16; expected a string"),
}


@pytest.mark.parametrize("what", NAMED)
def test_it_is_named(project: Project, attack: Attack, what: str) -> None:
    """One printable line says what is wrong, and nothing was built."""
    damage, part = NAMED[what]
    damage(project.checkpoint)

    check_named(attack("build", "mlx-4bit"), "carnice: ", part)
    assert not project.out.exists()


LATE: dict[str, Damage] = {
    "generation config is a list": text("generation_config.json", "[]"),
    "generation config is nested deep": text("generation_config.json", "[" * 10**5),
}


@pytest.mark.parametrize("what", LATE)
def test_a_damaged_small_file_is_named(project: Project, attack: Attack, what: str) -> None:
    """A file that is only needed at the end still leaves no half a folder."""
    LATE[what](project.checkpoint)

    check_named(attack("build", "mlx-4bit"), "generation_config.json", "is not a JSON object")
    assert not project.out.exists() or [] == list(project.out.iterdir())


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN"])
def test_a_small_file_that_is_not_json_is_named(
    project: Project, attack: Attack, value: str
) -> None:
    """What Python would take for JSON, and others not, gets into no config.json."""
    (project.checkpoint / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')

    check_named(attack("build", "mlx-4bit"), "generation_config.json", "is not a JSON object")


def test_a_huge_small_file_is_named(project: Project, attack: Attack) -> None:
    """A tokenizer of 1 TB is not read."""
    with (project.checkpoint / "tokenizer.json").open("r+b") as file:
        file.truncate(10**12)

    check_named(attack("build", "mlx-4bit"), "tokenizer.json", "has 1000000000000 bytes")


HARMLESS: dict[str, Damage] = {
    "a pipe for a tokenizer": instead("vocab.json", os.mkfifo),
    "a device for a template": instead("chat_template.json", link_to("/dev/zero")),
    "a folder for a tokenizer": instead("merges.txt", Path.mkdir),
    "a pipe called like a shard": instead("pipe.safetensors", os.mkfifo),
    "code beside the weights": text("modeling_evil.py", "raise SystemExit('executed')"),
    "a pickle beside the weights": text("training_args.bin", b"\x80\x04cos\nsystem\n."),
    "a shard that no index names": text("evil.safetensors", b"garbage"),
}


def test_what_is_not_needed_is_not_touched(project: Project, attack: Attack) -> None:
    """Pipes, devices, code and pickles beside the weights change no byte of the model."""
    clean = attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    for damage in HARMLESS.values():
        damage(project.checkpoint)
    again = attack("build", "mlx-4bit", "--out", "build/again")
    again_files = {
        path.name: path.read_bytes() for path in (project.out / "again" / "mlx-4bit").iterdir()
    }

    assert (0, 0) == (clean.code, again.code)
    assert expected == again_files


def test_a_config_asks_for_no_code(project: Project, attack: Attack) -> None:
    """`auto_map` and custom classes in a config are not followed."""
    config(None, auto_map={"AutoModel": "modeling_evil.Evil"})(project.checkpoint)
    (project.checkpoint / "modeling_evil.py").write_text("raise SystemExit('executed')")

    assert 0 == attack("build", "mlx-4bit").code


def test_a_shard_cut_while_it_is_read_is_named(project: Project) -> None:
    """A file that shrinks between plan and reading is an error, never a weight."""

    def cut(event: Event) -> None:
        if isinstance(event, Started):
            os.truncate(project.checkpoint / SHARD, 20_000)

    with pytest.raises(CheckpointError, match=r"ends at byte \d+, inside a tensor"):
        build_variants(["mlx-4bit"], project.options(), cut)
    assert not project.out.exists()


SHAPES = {
    "no format": ({}, "is a file of format None"),
    "another format": ({"format": "carnice-shapes-9"}, "'carnice-shapes-9'"),
    "no tensors": ({"format": "carnice-shapes-1", "config": {}}, "has no config or no tensors"),
    "an entry that is a number": ({"tensors": {"a": 1}}, "'a' is malformed"),
    "an unknown dtype": ({"tensors": {"a": ["F33", [1]]}}, "unknown dtype 'F33'"),
    "a million axes": ({"tensors": {"a": ["F32", [2**31] * 10**6]}}, "no valid shape"),
    "a negative size": ({"tensors": {"a": ["F32", [-1]]}}, "no valid shape"),
    "a size that is true": ({"tensors": {"a": ["F32", [True]]}}, "no valid shape"),
}
RANGES = {
    "a million layers of a million": ("[0-999999].[0-999999].w", "names 1000000000000 tensors"),
    "more than all together": ("[0-999998].w", "names 999999 tensors"),
    "numbers without end": (f"[0-{'9' * 5000}].w", "has the name"),
    "falling numbers": ("[3-1].w", "rising numbers"),
    "a number twice": ("[0-3,3].w", "rising numbers"),
    "a tensor twice": ("[0-1].w", "twice"),
    "a text for numbers": ("[a-z].w", "rising numbers"),
    "half a range": ("[0-1.w", "rising numbers"),
    "a range in a range": ("[[0-1]].w", "rising numbers"),
    "a long name": (f"{'x' * 250}.[99999-100000]", "a name of 257 characters"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_hostile_shape_file_is_named(project: Project, attack: Attack, what: str) -> None:
    """Shape files are held to the same rules as headers."""
    content, part = SHAPES[what]
    whole = {"format": "carnice-shapes-1", "config": {}} if "tensors" in content else {}
    path = project.root / "shapes.json"
    path.write_text(json.dumps(whole | content))

    check_named(attack("plan", "mlx-4bit", "--source", f"body={path}"), "shapes.json", part)


@pytest.mark.parametrize("what", RANGES)
def test_a_hostile_range_in_a_shape_file_is_named(
    project: Project, attack: Attack, what: str
) -> None:
    """Names that stand for too many tensors, or for none, end before there are any."""
    name, part = RANGES[what]
    tensors = {"0.w": ["F32", [1]], "1": ["F32", [1]], name: ["F32", [1]]}
    path = project.root / "shapes.json"
    path.write_text(json.dumps({"format": "carnice-shapes-2", "config": {}, "tensors": tensors}))

    check_named(attack("plan", "mlx-4bit", "--source", f"body={path}"), "shapes.json", part)


@pytest.mark.parametrize(
    ("name", "part"),
    [("x" * 5000, "cannot be"), ("loop", "demo"), ("pipe", "is not a folder")],
)
def test_a_source_that_is_nothing_is_named(
    project: Project, attack: Attack, name: str, part: str
) -> None:
    """`--source` may name a pipe, a loop of links or what no file system has."""
    (project.root / "loop").symlink_to("loop")
    os.mkfifo(project.root / "pipe")
    finished = attack("build", "mlx-4bit", "--source", f"body={name}")

    check_named(finished, part if name != "loop" else "loop")
