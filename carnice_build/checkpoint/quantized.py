"""Which tensors of a checkpoint are quantized weights, by what its config says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from carnice_build.checkpoint.decoded import (
    decoded_fp8,
    decoded_gptq,
    decoded_mxfp4,
    decoded_packed,
)
from carnice_build.checkpoint.decodings import WORD_BITS
from carnice_build.checkpoint.exponents import exponents
from carnice_build.errors import CheckpointError, nearest
from carnice_build.models.base import QUANTIZATION
from carnice_build.tensors import SourceTensor

Table = Mapping[str, Any]
Tensors = Mapping[str, SourceTensor]
Columns = Callable[[str], int | None]
"""The columns that a weight has by the model's own config, None when it does not say."""

_WHOLE_BYTES = (2, 4, 8)
"""Bits of codes that GPTQ's words hold without gaps."""

_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
"""Ends of the names of what quantizes activations, of which the weights' floats need nothing."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight: its plain name, its tensors by the end of their names, what decodes it.

    An end that is not there may be one that the weight can do without.
    `kept` are the tensors themselves, by the same ends, where formats may publish them: whoever
    reads them is told what decoding refuses.
    """

    name: str
    parts: Mapping[str, str]
    decode: Callable[[str], SourceTensor]
    kept: Mapping[str, SourceTensor] = field(default_factory=dict)


def stated_quantization(config: Table) -> Table | None:
    """What a config.json says of how weights are quantized; None when it says nothing."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION:
            if section.get(key):
                table = section[key]
                return table if isinstance(table, dict) else {}
    return None


def plain_config(config: Table) -> Table:
    """The config of the same model when its weights are floats."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION}
    text = plain.get("text_config")
    if isinstance(text, dict):
        kept = {key: value for key, value in text.items() if key not in QUANTIZATION}
        plain["text_config"] = kept
    return plain


def quantized_weights(
    tensors: Tensors, stated: Table, columns: Columns, where: str
) -> Mapping[str, Weight]:
    """The quantized weights among `tensors`, by their plain names.

    CheckpointError for a method that cannot be decoded, and when a weight lacks a part.
    """
    method = stated.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"is quantized by the method {str(method)!r}, which cannot be decoded",
            where=where,
            expected=" or ".join(METHODS),
        )
    found = METHODS[method](tensors, stated, columns, where)
    return {weight.name: weight for weight in found}


def of_activations(names: Iterable[str]) -> set[str]:
    """Those of `names` that say how activations are quantized."""
    return {name for name in names if name.endswith(_ACTIVATIONS)}


