"""What is said of a tensor that an op cannot work on: which of the checkpoint's it is."""

from __future__ import annotations

from math import prod

from carnice_build.errors import CheckpointError
from carnice_build.graph import Action, BadElement, BadInput, NonFiniteValue
from carnice_build.tensors import STACK, SourceTensor, numbered


def non_finite(action: Action, error: NonFiniteValue) -> CheckpointError:
    """The error for NaN or infinity in an input of `action`, or in what it makes of finite ones."""
    if error.operand is None:
        origins = [ref.origin for ref in action.inputs]
        held = [item.located(0)[0] for item in origins if isinstance(item, SourceTensor)]
        of = f" of {' and '.join(repr(item.name) for item in held)}" if held else ""
        return CheckpointError(
            f"{action.op.name} makes NaN or infinity{of}, though what it reads is finite",
            where=held[0].file.name if held and held[0].file else None,
        )
    origin = action.inputs[error.operand].origin
    if isinstance(origin, SourceTensor):
        return not_finite(origin, error.index)
    return CheckpointError(f"{action.op.name} met NaN or infinity")


def bad_input(action: Action, error: BadInput) -> CheckpointError:
    """The error for an input of `action` that its op refuses."""
    origin = action.inputs[error.operand].origin
    if not isinstance(origin, SourceTensor):
        return CheckpointError(f"{action.op.name} {error.what}", expected=error.expected)
    tensor, place = origin.located(error.index)
    at = f" at element {place}" if isinstance(error, BadElement) else ""
    return CheckpointError(
        f"tensor {tensor.name!r} {error.what}{at}{_expert(origin, tensor, error.index)}",
        where=tensor.file.name if tensor.file else None,
        expected=error.expected,
    )


def not_finite(source: SourceTensor, index: int) -> CheckpointError:
    """The error for NaN or infinity at a flat index of a source tensor."""
    tensor, place = source.located(index)
    expert = _expert(source, tensor, index)
    return CheckpointError(
        f"tensor {tensor.name!r} holds NaN or infinity at element {place}{expert}",
        where=tensor.file.name if tensor.file else None,
        expected="finite weights, or, where the format has it, `nonfinite: zero` under `quantize`",
    )


def _expert(source: SourceTensor, tensor: SourceTensor, index: int) -> str:
    """Which expert element `index` of a stack is of, where `tensor` holds it beside others."""
    if STACK not in source.name:
        return ""
    experts, *each = source.spec.shape
    name = numbered(source.name, experts)[index // prod(each)]
    return "" if name == tensor.name else f", which is of {name!r}"
