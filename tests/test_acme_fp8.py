"""The arithmetic of docs/adding-a-format.md, against torch's E4M3 and our own kernel."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from acme import install

from carnice_build.graph import TensorData
from carnice_build.kernels import fp8


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package's module."""
    site = tmp_path_factory.mktemp("site")
    install(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield importlib.import_module("acme_fp8")
        sys.modules.pop("acme_fp8", None)


def test_codes_stand_for_what_torch_says(acme: Any) -> None:
    """All 256, the two of NaN among them."""
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()

    np.testing.assert_array_equal(expected, acme.decoded(codes))


def test_every_number_gets_the_nearest_code(acme: Any) -> None:
    """Every F16 value up to the largest, which all ties are among, has the code that torch gives.

    Beyond, numbers become the largest; zero has no sign.
    """
    patterns = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    values = patterns[np.abs(patterns) <= 448]
    values = values[(values != 0) | ~np.signbit(values)]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    np.testing.assert_array_equal(expected, acme.encoded(values))
    assert [0x7E, 0xFE, 0] == acme.encoded(np.float32([1e9, -500, -0.0])).tolist()


def test_the_op_has_the_bits_of_our_kernel(acme: Any) -> None:
    """In float32: ordinary rows, a row of zeros, rows of the smallest and the largest numbers."""
    rows = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    rows[0], rows[1, ::2] = 0, -0.0
    rows[2] *= 1e-42
    rows[3] *= 1e37
    expected = np.empty(rows.shape, np.uint8), np.empty((64, 1), np.float32)
    found = np.empty(rows.shape, np.uint8), np.empty((64, 1), np.float32)
    assert fp8.quantize_rows(rows, "F32", *expected) < 0
    outputs = [TensorData("F8_E4M3", found[0]), TensorData("F32", found[1])]
    acme.RowQuantize().apply({}, [TensorData("F32", rows)], outputs)

    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("power", [-44, -40, -10, 0, 37])
def test_no_weight_is_further_off_than_the_bound_and_some_come_near(acme: Any, power: int) -> None:
    """The bound holds for rows of any magnitude, and is no wider than it must be."""
    rows = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    rows *= np.float32(10.0**power) if power > -44 else np.float32(1e-22) * np.float32(1e-22)
    off = np.abs(acme.round_trip(rows) - rows)
    share = off / acme.allowance(rows)

    assert share.max() <= 1
    assert power < -30 or share.max() > 0.99
