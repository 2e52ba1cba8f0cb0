"""A tensor of a file from its values: as it is, in another type of floats, or in blocks."""

from __future__ import annotations

import re
from typing import Literal

from carnice_build.dtypes import ITEM_SIZE
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.gguf.named import Named
from carnice_build.formats.gguf.quantize_ops import (
    GgmlQuantize,
    GgmlQuantizeWeighted,
    Quantize,
    QuantizeWeighted,
)
from carnice_build.formats.scheme import Scheme
from carnice_build.graph import ActionGraph, TensorRef

_BITS = re.compile(r"\d+")


def scheme_of(kind: str) -> Scheme:
    """What people call a type of blocks."""
    found = _BITS.search(kind)
    assert found is not None, "types of blocks have their bits in their names"
    return Scheme(int(found[0]), kind="float" if kind == "MXFP4" else "int", name=kind)


Backend = Literal["fused", "ggml"]

_ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
_SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
FUSED = frozenset([*_ROUNDED, *_SEARCHED])
"""The types of blocks that kernels of ours make; all others come from ggml."""


def made_of(
    item: Named, kind: str, importance: TensorRef | None, graph: ActionGraph, backend: Backend
) -> OutputTensor:
    """The tensor in a type; `importance` is F32 [columns], or [experts, columns] of a stack."""
    if item.codes is not None:
        return OutputTensor(item.name, item.codes, item.fact)
    fused = backend == "fused" and kind in FUSED
    return OutputTensor(item.name, _stored(item.ref, kind, importance, graph, fused), item.fact)


def _stored(
    ref: TensorRef, kind: str, importance: TensorRef | None, graph: ActionGraph, fused: bool
) -> TensorRef:
    if ref.spec.dtype == kind:
        return ref
    if kind in ITEM_SIZE:
        params = {"add": None, "dtype": kind, "nonfinite": "refuse"}
        (made,) = graph.add(Elementwise(), params, ref)
        return made
    if importance is not None:
        op = QuantizeWeighted() if fused else GgmlQuantizeWeighted()
        (made,) = graph.add_each(op, {"type": kind}, ref, importance)
        return made
    # Rows of a stack are rows like others.
    *outer, columns = ref.spec.shape
    rows = ref.spec.size // columns
    plain = Quantize() if fused else GgmlQuantize()
    (made,) = graph.add(plain, {"type": kind}, ref.reshaped(rows, columns))
    return made.reshaped(*outer, made.spec.shape[1])
