"""How each kind of quantized tensor becomes floats, rows at a time.

What is decoded is seen as a matrix: the last axis against all others.  Memory is bounded by blocks
of rows, and by scales where one stands for many rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from carnice_build.checkpoint.scales import (
    checked_scales,
    load,
    require_numbers,
    require_order,
    unfit,
)
from carnice_build.dtypes import ITEM_SIZE, NUMPY_NAME
from carnice_build.tensors import Reader, SourceTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

BLOCK_BYTES = 1 << 20
"""Bytes of codes that are read at a time."""

WORD_BITS = 32
"""Of the words that integers are packed into."""

Fill = Callable[[Any], None]
"""Fills an array [n, columns] with the rows that follow those of the call before."""


class Decoding(ABC):
    """How the rows of a quantized tensor become floats.

    `version` rises whenever the same bytes would give other floats.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def __init__(self, dtype: str, rows: int, columns: int, *parts: SourceTensor) -> None:
        """`parts` are the tensors that it reads, the codes first; `dtype` is that of the floats."""
        self.dtype = dtype
        self.rows = rows
        self.columns = columns
        self.parts = parts

    def settings(self) -> str:
        """What decides the floats besides the bytes of the parts, and their types and shapes."""
        return ""

    def held_bytes(self) -> int:
        """Memory while it is open, beyond blocks: all parts but the codes, as four bytes each."""
        return sum(4 * part.spec.size for part in self.parts[1:])

    @abstractmethod
    def open(self, first: int, stop: int) -> AbstractContextManager[Fill]:
        """Read rows `first` to `stop` in order; the floats are as `dtypes.NUMPY_NAME` has them."""


# --- codes that lie row by row --------------------------------------------------------------------


