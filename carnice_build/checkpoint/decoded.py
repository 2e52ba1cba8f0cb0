"""Tensors of quantized checkpoints as the floats they stand for, decoded while they are read.

Whoever reads one sees a tensor in BF16, say, in a file, and nothing decoded is written to disk but
what a worker process is given of a layer, while it works on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from carnice_build.checkpoint.decodings import (
    WORD_BITS,
    Decoding,
    Fill,
    Fp8,
    Gptq,
    Mxfp4,
    Packed,
)
from carnice_build.checkpoint.rows import FillRows, RowsFile
from carnice_build.checkpoint.scales import unfit
from carnice_build.dtypes import ITEM_SIZE, NUMPY_NAME, shared_spec
from carnice_build.errors import CheckpointError
from carnice_build.tensors import SourceTensor

SCALE_TYPES = ("F32", "BF16", "F16")
E2M1_GROUP = 32
"""Weights that share a scale in MXFP4."""


class DecodedFile(RowsFile):
    """The floats that a quantized tensor stands for, as if a file held them; see `ByteSource`."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._row_bytes = decoding.columns * ITEM_SIZE[decoding.dtype]

    @property
    def name(self) -> str:
        """That of the file with the codes."""
        codes = self._decoding.parts[0].file
        assert codes is not None
        return codes.name

    @property
    def size(self) -> int:
        """Bytes of all floats."""
        return self._decoding.rows * self._row_bytes

    @property
    def identity(self) -> str:
        """What is read, and how it is decoded."""
        how = self._decoding
        parts = "|".join(f"{part.spec.dtype} {part.identity}" for part in how.parts)
        shape = f"{how.dtype} {how.rows} {how.columns}"
        return f"decoded|{how.name} {how.version} {how.settings()}|{shape}|{parts}"

    @property
    def local(self) -> bool:
        """True when all parts are."""
        return all(part.file is not None and part.file.local for part in self._decoding.parts)

    @property
    def random_access(self) -> bool:
        """True when it is so of all parts."""
        return all(
            part.file is not None and part.file.random_access for part in self._decoding.parts
        )

    def held_bytes(self) -> int:
        """See `Holding.held_bytes`."""
        parts = self._decoding.parts
        return self._decoding.held_bytes() + sum(part.held_bytes for part in parts)

    @contextmanager
    def _open_rows(self, first: int, stop: int) -> Iterator[FillRows]:
        with self._decoding.open(first, stop) as fill:
            yield self._into_bytes(fill)

    def _into_bytes(self, fill: Fill) -> FillRows:
        import numpy as np

        how = self._decoding

        def fill_bytes(buffer: memoryview) -> None:
            array = np.frombuffer(buffer, NUMPY_NAME[how.dtype])
            # A kernel cannot write where a float does not lie as the processor wants it.
            room = array if array.flags.aligned else array.copy()
            fill(room.reshape(-1, how.columns))
            if room is not array:
                buffer[:] = room.view(np.uint8).data

        return fill_bytes


