"""Answers about checkpoints, which anyone may have written who can write to the cache.

What is no trace of the checkpoint that was asked about is refused, so that it is asked for anew.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.formats.mlx.modes import AFFINE, MODES
from carnice_build.formats.mlx.trace import NotATrace, Refusal, Trace, Traced, parsed
from carnice_build.tensors import STACK, members

_WORD_BITS = 32

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LONGEST_NAME = 500


def answered(
    text: str, tensors: Mapping[str, TensorSpec], names: Collection[str]
) -> Trace | Refusal:
    """`parsed`, of a text that is about a checkpoint of these `tensors`; else NotATrace.

    `names` are what tensors and stacks of it may be called.
    """
    found = parsed(text)
    if isinstance(found, Trace):
        _require_sources(found, tensors, names)
        by_name = {item.name: item for item in found.tensors}
        if len(by_name) != len(found.tensors):
            raise NotATrace("no trace: makes a tensor twice")
        for name in by_name:
            if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME or name == "__metadata__":
                raise NotATrace(f"no trace: {name!r} is no name")
        for path, own in found.modules.items():
            _require_quantizable(path, own, by_name)
        _require_codes(found, by_name)
    return found


def _require_sources(
    found: Trace, tensors: Mapping[str, TensorSpec], names: Collection[str]
) -> None:
    """Every tensor that was asked about is used or said to be dropped, and there are no others."""
    used: set[str] = set()
    for source in {source for item in found.tensors for source in item.sources}:
        # Names are checked first, for there may be no room for those of a stack that is none.
        if source.name not in names:
            raise NotATrace(f"no trace: {source.name!r} is not what was asked about")
        if STACK in source.name and source.spec.shape[0] > len(tensors):
            raise NotATrace(f"no trace: {source.name} is no stack")
        for name, spec in members(source.name, source.spec):
            if tensors.get(name) != spec:
                raise NotATrace(f"no trace: {source.name} is not what was asked about")
            used.add(name)
    if tensors.keys() - used != found.dropped:
        raise NotATrace("no trace: does not say what becomes of each tensor")


def _require_quantizable(path: str, own: Mapping[str, Any], by_name: Mapping[str, Traced]) -> None:
    """It is a matrix, or a stack of them, and what is said of it is what MLX has kernels for."""
    weight = by_name.get(f"{path}.weight")
    matrix = weight and len(weight.spec.shape) > 1 and weight.spec.dtype in WIDE_FLOATS
    if not matrix or not _settings(own):
        raise NotATrace(f"no trace: {path!r} cannot be quantized by {dict(own)}")


def _settings(own: Mapping[str, Any]) -> bool:
    """Whether MLX has kernels for this; what is not said fits."""
    mode = own.get("mode", AFFINE)
    if not own.keys() <= {"bits", "group_size", "mode"} or type(mode) is not str:
        return False
    if mode not in MODES:
        return False
    return all(
        type(own[key]) is int and own[key] in fitting
        for key, fitting in zip(("bits", "group_size"), MODES[mode], strict=True)
        if key in own
    )


def _require_codes(found: Trace, by_name: Mapping[str, Traced]) -> None:
    """What is quantized already has tensors that fit what is said of it, by itself and of all."""
    stated, quantized = found.stated, found.quantized
    coded = {name.removesuffix(".scales") for name in by_name if name.endswith(".scales")}
    if coded != quantized.keys() or (stated is None) != (not quantized):
        raise NotATrace("no trace: does not say which modules are quantized")
    for path, own in quantized.items():
        if not _settings(own) or len(own) != 3 or own != stated:
            raise NotATrace(f"no trace: {path} cannot be quantized by {dict(own)}")
        words, scales = (by_name.get(f"{path}.{end}") for end in ("weight", "scales"))
        biases = f"{path}.biases" in by_name
        fits = words and scales and _fit(words.spec, scales.spec, own)
        if not fits or biases != (own["mode"] == AFFINE):
            raise NotATrace(f"no trace: {path} is not quantized by {dict(own)}")


def _fit(words: TensorSpec, scales: TensorSpec, own: Mapping[str, Any]) -> bool:
    *rows, width = words.shape
    *others, groups = scales.shape
    columns = groups * own["group_size"]
    return words.dtype == "U32" and rows == others and width * _WORD_BITS == columns * own["bits"]
