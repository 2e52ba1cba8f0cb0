"""What every op must do, whichever it is; `samples.OPS` says what each is tried on."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, is_dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from samples import OPS, OpSample, each

from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import ITEM_SIZE, NUMPY_NAME, TensorSpec
from carnice_build.formats.registry import FORMATS
from carnice_build.graph import ArrayOp, BadInput, NonFiniteValue, Op, ProcessOp, TensorData
from carnice_build.keys import library_version
from carnice_build.recipe.loader import list_recipes
from carnice_build.steps.registry import STEPS
from carnice_build.tensor_file import TensorFile

PACKAGE = REPOSITORY / "carnice_build"
ACCELERATORS = {"flash-linear-attention", "causal-conv1d"}
"""Distributions that change bytes where somebody has them, and that nothing of ours asks for."""


ON_ARRAYS = [sample for sample in OPS if isinstance(sample.op, ArrayOp)]
ON_FILES = [sample for sample in OPS if isinstance(sample.op, ProcessOp)]
IN_ROWS = [
    sample
    for sample in ON_ARRAYS
    if isinstance(sample.op, ArrayOp) and (sample.op.rowwise or sample.op.transposed)
]


# --- which ops there are -------------------------------------------------------------------------


def every_op() -> list[type[Op]]:
    """The ops of the package, wherever in it they are defined."""
    assert len(FORMATS) + len(STEPS), "importing the registries brings what formats and steps use"
    for path in PACKAGE.rglob("*.py"):
        if re.search(r"^class \w+\(.*\b\w*Op\b.*\):", path.read_text(), re.MULTILINE):
            module = path.relative_to(REPOSITORY).with_suffix("")
            importlib.import_module(".".join(module.parts))
    return [
        op
        for op in _below(Op)
        if op.__module__.startswith("carnice_build.") and not inspect.isabstract(op)
    ]


def _below(kind: type[Op]) -> Iterator[type[Op]]:
    for op in kind.__subclasses__():
        yield op
        yield from _below(op)


def test_every_op_has_a_sample() -> None:
    """What the tests below say of all ops, they try on each of them."""
    lacking = {op.__name__ for op in every_op()} - {type(sample.op).__name__ for sample in OPS}

    assert not lacking, (
        f"add to OPS in tests/samples.py an OpSample of {', '.join(sorted(lacking))}, with all its "
        "parameters and small inputs"
    )


def test_every_op_has_a_name_of_its_own() -> None:
    """Two ops of one name and version would find each other's results in the cache."""
    names = [op.name for op in every_op()]

    assert sorted(set(names)) == sorted(names)
    assert all(re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", name) for name in names)


def test_every_op_has_a_version_that_can_rise() -> None:
    """A version is a whole number from 1 on."""
    assert [] == [op.name for op in every_op() if type(op.version) is not int or op.version < 1]


def test_libraries_are_distributions_that_can_be_installed() -> None:
    """A name with a slip in it would be `absent` for ever, and its updates change no key."""
    pins = (REPOSITORY / "constraints.txt").read_text().lower()
    known = set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)) | ACCELERATORS
    unknown = {op.name: set(op.libraries) - known for op in every_op()}

    assert {} == {name: names for name, names in unknown.items() if names}


def test_samples_have_every_parameter_that_plans_give() -> None:
    """A parameter that some recipe's plan gives an op is one that its samples are tried with."""
    options = Options(recipes=REPOSITORY / "recipes", profile="shapes")
    names = [path.stem for path in list_recipes(options.recipes)]
    known: dict[str, set[str]] = {}
    for sample in OPS:
        known.setdefault(sample.op.name, set()).update(sample.params)
    lacking = {
        f"{action.op.name}: {name}"
        for action in plan_variants(names, options).graph
        for name in set(action.params) - known[action.op.name]
        if action.op.name in known
    }

    assert not lacking, f"add these parameters in tests/samples.py: {sorted(lacking)}"


