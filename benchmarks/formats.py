"""Measure the ops of schemes that need no data against llm-compressor, and FP8 against modelopt.

    python -m benchmarks.formats [--shape 4096 5120] [--threads 1 2] [--repeat 3]

Both make all tensors of a BF16 linear, which must be equal: we by the op of the scheme's storage,
llm-compressor by what its `model_free_ptq` does to a weight once it is read (its values observed,
its module compressed), modelopt by what its export calls for one (its largest magnitudes found, its
values rounded).  Of n threads, each of ours quantizes a matrix, as in a build, and torch has n
for one matrix after another.  Figures are GB of weight a second, of the fastest run, taken in
turn; only their ratios mean anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from llmcompressor.entrypoints.model_free.lifecycle import (
    calibrate_weight,
    initialize_quantized_linear,
)
from loguru import logger
from modelopt.torch.export.model_config import QUANTIZATION_FP8
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP8QTensor
from modelopt.torch.quantization.utils import reduce_amax
from rich.console import Console
from rich.table import Table

from benchmarks.timing import seconds
from carnice_build.dtypes import NUMPY_NAME, TensorSpec
from carnice_build.formats.compressed_tensors import ops as packed
from carnice_build.formats.compressed_tensors.storages import (
    floats_ops,
    ints_ops,
    mx_ops,
    nvfp4_ops,
    row_floats_ops,
)
from carnice_build.formats.nvfp4 import fp8_ops
from carnice_build.graph import ArrayOp, TensorData

GOAL = 10

Reference = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A scheme by the library's name, and the op that makes its weights.

    `reference` is the library's function from a weight to its tensors, None for llm-compressor's.
    """

    scheme: str
    op: ArrayOp
    params: Mapping[str, Any] = field(default_factory=dict)
    suffixes: Sequence[str] = ()
    reference: Reference | None = None


def integers(bits: int, *, symmetric: bool = True) -> Case:
    """Packed integers in groups of 128."""
    params = {
        "observer": "memoryless_minmax",
        "group_size": 128,
        "columns": False,
        "rows": False,
        "bits": bits,
        "symmetric": symmetric,
    }
    names = [name for name in packed.SUFFIXES if name != "weight_zero_point" or not symmetric]
    scheme = f"W{bits}A16" if symmetric else f"W{bits}A16_ASYM"
    return Case(scheme, packed.GroupQuantize(), params, names)


def modelopt_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes and scale of modelopt's FP8."""
    scale = reduce_amax(weight).float() / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": to_quantized_weight(weight, scale, QUANTIZATION_FP8), "weight_scale": scale}


def modelopt_mxfp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes and scales of modelopt's MXFP8."""
    scales = MXFP8QTensor.get_weights_scaling_factor(weight)
    codes = MXFP8QTensor.quantize_with_scale(weight, scales)
    return {"weight": codes, "weight_scale": scales}


MODELOPT = "weight", "weight_scale"

CASES = (
    Case("FP8_DYNAMIC", row_floats_ops.RowQuantize(), {}, row_floats_ops.SUFFIXES),
    Case("FP8", floats_ops.FloatQuantize(), {"block": None}, floats_ops.SUFFIXES),
    Case("FP8_BLOCK", floats_ops.FloatQuantize(), {"block": [128, 128]}, floats_ops.SUFFIXES),
    Case(
        "W8A8",
        ints_ops.IntQuantize(),
        {"bits": 8, "group_size": None, "symmetric": True},
        ints_ops.SUFFIXES[:2],
    ),
    Case(
        "W4AFP8",
        ints_ops.IntQuantize(),
        {"bits": 4, "group_size": 128, "symmetric": True},
        ints_ops.SUFFIXES[:2],
    ),
    integers(4, symmetric=False),
    *(integers(bits) for bits in range(2, 9)),
    Case("NVFP4A16", nvfp4_ops.GlobalQuantize(), {}, nvfp4_ops.SUFFIXES),
    *(
        Case(f"MXFP{bits}A16", mx_ops.MxQuantize(), {"bits": bits}, mx_ops.SUFFIXES[bits])
        for bits in (4, 8)
    ),
    Case("modelopt FP8", fp8_ops.TensorQuantize(), {}, MODELOPT, modelopt_fp8),
    Case("modelopt MXFP8", fp8_ops.MxQuantize(), {}, MODELOPT, modelopt_mxfp8),
)


def ours(case: Case, weight: TensorData) -> list[TensorData]:
    """The outputs of the op."""
    specs = case.op.infer(case.params, [TensorSpec(weight.dtype, weight.array.shape)])
    outputs = [TensorData(s.dtype, np.empty(s.shape, NUMPY_NAME[s.dtype])) for s in specs]
    case.op.apply(case.params, [weight], outputs)
    return outputs


def llm_compressor(scheme: QuantizationScheme, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of the module."""
    module = initialize_quantized_linear(weight, scheme, "cpu")
    calibrate_weight(module)
    compress_module(module)
    found: dict[str, torch.Tensor] = module.state_dict()
    return found


def check(case: Case, theirs: Reference, weight: torch.Tensor, bits: TensorData) -> None:
    """Raise AssertionError unless all tensors are equal."""
    found = theirs(weight)
    for suffix, item in zip(case.suffixes, ours(case, bits), strict=True):
        content = found[suffix].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert content.tobytes() == item.array.tobytes(), f"{case.scheme}: {suffix}"


def rates(case: Case, weight: torch.Tensor, threads: int, repeat: int) -> tuple[float, float]:
    """GB of weight a second, ours and theirs."""
    theirs = case.reference or partial(
        llm_compressor, preset_name_to_scheme(case.scheme, ["Linear"])
    )
    bits = TensorData("BF16", weight.view(torch.int16).numpy().view(np.uint16))
    torch.set_num_threads(threads)
    check(case, theirs, weight, bits)
    with ThreadPoolExecutor(threads) as pool:

        def all_threads() -> None:
            list(pool.map(lambda _: ours(case, bits), range(threads)))

        all_threads()
        pairs = [
            (seconds(all_threads) / threads, seconds(lambda: theirs(weight))) for _ in range(repeat)
        ]
    mine, other = (weight.nbytes / 1e9 / min(times) for times in zip(*pairs, strict=True))
    return mine, other


def main() -> None:
    """Make a matrix, measure every scheme, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 5120])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", default=[case.scheme for case in CASES])
    options = parser.parse_args()
    logger.disable("compressed_tensors")
    logger.disable("llmcompressor")
    torch.manual_seed(0)
    weight = (torch.randn(options.shape) * 0.02).to(torch.bfloat16)
    table = Table(title=f"GB/s of BF16, {options.shape[0]} by {options.shape[1]}")
    for heading in ("scheme", "threads", "ours", "the library", f"ratio, goal {GOAL}"):
        table.add_column(heading)
    for case in CASES:
        if case.scheme not in options.schemes:
            continue
        for threads in options.threads:
            mine, other = rates(case, weight, threads, options.repeat)
            figures = f"{mine:.2f}", f"{other:.4f}", f"{mine / other:.0f}x"
            table.add_row(case.scheme, str(threads), *figures)
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
