"""Format `nvfp4`: modelopt's two configs, and the tensors that they speak of.

`stored` has the bounds of what a tensor may be off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from carnice_build.checkpoint.stack import slab_stack
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.formats.checks import (
    FolderReader,
    QuantizedValues,
    Rounding,
    Tensors,
    TorchChecks,
)
from carnice_build.formats.exclusions import ignore_problems, modules_of
from carnice_build.formats.folder import ModelFolder, read_object, section
from carnice_build.formats.kv_cache import scale_problems
from carnice_build.formats.nvfp4.algorithms import ALGORITHMS, MIXED
from carnice_build.formats.nvfp4.files import KV_CACHE_SCHEME, LAYERS, SCALES, mixed_groups
from carnice_build.formats.nvfp4.stored import (
    fp8_round_trip,
    is_scale,
    mxfp8_round_trip,
    nvfp4_round_trip,
    nvfp4_rounded,
    read_scalar,
    scalar,
    stored_values,
)
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.statements import as_scheme, names, only_group, statements
from carnice_build.formats.values import Floats, Incomparable
from carnice_build.kernels import modelopt_fp8, nvfp4
from carnice_build.models.base import LINEARS, Architecture, FusedIn, Role, TensorFact
from carnice_build.tensors import STACK, SourceTensor, members

_CONFIG, _TWIN = "config.json", "hf_quant_config.json"
_ROLES = (*LINEARS, Role.EMBEDDING, Role.CONV)
_FOUR = 4
_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
_SCALARS = ("weight_scale_2", "input_scale")


class Nvfp4Reader(FolderReader):
    """Folders of modelopt; the numbers of NVFP4, FP8 and MXFP8 can be told."""

    suffixes = _PARTS

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Folders that name modelopt as their method."""
        return section(config, "quantization_config").get("quant_method") == "modelopt"

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """See `FolderReader.by_module`: the experts that are one tensor, apart."""
        return _by_module(tensors, architecture)

    def scheme(self, module: str) -> Scheme | None:
        """That of the module's algorithm, else that of the only config group."""
        stated = section(self.config, "quantization_config")
        layers = section(stated, LAYERS)
        if stated.get("quant_algo") == MIXED:
            stated = section(layers, module) or section(layers, _experts_module(module))
        elif "config_groups" in stated:
            return as_scheme(only_group(self.config))
        algorithm = ALGORITHMS.get(str(stated.get("quant_algo")))
        return None if algorithm is None else algorithm.scheme

    def values(self, tensors: Tensors, module: str) -> QuantizedValues:
        """See `FolderReader.values`."""
        scheme = self.scheme(module)
        if scheme is None:
            raise Incomparable(f"{module} is stored in a way not known")
        return stored_values(tensors, module, scheme)


