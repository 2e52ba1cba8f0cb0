"""Scales in E8M0 that are published as they are."""

from __future__ import annotations

from carnice_build.checkpoint.rows import FillRows, RowsOfTensor
from carnice_build.checkpoint.scales import require_numbers
from carnice_build.tensors import Reader, SourceTensor


class Exponents(RowsOfTensor):
    """A tensor's own bytes, which are refused for NaN while they are read; see `ByteSource`."""

    def __init__(self, tensor: SourceTensor) -> None:
        """`tensor` is U8 [rows, ...] and has bytes."""
        super().__init__(tensor, tensor.spec.row_bytes)

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.spec.nbytes

    @property
    def identity(self) -> str:
        """The tensor's, marked: a digest known of the plain tensor does not say that it has no NaN.

        So a tensor that was read before as plain bytes is read and looked at once more.
        """
        return f"exponents|{self.tensor.identity}"

    def locate(self, offset: int) -> tuple[SourceTensor, int]:
        """See `Composite.locate`."""
        return self.tensor, offset

    def _span(self, first: int, stop: int) -> tuple[int, int]:
        start = self.tensor.offset + first * self._row_bytes
        return start, (stop - first) * self._row_bytes

    def _filled_from(self, read: Reader, first: int, stop: int) -> FillRows:
        import numpy as np

        place = first * self._row_bytes

        def fill(buffer: memoryview) -> None:
            nonlocal place
            read(buffer)
            require_numbers(self.tensor, np.frombuffer(buffer, np.uint8), place)
            place += len(buffer)

        return fill


def exponents(tensor: SourceTensor) -> SourceTensor:
    """Scales in E8M0, U8 [rows, ...]; whoever reads NaN among them gets a CheckpointError."""
    file = Exponents(tensor) if tensor.file is not None else None
    return SourceTensor(tensor.name, tensor.spec, file, 0, tensor.stored)
