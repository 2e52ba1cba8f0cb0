"""What weights are decoded by, read and checked: scales, exponents and the order of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from carnice_build.dtypes import NUMPY_NAME
from carnice_build.errors import CheckpointError
from carnice_build.tensors import SourceTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_E8M0_NAN = 255


def load(tensor: SourceTensor) -> Array:
    """A whole tensor, as `dtypes.NUMPY_NAME` has it."""
    import numpy as np

    assert tensor.file is not None
    array = np.empty(tensor.spec.shape, NUMPY_NAME[tensor.spec.dtype])
    tensor.file.read_into(tensor.offset, array.reshape(-1).view(np.uint8).data)
    return array


def checked_scales(
    tensor: SourceTensor, stored: Array, first: int, *, signed: bool = False
) -> Array:
    """Scales in float32, the first of them element `first` of their tensor.

    CheckpointError for one that is not finite, or negative unless they are `signed`.
    """
    import numpy as np

    from carnice_build.kernels.decode import widened

    scales = widened(stored, tensor.spec.dtype)
    bad = ~np.isfinite(scales)
    if not signed:
        bad |= scales < 0
    if bad.any():
        index = int(bad.reshape(-1).argmax())
        raise _bad_scale(tensor, first + index, f"{scales.reshape(-1)[index]:g}", signed=signed)
    return scales


def require_numbers(tensor: SourceTensor, scales: Array, first: int) -> None:
    """CheckpointError for NaN among scales in E8M0, the first of them element `first`."""
    nan = scales.reshape(-1) == _E8M0_NAN
    if nan.any():
        raise _bad_scale(tensor, first + int(nan.argmax()), "NaN", signed=False)


def _bad_scale(tensor: SourceTensor, index: int, value: str, *, signed: bool) -> CheckpointError:
    wanted = "finite scales" if signed else "finite scales, none of them negative"
    return unfit(tensor, f"holds {value} at element {index}", wanted)


def require_order(tensor: SourceTensor, columns: int, groups: int) -> None:
    """CheckpointError unless columns belong to groups in their own order."""
    import numpy as np

    if (load(tensor) != np.arange(columns) // (columns // groups)).any():
        raise unfit(
            tensor,
            "reorders columns by their activations",
            "groups of neighbours",
        )


def unfit(tensor: SourceTensor, what: str, expected: str) -> CheckpointError:
    """The error for a tensor of the checkpoint that is not what it should be."""
    tensor, _ = tensor.located(0)
    where = tensor.file.name if tensor.file else None
    return CheckpointError(f"tensor {tensor.name!r} {what}", where=where, expected=expected)