@each(OPS)
def test_what_an_op_says_of_its_outputs_fits_them(sample: OpSample) -> None:
    """Figures and transient outputs are numbers of outputs, and figures are a few numbers."""
    outputs = sample.op.infer(sample.params, sample.specs)
    transient = sample.op.transient if isinstance(sample.op, ProcessOp) else frozenset()

    assert set(range(len(outputs))) >= sample.op.figures | transient
    assert not sample.op.figures & transient
    for index in sample.op.figures:
        assert outputs[index].dtype in ("F32", "I64")
        assert outputs[index].size < 100


@each(OPS)
def test_an_op_keeps_nothing_to_itself_that_makes_bytes(sample: OpSample) -> None:
    """What the key does not cover, an op may know only where its sample says that it may."""
    held = {item.name for item in fields(sample.op)} if is_dataclass(sample.op) else set()

    assert sample.outside_key == held | set(vars(sample.op))


# --- ops on arrays -------------------------------------------------------------------------------

GUARD = 64
"""Bytes before and behind an output, which nobody may write."""


class Room:
    """Memory for the outputs of `specs`, filled with one byte, and guarded on both sides."""

    def __init__(self, specs: Sequence[TensorSpec], fill: int) -> None:
        self._fill = fill
        self._memory = [np.full(spec.nbytes + 2 * GUARD, fill, np.uint8) for spec in specs]
        self.outputs = [
            TensorData(
                spec.dtype,
                memory[GUARD : GUARD + spec.nbytes]
                .view(NUMPY_NAME[spec.dtype])
                .reshape(spec.shape),
            )
            for spec, memory in zip(specs, self._memory, strict=True)
        ]

    def content(self) -> list[bytes]:
        """The outputs' bytes, once nothing beside them was written."""
        for memory in self._memory:
            assert (memory[:GUARD] == self._fill).all()
            assert (memory[-GUARD:] == self._fill).all()
        return [memory[GUARD:-GUARD].tobytes() for memory in self._memory]


def applied(
    sample: OpSample, inputs: Sequence[TensorData] | None = None, fill: int = 0xA5
) -> list[bytes]:
    """The bytes of the outputs."""
    assert isinstance(sample.op, ArrayOp)
    room = Room(sample.op.infer(sample.params, sample.specs), fill)
    sample.op.apply(sample.params, inputs or sample.inputs(), room.outputs)
    return room.content()


@each(ON_ARRAYS)
def test_what_is_inferred_is_what_is_filled(sample: OpSample) -> None:
    """An op writes every byte of its outputs, whatever was there before, and none beside them."""
    assert applied(sample, fill=0xA5) == applied(sample, fill=0x5A)


@each(ON_ARRAYS)
def test_inputs_stay_as_they_are(sample: OpSample) -> None:
    """Other actions read the same arrays, and their digests were taken before."""
    inputs = sample.inputs()
    before = [item.array.tobytes() for item in inputs]
    applied(sample, inputs)

    assert before == [item.array.tobytes() for item in inputs]


@each(ON_ARRAYS)
def test_equal_inputs_give_equal_bytes(sample: OpSample) -> None:
    """Nothing but the inputs decides what comes out."""
    assert applied(sample) == applied(sample)


@each(ON_ARRAYS)
def test_what_passes_fits_its_place(sample: OpSample) -> None:
    """What an op passes on, where digests alone tell what comes out, has the output's type."""
    assert isinstance(sample.op, ArrayOp)
    specs = sample.specs
    outputs = sample.op.infer(sample.params, specs)
    # Inputs of one type and shape are equal, any others are not.
    passed = sample.op.passes([str(spec) for spec in specs])
    given = [None] * len(outputs) if passed is None else list(passed)

    assert len(outputs) == len(given)
    assert [] == [
        i for i, item in enumerate(given) if item is not None and specs[item] != outputs[i]
    ]


def cuts(rows: int) -> list[list[int]]:
    """Ways to cut that many rows: one by one, in blocks that divide nothing, at both ends."""
    return [list(range(1, rows)), list(range(3, rows, 3)), list(range(7, rows, 7)), [1, rows - 1]]


