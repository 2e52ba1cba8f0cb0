"""Codes give the floats that the libraries give, for any bits of codes and scales."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from carnice_build.kernels import decode

torch = pytest.importorskip("torch")

Array = NDArray[Any]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
HOSTILE = (0.0, 1e-45, 1e-40, 2.0**-126, 2.0**-24, 1 / 3, 1.0, 448.0, 65504.0, 1e30, 3.4e38)
EXAMPLES = settings(max_examples=25)

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(sorted(DTYPES))


def scales(random: np.random.Generator, *shape: int, kind: str = "F32") -> Array:
    """Scales of which half are ones that nobody expects, as a type of `kind` holds them."""
    usual = random.random(shape, dtype=np.float32) * np.float32(0.01)
    odd = random.choice(np.array(HOSTILE, np.float32), shape)
    mixed = np.where(random.random(shape) < 0.5, usual, odd).astype(np.float32)
    stored = torch.from_numpy(mixed).to(DTYPES[kind])
    # What is no number is refused before it comes here.
    return torch.where(stored.isfinite(), stored, 1).float().numpy()


def codes(random: np.random.Generator, *shape: int) -> Array:
    """Every byte there is, and then any."""
    found = random.integers(0, 256, shape, np.uint8)
    flat = found.reshape(-1)
    flat[: min(256, flat.size)] = np.arange(256)[: flat.size]
    return found


def equal(expected: Any, found: Array, dtype: str) -> bool:
    """The same bits wherever there is a number, NaN where there is none."""
    wanted = expected.to(DTYPES[dtype]).contiguous()
    bits = torch.int32 if dtype == "F32" else torch.int16
    made = torch.from_numpy(found.view(np.int32 if dtype == "F32" else np.int16)).view(bits)
    nan = wanted.isnan()
    same = torch.equal(nan, made.view(DTYPES[dtype]).isnan())
    return bool(same and torch.equal(wanted.view(bits)[~nan], made[~nan]))


# --- FP8 ------------------------------------------------------------------------------------------


def fp8(codes: Array) -> Any:
    """The codes as torch has them."""
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def decoded_fp8(codes: Array, scales: Array, block: tuple[int, int], dtype: str) -> Array:
    """By the kernel, in two blocks of rows."""
    out = np.empty(codes.shape, STORAGE[dtype])
    cut = len(codes) // 3
    for start, stop in ((0, cut), (cut, len(codes))):
        decode.fp8_rows(codes[start:stop], scales, block, start, dtype, out[start:stop])
    return out


@given(seed=seeds, high=st.integers(1, 3), wide=st.integers(1, 3), dtype=dtypes)
@EXAMPLES
def test_fp8_in_blocks_is_transformers(seed: int, high: int, wide: int, dtype: str) -> None:
    """All codes, in whole blocks."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    random = np.random.default_rng(seed)
    given_codes = codes(random, 128 * high, 128 * wide)
    grid = scales(random, high, wide)
    expected = module.Fp8Dequantize(None)._dequantize_one(
        fp8(given_codes), torch.from_numpy(grid), DTYPES[dtype]
    )

    assert equal(expected, decoded_fp8(given_codes, grid, (128, 128), dtype), dtype)


