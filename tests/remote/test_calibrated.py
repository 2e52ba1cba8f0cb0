"""What a calibration left travels too, so that another machine need not calibrate."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable

import pytest
from calibrating import build
from conftest import Project

from carnice_build.remote.signing import new_key

pytest.importorskip("llmcompressor")
pytest_plugins = ["calibrating"]

Ran = Callable[..., Counter[str]]


def test_another_observer_needs_no_calibration_on_another_machine(
    small: Project, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches the scales that AWQ found, reads the weights, and rounds them anew.

    The scales are found under the digests of weights that have to be read twice: to be known, and
    to be rounded.
    """
    monkeypatch.setenv("CARNICE_KEY", str(small.root / "key.pem"))
    new_key(small.root / "key.pem")
    url = f"file://{small.root / 'remote'}"
    build(small, "w4a16-awq", remote=url, push=True)
    alone = ran(small, "w4a16-awq-minmax")
    expected = small.built("w4a16-awq-minmax")
    for folder in (small.cache, small.out):
        shutil.rmtree(folder)
    fetched = ran(small, "w4a16-awq-minmax", remote=url)

    assert {"compressed.quantize"} == set(alone) == set(fetched)
    assert expected == small.built("w4a16-awq-minmax")
