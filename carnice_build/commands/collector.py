"""Python's collector of cycles, kept out of what makes none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Do not look for cycles while the block, or the function that this decorates, runs.

    A plan of a large model makes a million objects and hardly a cycle, and the collector would go
    over all of them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