@given(seed=seeds, rows=st.integers(1, 300), columns=st.integers(1, 300), dtype=dtypes)
@EXAMPLES
def test_the_last_blocks_may_be_cut_off(seed: int, rows: int, columns: int, dtype: str) -> None:
    """A block of 128 x 128 begins at every 128th row and column, wherever the matrix ends."""
    random = np.random.default_rng(seed)
    given_codes = codes(random, rows, columns)
    grid = scales(random, -(-rows // 128), -(-columns // 128))
    spread = torch.from_numpy(grid.repeat(128, 0)[:rows].repeat(128, 1)[:, :columns])
    expected = fp8(given_codes).float() * spread

    assert equal(expected, decoded_fp8(given_codes, grid, (128, 128), dtype), dtype)


def test_ragged_blocks_are_mlx_lm_of_deepseek() -> None:
    """mlx-lm multiplies in float32 as well."""
    mx = pytest.importorskip("mlx.core")
    model = pytest.importorskip("mlx_lm.models.deepseek_v3").Model
    random = np.random.default_rng(0)
    given_codes = codes(random, 200, 150)
    grid = random.random((2, 2), dtype=np.float32)
    stub = SimpleNamespace(args=SimpleNamespace(num_hidden_layers=0))
    made = model.sanitize(
        stub, {"x.weight": mx.array(given_codes), "x.weight_scale_inv": mx.array(grid)}
    )
    expected = torch.from_numpy(np.array(made["x.weight"].view(mx.uint16))).view(torch.bfloat16)

    assert equal(expected, decoded_fp8(given_codes, grid, (128, 128), "BF16"), "BF16")


def compressed(state: dict[str, Any], **weights: Any) -> Any:
    """What compressed-tensors makes of a module's tensors."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**weights)
    )
    kind = "pack-quantized" if weights["type"] == "int" else "float-quantized"
    made = compressors.BaseCompressor.load_from_registry(kind)
    return type(made).decompress(state, scheme)["weight"]


@given(seed=seeds, kind=st.sampled_from(["BF16", "F32"]), channel=st.booleans())
@EXAMPLES
def test_fp8_is_compressed_tensors(seed: int, kind: str, channel: bool) -> None:
    """A scale for each row, or one for all, in either type; the product is rounded once."""
    random = np.random.default_rng(seed)
    given_codes = codes(random, 9, 70)
    grid = scales(random, 9 if channel else 1, 1, kind=kind)
    stored = torch.from_numpy(grid).to(DTYPES[kind])
    expected = compressed(
        {"weight": fp8(given_codes), "weight_scale": stored if channel else stored[0]},
        num_bits=8,
        type="float",
        strategy="channel" if channel else "tensor",
    )
    block = (1, 70) if channel else (9, 70)

    assert DTYPES[kind] == expected.dtype
    assert equal(expected, decoded_fp8(given_codes, grid, block, "BF16"), "BF16")


@given(seed=seeds)
@EXAMPLES
def test_fp8_is_modelopt_where_it_keeps_the_scale(seed: int) -> None:
    """modelopt rounds the scale first; of one that BF16 holds, it makes the same."""
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.fp8_tensor").FP8QTensor
    random = np.random.default_rng(seed)
    given_codes = codes(random, 9, 70)
    grid = scales(random, 1, 1, kind="BF16")
    quantized = tensor(torch.Size((9, 70)), torch.bfloat16, fp8(given_codes))
    expected = quantized.dequantize(scale=torch.from_numpy(grid[0]))

    assert equal(expected, decoded_fp8(given_codes, grid, (9, 70), "BF16"), "BF16")


# --- MXFP4 ----------------------------------------------------------------------------------------


@given(seed=seeds)
@EXAMPLES
def test_mxfp4_is_transformers_but_for_the_order_of_axes(seed: int) -> None:
    """All pairs of codes under all scales, from a denormal power of two to one beyond the type."""
    module = pytest.importorskip("transformers.integrations.mxfp4")
    random = np.random.default_rng(seed)
    blocks = codes(random, 2, 40, 8, 16)
    powers = random.integers(0, 255, (2, 40, 8), np.uint8)
    powers[0].reshape(-1)[:255] = random.permutation(255)
    expected = module.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(powers))
    out = np.empty((80, 256), np.uint16)
    decode.mxfp4_rows(blocks.reshape(80, 128), powers.reshape(80, 8), "BF16", out)

    assert equal(expected.transpose(1, 2).reshape(80, 256), out, "BF16")


# --- integers -------------------------------------------------------------------------------------


@given(
    seed=seeds,
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32, 128]),
    symmetric=st.booleans(),
    kind=st.sampled_from(["BF16", "F32"]),
)
@settings(max_examples=60)
def test_packed_integers_are_compressed_tensors(
    seed: int, bits: int, group: int | None, symmetric: bool, kind: str
) -> None:
    """Any width of code, groups or rows, with zero points and without."""
    random = np.random.default_rng(seed)
    rows, columns = 13, 256 if group else int(random.integers(1, 300))
    words = random.integers(0, 2**32, (rows, -(-columns * bits // 32)), np.uint32)
    groups = columns // group if group else 1
    grid = scales(random, rows, groups, kind=kind)
    packed_zeros = random.integers(0, 2**32, (-(-rows * bits // 32), groups), np.uint32)
    state = {
        "weight_packed": torch.from_numpy(words.view(np.int32)),
        "weight_scale": torch.from_numpy(grid).to(DTYPES[kind]),
        "weight_shape": torch.tensor([rows, columns]),
    }
    zeros = np.full((rows, groups), 1 << (bits - 1), np.int32)
    if not symmetric:
        state["weight_zero_point"] = torch.from_numpy(packed_zeros.view(np.int32))
        zeros = decode.unpack(np.ascontiguousarray(packed_zeros.T), bits, rows).T.copy()
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    expected = compressed(state, num_bits=bits, type="int", symmetric=symmetric, **strategy)
    out = np.empty((rows, columns), np.uint16)
    decode.packed_rows(words, bits, grid, zeros, "BF16", out)

    assert equal(expected, out, "BF16")


@given(seed=seeds, bits=st.sampled_from([2, 4, 8]), above=st.integers(0, 1))
@EXAMPLES
def test_packed_columns_are_auto_round(seed: int, bits: int, above: int) -> None:
    """In F16, in which it multiplies; with zero points as they are stored, or one less."""
    name = "qlinear_torch_zp" if above else "qlinear_torch"
    module = pytest.importorskip(f"auto_round_extension.torch.{name}")
    random = np.random.default_rng(seed)
    columns, rows, group = 64, 32, 32
    layer = module.QuantLinear(bits, group, columns, rows, False)
    words = random.integers(0, 2**32, (columns * bits // 32, rows), np.uint32)
    packed_zeros = random.integers(0, 2**32, (columns // group, rows * bits // 32), np.uint32)
    grid = random.normal(0, 0.01, (columns // group, rows)).astype(np.float16)
    layer.qweight = torch.from_numpy(words.view(np.int32))
    layer.qzeros = torch.from_numpy(packed_zeros.view(np.int32))
    layer.scales = torch.from_numpy(grid)
    expected = layer(torch.eye(columns, dtype=torch.float16)).T + 0
    out = np.empty((rows, columns), np.float16)
    zeros = decode.unpack(packed_zeros, bits, rows) + np.int32(above)
    decode.packed_columns(words, bits, grid.astype(np.float32), zeros, "F16", out)

    assert equal(expected, out + np.float16(0), "F16")


def test_arrays_that_do_not_fit_are_refused() -> None:
    """A kernel writes and reads within its arrays."""
    out = np.empty((4, 256), np.uint16)
    grid = np.ones((1, 2), np.float32)
    bytes_, words = np.zeros((4, 256), np.uint8), np.zeros((4, 32), np.uint32)
    zeros = np.zeros((4, 2), np.int32)
    for call in (
        lambda: decode.fp8_rows(bytes_, grid, (128, 64), 0, "BF16", out),
        lambda: decode.fp8_rows(bytes_, grid, (128, 128), 126, "BF16", out),
        lambda: decode.fp8_rows(bytes_, grid, (128, 128), 0, "F32", out),
        lambda: decode.mxfp4_rows(bytes_, np.zeros((4, 8), np.uint8), "BF16", out),
        lambda: decode.mxfp4_rows(bytes_[:, :128].copy(), np.zeros((4, 3), np.uint8), "BF16", out),
        lambda: decode.packed_rows(words, 3, np.ones((4, 2), np.float32), zeros, "BF16", out),
        lambda: decode.packed_rows(words, 4, np.ones((4, 4), np.float32), zeros, "BF16", out),
        lambda: decode.packed_columns(words, 4, np.ones((2, 4), np.float32), zeros, "BF16", out),
    ):
        with pytest.raises(ValueError):
            call()
