"""Presets: the parts of recipes that ship with the package and speak of no model.

A recipe extends one as `preset:NAME`.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "preset:"

FOLDER = Path(__file__).parents[1] / "presets"


def presets() -> dict[str, Path]:
    """The file of each preset, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def shown(path: Path) -> str:
    """How errors call a file: a preset's by its place in the package, wherever that is."""
    if path.parent == FOLDER:
        return path.relative_to(FOLDER.parents[1]).as_posix()
    return str(path)
