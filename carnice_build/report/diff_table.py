"""The difference of two folders as JSON, and as a table by kind of module or by module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from carnice_build.commands.diff import FolderDiff, ModuleDiff, State, relative
from carnice_build.commands.diff_side import Side
from carnice_build.units import format_size


def diff_json(diff: FolderDiff) -> dict[str, Any]:
    """Every module, JSON-ready."""
    return {
        "a": str(diff.a),
        "b": str(diff.b),
        "same": all(item.state is State.SAME for item in diff.modules),
        "modules": {
            item.module: {
                "kind": item.kind,
                "a": asdict(item.a) if item.a else None,
                "b": asdict(item.b) if item.b else None,
                "state": item.state,
                "relative_difference": item.relative,
            }
            for item in diff.modules
        },
    }


def diff_table(diff: FolderDiff, every: bool) -> Table:
    """One row for each kind of module, or for each module; A before the arrow, B after it."""
    table = Table(
        title=f"A: {diff.a}\nB: {diff.b}",
        title_justify="left",
        show_footer=True,
        # As narrow as can be: between folders of one format, a terminal of 80 columns will do.
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("module" if every else "module kind", "all", no_wrap=True)
    table.add_column("#", str(len(diff.modules)), justify="right")
    table.add_column("stored as")
    table.add_column("size", _sizes(diff.modules), justify="right")
    together = relative(diff.modules)
    footer = "" if together is None else f"{together:.4f}"
    table.add_column("|B-A|/|A|", footer, justify="right")
    for name, modules in _groups(diff, every).items():
        table.add_row(
            name,
            str(len(modules)),
            _both(_storage(item.a for item in modules), _storage(item.b for item in modules)),
            _sizes(modules),
            _difference(modules),
        )
    return table


def _groups(diff: FolderDiff, every: bool) -> dict[str, list[ModuleDiff]]:
    groups: dict[str, list[ModuleDiff]] = {}
    for item in diff.modules:
        groups.setdefault(item.module if every else item.kind, []).append(item)
    return groups


def _storage(sides: Iterable[Side | None]) -> str:
    """How modules are stored, with counts when they are not all alike."""
    counts: dict[str, int] = {}
    for side in sides:
        if side:
            counts[side.storage] = counts.get(side.storage, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} x {storage}" for storage, count in sorted(counts.items()))


def _sizes(modules: Sequence[ModuleDiff]) -> str:
    return _both(_size(item.a for item in modules), _size(item.b for item in modules))


def _size(sides: Iterable[Side | None]) -> str:
    total = sum(side.size for side in sides if side)
    return format_size(total) if total else ""


def _both(a: str, b: str) -> str:
    """One text for both sides when it is the same, a dash for the side that has nothing."""
    return a if a == b else f"{a or '-'} → {b or '-'}"


def _difference(modules: Sequence[ModuleDiff]) -> str:
    """How many are the same or on one side only, and the relative difference of the others."""
    found = relative(modules)
    words = {state: str(state) for state in State}
    if found is not None:
        words[State.DIFFERENT] = f"{found:.4f}"
    counts = {state: sum(item.state is state for item in modules) for state in State}
    present = [state for state in State if counts[state]]
    if len(present) == 1:
        return words[present[0]]
    return ", ".join(f"{counts[state]} {words[state]}" for state in present)
