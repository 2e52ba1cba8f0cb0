"""The text that a calibration runs over: a file, or a dataset on the hub at one commit."""

from __future__ import annotations

from dataclasses import dataclass

from carnice_build.dtypes import TensorSpec
from carnice_build.tensors import ByteSource, SourceTensor


@dataclass(frozen=True)
class Dataset:
    """Rows of text or conversations: those of a `file`, or, at `commit`, those on the hub."""

    name: str
    file: ByteSource | None
    commit: str | None = None


def whole_file(file: ByteSource) -> SourceTensor:
    """The bytes of a file as a tensor U8 [size], so that actions can have it for an input."""
    return SourceTensor(file.name, TensorSpec("U8", (file.size,)), file, 0)
