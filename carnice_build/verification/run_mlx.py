"""Checks `generate` and `perplexity` by mlx-lm and mlx-vlm, `mtp` by mlx-vlm, `calls` in torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import BackendError, CarniceError
from carnice_build.extras import pip_install
from carnice_build.formats.checks import FormatChecks
from carnice_build.formats.folder import read_object
from carnice_build.formats.library import Library
from carnice_build.formats.mlx.target import Target
from carnice_build.models.base import QUANTIZATION
from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import Composite
from carnice_build.verification import (
    acceptance,
    calls,
    generate,
    mlx_vlm_worker,
    mlx_worker,
    perplexity,
    torch_worker,
)
from carnice_build.verification.kept import versions
from carnice_build.verification.mlx_worker import Answer, SourceWeights, Task
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.process import installed
from carnice_build.verification.result import Check, judged, skipped
from carnice_build.verification.run_calls import check_calls, own_template
from carnice_build.verification.running import (
    NO_TEXT,
    SOURCE,
    Drafts,
    PerplexityRow,
    RunSettings,
    Tables,
    too_large,
)
from carnice_build.verification.sources import local_source, source_tensors

_RUN = (generate.NAME, perplexity.NAME)
NAMES = (*_RUN, calls.NAME)
VLM_NAMES = (*_RUN, acceptance.NAME, calls.NAME)

DRAFTS = (2, 3)
"""Two are what mlx-vlm drafts when nobody says otherwise, three what is tried in torch."""

PROMPTS = 8
"""Half of what is tried in torch: mlx takes longer where there is no GPU."""


@dataclass(frozen=True)
class _Engine:
    """A library that runs MLX folders, and what runs it."""

    library: Library
    module: str
    extra: str
    run: Callable[[Task], Answer]

    @property
    def missing(self) -> str:
        """Why nothing can be run, or nothing."""
        if installed(self.module):
            return ""
        return f"{self.library} is not installed: {pip_install(self.extra)}"


_MLX_LM = _Engine(Library.MLX_LM, "mlx_lm", "mlx", mlx_worker.run)
_MLX_VLM = _Engine(Library.MLX_VLM, "mlx_vlm", "mlxvlm", mlx_vlm_worker.run)


def run_mlx(
    checks: FormatChecks,
    variant: VariantPlan,
    folder: Path,
    settings: RunSettings,
    tables: Tables,
) -> Iterator[Check]:
    """Load the folder once for two checks; what was measured goes to `tables`."""
    yield from _run(_MLX_LM, variant, folder, settings, tables)
    yield from _calls(Target.MLX_LM, variant, folder, settings, tables)


def run_mlx_vlm(
    checks: FormatChecks,
    variant: VariantPlan,
    folder: Path,
    settings: RunSettings,
    tables: Tables,
) -> Iterator[Check]:
    """As `run_mlx`, and then with the drafter that was built along."""
    yield from _run(_MLX_VLM, variant, folder, settings, tables)
    yield from settings.memory.checks(
        acceptance.NAME,
        settings.of_text | versions("mlx", "mlx-vlm", "torch", "transformers"),
        tables,
        lambda: _acceptance(variant, folder, settings, tables),
    )
    yield from _calls(Target.MLX_VLM, variant, folder, settings, tables)


def _run(
    engine: _Engine, variant: VariantPlan, folder: Path, settings: RunSettings, tables: Tables
) -> Iterator[Check]:
    why_not = engine.missing or too_large(_size(folder))
    if why_not:
        yield from (skipped(name, why_not) for name in _RUN)
        return
    yield from settings.memory.checks(
        " and ".join(_RUN),
        settings.of_text | versions("mlx", engine.module.replace("_", "-"), "transformers"),
        tables,
        lambda: list(_measured(engine, variant, folder, settings, tables)),
    )


def _measured(
    engine: _Engine, variant: VariantPlan, folder: Path, settings: RunSettings, tables: Tables
) -> Iterator[Check]:
    task = Task(folder, folder, settings.text, settings.lengths, settings.samples, generate=True)
    source, missing = _source(variant, folder)
    beside = source is not None and not too_large(_size(folder) + _source_size(variant))
    try:
        answer = _answer(engine, replace(task, source=source if beside else None), settings)
    except BackendError as error:
        yield judged(
            generate.NAME, [str(error)], f"{engine.library} cannot load and run the folder"
        )
        yield skipped(perplexity.NAME, "the model does not run")
        return
    assert answer.generation is not None
    yield generate.judge_generation(answer.generation)
    if settings.text is None:
        yield skipped(perplexity.NAME, NO_TEXT)
        return
    model = variant.recipe.sources[variant.recipe.body].model
    if not tables.has_source(engine.library, model):
        found, missing = answer.of_source, missing or answer.missing
        if source is not None and not beside:
            alone = replace(task, model=source, generate=False)
            found, missing = _alone(engine, alone, variant, settings)
        tables.perplexities.append(PerplexityRow(SOURCE, engine.library, found, missing, model))
    tables.perplexities.append(PerplexityRow(variant.name, engine.library, answer.perplexities))
    yield perplexity.judge_perplexities(answer.perplexities)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _answer(engine: _Engine, task: Task, settings: RunSettings) -> Answer:
    return settings.workers.of(engine.module).call(engine.run, task)


def _source(variant: VariantPlan, folder: Path) -> tuple[SourceWeights | None, str]:
    """What the variant was made from, or why it cannot be run."""
    origins = source_tensors(variant)
    if any(isinstance(origin.file, Composite) for origin in origins.values()):
        return None, "experts of the source are not in the form that is loaded here"
    tensors = {
        canonical: (origin.file.name, origin.name)
        for canonical, origin in origins.items()
        if isinstance(origin.file, LocalFile)
    }
    if len(tensors) < len(origins):
        return None, "the source is not on this machine"
    # As published: the library may need entries that the source lacks.
    config = read_object(folder / "config.json")
    config = {key: value for key, value in config.items() if key not in QUANTIZATION}
    if dtype := variant.architecture.dtype:
        # The spelling that the libraries read wherever it stands; see `conversion.ask_mlx`.
        config["torch_dtype"] = dtype
    return SourceWeights(config, tensors), ""


def _source_size(variant: VariantPlan) -> int:
    # Without a GPU the worker computes in float32.
    copies = 1 if sys.platform == "darwin" else 2
    return copies * sum(origin.spec.nbytes for origin in source_tensors(variant).values())


def _alone(
    engine: _Engine, task: Task, variant: VariantPlan, settings: RunSettings
) -> tuple[Sequence[Perplexity], str]:
    """The perplexities of a source that does not fit beside its variant, or why there are none."""
    why_not = too_large(_source_size(variant))
    if why_not:
        return (), why_not
    try:
        return _answer(engine, task, settings).perplexities, ""
    except BackendError as error:
        return (), str(error)


def _acceptance(variant: VariantPlan, folder: Path, settings: RunSettings, tables: Tables) -> Check:
    """The drafts that mlx-vlm accepts, beside our own count on the same weights."""
    if not variant.companions:
        return skipped(acceptance.NAME, "there is no drafter")
    (drafter,) = variant.companions
    head = folder.parent / drafter.name
    why_not = _MLX_VLM.missing or too_large(_size(folder) + _size(head))
    if why_not or settings.text is None:
        return skipped(acceptance.NAME, why_not or NO_TEXT)
    try:
        worker = settings.workers.of(_MLX_VLM.module)
        prompts = worker.call(
            torch_worker.prompts_of, folder, settings.text, settings.samples or PROMPTS
        )
        found = worker.call(mlx_vlm_worker.drafts, folder, head, prompts, DRAFTS)
        ours = _counted(variant, folder, prompts, settings)
    except BackendError as error:
        return judged(acceptance.NAME, [str(error)], "mlx-vlm cannot draft with the head")
    rows = acceptance.compared_rows(variant.name, *found, ours)
    tables.acceptances += rows
    return acceptance.judge_acceptance(rows)


def _counted(
    variant: VariantPlan, folder: Path, prompts: list[list[int]], settings: RunSettings
) -> dict[int, Drafts]:
    """Our own count; nothing where there is no torch, or nobody who runs the family's head."""
    from carnice_build.verification import mlx_stored

    (drafter,) = variant.companions
    # In float32, as it is needed.
    too_much = too_large(4 * (variant.conversion.parameters + drafter.conversion.parameters))
    if too_much or not (installed("torch") and installed("transformers")):
        return {}
    model = mlx_stored.stored(variant, folder, Target.MLX_VLM, drafter)
    worker = settings.workers.of("torch")
    return worker.call(mlx_stored.count, model, prompts, DRAFTS, settings.threads)


