"""Ops of GPTQ: Hessians of a layer, the integers of a weight, and the pass to the next layer.

What they are for is told in `gptq`; their arithmetic is in `backends.gptq`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.passes import layer_inputs, layer_memory, made_specs
from carnice_build.calibration.samples import samples
from carnice_build.calibration.work import compensation_work, hessian_work, layer_operations
from carnice_build.dtypes import ITEM_SIZE, WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.blame import uneven
from carnice_build.formats.compressed_tensors.ops import SUFFIXES
from carnice_build.graph import ProcessOp
from carnice_build.rates import Kind, Work
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import STACK

LIBRARIES = ("llmcompressor", "compressed-tensors", *LAYER_LIBRARIES)

_PACKED, _SCALE, _ZERO_POINT, _SHAPE = SUFFIXES

_WORD = 32
"""Bits of a word that codes share."""

_FULL_BITS = 5
"""Bits of the longest codes that BF16 surely gives back."""

_F32 = ITEM_SIZE["F32"]


def suffixes(scheme: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that a weight becomes, by the end of their names, in the order of outputs."""
    return tuple(name for name in SUFFIXES if not (scheme["symmetric"] and name == _ZERO_POINT))


def comes_back(num_bits: int) -> bool:
    """Whether packed codes surely give back the weight that the library goes on with.

    See `backends.gptq.dequantize`.
    """
    return num_bits <= _FULL_BITS


