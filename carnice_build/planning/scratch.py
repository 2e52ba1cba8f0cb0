"""Disk that a build needs for a while.

Outputs that are large and not kept, the hidden states of a calibration, for one; and files that
processes are given of sources which lie in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from carnice_build.graph import Action, ActionOutput, ProcessOp, TensorRef
from carnice_build.tensors import SourceTensor


def transient_inputs(action: Action) -> Iterator[TensorRef]:
    """The inputs of `action` that are not kept for long, each once."""
    seen: set[str] = set()
    for ref in action.inputs:
        origin = ref.origin
        transient = isinstance(origin, ActionOutput) and origin.is_transient
        if transient and ref.identity not in seen:
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


def copied_bytes(source: SourceTensor) -> int:
    """Disk for what a process is given of `source`: its bytes, unless they lie in files here.

    Those of a shape file would, unless they are decoded.
    """
    if source.file is None:
        return 0 if source.stored is None else source.spec.nbytes
    return 0 if source.file.in_files else source.spec.nbytes


def scratch_bytes(actions: Iterable[Action], width: int) -> int:
    """Most bytes of disk that are in use for a while, when `actions` run layer by layer.

    That are transient tensors until their last reader is done, and what at most `width` processes
    have for themselves: copies of sources, and outputs before these are where they belong.
    Where more than one may run, what each layer is given of sources is here one layer ahead.
    Of chains beside each other at most `width` are in a layer at once, each with what it reads and
    what it makes.
    """
    order = list(actions)
    depth = depths(order)
    order.sort(key=lambda action: depth[action.identity])
    ends_at = {depth[action.identity]: index for index, action in enumerate(order)}
    last: dict[str, int] = {}
    for index, action in enumerate(order):
        # While it reads, others of its depth may have begun.
        until = min(index + width - 1, ends_at[depth[action.identity]])
        last |= {ref.identity: until for ref in transient_inputs(action)}
    ends: dict[int, int] = {}
    held = 0
    holding: dict[int, int] = {}
    for index, action in enumerate(order):
        if isinstance(action.op, ProcessOp):
            for output in action.op.transient:
                size = action.outputs[output].nbytes
                held += size
                end = last.get(f"{action.identity}|{output}", index)
                ends[end] = ends.get(end, 0) + size
        level = depth[action.identity]
        holding[level] = max(held, holding.get(level, 0))
        held -= ends.get(index, 0)
    anywhere, levels = _own_bytes(order, depth)
    ahead = _ahead_bytes(order, depth) if width > 1 else {}
    return max(
        (
            most
            + sum(sorted([*anywhere, *levels.get(level, ())], reverse=True)[:width])
            + ahead.get(level + 1, 0)
            for level, most in holding.items()
        ),
        default=0,
    )


def _ahead_bytes(order: Iterable[Action], depth: Mapping[str, int]) -> Mapping[int, int]:
    """Copies of sources for the actions of each depth that wait for another; one for all chains."""
    copies: dict[int, dict[str, int]] = {}
    for action in order:
        makers = (ref.origin for ref in transient_inputs(action))
        if any(
            isinstance(maker, ActionOutput) and maker.action.identity in depth for maker in makers
        ):
            copies.setdefault(depth[action.identity], {}).update(
                (ref.identity, copied_bytes(ref.origin))
                for ref in action.inputs
                if isinstance(ref.origin, SourceTensor)
            )
    return {level: sum(found.values()) for level, found in copies.items()}


def _own_bytes(
    order: Iterable[Action], depth: Mapping[str, int]
) -> tuple[Sequence[int], Mapping[int, Sequence[int]]]:
    """What processes that may run beside each other have for themselves.

    Those in no chain, which may run at any time; and those of each depth.
    An action that waits for another of its depth is never beside it: of both, the larger counts.
    """
    anywhere: list[int] = []
    levels: dict[int, dict[str, int]] = {}
    first: dict[str, str] = {}
    for action in order:
        if not isinstance(action.op, ProcessOp):
            continue
        own = _own(action)
        if not action.op.transient and not any(transient_inputs(action)):
            anywhere.append(own)
            continue
        level = levels.setdefault(depth[action.identity], {})
        makers = [
            ref.origin.action for ref in action.inputs if isinstance(ref.origin, ActionOutput)
        ]
        waited = (first[item.identity] for item in makers if item.identity in first)
        name = next((item for item in waited if item in level), action.identity)
        first[action.identity] = name
        level[name] = max(own, level.get(name, 0))
    return anywhere, {level: list(found.values()) for level, found in levels.items()}


def _own(action: Action) -> int:
    """Copies of sources, and outputs that are kept: they are copied into packs, or taken over."""
    assert isinstance(action.op, ProcessOp)
    copies = (
        copied_bytes(ref.origin) for ref in action.inputs if isinstance(ref.origin, SourceTensor)
    )
    made = (
        spec.nbytes for index, spec in enumerate(action.outputs) if index not in action.op.transient
    )
    return sum(copies) + sum(made)
