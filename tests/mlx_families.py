"""Traces of tiny checkpoints, replayed, and what `mlx_lm.convert` makes of the same files.

Only for tests that run where mlx-lm is installed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny import Tensor, read_all_tensors

from carnice_build.commands.asking import Asking
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.mlx.conversion import Numbered
from carnice_build.formats.mlx.replay import replay
from carnice_build.formats.mlx.trace import Refusal, Trace, Traced, TracedSource, parsed
from carnice_build.graph import TensorData
from carnice_build.kernels.affine import quantize_rows
from carnice_build.kernels.elementwise import cast
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture
from carnice_build.steps.base import Question

GROUP, BITS = 64, 4


def asked(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], cache: Path) -> Any:
    """mlx-lm's answer about a checkpoint, in its own spelling: a Trace or a Refusal."""
    rows = {name: [spec.dtype, list(spec.shape)] for name, spec in tensors.items()}
    return Asking(cache)(
        Question(
            function="carnice_build.backends.mlx_trace:answer",
            arguments=(config, rows),
            libraries=("mlx-lm", "mlx"),
            version=0,
            parse=parsed,
            extra="mlx",
        )
    )


def trace_of_folder(folder: Path) -> Trace | Refusal:
    """mlx-lm's answer about the folder as it is, from this process."""
    from carnice_build.backends.mlx_trace import trace

    config = json.loads((folder / "config.json").read_text())
    specs = {
        name: TensorSpec(item.dtype, tuple(item.shape))
        for name, item in read_all_tensors(folder).items()
    }
    return parsed(trace(config, specs))


def converted(
    folder: Path, target: Path, predicate: str | None = None, mode: str = "affine"
) -> Path:
    """The folder that `mlx_lm.convert -q --q-bits 4` makes, one of its mixed recipes, or a mode.

    Mixed recipes it gives the group size, which it would leave null otherwise.
    """
    from mlx_lm.convert import convert

    group = GROUP if predicate else None
    with contextlib.redirect_stdout(io.StringIO()):
        convert(
            str(folder),
            str(target),
            quantize=True,
            q_bits=BITS if mode == "affine" else None,
            q_group_size=group,
            q_mode=mode,
            quant_predicate=predicate,
        )
    return target


def model_of(folder: Path) -> tuple[dict[str, Any], Architecture, dict[str, TensorSpec]]:
    """The config, the architecture, and the tensors of a checkpoint by their canonical names."""
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of(config, "config.json")
    stored = read_all_tensors(folder)
    specs = {}
    for fact in architecture.tensors.values():
        names = [*Numbered({fact.name: TensorSpec("BF16", fact.shape)}).tensors]
        names += [fact.fused.name] if fact.fused else []
        if held := [name for name in names if name in stored]:
            specs[fact.name] = TensorSpec(stored[held[0]].dtype, fact.shape)
    return config, architecture, specs


def replayed(trace: Trace, folder: Path) -> dict[str, Tensor]:
    """The tensors of the MLX folder, by the trace and our kernel alone."""
    stored = read_all_tensors(folder)
    found: dict[str, Tensor] = {}
    for item in trace.tensors:
        data = _made(item, stored)
        path, _, suffix = item.name.rpartition(".")
        own = trace.modules.get(path) if suffix == "weight" else None
        if own is None or item.spec.shape[-1] % GROUP:
            found[item.name] = Tensor(data.dtype, item.spec.shape, data.array.tobytes())
        else:
            settings = {"bits": BITS, "group_size": GROUP, **own}
            found.update(_quantized(path, data, settings["bits"], settings["group_size"]))
    return found


def _made(item: Traced, stored: Mapping[str, Tensor]) -> TensorData:
    made = replay(item.steps, [_loaded(source, stored) for source in item.sources])
    array = np.ascontiguousarray(made.array).reshape(item.spec.shape)
    if made.dtype == item.spec.dtype:
        return TensorData(made.dtype, array)
    out = np.empty(array.shape, NUMPY_NAME[item.spec.dtype])
    assert cast(array, made.dtype, item.spec.dtype, out) < 0
    return TensorData(item.spec.dtype, out)


def _loaded(source: TracedSource, stored: Mapping[str, Tensor]) -> TensorData:
    names = Numbered({source.name: source.spec}).tensors
    content = b"".join(stored[name].data for name in names)
    array = np.frombuffer(content, NUMPY_NAME[source.spec.dtype]).reshape(source.spec.shape)
    return TensorData(source.spec.dtype, array)


def _quantized(path: str, data: TensorData, bits: int, group: int) -> dict[str, Tensor]:
    *before, columns = data.array.shape
    rows = data.array.reshape(-1, columns)
    packed = np.empty((len(rows), columns * bits // 32), np.uint32)
    scales, biases = (np.empty((len(rows), columns // group), rows.dtype) for _ in range(2))
    assert quantize_rows(rows, data.dtype, bits, group, packed, scales, biases) < 0
    parts = (("weight", "U32", packed), ("scales", data.dtype, scales))
    return {
        f"{path}.{suffix}": Tensor(dtype, (*before, array.shape[1]), array.tobytes())
        for suffix, dtype, array in (*parts, ("biases", data.dtype, biases))
    }


def listed_modules(trace: Trace, quantized: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of single modules, by mlx-lm's own rule.

    Of a checkpoint that is quantized already, every module that becomes so is listed.
    """
    whole = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    found = {}
    for path, own in trace.modules.items():
        if f"{path}.scales" in quantized and (own or trace.stated is not None):
            found[path] = dict(own) or whole
    return found
