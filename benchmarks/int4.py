"""Measure the INT4 kernels against auto-round, compressed-tensors and llm-compressor.

    python -m benchmarks.int4 [--rows 2048] [--columns 5120] [--repeat 3]

Both sides quantize one BF16 weight on one thread, in turn, and give the same bytes. Figures are
GB of weight a second, of the fastest run; only their ratios mean anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from auto_round.data_type.int import quant_tensor_rtn_sym
from auto_round.utils.missing_tensors import quantize_weight_rtn
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.observers import Observer
from rich.console import Console
from rich.table import Table

from carnice_build.kernels import autoround, autoround_merge, compressed, integers

GROUP_SIZE = 128

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One piece of work by our kernels, and the same by a library where one has it."""

    what: str
    ours: Work
    theirs: Work | None


def bf16_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The storage in which our kernels take BF16."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def empty_format(
    rows: int, columns: int
) -> tuple[autoround.Packed, autoround.Packed, autoround.Scales]:
    """Room for the three tensors of the AutoRound format."""
    groups = columns // GROUP_SIZE
    return (
        np.empty((columns // 8, rows), np.int32),
        np.empty((groups, rows // 8), np.int32),
        np.empty((groups, rows), np.float16),
    )


def autoround_cases(weight: torch.Tensor) -> list[Case]:
    """Round to nearest, packing of a tuned weight, reading, and merging."""
    rows, columns = weight.shape
    bits = bf16_bits(weight)
    base = empty_format(rows, columns)
    results = empty_format(rows, columns)
    autoround.quantize_rtn(bits, "BF16", GROUP_SIZE, 0, *base)
    tuned, scale, _ = quant_tensor_rtn_sym(weight, 4, GROUP_SIZE)
    scale = scale.reshape(rows, -1)
    tuned_bits, tuned_scales = bf16_bits(tuned), scale.numpy()
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    linear.weight.data = tuned
    packer = QuantLinear(4, GROUP_SIZE, columns, rows, bias=False)
    values = np.empty((rows, columns), np.float32)
    nearby = bf16_bits((weight + torch.randn_like(weight) * 0.002).contiguous())
    return [
        Case(
            "AutoRound: round to nearest",
            lambda: autoround.quantize_rtn(bits, "BF16", GROUP_SIZE, 0, *results),
            lambda: quantize_weight_rtn(weight, 4, GROUP_SIZE),
        ),
        Case(
            "AutoRound: pack a tuned weight",
            lambda: autoround.pack(tuned_bits, "BF16", tuned_scales, 0, *results),
            lambda: packer.pack(linear, scale, 8, device="cpu"),
        ),
        Case(
            "AutoRound: dequantize",
            lambda: autoround.dequantize_rows(*base, 0, values),
            None,
        ),
        Case(
            "AutoRound: merge, rerounding",
            lambda: autoround_merge.merge_reround(nearby, "BF16", 0, *base, results[0]),
            None,
        ),
        Case(
            "AutoRound: merge the delta",
            lambda: autoround_merge.merge_delta(nearby, bits, "BF16", 0, *base, results[0]),
            None,
        ),
        Case(
            "AutoRound: residual of a base",
            lambda: autoround_merge.grid_residual(bits, "BF16", 0, *base, 0.05),
            None,
        ),
    ]


def compressed_cases(weight: torch.Tensor) -> list[Case]:
    """Both observers, and the codes."""
    rows, columns = weight.shape
    bits = bf16_bits(weight)
    scales = np.empty((rows, columns // GROUP_SIZE), np.uint16)
    zero_points = np.empty(scales.shape, np.int8)
    packed = np.empty((rows, columns // 8), np.int32)
    packed_zeros = np.empty((rows // 8, columns // GROUP_SIZE), np.int32)
    arguments = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=GROUP_SIZE, symmetric=False
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)

    def observe(name: str) -> dict[str, torch.Tensor]:
        observer = Observer.load_from_registry(name, base_name="weight", args=arguments)
        observer(weight)
        qparams: dict[str, torch.Tensor] = observer.get_qparams()
        return qparams

    def compress() -> object:
        state = {
            "weight": weight,
            "weight_scale": qparams["scale"],
            "weight_zero_point": qparams["zero_point"],
        }
        return PackedQuantizationCompressor.compress(state, scheme)

    def quantize() -> None:
        grid = their_scales, their_zeros
        integers.quantize_rows(bits, "BF16", 4, GROUP_SIZE, packed, *grid, given=True)
        integers.pack_zero_points(their_zeros, 4, packed_zeros)

    qparams = observe("memoryless_minmax")
    their_scales, their_zeros = bf16_bits(qparams["scale"]), qparams["zero_point"].numpy()
    return [
        Case(
            "pack-quantized: observer mse",
            lambda: compressed.mse_qparams(bits, "BF16", GROUP_SIZE, scales, zero_points),
            lambda: observe("mse"),
        ),
        Case("pack-quantized: codes, packed", quantize, compress),
    ]


def best(work: Work, repeat: int) -> float:
    """Seconds of the fastest of some runs: the others met something else on the machine."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Make a weight, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (torch.randn(options.rows, options.columns) * 0.02).to(torch.bfloat16)
    gigabytes = weight.nbytes / 1e9
    table = Table(title="GB/s of BF16 on one thread")
    for heading in ("what", "ours", "library", "ratio"):
        table.add_column(heading)
    for case in autoround_cases(weight) + compressed_cases(weight):
        # The first call loads or compiles the kernel; that is not what is measured.
        case.ours()
        mine = best(case.ours, options.repeat)
        theirs = best(case.theirs, options.repeat) if case.theirs else None
        table.add_row(
            case.what,
            f"{gigabytes / mine:.3f}",
            f"{gigabytes / theirs:.4f}" if theirs else "",
            f"{theirs / mine:.0f}x" if theirs else "",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
