"""Decoding of ggml's types against the package gguf, which is the reference."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from ggml_weights import Array, families
from hypothesis import given, settings
from hypothesis import strategies as st

from carnice_build.kernels.ggml import DECODERS, QUANTIZERS, dequantize, quantize

every_type = pytest.mark.parametrize("name", DECODERS)


def reference(name: str, data: Array) -> Array:
    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    return np.asarray(found).reshape(data.shape[0], -1)


def same(expected: Array, actual: Array) -> bool:
    """Bit for bit; any NaN is as good as another."""
    equal = expected.view(np.uint32) == actual.view(np.uint32)
    return bool(np.all(equal | (np.isnan(expected) & np.isnan(actual))))


def blocks(name: str, rows: int, seed: int, high: int = 256) -> Array:
    """Any bytes, of 512 values a row."""
    form = QUANTIZERS[name]
    draw = np.random.default_rng(seed)
    return draw.integers(0, high, (rows, form.nbytes * (512 // form.elements)), np.uint8)


def test_what_is_made_can_be_read() -> None:
    """Every type that has a quantizer has a decoder."""
    assert set(QUANTIZERS) == set(DECODERS)


@every_type
def test_weights_come_back_as_gguf_has_them(name: str) -> None:
    """Weights of every kind, once quantized, are decoded to the floats of gguf."""
    data = {kind: quantize(name, rows)[0] for kind, rows in families().items()}

    assert [] == [
        kind
        for kind, item in data.items()
        if not same(reference(name, item), dequantize(name, item))
    ]


@every_type
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32), high=st.sampled_from([2, 16, 64, 128, 256]))
def test_any_bytes_are_read_as_gguf_reads_them(name: str, seed: int, high: int) -> None:
    """So are blocks of any bytes, whose scales may be NaN and Inf."""
    data = blocks(name, 4, seed, high)

    assert same(reference(name, data), dequantize(name, data))


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_all_halves_are_read(name: str) -> None:
    """All 65,536 patterns of 16 bits; of F32 as many."""
    data = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(64, -1)

    assert same(reference(name, data), dequantize(name, data))


def test_results_go_where_one_says() -> None:
    """An output that is given is filled and returned."""
    data = blocks("Q6_K", 3, 0)
    out = np.empty((3, 512), np.float32)

    assert dequantize("Q6_K", data, out) is out
    assert same(reference("Q6_K", data), out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("Q4_X", np.zeros((1, 144), np.uint8)), "type is 'Q4_X', expected one of "),
        (("Q4_K", np.zeros((1, 143), np.uint8)), r"data is \[1, 143\], expected \[rows, a mult"),
        (
            ("Q4_K", np.zeros(144, np.uint8)),
            r"data is \[144\], expected \[rows, a multiple of 144\]",
        ),
        (
            ("Q4_K", np.zeros((1, 144), np.int8)),
            r"data is int8\[1, 144\], expected uint8\[1, 144\]",
        ),
        (
            ("Q4_K", np.zeros((1, 144), np.uint8), np.zeros((1, 255), np.float32)),
            r"out is float32\[1, 255\], expected float32\[1, 256\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], sentence: str) -> None:
    """A type, bytes or an output that cannot be is an error that says so."""
    with pytest.raises(ValueError, match=sentence):
        dequantize(*arguments)