class Nvfp4Checks(TorchChecks):
    """Folders as modelopt exports them.

    `default` is the algorithm of modules that no rule is about, `mixed` says that there may be
    others, and `kv_cache` that there are to be scales for a cache of FP8.
    """

    def __init__(
        self, default: str = "NVFP4", *, mixed: bool = False, kv_cache: bool = False
    ) -> None:
        self.default, self.mixed, self.kv_cache = default, mixed, kv_cache
        kind = ALGORITHMS[default].activations
        if mixed:
            self.activations = "activations as each linear has them"
        elif kind:
            self.activations = f"activations in {kind}"

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """Both configs say one thing, and say it of the tensors; fused linears share scales."""
        stated = section(folder.config, "quantization_config")
        twin = section(read_object(folder.path / _TWIN), "quantization")
        if self.kv_cache:
            yield from statements(_CONFIG, section(stated, "kv_cache_scheme"), KV_CACHE_SCHEME)
            yield from statements(_TWIN, twin, {"kv_cache_quant_algo": "FP8"})
            yield from scale_problems(folder, architecture, SCALES, borrowed=True)
        folder = replace(folder, tensors=self.by_module(folder.tensors, architecture))
        yield from statements(_CONFIG, stated, {"quant_method": "modelopt"})
        if self.mixed and stated.get("quant_algo") == MIXED:
            yield from statements(_TWIN, twin, {"quant_algo": MIXED})
            if section(stated, LAYERS) != section(twin, LAYERS):
                yield f"{_CONFIG} and {_TWIN} differ in {LAYERS}"
            yield from _layer_problems(folder, architecture, section(stated, LAYERS))
            yield from _group_problems(stated)
        else:
            yield from self._uniform_problems(folder, architecture, stated, twin)
        for name, tensor in folder.tensors.items():
            alone = name.endswith("weight_scale") and tensor.spec.dtype == "F32"
            if (alone or name.endswith(_SCALARS)) and not is_scale(read_scalar(tensor)):
                yield f"tensor {name} is no positive number"
        for parts in _fused(architecture):
            for part in _SCALARS:
                yield from _shared(folder, parts, part)

    def _uniform_problems(
        self,
        folder: ModelFolder,
        architecture: Architecture,
        stated: Mapping[str, Any],
        twin: Mapping[str, Any],
    ) -> Iterator[str]:
        """One algorithm is stated, and all modules that do not have it.

        It is the recipe's; where rules have others, they may be about all modules.
        """
        name = str(stated.get("quant_algo")) if self.mixed else self.default
        algorithm = ALGORITHMS.get(name, ALGORITHMS[self.default])
        yield from statements(_CONFIG, stated, {"quant_algo": algorithm.name})
        yield from statements(_TWIN, twin, algorithm.of_layer)
        if algorithm.grouped:
            group = section(section(stated, "config_groups"), "group_0")
            yield from statements(f"{_CONFIG} group_0", group, algorithm.group)
        ignore = names(stated.get("ignore"))
        if set(ignore) != set(names(twin.get("exclude_modules"))):
            yield f"{_CONFIG} ignores other modules than {_TWIN} excludes"
        yield from ignore_problems(folder, architecture, ignore, _ROLES, respelled=False)

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """See `FormatChecks.by_module`: the experts that are one tensor, apart."""
        return _by_module(tensors, architecture)

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
        """See `FormatChecks.values`."""
        return stored_values(tensors, module, scheme)

    def input_rounding(self, tensors: Tensors, module: str) -> Rounding | None:
        """See `TorchChecks.input_rounding`: under the static `input_scale`, where there is one.

        In NVFP4, each block has a scale of its own under it; of MXFP8, each
        has its own alone, and stored weights of four bits without an `input_scale` take what comes.
        """
        packed = tensors.get(f"{module}.weight_scale_2")
        if packed is not None and f"{module}.input_scale" not in tensors:
            return None
        if packed is None and f"{module}.input_scale" not in tensors:
            return mxfp8_round_trip
        kind = fp8_round_trip if packed is None else nvfp4_rounded
        return partial(kind, scale=scalar(tensors, f"{module}.input_scale"))

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `TorchChecks.rounded`."""
        if self.default == "MXFP8":
            return [mxfp8_round_trip(weight) for weight in weights]
        peaks = [np.abs(weight).max() for weight in weights]
        if self.default == "FP8":
            scales = map(modelopt_fp8.weight_scale, peaks)
            return [fp8_round_trip(*item) for item in zip(weights, scales, strict=True)]
        scale_2 = nvfp4.weight_scale_2(max(peaks))
        return [nvfp4_round_trip(weight, scale_2) for weight in weights]


def _by_module(tensors: Tensors, architecture: Architecture) -> Tensors:
    found = dict(tensors)
    for fact in architecture.tensors.values():
        if fact.stacked and fact.fused:
            found |= _apart(fact, fact.fused, tensors)
    return found


def _apart(
    fact: TensorFact, fused: FusedIn, tensors: Tensors
) -> Iterator[tuple[str, SourceTensor]]:
    """What each expert has of the tensors that all have together, by its own names."""
    experts, rows, *_ = fact.shape
    width, chosen = fused.of * rows, fused.rows(rows)
    whole = tensors.get(fused.name)
    if whole and whole.spec.shape == (experts, width):
        yield from _experts(slab_stack(fact.name, whole, *chosen))
    if fused.turned is None:
        return
    for part, end in (("weight", ""), ("weight_scale", "_weight_scale")):
        whole = tensors.get(f"{fused.turned}{end}")
        if whole and whole.spec.shape[::2] == (experts, width):
            yield from _experts(turned_stack(f"{fact.module}.{part}", whole, *chosen))
    for part in _SCALARS:
        if scalar := tensors.get(f"{fused.turned}_{part}"):
            for index in range(experts):
                yield f"{fact.module}.{part}".replace(STACK, str(index)), scalar


def _experts(stack: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """The tensor of each expert."""
    for index, (name, spec) in enumerate(members(stack.name, stack.spec)):
        yield name, SourceTensor(name, spec, stack.file, stack.offset + index * spec.nbytes)


def _experts_module(module: str) -> str:
    """What the library calls the module of an expert's linear: that of all experts."""
    return module.partition(".experts.")[0] + ".experts"


