"""The result of a verification as JSON, and as lines and tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from carnice_build.commands.verify import VariantResult, VerifyResult
from carnice_build.errors import printable
from carnice_build.formats.card import CARD_NAME
from carnice_build.verification.acceptance import drafts_json
from carnice_build.verification.perplexity import Perplexity, format_perplexity
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.roundtrip import KindErrors, ModuleError
from carnice_build.verification.running import AcceptanceRow, PerplexityRow

_SHOWN_PROBLEMS = 10
_STYLES = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.SKIPPED: "yellow"}


T = TypeVar("T")


def verify_json(result: VerifyResult) -> dict[str, Any]:
    """Everything that was found, JSON-ready."""
    return {
        "passed": result.passed,
        "variants": [
            {
                "variant": variant.variant,
                "folder": str(variant.folder),
                "passed": variant.passed,
                "card_renewed": variant.renewed,
                "checks": [asdict(check) for check in variant.checks],
            }
            for variant in result.variants
        ],
        "perplexity": [asdict(row) for row in result.perplexities],
        "acceptance": [
            {"variant": row.variant, "head": row.head, "drafts": drafts_json(row.drafts)}
            for row in result.acceptances
        ],
    }


def check_lines(variant: str, check: Check) -> str:
    """A check's line, in rich markup, and one more for each of its first problems."""
    style = _STYLES[check.outcome]
    state = f"[{style}]{check.outcome:8}[/]"
    lines = [f"{variant}  {check.name:10}  {state} {_plain(check.summary)}{_when(check)}"]
    lines += [f"    {_plain(problem)}" for problem in check.problems[:_SHOWN_PROBLEMS]]
    if len(check.problems) > _SHOWN_PROBLEMS:
        lines.append(f"    and {len(check.problems) - _SHOWN_PROBLEMS} more; --json lists all")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """In rich markup, whatever a folder or a cache put into it."""
    return escape(printable(text))


def _when(check: Check) -> str:
    return f" [dim](as measured on {check.measured})[/]" if check.measured else ""


def verify_tables(result: VerifyResult) -> Iterator[RenderableType]:
    """The worst modules of each variant, figures of the running models, and cards that are new."""
    for variant in result.variants:
        details = _details(variant, "round trip")
        if worst := _valid(list[ModuleError], details.get("worst")):
            yield _kinds_table(variant, _valid(list[KindErrors], details.get("kinds")))
            yield _worst_table(variant, worst)
    for library in dict.fromkeys(row.library for row in result.perplexities):
        yield _perplexity_table([row for row in result.perplexities if row.library is library])
    for variant in result.variants:
        rows = [row for row in result.acceptances if row.variant == variant.variant]
        if rows:
            yield _acceptance_table(rows)
    for variant in result.variants:
        if variant.renewed:
            yield f"{escape(variant.variant)}: {CARD_NAME} now tells what was measured"


def _valid(kind: type[list[T]], value: Any) -> list[T]:
    """What is told of modules; nothing where a cache has something else in its place."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return []


def _details(variant: VariantResult, name: str) -> dict[str, Any]:
    found = [check.details for check in variant.checks if check.name == name]
    return dict(found[0]) if found else {}


def _kinds_table(variant: VariantResult, kinds: Sequence[KindErrors]) -> Table:
    title = f"{variant.variant}: relative errors by kind of module"
    table = Table(title=title, title_justify="left")
    table.add_column("kind")
    for heading in ("modules", "error", "largest"):
        table.add_column(heading, justify="right")
    for item in kinds:
        errors = (_error(item.error), _error(item.largest))
        table.add_row(_plain(item.kind), str(item.modules), *errors)
    return table


def _worst_table(variant: VariantResult, worst: Sequence[ModuleError]) -> Table:
    title = f"{variant.variant}: largest relative errors"
    table = Table(title=title, title_justify="left")
    table.add_column("module")
    for heading in ("bits", "error", "bound"):
        table.add_column(heading, justify="right")
    for item in worst:
        figures = (str(item.bits), _error(item.error), f"{item.bound:.4f}")
        table.add_row(_plain(item.module), *figures)
    return table


def _error(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.4f}"


def _perplexity_table(rows: Sequence[PerplexityRow]) -> Table:
    """The rows of one library."""
    samples = {item.length: item.samples for row in rows for item in row.found}
    diverging = any(item.kl is not None for row in rows for item in row.found)
    title = f"Perplexity on the held-out text, by {rows[0].library}"
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for length in sorted(samples):
        table.add_column(f"seq {length}, {samples[length]} samples", justify="right")
        if diverging:
            table.add_column("KL to BF16", justify="right")
    for row in rows:
        found = {item.length: item for item in row.found}
        cells = [_cells(found.get(length), diverging) for length in sorted(samples)]
        table.add_row(row.name, *(text for cell in cells for text in cell))
        if row.missing:
            table.caption = f"{row.name} not measured: {row.missing}"
    return table


def _cells(item: Perplexity | None, diverging: bool) -> list[str]:
    perplexity = format_perplexity(item) if item else "-"
    kl = "-" if item is None or item.kl is None else f"{item.kl:.5f}"
    return [perplexity, kl] if diverging else [perplexity]


def _acceptance_table(rows: Sequence[AcceptanceRow]) -> Table:
    """The rows of one variant."""
    title = f"{rows[0].variant}: drafts accepted at each position, and tokens a step"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for number in rows[0].drafts:
        table.add_column(f"n={number}", justify="right")
        table.add_column("tokens", justify="right")
    for row in rows:
        cells = []
        for item in row.drafts.values():
            cells.append(" ".join(f"{rate:.2f}" for rate in item.rates))
            cells.append(f"{item.mean_length:.2f} ± {item.error:.2f}")
        table.add_row(row.head, *cells)
    return table
