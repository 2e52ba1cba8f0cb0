"""Measure plans and builds with nothing to do, of models at full size.

    python -m benchmarks.plan [--only kimi-k2 qwen3-235b-a22b] [--repeat 3] [--phases]

Each shape file is planned as it is, and then as a checkpoint with true headers: shards of 5 GB that
are holes behind their header.
A finished build is made up: the cache's records name packs whose tensors are holes, too, so that
the next build finds all of them and has nothing to do.
Every time is of a whole process, start-up included, and the fastest of some runs: wall clock, and
processor time, which work beside it disturbs less.
Machines differ, so only ratios mean anything.
`--phases` tells where the time of a plan, and of a build with nothing to do, goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.run import Run, best, run
from carnice_build.checkpoint.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from carnice_build.checkpoint.header import encode_header
from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import Plan, plan_and_survey, plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CarniceError
from carnice_build.formats.layout import PackLayout
from carnice_build.store.digests import digest_bytes, digest_texts
from carnice_build.store.records import PackRecord
from carnice_build.store.store import Store
from carnice_build.tensors import SourceTensor

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "benchmarks" / "shapes"
DEMO = ROOT / "demo" / "qwen3.6-27b"
WORK = ROOT / "benchmarks" / "work" / "plan"
SHARD_BYTES = 5_000_000_000
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
VARIANT = "bench"


@dataclass(frozen=True, slots=True)
class Case:
    """A shape file, and the YAML of what is made of it."""

    shapes: str
    steps: str = "[]"
    quantize: str = "{format: compressed-tensors, scheme: FP8_DYNAMIC}"


CASES = (
    Case("qwen3.6-27b"),
    Case("qwen3.6-40b-deckard"),
    Case("gemma-4-31b"),
    Case("qwen3.6-35b-a3b"),
    Case("gpt-oss-120b", steps="[{decode: {}}]"),
    Case("qwen3-235b-a22b"),
    Case("glm-4.6"),
    Case("deepseek-v3", steps="[{decode: {}}]"),
    Case("kimi-k2", steps="[{drop: {match: '*.inv_freq'}}, {decode: {}}]"),
)

PHASES = (
    "open_checkpoint",
    "read_header",
    "architecture_of",
    "apply",
    "gathered",
    "prepare",
    "convert",
    "_check_names",
    "pack_layouts",
    "plan_variants",
    "survey",
    "plan_json",
    "_shard",
    "render_files",
    "is_current",
    "build_variants",
)
"""Functions whose time, with all that they call, `--phases` shows."""


class Project:
    """A folder with a recipe, a checkpoint of holes, a cache and an output."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Start anew at `folder`."""
        shutil.rmtree(folder, ignore_errors=True)
        self.recipes = folder / "recipes"
        self.recipes.mkdir(parents=True)
        self.checkpoint = folder / "checkpoint"
        self.cache = folder / "cache"
        self.out = folder / "build"
        self.shapes = case_path(case)
        (self.recipes / f"{VARIANT}.yaml").write_text(
            f"variant: {VARIANT}\ndescription: a bench\nsources: {{body: {{model: bench/bench}}}}\n"
            f"steps: {case.steps}\nquantize: {case.quantize}\n",
            encoding="utf-8",
        )
        (self.recipes / "_profiles.yaml").write_text("demo: hub\n", encoding="utf-8")

    def options(self, body: Path) -> Options:
        """To plan or build with the source at `body`."""
        return Options(self.recipes, sources={"body": body}, cache=self.cache, out=self.out)

    def run(self, command: str, body: Path, *more: str) -> Run:
        """`carnice COMMAND`, in a process of its own."""
        places = ["--recipes", self.recipes, "--cache", self.cache, "--source", f"body={body}"]
        out = ["--out", self.out] if command == "build" else []
        arguments = [command, VARIANT, *map(str, (*places, *out)), *more]
        return run([sys.executable, "-m", "carnice_build", *arguments])


def case_path(case: Case) -> Path:
    """The shape file of a case."""
    return SHAPES / f"{case.shapes}.json"


