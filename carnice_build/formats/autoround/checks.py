"""Format `autoround`: what config.json must list, and how far symmetric INT4 may be off.

A group of weights has one scale s, and w becomes s times a code of -8..7.

- Rounded to nearest, s = -m / 8, where m is the end of the group of larger magnitude, in F16:
  off by 2^-11 of itself, and never below 1e-5.  Codes are one step apart, so w is off by half of
  one; but on the side away from m they end at 7, and what lies beyond is cut.
- Tuning chooses one of the two codes beside w, and cuts the range as far as it pays: s is what is
  stored, up to the above.  A weight is off by a step, and one outside the range by what it lies
  beyond; more than half of the range is not cut.
- Merging moves the code that tuning chose for the base by what the fine-tune changed, rounded to
  half a step, on the base's own grid; a weight that the fine-tune moved beyond it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.autoround.ops import SUFFIXES
from carnice_build.formats.checks import FolderReader, Tensors, TorchChecks
from carnice_build.formats.exclusions import ignore_problems
from carnice_build.formats.folder import ModelFolder, section
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.statements import as_scheme, statements
from carnice_build.formats.values import Floats, Incomparable, matrix, read_rows
from carnice_build.kernels import autoround
from carnice_build.models.base import LINEARS, Architecture

Method = Literal["nearest", "tune", "merge"]

_FLOAT32_SLACK = 1.001
_SMALLEST_SCALE = 1e-5
_REACH = {"nearest": 0.5, "tune": 1.1, "merge": 1.6}
"""Steps that a weight within the range may be off; scales in F16 move learned codes a little."""

_MOST_CUT = 4
"""Steps of a range that learning may cut: half of them."""

_CUT = {"nearest": 0.0, "tune": 1e-3, "merge": 1e-3}
"""The share of weights that may be further off where codes were learned."""


class AutoRoundReader(FolderReader):
    """Folders of auto-round; the numbers of its packing for GPTQ kernels can be told."""

    suffixes = SUFFIXES

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Folders that name auto-round as their method."""
        return section(config, "quantization_config").get("quant_method") == "auto-round"

    def scheme(self, module: str) -> Scheme | None:
        """The module's own entry, else that of the model."""
        stated = section(self.config, "quantization_config")
        return as_scheme({**stated, **section(section(stated, "extra_config"), module)}, "bits")

    def values(self, tensors: Tensors, module: str) -> PackedValues:
        """See `FolderReader.values`."""
        scheme = self.scheme(module)
        packing = section(self.config, "quantization_config").get("packing_format")
        if scheme is None or scheme.bits != 4 or packing != "auto_round:auto_gptq":
            raise Incomparable(f"{module} is packed in a way not known")
        return PackedValues(tensors, module, scheme)


