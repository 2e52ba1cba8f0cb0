"""Comparing two model folders module by module, in whatever format each of them is.

Modules meet by their canonical path, and numbers are compared as they are stored, dequantized.
So where AWQ smoothed one folder only, the rows and columns that it rescaled count as differences,
although the layers' outputs do not change by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from carnice_build.commands.diff_side import OpenedSide, Side, StoredModule, open_side
from carnice_build.errors import CheckpointError
from carnice_build.formats.folder import ModelFolder
from carnice_build.graph import NonFiniteValue
from carnice_build.plugins import failures_blamed
from carnice_build.store.packs import digest_range
from carnice_build.tensors import SourceTensor

_Digest = tuple[str, tuple[int, ...], str]


class State(StrEnum):
    """How a module of one folder stands to that of the other.

    Not comparable are norms of which mlx-lm stores the gain 1 + w, and torch w.
    """

    SAME = "same"
    DIFFERENT = "differs"
    INCOMPARABLE = "not comparable"
    ONLY_A = "only in A"
    ONLY_B = "only in B"


@dataclass(frozen=True)
class ModuleDiff:
    """A module in both folders; None for the side that lacks it.

    `squared_difference` and `squared_norm` are sums over B - A and over A, None where the two
    cannot be compared number by number.
    """

    module: str
    kind: str
    a: Side | None
    b: Side | None
    state: State
    squared_difference: float | None = None
    squared_norm: float | None = None

    @property
    def relative(self) -> float | None:
        """||B - A|| / ||A||, None where it is not known."""
        return relative([self])


def relative(modules: Iterable[ModuleDiff]) -> float | None:
    """||B - A|| / ||A|| over several modules together, of those that can be compared."""
    pairs = [
        (item.squared_difference, item.squared_norm)
        for item in modules
        if item.squared_difference is not None and item.squared_norm is not None
    ]
    difference, norm = (sum(pair[index] for pair in pairs) for index in (0, 1))
    if not norm:
        # Zeros in both, of one type and of another.
        return None if difference or not pairs else 0.0
    return float((difference / norm) ** 0.5)


@dataclass(frozen=True)
class FolderDiff:
    """Two folders and what each module of either is in the other."""

    a: Path
    b: Path
    modules: Sequence[ModuleDiff]


def find_folder(name: str, out: Path) -> Path:
    """The folder of variant `name` in `out`, or the folder that `name` is a path to."""
    built = out / name
    return built if built.is_dir() else Path(name)


def diff_folders(a: Path, b: Path, jobs: int, values: bool = True) -> FolderDiff:
    """Compare every module; with `values`, read the weights that differ and compare them too.

    Raises a CarniceError when a folder cannot be read.
    """
    first, second = open_side(a), open_side(b)
    names = list(dict.fromkeys([*first.modules, *second.modules]))
    with ThreadPoolExecutor(jobs) as pool, failures_blamed(*first.readers, *second.readers):
        modules = list(pool.map(lambda name: _diff(name, first, second, values), names))
    return FolderDiff(a, b, modules)


def _diff(name: str, a: OpenedSide, b: OpenedSide, values: bool) -> ModuleDiff:
    first, second = a.modules.get(name), b.modules.get(name)
    kind = a.architecture.module_kind(name)
    if first is None:
        assert second is not None
        return ModuleDiff(name, kind, None, b.side(second), State.ONLY_B)
    if second is None:
        return ModuleDiff(name, kind, a.side(first), None, State.ONLY_A)
    sides = a.side(first), b.side(second)
    if _digests(a.folder, first) == _digests(b.folder, second):
        return ModuleDiff(name, kind, *sides, State.SAME)
    if a.stores_gain(name) != b.stores_gain(name):
        return ModuleDiff(name, kind, *sides, State.INCOMPARABLE)
    sums = _compare(a, first, b, second) if values else (None, None)
    return ModuleDiff(name, kind, *sides, State.DIFFERENT, *sums)


def _digests(folder: ModelFolder, module: StoredModule) -> list[_Digest]:
    """Type, shape and digest of each tensor, in an order that does not depend on the names."""
    tensors = [folder.tensors[name] for name in sorted(module.held)]
    return [(item.spec.dtype, item.spec.shape, _digest(folder, item)) for item in tensors]


def _digest(folder: ModelFolder, tensor: SourceTensor) -> str:
    """The tensor's digest by build.json, else of its bytes."""
    recorded = folder.record.get("tensors")
    item = recorded.get(tensor.name) if isinstance(recorded, dict) else None
    if isinstance(item, dict) and isinstance(item.get("digest"), str):
        return str(item["digest"])
    shard = folder.path / folder.shard_of(tensor.name)
    digest = digest_range(shard, tensor.offset, tensor.spec.nbytes)
    if digest is None:
        raise CheckpointError(f"tensor {tensor.name!r} cannot be read", where=str(shard))
    return digest


def _compare(
    a: OpenedSide, first: StoredModule, b: OpenedSide, second: StoredModule
) -> tuple[float | None, float | None]:
    """Sums of squares of the difference and of A."""
    from carnice_build.formats.values import Incomparable, squared_sums

    try:
        return squared_sums(a.values(first), b.values(second))
    except (Incomparable, NonFiniteValue, ValueError):
        # A ValueError is a kernel's, on arrays of other types or group sizes than it knows.
        return None, None
