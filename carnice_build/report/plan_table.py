"""The plan of a build as data for `--json` and as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from carnice_build.commands.plan import Plan, PlanResult
from carnice_build.execute.jobs import STREAM_BYTES
from carnice_build.graph import ActionOutput
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.status import BuildStatus, Status
from carnice_build.units import format_both, format_size, plural


@dataclass
class KindRow:
    """All modules of one kind in a variant."""

    kind: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    run: int = 0
    remote: int = 0
    cached: int = 0

    @property
    def bits(self) -> float:
        """Bits per weight of the kind."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def kind_rows(variant: VariantPlan, status: BuildStatus) -> list[KindRow]:
    """The variant's tensors by kind of module, in the order of the model."""
    rows: dict[str, KindRow] = {}
    seen: set[str] = set()
    for tensor in variant.conversion.tensors:
        kind = variant.architecture.module_kind(tensor.fact.name)
        row = rows.setdefault(kind, KindRow(kind))
        row.tensors += tensor.count
        row.bytes += tensor.ref.spec.nbytes
        if tensor.fact.name not in seen:
            seen.add(tensor.fact.name)
            row.parameters += _elements(tensor.fact.shape)
        origin = tensor.ref.origin
        if isinstance(origin, ActionOutput) and origin.action.identity not in seen:
            seen.add(origin.action.identity)
            state = status.actions.get(origin.action.identity)
            row.cached += state is Status.CACHED
            row.remote += state is Status.REMOTE
            row.run += state not in (Status.CACHED, Status.REMOTE)
    return list(rows.values())


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def plan_json(result: PlanResult, memory: int, jobs: int) -> dict[str, Any]:
    """The whole plan as JSON-ready values; sizes in bytes."""
    plan, status = result.plan, result.status
    return {
        "actions": {str(state): status.count(state) for state in Status},
        "bytes_to_read": status.bytes_to_read,
        "bytes_to_fetch": status.bytes_to_fetch,
        "bytes_to_write": status.bytes_to_write,
        "remote": result.remote
        and {"url": result.remote.name, "notices": list(result.remote.notices)},
        "peak_memory_estimate": peak_memory_estimate(plan, status, memory, jobs),
        "scratch_bytes": status.scratch_bytes(plan.graph, jobs),
        "variants": [_variant_json(variant, status) for variant in plan.variants],
    }


def peak_memory_estimate(plan: Plan, status: BuildStatus, memory: int, jobs: int) -> int:
    """Bytes of buffers that the jobs may hold at once, beyond the process's own."""
    if not status.pending:
        return 0
    from carnice_build.execute.jobs import plan_jobs
    from carnice_build.execute.look_ahead import looking_ahead

    peaks = [job.peak_bytes for job in looking_ahead(plan_jobs(status, plan.graph), jobs)]
    together = sum(sorted(peaks, reverse=True)[:jobs])
    return max(min(together, memory), max(peaks, default=STREAM_BYTES))


def _variant_json(variant: VariantPlan, status: BuildStatus) -> dict[str, Any]:
    identities = {action.identity for action in variant.actions.values()}
    states = [status.actions.get(identity, Status.CACHED) for identity in identities]
    return {
        "variant": variant.name,
        "source_bytes": sum(item.spec.nbytes for item in variant.body.tensors.values()),
        "source_tensors": len(variant.body.tensors),
        "parameters": variant.conversion.parameters,
        "left_alone": list(variant.conversion.ignored),
        "notices": list(variant.notices),
        "bits_per_weight": variant.bits_per_weight,
        "tensor_bytes": variant.tensor_bytes,
        "weights_bytes": variant.weights_bytes,
        "actions": {str(state): states.count(state) for state in Status},
        "shards": [
            {
                "name": layout.name,
                "bytes": layout.size,
                "tensors": sum(layout.counts),
                "state": "finished" if layout.identity in status.finished else "to write",
            }
            for layout in variant.packs
        ],
        "kinds": [
            {**asdict(row), "bits_per_weight": row.bits} for row in kind_rows(variant, status)
        ],
        "tensors": _tensors_json(variant),
    }


def _tensors_json(variant: VariantPlan) -> dict[str, Any]:
    """Every tensor of the folder by name; those of a stack share what is said of them."""
    found: dict[str, Any] = {}
    for layout in variant.packs:
        for slot in layout.slots:
            members = slot.tensor.members
            spec = members[0][1]
            item = {"dtype": spec.dtype, "shape": list(spec.shape), "file": layout.name}
            found |= dict.fromkeys((name for name, _ in members), item)
    return found


