"""Ops of MLX's quantization: our kernels, and mlx itself as the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import require_floats, uneven
from carnice_build.formats.elementwise import cast_finite
from carnice_build.formats.mlx.modes import defaults
from carnice_build.formats.mlx.trace import from_params, infer, replay_bytes
from carnice_build.graph import (
    ArrayOp,
    BadInput,
    NonFiniteValue,
    ProcessOp,
    TensorData,
    require_finite,
)
from carnice_build.tensor_file import TensorFile

SUFFIXES = ("weight", "scales", "biases")
"""The tensors that a weight becomes, by the end of their names, in the order of outputs.

The last is of mode affine alone.
"""


class AffineQuantize(ArrayOp):
    """Affine group quantization by the fused kernel, bit for bit that of `mlx.core.quantize`.

    Input: a weight [rows, columns].
    Outputs: packed U32 [rows, columns * bits / 32]; scales and biases [rows, columns / group].
    Parameters: `bits`, `group_size`, `dtype` (the weight is cast to it first, and scales and
    biases are of it), `nonfinite` (`refuse`, or `zero` to replace NaN and infinity by 0).
    """

    name = "mlx.quantize"
    version = 1
    libraries = ("numba",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of packed weight, scales and biases."""
        return _affine_specs(params, inputs)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue unless the parameters allow such values.

        Raises BadInput for a group whose range is infinite, of which mlx makes an infinite scale.
        """
        from carnice_build.kernels.affine import quantize_rows

        weight = _prepare(params, inputs[0])
        arrays = [output.array for output in outputs]
        require_finite(
            quantize_rows(weight, params["dtype"], params["bits"], params["group_size"], *arrays)
        )
        _require_range(params, arrays[1])


class FloatQuantize(ArrayOp):
    """Quantization to small floats by the fused kernel; see `kernels.mlx_floats`.

    Input: a weight [rows, columns].
    Outputs: packed U32 [rows, columns * bits / 32]; scales U8 [rows, columns / group].
    Parameters: `mode`, from which bits and group size follow, `dtype` (the weight is cast to it
    first, and mlx computes in it), `nonfinite` as for `mlx.quantize`.
    """

    name = "mlx.quantize.float"
    version = 1
    libraries = ("numba",)
    rowwise = True

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of packed weight and scales."""
        return _float_specs(params, inputs)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Quantize rows; raises NonFiniteValue unless the parameters allow such values."""
        from carnice_build.kernels.mlx_floats import quantize_rows

        weight = _prepare(params, inputs[0])
        arrays = [output.array for output in outputs]
        require_finite(quantize_rows(weight, params["dtype"], params["mode"], *arrays))


class Transform(ArrayOp):
    """The steps of a trace on whole tensors, bit for bit as mlx computes them.

    Inputs: the tensors that the steps begin with.  Output: what they make, of type `dtype`.
    Parameters: `steps` (see `trace.as_params`), `dtype`, and `nonfinite` as for `mlx.quantize`.
    """

    name = "mlx.transform"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """The spec of what the steps make."""
        try:
            made = infer(from_params(params["steps"]), inputs)
        except ValueError as error:
            raise PlanError(f"the steps of the trace do not fit: {error}") from None
        return (TensorSpec(params["dtype"], made.shape),)

    def workspace(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The values of all steps, the last in one piece, and inputs without NaN."""
        zeroed = sum(spec.nbytes for spec in inputs) if params["nonfinite"] == "zero" else 0
        made = infer(from_params(params["steps"]), inputs).nbytes
        return zeroed + replay_bytes(from_params(params["steps"]), inputs) + made

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the output; raises NonFiniteValue as `mlx.quantize` does."""
        transform(params, inputs, outputs[0])


def transform(params: Mapping[str, Any], inputs: Sequence[TensorData], output: TensorData) -> None:
    """See `Transform`; what the steps make NaN or infinity of finite operands blames none."""
    import numpy as np

    from carnice_build.formats.mlx.replay import replay
    from carnice_build.kernels import elementwise

    sources = []
    for operand, item in enumerate(inputs):
        array = item.array
        if item.dtype in WIDE_FLOATS and params["nonfinite"] == "zero":
            array = elementwise.zero_non_finite(array, item.dtype)
        elif item.dtype in WIDE_FLOATS:
            _require_finite(array, item.dtype, operand)
        sources.append(TensorData(item.dtype, array))
    made = replay(from_params(params["steps"]), sources)
    array = np.ascontiguousarray(made.array)
    if made.dtype in WIDE_FLOATS:
        _require_finite(array, made.dtype, None)
    if made.dtype == output.dtype:
        output.array[...] = array
        return
    try:
        cast_finite(TensorData(made.dtype, array), output)
    except BadInput as error:
        raise NonFiniteValue(error.index, None) from None


def _require_finite(array: Any, dtype: str, operand: int | None) -> None:
    from carnice_build.kernels.elementwise import non_finite_index

    if (index := non_finite_index(array, dtype)) >= 0:
        raise NonFiniteValue(index, operand)


class TransformQuantize(ArrayOp):
    """`mlx.transform` and then `mlx.quantize`, with nothing written down in between.

    Outputs: packed weight, scales and biases of what the steps make, a matrix or a stack.
    Parameters: those of both.
    """

    name = "mlx.transform.quantize"
    version = 1
    libraries = ("numpy", "numba")
    then: ClassVar[type[ArrayOp]] = AffineQuantize
    """What quantizes."""

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of packed weight, scales and, of mode affine, biases."""
        (made,) = Transform().infer(params, inputs)
        *before, columns = made.shape
        rows = TensorSpec(made.dtype, (prod(before), columns))
        return tuple(
            TensorSpec(spec.dtype, (*before, spec.shape[-1]))
            for spec in self.then().infer(params, [rows])
        )

    def workspace(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """That of `mlx.transform`, and what it makes."""
        (made,) = Transform().infer(params, inputs)
        return Transform().workspace(params, inputs) + made.nbytes

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the outputs; raises as `mlx.transform`."""
        import numpy as np

        specs = [TensorSpec(item.dtype, item.array.shape) for item in inputs]
        (spec,) = Transform().infer(params, specs)
        made = TensorData(spec.dtype, np.empty(spec.shape, NUMPY_NAME[spec.dtype]))
        transform(params, inputs, made)
        flat = [_as_rows(item) for item in (made, *outputs)]
        try:
            self.then().apply(params, flat[:1], flat[1:])
        except BadInput as error:
            # Its element is none of an input's.
            raise BadInput(0, error.what, error.expected) from None


class TransformFloatQuantize(TransformQuantize):
    """`mlx.transform` and then `mlx.quantize.float`."""

    name = "mlx.transform.quantize.float"
    version = 1
    then = FloatQuantize


def _as_rows(data: TensorData) -> TensorData:
    return TensorData(data.dtype, data.array.reshape(-1, data.array.shape[-1]))


class ReferenceAffineQuantize(ProcessOp):
    """The same by mlx itself, slower; the reference that the fused kernel is tested against."""

    name = "mlx.quantize.reference"
    version = 1
    libraries = ("mlx",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of packed weight, scales and biases."""
        return _affine_specs(params, inputs)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """Inputs and outputs, which mlx holds beside ours."""
        return 2 * sum(spec.nbytes for spec in (*inputs, *self.infer(params, inputs)))

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Quantize the whole weight; raises as the fused op does."""
        import numpy as np

        from carnice_build.backends.mlx import quantize_rows
        from carnice_build.kernels.elementwise import non_finite_index

        weight = _prepare(params, TensorData(inputs[0].spec.dtype, inputs[0].read()))
        require_finite(non_finite_index(weight, params["dtype"]))
        arrays = [np.empty(out.spec.shape, NUMPY_NAME[out.spec.dtype]) for out in outputs]
        quantize_rows(weight, params["dtype"], params["bits"], params["group_size"], *arrays)
        _require_range(params, arrays[1])
        for output, array in zip(outputs, arrays, strict=True):
            output.write(array)


class ReferenceFloatQuantize(ProcessOp):
    """As `ReferenceAffineQuantize`, to small floats."""

    name = "mlx.quantize.float.reference"
    version = 1
    libraries = ("mlx",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Specs of packed weight and scales."""
        return _float_specs(params, inputs)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """Inputs and outputs, which mlx holds beside ours, and the distances of each weight to 16
        codes, in float32 and its magnitude, of the rows that are quantized at a time."""
        held = 2 * sum(spec.nbytes for spec in (*inputs, *self.infer(params, inputs)))
        rows, columns = inputs[0].shape
        return held + _DISTANCES * columns * min(rows, _rows_at_once(columns))

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Quantize the whole weight, some rows at a time; raises as the fused op does."""
        import numpy as np

        from carnice_build.backends.mlx import quantize_float_rows
        from carnice_build.kernels.elementwise import non_finite_index

        weight = _prepare(params, TensorData(inputs[0].spec.dtype, inputs[0].read()))
        require_finite(non_finite_index(weight, params["dtype"]))
        arrays = [np.empty(out.spec.shape, NUMPY_NAME[out.spec.dtype]) for out in outputs]
        step = _rows_at_once(weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            made = (array[rows] for array in arrays)
            quantize_float_rows(weight[rows], params["dtype"], params["mode"], *made)
        for output, array in zip(outputs, arrays, strict=True):
            output.write(array)


_DISTANCES = 2 * 16 * 4
"""Bytes for each weight."""


def _rows_at_once(columns: int) -> int:
    """An even number: mlx packs groups of 16 two at a time."""
    return 2 * max(1, (1 << 19) // max(1, columns))


def _require_range(params: Mapping[str, Any], scales: Any) -> None:
    """Raise BadInput for scales that are not finite, which finite weights have that are too far
    from each other."""
    from carnice_build.kernels.elementwise import non_finite_index

    if (group := non_finite_index(scales, params["dtype"])) >= 0:
        size = params["group_size"]
        raise BadInput(
            0,
            f"has a group of {size} weights whose range is beyond the numbers of mlx.quantize",
            "less from the least of a group to its largest than the largest number of F32",
            index=group * size,
        )


def _affine_specs(
    params: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    packed, grid = _packed_specs(params["bits"], params["group_size"], params["dtype"], inputs)
    return packed, grid, grid


def _float_specs(
    params: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, TensorSpec]:
    stored = defaults(params["mode"])
    return _packed_specs(stored["bits"], stored["group_size"], "U8", inputs)


def _packed_specs(
    bits: int, group: int, scales: str, inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, TensorSpec]:
    """Specs of packed weight, and of scales of that type."""
    (spec,) = inputs
    require_floats(spec)
    rows, columns = spec.shape
    if why := uneven(columns, group):
        raise PlanError(why)
    packed = TensorSpec("U32", (rows, columns * bits // 32))
    return packed, TensorSpec(scales, (rows, columns // group))


def _prepare(params: Mapping[str, Any], data: TensorData) -> Any:
    """The weight's array in the type to quantize in, with NaN and infinity as asked.

    Raises as `cast_finite`.
    """
    import numpy as np

    from carnice_build.kernels import elementwise

    array = data.array
    if params["nonfinite"] == "zero":
        array = elementwise.zero_non_finite(array, data.dtype)
    if data.dtype == params["dtype"]:
        return array
    out = TensorData(params["dtype"], np.empty(array.shape, NUMPY_NAME[params["dtype"]]))
    cast_finite(TensorData(data.dtype, array), out)
    return out.array