def _calls(
    target: Target, variant: VariantPlan, folder: Path, settings: RunSettings, tables: Tables
) -> list[Check]:
    """What an agent must do, by the folder's dequantized weights in torch."""
    if not variant.architecture.tabled:
        return [skipped(calls.NAME, "its family has no table")]
    if not (installed("torch") and installed("transformers")):
        return [skipped(calls.NAME, f"torch is not installed: {pip_install('torch')}")]
    # In float32, as it is needed.
    if too_much := too_large(4 * variant.conversion.parameters):
        return [skipped(calls.NAME, too_much)]
    facts = {"own": own_template(variant), **versions(*torch_worker.LIBRARIES)}
    return settings.memory.checks(
        calls.NAME,
        settings.of_run | facts,
        tables,
        lambda: _asked(target, variant, folder, settings),
    )


def _asked(target: Target, variant: VariantPlan, folder: Path, settings: RunSettings) -> Check:
    from carnice_build.verification import mlx_stored

    try:
        model = mlx_stored.stored(variant, folder, target)
        source = local_source(variant)
        worker = settings.workers.of("torch")
        return check_calls(variant, folder, variant.name, model, source, settings, worker)
    except CarniceError as error:
        # The library has run the folder; that torch does not says nothing of it.
        return skipped(calls.NAME, str(error))
