"""Measure builds of 27B-shaped checkpoints against `mlx_lm.convert`, in turn, on one machine.

    python -m benchmarks.run [--layers 4 8] [--repeat 2]

Only ratios mean anything: machines differ by more than any change here is worth.
Both sides read from a warm page cache, ours starts from an empty cache of its own, and every
time is wall clock of a whole process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import make_checkpoint
from carnice_build.system import peak_bytes

ROOT = Path(__file__).parent.parent
WORK = ROOT / "benchmarks" / "work"
VARIANTS = ("mlx-4bit", "mlx-mixed_3_6", "mlx-6bit")
ONE_KNOB = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}'


@dataclass(frozen=True)
class Run:
    """One finished process: seconds of wall clock, peak RSS in bytes, what it printed.

    `processor` is its seconds of processor time, of which other work on the machine takes none.
    """

    seconds: float
    peak: int
    output: str
    processor: float


def run(command: Sequence[str]) -> Run:
    """Run a command from the project's folder; CalledProcessError when it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if code := os.waitstatus_to_exitcode(status):
        raise subprocess.CalledProcessError(code, command)
    return Run(seconds, peak_bytes(usage), output, usage.ru_utime + usage.ru_stime)


def carnice(command: str, variants: Sequence[str], source: Path, *more: str) -> Run:
    """`carnice COMMAND` on a bench checkpoint, with the bench's own cache."""
    arguments = [command, *variants, "--source", f"body={source}", "--cache", str(WORK / "cache")]
    out = ["--out", str(WORK / "build")] if command == "build" else []
    return run([sys.executable, "-m", "carnice_build", *arguments, *out, *more])


def convert(source: Path) -> Run:
    """`mlx_lm.convert -q --q-bits 4` of a bench checkpoint."""
    target = WORK / "converted"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source)]
    result = run([*command, "--mlx-path", str(target), "-q", "--q-bits", "4"])
    shutil.rmtree(target)
    return result


def start_over() -> None:
    """Empty the bench's cache and outputs."""
    for name in ("cache", "build"):
        shutil.rmtree(WORK / name, ignore_errors=True)


