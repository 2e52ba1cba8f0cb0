"""An estimate as data for `--json` and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from carnice_build.planning.estimate import Estimate, Load, Resource, totals
from carnice_build.units import format_size, format_time, plural

_BYTES = {
    "read": "sources, read",
    "from_hub": "from the hub",
    "fetched": "from the remote",
    "pushed": "to the remote",
    "packs": "shards, written",
    "transient": "written for a while",
}

_SECONDS = {
    Resource.WIRE: "wire",
    Resource.DISK: "disk",
    Resource.KERNELS: "kernels",
    Resource.PASSES: "passes",
}


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON-ready values: bytes, seconds, and money in the price's currency."""
    machines = estimate.machines
    return {
        "nodes": machines.count,
        "cores": machines.cores,
        "bandwidth": machines.bandwidth,
        "bytes": dict(totals((*estimate.nodes, estimate.together))),
        "of_nodes": [_load_json(load) for load in estimate.nodes],
        "together": _load_json(estimate.together),
        "seconds": estimate.seconds,
        "bottleneck": estimate.bottleneck,
        "node_hours": estimate.node_hours,
        "price": machines.price,
        "cost": estimate.cost,
    }


def _load_json(load: Load) -> dict[str, Any]:
    return {
        **dict(totals([load])),
        "operations": load.operations,
        "seconds": {
            **{str(resource): load.seconds[resource] for resource in Resource},
            "pushing": load.pushing,
            "all": load.total,
        },
    }


def estimate_view(estimate: Estimate) -> RenderableType:
    """Bytes and seconds of all nodes, of the one that takes longest, and of the end."""
    machines = estimate.machines
    title = (
        f"Estimate: {plural(machines.count, 'node')} of {plural(machines.cores, 'core')}, "
        f"{format_size(machines.bandwidth)}/s each"
    )
    if estimate.bottleneck is None:
        return Group(Text(), Text(title, style="bold"), _totals(estimate))
    table = Table()
    table.add_column("")
    if machines.count == 1:
        _add_columns(table, {"the node": estimate.nodes}, gpu=estimate.busiest.gpu)
    else:
        columns = {
            "all nodes": estimate.nodes,
            "the slowest": [estimate.busiest],
            "put together": [estimate.together],
        }
        _add_columns(table, columns, gpu=estimate.busiest.gpu)
    return Group(Text(), Text(title, style="bold"), table, _totals(estimate))


def _add_columns(table: Table, columns: Mapping[str, Sequence[Load]], *, gpu: bool) -> None:
    """Bytes of loads together, and seconds where a column is of one load."""
    for heading in columns:
        table.add_column(heading, justify="right")
    groups = [dict(totals(loads)) for loads in columns.values()]
    for name, text in _BYTES.items():
        if any(group[name] for group in groups):
            table.add_row(text, *(format_size(group[name]) for group in groups))
    table.add_section()
    for resource, text in _SECONDS.items():
        on_gpu = " on a GPU" if gpu and resource is Resource.PASSES else ""
        found = [_seconds(loads, resource) for loads in columns.values()]
        if any(found):
            table.add_row(text + on_gpu, *("" if s is None else format_time(s) for s in found))
    pushing = [loads[0].pushing if len(loads) == 1 else None for loads in columns.values()]
    if any(pushing):
        table.add_row("pushing", *("" if s is None else format_time(s) for s in pushing))


def _seconds(loads: Sequence[Load], resource: Resource) -> float | None:
    """Of nodes beside each other nobody waits for the sum."""
    return loads[0].seconds[resource] if len(loads) == 1 else None


def _totals(estimate: Estimate) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("in all", format_time(estimate.seconds))
    table.add_row("bottleneck", estimate.bottleneck or "none: nothing is to do")
    if estimate.cost is not None:
        table.add_row("cost", f"{estimate.cost:.2f} for {estimate.node_hours:.2f} node-hours")
    return table
