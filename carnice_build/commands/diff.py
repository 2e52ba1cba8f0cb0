"""Comparing two model folders module by module, in whatever format each of them is.

Modules meet by their canonical path, and numbers are compared as they are stored, dequantized.
So where AWQ smoothed one folder only, the rows and columns that it rescaled count as differences,
although the layers' outputs do not change by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnice_build.errors import CheckpointError, StoreError
from carnice_build.formats.folder import ModelFolder, open_folder
from carnice_build.graph import NonFiniteValue
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture
from carnice_build.store.packs import digest_range
from carnice_build.tensors import SourceTensor

if TYPE_CHECKING:
    from carnice_build.formats.values import Values


@dataclass(frozen=True)
class _Method:
    """A way to store quantized modules.

    `parts` are the ends of their tensors' names; `readable` is what config.json states where the
    numbers can be told from them.
    """

    parts: tuple[str, ...]
    readable: Mapping[str, Any] = field(default_factory=dict)


_MLX, _MODELOPT, _AUTOROUND, _COMPRESSED = "mlx", "modelopt", "auto-round", "compressed-tensors"
_PERMUTATION = "weight_g_idx"
_METHODS = {
    _MLX: _Method(("weight", "scales", "biases")),
    _MODELOPT: _Method(
        ("weight", "weight_scale", "weight_scale_2", "input_scale"), {"bits": 4, "type": "float"}
    ),
    _AUTOROUND: _Method(
        ("qweight", "qzeros", "scales"), {"bits": 4, "packing_format": "auto_round:auto_gptq"}
    ),
    _COMPRESSED: _Method(
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", _PERMUTATION),
        {"bits": 4, "type": "int"},
    ),
}
"""By what config.json calls them, but for MLX, whose section has no such name."""

_PARTS = frozenset(part for method in _METHODS.values() for part in method.parts)


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
    with ThreadPoolExecutor(jobs) as pool:
        modules = list(pool.map(lambda name: _diff(name, first, second, values), names))
    return FolderDiff(a, b, modules)


@dataclass(frozen=True)
class _Opened:
    """A folder, its architecture, and the tensors of each module by canonical path."""

    folder: ModelFolder
    architecture: Architecture
    modules: dict[str, list[str]]

    def storage(self, names: Sequence[str]) -> str:
        """Bits and group size of a packed module, the type of any other."""
        settings = self.folder.settings(_module(names[0]))
        bits, group = settings.get("bits"), settings.get("group_size")
        if len(names) > 1 and bits and group:
            width = f"FP{bits}" if settings.get("type") == "float" else f"{bits}-bit"
            return f"{width} g{group}"
        return ", ".join(sorted({self.folder.tensors[name].spec.dtype for name in names}))

    def stores_gain(self, module: str) -> bool:
        """True for a norm of which this folder has 1 + w, because it is one of mlx-lm."""
        name = f"{module}.weight"
        mlx_name = self.architecture.mlx_name(name)
        return self.architecture.mlx_shifted(name) and mlx_name in self.folder.tensors

    def side(self, names: Sequence[str]) -> Side:
        """What the table says of the module with these tensors."""
        size = sum(self.folder.tensors[name].spec.nbytes for name in names)
        return Side(self.storage(names), size)


def _open(path: Path) -> _Opened:
    folder = open_folder(path)
    if folder.problems:
        raise StoreError(folder.problems[0], where=str(path))
    architecture = architecture_of(folder.config, str(path))
    modules: dict[str, list[str]] = {}
    for name in folder.tensors:
        modules.setdefault(_canonical(architecture, name), []).append(name)
    in_order = {_module(name): index for index, name in enumerate(architecture.tensors)}
    ordered = sorted(modules, key=lambda module: (in_order.get(module, len(in_order)), module))
    return _Opened(folder, architecture, {module: modules[module] for module in ordered})


def _module(name: str) -> str:
    """The module whose weight is stored in tensor `name`; other tensors stand for themselves."""
    module, _, part = name.rpartition(".")
    return module if part in _PARTS else name


def _canonical(architecture: Architecture, name: str) -> str:
    """The canonical path of the tensor's module, or its own where the model has none such."""
    module = _module(name)
    weight = name if module == name else f"{module}.weight"
    return _module(architecture.canonical_name(weight) or weight)


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
    sums = _compare(a.folder, names_a, b.folder, names_b) if values else (None, None)
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
    a: ModelFolder, names_a: Sequence[str], b: ModelFolder, names_b: Sequence[str]
) -> tuple[float | None, float | None]:
    """Sums of squares of the difference and of A."""
    from carnice_build.formats.values import Incomparable, squared_sums

    try:
        return squared_sums(_values(a, names_a), _values(b, names_b))
    except (Incomparable, NonFiniteValue, ValueError):
        # A ValueError is a kernel's, on arrays of other types or group sizes than it knows.
        return None, None


def _values(folder: ModelFolder, names: Sequence[str]) -> Values:
    """The module's numbers; Incomparable when it is stored in a way not known here."""
    from carnice_build.formats.autoround.checks import Int4Values
    from carnice_build.formats.compressed_tensors.checks import PackedValues
    from carnice_build.formats.nvfp4.checks import Nvfp4Values
    from carnice_build.formats.values import AffineValues, Incomparable, PlainValues

    tensors, module = folder.tensors, _module(names[0])
    if len(names) == 1:
        return PlainValues(tensors[names[0]])
    method, settings = _method(folder.config), folder.settings(module)
    readable = _METHODS[method].readable if method in _METHODS else None
    group = settings.get("group_size")
    if readable is None or any(settings.get(key) != value for key, value in readable.items()):
        raise Incomparable(f"{module} is stored in a way not known")
    if type(group) is not int or group < 1:
        raise Incomparable(f"{module} is not in groups")
    if method == _MLX:
        return AffineValues(tensors, module, settings)
    if method == _MODELOPT:
        return Nvfp4Values(tensors, module)
    # How the codes were found only matters for how near they must be to a source.
    if method == _AUTOROUND:
        return Int4Values(tensors, module, "nearest", group)
    if f"{module}.{_PERMUTATION}" in tensors:
        raise Incomparable(f"the columns of {module} are in another order")
    return PackedValues(tensors, module, "memoryless_minmax", group)


def _method(config: Mapping[str, Any]) -> str:
    """What config.json calls the way in which modules are quantized."""
    if isinstance(config.get("quantization"), dict):
        return _MLX
    stated = config.get("quantization_config")
    return str(stated.get("quant_method")) if isinstance(stated, dict) else ""