@dataclass(frozen=True)
class Hessians(ProcessOp):
    """What linears of one decoder layer are given, as Hessians; `workspace` is as in `Forward`.

    Inputs: those of `Forward`.
    Outputs: for each of `groups` a Hessian F32 [in, in], [E, in, in] of a group of experts that are
    not given the same; where the pass `hands_on`, before them the layer's hidden states, and behind
    them what it makes for others to be given.
    Parameters: `groups`, each the linears that read one input, by their names in the layer, and
    whether each expert has a Hessian of its own; `hands_on`; `norms` as in `backends.gptq`;
    `names`, `layer`, `given`, `made`, `config`, `dtype`, `attention`, `threads`, `device` and
    `processor`.
    """

    name = "gptq.hessians"
    version = 1
    libraries = LIBRARIES

    workspace: int = 0
    transient: frozenset[int] = frozenset()

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hessians, between hidden states and what is made."""
        weights = _named(params, inputs)
        hessians = (
            TensorSpec("F32", _hessian_shape(weights[f"{linears[0]}.weight"], each))
            for linears, each in params["groups"]
        )
        if not params["hands_on"]:
            return tuple(hessians)
        return inputs[1], *hessians, *made_specs(params, inputs)

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample."""
        return inputs[0].shape[0]

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """One pass, and the products of what linears are given."""
        return hessian_work(params, inputs, self._found(params, inputs))

    def _found(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> Sequence[TensorSpec]:
        first = int(params["hands_on"])
        return self.infer(params, inputs)[first : first + len(params["groups"])]

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The layer, all Hessians, and what one sample adds to the largest of them."""
        hessians = self._found(params, inputs)
        added = [
            _F32 * spec.shape[-1] * (spec.shape[-1] + 3 * inputs[0].shape[1]) for spec in hessians
        ]
        held = sum(spec.nbytes for spec in hessians) + max(added, default=0)
        return layer_memory(params, inputs, self.workspace) + _experts(params, inputs) + held

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for NaN or infinity in what a linear is given.

        And BackendError for linears of a group that are not given the same, or nothing.
        """
        from carnice_build.formats.compressed_tensors.gptq_worker import hessians

        weights, given = layer_inputs(params, inputs)
        hessians(params, samples(inputs[0]), inputs[1], weights, given, outputs, progress)


@dataclass(frozen=True)
class GptqQuantize(ProcessOp):
    """A weight's integers by llm-compressor's GPTQ, in the format pack-quantized.

    Inputs: a weight [rows, columns], or a stack [E, rows, columns]; its Hessian F32 [columns,
    columns], or one for each expert.
    Outputs: I64 [2], how many matrices there are, and how many of them were rounded to nearest
    because their Hessian has no inverse; then weight_packed I32 [rows, columns * bits / 32],
    weight_scale [rows, groups], weight_zero_point I32 [rows * bits / 32, groups] unless
    `symmetric`, weight_shape I64 [2], all with the number of experts in front; last, of codes that
    the packed weight does not give back (`comes_back`), the weight that the library goes on with.
    Parameters: `num_bits`, `symmetric`, `strategy`, `group_size` and `observer` of the scheme;
    `block_size`, `dampening_frac` and `actorder` as in `backends.gptq.GptqSettings`; `threads`,
    `device` and `processor`.
    """

    name = "gptq.quantize"
    version = 1
    libraries = ("llmcompressor", "compressed-tensors", "torch")
    figures = frozenset({0})

    transient: frozenset[int] = frozenset()

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """What is counted, and the parts of the packed weight."""
        weight = inputs[0]
        if weight.dtype not in WIDE_FLOATS:
            raise PlanError(
                f"cannot quantize {weight.dtype} weights", expected=" or ".join(WIDE_FLOATS)
            )
        *experts, rows, columns = weight.shape
        group, bits = params["group_size"], params["num_bits"]
        if group and (why := uneven(columns, group)):
            raise PlanError(why)
        groups = columns // group if group else 1
        parts = {
            _PACKED: TensorSpec("I32", (*experts, rows, _words(columns, bits))),
            _SCALE: TensorSpec(weight.dtype, (*experts, rows, groups)),
            _ZERO_POINT: TensorSpec("I32", (*experts, _words(rows, bits), groups)),
            _SHAPE: TensorSpec("I64", (*experts, 2)),
        }
        packed = (parts[suffix] for suffix in suffixes(params))
        return TensorSpec("I64", (2,)), *packed, *(() if comes_back(bits) else (weight,))

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each matrix."""
        return prod(inputs[0].shape[:-2])

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """The factors of a Hessian, and the columns of a weight, for each matrix."""
        return compensation_work(inputs[0], params["block_size"])

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """A Hessian and its reordered copies; a weight in float32, what is left of it, and its
        errors."""
        rows, columns = inputs[0].shape[-2:]
        hessian = 4 * columns * columns
        block: int = params["block_size"]
        weight = 5 * rows * columns + 8 * rows * block
        return (128 << 20) + _F32 * (hessian + weight)

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises NonFiniteValue for NaN or infinity in the weight."""
        from carnice_build.formats.compressed_tensors.gptq_worker import quantize

        quantize(params, inputs[0], inputs[1], outputs, progress)


@dataclass(frozen=True)
class GptqAdvance(ProcessOp):
    """One decoder layer over every sample, its linears as GPTQ left them.

    Inputs and outputs are those of `Forward`, without amax; in the place of a quantized weight the
    layer has what `GptqQuantize` makes of it.
    Parameters: `schemes` of the quantized linears, by their names in the layer; `norms` as in
    `backends.gptq`; `names`, `layer`, `given`, `made`, `config`, `dtype`, `attention`, `threads`,
    `device` and `processor`.
    """

    name = "gptq.advance"
    version = 1
    libraries = LIBRARIES

    workspace: int = 0
    transient: frozenset[int] = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, and what is made."""
        return inputs[1], *made_specs(params, inputs)

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample."""
        return inputs[0].shape[0]

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """One pass, with all experts for all tokens."""
        return Work(Kind.FORWARD, layer_operations(*_whole(params, inputs), everyone=True))

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """That of the layer, and its codes while they are put together."""
        whole, specs = _whole(params, inputs)
        packed_bytes = sum(spec.nbytes for spec in layer_inputs(params, inputs)[0])
        return layer_memory(whole, specs, self.workspace) + _experts(whole, specs) + packed_bytes

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises BackendError when torch has no such device."""
        from carnice_build.formats.compressed_tensors.gptq_worker import advance

        weights, given = layer_inputs(params, inputs)
        advance(params, samples(inputs[0]), inputs[1], weights, given, outputs, progress)


def _named(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """A layer's tensors by their names in it."""
    return dict(zip(params["names"], inputs[2:], strict=False))


def _whole(
    params: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> tuple[dict[str, Any], list[TensorSpec]]:
    """Parameters and inputs of `GptqAdvance`, had the layer its weights in one piece."""
    tensors, given = layer_inputs(params, inputs)
    named = dict(zip(params["names"], tensors, strict=True))
    for linear, scheme in params["schemes"].items():
        packed = named.pop(f"{linear}.{_PACKED}")
        dtype = named[f"{linear}.{_SCALE}"].dtype
        columns = packed.shape[-1] * _WORD // scheme["num_bits"]
        named[f"{linear}.weight"] = TensorSpec(dtype, (*packed.shape[:-1], columns))
    return {**params, "names": list(named)}, [*inputs[:2], *named.values(), *given]


def _words(count: int, bits: int) -> int:
    """Words that so many codes fill."""
    return -(-count * bits // _WORD)


def _hessian_shape(weight: TensorSpec, each: bool) -> tuple[int, ...]:
    columns = weight.shape[-1]
    return (*(weight.shape[:-2] if each else ()), columns, columns)


def _experts(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
    """Bytes of experts that are there once more, each as modules of its own."""
    return sum(spec.nbytes for name, spec in _named(params, inputs).items() if STACK in name)
