"""Checks `generate` and `perplexity` by mlx-lm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import BackendError
from carnice_build.formats.checks import FormatChecks
from carnice_build.formats.folder import read_object
from carnice_build.formats.library import Library
from carnice_build.models.base import QUANTIZATION
from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import Composite
from carnice_build.verification import generate, mlx_worker, perplexity
from carnice_build.verification.process import Worker, installed
from carnice_build.verification.result import Check, judged, skipped
from carnice_build.verification.running import (
    NO_TEXT,
    SOURCE,
    PerplexityRow,
    RunSettings,
    Tables,
    too_large,
)
from carnice_build.verification.sources import source_tensors

NAMES = (generate.NAME, perplexity.NAME)
MISSING = "mlx is not installed: pip install 'carnice-build[mlx]'"


def run_mlx(
    checks: FormatChecks,
    variant: VariantPlan,
    folder: Path,
    settings: RunSettings,
    tables: Tables,
) -> Iterator[Check]:
    """Load the folder once for both checks; what was measured goes to `tables`."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    why_not = too_large(size) if installed("mlx_lm") else MISSING
    if why_not:
        yield from (skipped(name, why_not) for name in NAMES)
        return
    task = mlx_worker.Task(
        folder, folder, settings.text, settings.lengths, settings.samples, generate=True
    )
    try:
        answer = _run(task)
    except BackendError as error:
        yield judged(
            generate.NAME, [str(error)], f"{Library.MLX_LM} cannot load and run the folder"
        )
        yield skipped(perplexity.NAME, "the model does not run")
        return
    assert answer.generation is not None
    yield generate.judge_generation(answer.generation)
    if settings.text is None:
        yield skipped(perplexity.NAME, NO_TEXT)
        return
    model = variant.recipe.sources[variant.recipe.body].model
    if not tables.has_source(Library.MLX_LM, model):
        tables.perplexities.append(_source_row(model, variant, folder, settings))
    tables.perplexities.append(PerplexityRow(variant.name, Library.MLX_LM, answer.perplexities))
    yield perplexity.judge_perplexities(answer.perplexities)


def _run(task: mlx_worker.Task) -> mlx_worker.Answer:
    with Worker() as worker:
        return worker.call(mlx_worker.run, task)


def _source_row(
    model: str, variant: VariantPlan, folder: Path, settings: RunSettings
) -> PerplexityRow:
    def row(answer: mlx_worker.Answer | None, missing: str = "") -> PerplexityRow:
        found = answer.perplexities if answer else ()
        return PerplexityRow(SOURCE, Library.MLX_LM, found, missing, model)

    origins = source_tensors(variant)
    if any(isinstance(origin.file, Composite) for origin in origins.values()):
        return row(None, "experts of the source are not in the form that is loaded here")
    tensors = {
        canonical: (origin.file.name, origin.name)
        for canonical, origin in origins.items()
        if isinstance(origin.file, LocalFile)
    }
    if len(tensors) < len(origins):
        return row(None, "the source is not on this machine")
    # Without a GPU the worker computes in float32.
    copies = 1 if sys.platform == "darwin" else 2
    why_not = too_large(copies * sum(origin.spec.nbytes for origin in origins.values()))
    if why_not:
        return row(None, why_not)
    # As published: mlx-lm may need entries that the source lacks.
    config = read_object(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in QUANTIZATION}
    source = mlx_worker.SourceWeights(config, tensors)
    task = mlx_worker.Task(
        source, folder, settings.text, settings.lengths, settings.samples, generate=False
    )
    try:
        return row(_run(task))
    except BackendError as error:
        return row(None, str(error))
