"""Errors of a format, said of the module that they are about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError

UNCALIBRATED = "no decoder layer has it, so its input is not calibrated"
"""Why a linear beside the layers cannot have a stored scale of its inputs."""


@contextmanager
def about_module(module: str, at: tuple[str | int, ...] = ()) -> Iterator[None]:
    """Name `module` in a PlanError of the block, whose entry of the recipe is `at`."""
    try:
        yield
    except PlanError as error:
        raise error.revised(what=f"module {module}: {error.what}", at=at) from None


def refuse_unfit(unfit: Mapping[str, str], expected: str, at: tuple[str | int, ...] = ()) -> None:
    """Raise PlanError if there are modules that a format cannot quantize.

    `unfit` says of each why not, or nothing of one that it can; `expected` is what a recipe
    says of those that do not.
    """
    unfit = {module: why for module, why in unfit.items() if why}
    if not unfit:
        return
    module, why = next(iter(unfit.items()))
    more = len(unfit) - 1
    others = f"; and {more} more cannot be quantized" if more else ""
    raise PlanError(f"module {module}: {why}{others}", expected=expected, at=at, unfit=unfit)


def require_floats(spec: TensorSpec) -> None:
    """Raise PlanError for weights that are no floats of a checkpoint."""
    if spec.dtype not in WIDE_FLOATS:
        raise PlanError(f"cannot quantize {spec.dtype} weights", expected=" or ".join(WIDE_FLOATS))


def blocks_unfit(columns: int, size: int) -> str:
    """Why rows of so many weights cannot be cut into a format's own blocks; nothing if they can."""
    return f"blocks of {size} do not divide the {columns} inputs" if columns % size else ""


def uneven(columns: int, group_size: int) -> str:
    """Why rows of so many weights cannot be cut into groups; nothing where they can."""
    if columns % group_size == 0:
        return ""
    return f"group_size {group_size} does not divide the {columns} inputs"
