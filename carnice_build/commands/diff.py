"""Comparing two model folders module by module, in whatever format each of them is.

Modules meet by their canonical path, and numbers are compared as they are stored, dequantized.
So where AWQ smoothed one folder only, the rows and columns that it rescaled count as differences,
although the layers' outputs do not change by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from carnice_build.errors import CheckpointError, StoreError
from carnice_build.formats.folder import ModelFolder, open_folder
from carnice_build.formats.mlx.names import known_names
from carnice_build.formats.mlx.trace import Kind, Traced
from carnice_build.formats.registry import packed_suffixes, readers_of
from carnice_build.graph import NonFiniteValue
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture
from carnice_build.plugins import failures_blamed
from carnice_build.store.packs import digest_range
from carnice_build.tensors import SourceTensor

if TYPE_CHECKING:
    from carnice_build.formats.checks import FolderReader
    from carnice_build.formats.values import Values


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
class Side:
    """A module in one folder: how its numbers are stored, and bytes of all its tensors."""

    storage: str
    size: int


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
    norm = sum(pair[1] for pair in pairs)
    return float((sum(pair[0] for pair in pairs) / norm) ** 0.5) if norm else None


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
    first, second = _open(a), _open(b)
    names = list(dict.fromkeys([*first.modules, *second.modules]))
    with ThreadPoolExecutor(jobs) as pool, failures_blamed(*first.readers, *second.readers):
        modules = list(pool.map(lambda name: _diff(name, first, second, values), names))
    return FolderDiff(a, b, modules)


@dataclass(frozen=True)
class _Opened:
    """A folder, its architecture, what reads it, and each module's tensors by canonical path.

    Of several `readers`, the first that can tell of a module is believed.
    """

    folder: ModelFolder
    architecture: Architecture
    readers: Sequence[FolderReader]
    modules: dict[str, list[str]] = field(default_factory=dict)

    def storage(self, names: Sequence[str]) -> str:
        """The scheme of a packed module, the type of any other."""
        if len(names) > 1:
            for reader in self.readers:
                scheme = reader.scheme(self.module(names[0]))
                if scheme is not None:
                    return str(scheme)
        return ", ".join(sorted({self.folder.tensors[name].spec.dtype for name in names}))

    def module(self, name: str) -> str:
        """The module whose weight is stored in tensor `name`; others stand for themselves."""
        module, _, suffix = name.rpartition(".")
        return module if suffix in packed_suffixes() else name

    def values(self, names: Sequence[str]) -> Values:
        """The numbers of a module with these tensors; Incomparable when they cannot be told."""
        from carnice_build.formats.values import Incomparable, PlainValues

        if len(names) == 1:
            return PlainValues(self.folder.tensors[names[0]])
        for reader in self.readers:
            with suppress(Incomparable):
                return reader.values(self.folder.tensors, self.module(names[0]))
        raise Incomparable(f"{names[0]} is stored in a way not known")

    def stores_gain(self, module: str) -> bool:
        """True for a norm of which this folder has 1 + w, because it is one of MLX."""
        item = self.mlx_names.get(f"{module}.weight")
        return item is not None and item.kind is Kind.SHIFT and item.name in self.folder.tensors

    @cached_property
    def mlx_names(self) -> Mapping[str, Traced]:
        """What a folder of MLX would hold, by canonical name."""
        return known_names(self.architecture)

    @cached_property
    def canonical(self) -> Mapping[str, str]:
        """The canonical names of what a folder of MLX would hold, by its own names."""
        return {item.name: name for name, item in self.mlx_names.items()}

    def side(self, names: Sequence[str]) -> Side:
        """What the table says of the module with these tensors."""
        size = sum(self.folder.tensors[name].spec.nbytes for name in names)
        return Side(self.storage(names), size)


def _open(path: Path) -> _Opened:
    folder = open_folder(path)
    if folder.problems:
        raise StoreError(folder.problems[0], where=str(path))
    opened = _Opened(folder, architecture_of(folder.config, str(path)), readers_of(folder.config))
    for name in folder.tensors:
        opened.modules.setdefault(_canonical(opened, name), []).append(name)
    in_order = {_bare(name): index for index, name in enumerate(opened.architecture.tensors)}
    ordered = sorted(opened.modules, key=lambda name: (in_order.get(name, len(in_order)), name))
    return replace(opened, modules={module: opened.modules[module] for module in ordered})


def _bare(name: str) -> str:
    return name.removesuffix(".weight")


def _canonical(opened: _Opened, name: str) -> str:
    """The canonical path of the tensor's module, or its own where the model has none such."""
    module = opened.module(name)
    weight = name if module == name else f"{module}.weight"
    known = opened.canonical.get(weight) or opened.architecture.canonical_name(weight)
    return _bare(known or weight)


def _diff(name: str, a: _Opened, b: _Opened, values: bool) -> ModuleDiff:
    names_a, names_b = a.modules.get(name), b.modules.get(name)
    kind = a.architecture.module_kind(name)
    if names_a is None:
        assert names_b is not None
        return ModuleDiff(name, kind, None, b.side(names_b), State.ONLY_B)
    if names_b is None:
        return ModuleDiff(name, kind, a.side(names_a), None, State.ONLY_A)
    sides = a.side(names_a), b.side(names_b)
    if _digests(a.folder, names_a) == _digests(b.folder, names_b):
        return ModuleDiff(name, kind, *sides, State.SAME)
    if a.stores_gain(name) != b.stores_gain(name):
        return ModuleDiff(name, kind, *sides, State.INCOMPARABLE)
    sums = _compare(a, names_a, b, names_b) if values else (None, None)
    return ModuleDiff(name, kind, *sides, State.DIFFERENT, *sums)


def _digests(folder: ModelFolder, names: Sequence[str]) -> list[tuple[str, tuple[int, ...], str]]:
    """Type, shape and digest of each tensor, in an order that does not depend on the names."""
    tensors = [folder.tensors[name] for name in sorted(names)]
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
    a: _Opened, names_a: Sequence[str], b: _Opened, names_b: Sequence[str]
) -> tuple[float | None, float | None]:
    """Sums of squares of the difference and of A."""
    from carnice_build.formats.values import Incomparable, squared_sums

    try:
        return squared_sums(a.values(names_a), b.values(names_b))
    except (Incomparable, NonFiniteValue, ValueError):
        # A ValueError is a kernel's, on arrays of other types or group sizes than it knows.
        return None, None
