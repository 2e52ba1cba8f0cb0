"""What `carnice new` is asked for: a name, a model, a preset and perhaps a text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carnice_build.checkpoint.checkpoint import Checkpoint, open_checkpoint
from carnice_build.commands import dataset as datasets
from carnice_build.errors import CheckpointError, RecipeError, nearest
from carnice_build.recipe.merge import read_with_parents
from carnice_build.recipe.presets import presets
from carnice_build.recipe.schema import check_name

_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")
MAIN = "main"
"""The branch of a repository whose commit a recipe names."""


def new_path(name: str, recipes: Path) -> Path:
    """Where the recipe is to be; RecipeError when something is there."""
    try:
        check_name(name)
    except ValueError as error:
        raise RecipeError(str(error), where="NAME") from None
    path = recipes / f"{name}.yaml"
    if os.path.lexists(path):
        raise RecipeError(
            "is there already", where=str(path), expected="another name, or that file removed"
        )
    return path


def preset_of(name: str) -> Mapping[str, Any]:
    """What a preset says."""
    known = presets()
    if name not in known:
        raise RecipeError(
            f"there is no preset {name!r}",
            where="--as",
            expected="one of those that `carnice new --list` shows",
            nearest=nearest(name, known),
        )
    plain = read_with_parents(known[name]).plain()
    assert isinstance(plain, dict)
    return plain


def text_of(
    dataset: str | None, preset: str, knobs: Mapping[str, Any], root: Path
) -> Mapping[str, Any]:
    """What the recipe says of the text that it is calibrated on; nothing where the preset does."""
    if dataset is None:
        return {}
    if "calibration" not in knobs:
        calibrated = [name for name in presets() if "calibration" in preset_of(name)]
        raise RecipeError(
            f"{preset} is not calibrated",
            where=datasets.OPTION,
            expected=f"a preset that is: {', '.join(calibrated)}",
        )
    return datasets.named(dataset, root)


def open_model(model: str, root: Path) -> tuple[dict[str, str], Checkpoint]:
    """What a recipe says of the source, and the checkpoint."""
    if not model:
        # Which a path takes for the current folder.
        raise CheckpointError("names no model", where="--from", expected="FOLDER or OWNER/MODEL")
    path = Path(model)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if is_folder:
        return _folder(path, root), open_checkpoint(path)
    if not datasets.REPOSITORY.fullmatch(model) or path.exists():
        raise CheckpointError(
            "is no folder, and no name on the hub", where=model, expected="FOLDER or OWNER/MODEL"
        )
    checkpoint, commit = open_on_hub(model)
    return {"model": model, "revision": commit}, checkpoint


def open_on_hub(model: str) -> tuple[Checkpoint, str]:
    """A repository as it is now, and the commit that this is."""
    # The hub's library is slow to import.
    from carnice_build.checkpoint.hub import open_hub

    return open_hub(model, MAIN, stream=True)


def _folder(path: Path, root: Path) -> dict[str, str]:
    place = Path(os.path.abspath(path))  # noqa: PTH100 (a link may be there to be changed)
    if not str(place).isprintable():
        raise CheckpointError("has a name that no recipe can hold", where=str(path))
    below = Path(os.path.abspath(root))  # noqa: PTH100
    shown = place.relative_to(below) if place.is_relative_to(below) else place
    snapshot = _SNAPSHOT.search(place.as_posix())
    if snapshot:
        model = {"model": f"{snapshot[1]}/{snapshot[2]}", "revision": snapshot[3]}
    else:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).lstrip("._-")[:90]
        model = {"model": f"local/{plain or 'model'}"}
    return {**model, "folder": shown.as_posix()}
