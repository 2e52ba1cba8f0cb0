"""Random headers and recipes: a result or a named error, never anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import write_raw

from carnice_build.checkpoint.header import Header, read_header
from carnice_build.checkpoint.source import LocalFile
from carnice_build.dtypes import ITEM_SIZE
from carnice_build.errors import CarniceError, CheckpointError, RecipeError
from carnice_build.planning.vocabulary import vocabulary
from carnice_build.recipe.loader import load_recipe
from carnice_build.recipe.merge import override
from carnice_build.yaml_tree import Node, parse_tree

TEXTS = st.text(max_size=12)
NUMBERS = st.one_of(st.integers(-4, 40), st.integers(), st.floats())
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(ITEM_SIZE)) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON,
    }
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_or_refuse(path: Path) -> Header | None:
    """The header of a file, None when it was refused; a header lies inside its file."""
    try:
        header = read_header(LocalFile(path))
    except CheckpointError as error:
        assert str(error).isprintable()
        return None
    size = path.stat().st_size
    assert (
        size == header.entries[-1].offset + header.entries[-1].spec.nbytes if header.entries else 1
    )
    assert all(0 <= entry.offset <= size - entry.spec.nbytes for entry in header.entries)
    return header


@given(content=st.binary(max_size=200))
@settings(max_examples=150)
def test_random_bytes_are_no_header(scratch: Path, content: bytes) -> None:
    """Any file is read or refused."""
    path = scratch / "a.safetensors"
    path.write_bytes(content)
    read_or_refuse(path)


@given(header=st.dictionaries(TEXTS, ENTRIES | JSON, max_size=4), data=st.integers(0, 64))
@settings(max_examples=100)
def test_random_tables_are_read_or_refused(scratch: Path, header: Any, data: int) -> None:
    """Whatever JSON stands in a header, every accepted tensor lies inside the file."""
    path = scratch / "a.safetensors"
    write_raw(path, header, bytes(data))
    read_or_refuse(path)


@given(position=st.integers(0, 1 << 20), value=st.integers(0, 255))
@settings(max_examples=150)
def test_a_changed_byte_is_harmless(scratch: Path, position: int, value: int) -> None:
    """A valid file with any byte of its header changed is read or refused."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }
    raw = json.dumps(header).encode()
    path = scratch / "a.safetensors"
    write_raw(path, raw, bytes(16))
    content = bytearray(path.read_bytes())
    content[position % (8 + len(raw))] = value
    path.write_bytes(content)
    read_or_refuse(path)


RECIPE_KEYS = st.sampled_from(
    [
        *("variant", "description", "sources", "layers", "steps", "quantize", "package", "card"),
        *("extends", "steps+", "bits", "format", "rules", "match", "from", "to", "model", "body"),
    ]
)
YAML_VALUES = st.recursive(
    LEAVES | st.sampled_from(["mlx", "x/y", "*", "re:a", "fuzz", 4, "1/8"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(RECIPE_KEYS | st.sampled_from(["drop", "rename"]) | TEXTS, inner)
    ),
    max_leaves=12,
)


SIGNS = [*"[]{}:,-?&*!|>'\"%@#\n a1~", "&a", "*a", "<<: ", "!!int ", "!!map ", "- ", "\n  ", ".inf"]


def check_printable(error: CarniceError) -> None:
    """One printable line, or a headline and an indented one for each of several problems."""
    headline, *problems = str(error).split("\n")

    assert headline.isprintable()
    assert all(line.startswith("  ") and line.isprintable() for line in problems)


def load_or_refuse(path: Path) -> None:
    """Load a recipe; a refusal is printable and names the file."""
    try:
        load_recipe(path, vocabulary())
    except RecipeError as error:
        check_printable(error)
        assert str(path) in str(error)


@given(text=st.text(max_size=200))
@example(text="a: !!int ''")
@example(text="a: !!bool x")
@example(text="<<: [")
@settings(max_examples=150)
def test_random_text_is_no_recipe(scratch: Path, text: str) -> None:
    """Any text is refused with its place."""
    path = scratch / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    load_or_refuse(path)


@given(
    tokens=st.lists(
        st.sampled_from(SIGNS),
        max_size=40,
    )
)
@settings(max_examples=100)
def test_random_syntax_is_no_recipe(scratch: Path, tokens: list[str]) -> None:
    """Any mixture of YAML's own signs is refused with its place."""
    path = scratch / "fuzz.yaml"
    path.write_text("".join(tokens), encoding="utf-8")
    load_or_refuse(path)


@given(recipe=st.dictionaries(RECIPE_KEYS, YAML_VALUES, max_size=6))
@settings(max_examples=100)
def test_random_recipes_are_loaded_or_refused(scratch: Path, recipe: Any) -> None:
    """Any values under the keys of a recipe are accepted or refused, and nothing else happens."""
    path = scratch / "fuzz.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    load_or_refuse(path)


VALID: dict[str, Any] = {
    "variant": "fuzz",
    "description": "x",
    "sources": {"body": {"model": "x/y"}},
    "layers": {"some": [{"to": "1/8"}]},
    "steps": [{"drop": {"match": "*"}}, {"rename": {"from": "a", "to": "b"}}],
    "quantize": {"format": "mlx", "bits": 4, "rules": [{"match": "*", "bits": 6}]},
}
PATHS = st.lists(
    RECIPE_KEYS | st.sampled_from(["0", "1", "drop", "some", "expect", "+"]) | TEXTS, max_size=5
).map(".".join)


@given(path=PATHS, value=YAML_VALUES | TEXTS)
@settings(max_examples=100)
def test_random_overrides_are_applied_or_refused(scratch: Path, path: str, value: Any) -> None:
    """Any `--set` on a valid recipe is applied or refused."""
    recipe = scratch / "fuzz.yaml"
    recipe.write_text(yaml.safe_dump(VALID))
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    try:
        load_recipe(recipe, vocabulary(), [f"{path}={text}"])
    except CarniceError as error:
        check_printable(error)


@given(text=st.text(max_size=60))
@settings(max_examples=150)
def test_random_assignments_are_applied_or_refused(text: str) -> None:
    """Any text after `--set` is applied or refused."""
    tree = parse_tree("a: {b: [1, 2]}", "x.yaml")
    try:
        changed = override(tree, text)
    except RecipeError as error:
        assert str(error).isprintable()
        return
    assert isinstance(changed, Node)
