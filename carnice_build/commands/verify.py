"""Verifying: what is in a built folder held against the recipe, the source and a running model."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from carnice_build.commands.card import renew_card
from carnice_build.commands.findings import folder_stamp, keep_findings
from carnice_build.commands.options import Options
from carnice_build.commands.plan import Plan, plan_variants
from carnice_build.engines import check as engine_check
from carnice_build.engines.check import EngineSettings, prepare_engine
from carnice_build.engines.engine import launch_of
from carnice_build.engines.llama_cpp import first_token
from carnice_build.errors import PlanError
from carnice_build.formats.folder import open_folder, read_build
from carnice_build.package.files import content_key
from carnice_build.planning.planner import VariantPlan
from carnice_build.plugins import failures_blamed
from carnice_build.verification import digests
from carnice_build.verification.chat import check_chat
from carnice_build.verification.digests import check_digests
from carnice_build.verification.kept import Kept, Memory, versions
from carnice_build.verification.perplexity import LENGTHS, Perplexity
from carnice_build.verification.process import Told, Workers, installed
from carnice_build.verification.result import Check, Outcome, skipped
from carnice_build.verification.running import AcceptanceRow, PerplexityRow, RunSettings, Tables
from carnice_build.verification.structure import check_structure

DEMO = "demo"
HELDOUT = Path(DEMO) / "heldout.txt"
"""The text that goes with the demo checkpoints, from the project's folder."""


_OF_FILES = 4
"""Checks that need no running model: digests, structure, chat and round trip."""


@dataclass(frozen=True)
class VerifySettings:
    """Whether to run the models, and on what; without a `text` the profile's own is taken.

    `samples` bounds the sequences of each length and the prompts that drafts are counted on; None
    is 64 sequences, or 8 without a GPU, and 16 prompts.
    What was measured before is measured `again` if asked.
    With an `engine`, each folder is also served by it.
    """

    run: bool = True
    text: Path | None = None
    samples: int | None = None
    lengths: Sequence[int] = LENGTHS
    again: bool = False
    engine: EngineSettings | None = None


@dataclass(frozen=True)
class VariantResult:
    """All checks of one variant; `renewed` says that its card now tells other figures."""

    variant: str
    folder: Path
    checks: Sequence[Check]
    renewed: bool = False

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return all(check.outcome is not Outcome.FAILED for check in self.checks)


@dataclass(frozen=True)
class VerifyResult:
    """The variants' checks; perplexities with those of the unquantized sources first; drafts."""

    variants: Sequence[VariantResult]
    perplexities: Sequence[PerplexityRow]
    acceptances: Sequence[AcceptanceRow]

    @property
    def passed(self) -> bool:
        """True when every variant passed."""
        return all(variant.passed for variant in self.variants)


Listener = Callable[[str, Check], None]
Begins = Callable[[str, str, int, int], None]
"""Hears of a variant and of a check of it that begins and may take long.

Behind them, how many checks of all variants are done, and how many there are.
"""


