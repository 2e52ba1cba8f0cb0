"""The result of a verification as JSON, and as lines and tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from carnice_build.commands.verify import PerplexityRow, VariantResult, VerifyReport
from carnice_build.verification.perplexity import Perplexity, format_perplexity
from carnice_build.verification.result import Check, Outcome

_SHOWN_PROBLEMS = 10
_STYLES = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.SKIPPED: "yellow"}


def verify_json(report: VerifyReport) -> dict[str, Any]:
    """Everything that was found, JSON-ready."""
    return {
        "passed": report.passed,
        "variants": [
            {
                "variant": variant.variant,
                "folder": str(variant.folder),
                "passed": variant.passed,
                "checks": [asdict(check) for check in variant.checks],
            }
            for variant in report.variants
        ],
        "perplexity": [asdict(row) for row in report.perplexities],
    }


def check_lines(variant: str, check: Check) -> str:
    """A check's line, in rich markup, and one more for each of its first problems."""
    style = _STYLES[check.outcome]
    state = f"[{style}]{check.outcome:8}[/]"
    lines = [f"{variant}  {check.name:10}  {state} {escape(check.summary)}"]
    lines += [f"    {escape(problem)}" for problem in check.problems[:_SHOWN_PROBLEMS]]
    if len(check.problems) > _SHOWN_PROBLEMS:
        lines.append(f"    and {len(check.problems) - _SHOWN_PROBLEMS} more; --json lists all")
    return "\n".join(lines)


def verify_tables(report: VerifyReport) -> Iterator[RenderableType]:
    """The worst modules of each variant, then the perplexities of all."""
    for variant in report.variants:
        worst = _details(variant, "round trip").get("worst")
        if worst:
            yield _worst_table(variant, worst)
    if report.perplexities:
        yield _perplexity_table(report.perplexities)


def _details(variant: VariantResult, name: str) -> dict[str, Any]:
    found = [check.details for check in variant.checks if check.name == name]
    return dict(found[0]) if found else {}


def _worst_table(variant: VariantResult, worst: Sequence[dict[str, Any]]) -> Table:
    title = f"{variant.variant}: largest relative errors"
    table = Table(title=title, title_justify="left")
    table.add_column("module")
    for heading in ("bits", "error", "bound"):
        table.add_column(heading, justify="right")
    for item in worst:
        error = "not finite" if item["error"] is None else f"{item['error']:.4f}"
        figures = (str(item["bits"]), error, f"{item['bound']:.4f}")
        table.add_row(item["module"], *figures)
    return table


def _perplexity_table(rows: Sequence[PerplexityRow]) -> Table:
    lengths = sorted({item.length for row in rows for item in row.found})
    samples = {item.length: item.samples for row in rows for item in row.found}
    table = Table(title="Perplexity on the held-out text", title_justify="left")
    table.add_column("variant")
    for length in lengths:
        table.add_column(f"seq {length}, {samples[length]} samples", justify="right")
    for row in rows:
        table.add_row(row.name, *(_cell(row.found, length) for length in lengths))
        if row.missing:
            table.caption = f"{row.name} not measured: {row.missing}"
    return table


def _cell(found: Sequence[Perplexity], length: int) -> str:
    return next((format_perplexity(item) for item in found if item.length == length), "-")
