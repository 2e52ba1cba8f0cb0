"""Worker processes that begin with torch and transformers, which take 3 s to import.

Tests start some hundred workers.  Those of this process are forked from one that has imported what
most of them would import, whose environment they have; what they do then is what workers do.
`carnice` in a process of its own starts them as it does for everybody, and so does a test that
takes `cold`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from typing import Any

import pytest

from carnice_build.execute import processes
from carnice_build.verification import process

WANTED = ["torch", "transformers.modeling_utils", "accelerate", "datasets"]
"""Libraries that quantize are not among them: a worker has the one that its op brings."""

_ENVIRONMENT = dict(os.environ)


def _forked(_: str) -> BaseContext:
    """In the place of `get_context`: the first call starts what is forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WANTED)
    # It is for all tests, and not as the first of them sets variables.
    meanwhile = dict(os.environ)
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(meanwhile)
    return context


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """Workers of this process are forked."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (processes, process):
            patch.setattr(module, "get_context", _forked)
        yield


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin as they do for everybody."""
    modules: tuple[Any, ...] = (processes, process)
    for module in modules:
        monkeypatch.setattr(module, "get_context", multiprocessing.get_context)