def warm(folder: Path) -> None:
    """Bring a checkpoint into the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def fresh_build(source: Path, variants: Sequence[str]) -> Run:
    """Build into an empty cache."""
    start_over()
    return carnice("build", variants, source, "--json")


def best(runs: Sequence[Run]) -> Run:
    """The fastest run: the others met something else on the machine."""
    return min(runs, key=lambda item: item.seconds)


class Report:
    """Rows of figures, printed as one table at the end."""

    def __init__(self) -> None:
        self._table = Table(title="carnice-build against mlx_lm.convert")
        for heading in ("what", "ours", "reference", "ratio", "goal"):
            self._table.add_column(heading)

    def row(
        self, what: str, ours: str, reference: str = "", ratio: str = "", goal: str = ""
    ) -> None:
        """Add a row."""
        self._table.add_row(what, ours, reference, ratio, goal)

    def show(self) -> None:
        """Print the table."""
        Console(width=110).print(self._table)


def compare_conversion(report: Report, sources: dict[int, Path], repeat: int) -> None:
    """Whole conversions at each size, and the slope between the two sizes."""
    ours: dict[int, Run] = {}
    theirs: dict[int, Run] = {}
    for layers, source in sources.items():
        warm(source)
        pairs = [(fresh_build(source, VARIANTS[:1]), convert(source)) for _ in range(repeat)]
        ours[layers] = best([pair[0] for pair in pairs])
        theirs[layers] = best([pair[1] for pair in pairs])
        mine, other = ours[layers], theirs[layers]
        report.row(
            f"mlx-4bit, {layers} layers",
            f"{mine.seconds:.2f} s",
            f"{other.seconds:.2f} s",
            f"{other.seconds / mine.seconds:.1f}x",
            "4x" if layers == min(sources) else "",
        )
        report.row(
            f"peak RSS, {layers} layers",
            f"{mine.peak / 1e9:.2f} GB",
            f"{other.peak / 1e9:.2f} GB",
            f"{other.peak / mine.peak:.1f}x",
            "under 1.5 GB",
        )
    if len(sources) > 1:
        small, large = min(sources), max(sources)
        mine = ours[large].seconds - ours[small].seconds
        other = theirs[large].seconds - theirs[small].seconds
        report.row(
            f"slope, {small} to {large} layers",
            f"{mine:.2f} s",
            f"{other:.2f} s",
            f"{other / mine:.1f}x",
            "5x",
        )


def compare_reuse(report: Report, source: Path) -> None:
    """What is not done twice."""
    one = fresh_build(source, VARIANTS[:1])
    output = sum(path.stat().st_size for path in (WORK / "build").rglob("*") if path.is_file())
    used = _disk(WORK / "cache", WORK / "build")
    report.row(
        "disk of cache and build",
        f"{used / 1e9:.3f} GB",
        f"{output / 1e9:.3f} GB output",
        f"{used / output:.3f}",
        "at most 1.05",
    )
    three = fresh_build(source, VARIANTS)
    report.row(
        "three variants in one build",
        f"{three.seconds:.2f} s",
        f"{one.seconds:.2f} s for one",
        f"{three.seconds / one.seconds:.2f}",
        "well under 3",
    )
    noop = best([carnice("build", VARIANTS, source, "--json") for _ in range(3)])
    report.row("no-op build of the three", f"{noop.seconds:.2f} s", goal="under 0.6 s")
    inodes = _inodes(WORK / "build" / VARIANTS[0])
    knob = json.loads(carnice("build", VARIANTS[:1], source, "--json", "--set", ONE_KNOB).output)
    changed = len(_inodes(WORK / "build" / VARIANTS[0]) - inodes)
    report.row("one knob", f"{knob['actions_run']} action run, {changed} shard new", goal="1 and 1")
    start_over()
    for variant in ("mlx-4bit", "mlx-6bit"):
        carnice("build", [variant], source)
    mixed = json.loads(carnice("build", ["mlx-mixed_3_6"], source, "--json").output)
    plan = json.loads(carnice("plan", ["mlx-mixed_3_6"], source, "--json").output)
    three_bit = _modules(plan, bits=3)
    report.row(
        "mixed_3_6 after 4bit and 6bit",
        f"{mixed['actions_run']} actions run",
        f"{three_bit} 3-bit modules",
        goal="equal",
    )


def compare_planning(report: Report) -> None:
    """A plan of the full-size model."""
    command = [sys.executable, "-m", "carnice_build", "plan", *VARIANTS, "--profile", "shapes"]
    plan = best([run([*command, "--cache", str(WORK / "cache")]) for _ in range(3)])
    report.row("plan of the three at full size", f"{plan.seconds:.2f} s", goal="under 0.6 s")


def _disk(*folders: Path) -> int:
    listed = subprocess.run(
        ["du", "-sc", "--block-size=1", *map(str, folders)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(listed.stdout.splitlines()[-1].split()[0])


def _inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


def _modules(plan: dict[str, object], bits: int) -> int:
    (variant,) = plan["variants"]  # type: ignore[misc]
    tensors = variant["tensors"]
    return sum(
        1
        for name, item in tensors.items()
        if name.endswith(".weight")
        and (scales := tensors.get(name.removesuffix("weight") + "scales"))
        and 32 * item["shape"][1] == bits * 64 * scales["shape"][1]
    )


def main() -> None:
    """Make the checkpoints, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeat", type=int, default=2)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    sources = {layers: make_checkpoint(layers=layers) for layers in arguments.layers}
    # The very first build compiles the kernels; that is not what is measured.
    fresh_build(sources[min(sources)], VARIANTS[:1])
    report = Report()
    compare_conversion(report, sources, arguments.repeat)
    compare_reuse(report, sources[min(sources)])
    compare_planning(report)
    report.show()
    start_over()


if __name__ == "__main__":
    main()
