"""Format `nvfp4`: modelopt's two configs, and the bound of E2M1 codes under E4M3 scales.

A block of 16 with largest magnitude A has the scale s = E4M3(max(r, 2^-9)), r = A / (6 scale_2),
and each weight w becomes t times the code nearest to w / t, for t = s scale_2.

- E4M3 has three bits behind the point: s is off by at most 2^-4 of the power of two below r, and
  by 2^-10 where s is denormal, below 2^-6.  This bounds t from below and above.
- Codes are 0.5 apart up to 2, then 1 up to 4, then 2 up to 6: nearest is within half of that.
- Where s was rounded down, the block's largest weights lie beyond 6 t, and are cut to it.

Blocks of one tensor have scales of at most 448, because scale_2 is the largest A over 6 * 448 (of
all tensors that are fused), so nothing else is cut.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from carnice_build.checkpoint.stack import slab_stack
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.formats.checks import FolderReader, Rounding, Tensors, TorchChecks
from carnice_build.formats.exclusions import ignore_problems
from carnice_build.formats.folder import ModelFolder, read_object, section
from carnice_build.formats.nvfp4.ops import BLOCK
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.statements import as_scheme, names, only_group, statements
from carnice_build.formats.values import Floats, Incomparable, matrix, read_rows
from carnice_build.kernels import nvfp4
from carnice_build.models.base import LINEARS, Architecture, FusedIn, Role, TensorFact
from carnice_build.tensors import STACK, SourceTensor, members

_CONFIG, _TWIN = "config.json", "hf_quant_config.json"
_ROLES = (*LINEARS, Role.EMBEDDING, Role.CONV)
_SCALARS = ("weight_scale_2", "input_scale")

_FLOAT32_SLACK = 1.001
"""The quantizer computes in float32, so a weight halfway between codes may go either way."""


class Nvfp4Reader(FolderReader):
    """Folders of modelopt; the numbers of NVFP4 can be told."""

    suffixes = ("weight", "weight_scale", "weight_scale_2", "input_scale")

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Folders that name modelopt as their method."""
        return section(config, "quantization_config").get("quant_method") == "modelopt"

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """See `FolderReader.by_module`: the experts that are one tensor, apart."""
        return _by_module(tensors, architecture)

    def scheme(self, module: str) -> Scheme | None:
        """That of the only config group."""
        return as_scheme(only_group(self.config))

    def values(self, tensors: Tensors, module: str) -> Nvfp4Values:
        """See `FolderReader.values`."""
        if self.scheme(module) != Scheme(4, BLOCK, "float"):
            raise Incomparable(f"{module} is not in NVFP4")
        return Nvfp4Values(tensors, module)


