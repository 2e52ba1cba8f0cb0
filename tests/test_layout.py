"""Shards are valid, aligned, and laid out by modules alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carnice_build.dtypes import ITEM_SIZE, TensorSpec
from carnice_build.formats.base import OutputTensor
from carnice_build.graph import TensorRef
from carnice_build.models.base import Part, Role, TensorFact
from carnice_build.planning.layout import natural_key, pack_layouts
from carnice_build.tensors import SourceTensor

specs = st.builds(
    TensorSpec,
    st.sampled_from(sorted(ITEM_SIZE)),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)


def output(name: str, spec: TensorSpec, fact: TensorFact) -> OutputTensor:
    return OutputTensor(name, TensorRef(spec, SourceTensor(name, spec, None, 0)), fact)


def layer_outputs(layers: int, spec: TensorSpec) -> list[OutputTensor]:
    return [
        output(
            f"layers.{layer}.weight",
            spec,
            TensorFact(f"layers.{layer}.weight", (10, 10), Part.LAYERS, Role.LINEAR, layer),
        )
        for layer in range(layers)
    ]


@given(st.lists(specs, min_size=1, max_size=12))
def test_every_tensor_is_aligned_and_follows_the_last(found: list[TensorSpec]) -> None:
    """Offsets leave no gap, do not overlap, and are multiples of the item size."""
    fact = TensorFact("x.weight", (1,), Part.BODY, Role.NORM)
    tensors = [output(f"t{index}", spec, fact) for index, spec in enumerate(found)]
    (layout,) = pack_layouts(tensors, 10**9, {"format": "test"})
    position = len(layout.header)
    for slot in layout.slots:
        spec = slot.tensor.ref.spec

        assert position == slot.offset
        assert slot.offset % ITEM_SIZE[spec.dtype] == 0
        position += spec.nbytes
    assert position == layout.size


@given(st.integers(1, 40), st.integers(1, 2000))
def test_neighbouring_layers_share_shards_up_to_the_limit(layers: int, limit: int) -> None:
    """Each shard holds consecutive layers, as many as fit in BF16 but at least one."""
    layouts = pack_layouts(layer_outputs(layers, TensorSpec("U8", (3,))), limit, {})
    groups = [[slot.tensor.fact.layer for slot in layout.slots] for layout in layouts]
    most = max(1, limit // 200)

    assert [layer for group in groups for layer in group] == list(range(layers))
    assert all(len(group) == most for group in groups[:-1])


@given(specs.filter(lambda spec: spec.shape), specs.filter(lambda spec: spec.shape))
def test_the_split_does_not_depend_on_sizes(first: TensorSpec, second: TensorSpec) -> None:
    """Other output types and shapes leave every module in its shard."""
    splits = [
        [[slot.tensor.name for slot in layout.slots] for layout in pack_layouts(tensors, 450, {})]
        for tensors in (layer_outputs(9, first), layer_outputs(9, second))
    ]

    assert splits[0] == splits[1]


def test_scalars_of_a_weight_lie_with_the_small_tensors() -> None:
    """A scale of activations can change without the shard of the weights."""
    weights, scales = layer_outputs(3, TensorSpec("U8", (3,))), TensorSpec("F32", ())
    scalars = [output(f"{item.name}_scale", scales, item.fact) for item in weights]
    first, second = pack_layouts([*weights, *scalars], 10**9, {})

    assert {item.name for item in weights} == {slot.tensor.name for slot in first.slots}
    assert {item.name for item in scalars} == {slot.tensor.name for slot in second.slots}


def test_layer_ten_comes_after_layer_nine() -> None:
    """Names sort by the numbers in them."""
    names = ["layers.10.a", "layers.9.b", "layers.9.a", "norm"]

    assert sorted(names, key=natural_key) == ["layers.9.a", "layers.9.b", "layers.10.a", "norm"]