@each(IN_ROWS)
def test_any_split_by_rows_gives_the_same_bytes(sample: OpSample) -> None:
    """Rows that come a block at a time, of whatever size, make what the whole tensor makes."""
    expected = applied(sample)
    rows = sample.specs[0].shape[0]

    for cut in cuts(rows):
        assert expected == in_blocks(sample, [0, *cut, rows])


def in_blocks(sample: OpSample, edges: Sequence[int]) -> list[bytes]:
    """The bytes of the outputs, of rows that come in blocks, as `execute.streaming` gives them."""
    assert isinstance(sample.op, ArrayOp)
    (whole,) = sample.inputs()
    room = Room(sample.op.infer(sample.params, sample.specs), 0xA5)
    for first, end in pairwise(edges):
        block = TensorData(whole.dtype, whole.array[first:end].copy())
        if sample.op.transposed:
            sample.op.apply_rows(sample.params, first, block, room.outputs)
        else:
            rows = [TensorData(out.dtype, out.array[first:end]) for out in room.outputs]
            sample.op.apply(sample.params, [block], rows)
    return room.content()


@each(IN_ROWS)
def test_ops_on_rows_have_outputs_that_fit(sample: OpSample) -> None:
    """One input; as many rows in every output when rows stand for themselves; never both ways."""
    assert isinstance(sample.op, ArrayOp)
    (spec,) = sample.specs
    outputs = sample.op.infer(sample.params, [spec])

    assert not (sample.op.rowwise and sample.op.transposed)
    if sample.op.rowwise:
        assert {spec.shape[0]} == {output.shape[0] for output in outputs}


# --- values that nobody expects ------------------------------------------------------------------

FLOATS = {"F32": (8, 23), "F16": (5, 10), "BF16": (8, 7), "F64": (11, 52)}
"""Bits of exponent and mantissa."""


def patterns(dtype: str) -> dict[str, int]:
    """Odd values of a type of floats, as bits."""
    exponent, mantissa = FLOATS[dtype]
    sign = 1 << (exponent + mantissa)
    infinity = ((1 << exponent) - 1) << mantissa
    return {
        "nan": infinity | 1 << (mantissa - 1),
        "signalling nan": infinity | 1,
        "negative nan": sign | infinity | 1,
        "infinity": infinity,
        "-infinity": sign | infinity,
        "zero": 0,
        "-0": sign,
        "denormal": 1,
        "-denormal": sign | 1,
        "largest denormal": (1 << mantissa) - 1,
        "largest": infinity - 1,
        "-largest": sign | (infinity - 1),
    }


NOT_FINITE = ("nan", "signalling nan", "negative nan", "infinity", "-infinity")
FINITE = tuple(name for name in patterns("F32") if name not in NOT_FINITE)


def changed(
    sample: OpSample, operand: int, pattern: str, indices: slice | int = slice(None)
) -> list[TensorData]:
    """The inputs, with a value put into one of them at these places."""
    inputs = list(sample.inputs())
    target = inputs[operand]
    array = target.array.copy()
    bits = f"u{ITEM_SIZE[target.dtype]}"
    array.reshape(-1).view(bits)[indices] = patterns(target.dtype)[pattern]
    inputs[operand] = TensorData(target.dtype, array)
    return inputs


def floats(sample: OpSample) -> list[int]:
    """The inputs that are floats, by their number."""
    return [index for index, spec in enumerate(sample.specs) if spec.dtype in FLOATS]


