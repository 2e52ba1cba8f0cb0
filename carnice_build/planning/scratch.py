"""Outputs that are large and not kept: the hidden states of a calibration, for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from carnice_build.graph import Action, ActionOutput, ProcessOp, TensorRef


def transient_inputs(action: Action) -> Iterator[TensorRef]:
    """The inputs of `action` that are not kept for long, each once."""
    seen: set[str] = set()
    for ref in action.inputs:
        origin = ref.origin
        if (
            isinstance(origin, ActionOutput)
            and isinstance(origin.action.op, ProcessOp)
            and origin.index in origin.action.op.transient
            and ref.identity not in seen
        ):
            seen.add(ref.identity)
            yield ref


def depths(actions: Iterable[Action]) -> dict[str, int]:
    """How many transient tensors lie behind each of `actions`, which are in topological order.

    Chains of layers that run beside each other have equal depths layer by layer.
    """
    found: dict[str, int] = {}
    for action in actions:
        behind = [
            found.get(ref.origin.action.identity, 0) + 1
            for ref in transient_inputs(action)
            if isinstance(ref.origin, ActionOutput)
        ]
        found[action.identity] = max(behind, default=0)
    return found


def scratch_bytes(actions: Iterable[Action]) -> int:
    """Most bytes of transient tensors at one time, when `actions` run layer by layer."""
    order = list(actions)
    depth = depths(order)
    order.sort(key=lambda action: depth[action.identity])
    last: dict[str, int] = {}
    for index, action in enumerate(order):
        last |= {ref.identity: index for ref in transient_inputs(action)}
    ends: dict[int, int] = {}
    held = most = 0
    for index, action in enumerate(order):
        if isinstance(action.op, ProcessOp):
            for output in action.op.transient:
                size = action.outputs[output].nbytes
                held += size
                end = last.get(f"{action.identity}|{output}", index)
                ends[end] = ends.get(end, 0) + size
        most = max(most, held)
        held -= ends.get(index, 0)
    return most