class AutoRoundChecks(TorchChecks):
    """Folders as auto-round packs them."""

    def __init__(self, method: Method, group_size: int) -> None:
        """`method` says where the codes come from."""
        self._method = method
        self._group = group_size

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """What is packed lies in the listed blocks, and all else is listed with 16 bits."""
        stated = section(folder.config, "quantization_config")
        wanted = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "data_type": "int",
            "sym": True,
            "bits": 4,
            "group_size": self._group,
        }
        yield from statements("config.json", stated, wanted)
        extra = section(stated, "extra_config")
        for module in extra:
            if section(extra, module).get("bits") != 16:
                yield f"config.json gives {module} other bits than 4 or 16"
        yield from ignore_problems(folder, architecture, list(extra), LINEARS)
        blocks = tuple(f"{b}." for b in str(stated.get("block_name_to_quantize")).split(","))
        for name in folder.tensors:
            built = architecture.engine_names(name)
            if name.endswith(".qweight") and not all(n.startswith(blocks) for n in built):
                yield f"config.json lists no block that holds {name}"

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> BoundedValues:
        """See `FormatChecks.values`."""
        return BoundedValues(tensors, module, scheme, self._method)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `TorchChecks.rounded`: to nearest, without calibration."""
        return [self._round_trip(weight) for weight in weights]

    def _round_trip(self, weight: Floats) -> Floats:
        rows, columns = weight.shape
        groups = columns // self._group
        codes, zeros = np.empty((columns // 8, rows), "i4"), np.empty((groups, rows // 8), "i4")
        scales = np.empty((groups, rows), np.float16)
        autoround.quantize_rtn(weight, "F32", self._group, 0, codes, zeros, scales)
        out = np.empty_like(weight)
        autoround.dequantize_rows(codes, zeros, scales, 0, out)
        return out


class PackedValues:
    """A module dequantized by scale * (code - zero point); its tensors are held in memory."""

    def __init__(self, tensors: Tensors, module: str, scheme: Scheme) -> None:
        """Read `module`'s tensors; Incomparable when they do not fit together."""
        group = scheme.group_size
        if group is None:
            raise Incomparable(f"{module} is not in groups")
        try:
            stored = [tensors[f"{module}.{suffix}"] for suffix in SUFFIXES]
        except KeyError:
            raise Incomparable(f"{module} is not in auto-round's format") from None
        lines, rows = matrix(stored[0].spec)
        self.shape = rows, 8 * lines
        grid = (self.shape[1] // group, rows)
        expected = [
            TensorSpec("I32", (lines, rows)),
            TensorSpec("I32", (grid[0], rows // 8)),
            TensorSpec("F16", grid),
        ]
        if [tensor.spec for tensor in stored] != expected:
            raise Incomparable(f"{module} is not of groups of {group}")
        whole = [read_rows(tensor, tensor.spec, 0, tensor.spec.shape[0]).array for tensor in stored]
        self._codes, self._zeros, self._scales = whole
        self._group = group

    def rows(self, start: int, stop: int) -> Floats:
        """The rows from `start` to `stop`, dequantized."""
        out = np.empty((stop - start, self.shape[1]), np.float32)
        autoround.dequantize_rows(self._codes, self._zeros, self._scales, start, out)
        return out


class BoundedValues(PackedValues):
    """Values with their bound."""

    def __init__(self, tensors: Tensors, module: str, scheme: Scheme, method: Method) -> None:
        """As `PackedValues`; `method` says where the codes come from."""
        super().__init__(tensors, module, scheme)
        self._method = method
        self.tolerated = _CUT[method]

    def allowance(self, source: Floats, start: int) -> Floats:
        """See `QuantizedValues.allowance`."""
        groups = source.reshape(len(source), -1, self._group)
        if self._method == "nearest":
            return nearest_allowance(groups).reshape(source.shape)
        scales = self._scales[:, start : start + len(source)].T.astype(np.float32)[..., None]
        ends = np.sort(np.concatenate([-8 * scales, 7 * scales], axis=-1))
        beyond = np.maximum(np.maximum(groups - ends[..., 1:], ends[..., :1] - groups), 0)
        if self._method == "tune":
            most = _steps(groups)[1]
            step = np.minimum(np.abs(scales), most)
            allowed = _REACH["tune"] * step + np.minimum(beyond, _MOST_CUT * most)
        else:
            allowed = _REACH["merge"] * np.abs(scales) + beyond
        whole = np.broadcast_to(allowed, groups.shape).reshape(source.shape)
        return np.ascontiguousarray(whole, np.float32)


def nearest_allowance(groups: Floats) -> Floats:
    """The most that each of `groups` [..., group size] may be off when rounded to nearest."""
    low, high = _steps(groups)
    largest_is_upper = groups.max(axis=-1) >= -groups.min(axis=-1)
    on_its_side = (groups >= 0) == largest_is_upper[..., None]
    beyond = np.abs(groups) - np.where(on_its_side, 8, 7) * low
    allowed: Floats = np.maximum(_REACH["nearest"] * high, beyond) * _FLOAT32_SLACK
    return allowed.astype(np.float32)


def _steps(groups: Floats) -> tuple[Floats, Floats]:
    """The least and the most that the magnitude of -m / 8 can be in F16, [..., 1]."""
    exact = np.maximum(np.abs(groups).max(axis=-1, keepdims=True) / 8, _SMALLEST_SCALE)
    off = np.maximum(exact * 2.0**-11, 2.0**-25)
    return exact - off, exact + off