def verify_variants(
    names: Sequence[str],
    options: Options | None = None,
    settings: VerifySettings | None = None,
    listen: Listener = lambda variant, check: None,
    begins: Begins = lambda variant, check, done, total: None,
    told: Told = lambda step: None,
) -> VerifyResult:
    """Check what `build_variants` left in `options.out`; raises only when there is nothing there.

    EngineError, when an engine is asked for that cannot be used or does not answer.

    `listen` hears of every check as soon as it is made, and `begins` of those that may take long
    before that; `told` hears, from another thread, how far the one is that runs.
    What was found is kept in the cache, and what is there and still holds is not measured again.
    """
    options = options or Options()
    settings = settings or VerifySettings()
    plan = plan_variants(names, options)
    engine = prepare_engine(settings.engine, plan.variants) if settings.engine else None
    text = _text(plan, options, settings) if settings.run or engine else None
    finding = _Finding(options, settings, text, Tables())
    results: list[VariantResult] = []
    stamps: list[_Stamps] = []
    total = sum(_count(variant) + (engine is not None) for variant in plan.variants)

    def starts(variant: str, made: Sequence[Check], check: str) -> None:
        begins(variant, check, sum(len(result.checks) for result in results) + len(made), total)

    with Workers(told) as workers:
        # All that is older counts for nothing where everything is to be measured again.
        kept = Kept(options.cache, time.time() if settings.again else 0.0)
        samples = settings.samples
        how = RunSettings(text, settings.lengths, samples, options.jobs, workers, Memory(kept))
        for variant in plan.variants:
            checks: list[Check] = []
            begin = partial(starts, variant.name, checks)
            folder = finding.folder(variant)
            stamps.append(_Stamps.of(folder))
            for check in _check(variant, folder, how, finding.tables, begin, run=settings.run):
                checks.append(check)
                listen(variant.name, check)
            results.append(finding.keep(variant, stamps[-1], checks))
    if engine is not None:
        # What ran the models is gone, and what it found is kept, should the engine fail.
        for index, (variant, result) in enumerate(zip(plan.variants, tuple(results), strict=True)):
            starts(variant.name, (), engine_check.NAME)
            check = engine_check.check_engine(
                engine,
                launch_of(variant),
                result.folder,
                text,
                settings.samples,
                result.checks,
                partial(_halves, variant, result.folder, text, options.jobs, told),
            )
            listen(variant.name, check)
            found = finding.keep(variant, stamps[index], [*result.checks, check])
            results[index] = replace(found, renewed=found.renewed or result.renewed)
    tables = finding.tables
    return VerifyResult(results, tables.ordered(), tables.acceptances)


def _halves(
    variant: VariantPlan,
    folder: Path,
    text: Path | None,
    threads: int,
    told: Told,
    length: int,
    samples: int,
) -> Perplexity | None:
    """See `engine_check.Halves`; None where torch is not installed."""
    from carnice_build.formats.checks import TorchChecks
    from carnice_build.verification import torch_worker
    from carnice_build.verification.run_torch import dequantized

    checks = variant.format.checks()
    if text is None or not isinstance(checks, TorchChecks) or not installed("torch"):
        return None
    model = dequantized(checks, variant, folder)
    with Workers(told) as workers:
        found: Perplexity | None = workers.of("torch").call(
            torch_worker.measure_halves,
            model,
            folder,
            text,
            length,
            samples,
            threads,
            first_token(folder),
        )
    return found


@dataclass(frozen=True)
class _Stamps:
    """How a folder was before it was looked at; see `findings`."""

    stamp: str
    content: str

    @staticmethod
    def of(folder: Path) -> _Stamps:
        """That of `folder` as it is now."""
        return _Stamps(folder_stamp(folder), content_key(read_build(folder)))


@dataclass(frozen=True)
class _Finding:
    """What is found of all variants, and where it is kept."""

    options: Options
    settings: VerifySettings
    text: Path | None
    tables: Tables

    def folder(self, variant: VariantPlan) -> Path:
        """Where the variant was built."""
        return self.options.out / variant.name

    def keep(self, variant: VariantPlan, before: _Stamps, checks: Sequence[Check]) -> VariantResult:
        """Keep the checks of a variant in the cache, and tell of them on its card."""
        folder = self.folder(variant)
        unchanged = before.stamp == folder_stamp(folder)
        keep_findings(
            self.options.cache,
            variant,
            before.stamp,
            checks,
            self.tables.perplexities,
            ran=self.settings.run,
            text=self.text,
            content=before.content if _is_whole(checks) and unchanged else "",
            command=_command(variant.name, self.options, self.settings),
        )
        renewed = renew_card(variant, folder, self.options.cache)
        return VariantResult(variant.name, folder, checks, renewed)


