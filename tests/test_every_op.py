"""What every op must do, whichever it is; `samples.OPS` says what each is tried on."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, is_dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from samples import OPS, OpSample, each

from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.graph import Op, ProcessOp
from carnice_build.keys import library_version
from carnice_build.recipe.loader import list_recipes
from carnice_build.tensor_file import TensorFile

PACKAGE = REPOSITORY / "carnice_build"
ACCELERATORS = {"flash-linear-attention", "causal-conv1d", "mamba-ssm"}
"""Distributions that change bytes where somebody has them, and that nothing of ours asks for."""

ON_FILES = [sample for sample in OPS if isinstance(sample.op, ProcessOp)]

# --- which ops there are -------------------------------------------------------------------------


def every_op() -> list[type[Op]]:
    """The ops of the package, wherever in it they are defined."""
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
        for name in set(action.params) - known.get(action.op.name, set())
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
