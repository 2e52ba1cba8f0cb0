"""Ops on one weight or norm: what smoothing scales and rounding make of it.

The arithmetic is in `kernels.smoothing`, `kernels.integers` and `kernels.compressed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import require_floats, uneven
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, TensorData, require_finite
from carnice_build.rates import Kind, Work

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""The tensors that a weight becomes, by the end of their names, in the order of outputs.

Symmetric codes have no zero point."""

STORAGE = "pack-quantized"
"""compressed-tensors' name of weights whose codes share words."""

SEARCHED_GROUPS = (32, 64, 128)
"""Sizes of groups for which the observer mse is."""

PER_WORD = 8
"""Codes of 4 bits in a word of 32."""


class GroupQuantize(ArrayOp):
    """Integers in the format pack-quantized, of a weight that is smoothed first if it is to be.

    Inputs: a weight [rows, columns]; scales F64 [columns] if `columns`; scales F64 [rows] if
    `rows`, or of the last rows alone.
    Outputs: weight_packed I32 [rows, columns * bits / 32]; weight_scale [rows, groups];
    weight_zero_point I32 [rows * bits / 32, groups], unless `symmetric`; weight_shape I64 [2].
    Parameters: `observer`; `group_size`, None for one group a row; `columns` and `rows`; `bits`, 2
    to 8, where they are not 4; `symmetric`, where it is true.  The observer mse is for groups of
    16-bit weights.
    """

    name = "compressed.quantize"
    version = 1
    libraries = ("numba", "numpy")

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """The parts of the packed weight."""
        spec = inputs[0]
        require_floats(spec)
        rows, columns = spec.shape
        bits, symmetric = _integers(params)
        if params["observer"] == "mse":
            if spec.dtype == "F32":
                raise PlanError("the observer mse needs 16-bit weights")
            if params["group_size"] not in SEARCHED_GROUPS:
                raise PlanError(
                    "the observer mse is for groups of 32, 64 or 128", expected="memoryless_minmax"
                )
        group = params["group_size"] or columns
        if why := uneven(columns, group):
            raise PlanError(why)
        groups = columns // group
        zeros = () if symmetric else (TensorSpec("I32", (words(rows, bits), groups)),)
        return (
            TensorSpec("I32", (rows, words(columns, bits))),
            TensorSpec(spec.dtype, (rows, groups)),
            *zeros,
            TensorSpec("I64", (2,)),
        )

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """What the observer makes of the weight takes longest."""
        kind = Kind.MSE if params["observer"] == "mse" else Kind.KERNEL
        return Work(kind, inputs[0].nbytes)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Raises NonFiniteValue, and BadInput for weights whose range has no scale."""
        import numpy as np

        from carnice_build.kernels import integers

        weight = _smoothed(params, inputs)
        bits, symmetric = _integers(params)
        packed, scales, *packed_zeros, shape = (output.array for output in outputs)
        zeros = None if symmetric else np.empty(scales.shape, np.int8)
        quantize = _searched if params["observer"] == "mse" else integers.quantize_rows
        group = params["group_size"] or weight.array.shape[1]
        try:
            bad = quantize(weight.array, weight.dtype, bits, group, packed, scales, zeros)
        except ValueError as error:
            raise BadInput(0, f"cannot be quantized: {error}") from None
        require_finite(bad)
        if zeros is not None:
            integers.pack_zero_points(zeros, bits, packed_zeros[0])
        shape[...] = weight.array.shape


def words(count: int, bits: int) -> int:
    """The words of 32 bits that so many codes take."""
    return -(-count * bits // 32)


def _integers(params: Mapping[str, Any]) -> tuple[int, bool]:
    """Bits of a code, and whether codes are symmetric; actions of older builds name neither."""
    return params.get("bits", 4), params.get("symmetric", False)


def _searched(
    weight: Any, dtype: str, bits: int, group: int, packed: Any, scales: Any, zeros: Any
) -> int:
    """As `integers.quantize_rows`, under the scales of the observer mse."""
    from carnice_build.kernels import compressed, integers

    bad = compressed.mse_qparams(weight, dtype, group, scales, zeros, bits)
    if bad >= 0:
        return bad
    grid = (scales,) if zeros is None else (scales, zeros)
    return integers.quantize_rows(weight, dtype, bits, group, packed, *grid, given=True)


class SmoothWeight(ArrayOp):
    """A weight that is smoothed and stays unquantized; as `GroupQuantize` begins.

    Inputs and the parameters `columns` and `rows` as there; the output is as the weight.
    A bias or a norm's gain [rows] has no `columns`.
    """

    name = "awq.weight"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As the weight is."""
        return (inputs[0],)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Raises as `_smoothed`."""
        outputs[0].array[...] = _smoothed(params, inputs).array


class SmoothNorm(ArrayOp):
    """A norm with gain 1 + w, its gain over the scales, as llm-compressor stores it.

    Inputs: w [channels], and the scales F64 [channels] when something smooths it.
    Output: the stored weight, of the same type.  Parameter: `exact`, see `smooth_gain`.
    """

    name = "awq.norm"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As the norm is."""
        return (inputs[0],)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Raises NonFiniteValue, and BadInput for a gain that the type cannot hold."""
        from carnice_build.kernels.smoothing import smooth_gain

        weight, *vectors = inputs
        scales = _finite_scales(vectors[0], 1) if vectors else None
        require_finite(
            smooth_gain(weight.array, weight.dtype, scales, params["exact"], outputs[0].array)
        )
        _check_range(outputs[0])


def _smoothed(params: Mapping[str, Any], inputs: Sequence[TensorData]) -> TensorData:
    """The weight times the column scales, then over the row scales, each rounded to its type.

    Raises NonFiniteValue, and BadInput for a product that the type cannot hold.
    """
    import numpy as np

    from carnice_build.kernels.smoothing import divide_rows, multiply_columns

    weight, *vectors = inputs
    scales = (_finite_scales(vector, operand) for operand, vector in enumerate(vectors, 1))
    for wanted, change in ((params["columns"], multiply_columns), (params["rows"], divide_rows)):
        if wanted:
            out = np.empty_like(weight.array)
            require_finite(change(weight.array, weight.dtype, next(scales), out))
            weight = TensorData(weight.dtype, out)
            _check_range(weight)
    return weight


def _finite_scales(scales: TensorData, operand: int) -> Any:
    """The array of input number `operand`, F64 [channels]."""
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(scales.array))
    if bad.size:
        raise NonFiniteValue(int(bad[0]), operand)
    return scales.array


def _check_range(smoothed: TensorData) -> None:
    from carnice_build.kernels.elementwise import non_finite_index

    if non_finite_index(smoothed.array, smoothed.dtype) >= 0:
        raise BadInput(0, f"cannot be smoothed: its values leave the range of {smoothed.dtype}")