def _is_whole(checks: Sequence[Check]) -> bool:
    """Whether the folder holds what its build.json says."""
    return any(item.name == digests.NAME and item.outcome is Outcome.PASSED for item in checks)


def _command(variant: str, options: Options, settings: VerifySettings) -> str:
    """What makes these figures; of paths there is the last part, which tells of no machine."""
    words = ["carnice", "verify", variant]
    words += ["--profile", options.profile] if options.profile else []
    for name, path in options.sources.items():
        words += ["--source", f"{name}={path.name}"]
    for assignment in options.overrides:
        words += ["--set", assignment]
    words += ["--text", settings.text.name] if settings.text else []
    words += ["--samples", str(settings.samples)] if settings.samples else []
    words += ["--engine", settings.engine.name] if settings.engine else []
    return shlex.join(words)


def _text(plan: Plan, options: Options, settings: VerifySettings) -> Path | None:
    if settings.text is not None:
        _check_text(settings.text)
        return settings.text
    default = options.recipes.parent / HELDOUT
    bodies = [variant.sources[variant.recipe.body] for variant in plan.variants]
    # A checkpoint that the command line gives stands in for that of the profile.
    demo = options.profile in (None, DEMO) and all(
        body.profile in (None, DEMO) and not body.local for body in bodies
    )
    return default if demo and default.is_file() else None


def _check_text(path: Path) -> None:
    """PlanError for a text that no model can be run on."""
    if not path.is_file():
        raise PlanError("is not a file", where=str(path))
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise PlanError("is not UTF-8 text", where=str(path)) from None
    if not text.strip():
        raise PlanError("has no text", where=str(path))


def _count(variant: VariantPlan) -> int:
    """How many checks are made of a variant."""
    # Numpy is needed from here on.
    from carnice_build.verification.runners import RUNNERS

    with failures_blamed(variant.format):
        checks = variant.format.checks()
    return _OF_FILES + len(RUNNERS[checks.library].names)


def _check(
    variant: VariantPlan,
    path: Path,
    how: RunSettings,
    tables: Tables,
    begin: Callable[[str], None],
    *,
    run: bool,
) -> Iterator[Check]:
    """All checks of a folder; the model is run if asked.

    `begin` hears of those that may take long.
    """
    from carnice_build.verification import roundtrip
    from carnice_build.verification.runners import RUNNERS

    folder = open_folder(path)
    with failures_blamed(variant.format):
        checks = variant.format.checks()
        begin(digests.NAME)
        whole = check_digests(folder, how.threads)
        yield whole
        sound = whole.outcome is Outcome.PASSED and _sound(variant, path, how.threads)
        memory = Memory.of(how.memory.kept, variant, path, checks, sound=sound)
        yield check_structure(variant, folder, checks)
        yield check_chat(path)
        if variant.body.buildable:
            begin(roundtrip.NAME)
            yield from memory.checks(
                roundtrip.NAME,
                versions("numpy", "numba"),
                tables,
                lambda: roundtrip.check_roundtrip(variant, folder, checks, how.threads),
            )
        else:
            why_not = f"{variant.body.where} has shapes but no weights"
            yield skipped(roundtrip.NAME, why_not)
        runner = RUNNERS[checks.library]
        if not run:
            yield from (skipped(name, "--no-run") for name in runner.names)
        elif runner.needs_table and not variant.architecture.tabled:
            yield from (skipped(name, "its family has no table") for name in runner.names)
        else:
            running = runner.run(checks, variant, path, replace(how, memory=memory), tables)
            for name in runner.names:
                begin(name)
                yield from islice(running, 1)
            yield from running


def _sound(variant: VariantPlan, path: Path, jobs: int) -> bool:
    """Whether what belongs to the folder, as its drafter's, is what its own build.json names."""
    others = [path.parent / other.name for other in variant.companions]
    return all(
        other.is_dir() and check_digests(open_folder(other), jobs).outcome is Outcome.PASSED
        for other in others
    )
