"""K-quants against ggml, which is the reference."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_int, c_size_t
from typing import Any

import numpy as np
import pytest
from ggml_weights import (
    Array,
    differing,
    drawn,
    every_bf16,
    families,
    importances,
    made,
    reference,
    to_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from carnice_build.backends.ggml import _library, quantize_with_ggml
from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.errors import BackendError
from carnice_build.kernels.ggml import QUANTIZERS, first_unsound, quantize
from carnice_build.kernels.ggml.rows import CHUNK

K_QUANTS = ("Q2_K", "Q4_K", "Q5_K")

every_k_quant = pytest.mark.parametrize("name", K_QUANTS)


def ordinary(rows: int, columns: int, seed: int = 0) -> Array:
    """Float32 values as weights have them."""
    draws = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    found: Array = draws * np.float32(0.02)
    return found


def test_a_type_takes_the_bytes_that_files_hold_of_it() -> None:
    """The blocks of each quantizer have the values and bytes of the type in files."""
    assert {name: (TYPES[name].elements, TYPES[name].nbytes) for name in QUANTIZERS} == {
        name: (found.elements, found.nbytes) for name, found in QUANTIZERS.items()
    }


@every_k_quant
def test_weights_of_every_kind_get_the_bytes_of_ggml(name: str) -> None:
    """Whatever the weights are like, and whether columns have no importance, a measured one, or
    one of absurd numbers, every byte is that of ggml_quantize_chunk."""
    weights = families()

    assert [] == differing(name, weights, {"none": None, **importances(1024)})


@every_k_quant
def test_every_value_of_bf16_gets_the_bytes_of_ggml(name: str) -> None:
    """So do all finite values of BF16, in order and shuffled."""
    assert [] == differing(
        name, every_bf16(), {"none": None, "one": importances(256)["as measured"]}
    )


@every_k_quant
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_floats_get_the_bytes_of_ggml(name: str, data: st.DataObject) -> None:
    """Whatever finite floats weights and importances are, the bytes are those of ggml."""
    rows, importance = drawn(data)

    assert reference(name, rows, importance).tobytes() == made(name, rows, importance).tobytes()


QUANTIZED = [name for name, found in TYPES.items() if found.elements > 1]


@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_are_sound_that_ggml_takes_for_sound(name: str) -> None:
    """Whatever their bytes: a scale that is NaN or infinity is none, wherever it stands."""
    validate = _library().ggml_validate_row_data
    validate.argtypes, validate.restype = [c_int, c_char_p, c_size_t], c_bool
    size = TYPES[name].nbytes
    draws = np.random.default_rng(3).integers(0, 256, (400, size), np.uint8)
    # Of MXFP4 one exponent in 256 is none.
    blocks = np.where(draws > 250, 255, draws).astype(np.uint8)
    sound = [validate(TYPES[name].number, block.tobytes(), size) for block in blocks]

    assert sound == [first_unsound(name, block[None]) < 0 for block in blocks]
    assert sound.index(False) == first_unsound(name, blocks)


@pytest.mark.wide
@every_k_quant
@pytest.mark.parametrize("seed", range(1, 41))
def test_many_weights_of_every_kind_get_the_bytes_of_ggml(name: str, seed: int) -> None:
    """The kinds of weights and importances, drawn again and again, four times as many rows."""
    weights = families(seed, (32, 1024))

    assert [] == differing(name, weights, {"none": None, **importances(1024, seed)})


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@every_k_quant
def test_rows_are_independent(name: str, weighted: bool) -> None:
    """Rows quantized one by one, in other blocks and on other threads have the same bytes, though
    8 blocks are quantized together and one row has 3."""
    rows = ordinary(23, 768)
    importance = importances(768)["as measured"] if weighted else None
    together = made(name, rows, importance)
    with ThreadPoolExecutor(2) as pool:
        parts = (rows[start : start + 5] for start in range(0, 23, 5))
        fives = list(pool.map(lambda part: made(name, part, importance), parts))

    assert together.tobytes() == np.concatenate(fives).tobytes()
    assert together.tobytes() == b"".join(
        made(name, rows[k : k + 1], importance).tobytes() for k in range(23)
    )


@every_k_quant
def test_sixteen_bits_are_widened(name: str) -> None:
    """Weights in BF16 and F16 get the bytes of the same numbers in F32, in more rows than are
    widened at a time."""
    rows = ordinary(CHUNK // 256 + 3, 256)
    halves = rows.astype(np.float16)
    patterns = to_bf16(rows)
    widened = (patterns.astype(np.uint32) << 16).view(np.float32)

    assert made(name, halves.astype(np.float32)).tobytes() == made(name, halves).tobytes()
    assert made(name, widened).tobytes() == made(name, patterns).tobytes()


def test_results_go_where_one_says() -> None:
    """An output that is given is filled and returned."""
    rows = ordinary(3, 256)
    out = np.zeros((3, 144), np.uint8)
    found, _ = quantize("Q4_K", rows, out=out)

    assert found is out
    assert made("Q4_K", rows).tobytes() == out.tobytes()


def test_no_rows_are_no_bytes() -> None:
    """Weights without rows, or without columns, are empty, and no error."""
    assert (0, 144) == made("Q4_K", np.empty((0, 256), np.float32)).shape
    assert (4, 0) == made("Q4_K", np.empty((4, 0), np.float32)).shape


@pytest.mark.parametrize("by", [quantize, quantize_with_ggml], ids=["ours", "ggml"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float16, np.float32])
@pytest.mark.parametrize("at", [0, 2 * CHUNK + 517])
def test_the_first_number_that_is_none_is_named(by: Any, dtype: Any, at: int) -> None:
    """Of NaN and Inf, the flat index of the first is returned, wherever it is."""
    rows = np.zeros((3 * CHUNK // 512, 512), dtype)
    infinity, nan = (0xFF80, 0x7FC0) if dtype is np.uint16 else (-np.inf, np.nan)
    rows.reshape(-1)[at] = infinity
    rows.reshape(-1)[at + 7] = nan

    assert at == by("Q2_K", rows)[1]


@pytest.mark.parametrize("by", [quantize, quantize_with_ggml], ids=["ours", "ggml"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("Q4_X", np.zeros((1, 256), np.float32)), "type is 'Q4_X', expected one of "),
        (("Q4_K", np.zeros((1, 255), np.float32)), "255 columns are not whole blocks of 256"),
        (("Q4_K", np.zeros(256, np.float32)), r"rows is float32\[256\], expected "),
        (("Q4_K", np.zeros((1, 256), np.int8)), r"rows is int8\[1, 256\], expected "),
        (
            ("Q4_K", np.zeros((1, 256), np.float32), np.zeros(255, np.float32)),
            r"importance is float32\[255\], expected float32\[256\]",
        ),
        (
            ("Q4_K", np.zeros((1, 256), np.float32), np.full(256, np.nan, np.float32)),
            "importance of column 0 is nan, expected a finite number that is not negative",
        ),
        (
            ("Q4_K", np.zeros((1, 256), np.float32), np.arange(256, dtype=np.float32) - 255),
            "importance of column 0 is -255.0, expected a finite number that is not negative",
        ),
        (
            ("Q4_K", np.zeros((1, 256), np.float32), None, np.zeros((1, 143), np.uint8)),
            r"out is uint8\[1, 143\], expected uint8\[1, 144\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(by: Any, arguments: tuple[Any, ...], sentence: str) -> None:
    """A type, rows, an importance or an output that cannot be is an error that says so."""
    with pytest.raises(ValueError, match=sentence):
        by(*arguments)


def test_a_type_that_wants_an_importance_gets_one() -> None:
    """What ggml would end the process for is an error before."""
    with pytest.raises(ValueError, match="IQ2_XXS wants an importance of columns"):
        quantize_with_ggml("IQ2_XXS", ordinary(1, 256))


def test_ggml_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, its backend says how to have it."""
    from carnice_build.backends import ggml

    ggml._library.cache_clear()
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="ggml is not installed"):
        quantize_with_ggml("Q4_K", ordinary(1, 256))
