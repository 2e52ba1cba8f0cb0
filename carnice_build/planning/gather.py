"""From the tensors of a checkpoint, as it names them, to those of its model.

The model's stacks of experts are one tensor each, whichever way the checkpoint holds them; what is
missing, left over or of another shape stops the plan, and what is wrong in one way is told
together.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass

from carnice_build.checkpoint.stack import slab_stack, stacked, whole_stack
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.errors import CheckpointError, PlanError, nearest, together
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import OPTIONAL_PARTS, Architecture, TensorFact
from carnice_build.planning.unknown import unknown_tensors
from carnice_build.tensors import SourceTensor, numbered


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint holds the tensor of a fact: in tensors `names`, each of `shape`.

    `refs` are those that are there; a checkpoint may hold a million, so they are looked up once.
    If it is `fused` there is one tensor, with columns for rows if that is `turned`.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    refs: Sequence[TensorRef]
    fused: bool = False
    turned: bool = False

    @property
    def whole(self) -> bool:
        """Whether all of them are there."""
        return len(self.refs) == len(self.names)


def gathered(view: View, architecture: Architecture, where: str) -> View:
    """The view by the names of the model's facts, in their order.

    Raises PlanError unless it holds the model's tensors, all of them, and no other;
    CheckpointError where one that its family's table knows is no tensor of floats.
    Optional parts (the MTP head, the towers) may be absent, but only as a whole, or but for what
    is a copy of another tensor.
    """
    places = {fact.name: _place(fact, view) for fact in architecture.tensors.values()}
    known = {name for place in places.values() for name in place.names}
    if not view.keys() <= known:
        unknown = [name for name in view if name not in known]
        raise unknown_tensors(unknown, architecture, where)
    _check_shapes(view, places.values(), where)
    _check_missing(view, architecture, places, where)
    if architecture.tabled:
        # Without a table it is not known what is a weight, and what counts or points at something.
        _check_floats(view, where)
    facts = architecture.tensors
    return {name: _ref(facts[name], place) for name, place in places.items() if place.whole}


def stored(fact: TensorFact, there: Container[str]) -> tuple[Sequence[str], tuple[int, ...]]:
    """What a checkpoint, in which the names `there` are, calls the tensors of a fact.

    And the shape of each of them.
    """
    if not fact.stacked:
        return [fact.name], fact.shape
    fused = fact.fused
    name = next((name for name in fused.names if name in there), None) if fused else None
    if fused is None or name is None:
        return numbered(fact.name, fact.shape[0]), fact.shape[1:]
    count, rows, *rest = fact.shape
    if name == fused.turned:
        return [name], (count, *rest, fused.of * rows)
    return [name], (count, fused.of * rows, *rest)


def _place(fact: TensorFact, view: View) -> _Place:
    names, shape = stored(fact, view)
    refs = [view[name] for name in names if name in view]
    fused = fact.fused is not None and names[0] in fact.fused.names
    turned = fact.fused is not None and names[0] == fact.fused.turned
    return _Place(names, shape, refs, fused, turned)


def _ref(fact: TensorFact, place: _Place) -> TensorRef:
    if not fact.stacked:
        return place.refs[0]
    sources = [ref.origin for ref in place.refs if isinstance(ref.origin, SourceTensor)]
    if len(sources) < len(place.refs):
        raise _computed(place)
    if place.fused:
        tensor = part_of(fact, sources[0], turned=place.turned)
    else:
        tensor = stacked(fact.name, sources)
    return TensorRef(tensor.spec, tensor)


def part_of(fact: TensorFact, tensor: SourceTensor, *, turned: bool = False) -> SourceTensor:
    """The stack of a fact in a tensor [experts, of * rows, ...] that holds several.

    `turned`, that is [experts, ..., of * rows].
    """
    if fact.fused is None:
        return tensor
    if turned:
        return turned_stack(fact.name, tensor, *fact.fused.rows(fact.shape[1]))
    if fact.fused.of == 1:
        return whole_stack(fact.name, tensor)
    return slab_stack(fact.name, tensor, *fact.fused.rows(fact.shape[1]))


def _computed(place: _Place) -> PlanError:
    pairs = zip(place.names, place.refs, strict=True)
    name = next(name for name, ref in pairs if not isinstance(ref.origin, SourceTensor))
    return PlanError(
        f"a step computes the weights of expert {name!r}",
        expected="a step that leaves those of single experts as they are",
    )


def _check_shapes(view: View, places: Collection[_Place], where: str) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for place in places:
        if any(ref.spec.shape != place.shape for ref in place.refs):
            expected |= {
                name: place.shape
                for name in place.names
                if name in view and view[name].spec.shape != place.shape
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


def _check_floats(view: View, where: str) -> None:
    def error(name: str) -> CheckpointError:
        dtype = view[name].spec.dtype
        scaled = ", or the scales of F8 and a `quantization_config`" if dtype[:2] == "F8" else ""
        expected = f"floats: {', '.join(WIDE_FLOATS)}{scaled}"
        return CheckpointError(f"tensor {name!r} is of {dtype}", where=where, expected=expected)

    if others := [name for name, ref in view.items() if ref.spec.dtype not in WIDE_FLOATS]:
        raise together(others, error, f"{len(others)} tensors are not of floats", where)


def _check_missing(
    view: View, architecture: Architecture, places: Mapping[str, _Place], where: str
) -> None:
    facts = architecture.tensors
    present = {facts[fact].part for fact, place in places.items() if place.refs}
    missing = [
        name
        for fact, place in places.items()
        if not place.whole and (place.refs or not facts[fact].optional)
        if facts[fact].part in present or facts[fact].part not in OPTIONAL_PARTS
        for name in _missing_of(fact, place, view)
    ]

    def error(name: str) -> PlanError:
        return PlanError(f"tensor {name!r} is missing", where=where, nearest=nearest(name, view))

    if missing:
        raise together(missing, error, f"{len(missing)} tensors are missing", where)


def _missing_of(fact: str, place: _Place, view: View) -> Sequence[str]:
    # Of a stack that is not there at all, its own name says more than that of each expert.
    return [name for name in place.names if name not in view] if place.refs else [fact]