def plan_view(result: PlanResult, memory: int, jobs: int) -> RenderableType:
    """Tables for a terminal: one a variant, and the totals."""
    parts: list[RenderableType] = []
    for variant in result.variants:
        parts += [_variant_table(variant, result.status, remote=bool(result.remote)), Text()]
    parts.append(_totals(result, memory, jobs))
    return Group(*parts)


def _variant_table(variant: VariantPlan, status: BuildStatus, *, remote: bool) -> Table:
    title = f"{variant.name}: {variant.recipe.description}"
    table = Table(title=title, title_justify="left", show_footer=True)
    rows = kind_rows(variant, status)
    table.add_column("module kind", footer="all")
    _number(table, "tensors", sum(row.tensors for row in rows))
    _number(table, "to run", sum(row.run for row in rows))
    if remote:
        _number(table, "in the remote", sum(row.remote for row in rows))
    _number(table, "cached", sum(row.cached for row in rows))
    _number(table, "size", format_size(variant.tensor_bytes))
    _number(table, "bits/weight", f"{variant.bits_per_weight:.3f}")
    for row in rows:
        table.add_row(
            row.kind,
            str(row.tensors),
            str(row.run or ""),
            *([str(row.remote or "")] if remote else ()),
            str(row.cached or ""),
            format_size(row.bytes),
            f"{row.bits:.3f}",
        )
    return table


_NAMED = 3


def _left_alone(ignored: Sequence[str]) -> str:
    """The modules that the config names as not quantized, or how many, and patterns for others."""
    patterns = [entry for entry in ignored if entry.startswith("re:") or "*" in entry]
    named = [entry for entry in ignored if entry not in patterns]
    modules = plural(len(named), "module")
    if 0 < len(named) <= _NAMED:
        modules = ", ".join(named)
    return f"{modules} and {', '.join(patterns)}" if patterns else modules


def _number(table: Table, heading: str, total: object) -> None:
    table.add_column(heading, justify="right", footer=str(total))


def _unknown(status: BuildStatus) -> Iterator[str]:
    """Why a remote may have more than a plan can tell."""
    sources = status.sources.items()
    if any(
        name not in status.digests and source.file is not None and source.file.local
        for name, source in sources
    ):
        yield "what it has of files here that were never read, a build finds out"


def _totals(result: PlanResult, memory: int, jobs: int) -> Table:
    plan, status, remote = result.plan, result.status, result.remote
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    body = plan.variants[0].body
    source_bytes = sum(tensor.spec.nbytes for tensor in body.tensors.values())
    table.add_row("source", f"{len(body.tensors)} tensors, {format_size(source_bytes)}")
    read = status.count(Status.READ)
    # Their inputs have not been read yet, so nobody knows what they are.
    perhaps = f" (then run, {'fetched ' if remote else ''}or cached)" if read else ""
    fetched = f"{status.count(Status.REMOTE)} in the remote, " if remote else ""
    table.add_row(
        "actions",
        f"{status.count(Status.RUN)} to run, {read} to read first{perhaps}, "
        f"{fetched}{status.count(Status.CACHED)} cached",
    )
    table.add_row("to read", format_size(status.bytes_to_read))
    if remote:
        table.add_row("to fetch", f"{format_size(status.bytes_to_fetch)} from {remote.name}")
        for text in (*remote.notices, *_unknown(status)):
            table.add_row("remote", text)
    table.add_row(
        "to write", f"{format_size(status.bytes_to_write)} in {len(status.pending)} shards"
    )
    for variant in plan.variants:
        table.add_row(variant.name, f"{format_both(variant.weights_bytes)} on disk")
        if variant.conversion.ignored:
            table.add_row("not quantized", _left_alone(variant.conversion.ignored))
        for text in variant.notices:
            table.add_row("notice", text)
    peak = peak_memory_estimate(plan, status, memory, jobs)
    table.add_row("memory", f"at most {format_size(peak)} of weights at once")
    scratch = status.scratch_bytes(plan.graph, jobs)
    if scratch:
        table.add_row("scratch", f"at most {format_size(scratch)} of disk while it runs")
    return table
