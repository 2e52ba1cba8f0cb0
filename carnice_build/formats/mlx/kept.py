"""What mlx-lm makes of a checkpoint some of whose weights it takes with the codes they have.

That is MXFP4, which MLX has too: its words and scales are the bytes of the checkpoint's blocks and
scales, row by row.  mlx-lm is asked all the same, for it quantizes the rest.
"""

from __future__ import annotations

from dataclasses import replace

from carnice_build.checkpoint.quantized import stated_quantization
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.mlx.conversion import Fused, ask_mlx, refused, told
from carnice_build.formats.mlx.entries import older_entries, with_entries
from carnice_build.formats.mlx.table import table_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Refusal, Trace, Traced, TracedSource
from carnice_build.graph import TensorRef, View
from carnice_build.steps.base import Codes, PlanContext
from carnice_build.tensors import STACK, SourceTensor

METHOD = "mxfp4"
"""What a config calls the method whose codes mlx-lm keeps."""

_ENDS = {"weight": "_blocks", "scales": "_scales"}
"""What tensors of MLX are of: the ends of the checkpoint's names."""


def kept_trace(view: View, context: PlanContext) -> Trace:
    """What mlx-lm makes of a view whose `PlanContext.codes` it keeps; PlanError if it does not.

    Tensors of codes have for a source the weight that the codes are of.
    """
    architecture, codes = context.architecture, context.codes
    table = table_of(architecture.name, Target.MLX_LM)
    config = architecture.published_config({architecture.tensors[name].part for name in view})
    entries = older_entries(config, table)
    stated = {"quantization_config": stated_quantization(context.body.config)}
    plain = {name: ref.spec for name, ref in view.items() if name not in codes}
    made_up = Fused(plain, [architecture.tensors[name] for name in plain])
    stored = {name: spec for item in codes.values() for name, spec in item.stored.items()}
    tensors = {**made_up.tensors, **stored}
    names = {*made_up.names, *stored}
    trace = ask_mlx(context, {**with_entries(config, entries), **stated}, tensors, names)
    if isinstance(trace, Refusal):
        raise refused(trace.reason)
    ours = {item.name: item for item in _coded(view, context)}
    theirs = {
        item.name: item.spec
        for item in trace.tensors
        if any(source.name in stored for source in item.sources)
    }
    if theirs != {name: item.spec for name, item in ours.items()}:
        raise PlanError(f"mlx-lm does not keep {next(iter(stored))!r} as it is", at=("format",))
    rest = told(trace, made_up.parts).tensors
    kept = tuple(ours.get(item.name, item) for item in rest)
    return replace(trace, tensors=kept, entries=entries)


def _coded(view: View, context: PlanContext) -> list[Traced]:
    facts = context.architecture.tensors
    return [
        Traced(
            f"{facts[name].module.replace(f'.{STACK}', '')}.{suffix}",
            codes_of(codes, suffix).spec,
            (TracedSource(name, view[name].spec),),
        )
        for name, codes in context.codes.items()
        for suffix in _ENDS
    ]


def codes_of(codes: Codes, suffix: str) -> TensorRef:
    """The checkpoint's bytes as MLX's tensor: words [..., columns / 8], or scales."""
    tensor = codes.parts[_ENDS[suffix]]
    spec = tensor.spec
    if suffix == "weight":
        *before, groups, size = spec.shape
        spec = TensorSpec("U32", (*before, groups * size // 4))
    found = SourceTensor(tensor.name, spec, tensor.file, tensor.offset)
    return TensorRef(spec, found)
