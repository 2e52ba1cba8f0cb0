"""The text that a first recipe calibrates on, where a person names one: `carnice new --dataset`."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnice_build.calibration.tokens import Tokens
from carnice_build.checkpoint.source import read_all
from carnice_build.errors import CarniceError, PlanError, RecipeError
from carnice_build.graph import Action
from carnice_build.recipe.schema import DATASET_FILES
from carnice_build.tensors import SourceTensor

if TYPE_CHECKING:
    from carnice_build.planning.planner import VariantPlan

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""A name on the hub."""

OPTION = "--dataset"
KINDS = f"{', '.join(DATASET_FILES[:-1])} or {DATASET_FILES[-1]}"


def named(dataset: str, root: Path) -> dict[str, Any]:
    """What a recipe of the project in `root` says of a file, a folder with one, or a repository.

    Raises RecipeError for what is none of them, and for a file that no recipe there can name.
    """
    path = Path(dataset)
    if not dataset:
        # Which a path takes for the current folder.
        raise RecipeError("names no dataset", where=OPTION, expected=f"a {KINDS} file")
    if path.is_dir():
        path = _only_file(path)
    if path.name.endswith(DATASET_FILES):
        return {"dataset": _below(path, root)}
    if path.exists() or not REPOSITORY.fullmatch(dataset):
        raise RecipeError(
            f"{dataset!r} is no dataset",
            where=OPTION,
            expected=f"a {KINDS} file, a folder with one, or OWNER/NAME on the hub",
        )
    # Which subset the preset takes says nothing of another repository.
    return {"dataset": dataset, "subset": None}


def _only_file(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if path.name.endswith(DATASET_FILES))
    if len(found) != 1:
        raise RecipeError(
            f"{str(folder)!r} holds {len(found) or 'no'} {KINDS} files",
            where=OPTION,
            expected="one of them, by its name" if found else "a folder with one",
        )
    return found[0]


def _below(path: Path, root: Path) -> str:
    """The path of a file below the project, as recipes spell it."""
    if not path.is_file():
        raise RecipeError(_what_is(path), where=OPTION, expected=f"a {KINDS} file")
    # A link may be there to be changed, so it is not followed.
    place, below = Path(os.path.abspath(path)), Path(os.path.abspath(root))  # noqa: PTH100
    if not place.is_relative_to(below):
        raise RecipeError(
            f"{str(path)!r} is outside the project",
            where=OPTION,
            expected=f"a copy of it, or a link to it, below {below}",
        )
    return place.relative_to(below).as_posix()


_KINDS: Sequence[tuple[Callable[[int], bool], str]] = [
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
]


def _what_is(path: Path) -> str:
    """What stands where a file should be."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not path.is_symlink():
            return f"there is no file {str(path)!r}"
        why = "is one of a loop" if error.errno == errno.ELOOP else "leads to nothing"
        return f"{str(path)!r} is a link that {why}"
    kind = next((name for fits, name in _KINDS if fits(mode)), "no file")
    return f"{str(path)!r} is {kind}"


@contextmanager
def offering_another(calibration: Mapping[str, Any]) -> Iterator[None]:
    """Name the option in an error about the dataset on the hub that `calibration` is about."""
    try:
        yield
    except CarniceError as error:
        name, revision = calibration.get("dataset", ""), calibration.get("revision", "main")
        if f"datasets/{name}@{revision}: " not in error.sentence():
            raise
        another = f"{OPTION} FILE, which takes a {KINDS} file of yours in its place"
        expected = f"{error.expected}; or {another}" if error.expected else another
        raise type(error)(
            error.what,
            where=error.where,
            expected=expected,
            nearest=error.nearest,
            problems=error.problems,
        ) from None


def sample_counts(plan: VariantPlan) -> tuple[int, int]:
    """How many samples a plan asks of its dataset, a file, and how many of them there are.

    Raises as a build will for a row that is no text, for one without a chat template, and so on;
    PlanError when the plan reads no dataset, BackendError when what reads it is not installed.
    """
    # It brings multiprocessing.
    from carnice_build.verification.process import Worker

    action = next((item for item in plan.actions.values() if item.op.name == Tokens.name), None)
    if action is None:
        raise PlanError("nothing would be calibrated", where=OPTION, expected="a recipe without it")
    contents = [_file(action, operand) for operand in range(2)]
    with Worker() as worker:
        found = worker.ask(_count, action.params, read_all(contents[0]), str(contents[1].path()))
    return action.params["samples"], found


def _file(action: Action, operand: int) -> Any:
    origin = action.inputs[operand].origin
    assert isinstance(origin, SourceTensor)
    assert origin.file is not None
    return origin.file


def _count(params: Mapping[str, Any], tokenizer: bytes, file: str) -> int:
    from carnice_build.calibration.tokenizing import count

    return count(params, tokenizer, file)
