"""From the tensors of a checkpoint, as it names them, to those of its model.

The model's stacks of experts are one tensor each, whichever way the checkpoint holds them; what is
missing, left over or of another shape stops the plan, and what is wrong in one way is told
together.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from carnice_build.checkpoint.stack import slab_stack, stacked
from carnice_build.errors import PlanError, nearest, together
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import Architecture, TensorFact
from carnice_build.planning.unknown import unknown_tensors
from carnice_build.tensors import SourceTensor

Shapes = Mapping[str, Sequence[int]]


def gathered(view: View, architecture: Architecture, where: str) -> View:
    """The view by the names of the model's facts, in their order.

    Raises PlanError unless it holds the model's tensors, all of them, and no other.
    Optional parts (the MTP head, the towers) may be absent, but only as a whole, or but for what
    is a copy of another tensor.
    """
    names = {fact.name: names_of(fact, view) for fact in architecture.tensors.values()}
    known = {name for shapes in names.values() for name in shapes}
    if unknown := [name for name in view if name not in known]:
        raise unknown_tensors(unknown, architecture, where)
    _check_shapes(view, names.values(), where)
    _check_missing(view, architecture, names, where)
    found: View = {}
    for fact in architecture.tensors.values():
        if all(name in view for name in names[fact.name]):
            found[fact.name] = _ref(fact, list(names[fact.name]), view)
    return found


def names_of(fact: TensorFact, view: Container[str]) -> Shapes:
    """The tensors of the checkpoint that hold those of a fact, with their shapes."""
    if not fact.stacked:
        return {fact.name: fact.shape}
    count, rows, *rest = fact.shape
    if fact.fused is not None and fact.fused[0] in view:
        name, _, of = fact.fused
        return {name: (count, of * rows, *rest)}
    start, _, end = fact.name.partition("*")
    shape = fact.shape[1:]
    return {f"{start}{index}{end}": shape for index in range(count)}


def _ref(fact: TensorFact, names: Sequence[str], view: View) -> TensorRef:
    if not fact.stacked:
        return view[fact.name]
    sources = [_source(name, view) for name in names]
    if fact.fused is not None and names == [fact.fused[0]]:
        rows = fact.shape[1]
        first = fact.fused[1] * rows
        whole = fact.fused[2] == 1
        tensor = sources[0] if whole else slab_stack(fact.name, sources[0], first, first + rows)
    else:
        tensor = stacked(fact.name, sources)
    return TensorRef(tensor.spec, tensor)


def _source(name: str, view: View) -> SourceTensor:
    origin = view[name].origin
    if not isinstance(origin, SourceTensor):
        raise PlanError(
            f"a step computes the weights of expert {name!r}",
            expected="a step that leaves those of single experts as they are",
        )
    return origin


def _check_shapes(view: View, facts: Iterable[Shapes], where: str) -> None:
    expected = {
        name: shape
        for shapes in facts
        for name, shape in shapes.items()
        if name in view and view[name].spec.shape != tuple(shape)
    }

    def error(name: str) -> PlanError:
        return PlanError(
            f"tensor {name!r} is of shape {list(view[name].spec.shape)}",
            where=where,
            expected=f"{list(expected[name])} by its config",
        )

    if expected:
        what = f"{len(expected)} tensors are of other shapes than its config says"
        raise together([name for name in view if name in expected], error, what, where)


def _check_missing(
    view: View, architecture: Architecture, names: Mapping[str, Shapes], where: str
) -> None:
    facts = architecture.tensors
    present = {facts[fact].part for fact, own in names.items() if any(name in view for name in own)}
    missing = [
        name
        for fact, own in names.items()
        if not facts[fact].spare
        if facts[fact].part in present or not architecture.optional(facts[fact])
        for name in _missing_of(fact, own, view)
    ]

    def error(name: str) -> PlanError:
        return PlanError(f"tensor {name!r} is missing", where=where, nearest=nearest(name, view))

    if missing:
        raise together(missing, error, f"{len(missing)} tensors are missing", where)


def _missing_of(fact: str, names: Shapes, view: View) -> Sequence[str]:
    missing = [name for name in names if name not in view]
    # Of a stack that is not there at all, its own name says more than that of each expert.
    return [fact] if missing and len(missing) == len(names) else missing
