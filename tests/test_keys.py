"""A key covers everything that can change the bytes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carnice_build import keys
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.mlx.ops import AffineQuantize, ReferenceAffineQuantize
from carnice_build.graph import Action, ActionGraph, Op, TensorRef
from carnice_build.keys import DigestSink
from carnice_build.planning.explain import FactsSink
from carnice_build.tensors import SourceTensor

AFFINE = {"bits": 4, "group_size": 64, "dtype": "BF16", "nonfinite": "refuse"}
OPS: list[tuple[Op, dict[str, Any]]] = [
    (AffineQuantize(), AFFINE),
    (ReferenceAffineQuantize(), AFFINE),
    (Elementwise(), {"add": 1.0, "dtype": "BF16", "nonfinite": "refuse"}),
]
OTHER_VALUES = {
    "bits": 8,
    "group_size": 32,
    "dtype": "F32",
    "nonfinite": "zero",
    "add": None,
}
DIGEST = "0" * 64


def action(op: Op, params: dict[str, Any], spec: TensorSpec | None = None) -> Action:
    source = SourceTensor("a", spec or TensorSpec("BF16", (8, 128)), None, 0)
    (ref, *_) = ActionGraph().add(op, params, TensorRef(source.spec, source))
    return ref.origin.action  # type: ignore[union-attr]


@pytest.mark.parametrize(("op", "params"), OPS)
def test_every_parameter_is_in_the_key(op: Op, params: dict[str, Any]) -> None:
    """Changing any parameter of any op changes the key."""
    key = action(op, params).key([DIGEST])
    changed = [action(op, {**params, name: OTHER_VALUES[name]}).key([DIGEST]) for name in params]

    assert len({key, *changed}) == 1 + len(params)


@pytest.mark.parametrize(("op", "params"), OPS)
def test_content_type_and_shape_are_in_the_key(op: Op, params: dict[str, Any]) -> None:
    """Other bytes, another type or another shape of the same bytes give another key."""
    found = {
        action(op, params).key([DIGEST]),
        action(op, params).key(["1" * 64]),
        action(op, params, TensorSpec("F16", (8, 128))).key([DIGEST]),
        action(op, params, TensorSpec("BF16", (4, 256))).key([DIGEST]),
    }

    assert len(found) == 4


@pytest.mark.parametrize(("op", "params"), OPS)
def test_versions_are_in_the_key(
    op: Op, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of the op, or of a library whose code makes the bytes, gives another key."""
    key = action(op, params).key([DIGEST])
    monkeypatch.setattr("carnice_build.keys.library_version", lambda name: "another")
    other_library = action(op, params).key([DIGEST])
    monkeypatch.setattr(type(op), "version", op.version + 1)
    other_op = action(op, params).key([DIGEST])

    assert len({key, other_library, other_op}) == 3


def test_names_and_places_are_not_in_the_key() -> None:
    """The same bytes under another name, in another place, have the same key."""
    spec = TensorSpec("BF16", (8, 128))
    found = set()
    for source in (SourceTensor("a", spec, None, 0), SourceTensor("b", spec, None, 4096)):
        (ref, *_) = ActionGraph().add(AffineQuantize(), AFFINE, TensorRef(spec, source))
        found.add(ref.origin.action.key([DIGEST]))  # type: ignore[union-attr]

    assert len(found) == 1


def test_what_is_explained_is_what_is_digested() -> None:
    """Digesting the explained facts one by one gives the key."""
    made = action(AffineQuantize(), AFFINE)
    facts = FactsSink()
    made.describe(facts, [DIGEST])
    digest = DigestSink()
    for name, value in facts.facts.items():
        digest.field(name, value)

    assert made.key([DIGEST]) == digest.digest()


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_different_facts_never_look_the_same(facts: list[tuple[str, str]]) -> None:
    """Moving a character from one field to the next changes the digest."""
    whole = DigestSink()
    for name, value in facts:
        whole.field(name, value)
    joined = DigestSink()
    joined.field("".join(name for name, _ in facts), "".join(value for _, value in facts))

    assert (whole.digest() == joined.digest()) == (len(facts) == 1)


def test_equal_actions_are_one() -> None:
    """Adding the same work twice gives the one that is there."""
    graph = ActionGraph()
    source = SourceTensor("a", TensorSpec("BF16", (8, 128)), None, 0)
    refs = [graph.add(AffineQuantize(), AFFINE, TensorRef(source.spec, source)) for _ in range(2)]

    assert refs[0] == refs[1]
    assert len(graph) == 1


def test_an_absent_library_has_a_version_too() -> None:
    """A library that is not installed is named so, and planning goes on."""
    assert keys.library_version("no-such-distribution") == "absent"
