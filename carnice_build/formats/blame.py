"""Errors of a format, said of the module that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from carnice_build.errors import PlanError


@contextmanager
def about_module(module: str, at: tuple[str | int, ...] = ()) -> Iterator[None]:
    """Name `module` in a PlanError of the block, whose entry of the recipe is `at`."""
    try:
        yield
    except PlanError as error:
        raise error.revised(what=f"module {module}: {error.what}", at=at) from None
