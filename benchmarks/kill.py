"""Kill builds at random instants and check that nothing is lost or wrong.

    python -m benchmarks.kill [--kills 200] [--layers 8] [--seed 1]

Each round starts a build of two variants in an empty cache, ends it with SIGKILL after a random
time, builds again, and compares every byte with a build that was left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.checkpoints import TINY_LAYERS, make_checkpoint

ROOT = Path(__file__).parent.parent
WORK = ROOT / "benchmarks" / "work"
CACHE, OUT = WORK / "kill-cache", WORK / "kill-build"
VARIANTS = ("mlx-4bit", "mlx-mixed_3_6")


def command(source: Path) -> list[str]:
    """The build under test."""
    build = [sys.executable, "-m", "carnice_build", "build", *VARIANTS, "--json"]
    return [*build, "--source", f"body={source}", "--cache", str(CACHE), "--out", str(OUT)]


def start_over() -> None:
    """Empty the cache and the outputs."""
    for folder in (CACHE, OUT):
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint() -> dict[str, str]:
    """SHA-256 of every file of the outputs."""
    return {
        path.relative_to(OUT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(OUT.rglob("*"))
        if path.is_file()
    }


def finish(source: Path) -> dict[str, int]:
    """Build to the end and return what the build says it did."""
    done = subprocess.run(command(source), cwd=ROOT, capture_output=True, text=True, check=True)
    report: dict[str, int] = json.loads(done.stdout)
    return report


def actions_on_record() -> int:
    """How many actions the killed build had finished, by the cache's own records."""
    if not CACHE.exists():
        return 0
    stats = [sys.executable, "-m", "carnice_build", "cache", "stats", "--json", "--cache"]
    done = subprocess.run(
        [*stats, str(CACHE)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    actions: int = json.loads(done.stdout)["actions"]
    return actions


def main() -> None:
    """Run the rounds and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    source = make_checkpoint(layers=arguments.layers, size=TINY_LAYERS)
    start_over()
    begin = time.perf_counter()
    total = finish(source)["actions_run"]
    span = time.perf_counter() - begin
    expected = fingerprint()
    moments = random.Random(arguments.seed)
    wrong = redone = midway = 0
    for _ in range(arguments.kills):
        start_over()
        process = subprocess.Popen(
            command(source), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.1, span))
        process.kill()
        process.wait()
        finished = actions_on_record()
        midway += 0 < finished < total
        redone += finish(source)["actions_run"] - (total - finished)
        wrong += fingerprint() != expected
    start_over()
    print(
        f"{arguments.kills} kills, {midway} of them with some of {total} actions finished: "
        f"{wrong} builds wrong afterwards, {redone} finished actions done again"
    )


if __name__ == "__main__":
    main()
