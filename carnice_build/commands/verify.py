"""Verifying: what is in a built folder held against the recipe, the source and a running model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from carnice_build.checkpoint.checkpoint import SourceTensor
from carnice_build.checkpoint.source import LocalFile
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import BackendError, PlanError
from carnice_build.graph import TensorRef
from carnice_build.planning.planner import VariantPlan
from carnice_build.transforms.mlx import MlxFormat
from carnice_build.units import format_size
from carnice_build.verification import generate, perplexity, worker
from carnice_build.verification.digests import check_digests
from carnice_build.verification.folder import open_folder
from carnice_build.verification.perplexity import LENGTHS, Perplexity
from carnice_build.verification.result import Check, Outcome, judged, skipped
from carnice_build.verification.structure import check_structure

HELDOUT = Path("demo") / "heldout.txt"
"""The text that goes with the demo checkpoints, from the project's folder."""


@dataclass(frozen=True)
class VerifySettings:
    """Whether to run the models, and on what; without a `text` the profile's own is taken.

    `samples` bounds the sequences of each length; None is 64, or 8 where mlx has no GPU.
    """

    run: bool = True
    text: Path | None = None
    samples: int | None = None
    lengths: Sequence[int] = LENGTHS


@dataclass(frozen=True)
class VariantResult:
    """All checks of one variant."""

    variant: str
    folder: Path
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return all(check.outcome is not Outcome.FAILED for check in self.checks)


@dataclass(frozen=True)
class PerplexityRow:
    """A line of the table: a model, and what was measured or why nothing was."""

    name: str
    found: Sequence[Perplexity]
    missing: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """The variants' checks, and perplexities with those of the unquantized sources first."""

    variants: Sequence[VariantResult]
    perplexities: Sequence[PerplexityRow]

    @property
    def passed(self) -> bool:
        """True when every variant passed."""
        return all(variant.passed for variant in self.variants)


Listener = Callable[[str, Check], None]


def verify_variants(
    names: Sequence[str],
    options: Options | None = None,
    settings: VerifySettings | None = None,
    listen: Listener = lambda variant, check: None,
) -> VerifyReport:
    """Check what `build_variants` left in `options.out`; raises only when there is nothing there.

    `listen` hears of every check as soon as it is made.
    """
    options = options or Options()
    settings = settings or VerifySettings()
    text = _text(options, settings) if settings.run else None
    plan = plan_variants(names, options)
    results: list[VariantResult] = []
    rows: list[PerplexityRow] = []
    for variant in plan.variants:
        folder = options.out / variant.name
        checks: list[Check] = []
        made = (
            _check_files(variant, folder, options.jobs),
            _check_running(variant, folder, settings, text, rows),
        )
        for check in chain(*made):
            checks.append(check)
            listen(variant.name, check)
        results.append(VariantResult(variant.name, folder, checks))
    if rows:
        rows = [*_baselines(plan.variants, options, settings, text), *rows]
    return VerifyReport(results, rows)


def _text(options: Options, settings: VerifySettings) -> Path | None:
    if settings.text is not None:
        if not settings.text.is_file():
            raise PlanError("is not a file", where=str(settings.text))
        return settings.text
    default = options.recipes.parent / HELDOUT
    return default if options.profile == "demo" and default.is_file() else None


def _check_files(variant: VariantPlan, path: Path, jobs: int) -> Iterator[Check]:
    # Numpy is needed from here on.
    from carnice_build.verification import roundtrip

    folder = open_folder(path)
    yield check_digests(folder, jobs)
    yield check_structure(variant, folder)
    if variant.body.buildable:
        yield roundtrip.check_roundtrip(variant, folder, jobs)
    else:
        yield skipped(roundtrip.NAME, f"{variant.body.where} has shapes but no weights")


def _check_running(
    variant: VariantPlan,
    folder: Path,
    settings: VerifySettings,
    text: Path | None,
    rows: list[PerplexityRow],
) -> Iterator[Check]:
    """Run the model once for both checks; what was measured goes to `rows`."""
    why_not = _why_not_run(variant, settings) or _too_large(_folder_bytes(folder))
    if why_not:
        yield skipped(generate.NAME, why_not)
        yield skipped(perplexity.NAME, why_not)
        return
    task = worker.Task(folder, folder, text, settings.lengths, settings.samples, generate=True)
    try:
        answer = worker.run(task)
    except BackendError as error:
        yield judged(generate.NAME, [str(error)], "mlx-lm cannot load and run the folder")
        yield skipped(perplexity.NAME, "the model does not run")
        return
    assert answer.generation is not None
    yield generate.judge_generation(answer.generation)
    if text is None:
        yield skipped(perplexity.NAME, "there is no held-out text; give --text FILE")
        return
    rows.append(PerplexityRow(variant.name, answer.perplexities))
    yield perplexity.judge_perplexities(answer.perplexities)


def _why_not_run(variant: VariantPlan, settings: VerifySettings) -> str:
    if not settings.run:
        return "--no-run"
    if not isinstance(variant.format, MlxFormat):
        return "mlx-lm does not run this format"
    return "" if worker.available() else worker.MISSING


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _too_large(size: int) -> str:
    """Why a model of `size` bytes cannot be loaded here, or nothing."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size < memory:
        return ""
    return f"needs {format_size(size)} of memory; this machine has {format_size(memory)}"


def _baselines(
    variants: Sequence[VariantPlan],
    options: Options,
    settings: VerifySettings,
    text: Path | None,
) -> list[PerplexityRow]:
    """One row for each checkpoint that the variants are made from."""
    bodies = {variant.body.where: variant for variant in variants}
    rows = []
    for variant in bodies.values():
        model = variant.recipe.sources[variant.recipe.body].model
        name = "BF16" if len(bodies) == 1 else f"BF16 {model}"
        rows.append(_baseline(name, variant, options.out / variant.name, settings, text))
    return rows


def _baseline(
    name: str, variant: VariantPlan, tokenizer: Path, settings: VerifySettings, text: Path | None
) -> PerplexityRow:
    origins = {tensor.fact.name: _origin(tensor.ref) for tensor in variant.conversion.tensors}
    tensors = {
        canonical: (origin.file.name, origin.name)
        for canonical, origin in origins.items()
        if isinstance(origin.file, LocalFile)
    }
    if len(tensors) < len(origins):
        return PerplexityRow(name, (), "the source is not on this machine")
    # Without a GPU the worker computes in float32.
    copies = 1 if sys.platform == "darwin" else 2
    too_large = _too_large(copies * sum(origin.spec.nbytes for origin in origins.values()))
    if too_large:
        return PerplexityRow(name, (), too_large)
    source = worker.SourceWeights(variant.body.config, tensors)
    task = worker.Task(source, tokenizer, text, settings.lengths, settings.samples, generate=False)
    try:
        return PerplexityRow(name, worker.run(task).perplexities)
    except BackendError as error:
        return PerplexityRow(name, (), str(error))


def _origin(ref: TensorRef) -> SourceTensor:
    """The source tensor that a planned tensor was made from, through its ops' first inputs."""
    while not isinstance(ref.origin, SourceTensor):
        ref = ref.origin.action.inputs[0]
    return ref.origin