@each(ON_ARRAYS)
@pytest.mark.parametrize("pattern", NOT_FINITE)
def test_what_is_not_finite_is_refused_where_it_is(sample: OpSample, pattern: str) -> None:
    """NaN and infinity name their input and their place in it, or are zeros where that is asked."""
    for operand in floats(sample):
        for index in {0, sample.specs[operand].size // 2, sample.specs[operand].size - 1}:
            inputs = changed(sample, operand, pattern, index)
            if sample.params.get("nonfinite") == "zero":
                assert applied(sample, changed(sample, operand, "zero", index)) == applied(
                    sample, inputs
                )
                continue
            with pytest.raises((NonFiniteValue, BadInput)) as caught:
                applied(sample, inputs)
            assert operand == caught.value.operand
            if isinstance(caught.value, NonFiniteValue):
                assert index == caught.value.index


@each(ON_ARRAYS)
@pytest.mark.parametrize("pattern", FINITE)
def test_numbers_give_numbers_or_are_refused(sample: OpSample, pattern: str) -> None:
    """Denormals, signed zeros and the largest numbers never become NaN or infinity in silence."""
    specs = sample.op.infer(sample.params, sample.specs)
    for operand in floats(sample):
        for indices in (slice(None), slice(None, None, 2), 0):
            inputs = changed(sample, operand, pattern, indices)
            try:
                found = applied(sample, inputs)
            except (NonFiniteValue, BadInput) as refused:
                assert refused.operand in range(len(inputs))
                continue
            for content, spec in zip(found, specs, strict=True):
                assert is_finite(content, spec.dtype)


def is_finite(content: bytes, dtype: str) -> bool:
    """Whether all of a tensor are numbers; E4M3 has NaN, and no infinity."""
    if dtype == "F8_E4M3":
        return not any(byte & 0x7F == 0x7F for byte in content)
    if dtype not in FLOATS:
        return True
    infinity = patterns(dtype)["infinity"]
    bits = np.frombuffer(content, f"u{ITEM_SIZE[dtype]}")
    return not ((bits & infinity) == infinity).any()


# --- ops on files --------------------------------------------------------------------------------


@each(ON_FILES)
def test_memory_is_what_the_inputs_ask_for(sample: OpSample) -> None:
    """A process op needs some memory, and more for larger inputs unless it reads a part of them."""
    assert isinstance(sample.op, ProcessOp)
    larger = [TensorSpec(spec.dtype, (2 * spec.shape[0], *spec.shape[1:])) for spec in sample.specs]
    small, large = (sample.op.memory(sample.params, specs) for specs in (sample.specs, larger))

    assert 0 < small
    assert large == small if sample.bounded else large > small


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, as the libraries of process ops want it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as processes:
        yield processes


def run(
    op: ProcessOp,
    params: Mapping[str, Any],
    inputs: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
) -> int:
    """Do the op's work, in the process that this is called in; returns its steps."""
    steps: list[None] = []
    op.run(params, inputs, outputs, lambda: steps.append(None))
    return len(steps)


def files(
    folder: Path, name: str, specs: Sequence[TensorSpec], contents: Sequence[bytes]
) -> list[TensorFile]:
    """A file for each tensor."""
    made = []
    for index, (spec, content) in enumerate(zip(specs, contents, strict=True)):
        path = folder / f"{name}-{index}"
        path.write_bytes(content)
        made.append(TensorFile(spec, str(path), 0, f"{name} {index}"))
    return made


@each(ON_FILES)
def test_what_is_inferred_is_what_is_written(
    sample: OpSample, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """An op fills files of the inferred sizes, in as many steps as it said, and reads its inputs
    only."""
    op = sample.op
    assert isinstance(op, ProcessOp)
    for library in set(op.libraries) - ACCELERATORS:
        if library_version(library) == "absent":
            pytest.skip(f"{library} is not installed")
    given = [item.array.tobytes() for item in sample.inputs()]
    specs = op.infer(sample.params, sample.specs)
    inputs = files(tmp_path, "input", sample.specs, given)
    outputs = files(tmp_path, "output", specs, [bytes(spec.nbytes) for spec in specs])
    steps = pool.submit(run, op, sample.params, inputs, outputs).result()
    written = [Path(file.path).read_bytes() for file in outputs]

    assert op.steps(sample.params, sample.specs) == steps
    assert [spec.nbytes for spec in specs] == [len(content) for content in written]
    assert all(any(content) for content in written)
    assert given == [Path(file.path).read_bytes() for file in inputs]
