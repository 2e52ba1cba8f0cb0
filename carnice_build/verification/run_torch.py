"""Checks `generate`, `perplexity`, `mtp`, `fidelity` and `calls` in torch.

On the dequantized weights, for formats that no library runs on every machine; `torch_worker` says
how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from carnice_build.chat.files import TEMPLATE_NAME
from carnice_build.errors import CarniceError
from carnice_build.extras import pip_install
from carnice_build.formats.checks import FormatChecks, TorchChecks
from carnice_build.formats.folder import open_folder
from carnice_build.formats.library import Library
from carnice_build.models import architecture_of
from carnice_build.models.base import Part
from carnice_build.planning.planner import VariantPlan
from carnice_build.verification import (
    acceptance,
    calls,
    fidelity,
    generate,
    perplexity,
    torch_worker,
)
from carnice_build.verification.kept import versions
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.process import Worker, installed
from carnice_build.verification.result import Check, judged, skipped
from carnice_build.verification.run_calls import check_calls, kept_source, own_template
from carnice_build.verification.running import (
    NO_TEXT,
    SOURCE,
    PerplexityRow,
    RunSettings,
    Tables,
    too_large,
)
from carnice_build.verification.sources import local_source
from carnice_build.verification.torch_worker import StoredModel

NAMES = (generate.NAME, perplexity.NAME, acceptance.NAME, fidelity.NAME, calls.NAME)

_FLOAT32 = 4


def run_torch(
    checks: FormatChecks,
    variant: VariantPlan,
    folder: Path,
    settings: RunSettings,
    tables: Tables,
) -> Iterator[Check]:
    """Run the folder's text model; what was measured goes to `tables`."""
    assert isinstance(checks, TorchChecks)
    if not (installed("torch") and installed("transformers")):
        missing = f"torch is not installed: {pip_install('torch')}"
        yield from (skipped(name, missing) for name in NAMES)
        return
    worker = settings.workers.of("torch")
    run = _Run(checks, variant, folder, settings, tables, worker)
    libraries = versions(*torch_worker.LIBRARIES)
    of_text, of_run = settings.of_text | libraries, settings.of_run | libraries
    checks_in_order: tuple[tuple[Callable[[], Check], dict[str, object]], ...] = (
        (run.generate, {"threads": settings.threads, **libraries}),
        (run.perplexity, of_text),
        (run.acceptance, of_text),
        (run.fidelity, of_run),
        (run.calls, of_run | {"own": own_template(variant)}),
    )
    for name, (check, facts) in zip(NAMES, checks_in_order, strict=True):
        try:
            yield from settings.memory.checks(name, facts, tables, check)
        except CarniceError as error:
            yield judged(name, [str(error)], "the model cannot be loaded and run")


def dequantized(checks: TorchChecks, variant: VariantPlan, path: Path) -> StoredModel:
    """The model of a folder, as its weights are."""
    folder = open_folder(path)
    architecture = architecture_of(folder.config, str(path))
    tensors = checks.by_module(folder.tensors, architecture)
    return StoredModel(architecture, tensors, checks, variant.conversion.quantized)


