"""Tensors of a GGUF file as refs: parts of a checkpoint's, or several of them, in another order.

But for codes of MXFP4 no byte of a weight is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from carnice_build.checkpoint.stack import rows_of_slabs, slab_rows, slab_stack, stacked
from carnice_build.checkpoint.swapped import swapped_columns, swapped_rows
from carnice_build.checkpoint.turned import turned_stack
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError
from carnice_build.formats.gguf.ops import PackMxfp4, Values
from carnice_build.formats.gguf.parameters import ConfigScope
from carnice_build.formats.gguf.table import Cut, Swap
from carnice_build.graph import ActionGraph, TensorRef
from carnice_build.steps.base import Codes
from carnice_build.tensors import SourceTensor


def source_of(ref: TensorRef) -> SourceTensor:
    """Where a tensor lies; no step makes new bytes."""
    assert isinstance(ref.origin, SourceTensor)
    return ref.origin


def swapped_ref(ref: TensorRef, swap: Swap, scope: ConfigScope) -> TensorRef:
    """Rows or columns in blocks that change places."""
    size, tensor = scope.size, source_of(ref)
    first, second, each = size(swap.first), size(swap.second), size(swap.size)
    if swap.columns:
        made = swapped_columns(tensor, first, second, each)
    else:
        made = swapped_rows(tensor, first, second, each, size(swap.skip))
    return TensorRef(made.spec, made)


def computed_ref(graph: ActionGraph, ref: TensorRef, how: str | None) -> TensorRef:
    """What a function of `ops.Values` makes of a tensor, or the tensor where there is none."""
    return ref if how is None else graph.add(Values(), {"how": how}, ref)[0]


def cut_ref(ref: TensorRef, cut: Cut, scope: ConfigScope) -> Iterable[tuple[str, TensorRef]]:
    """The parts of a matrix, by their names, each of all heads.

    CheckpointError for a config whose heads have not the rows that the matrix has.
    """
    size, tensor = scope.size, source_of(ref)
    heads, (rows, columns) = size(cut.heads), ref.spec.shape
    each = max(size(part.start) + size(part.rows) for part in cut.parts)
    if heads * each != rows or not rows:
        raise CheckpointError(
            f"tensor {tensor.name!r} has {rows} rows, which are not {heads} heads of {each}",
            where=scope.where,
        )
    spec = TensorSpec(ref.spec.dtype, (heads, rows // heads, columns))
    whole = SourceTensor(tensor.name, spec, tensor.file, tensor.offset, tensor.stored)
    for name in dict.fromkeys(part.name for part in cut.parts):
        parts = [part for part in cut.parts if part.name == name]
        ranges = [(start := size(p.start), start + size(p.rows)) for p in parts]
        label = f"{tensor.name}: {name}"
        if parts[0].turned:
            made = turned_stack(label, slab_stack(label, whole, *ranges[0]), 0, columns)
        elif parts[0].stacked:
            made = slab_stack(label, whole, *ranges[0])
        else:
            made = rows_of_slabs(label, whole, ranges)
        yield name, TensorRef(made.spec, made)


def packed_codes(codes: Codes, graph: ActionGraph) -> TensorRef:
    """Codes of MXFP4, `_blocks` [..., groups, 16] and `_scales` [..., groups], as ggml has them."""
    blocks, scales = (codes.parts[end] for end in ("_blocks", "_scales"))
    *outer, groups, size = blocks.spec.shape
    rows = prod(outer)
    inputs = (
        TensorRef(blocks.spec, blocks).reshaped(rows, groups, size),
        TensorRef(scales.spec, scales).reshaped(rows, groups),
    )
    (packed,) = graph.add(PackMxfp4(), {}, *inputs)
    return packed.reshaped(*outer, packed.spec.shape[1])


def first_rows(ref: TensorRef, count: int) -> TensorRef:
    """No more rows than `count`, from the first on."""
    rows, *rest = ref.spec.shape
    if count >= rows:
        return ref
    tensor, spec = source_of(ref), TensorSpec(ref.spec.dtype, (count, *rest))
    made = SourceTensor(tensor.name, spec, tensor.file, tensor.offset, tensor.share(spec))
    return TensorRef(spec, made)


def row_of(ref: TensorRef, number: int) -> TensorRef:
    """One row of a matrix."""
    tensor = source_of(ref)
    spec = TensorSpec(tensor.spec.dtype, tensor.spec.shape[1:])
    offset = tensor.offset + number * tensor.spec.row_bytes
    name = f"{tensor.name}[{number}]"
    made = SourceTensor(name, spec, tensor.file, offset, tensor.share(spec))
    return TensorRef(spec, made)


def merged_stacks(first: SourceTensor, second: SourceTensor) -> TensorRef:
    """Two stacks of experts [experts, rows, columns] as one [experts, 2 * rows, columns]."""
    experts, rows, columns = first.spec.shape
    pieces = [
        slab_rows(tensor, index, 0, rows) for index in range(experts) for tensor in (first, second)
    ]
    made = stacked(f"{first.name}, {second.name}", pieces)
    return TensorRef(made.spec, made).reshaped(experts, 2 * rows, columns)


def frame_of(ref: TensorRef, number: int) -> TensorRef:
    """Of a convolution [out, in, frames, height, width] that over frame `number`."""
    out, channels, frames, *rest = ref.spec.shape
    tensor = source_of(ref)
    flat = TensorSpec(ref.spec.dtype, (1, out * channels * frames, *rest))
    planes = SourceTensor(tensor.name, flat, tensor.file, tensor.offset, tensor.stored)
    made = slab_stack(f"{tensor.name}, frame {number}", planes, number, flat.shape[1], frames)
    return TensorRef(made.spec, made).reshaped(out, channels, *rest)