def decoded_fp8(
    name: str,
    codes: SourceTensor,
    scales: SourceTensor,
    dtype: str,
    block: tuple[int, int] | None = None,
) -> SourceTensor:
    """E4M3 [..., rows, columns] as floats; without a `block`, a scale is for a row or for all."""
    if codes.spec.dtype != "F8_E4M3" or len(codes.spec.shape) < 2:
        raise _misfit(codes, "F8_E4M3 [..., rows, columns]")
    *slabs, rows, columns = codes.spec.shape
    if scales.spec.dtype not in SCALE_TYPES:
        raise _misfit(scales, " or ".join(SCALE_TYPES))
    shape = scales.spec.shape
    if block is not None:
        high, wide = block
        grid = (*slabs, -(-rows // high), -(-columns // wide))
        if shape != grid:
            raise _misfit(scales, f"{list(grid)}, a scale for each {high} x {wide} weights")
    elif not slabs and scales.spec.size == 1:
        block = (max(1, rows), max(1, columns))
    elif shape in ((*slabs, rows), (*slabs, rows, 1)):
        block = (1, max(1, columns))
    elif shape in (tuple(slabs), (*slabs, 1), (*slabs, 1, 1)):
        block = (max(1, rows), max(1, columns))
    else:
        wanted = f"one number, or {[*slabs, rows, 1]}, one for each row"
        raise _misfit(scales, wanted)
    return _decoded(name, Fp8(dtype, codes, scales, block), codes.spec.shape)


def decoded_mxfp4(name: str, codes: SourceTensor, scales: SourceTensor, dtype: str) -> SourceTensor:
    """E2M1 [..., rows, groups, 16] as floats [..., rows, groups * 32], as they lie in the file.

    transformers' `convert_moe_packed_tensors` gives the last two axes the other way round.
    """
    shape = codes.spec.shape
    if codes.spec.dtype != "U8" or len(shape) < 3 or shape[-1] != E2M1_GROUP // 2:
        raise _misfit(codes, f"U8 [..., rows, groups, {E2M1_GROUP // 2}]")
    if (scales.spec.dtype, scales.spec.shape) != ("U8", shape[:-1]):
        raise _misfit(scales, f"U8 {list(shape[:-1])}, a scale for each {E2M1_GROUP} weights")
    whole = (*shape[:-2], shape[-2] * E2M1_GROUP)
    return _decoded(name, Mxfp4(dtype, codes, scales), whole)


def decoded_packed(
    name: str,
    words: SourceTensor,
    scales: SourceTensor,
    shape: SourceTensor,
    zeros: SourceTensor | None,
    order: SourceTensor | None,
    dtype: str,
    bits: int,
    columns: int,
) -> SourceTensor:
    """Integers of compressed-tensors' format pack-quantized as floats [rows, columns]."""
    rows = words.spec.shape[0] if words.spec.shape else 0
    if (words.spec.dtype, words.spec.shape) != ("I32", (rows, -(-columns * bits // WORD_BITS))):
        raise _misfit(words, f"I32 [rows, {-(-columns * bits // WORD_BITS)}]")
    groups = scales.spec.shape[-1] if scales.spec.shape else 0
    if scales.spec.dtype not in SCALE_TYPES:
        raise _misfit(scales, " or ".join(SCALE_TYPES))
    if scales.spec.shape != (rows, groups) or not groups or columns % groups:
        raise _misfit(scales, f"[{rows}, groups], of groups that divide {columns} columns")
    if (shape.spec.dtype, shape.spec.shape) not in (("I64", (2,)), ("I32", (2,))):
        raise _misfit(shape, "I64 [2]")
    lines = -(-rows * bits // WORD_BITS)
    if zeros is not None and (zeros.spec.dtype, zeros.spec.shape) != ("I32", (lines, groups)):
        raise _misfit(zeros, f"I32 {[lines, groups]}")
    _require_order_shape(order, columns)
    decoding = Packed(dtype, columns, bits, words, scales, shape, zeros, order)
    return _decoded(name, decoding, (rows, columns))


def decoded_gptq(
    name: str,
    words: SourceTensor,
    zeros: SourceTensor,
    scales: SourceTensor,
    order: SourceTensor | None,
    dtype: str,
    bits: int,
    above: int,
) -> SourceTensor:
    """Integers packed as GPTQ and AutoRound do it as floats [rows, columns].

    `above` is what a zero point is more than the stored one: 1 in the first version of the format.
    """
    if words.spec.dtype != "I32" or len(words.spec.shape) != 2:
        raise _misfit(words, "I32 [columns / codes in a word, rows]")
    lines, rows = words.spec.shape
    columns = lines * WORD_BITS // bits
    if scales.spec.dtype not in SCALE_TYPES:
        raise _misfit(scales, " or ".join(SCALE_TYPES))
    groups = scales.spec.shape[0] if scales.spec.shape else 0
    fits = groups and columns % groups == 0 and columns // groups % (WORD_BITS // bits) == 0
    if scales.spec.shape != (groups, rows) or not fits:
        raise _misfit(scales, f"[groups, {rows}], of groups that divide {columns} columns")
    grid = (groups, -(-rows * bits // WORD_BITS))
    if (zeros.spec.dtype, zeros.spec.shape) != ("I32", grid):
        raise _misfit(zeros, f"I32 {list(grid)}, codes of {bits} bits")
    _require_order_shape(order, columns)
    decoding = Gptq(dtype, bits, above, words, zeros, scales, order)
    return _decoded(name, decoding, (rows, columns))


def _require_order_shape(order: SourceTensor | None, columns: int) -> None:
    if order is not None and (order.spec.dtype, order.spec.shape) != ("I32", (columns,)):
        raise _misfit(order, f"I32 [{columns}]")


def _misfit(tensor: SourceTensor, expected: str) -> CheckpointError:
    return unfit(tensor, f"is {tensor.spec.dtype} {list(tensor.spec.shape)}", expected)


def _decoded(name: str, decoding: Decoding, shape: tuple[int, ...]) -> SourceTensor:
    # A shape file has no bytes for any of its tensors.
    file = DecodedFile(decoding) if decoding.parts[0].file is not None else None
    stored = sum(part.stored_bytes for part in decoding.parts)
    return SourceTensor(name, shared_spec(decoding.dtype, shape), file, 0, stored)
