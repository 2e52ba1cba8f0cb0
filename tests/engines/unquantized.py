"""A variant's twin in BF16: the tensors before any is quantized, under the same names and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tiny import Tensor, write_safetensors

from carnice_build.engines.engine import launch_of
from carnice_build.formats.values import matrix, read_rows
from carnice_build.planning.planner import VariantPlan
from carnice_build.serving.launches import Launch
from carnice_build.verification.sources import source_tensors


def write_twin(variant: VariantPlan, folder: Path) -> Path:
    """Write it into the new `folder`."""
    folder.mkdir()
    tensors = {}
    for name, tensor in source_tensors(variant).items():
        spec = tensor.spec
        rows = read_rows(tensor, spec, 0, matrix(spec)[0])
        tensors[name] = Tensor(spec.dtype, spec.shape, rows.array.tobytes())
    write_safetensors(folder / "model.safetensors", tensors)
    for name, content in variant.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(dict(variant.config)))
    return folder


def twin_launch(variant: VariantPlan) -> Launch:
    """The variant's launch without what names its format."""
    launch = launch_of(variant)
    assert launch is not None
    flags = {name: flag for name, flag in launch.flags.items() if name != "quantization"}
    return replace(launch, flags=flags)
