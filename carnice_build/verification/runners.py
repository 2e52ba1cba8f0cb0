"""How the folders of a format are run, by the library that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from carnice_build.formats.checks import FormatChecks
from carnice_build.formats.library import Library
from carnice_build.planning.planner import VariantPlan
from carnice_build.verification import run_mlx, run_torch
from carnice_build.verification.result import Check
from carnice_build.verification.running import RunSettings, Tables


@dataclass(frozen=True)
class Runner:
    """`run` makes the checks of these `names`, in their order; some need the family's table."""

    names: tuple[str, ...]
    run: Callable[[FormatChecks, VariantPlan, Path, RunSettings, Tables], Iterator[Check]]
    needs_table: bool


RUNNERS: Mapping[Library, Runner] = {
    Library.MLX_LM: Runner(run_mlx.NAMES, run_mlx.run_mlx, needs_table=False),
    Library.MLX_VLM: Runner(run_mlx.VLM_NAMES, run_mlx.run_mlx_vlm, needs_table=False),
    # What it is good for is seen with the model that it drafts for.
    Library.MLX_VLM_DRAFTER: Runner((), lambda *_: iter(()), needs_table=False),
    Library.TRANSFORMERS: Runner(run_torch.NAMES, run_torch.run_torch, needs_table=True),
    Library.LLAMA_CPP: Runner(run_torch.NAMES, run_torch.run_torch, needs_table=True),
}
