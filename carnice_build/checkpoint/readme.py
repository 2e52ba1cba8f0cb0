"""What the page of a checkpoint says of it: the hub's metadata at the beginning of README.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.source import read_all
from carnice_build.errors import RecipeError
from carnice_build.yaml_tree import MAX_BYTES, parse_tree

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_MOST_README = 10 * MAX_BYTES


@dataclass(frozen=True)
class Readme:
    """Licence, languages and the models that this one was made from; what is not said is empty."""

    license: str | None = None
    languages: Sequence[str] = ()
    base_models: Sequence[str] = ()


def read_readme(checkpoint: Checkpoint) -> Readme:
    """The metadata of a checkpoint's README.md.

    A stranger wrote it, so what is not of the form that it should have counts as not said.
    """
    table = front_matter(checkpoint)
    licenses = _texts(table.get("license"), _WORD)
    return Readme(
        licenses[0] if licenses else None,
        _texts(table.get("language"), _WORD),
        _texts(table.get("base_model"), _MODEL),
    )


def front_matter(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries at the head of a checkpoint's README.md; {} where they cannot be read."""
    file = checkpoint.assets.get("README.md")
    if file is None or file.size > _MOST_README:
        return {}
    text = read_all(file).decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = _FRONT.match(text)
    if match is None:
        return {}
    try:
        table = parse_tree(match[1], file.name).plain()
    except RecipeError:
        return {}
    return table if isinstance(table, dict) else {}


def _texts(value: object, form: re.Pattern[str]) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and form.fullmatch(item)]
