"""A key covers everything that can change the bytes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import OPS, OpSample, each

from carnice_build import keys
from carnice_build.dtypes import TensorSpec
from carnice_build.formats.compressed_tensors.storages.row_floats_ops import RowQuantize
from carnice_build.formats.mlx.ops import AffineQuantize
from carnice_build.graph import Action, ActionGraph, ActionOutput, Op, Stacked, TensorRef
from carnice_build.keys import DigestSink
from carnice_build.planning.explain import FactsSink
from carnice_build.tensors import SourceTensor

AFFINE = {"bits": 4, "group_size": 64, "dtype": "BF16", "nonfinite": "refuse"}
DIGEST = "0" * 64


def action(op: Op, params: Mapping[str, Any], *specs: TensorSpec) -> Action:
    """The op on sources of these types and shapes, a weight if none are given."""
    sources = [
        SourceTensor(f"tensor {index}", spec, None, index)
        for index, spec in enumerate(specs or [TensorSpec("BF16", (8, 128))])
    ]
    refs = [TensorRef(source.spec, source) for source in sources]
    (made, *_) = ActionGraph().add(op, params, *refs)
    assert isinstance(made.origin, ActionOutput)
    return made.origin.action


def others(value: Any) -> Iterator[Any]:
    """Values that differ from this one in one place, however deep; one for each place."""
    if isinstance(value, Mapping):
        yield {**value, "another": 0}
        for name, item in value.items():
            yield from ({**value, name: other} for other in others(item))
    elif isinstance(value, list | tuple):
        yield [*value, "another"]
        for index, item in enumerate(value):
            yield from ([*value[:index], other, *value[index + 1 :]] for other in others(item))
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
    else:
        yield f"{value} and more"


@each(OPS)
def test_every_parameter_is_in_the_key(sample: OpSample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing any parameter of any op, or a value inside it, changes the key and the identity."""
    specs, digests = sample.specs, [DIGEST] * len(sample.specs)
    outputs = sample.op.infer(sample.params, specs)
    # Whether the op can work with the other value does not matter here.
    monkeypatch.setattr(type(sample.op), "infer", lambda *_: outputs)
    variants = [sample.params, *others(sample.params)]
    made = [action(sample.op, params, *specs) for params in variants]

    assert len(variants) > len(sample.params)
    assert len(variants) == len({item.key(digests) for item in made})
    assert len(variants) == len({item.identity for item in made})


@each(OPS)
def test_every_input_is_in_the_key(sample: OpSample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bytes, another type or another shape of the same bytes of any input: another key."""
    specs = sample.specs
    outputs = sample.op.infer(sample.params, specs)
    monkeypatch.setattr(type(sample.op), "infer", lambda *_: outputs)
    found = {action(sample.op, sample.params, *specs).key([DIGEST] * len(specs))}
    for index, spec in enumerate(specs):
        digests = [DIGEST] * len(specs)
        for other in (TensorSpec("U16", spec.shape), TensorSpec(spec.dtype, (*spec.shape, 1))):
            changed = [*specs[:index], other, *specs[index + 1 :]]
            found.add(action(sample.op, sample.params, *changed).key(digests))
        digests[index] = "1" * 64
        found.add(action(sample.op, sample.params, *specs).key(digests))

    assert len(found) == 1 + 3 * len(specs)


def updated(library: str) -> Callable[[str], str]:
    """The versions of all libraries, where this one has another."""
    real = keys.library_version
    return lambda name: "another" if name == library else real(name)


@each(OPS)
def test_versions_are_in_the_key(sample: OpSample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the op, or of any library whose code makes the bytes: another key."""
    op, specs = sample.op, sample.specs
    digests = [DIGEST] * len(specs)
    found = {action(op, sample.params, *specs).key(digests)}
    for library in op.libraries:
        with monkeypatch.context() as patch:
            patch.setattr(keys, "library_version", updated(library))
            found.add(action(op, sample.params, *specs).key(digests))
    # What is made of another op has its version, which is no fact of the class.
    owner = op if isinstance(op, Stacked) else type(op)
    monkeypatch.setattr(owner, "version", op.version + 1)
    found.add(action(op, sample.params, *specs).key(digests))

    assert len(found) == 2 + len(op.libraries)


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


def test_the_version_of_stacking_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside that of the op which is applied to each weight of a stack."""
    before = Stacked(RowQuantize()).version
    monkeypatch.setattr(Stacked, "version", Stacked.version + 1)

    assert before + 1 == Stacked(RowQuantize()).version


def test_an_absent_library_has_a_version_too() -> None:
    """A library that is not installed is named so, and planning goes on."""
    assert keys.library_version("no-such-distribution") == "absent"
