"""A recipe of yesterday is told what to write today."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from carnice_build.errors import RecipeError
from carnice_build.planning.vocabulary import vocabulary
from carnice_build.recipe.loader import load_recipe
from carnice_build.recipe.schema import Strict, Vocabulary

BODY = "variant: old\ndescription: x\nsources: {body: {model: owner/name}}\n"


class Item(Strict):
    """An entry of a list, which had a key once."""

    weight: int = 0
    retired: ClassVar = {"wieght": "`weight`, as it is spelt now"}


class Knobs(Strict):
    """A format that had a key once."""

    format: Literal["toy"]
    width: int = 0
    items: list[Item] = Field(default_factory=list)
    retired: ClassVar = {"bits": "`width: ...`", "items_first": "nothing in its place"}


def refused(folder: Path, quantize: str, words: Vocabulary, *overrides: str) -> str:
    """What is said of a recipe with this section."""
    path = folder / "old.yaml"
    path.write_text(BODY + quantize)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, words, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantize", "said"),
    [
        (
            "quantize:\n  format: toy\n  bits: 4\n",
            ":6:9: quantize.bits is gone; expected `width: ...`",
        ),
        (
            "quantize: {format: toy, items: [{weight: 1}, {wieght: 2}]}\n",
            ":4:55: quantize.items.1.wieght is gone; expected `weight`, as it is spelt now",
        ),
        (
            "quantize: {format: toy, wieght: 1}\n",
            ":4:33: unknown key 'quantize.wieght'",
        ),
    ],
)
def test_a_key_that_was_retired_says_what_to_write_instead(
    tmp_path: Path, quantize: str, said: str
) -> None:
    """With its place, at any depth; a key that its section never had is unknown as ever."""
    message = refused(tmp_path, quantize, Vocabulary({}, {"toy": Knobs}))

    assert f"{tmp_path / 'old.yaml'}{said}" == message


def test_all_that_were_retired_are_told_at_once(tmp_path: Path) -> None:
    """Old keys, in whatever file or option, do not hide one another."""
    quantize = "quantize: {format: toy, bits: 4}\n"
    words = Vocabulary({}, {"toy": Knobs})
    message = refused(tmp_path, quantize, words, "quantize.items_first=true")

    assert "2 things are wrong" in message
    assert "quantize.bits is gone; expected `width: ...`" in message
    assert "--set quantize.items_first=true: quantize.items_first is gone" in message


@pytest.mark.parametrize(
    ("format", "instead"),
    [("fp8-dynamic", "`format: compressed-tensors` with `scheme: FP8_DYNAMIC`")],
)
def test_a_format_that_was_retired_says_what_to_write_instead(
    tmp_path: Path, format: str, instead: str
) -> None:
    """In one sentence, whatever keys it had: none of those is called unknown beside it."""
    quantize = f"quantize: {{format: {format}, keep: '*.mlp.*'}}\n"
    message = refused(tmp_path, quantize, vocabulary())

    place = tmp_path / "old.yaml"
    assert f"{place}:4:20: the format {format!r} is gone; expected {instead}" == message


def test_every_format_that_was_retired_is_one_no_more() -> None:
    """One that came back would be taken, and its sentence never said."""
    words = vocabulary()

    assert set() == set(words.retired) & set(words.formats)


def sections() -> Iterator[type[Strict]]:
    """Every model that a shipped recipe is checked by."""
    assert vocabulary().formats
    found = [Strict]
    while found:
        model = found.pop()
        found += model.__subclasses__()
        if model.__module__.startswith("carnice_build."):
            yield model


OLD = [(model, key) for model in sections() for key in model.__dict__.get("retired", {})]


@pytest.mark.parametrize(("model", "key"), OLD, ids=lambda value: getattr(value, "__name__", value))
def test_what_was_retired_is_no_key_any_more(model: type[Strict], key: str) -> None:
    """A key that came back would be accepted, and its sentence never said."""
    assert key not in model.model_fields
    assert model.retired[key]
