"""Measure the memory of a calibration in the shapes of Qwen3.6-27B, one decoder layer of each kind.

    python -m benchmarks.calibration [--lengths 1024 4096 8192] [--samples 1] [--build 8192]
    python -m benchmarks.calibration --set attention=eager dtype=float32

Every layer runs over its samples in a process of its own, so that one peak cannot hide another;
what the libraries take is measured before the first sample and counted apart.
`--build` then calibrates and builds the whole checkpoint at that length, and reports the peaks
that the build's main process and its worker had.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.checkpoints import DEMO, ROOT, WORK, make_checkpoint, to_bf16
from carnice_build.calibration.passes import Forward
from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.execute.events import Event, Stepped
from carnice_build.graph import Action
from carnice_build.system import peak_memory
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor

VARIANT = "qwen-nvfp4-text-mtp"
DATASET = WORK / "calibration.jsonl"
CHARACTERS_PER_TOKEN = 8
"""More than the demo's tokenizer has, so that every sample reaches its length."""

MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Peak:
    """Most bytes of RSS before the work, and in all; wall clock of the work."""

    libraries: int
    most: int
    seconds: float

    @property
    def work(self) -> int:
        """What the work took beyond the libraries."""
        return self.most - self.libraries


def write_dataset(samples: int, length: int) -> None:
    """Rows of the demo's calibration text, repeated until each has `length` tokens."""
    lines = (DEMO.parent / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
    text, more = "", cycle(turns)
    while len(text) < CHARACTERS_PER_TOKEN * length:
        text += next(more) + "\n"
    DATASET.write_text((json.dumps({"text": text}) + "\n") * samples, encoding="utf-8")


@dataclass(frozen=True)
class Setting:
    """What is calibrated, on how much; `more` are further entries of `calibration`."""

    source: Path
    samples: int
    length: int
    more: Sequence[str] = ()


def options(setting: Setting) -> Options:
    """A build of the bench checkpoint with caches of its own."""
    entries = (
        f"dataset={DATASET.relative_to(ROOT)}",
        f"samples={setting.samples}",
        f"length={setting.length}",
        *setting.more,
    )
    return Options(
        recipes=ROOT / "recipes",
        out=WORK / "calibration-build",
        cache=WORK / "calibration-cache",
        sources={"body": setting.source},
        overrides=("steps=[]", *(f"calibration.{entry}" for entry in entries)),
    )


def forward_actions(setting: Setting) -> dict[str, Action]:
    """The first layer of each kind."""
    write_dataset(setting.samples, setting.length)
    graph = plan_variants([VARIANT], options(setting)).graph
    found: dict[str, Action] = {}
    for action in graph:
        if isinstance(action.op, Forward):
            kinds = action.params["config"]["layer_types"]
            kind = kinds[action.params["layer"]].removesuffix("_attention")
            found.setdefault(kind, action)
    return found


def measure_layer(action: Action) -> Peak:
    """Run one layer on random hidden states, in a new process."""
    with (
        TemporaryDirectory(dir=WORK) as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        inputs = [_input(Path(folder), index, ref) for index, ref in enumerate(action.inputs)]
        outputs = [
            _zeros(Path(folder) / f"out-{index}", spec) for index, spec in enumerate(action.outputs)
        ]
        return pool.submit(_run, dict(action.params), inputs, outputs).result()


def _input(folder: Path, index: int, ref: Any) -> TensorFile:
    """A weight where it lies, or a file of tokens or of hidden states."""
    if isinstance(ref.origin, SourceTensor):
        assert ref.origin.file is not None
        return TensorFile(ref.spec, ref.origin.file.name, ref.origin.offset, ref.origin.name)
    file = _zeros(folder / f"in-{index}", ref.spec)
    if ref.spec.dtype in ("BF16", "F32"):
        values = np.random.default_rng(0).standard_normal(ref.spec.shape[1:], np.float32)
        for row in range(ref.spec.shape[0]):
            file.write_row(row, to_bf16(values) if ref.spec.dtype == "BF16" else values)
    return file


def _zeros(path: Path, spec: TensorSpec) -> TensorFile:
    with path.open("xb") as file:
        file.truncate(spec.nbytes)
    return TensorFile(spec, str(path))


def _run(
    params: dict[str, Any], inputs: Sequence[TensorFile], outputs: Sequence[TensorFile]
) -> Peak:
    import carnice_build.calibration.layer_pass  # noqa: F401

    libraries, start = _peak(), time.perf_counter()
    Forward().run(params, inputs, outputs, lambda: None)
    return Peak(libraries, _peak(), time.perf_counter() - start)


def _peak() -> int:
    """Most RSS of this process; Linux counts that of the parent before `exec` into `getrusage`."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return peak_memory()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def compare_layers(setting: Setting) -> None:
    """A line for each kind of layer."""
    for kind, action in forward_actions(setting).items():
        specs = [ref.spec for ref in action.inputs]
        assert isinstance(action.op, Forward)
        promised = action.op.memory(action.params, specs)
        peak = measure_layer(action)
        figures = (
            f"{setting.length:6}",
            f"{kind:6}",
            f"{peak.libraries / MB:9.0f}",
            f"{sum(spec.nbytes for spec in specs[2:]) / MB:7.0f}",
            f"{peak.work / MB:5.0f}",
            f"{promised / MB:8.0f}",
            f"{promised / peak.work:5.2f}",
            f"{peak.seconds / setting.samples:8.1f}",
        )
        print("  ".join(figures), flush=True)


def measure_build(setting: Setting) -> None:
    """The peaks of a whole build."""
    write_dataset(setting.samples, setting.length)
    steps: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stepped):
            steps.append(event.memory)

    wanted = options(setting)
    clean(wanted)
    report = build_variants([VARIANT], wanted, listen)
    size = sum(path.stat().st_size for path in setting.source.glob("*.safetensors"))
    print(f"build of {size / MB:.0f} MB with {setting.samples} samples of {setting.length} tokens:")
    print(f"  {report.seconds:.0f} s, main process {_peak() / MB:.0f} MB, worker", end=" ")
    print(f"{max(steps) / MB:.0f} MB")
    clean(wanted)


def clean(wanted: Options) -> None:
    """Remove what a build left."""
    for folder in (wanted.cache, wanted.out):
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure and print; the checkpoint stays for the next time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--build", type=int, metavar="LENGTH", help="build at this length, too")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="more")
    arguments = parser.parse_args()
    source, samples, more = make_checkpoint(), arguments.samples, arguments.more
    print("length  kind    libraries  weights   work  promised  ratio  s/sample  (sizes in MB)")
    for length in arguments.lengths:
        compare_layers(Setting(source, samples, length, more))
    if arguments.build:
        measure_build(Setting(source, samples, arguments.build, more))
    DATASET.unlink()


if __name__ == "__main__":
    main()