def make_holes(shapes: Checkpoint, folder: Path) -> None:
    """A checkpoint folder with these names and shapes; only headers and small files take disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shapes.config), encoding="utf-8")
    for name in SMALL_FILES:
        shutil.copyfile(DEMO / name, folder / name)
    shards = list(split(shapes))
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        header = encode_header(shard.items(), {"format": "pt"})
        write_hole(folder / name, header, sum(spec.nbytes for spec in shard.values()))
    total = sum(tensor.spec.nbytes for tensor in shapes.tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index_file, indent=2), encoding="utf-8")


def split(shapes: Checkpoint) -> Iterator[dict[str, TensorSpec]]:
    """The tensors in shards, in the order of their names."""
    shard: dict[str, TensorSpec] = {}
    size = 0
    for name in sorted(shapes.tensors):
        spec = shapes.tensors[name].spec
        if shard and size + spec.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += spec.nbytes
    yield shard


def write_hole(path: Path, header: bytes, size: int) -> None:
    """A file that begins with `header`; the `size` bytes behind it are a hole."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def make_up(plan: Plan, store: Store) -> None:
    """Let the cache believe that everything in `plan` was built."""
    records = store.records
    with records.together():
        for action in plan.graph:
            digests = []
            for ref in action.inputs:
                digests.append(digest_texts([ref.identity]))
                if isinstance(ref.origin, SourceTensor):
                    records.set_source_digest(ref.identity, digests[-1])
            outputs = [digest_texts([f"{action.identity}|{i}"]) for i in range(len(action.outputs))]
            records.set_outputs(action.key(digests), outputs)
        for variant in plan.variants:
            for layout in variant.packs:
                make_up_pack(layout, store)


def make_up_pack(layout: PackLayout, store: Store) -> None:
    """A finished pack by a layout, whose tensors are holes."""
    digests = []
    for slot in layout.slots:
        ref = slot.tensor.ref
        digests.append(digest_texts([ref.identity]))
        if isinstance(ref.origin, SourceTensor):
            store.records.set_source_digest(ref.identity, digests[-1])
        store.records.set_place(digests[-1], layout.identity, slot.offset)
    pack = digest_texts([digest_bytes(layout.header), *digests])
    path = store.pack_path(pack)
    write_hole(path, layout.header, layout.size - len(layout.header))
    stat = path.stat()
    record = PackRecord(
        stat.st_size, stat.st_mtime_ns, layout.identity, tuple(digests), layout.counts
    )
    store.records.set_pack(pack, record)
    store.records.set_pack_of_layout(layout.identity, pack)


def phases(work: Callable[[], object]) -> dict[str, float]:
    """Seconds in each of PHASES, by a profiler, which makes everything slower."""
    profile = cProfile.Profile()
    profile.runcall(work)
    stats = pstats.Stats(profile)
    if place := os.environ.get("CARNICE_PROFILE"):
        stats.dump_stats(place)
    found: dict[str, float] = {}
    for (file, _, name), (_, _, _, seconds, _) in stats.stats.items():  # type: ignore[attr-defined]
        if name in PHASES and "carnice_build" in file:
            found[name] = found.get(name, 0.0) + seconds
    return {name: found[name] for name in PHASES if name in found}


def measure(case: Case, repeat: int, *, with_phases: bool) -> list[str]:
    """A row of the table."""
    shapes = open_checkpoint(case_path(case))
    project = Project(case, WORK / case.shapes)
    row = [case.shapes, f"{len(shapes.tensors):,}"]
    try:
        plan = plan_variants([VARIANT], project.options(project.shapes))
    except CarniceError as error:
        return [*row, "", str(error).splitlines()[0][:40]]
    row.append(f"{sum(sum(pack.counts) for pack in plan.variants[0].packs):,}")
    runs = [project.run("plan", project.shapes) for _ in range(repeat)]
    row.append(show(runs))
    make_holes(shapes, project.checkpoint)
    runs = [project.run("plan", project.checkpoint) for _ in range(repeat)]
    row.append(show(runs))
    with Store(project.cache) as store:
        make_up(plan_variants([VARIANT], project.options(project.checkpoint)), store)
    project.run("build", project.checkpoint)
    runs = [project.run("build", project.checkpoint) for _ in range(repeat)]
    assert not json.loads(project.run("build", project.checkpoint, "--json").output)["actions_run"]
    row.append(show(runs))
    if with_phases:
        options = project.options(project.checkpoint)
        planned = phases(lambda: plan_and_survey([VARIANT], options))
        built = phases(lambda: build_variants([VARIANT], options))
        for what, found in (("plan", planned), ("no-op", built)):
            print(case.shapes, what, *(f"{name} {found[name]:.2f}" for name in found), flush=True)
    shutil.rmtree(WORK / case.shapes)
    return row


def show(runs: list[Run]) -> str:
    """Seconds, processor seconds and memory of the fastest run."""
    fastest = best(runs)
    processor = min(item.processor for item in runs)
    return f"{fastest.seconds:.2f} s ({processor:.2f}), {fastest.peak / 1e6:.0f} MB"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[case.shapes for case in CASES])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--phases", action="store_true")
    arguments = parser.parse_args()
    table = Table(title="plans, and builds with nothing to do")
    headings = ("model", "tensors", "published", "plan of shapes", "plan of headers", "no-op build")
    for heading in headings:
        table.add_column(heading)
    for case in CASES:
        if not arguments.only or case.shapes in arguments.only:
            table.add_row(*measure(case, arguments.repeat, with_phases=arguments.phases))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