def _layer_problems(
    folder: ModelFolder, architecture: Architecture, layers: Mapping[str, Any]
) -> Iterator[str]:
    """What is stated of each module, and what the folder holds of it."""
    known = set()
    for fact in architecture.built.values():
        if fact.role not in _ROLES:
            continue
        for module in modules_of(fact):
            name = fact.module.partition(f".{STACK}")[0]
            known.add(name)
            stated = section(layers, name).get("quant_algo")
            if has := _other_tensors(module, stated, folder.tensors):
                yield f"{_CONFIG} states {stated} of {module}, which {has}"
    for name, layer in layers.items():
        algorithm = ALGORITHMS.get(str(section(layers, name).get("quant_algo")))
        if name not in known:
            yield f"{_CONFIG} states {LAYERS} of {name}, which is no module of the model"
        elif algorithm is None or layer != algorithm.of_layer:
            yield f"{_CONFIG} states {layer} of {name}, which is not known"
    for fusion in architecture.fusions:
        found = {str(section(layers, _stack(part)).get("quant_algo")) for part in fusion.parts}
        if len(found) > 1:
            yield (
                f"{_CONFIG} states {' and '.join(sorted(found))} of {', '.join(fusion.parts)}, "
                "which engines fuse"
            )


def _other_tensors(module: str, stated: Any, tensors: Mapping[str, SourceTensor]) -> str:
    """What is stored of a module where it is not what its algorithm has; nothing where it is.

    No two algorithms have the same tensors.  One that is not known has its own complaint.
    """
    tensor = tensors.get(f"{module}.weight")
    if stated is None or tensor is None or tensor.spec.dtype in WIDE_FLOATS:
        stored = tensor is not None and tensor.spec.dtype not in WIDE_FLOATS
        return f"is {_kind(tensor)}" if stored != (stated is not None) else ""
    algorithm = ALGORITHMS.get(str(stated))
    found = [part for part in _PARTS if f"{module}.{part}" in tensors]
    codes = "U8" if algorithm and algorithm.scheme.bits == _FOUR else "F8_E4M3"
    if algorithm is None or (found == [*algorithm.suffixes] and tensor.spec.dtype == codes):
        return ""
    return f"is {_kind(tensor)} and has {', '.join(found)}"


def _group_problems(stated: Mapping[str, Any]) -> Iterator[str]:
    """Config groups say of each module what its entry says, unless that is not known."""
    layers = section(stated, LAYERS)
    found = {name: str(section(layers, name).get("quant_algo")) for name in layers}
    if {*found.values()} <= ALGORITHMS.keys() and stated.get("config_groups") != mixed_groups(
        found
    ):
        yield f"{_CONFIG} has other config_groups than follow from {LAYERS}"


def _stack(module: str) -> str:
    return module.partition(f".{STACK}")[0]


def _kind(tensor: SourceTensor | None) -> str:
    return "not there" if tensor is None else f"of type {tensor.spec.dtype}"


def _fused(architecture: Architecture) -> Iterator[Sequence[str]]:
    """What engines fuse; of experts, the linears of each."""
    for fusion in architecture.fusions:
        stacked = STACK in fusion.module
        count = architecture.built[f"{fusion.parts[0]}.weight"].shape[0] if stacked else 1
        for number in range(count):
            yield [part.replace(STACK, str(number)) for part in fusion.parts]


def _shared(folder: ModelFolder, parts: Sequence[str], part: str) -> Iterator[str]:
    """Engines that fuse linears take the scale of one of them for all."""
    names = [f"{module}.{part}" for module in parts]
    there = [name for name in names if name in folder.tensors]
    found = {name: read_scalar(folder.tensors[name]) for name in there}
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{name} {value}" for name, value in found.items())
        yield f"fused linears differ in {part}: {shown}"
