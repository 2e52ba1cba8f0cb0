"""Recipes of a few lines, built of tiny checkpoints of many families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from zoo import FAMILIES, TOKENIZER, write_zoo

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.verification.result import Outcome

INT4_WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": False,
    "strategy": "group",
    "group_size": 128,
    "observer": "memoryless_minmax",
}
"""Our W4A16 by `memoryless_minmax`, in the words of compressed-tensors."""


def write_family(folder: Path, family: str, changes: Mapping[str, Any]) -> Path:
    """The checkpoint of `family`, `changes` made in the config of its text model.

    Gemma 3's with a tower is as on the hub, for transformers 5 spells the tower in another way.
    """
    entry = FAMILIES[family]
    config = dict(entry.config)
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **changes}
    else:
        config |= changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, replace(entry, config=config))
        return write_zoo(folder, family, "hub" if family == "gemma3" else "transformers")


def write_texts(path: Path, count: int = 3) -> list[str]:
    """Rows of plain text for a calibration, of several lengths."""
    import json

    text = (TOKENIZER.parent / "heldout.txt").read_text(encoding="utf-8")
    rows = [text[400 * row : 400 * row + 120 + 40 * row] for row in range(count)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return rows


def options_of(root: Path, source: Path) -> Options:
    """Where variants of the checkpoint `source` are built."""
    return Options(
        recipes=root / "recipes",
        out=root / "out",
        cache=root / "cache",
        jobs=1,
        sources={"body": source},
    )


def write_recipe(recipes: Path, variant: str, sections: str) -> None:
    """A recipe with these sections in the folder `recipes`, with sources as `options_of` has
    them."""
    recipes.mkdir(exist_ok=True)
    (recipes / "_profiles.yaml").write_text("demo: {}\n")
    (recipes / f"{variant}.yaml").write_text(
        f"variant: {variant}\ndescription: A\nsources: {{body: {{model: a/b}}}}\n{sections}"
    )


def build_checked(root: Path, source: Path, variant: str, recipe: str) -> Path:
    """The folder of a variant of the checkpoint `source`, which passes its checks.

    `recipe` are the sections `quantize` and, if there are any, `calibration`.
    """
    write_recipe(root / "recipes", variant, recipe)
    options = options_of(root, source)
    build_variants([variant], options)
    (result,) = verify_variants([variant], options, VerifySettings(run=False)).variants
    assert [] == [check for check in result.checks if check.outcome is Outcome.FAILED]
    return root / "out" / variant
