"""Measure a build of a model with experts against `mlx_lm.convert`, in turn, on one machine.

    python -m benchmarks.experts [--layers 4] [--rounds 2] [--folder DIR]

The checkpoint has layers of Qwen3.6-35B-A3B's shape, 256 experts in two tensors a layer as on the
hub, random weights, and a vocabulary of 32768: 4 layers are 6.8 GB of BF16.  It and what is made
of it are removed at the end.  Both sides read from a warm page cache, ours starts from an empty
cache of its own, and every time is wall clock of a whole process, start-up included.  Only the
ratios mean anything; on a machine that others use, that of processor seconds more than that of
wall clock.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.architecture import Tensors
from benchmarks.checkpoints import (
    DEMO,
    INDEX,
    SHARD_BYTES,
    TEXT_FILES,
    Noise,
    split,
    with_token_ids,
    write_json,
    write_shard,
)
from benchmarks.int4_build import Measured, measured
from benchmarks.run import ROOT, WORK, Run, run, warm
from carnice_build.checkpoint.checkpoint import open_checkpoint, source_view
from carnice_build.checkpoint.header import read_header
from carnice_build.checkpoint.source import LocalFile

SHAPES = ROOT / "benchmarks" / "shapes" / "qwen3.6-35b-a3b.json"
VOCABULARY = 32768
RECIPE = "qwen3.6-35b-a3b-mlx-4bit"


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write a checkpoint of so many layers, without the tower and the MTP head."""
    shapes = open_checkpoint(SHAPES)
    config = json.loads(json.dumps(dict(shapes.config)))
    text = config["text_config"]
    text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    text |= {"vocab_size": VOCABULARY, "mtp_num_hidden_layers": 0}
    tensors: Tensors = {}
    for name, ref in source_view(shapes).items():
        if name.startswith(("model.visual.", "mtp.")) or _layer(name) >= layers:
            continue
        ends = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        shape = (VOCABULARY, *ref.spec.shape[1:]) if ends else ref.spec.shape
        tensors[name] = (ref.spec.dtype, shape)
    folder.mkdir(parents=True)
    noise = Noise()
    shards = split(tensors, SHARD_BYTES)
    for shard, names in shards.items():
        write_shard(folder / shard, {name: tensors[name] for name in names}, noise)
    places = {name: shard for shard, names in shards.items() for name in names}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    write_json(folder / "config.json", with_token_ids(config, DEMO))
    for name in TEXT_FILES:
        if (DEMO / name).is_file():
            shutil.copyfile(DEMO / name, folder / name)
    return folder


def _layer(name: str) -> int:
    _, found, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if found else -1


class Bench:
    """A folder with the checkpoint and what is made of it."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder = folder
        self.source = make_checkpoint(folder / "source", layers)
        self.ours = folder / "build" / RECIPE
        self.theirs = folder / "converted"

    def build(self) -> Run:
        """Ours, into an empty cache."""
        for name in ("cache", "build"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        places = ["--cache", str(self.folder / "cache"), "--out", str(self.folder / "build")]
        options = ["--source", f"body={self.source}", "--set", "steps=[]", *places, "--json"]
        return run([sys.executable, "-m", "carnice_build", "build", RECIPE, *options])

    def convert(self) -> Run:
        """`mlx_lm.convert`."""
        shutil.rmtree(self.theirs, ignore_errors=True)
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(self.source)]
        return run([*command, "--mlx-path", str(self.theirs), "-q", "--q-bits", "4"])

    def round(self) -> tuple[Measured, Measured]:
        """Both, one after the other."""
        warm(self.source)
        ours = measured(self.build, self.ours)
        # What the first one wrote may have pushed the source out of the page cache.
        warm(self.source)
        theirs = measured(self.convert, self.theirs)
        print(f"carnice-build:  {ours}\nmlx_lm.convert: {theirs}", flush=True)
        return ours, theirs

    def differing(self) -> list[str]:
        """Names of tensors that are not the same in both folders."""
        ours, theirs = (_tensors(folder) for folder in (self.ours, self.theirs))
        return [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if name not in ours or name not in theirs or ours[name]() != theirs[name]()
        ]


def _tensors(folder: Path) -> dict[str, Callable[[], Any]]:
    """What reads each tensor of a folder: its type, its shape and its bytes."""
    found: dict[str, Callable[[], Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = LocalFile(path)
        for entry in read_header(file).entries:

            def read(file: LocalFile = file, entry: Any = entry) -> Any:
                buffer = bytearray(entry.spec.nbytes)
                file.read_into(entry.offset, memoryview(buffer))
                return entry.spec, buffer

            found[entry.name] = read
    return found


def _ratio(what: str, pairs: Sequence[tuple[float, float]]) -> str:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(other / mine for mine, other in pairs)
    return f"{what}: {ours:.2f} and {theirs:.2f}, ratio {ratio:.1f}"


def main() -> None:
    """Make the checkpoint, measure, compare, print, remove all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=WORK / "experts")
    arguments = parser.parse_args()
    try:
        bench = Bench(arguments.folder, arguments.layers)
        # The very first build compiles the kernels, and asks mlx-lm what it does if it must.
        bench.build()
        rounds = [bench.round() for _ in range(arguments.rounds)]
        print(_ratio("seconds", [(one.run.seconds, other.run.seconds) for one, other in rounds]))
        print(_ratio("of processor", [(one.processor, other.processor) for one, other in rounds]))
        print(_ratio("GB RSS", [(a.run.peak / 1e9, b.run.peak / 1e9) for a, b in rounds]))
        print(f"tensors that differ: {bench.differing() or 'none'}")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
