"""Where a model of transformers wants the tensors that checkpoints name in their own way.

transformers says itself, in the mapping that its own loader follows, what it renames, and which
tensors it makes of several: one of all experts, say.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from carnice_build.tensors import STACK

Owners = tuple[tuple[str, ...], ...]
"""The linears whose weights a parameter holds: for each expert, or for all of it in one entry."""


@dataclass
class _Target:
    """A tensor of the model: what makes it, and of what, by the pattern that the names match."""

    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def merges(self) -> bool:
        """True when its first axis counts experts."""
        operations = self.converter.operations if self.converter else ()
        return any(isinstance(operation, MergeModulelist) for operation in operations)


class Placing:
    """Renames, casts and puts together the tensors of one model."""

    def __init__(self, model: Any, whole: bool = False) -> None:
        """`model` is transformers', on meta.

        `whole` is for the names that a checkpoint has for all of a model: what they begin with
        may differ from the model's own.
        """
        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._whole = whole
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self._converters += _experts_converters(model)
        self._wanted = model.state_dict()
        plan = model._get_dtype_plan(model.dtype)
        self._types = build_glob_alternation(list(plan))[0] if plan else None

    def place(self, tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
        """The model's tensors made of `tensors`, on `device`, of the types that its loader gives.

        What the model has nothing for keeps its name.
        """
        placed: dict[str, Tensor] = {}
        for name, target in self._targets(tensors).items():
            cast = {source: self._cast(name, tensors[source], device) for source in _names(target)}
            placed |= self._made(name, target, cast)
        return placed

    def owners(self, tensors: Mapping[str, Tensor]) -> dict[str, Owners]:
        """By each tensor of the model that is weights, the linears that these are of.

        Linears are named as `tensors` are, each expert's by its number.
        """
        return {
            name: tuple(_linears_of(target, tensors))
            for name, target in self._targets(tensors).items()
            if all(source.endswith(".weight") for source in _names(target))
        }

    def _targets(self, names: Iterable[str]) -> dict[str, _Target]:
        targets: dict[str, _Target] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = self._renamed(name)
            converters = (item for item in self._converters if pattern in item.source_patterns)
            target = targets.setdefault(renamed, _Target(next(converters, None)))
            target.sources.setdefault(pattern or name, []).append(name)
        return targets

    def _renamed(self, name: str) -> tuple[str, str | None]:
        for start in _starts(name) if self._whole else (name,):
            for renamed, pattern in (self._by_loader(start), (start, None)):
                if renamed in self._wanted or renamed.replace(STACK, "0") in self._wanted:
                    return renamed, pattern
        return name, None

    def _by_loader(self, name: str) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        return rename_source_key(name, self._renamings, self._converters, prefix, self._wanted)

    def _cast(self, target: str, tensor: Tensor, device: str) -> Tensor:
        wide = self._types is not None and self._types.search(target)
        wanted = self._wanted.get(target.replace(STACK, "0"))
        dtype = self._model.dtype if wanted is None else wanted.dtype
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, torch.float32 if wide else dtype)

    def _made(self, name: str, target: _Target, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if target.converter is None:
            (tensor,) = tensors.values()
            if STACK in name:
                return {name.replace(STACK, str(index)): part for index, part in enumerate(tensor)}
            return {name: tensor}
        converter: Any = deepcopy(target.converter)
        for pattern, names in target.sources.items():
            parts = [tensors[source] for source in names]
            converter.collected_tensors[pattern] = parts[0] if STACK in names[0] else parts
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {key: item[0] if isinstance(item, list) else item for key, item in made.items()}


def _starts(name: str) -> Iterator[str]:
    """`name`, and what is left of it without its first words."""
    parts = name.split(".")
    return (".".join(parts[first:]) for first in range(len(parts)))


def _names(target: _Target) -> Iterator[str]:
    return (name for names in target.sources.values() for name in names)


def _linears_of(target: _Target, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    linears = [
        [name.removesuffix(".weight") for name in names] for names in target.sources.values()
    ]
    first = next(_names(target))
    if STACK in first:
        for index in range(len(tensors[first])):
            yield tuple(name.replace(STACK, str(index)) for name, *_ in linears)
    elif target.merges:
        yield from zip(*linears, strict=True)
    else:
        yield tuple(name for names in linears for name in names)


def _experts_converters(model: nn.Module) -> list[WeightConverter]:
    """What makes the fused experts of a model of the linears of each.

    For those that transformers' mapping knows no other layout of: how they are fused is told by
    the attributes that transformers' own kernels go by.
    """
    found: dict[str, WeightConverter] = {}
    for path, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "is_concatenated"):
            name = path.rpartition(".")[2]
            for converter in _fusing(name, module):
                found.setdefault(converter.target_patterns[0], converter)
    return list(found.values())


def _fusing(name: str, module: Any) -> Iterator[WeightConverter]:
    joining: list[ConversionOps] = [Concatenate(dim=1)]
    if not module.is_concatenated:
        joining.append(Interleave(dim=1, inverse=True))
    first = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    for kind in ("weight", "bias"):
        suffix = "" if kind == "weight" else "_bias"
        turning = [Transpose(1, 2)] if module.is_transposed and kind == "weight" else []
        for parts in (first, ("down_proj",)):
            target = "gate_up_proj" if len(parts) > 1 else parts[0]
            operations = [MergeModulelist(dim=0), *(joining if len(parts) > 1 else ()), *turning]
            yield WeightConverter(
                [f".{name}.*.{part}.{kind}" for part in parts],
                f".{name}.{target}{suffix}",
                operations,
            )
