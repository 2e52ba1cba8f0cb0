"""The report's table: what each cell says of a variant, and all of it as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from carnice_build.commands.report import Report, Sharing, VariantSummary
from carnice_build.store.history import BuildRecord
from carnice_build.units import format_size, format_time, plural
from carnice_build.verification.perplexity import Perplexity, format_perplexity
from carnice_build.verification.result import Outcome
from carnice_build.verification.running import SOURCE, PerplexityRow

NOTHING = "–"
"""What stands where nothing was measured."""


_OF_ANOTHER_FORM = (AttributeError, KeyError, TypeError, ValueError)
"""What reading details raises that another version left in the cache."""


@dataclass(frozen=True)
class Cell:
    """A text, the number to sort it by, and what a reader may want to know about it."""

    text: str = NOTHING
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Drafts:
    """What a step yields with `number` drafts of the head as packaged, in tokens."""

    number: int
    mean_length: float
    error: float


@dataclass(frozen=True)
class Copies:
    """Names that a model copied exactly, with typos, or not at all."""

    exact: int
    typos: int
    misses: int

    @property
    def prompts(self) -> int:
        """All names."""
        return self.exact + self.typos + self.misses


COLUMNS = (
    "Variant",
    "Bits per weight",
    "Size",
    "Perplexity",
    "KL to BF16",
    "MTP tokens a step",
    "Names copied",
    "Build time",
    "Actions run",
    "Reused",
    "Checks",
)


def main_length(report: Report) -> int | None:
    """The longest sequences on which all measured models were measured, if there are any."""
    lengths = [{item.length for item in row.found} for row in all_rows(report) if row.found]
    common = set.intersection(*lengths) if lengths else set()
    return max(common) if common else None


def all_rows(report: Report) -> Iterator[PerplexityRow]:
    """Every measured model of every variant."""
    for variant in report.variants:
        yield from variant.findings.rows if variant.findings else ()


def at_length(row: PerplexityRow | None, length: int | None) -> Perplexity | None:
    """What a row says of one length."""
    found = row.found if row else ()
    return next((item for item in found if item.length == length), None)


def served(variant: VariantSummary) -> PerplexityRow | None:
    """The model as engines compute it: with rounded activations, where a format has them."""
    rows = [row for row in variant.findings.rows if not row.source] if variant.findings else []
    return rows[-1] if rows else None


def sources(report: Report) -> list[PerplexityRow]:
    """The unquantized models, once for all libraries in which they are equally good."""
    length = main_length(report)
    rows: dict[tuple[str, str], PerplexityRow] = {}
    for row in all_rows(report):
        found = at_length(row, length)
        if row.source and found:
            rows.setdefault((row.source, format_perplexity(found)), row)
    return list(rows.values())


def source_of(variant: VariantSummary) -> PerplexityRow | None:
    """The unquantized model that the variant's figures are to be held against."""
    row = served(variant)
    rows = variant.findings.rows if variant.findings else ()
    return next(
        (item for item in rows if item.source and row and item.library is row.library), None
    )


def drafts(variant: VariantSummary) -> dict[str, Drafts]:
    """By head, what check `mtp` measured with the most drafts."""
    found = {}
    with suppress(*_OF_ANOTHER_FORM):
        for head, numbers in _details(variant, "mtp").items():
            number = max(numbers, key=int)
            item = numbers[number]
            found[head] = Drafts(int(number), float(item["mean_length"]), float(item["error"]))
    return found


def copies(variant: VariantSummary) -> dict[str, Copies]:
    """By model, what check `fidelity` counted; the unquantized one is called BF16."""
    found = {}
    with suppress(*_OF_ANOTHER_FORM):
        for model, item in _details(variant, "fidelity").items():
            found[model] = Copies(*(int(item[count]) for count in ("exact", "typos", "misses")))
    return found


def _details(variant: VariantSummary, name: str) -> Mapping[str, Any]:
    check = variant.check(name)
    return check.details if check else {}


def table(report: Report) -> list[list[Cell]]:
    """A row of `COLUMNS` for each unquantized model that was measured, and for each variant."""
    length = main_length(report)
    return [
        *(_source_cells(row, length, report) for row in sources(report)),
        *(_cells(variant, length) for variant in report.variants),
    ]


def _source_cells(row: PerplexityRow, length: int | None, report: Report) -> list[Cell]:
    copied = Cell()
    for variant in report.variants:
        if variant.model == row.source and SOURCE in copies(variant):
            copied = _copied(copies(variant)[SOURCE])
    name = Cell(f"{SOURCE} · {short_model(row.source)}", note=f"{row.source}, in {row.library}")
    perplexity = _perplexity(at_length(row, length), row, None)
    return [name, Cell("16", 16.0), Cell(), perplexity, *[Cell()] * 2, copied, *[Cell()] * 4]


def _cells(variant: VariantSummary, length: int | None) -> list[Cell]:
    row = served(variant)
    found, source = at_length(row, length), at_length(source_of(variant), length)
    copied = copies(variant).get(row.name if row else variant.variant)
    return [
        Cell(variant.variant, note=variant.description),
        Cell(f"{variant.bits_per_weight:.2f}", variant.bits_per_weight),
        Cell(format_size(variant.size), variant.size),
        _perplexity(found, row, source),
        _kl(found),
        _drafted(next(iter(drafts(variant).values()), None)),
        _copied(copied),
        *_built(variant.build),
        _checked(variant),
    ]