def _grouped(tensors: Tensors, ends: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The tensors whose names end so: plain name -> end -> name.

    `ends` maps each to what a plain name has in its place.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        for end, plain in ends.items():
            if name.endswith(end):
                groups.setdefault(name.removesuffix(end) + plain, {})[end] = name
    return groups


class _Parts:
    """The tensors of one weight, which is an error when one that it needs is not there."""

    def __init__(self, name: str, tensors: Tensors, parts: Mapping[str, str], plain: str) -> None:
        self.name = name
        self._tensors = tensors
        self._parts = parts
        self._stem = name.removesuffix(plain)

    def get(self, end: str) -> SourceTensor | None:
        """The part with this end, if there is one."""
        name = self._parts.get(end)
        return None if name is None else self._tensors[name]

    def need(self, end: str) -> SourceTensor:
        """The part with this end."""
        found = self.get(end)
        if found is not None:
            return found
        other = self._tensors[next(iter(self._parts.values()))]
        raise _lacks(other, self._stem + end, self._tensors)


def _lacks(other: SourceTensor, wanted: str, tensors: Tensors) -> CheckpointError:
    return CheckpointError(
        f"tensor {other.name!r} is of a quantized weight that lacks {wanted!r}",
        where=other.file.name if other.file else None,
        expected="it beside the others",
        nearest=nearest(wanted, tensors),
    )


# --- FP8 ------------------------------------------------------------------------------------------

_INVERSE, _SCALE = "_scale_inv", "_scale"


def _fp8(tensors: Tensors, stated: Table, columns: Columns, where: str) -> Iterator[Weight]:
    """transformers' own method: `weight_scale_inv`, of blocks or of all."""
    block = stated.get("weight_block_size")
    return _in_fp8(tensors, (_INVERSE, _SCALE), _pair(block, where) if block else None)


def _modelopt(tensors: Tensors, stated: Table, columns: Columns, where: str) -> Iterator[Weight]:
    algorithm = stated.get("quant_algo")
    if algorithm not in _MODELOPT:
        raise CheckpointError(
            f"is quantized by modelopt as {algorithm!r}, which cannot be decoded",
            where=where,
            expected=" or ".join(_MODELOPT),
        )
    return _in_fp8(tensors, (_SCALE,), None)


_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def _in_fp8(
    tensors: Tensors, ends: tuple[str, ...], block: tuple[int, int] | None
) -> Iterator[Weight]:
    for name, codes in tensors.items():
        if codes.spec.dtype != "F8_E4M3":
            continue
        parts = {"": name}
        parts |= {end: name + end for end in ends if name + end in tensors}
        if len(parts) == 1:
            raise _lacks(codes, name + ends[0], tensors)
        scales = tensors[next(parts[end] for end in ends if end in parts)]
        yield Weight(name, parts, _fp8_decoder(name, codes, scales, block))


def _fp8_decoder(
    name: str, codes: SourceTensor, scales: SourceTensor, block: tuple[int, int] | None
) -> Callable[[str], SourceTensor]:
    return lambda dtype: decoded_fp8(name, codes, scales, dtype, block)


def _pair(value: object, where: str) -> tuple[int, int]:
    sizes = value if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(
            f"states blocks of {value!r}", where=where, expected="two sizes, as in [128, 128]"
        )
    return sizes[0], sizes[1]


# --- MXFP4 ----------------------------------------------------------------------------------------

_BLOCKS, _SCALES = "_blocks", "_scales"


def _mxfp4(tensors: Tensors, stated: Table, columns: Columns, where: str) -> Iterator[Weight]:
    """gpt-oss: the experts of a layer in one tensor, [experts, outputs, inputs] as of linears."""
    for name, parts in _grouped(tensors, {_BLOCKS: _PLAIN, _SCALES: _PLAIN}).items():
        found = _Parts(name, tensors, parts, _PLAIN)
        codes, scales = found.need(_BLOCKS), found.need(_SCALES)
        kept = {_BLOCKS: codes, _SCALES: exponents(scales)}
        yield Weight(name, parts, _mxfp4_decoder(name, codes, scales), kept)


def _mxfp4_decoder(
    name: str, codes: SourceTensor, scales: SourceTensor
) -> Callable[[str], SourceTensor]:
    return lambda dtype: decoded_mxfp4(name, codes, scales, dtype)


# --- compressed-tensors ---------------------------------------------------------------------------

_PLAIN = ".weight"
_PACKED, _WEIGHT_SCALE = ".weight_packed", ".weight_scale"
_ZERO_POINT, _SHAPE, _ORDER = ".weight_zero_point", ".weight_shape", ".weight_g_idx"
_PACKED_ENDS = (_PACKED, _WEIGHT_SCALE, _ZERO_POINT, _SHAPE, _ORDER)
_STORED = ("float-quantized", "naive-quantized", "pack-quantized")
_SILENT = (None, "dense", "mixed-precision")
"""What the entry `format` says where it does not say how weights are stored."""


def _compressed(tensors: Tensors, stated: Table, columns: Columns, where: str) -> Iterator[Weight]:
    groups = stated.get("config_groups")
    stated_groups = groups.values() if isinstance(groups, dict) else ()
    tables = [item for item in stated_groups if isinstance(item, dict)]
    for stored in (stated.get("format"), *(table.get("format") for table in tables)):
        if stored not in (*_STORED, *_SILENT):
            raise CheckpointError(
                f"stores weights as {str(stored)!r}, which cannot be decoded",
                where=where,
                expected=" or ".join(_STORED),
            )
    schemes = [table["weights"] for table in tables if isinstance(table.get("weights"), dict)]
    blocks = [_pair(item.get("block_structure"), where) for item in schemes if _in_blocks(item)]
    block = blocks[0] if blocks and len(blocks) == len(schemes) else None
    yield from _in_fp8(tensors, (_SCALE,), block)
    for name, parts in _grouped(tensors, dict.fromkeys(_PACKED_ENDS, _PLAIN)).items():
        if _PACKED in parts or name not in tensors:
            found = _Parts(name, tensors, parts, _PLAIN)
            yield Weight(name, parts, _packed_decoder(found, schemes, columns(name)))


def _in_blocks(scheme: Table) -> bool:
    return scheme.get("strategy") == "block"


def _packed_decoder(
    parts: _Parts, schemes: list[Table], known: int | None
) -> Callable[[str], SourceTensor]:
    words, scales, shape = (parts.need(end) for end in (_PACKED, _WEIGHT_SCALE, _SHAPE))
    fitting = [
        (scheme, bits, width)
        for scheme in schemes
        if (bits := _bits(scheme.get("num_bits")))
        and (width := _width(words, scales, scheme, bits, known))
    ]
    if not fitting:
        spec = words.spec
        raise CheckpointError(
            f"tensor {words.name!r} is {spec.dtype} {list(spec.shape)}, with scales "
            f"{list(scales.spec.shape)}",
            where=words.file.name if words.file else None,
            expected="what one of `config_groups` makes of a weight",
        )
    # Other bits in other groups may take the same words and scales for another width.
    scheme, bits, width = next((fit for fit in fitting if fit[2] == known), fitting[0])
    zeros = parts.get(_ZERO_POINT) if scheme.get("symmetric", True) else parts.need(_ZERO_POINT)
    order = parts.get(_ORDER)
    return lambda dtype: decoded_packed(
        parts.name, words, scales, shape, zeros, order, dtype, bits, width
    )


def _bits(value: object) -> int:
    return value if type(value) is int and 1 <= value <= 8 else 0


def _width(
    words: SourceTensor, scales: SourceTensor, scheme: Table, bits: int, known: int | None
) -> int:
    """The columns of a weight that a scheme packs so; 0 when it would not."""
    if len(words.spec.shape) != 2 or len(scales.spec.shape) != 2:
        return 0
    width, groups, size = words.spec.shape[1], scales.spec.shape[1], scheme.get("group_size")
    if scheme.get("strategy") == "group" and type(size) is int:
        columns = groups * size
    elif known and -(-known * bits // WORD_BITS) == width:
        columns = known
    else:
        columns = width * WORD_BITS // bits
    return columns if -(-columns * bits // WORD_BITS) == width else 0


# --- GPTQ and AutoRound ---------------------------------------------------------------------------

_QWEIGHT, _QZEROS, _QSCALES, _G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"
_QUARTET = dict.fromkeys((_QWEIGHT, _QZEROS, _QSCALES, _G_IDX), _PLAIN)
_ABOVE = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1, "auto_round:gptq": 1}
"""By the packing, what a zero point is more than the one that is stored."""


def _gptq(tensors: Tensors, stated: Table, columns: Columns, where: str) -> Iterator[Weight]:
    return _in_words(tensors, stated, stated.get("checkpoint_format") or "gptq", where)


def _auto_round(tensors: Tensors, stated: Table, columns: Columns, where: str) -> Iterator[Weight]:
    return _in_words(tensors, stated, stated.get("packing_format"), where)


def _in_words(tensors: Tensors, stated: Table, packing: object, where: str) -> Iterator[Weight]:
    if not isinstance(packing, str) or packing not in _ABOVE:
        raise CheckpointError(
            f"packs weights as {str(packing)!r}, which cannot be decoded",
            where=where,
            expected=" or ".join(_ABOVE),
        )
    above = _ABOVE[packing]
    for name, parts in _grouped(tensors, _QUARTET).items():
        found = _Parts(name, tensors, parts, _PLAIN)
        yield Weight(name, parts, _word_decoder(found, stated, above, where))


def _word_decoder(
    parts: _Parts, stated: Table, above: int, where: str
) -> Callable[[str], SourceTensor]:
    words, zeros, scales = (parts.need(end) for end in (_QWEIGHT, _QZEROS, _QSCALES))
    order = parts.get(_G_IDX)
    bits = _bits_of(words, zeros) or _bits(stated.get("bits"))
    if bits not in _WHOLE_BYTES:
        raise CheckpointError(
            f"packs {parts.name!r} in {bits} bits, which cannot be decoded",
            where=where,
            expected="2, 4 or 8",
        )
    return lambda dtype: decoded_gptq(parts.name, words, zeros, scales, order, dtype, bits, above)


def _bits_of(words: SourceTensor, zeros: SourceTensor) -> int:
    """The bits of a code, which may be a layer's own, by the zero points of all rows; 0 if none."""
    if len(words.spec.shape) != 2 or len(zeros.spec.shape) != 2:
        return 0
    rows, packed = words.spec.shape[1], zeros.spec.shape[1]
    return next((bits for bits in _WHOLE_BYTES if rows * bits == packed * WORD_BITS), 0)


METHODS: Mapping[str, Callable[[Tensors, Table, Columns, str], Iterator[Weight]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "auto-round": _auto_round,
}
"""What finds the weights that each method quantized, by `quant_method`."""