class Nvfp4Checks(TorchChecks):
    """Folders as modelopt exports them."""

    activations = "activations in NVFP4"

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """Both configs say one thing, and say it of the tensors; fused linears share scales."""
        stated = section(folder.config, "quantization_config")
        twin = section(read_object(folder.path / _TWIN), "quantization")
        group = section(section(stated, "config_groups"), "group_0")
        algorithm, blocks = {"quant_algo": "NVFP4"}, {"group_size": BLOCK}
        yield from statements(_CONFIG, stated, {"quant_method": "modelopt", **algorithm})
        yield from statements(_CONFIG, section(group, "weights"), blocks)
        yield from statements(_TWIN, twin, algorithm | blocks)
        folder = replace(folder, tensors=self.by_module(folder.tensors, architecture))
        ignore = names(stated.get("ignore"))
        if set(ignore) != set(names(twin.get("exclude_modules"))):
            yield f"{_CONFIG} ignores other modules than {_TWIN} excludes"
        yield from ignore_problems(folder, architecture, ignore, _ROLES, respelled=False)
        for name, tensor in folder.tensors.items():
            if name.endswith(_SCALARS) and not _is_scale(_read_scalar(tensor)):
                yield f"tensor {name} is no positive number"
        for parts in _fused(architecture):
            for part in _SCALARS:
                yield from _shared(folder, parts, part)

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """See `FormatChecks.by_module`: the experts that are one tensor, apart."""
        return _by_module(tensors, architecture)

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> Nvfp4Values:
        """See `FormatChecks.values`."""
        return Nvfp4Values(tensors, module)

    def input_rounding(self, tensors: Tensors, module: str) -> Rounding:
        """See `TorchChecks.input_rounding`: rounded in blocks under the static `input_scale`.

        All experts have one.
        """
        scale = _scalar(tensors, f"{module.replace(STACK, '0')}.input_scale")

        def rounded(rows: Floats) -> Floats:
            out = np.empty_like(rows)
            bad_index = nvfp4.round_rows(rows, scale, out)
            # Numbers that are not finite shall be seen where the model says them.
            return out if bad_index < 0 else rows

        return rounded

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `TorchChecks.rounded`."""
        scale_2 = nvfp4.weight_scale_2(max(np.abs(weight).max() for weight in weights))
        return [_round_trip(weight, scale_2) for weight in weights]


class Nvfp4Values:
    """A module in NVFP4, dequantized by code * (scale * scale_2)."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str) -> None:
        """Take `module`'s tensors; Incomparable when they do not fit together."""
        try:
            self._tensors = [tensors[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale")]
        except KeyError:
            raise Incomparable(f"{module} is not in NVFP4") from None
        packed, grid = (matrix(tensor.spec) for tensor in self._tensors)
        self.shape = packed[0], 2 * packed[1]
        if grid != (packed[0], self.shape[1] // BLOCK):
            raise Incomparable(f"{module} has no scale for each block of {BLOCK}")
        self._scale_2 = _scalar(tensors, f"{module}.weight_scale_2")

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        packed, scales = (
            read_rows(tensor, tensor.spec, start, stop).array for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        nvfp4.dequantize_rows(packed, scales, self._scale_2, out)
        return out

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        blocks = source.reshape(-1, BLOCK)
        return allowance(blocks, self._scale_2).reshape(source.shape)


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


def allowance(blocks: Floats, scale_2: float) -> Floats:
    """The most that each weight of `blocks` [n, 16] may be off; see the module's text."""
    magnitude = np.abs(blocks)
    ratio = np.maximum(magnitude.max(axis=1) / (6 * scale_2), 2.0**-9)
    half_place = np.maximum(np.exp2(np.floor(np.log2(ratio)) - 4), 2.0**-10)
    low = ((ratio - half_place) * scale_2)[:, None]
    high = ((ratio + half_place) * scale_2)[:, None]
    code = magnitude / low
    half_gap = np.where(code <= 2, 0.25, np.where(code <= 4, 0.5, 1.0))
    allowed: Floats = np.maximum(half_gap * high, magnitude - 6 * low) * _FLOAT32_SLACK
    return allowed


def _round_trip(weight: Floats, scale_2: np.float32) -> Floats:
    rows, columns = weight.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // BLOCK), np.uint8)
    nvfp4.quantize_rows(weight, "F32", scale_2, packed, scales)
    out = np.empty_like(weight)
    nvfp4.dequantize_rows(packed, scales, scale_2, out)
    return out


def _scalar(tensors: Tensors, name: str) -> float:
    """A positive float32; Incomparable when the tensor is missing or holds something else."""
    tensor = tensors.get(name)
    value = _read_scalar(tensor) if tensor else math.nan
    if not _is_scale(value):
        raise Incomparable(f"{name} is no positive number")
    return value


def _is_scale(value: float) -> bool:
    return 0 < value < math.inf


def _read_scalar(tensor: SourceTensor) -> float:
    """The value of a float32 tensor of one element, NaN for any other."""
    if tensor.spec.dtype != "F32" or tensor.spec.size != 1 or tensor.file is None:
        return math.nan
    buffer = bytearray(4)
    tensor.file.read_into(tensor.offset, memoryview(buffer))
    return float(struct.unpack("<f", buffer)[0])


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
    found = {name: _read_scalar(folder.tensors[name]) for name in there}
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{name} {value}" for name, value in found.items())
        yield f"fused linears differ in {part}: {shown}"