class _RowWise(Decoding):
    """A decoding whose codes, and perhaps scales, lie in rows as the floats do."""

    def flowing(self) -> Sequence[SourceTensor]:
        """The parts that are read by rows."""
        return self.parts[:1]

    @abstractmethod
    def prepare(self) -> Any:
        """What all rows need: scales that stand for many."""

    @abstractmethod
    def decode(self, held: Any, first: int, blocks: Sequence[Array], out: Array) -> None:
        """Fill `out` with rows `first` and following from those of the flowing parts."""

    @contextmanager
    def open(self, first: int, stop: int) -> Iterator[Fill]:
        """See `Decoding.open`."""
        held = self.prepare()
        with ExitStack() as opened:
            flows = [
                _Lines(
                    part, self.rows, opened.enter_context(_rows_of(part, self.rows, first, stop))
                )
                for part in self.flowing()
            ]
            step = max(1, BLOCK_BYTES // max(1, flows[0].line_bytes))
            at = first

            def fill(out: Array) -> None:
                nonlocal at
                for start in range(0, len(out), step):
                    some = out[start : start + step]
                    blocks = [flow.read(at, len(some)) for flow in flows]
                    self.decode(held, at, blocks, some)
                    at += len(some)

            yield fill


def _rows_of(
    part: SourceTensor, rows: int, first: int, stop: int
) -> AbstractContextManager[Reader]:
    assert part.file is not None
    line = part.spec.nbytes // max(1, rows)
    return part.file.open_range(part.offset + first * line, (stop - first) * line)


class _Lines:
    """The rows of a part, read in order into one buffer, and looked at where they are scales."""

    def __init__(self, part: SourceTensor, rows: int, read: Reader) -> None:
        self._part = part
        self._read = read
        self.line_bytes = part.spec.nbytes // max(1, rows)
        self._buffer: Array | None = None

    def read(self, first: int, count: int) -> Array:
        """The next rows, [count, columns], which are number `first` and following."""
        import numpy as np

        size = count * self.line_bytes
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        block = self._buffer[:size]
        self._read(block.data)
        columns = self.line_bytes // ITEM_SIZE[self._part.spec.dtype]
        return block.view(NUMPY_NAME[self._part.spec.dtype]).reshape(count, columns)


class Fp8(_RowWise):
    """E4M3 with a scale for each block of rows and columns, for each row or for all.

    Parts: codes F8_E4M3 [..., rows, columns]; scales [..., rows / high, columns / wide], rounded
    up, or fewer numbers where a block is a row or all of the matrix.
    """

    name = "fp8"

    def __init__(
        self, dtype: str, codes: SourceTensor, scales: SourceTensor, block: tuple[int, int]
    ) -> None:
        *_, columns = codes.spec.shape
        super().__init__(dtype, prod(codes.spec.shape[:-1]), columns, codes, scales)
        self._block = block
        self._slab = codes.spec.shape[-2]

    def settings(self) -> str:
        """The block, and the rows of a slab."""
        return f"{self._block} {self._slab}"

    def prepare(self) -> Array:
        """The scales of all slabs, [slabs, blocks high, blocks wide]."""
        high, wide = -(-self._slab // self._block[0]), -(-self.columns // self._block[1])
        scales: Array = checked_scales(self.parts[1], load(self.parts[1]), 0).reshape(
            -1, high, wide
        )
        return scales

    def decode(self, held: Array, first: int, blocks: Sequence[Array], out: Array) -> None:
        """See `_RowWise.decode`."""
        from carnice_build.kernels.decode import fp8_rows

        (codes,) = blocks
        done = 0
        while done < len(out):
            slab, row = divmod(first + done, self._slab)
            stop = min(len(out), done + self._slab - row)
            scales = held[slab]
            fp8_rows(codes[done:stop], scales, self._block, row, self.dtype, out[done:stop])
            done = stop


class Mxfp4(_RowWise):
    """E2M1, two a byte, with a scale in E8M0 for each group of a row.

    Parts: codes U8 [..., groups, 16]; scales U8 [..., groups].
    """

    name = "mxfp4"

    def __init__(self, dtype: str, codes: SourceTensor, scales: SourceTensor) -> None:
        *rows, groups, half = codes.spec.shape
        super().__init__(dtype, prod(rows), groups * half * 2, codes, scales)

    def flowing(self) -> Sequence[SourceTensor]:
        """Codes and scales."""
        return self.parts

    def prepare(self) -> None:
        """Nothing is held."""
        return

    def decode(self, held: None, first: int, blocks: Sequence[Array], out: Array) -> None:
        """See `_RowWise.decode`."""
        from carnice_build.kernels.decode import mxfp4_rows

        codes, scales = blocks
        require_numbers(self.parts[1], scales, first * scales.shape[1])
        mxfp4_rows(codes, scales, self.dtype, out)


class Packed(_RowWise):
    """Integers packed along a row, as compressed-tensors does it.

    Parts: weight_packed I32 [rows, columns * bits / 32]; weight_scale [rows, groups];
    weight_shape I64 [2], and zero points I32 [rows * bits / 32, groups] if `zeros`.
    """

    name = "pack-quantized"

    def __init__(
        self,
        dtype: str,
        columns: int,
        bits: int,
        words: SourceTensor,
        scales: SourceTensor,
        shape: SourceTensor,
        zeros: SourceTensor | None,
        order: SourceTensor | None,
    ) -> None:
        more = [part for part in (shape, zeros, order) if part is not None]
        super().__init__(dtype, words.spec.shape[0], columns, words, scales, *more)
        self._bits = bits
        self._shape, self._zeros, self._order = shape, zeros, order

    def settings(self) -> str:
        """The bits of a code, and which parts there are."""
        return f"{self._bits} {self._zeros is not None} {self._order is not None}"

    def flowing(self) -> Sequence[SourceTensor]:
        """Codes and scales."""
        return self.parts[:2]

    def prepare(self) -> Array | None:
        """The zero points [rows, groups], None where all are in the middle."""
        import numpy as np

        from carnice_build.kernels.decode import unpack

        stated = tuple(load(self._shape).tolist())
        if stated != (self.rows, self.columns):
            raise unfit(self._shape, f"says {list(stated)}", f"{[self.rows, self.columns]}")
        if self._order is not None:
            require_order(self._order, self.columns, self.parts[1].spec.shape[1])
        if self._zeros is None:
            return None
        words = np.ascontiguousarray(load(self._zeros).view(np.uint32).T)
        return np.ascontiguousarray(unpack(words, self._bits, self.rows).T)

    def decode(self, held: Array | None, first: int, blocks: Sequence[Array], out: Array) -> None:
        """See `_RowWise.decode`."""
        import numpy as np

        from carnice_build.kernels.decode import packed_rows

        words, stored = blocks
        scales = checked_scales(self.parts[1], stored, first * stored.shape[1])
        if held is None:
            zeros = np.full(scales.shape, 1 << (self._bits - 1), np.int32)
        else:
            zeros = held[first : first + len(out)]
        packed_rows(words.view(np.uint32), self._bits, scales, zeros, self.dtype, out)


# --- codes that lie column by column --------------------------------------------------------------


class Gptq(Decoding):
    """Integers packed as GPTQ does it: a row of the weight is a column of each part.

    Parts: qweight I32 [columns * bits / 32, rows]; qzeros I32 [groups, rows * bits / 32]; scales
    [groups, rows]; perhaps g_idx I32 [columns].  `above` is what a zero point is more than stored.
    """

    name = "gptq"

    def __init__(
        self,
        dtype: str,
        bits: int,
        above: int,
        words: SourceTensor,
        zeros: SourceTensor,
        scales: SourceTensor,
        order: SourceTensor | None,
    ) -> None:
        lines, rows = words.spec.shape
        parts = (words, zeros, scales) if order is None else (words, zeros, scales, order)
        super().__init__(dtype, rows, lines * WORD_BITS // bits, *parts)
        self._bits = bits
        self._above = above
        self._order = order

    def held_bytes(self) -> int:
        """See `Decoding.held_bytes`: with zero points unpacked, and perhaps the codes."""
        words, _, scales = self.parts[:3]
        by_request = words.file is not None and not words.file.random_access
        codes = words.spec.nbytes if by_request else 0
        return super().held_bytes() + 4 * scales.spec.size + codes

    def settings(self) -> str:
        """The bits of a code, and how zero points are stored."""
        return f"{self._bits} {self._above} {self._order is not None}"

    @contextmanager
    def open(self, first: int, stop: int) -> Iterator[Fill]:
        """See `Decoding.open`.

        A block of rows is a piece of every line of the file: where reads are requests, the codes
        are read and held as a whole, a quarter of the floats.
        """
        import numpy as np

        from carnice_build.kernels.decode import packed_columns, unpack

        words, stored_zeros, stored_scales = self.parts[:3]
        scales = checked_scales(stored_scales, load(stored_scales), 0, signed=True)
        if self._order is not None:
            require_order(self._order, self.columns, len(scales))
        zeros = unpack(load(stored_zeros).view(np.uint32), self._bits, self.rows) + self._above
        assert words.file is not None
        held = None if words.file.random_access else load(words)
        lines = words.spec.shape[0]
        step = max(1, BLOCK_BYTES // max(1, 4 * lines))
        at = first

        def fill(out: Array) -> None:
            nonlocal at
            for start in range(0, len(out), step):
                some = out[start : start + step]
                end = at + len(some)
                codes = _columns_of(words, at, end) if held is None else held[:, at:end]
                packed_columns(
                    np.ascontiguousarray(codes).view(np.uint32),
                    self._bits,
                    np.ascontiguousarray(scales[:, at:end]),
                    np.ascontiguousarray(zeros[:, at:end]),
                    self.dtype,
                    some,
                )
                at = end

        yield fill


def _columns_of(tensor: SourceTensor, first: int, stop: int) -> Array:
    """Some columns of a matrix of 32-bit words, read line by line."""
    import numpy as np

    assert tensor.file is not None
    lines, width = tensor.spec.shape
    found = np.empty((lines, stop - first), NUMPY_NAME[tensor.spec.dtype])
    for index, line in enumerate(found):
        offset = tensor.offset + 4 * (index * width + first)
        tensor.file.read_into(offset, line.view(np.uint8).data)
    return found
