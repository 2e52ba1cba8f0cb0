"""A streamed calibration from a slow hub: seconds of each layer, and bytes that the hub sent.

The demo is calibrated twice, with one job at a time, so that a layer is fetched before it is
computed, and with three, so that the next one is fetched meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.run import ROOT

sys.path.append(str(ROOT / "tests" / "hub"))
import fake_hub
from fake_hub import CARNICE, FakeHub

VARIANT = "nvfp4-text-mtp"
DATASET = "neuralmagic/calibration: demo/calibration.jsonl"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.7, help="MB/s of each answer")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    slow(arguments.rate * 1e6)
    table = Table("--jobs", "a layer, median s", "build, s", "sent, MB")
    with fake_hub.fake_hub() as hub:
        hub.add(CARNICE, ROOT / "demo" / "carnice-v2-27b", "c" * 40)
        for jobs in (1, 3):
            hub.forget()
            layers, seconds = measure(hub, jobs, arguments.samples)
            sent = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
            table.add_row(
                str(jobs), f"{statistics.median(layers):.2f}", f"{seconds:.1f}", f"{sent / 1e6:.1f}"
            )
    Console().print(table)


def slow(rate: float) -> None:
    """Have hubs send files of weights at `rate` bytes a second, each answer by itself."""
    pieces = fake_hub._pieces

    def slowly(answer: Any, limit: int) -> Any:
        for piece in pieces(answer, limit):
            if str(answer.body).endswith(".safetensors"):
                time.sleep(len(piece) / rate)
            yield piece

    fake_hub._pieces = slowly


def measure(hub: FakeHub, jobs: int, samples: int) -> tuple[list[float], float]:
    """Seconds from the end of each layer to the end of the next, and of the build."""
    from huggingface_hub import constants

    from carnice_build.commands.build import build_variants
    from carnice_build.commands.options import Options
    from carnice_build.execute.events import Event, Span

    ends: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Span) and event.name == "calibration.forward":
            ends.append(event.end)

    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        shutil.copytree(ROOT / "recipes", project / "recipes")
        (project / "demo").symlink_to(ROOT / "demo")
        (project / "recipes" / "_profiles.yaml").write_text(
            f"slow: {{{DATASET}, {CARNICE}: hub, Qwen/Qwen3.6-27B: demo/qwen3.6-27b}}\n"
        )
        constants.ENDPOINT = hub.hub_url
        address = hub.hub_url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address
        constants.HF_HUB_CACHE = constants.HF_ASSETS_CACHE = str(project / "huggingface")
        os.chdir(project)
        wanted = (f"samples={samples}", "length=2048", "threads=1")
        overrides = tuple(f"calibration.{item}" for item in wanted)
        start = time.perf_counter()
        build_variants(
            [VARIANT],
            Options(profile="slow", stream=True, jobs=jobs, overrides=overrides),
            listen,
        )
        seconds = time.perf_counter() - start
        os.chdir(ROOT)
    ends.sort()
    return [after - before for before, after in pairwise(ends)], seconds


if __name__ == "__main__":
    main()
