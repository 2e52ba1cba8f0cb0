"""Format `mlx`: config.json as MLX's libraries read it, and the bounds of its quantization.

Of mode affine:

- A group spans R = max - min in top = 2^bits - 1 steps.  mlx then moves zero onto a step: with x
  steps between zero and the end of larger magnitude (x >= top/2), each becomes x / rint(x) as
  long, at most top / (top - 1).  Rounding to a step leaves at most half of one.
- Where that made steps shorter, the grid ends up to one step before the end of smaller magnitude:
  a weight at distance d from that end may be off by one step less d.
- A weight of another type than scale and bias is cast to theirs first, which may make the other end
  the larger one, so the above is said of what was cast.
- For r, half a unit in the last place of that type, cast and storage are at most 4 r max|w|
  (2 r max|w| for code times scale, r max|w| each for bias and cast).

Of the others, for M the largest code and r of the type that the weight was cast to:
- The scale s comes from max|w| / M, which cast and division move by at most 3 r (and by half of the
  type's smallest number): what it may be lies between those of the ends, which are equal or
  neighbours.
- A code is the nearest, so a weight of t = |w| / s steps is off by at most half of the distance of
  the codes about t, and by |w| - M s where it is beyond the largest.
- Deciding on a cast weight, and in nvfp4 on a rounded quotient, moves that by r |w| each; powers of
  two and code times scale are exact.
- A group whose max|w| / M is rounded to 0 becomes 0, which is covered by 2 M halves of the smallest
  number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from carnice_build.dtypes import NUMPY_NAME, WIDE_FLOATS, TensorSpec
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.checks import FolderReader, FormatChecks, QuantizedValues, Tensors
from carnice_build.formats.folder import ModelFolder, section
from carnice_build.formats.library import Library
from carnice_build.formats.mlx.kept import METHOD
from carnice_build.formats.mlx.modes import AFFINE, MODES, defaults, mode_of
from carnice_build.formats.mlx.names import published, published_drafter
from carnice_build.formats.mlx.ops import SUFFIXES, Transform, TransformQuantize
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Traced
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.statements import as_scheme
from carnice_build.formats.values import (
    HALF_PLACE,
    HALF_SMALLEST,
    Floats,
    Incomparable,
    Values,
    as_float32,
    matrix,
    read_rows,
)
from carnice_build.graph import ActionOutput, Stacked, TensorData, TensorRef
from carnice_build.kernels import mlx_floats
from carnice_build.kernels.affine import dequantize_rows
from carnice_build.kernels.elementwise import cast, zero_non_finite
from carnice_build.models.base import Architecture, Part, TensorFact

Shape = tuple[int, ...]

FLOAT_SUFFIXES = SUFFIXES[:2]
"""What a module has that is of another mode than affine."""

_SMALLEST_STEP = 1.5e-7
"""mlx takes no step below 1e-7; moving zero onto one makes it at most half as long again."""

_FLOAT32_SLACK = 1.001
"""The quantizer computes in float32, so a weight halfway between steps may go either way."""


class MlxReader(FolderReader):
    """Folders of mlx-lm and mlx-vlm, quantized."""

    suffixes = SUFFIXES

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """They have a section `quantization`."""
        return isinstance(config.get("quantization"), dict)

    def scheme(self, module: str) -> Scheme | None:
        """The module's own mode, bits and group size, else those of the model."""
        stated = _stated(self.config, module)
        scheme, mode = as_scheme(stated, "bits"), stated.get("mode", AFFINE)
        if scheme is not None and mode != AFFINE:
            return replace(scheme, kind="float", name=str(mode).upper())
        return scheme

    def values(self, tensors: Tensors, module: str) -> Values:
        """See `FolderReader.values`."""
        scheme = self.scheme(module)
        if scheme is None:
            raise Incomparable(f"config.json does not say how {module} is stored")
        mode = _stated(self.config, module).get("mode", AFFINE)
        if mode == AFFINE:
            return AffineValues(tensors, module, scheme)
        if mode not in MODES:
            raise Incomparable(f"{module} is of mode {mode!r}")
        return FloatValues(tensors, module, mode)


