"""A model folder as a list of modules under canonical names, whatever its format spells them.

The experts of one projection of one layer are one module here, `...experts.*.gate_proj`: whether a
folder has a tensor for each of them, one stack of all, or rows of a stack that holds others too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import StoreError
from carnice_build.formats.folder import ModelFolder, open_folder
from carnice_build.formats.mlx.names import known_names, stack_names
from carnice_build.formats.mlx.trace import Kind, Traced
from carnice_build.formats.registry import packed_suffixes, readers_of
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture, TensorFact
from carnice_build.planning.gather import part_of, stored
from carnice_build.tensors import STACK, SourceTensor, numbered, stacks

if TYPE_CHECKING:
    from carnice_build.formats.checks import FolderReader, Tensors
    from carnice_build.formats.values import Values


_BYTES = "U8"


@dataclass(frozen=True)
class Side:
    """A module in one folder: how its numbers are stored, and bytes of all its tensors."""

    storage: str
    size: int


@dataclass(frozen=True)
class StoredModule:
    """A module's tensors in one folder.

    `held` are the folder's own tensors that its bytes are in, of which it has one part in `of`.
    `pieces` names, for each expert that has tensors of its own, or once, what its numbers are read
    from, among `OpenedSide.tensors`.
    """

    held: list[str] = field(default_factory=list)
    pieces: dict[str, list[str]] = field(default_factory=dict)
    of: int = 1


@dataclass(frozen=True)
class OpenedSide:
    """A folder, its architecture, what reads it, and its modules by canonical path.

    `tensors` are the folder's, stacks seen as one matrix [experts * rows, ...], and the stacks that
    are rows of others; `told` are those that a reader tells of others.
    Of several `readers`, the first that can tell of a module is believed.
    """

    folder: ModelFolder
    architecture: Architecture
    readers: Sequence[FolderReader]
    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    modules: dict[str, StoredModule] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def side(self, module: StoredModule) -> Side:
        """What the table says of a module."""
        size = sum(self.folder.tensors[name].spec.nbytes for name in module.held)
        found = dict.fromkeys(self._storage(names) for names in module.pieces.values())
        return Side(", ".join(sorted(found)), size // module.of)

    def _storage(self, names: Sequence[str]) -> str:
        """The scheme of a packed module, the type of any other."""
        if self._packed(names) or names[0] in self.told:
            for reader in self.readers:
                scheme = reader.scheme(self._module(names[0]))
                if scheme is not None:
                    return str(scheme)
        return ", ".join(sorted({self.tensors[name].spec.dtype for name in names}))

    def _packed(self, names: Sequence[str]) -> bool:
        """Whether numbers are of several tensors, or of one of bytes that say nothing alone."""
        return len(names) > 1 or self.tensors[names[0]].spec.dtype == _BYTES

    def _module(self, name: str) -> str:
        """The module whose weight is stored in tensor `name`; others stand for themselves."""
        module, _, suffix = name.rpartition(".")
        return module if suffix in packed_suffixes() else name

    def values(self, module: StoredModule) -> Values:
        """The numbers of a module, of all experts in turn; Incomparable if they cannot be told."""
        from carnice_build.formats.values import Joined

        # Files may have expert 10 before expert 2.
        pieces = sorted(module.pieces, key=_numbers)
        found = [self._values(module.pieces[piece]) for piece in pieces]
        return found[0] if len(found) == 1 else Joined(found)

    def _values(self, names: Sequence[str]) -> Values:
        from carnice_build.formats.values import Incomparable, PlainValues

        if not self._packed(names):
            return PlainValues(self.tensors[names[0]])
        for reader in self.readers:
            with suppress(Incomparable):
                return reader.values(self.tensors, self._module(names[0]))
        raise Incomparable(f"{names[0]} is stored in a way not known")

    def stores_gain(self, module: str) -> bool:
        """True for a norm of which this folder has 1 + w, because it is one of MLX."""
        item = self._mlx_names.get(f"{module}.weight")
        if item is None or item.kind is not Kind.SHIFT or not self._of_mlx:
            return False
        return item.name in self.folder.tensors

    @cached_property
    def _of_mlx(self) -> bool:
        """Whether tensors have names that MLX alone gives them; most have those of checkpoints."""
        own = {item.name for item in self._mlx_names.values()} - self.architecture.built.keys()
        return not own.isdisjoint(self.folder.tensors)

    @cached_property
    def _mlx_names(self) -> Mapping[str, Traced]:
        """What a folder of MLX would hold, by canonical name."""
        return known_names(self.architecture)

    @cached_property
    def _canonical_of_mlx(self) -> Mapping[str, str]:
        """The canonical names of what a folder of MLX would hold, by its own names."""
        return {item.name: name for name, item in self._mlx_names.items()}

    @cached_property
    def _fused(self) -> Mapping[str, Sequence[TensorFact]]:
        """The stacks that one tensor may hold, by what it may be called."""
        found: dict[str, list[TensorFact]] = {}
        for fact in self.architecture.tensors.values():
            for name in fact.fused.names if fact.stacked and fact.fused else ():
                found.setdefault(name, []).append(fact)
        return found

    def take(self) -> None:
        """Sort the folder's tensors into modules."""
        found: Mapping[str, SourceTensor] = self.folder.tensors
        parts: dict[str, Tensors] = {}
        for reader in self.readers:
            found = reader.by_module(found, self.architecture)
            parts |= reader.parts(self.folder.tensors, self.architecture)
        self.tensors.update(found)
        for name in self.folder.tensors:
            told = parts.get(name, {})
            self.tensors.update(told)
            self.told.update(told)
            for part in told if name in parts else [name]:
                stacks_of = [
                    self._take_part(part, name, fact, end) for fact, end in self._stacks_in(part)
                ]
                if not any(stacks_of):
                    self._take(part, held=name)

    def _stacks_in(self, name: str) -> Iterator[tuple[TensorFact, str]]:
        """The stacks that tensor `name` holds rows of, and how such a tensor of an expert ends."""
        for fact in self._fused.get(name, ()):
            yield fact, fact.name.rpartition(".")[2]
        for end in packed_suffixes():
            for fact in self._fused.get(name.removesuffix(f"_{end}"), ()):
                if name.endswith(f"_{end}"):
                    yield fact, end

    def _take_part(self, name: str, held: str, fact: TensorFact, end: str) -> bool:
        """Take the rows that a stack has in tensor `name`; False where it has none.

        The folder has its bytes in `held`.
        """
        assert fact.fused is not None
        pieces = numbered(f"{fact.module}.{end}", fact.shape[0])
        if pieces[0] not in self.tensors:
            whole = self.tensors[name]
            if stored(fact, [name]) != ([name], whole.spec.shape):
                return False
            part = part_of(fact, whole, turned=name == fact.fused.turned)
            self.tensors[fact.name] = _as_matrix(part)
            pieces = [fact.name]
            if name in self.told:
                self.told.add(fact.name)
        module = self.modules.setdefault(_bare(fact.name), StoredModule(of=fact.fused.of))
        self._hold(module, held, pieces)
        return True

    def _hold(self, module: StoredModule, held: str, pieces: Sequence[str]) -> None:
        """Have a module in tensor `held` of the folder, with what its numbers are read from."""
        if held not in module.held:
            module.held.append(held)
        for piece in pieces:
            if piece not in (names := module.pieces.setdefault(self._module(piece), [])):
                names.append(piece)

    def _take(self, name: str, held: str) -> None:
        """Take tensor `name`, whose bytes the folder has in `held`, as one of its module.

        That may be an expert's.
        """
        canonical = self._canonical(name)
        if STACK in canonical:
            self.tensors[name] = _as_matrix(self.tensors[name])
        found = (stack for stack in stacks(canonical) if self._is_stack(stack))
        module = self.modules.setdefault(_bare(next(found, canonical)), StoredModule())
        self._hold(module, held, [name])

    def _is_stack(self, name: str) -> bool:
        return name in self.architecture.tensors

    def _canonical(self, name: str) -> str:
        """The name of the module's weight, or the tensor's own where the model has none such."""
        module = self._module(name)
        weight = name if module == name else f"{module}.weight"
        facts = self.architecture.tensors
        known = self._canonical_of_mlx.get(weight) or self.architecture.canonical_name(weight)
        if known or weight in facts:
            return known or weight
        shape = self.tensors[name].spec.shape
        for stack in stack_names(weight):
            fact = facts.get(self.architecture.canonical_name(stack) or stack)
            if fact and len(shape) > 1 and shape[0] == fact.shape[0]:
                return fact.name
        return weight


def open_side(path: Path) -> OpenedSide:
    """Open a folder, its modules in the order of the model; StoreError when it cannot be read."""
    folder = open_folder(path)
    if folder.problems:
        raise StoreError(folder.problems[0], where=str(path))
    architecture = architecture_of(folder.config, str(path))
    opened = OpenedSide(folder, architecture, readers_of(folder))
    opened.take()
    in_order = {_bare(name): index for index, name in enumerate(architecture.tensors)}
    ordered = sorted(opened.modules, key=lambda name: (in_order.get(name, len(in_order)), name))
    return replace(opened, modules={module: opened.modules[module] for module in ordered})


def _bare(name: str) -> str:
    return name.removesuffix(".weight")


def _numbers(name: str) -> list[int]:
    return [int(word) for word in name.split(".") if word.isdecimal()]


def _as_matrix(stack: SourceTensor) -> SourceTensor:
    """A stack [experts, rows, ...] as [experts * rows, ...], which is read a few rows at a time."""
    count, *shape = stack.spec.shape
    rows, *rest = shape or [1]
    return replace(stack, spec=TensorSpec(stack.spec.dtype, (count * rows, *rest)))