@dataclass(frozen=True)
class _Run:
    """One folder, and a process to run it in."""

    checks: TorchChecks
    variant: VariantPlan
    folder: Path
    settings: RunSettings
    tables: Tables
    worker: Worker

    def generate(self) -> Check:
        """The answer of the model as it is served."""
        why_not = too_large(self._whole_bytes())
        if why_not:
            return skipped(generate.NAME, why_not)
        found = self.worker.call(
            torch_worker.generate, self._served(), self.folder, self.settings.threads
        )
        return generate.judge_generation(found)

    def perplexity(self) -> Check:
        """Perplexity and KL of the weights alone, and of the model as it is served."""
        if self.settings.text is None:
            return skipped(perplexity.NAME, NO_TEXT)
        models = self._models()
        why_not = too_large(self._layerwise_bytes(len(models)))
        if why_not:
            return skipped(perplexity.NAME, why_not)
        found = self.worker.call(
            torch_worker.measure_perplexities,
            models,
            self.folder,
            self.settings.text,
            self.settings.lengths,
            self.settings.samples,
            self.settings.threads,
            kept_source(self.settings),
        )
        self._add_rows(found)
        *_, served = found.values()
        return perplexity.judge_perplexities(served)

    def acceptance(self) -> Check:
        """The drafts of the MTP head, as packaged and quantized."""
        if not any(tensor.fact.part is Part.MTP for tensor in self.variant.conversion.tensors):
            return skipped(acceptance.NAME, "the folder has no MTP head")
        if not self.variant.architecture.drafts:
            name = self.variant.architecture.name
            return skipped(acceptance.NAME, f"nobody has written down what {name}'s head computes")
        why_not = too_large(self._whole_bytes())
        if why_not or self.settings.text is None:
            return skipped(acceptance.NAME, why_not or NO_TEXT)
        found = self.worker.call(
            torch_worker.measure_acceptance,
            self._served(),
            self.folder,
            self.settings.text,
            self.settings.samples,
            self.settings.threads,
        )
        rows = acceptance.make_rows(self.variant.name, *found)
        self.tables.acceptances += rows
        return acceptance.judge_acceptance(rows)

    def fidelity(self) -> Check:
        """Rare names copied by the source and by the model as it is served."""
        models = self._models()
        served = list(models)[-1]
        compared = {name: models[name] for name in (SOURCE, served) if name in models}
        why_not = too_large(self._whole_bytes())
        if why_not or TEMPLATE_NAME not in self.variant.files:
            return skipped(fidelity.NAME, why_not or "there is no chat template")
        found = self.worker.call(
            torch_worker.measure_fidelity,
            compared,
            self.folder,
            self.settings.samples,
            self.settings.threads,
            kept_source(self.settings),
        )
        return fidelity.judge_fidelity(found)

    def calls(self) -> Check:
        """What an agent must do, as the model is served, and as the source does it."""
        why_not = too_large(self._whole_bytes())
        if why_not:
            return skipped(calls.NAME, why_not)
        models = self._models()
        *_, name = models
        return check_calls(
            self.variant,
            self.folder,
            name,
            models[name],
            models.get(SOURCE),
            self.settings,
            self.worker,
        )

    def _dequantized(self) -> StoredModel:
        return dequantized(self.checks, self.variant, self.folder)

    def _served(self) -> StoredModel:
        return replace(self._dequantized(), activations=bool(self.checks.activations))

    def _models(self) -> dict[str, StoredModel]:
        """What is compared, by the name of its row, the source first if it is here."""
        name = self.variant.name
        models: dict[str, StoredModel] = {}
        if source := local_source(self.variant):
            models[SOURCE] = source
        models[name] = self._dequantized()
        if self.checks.activations:
            models[f"{name}, {self.checks.activations}"] = self._served()
        return models

    def _add_rows(self, found: Mapping[str, list[Perplexity]]) -> None:
        model = self.variant.recipe.sources[self.variant.recipe.body].model
        if not self.tables.has_source(Library.TRANSFORMERS, model):
            missing = "" if SOURCE in found else "the source is not on this machine"
            row = PerplexityRow(SOURCE, Library.TRANSFORMERS, found.get(SOURCE, ()), missing, model)
            self.tables.perplexities.append(row)
        for name, items in found.items():
            if name != SOURCE:
                # Divergences are from the first model: without the source they say nothing.
                kept = items if SOURCE in found else [replace(item, kl=None) for item in items]
                self.tables.perplexities.append(PerplexityRow(name, Library.TRANSFORMERS, kept))

    def _whole_bytes(self) -> int:
        return _FLOAT32 * self.variant.conversion.parameters

    def _layerwise_bytes(self, models: int) -> int:
        """The heads and hidden states of all models, one's embeddings and one layer."""
        facts = self.variant.architecture.tensors.values()
        table, *others = [fact.shape for fact in facts if fact.part is Part.EMBED]
        layers: dict[int | None, int] = {}
        for tensor in self.variant.conversion.tensors:
            layers[tensor.fact.layer] = layers.get(tensor.fact.layer, 0) + tensor.ref.spec.size
        samples = self.settings.samples or perplexity.SAMPLES_ON_CPU
        states = samples * max(self.settings.lengths) * table[1]
        largest = max(size for layer, size in layers.items() if layer is not None)
        more = sum(rows * width for rows, width in others)
        return _FLOAT32 * (
            table[0] * table[1] * (models + 1) + more + models * states + 2 * largest
        )