def _stated(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    table = section(config, "quantization")
    return section(table, module) or table


class MlxChecks(FormatChecks):
    """Folders that mlx-lm loads; their names are mlx-lm's."""

    library = Library.MLX_LM
    target = Target.MLX_LM

    def __init__(self, *, zero: bool) -> None:
        """With `zero`, NaN and infinity in a weight count as 0."""
        self._zero = zero

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """config.json held against the tensors, as the library will when it loads the folder."""
        if not isinstance(folder.config.get("quantization"), dict):
            yield "config.json has no section quantization"
            return
        yield from self._stated_problems(folder, architecture)

    def _stated_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        config = folder.config
        if config["quantization"] != config.get("quantization_config"):
            yield "config.json: quantization and quantization_config differ"
        for item in self.published(architecture, folder):
            yield from _module(folder, item.name, item.spec.shape)
        for path, settings in config["quantization"].items():
            if isinstance(settings, dict) and f"{path}.scales" not in folder.tensors:
                yield f"config.json states bits for {path}, which is not quantized"

    def published(self, architecture: Architecture, folder: ModelFolder) -> Iterable[Traced]:
        """What the folder must hold."""
        return published(architecture, self.target).values()

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
        """See `FormatChecks.values`."""
        if scheme.kind == "int":
            return MlxValues(tensors, module, scheme)
        if scheme.name is None:
            return KeptValues(tensors, module, METHOD)
        return MlxFloatValues(tensors, module, mode_of(scheme))

    def compared(self, tensors: Sequence[OutputTensor]) -> None:
        """What steps of mlx-lm made is not a source's rows."""
        for tensor in tensors:
            if _transforms(tensor.ref):
                raise Incomparable(f"{tensor.name} is put together of its source")

    def prepared(self, source: TensorData) -> TensorData:
        """With zeros for NaN and infinity, when the recipe says so."""
        if self._zero and source.dtype in WIDE_FLOATS:
            return TensorData(source.dtype, zero_non_finite(source.array, source.dtype))
        return source


class MlxVlmChecks(MlxChecks):
    """Folders that mlx-vlm loads."""

    library = Library.MLX_VLM
    target = Target.MLX_VLM

    def published(self, architecture: Architecture, folder: ModelFolder) -> Iterable[Traced]:
        """With the towers, unless all were left out: mlx-vlm then runs the model without."""
        items = published(architecture, self.target).items()
        facts = architecture.built
        towers = [item for name, item in items if _is_tower(facts.get(name))]
        if any(item.name in folder.tensors for item in towers):
            return [item for _, item in items]
        return [item for name, item in items if not _is_tower(facts.get(name))]


def _is_tower(fact: TensorFact | None) -> bool:
    return fact is not None and fact.part is Part.TOWER


class MlxDrafterChecks(MlxChecks):
    """Folders with an MTP head alone, which mlx-vlm loads as a drafter."""

    library = Library.MLX_VLM_DRAFTER

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """See `FormatChecks.config_problems`; a drafter may be plain."""
        if "quantization" in folder.config:
            yield from self._stated_problems(folder, architecture)
        else:
            for item in self.published(architecture, folder):
                yield from _module(folder, item.name, item.spec.shape)

    def published(self, architecture: Architecture, folder: ModelFolder) -> Iterable[Traced]:
        """See `MlxChecks.published`."""
        return published_drafter(architecture).values()


def _transforms(ref: TensorRef) -> bool:
    """Whether steps of mlx-lm are on the way to a tensor."""
    if not isinstance(ref.origin, ActionOutput):
        return False
    action = ref.origin.action
    op = action.op.op if isinstance(action.op, Stacked) else action.op
    if isinstance(op, Transform | TransformQuantize):
        return True
    return any(map(_transforms, action.inputs))


class AffineValues:
    """A module in MLX's affine format, dequantized by scale * code + bias."""

    def __init__(self, tensors: Tensors, module: str, scheme: Scheme) -> None:
        """Take `module`'s weight, scales and biases; Incomparable when they do not fit together."""
        if scheme.group_size is None:
            raise Incomparable(f"{module} is not in groups")
        self.bits, self.group_size = scheme.bits, scheme.group_size
        try:
            self._tensors = [tensors[f"{module}.{suffix}"] for suffix in SUFFIXES]
        except KeyError:
            raise Incomparable(f"{module} is not in MLX's affine format") from None
        packed, grid = (tensor.spec.shape for tensor in self._tensors[:2])
        self._inputs = grid[-1] * self.group_size
        self.shape = matrix(TensorSpec("U8", (*grid[:-1], self._inputs)))
        self.dtype = self._tensors[1].spec.dtype
        if packed != (*grid[:-1], self._inputs * self.bits // 32):
            raise Incomparable(
                f"{module} is not of {self.bits} bits in groups of {self.group_size}"
            )

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        packed, scales, biases = (
            read_rows(tensor, tensor.spec, start, stop).array.reshape(-1, tensor.spec.shape[-1])
            for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        rows = out.reshape(-1, self._inputs)
        try:
            dequantize_rows(packed, scales, biases, self.dtype, self.bits, self.group_size, rows)
        except ValueError as error:
            raise Incomparable(str(error)) from None
        return out


class MlxValues(AffineValues):
    """Affine values with their bound."""

    tolerated = 0.0

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        groups = source.reshape(-1, self.group_size)
        return allowance(groups, self.bits, self.dtype).reshape(source.shape)


class FloatValues:
    """A module in another of MLX's modes than affine, dequantized by code * scale."""

    def __init__(self, tensors: Tensors, module: str, mode: str) -> None:
        """Take `module`'s weight and scales; Incomparable when they do not fit together."""
        self.mode, stored = mode, defaults(mode)
        self.group_size = stored["group_size"]
        try:
            self._tensors = [tensors[f"{module}.{end}"] for end in FLOAT_SUFFIXES]
        except KeyError:
            raise Incomparable(f"{module} is not in {mode.upper()}") from None
        if f"{module}.global_scale" in tensors:
            raise Incomparable(f"{module} has a scale for the whole tensor")
        words, grid = (tensor.spec.shape for tensor in self._tensors)
        columns = grid[-1] * self.group_size
        types = tuple(tensor.spec.dtype for tensor in self._tensors)
        if types != ("U32", "U8") or words != (*grid[:-1], columns * stored["bits"] // 32):
            raise Incomparable(f"{module} is not in groups of {self.group_size}")
        self.shape = matrix(TensorSpec("U8", (*grid[:-1], columns)))

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, as floats."""
        words, scales = (
            read_rows(tensor, tensor.spec, start, stop).array.reshape(stop - start, -1)
            for tensor in self._tensors
        )
        out = np.empty((stop - start, self.shape[1]), np.float32)
        mlx_floats.dequantize_rows(words, scales, self.mode, out)
        return out


class KeptValues(FloatValues):
    """A module whose codes are those of the source, which loses nothing."""

    tolerated = 0.0

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`: nothing was rounded."""
        return np.zeros_like(source)


class MlxFloatValues(FloatValues):
    """Floats with their bound."""

    tolerated = 0.0

    def __init__(self, tensors: Tensors, module: str, mode: str) -> None:
        """See `FloatValues`; the weight's type is one of those that the folder holds beside it."""
        super().__init__(tensors, module, mode)
        self._dtypes = {tensor.spec.dtype for tensor in tensors.values()} & set(WIDE_FLOATS)

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        groups = source.reshape(-1, self.group_size)
        return float_allowance(groups, self.mode, self._dtypes).reshape(source.shape)


def float_allowance(groups: Floats, mode: str, dtypes: Collection[str]) -> Floats:
    """The most that each weight of `groups` [n, group size] may be off; see the module's text.

    `dtypes` are the types that the weight may have been cast to; all, if there are none.
    """
    known = dtypes or WIDE_FLOATS
    place = max(HALF_PLACE[dtype] for dtype in known)
    smallest = max(HALF_SMALLEST[dtype] for dtype in known)
    largest, distance, scale, moves = _FLOAT_RULES[mode]
    magnitudes = np.abs(groups)
    quotients = magnitudes.max(axis=1, keepdims=True) / np.float32(largest)
    moved = 3 * place * quotients + smallest
    allowed = np.zeros_like(groups)
    for quotient in (np.maximum(quotients - moved, 0), quotients + moved):
        steps = scale(quotient)
        with np.errstate(divide="ignore", invalid="ignore"):
            units = np.where(steps > 0, magnitudes / steps, np.float32(0))
        off = np.maximum(steps * (distance(units) / 2), magnitudes - steps * np.float32(largest))
        np.maximum(allowed, off, out=allowed)
    allowed *= np.float32(_FLOAT32_SLACK)
    allowed += moves * place * magnitudes + 2 * largest * smallest
    return allowed


def _between_e2m1(units: Floats) -> Floats:
    """How far from each other the codes about so many steps are."""
    found: Floats = np.exp2(np.clip(np.floor(units / 2), 0, 2) - 1)
    return found


def _between_e4m3(units: Floats) -> Floats:
    _, exponents = np.frexp(units)
    found: Floats = np.ldexp(np.float32(1), np.maximum(exponents - 1, -6) - 3)
    return found


def _power_scale(quotient: Floats) -> Floats:
    """The least power of two that is not below, at least 2**-127; 0 of 0."""
    mantissas, exponents = np.frexp(quotient)
    powers = np.maximum(exponents - (mantissas == 0.5), -127)
    return np.where(quotient > 0, np.ldexp(np.float32(1), powers), 0).astype(np.float32)


def _e4m3_scale(quotient: Floats) -> Floats:
    """The nearest number of E4M3, at most its largest."""
    between = _between_e4m3(quotient)
    found: Floats = np.minimum(np.rint(quotient / between) * between, np.float32(448))
    return found


_FLOAT_RULES: Mapping[str, tuple[float, Callable[..., Floats], Callable[..., Floats], int]] = {
    "mxfp4": (6.0, _between_e2m1, _power_scale, 1),
    "nvfp4": (6.0, _between_e2m1, _e4m3_scale, 2),
    "mxfp8": (448.0, _between_e4m3, _power_scale, 1),
}
"""By mode: the largest code, how far codes are from each other, the scale of a quotient, and how
often a weight is rounded before its code is chosen."""


def allowance(groups: Floats, bits: int, dtype: str) -> Floats:
    """The most that each weight of `groups` [n, group size] may be off; see the module's text.

    Raises NonFiniteValue for a weight that `dtype` cannot hold.
    """
    top = float(2**bits - 1)
    groups = _rounded(groups, dtype)
    low, high = groups.min(axis=1), groups.max(axis=1)
    low_is_edge = np.abs(low) > np.abs(high)
    far = np.where(low_is_edge, high, low)
    largest = np.where(low_is_edge, -low, np.abs(high))
    step = np.maximum((high - low) / (top - 1), _SMALLEST_STEP) * _FLOAT32_SLACK
    rounding = 4 * HALF_PLACE[dtype] * largest + (top + 1) * HALF_SMALLEST[dtype]
    allowed: Floats = np.abs(groups - far[:, None])
    np.subtract(step[:, None], allowed, out=allowed)
    np.maximum(allowed, step[:, None] / 2, out=allowed)
    allowed += rounding[:, None]
    return allowed


def _rounded(values: Floats, dtype: str) -> Floats:
    """The values that are left after a cast to `dtype`, in float32."""
    narrow = np.empty(values.shape, NUMPY_NAME[dtype])
    cast(values, "F32", dtype, narrow)
    return as_float32(TensorData(dtype, narrow))


def _module(folder: ModelFolder, name: str, shape: Shape) -> Iterator[str]:
    module, _, suffix = name.rpartition(".")
    if suffix == "weight" and f"{module}.scales" in folder.tensors:
        yield from _quantized_module(folder, module, shape)
    elif name not in folder.tensors:
        yield f"config.json calls for {name}, which is in no shard"
    elif folder.tensors[name].spec.size != prod(shape):
        yield f"config.json calls for {name} of {prod(shape)} elements"


def _quantized_module(folder: ModelFolder, module: str, shape: Shape) -> Iterator[str]:
    settings = _stated(folder.config, module)
    mode = settings.get("mode", AFFINE)
    if mode not in MODES:
        yield f"config.json states mode {mode!r} for {module}"
        return
    suffixes = SUFFIXES if mode == AFFINE else FLOAT_SUFFIXES
    stored = [folder.tensors.get(f"{module}.{suffix}") for suffix in suffixes]
    shapes = [tensor.spec.shape if tensor else () for tensor in stored]
    if any(len(found) != len(shape) for found in shapes):
        parts = "a weight, scales or biases" if mode == AFFINE else "a weight or scales"
        yield f"module {module} lacks {parts} of {len(shape)} dimensions"
        return
    bits, group = settings.get("bits"), settings.get("group_size")
    if not _fits(shape, bits, group, shapes[0], shapes[1]) or shapes[1] != shapes[-1]:
        yield (
            f"config.json states {bits} bits in groups of {group} for {module} "
            f"{list(shape)}, but its weight is {list(shapes[0])} "
            f"and its scales are {list(shapes[1])}"
        )
    if mode != AFFINE and {"bits": bits, "group_size": group} != defaults(mode):
        yield f"config.json states {bits} bits in groups of {group} for {module} of mode {mode}"
    if mode != AFFINE and f"{module}.{SUFFIXES[-1]}" in folder.tensors:
        yield f"module {module} has {SUFFIXES[-1]}, of which mode {mode} has none"


def _fits(shape: Shape, bits: Any, group: Any, weight: Shape, scales: Shape) -> bool:
    if type(bits) is not int or type(group) is not int:
        return False
    *before, columns = shape
    packed = (*before, columns * bits // 32)
    return weight == packed and (*scales[:-1], scales[-1] * group) == shape
