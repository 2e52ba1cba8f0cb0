"""Figures that published model cards state, as tests of the planner."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from carnice_build.checkpoint.checkpoint import open_checkpoint
from carnice_build.checkpoint.shapes import expanded
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.models import architecture_of
from carnice_build.planning.planner import VariantPlan

SHAPES = REPOSITORY / "benchmarks" / "shapes"


def plan(variant: str, **changes: object) -> VariantPlan:
    options = Options(recipes=REPOSITORY / "recipes", profile="shapes", **changes)  # type: ignore[arg-type]
    return plan_variants([variant], options).variants[0]


@pytest.mark.parametrize(
    ("variant", "bits", "gigabytes", "card_gib"),
    [
        ("mlx-4bit", 4.501, 15.13, 14),
        ("mlx-mixed_3_6", 3.966, 13.33, 12),
        ("mlx-6bit", 6.501, 21.86, 20),
    ],
)
def test_sizes_are_those_of_the_cards(
    variant: str, bits: float, gigabytes: float, card_gib: int
) -> None:
    """Bits per weight and size on disk of each MLX variant at full size."""
    planned = plan(variant)

    assert round(planned.bits_per_weight, 3) == bits
    assert round(planned.weights_bytes / 1e9, 2) == gigabytes
    assert int(planned.weights_bytes / 2**30) == card_gib


def test_the_source_is_as_published() -> None:
    """Carnice: 1,184 tensors and 54.7 GB, of which the vision tower 333 and 0.92 GB."""
    tensors = plan("mlx-4bit").body.tensors
    vision = [item for name, item in tensors.items() if ".visual." in name]

    assert len(tensors) == 1184
    assert round(sum(item.spec.nbytes for item in tensors.values()) / 1e9, 1) == 54.7
    assert len(vision) == 333
    assert round(sum(item.spec.nbytes for item in vision) / 1e9, 2) == 0.92


@pytest.mark.parametrize(
    ("name", "tensors", "size"),
    [
        ("qwen3-235b-a22b", 36_945, 470_187_269_120),
        ("gpt-oss-120b", 687, 65_248_815_744),
        ("kimi-k2", 139_644, 1_029_173_256_720),
        ("qwen3.6-35b-a3b", 1_045, 2 * 35_951_822_704),
        ("gemma-4-31b", 1_188, 2 * 31_273_088_876),
    ],
)
def test_shape_files_are_as_large_as_the_published_indexes(
    name: str, tensors: int, size: int
) -> None:
    """Tensors, and the bytes of all, by what an index or the hub states."""
    found = open_checkpoint(SHAPES / f"{name}.json").tensors.values()

    assert len(found) == tensors
    assert sum(tensor.spec.nbytes for tensor in found) == size


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek-v3", {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}),
        ("glm-4.6", {"BF16": 356_785_884_416, "F32": 14_400}),
    ],
)
def test_shape_files_hold_the_elements_that_the_hub_counts(
    name: str, elements: dict[str, int]
) -> None:
    """Elements by type; of GLM-4.6 the hub is known to count 356,785,898,816 in all."""
    found: Counter[str] = Counter()
    for tensor in open_checkpoint(SHAPES / f"{name}.json").tensors.values():
        found[tensor.spec.dtype] += tensor.spec.size

    assert found == elements


def test_shape_files_of_large_models_are_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody edited a file of names and ranges by hand."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks.make_shapes import LARGE, render

    made = {large.file: render(large.model, *large.make(), version=2) for large in LARGE}

    assert made == {file: (SHAPES / file).read_text() for file in made}
    assert len(made) == 7


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A range as a shape file has it, and its numbers."""
    found = sorted(draw(st.sets(st.integers(0, 400), min_size=1, max_size=12)))
    runs, last = [f"{found[0]}"], found[0]
    for number in found[1:]:
        # A run may be written as one, or as its parts.
        if number == last + 1 and draw(st.booleans()):
            runs[-1] = f"{runs[-1].partition('-')[0]}-{number}"
        else:
            runs.append(f"{number}")
        last = number
    return f"[{','.join(runs)}]", found


@given(ranges(), ranges(), st.text("abc.-,0123", max_size=5))
def test_a_range_stands_for_its_numbers(
    one: tuple[str, list[int]], other: tuple[str, list[int]], between: str
) -> None:
    """Every pair of numbers once, those of the last range first, and the longest name last."""
    names = expanded("here", f"a{one[0]}{between}{other[0]}z")

    assert names == [f"a{i}{between}{j}z" for i in one[1] for j in other[1]]
    assert max(map(len, names)) == len(names[-1])


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("qwen3.6-35b-a3b", ""),
        ("qwen3-235b-a22b", ""),
        ("glm-4.6", ""),
        ("gemma-4-31b", ""),
        ("deepseek-v3", "{decode: {}}"),
        ("kimi-k2", "{drop: {match: '*.inv_freq'}}, {decode: {}}"),
    ],
)
def test_large_models_are_planned_tensor_by_tensor(tmp_path: Path, name: str, steps: str) -> None:
    """The tables know every tensor of the published checkpoints, and miss none."""
    recipe = tmp_path / "recipes" / "large.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "variant: large\ndescription: a large model\nsources: {body: {model: it/self}}\n"
        f"steps: [{steps}]\nquantize: {{format: compressed-tensors, scheme: FP8_DYNAMIC}}\n"
    )
    (recipe.parent / "_profiles.yaml").write_text("demo: hub\n")
    body = SHAPES / f"{name}.json"
    options = Options(recipes=recipe.parent, sources={"body": body})
    planned = plan_variants(["large"], options).variants[0]
    ends = ("_scale_inv", ".inv_freq")
    counted = (
        tensor.spec.size
        for tensor in planned.body.tensors.values()
        if not tensor.name.endswith(ends)
    )

    assert planned.conversion.parameters == sum(counted)


@pytest.mark.parametrize(("name", "count"), [("qwen3.6-27b", 1199), ("qwen3.6-40b-deckard", 1623)])
def test_the_table_derives_every_tensor_from_the_config(name: str, count: int) -> None:
    """Names and shapes of the architecture table are those that transformers makes."""
    checkpoint = open_checkpoint(SHAPES / f"{name}.json")
    table = architecture_of(checkpoint.config, name).tensors

    assert {fact.name: fact.shape for fact in table.values()} == {
        tensor.name: tensor.spec.shape for tensor in checkpoint.tensors.values()
    }
    assert len(table) == count


def test_a_checkpoint_of_another_size_needs_no_edit(tiny_checkpoint: object) -> None:
    """Counts that a recipe states for one profile are derived for any other checkpoint."""
    folder: Path = tiny_checkpoint(prefix=True, mtp=False)  # type: ignore[operator]
    planned = plan("mlx-mixed_3_6", sources={"body": folder})

    assert len(planned.body.tensors) < 1184


def test_shards_do_not_depend_on_bits() -> None:
    """The same modules share a shard in every variant."""
    shards = [
        [sorted({slot.tensor.fact.name for slot in pack.slots}) for pack in plan(name).packs]
        for name in ("mlx-4bit", "mlx-mixed_2_6", "mlx-6bit")
    ]

    assert shards[0] == shards[1] == shards[2]


def test_no_shard_is_larger_than_the_recipe_allows() -> None:
    """`package.shard` bounds what the modules of a shard weigh."""
    planned = plan("mlx-6bit", overrides=("package.shard=2GB",))

    assert max(pack.size for pack in planned.packs) < 2e9
    assert len(planned.packs) > 30