def _perplexity(
    found: Perplexity | None, row: PerplexityRow | None, source: Perplexity | None
) -> Cell:
    if found is None or row is None:
        return Cell()
    where = f"{found.samples} × {found.length} tokens, in {row.library}"
    if found.mean is None:
        return Cell(format_perplexity(found), note=where)
    more = f"; {found.mean / source.mean - 1:+.2%} of BF16" if source and source.mean else ""
    return Cell(format_perplexity(found), found.mean, where + more)


def _kl(found: Perplexity | None) -> Cell:
    if found is None or found.kl is None:
        return Cell()
    return Cell(f"{found.kl:.5f}", found.kl, "nats, mean over all positions")


def _drafted(found: Drafts | None) -> Cell:
    if found is None:
        return Cell()
    text = f"{found.mean_length:.2f} ± {found.error:.2f}"
    return Cell(text, found.mean_length, f"with {plural(found.number, 'draft')} a step")


def _copied(found: Copies | None) -> Cell:
    if found is None:
        return Cell()
    note = f"{plural(found.typos, 'typo')}, {found.misses} not copied"
    return Cell(f"{found.exact} of {found.prompts}", found.exact / found.prompts, note)


def _built(record: BuildRecord | None) -> list[Cell]:
    if record is None:
        return [Cell(), Cell(), Cell()]
    took = (
        f"of workers, on this variant's actions; the build of {plural(record.variants, 'variant')} "
        f"took {format_time(record.elapsed)}"
    )
    totals = f"{record.total_run} run in {plural(record.builds, 'build')} of this cache"
    run = f"{record.run}, {record.shared} shared" if record.shared else str(record.run)
    return [
        Cell(format_time(record.seconds), record.seconds, took),
        Cell(run, record.run, f"shared ones with other variants of that build; {totals}"),
        Cell(str(record.reused), record.reused),
    ]


def _checked(variant: VariantSummary) -> Cell:
    if variant.findings is None:
        return Cell("not verified", note=f"carnice verify {variant.variant}")
    outcomes = {
        outcome: [check.name for check in variant.findings.checks if check.outcome is outcome]
        for outcome in (Outcome.FAILED, Outcome.PASSED, Outcome.SKIPPED)
    }
    texts = [f"{len(names)} {outcome}" for outcome, names in outcomes.items() if names]
    notes = [f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items() if names]
    return Cell(", ".join(texts), len(outcomes[Outcome.FAILED]), "; ".join(notes))


def short_model(model: str) -> str:
    """A model's name without its owner's."""
    return model.rpartition("/")[2]


def notes(report: Report) -> list[str]:
    """What a reader must know to read the figures, a sentence or two each."""
    return [text for text in (_how(report), _missing(report)) if text]


def warning(report: Report) -> str:
    """What the figures must not be taken for; empty when they are what they seem."""
    if not report.demo:
        return ""
    parameters = max(variant.parameters for variant in report.variants)
    return (
        f"These figures are of the demo stand-ins, trained models of at most "
        f"{parameters / 1e6:.1f} million parameters, and not of the models whose names they bear."
    )


def _how(report: Report) -> str:
    length = main_length(report)
    if length is None:
        return ""
    found = [row for row in all_rows(report) if at_length(row, length)]
    texts = {variant.findings.text for variant in report.variants if variant.findings} - {""}
    samples = sorted({item.samples for row in found if (item := at_length(row, length))})
    libraries = sorted({row.library for row in found})
    text = (
        f"Perplexity and KL (nats) are on {' or '.join(map(str, samples))} sequences of {length} "
        f"tokens of {' or '.join(sorted(texts))}, computed by {' and '.join(libraries)}."
    )
    if len(texts) > 1 or len(samples) > 1:
        text += " Variants were measured on different texts or amounts: do not compare them."
    return text


def _missing(report: Report) -> str:
    names = [item.variant for item in report.variants if not (item.findings and item.findings.ran)]
    if not names:
        return ""
    return f"Not verified by running the model: {', '.join(names)}."


def sharing_notes(sharing: Sharing) -> list[str]:
    """What the variants share, in sentences."""
    disk = sharing.folders + sharing.cache
    return [
        f"The folders are {format_size(sharing.outputs)} one by one; with the cache "
        f"{format_size(disk)} are on disk.",
        f"There are {plural(sharing.actions, 'action')} behind the variants one by one, "
        f"{sharing.distinct_actions} of them different.",
    ]


def render_markdown(report: Report) -> str:
    """The table and what must be said beside it."""
    rows = [[cell.text for cell in row] for row in table(report)]
    lines = ["# Variants", "", *_paragraphs([warning(report), *notes(report)]), _line(COLUMNS)]
    lines += [_line(["---", *["---:"] * (len(COLUMNS) - 2), "---"]), *map(_line, rows), ""]
    lines += _paragraphs(sharing_notes(report.sharing))
    return "\n".join([*lines, f"Made by carnice-build {report.version}."]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts if text for line in (text, "")]
