"""Quantized copies of a checkpoint, by the libraries themselves, and what they decode them to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import read_all_tensors, read_json, write_json

Tensors = dict[str, Any]
Quantized = tuple[Tensors, Any]
"""The tensors of a weight, by the ends of their names, and its floats; see `part_name`."""

E4M3_LARGEST = 448


def _fp8(weight: Any) -> Quantized:
    """transformers' `fp8`, in blocks of 128 x 128."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = weight.shape
    grid = torch.empty(-(-rows // 128), -(-columns // 128))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i, j in ((i, j) for i in range(len(grid)) for j in range(grid.shape[1])):
        place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        block = weight[place].float()
        grid[i, j] = block.abs().max() / E4M3_LARGEST
        codes[place] = (block / grid[i, j]).to(torch.float8_e4m3fn)
    floats = Fp8Dequantize(None)._dequantize_one(codes, grid, torch.bfloat16)
    return {"weight": codes, "weight_scale_inv": grid}, floats


def _modelopt(weight: Any) -> Quantized:
    """modelopt's FP8; it rounds a scale to BF16 before it multiplies."""
    from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor

    scale = (weight.float().abs().max() / E4M3_LARGEST).bfloat16().float()
    made, _ = FP8QTensor.quantize(weight, scale)
    parts = {"weight": made._quantized_data, "weight_scale": scale, "input_scale": scale.clone()}
    return parts, made.dequantize(torch.bfloat16, scale=scale)


def _compressed(kind: str, **weights: Any) -> Callable[[Any], Quantized]:
    def quantize(weight: Any) -> Quantized:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**weights)
        size = args.group_size or weight.shape[1]
        groups = weight.reshape(weight.shape[0], -1, size)
        if args.strategy == "tensor":
            groups = weight.reshape(1, 1, -1)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = type(BaseCompressor.load_from_registry(kind))
        parts = compressor.compress(state, scheme)
        return dict(parts), compressor.decompress(parts, scheme)["weight"]

    return quantize


def _mxfp4(weight: Any) -> Quantized:
    """gpt-oss's layout; any codes do, for transformers has no quantizer without a GPU."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rows, columns = weight.shape
    source = weight.view(torch.uint8).reshape(-1)[: rows * columns // 2]
    blocks = source.reshape(rows, columns // 32, 16).clone()
    scales = torch.full((rows, columns // 32), 120, dtype=torch.uint8)
    floats = convert_moe_packed_tensors(blocks[None], scales[None])[0].T
    return {"_blocks": blocks, "_scales": scales}, floats.contiguous()


def _gptq(weight: Any) -> Quantized:
    """auto-round's layout, with scales that are powers of two, of which it rounds no product."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    rows, columns = weight.shape
    layer = QuantLinear(4, 32, columns, rows, False)
    bits = weight.view(torch.int32).reshape(-1)
    layer.qweight = bits[: layer.qweight.numel()].reshape(layer.qweight.shape).clone()
    layer.qzeros = torch.full(layer.qzeros.shape, 0x77777777, dtype=torch.int32)
    layer.scales = torch.full(layer.scales.shape, 2.0**-6, dtype=torch.float16)
    floats = layer(torch.eye(columns, dtype=torch.float16)).T.contiguous() + 0
    order = torch.arange(columns, dtype=torch.int32) // 32
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    return {**parts, "g_idx": order}, floats.bfloat16()


def _packed(**weights: Any) -> tuple[Mapping[str, Any], Callable[[Any], Quantized]]:
    args = {"num_bits": 4, "type": "int", **weights}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
    }
    return config, _compressed("pack-quantized", **args)


def _packed_in_two_ways() -> tuple[Mapping[str, Any], Callable[[Any], Quantized]]:
    """Four bits in groups of 64, and eight in groups of 32 for what has fewer rows than columns.

    Words and scales of the latter are those of twice the columns in the former.
    """
    config, four = _packed(strategy="group", group_size=64, symmetric=True)
    other, eight = _packed(num_bits=8, strategy="group", group_size=32, symmetric=True)
    groups = {
        "group_0": config["config_groups"]["group_0"],
        "group_1": other["config_groups"]["group_0"],
    }

    def quantize(weight: Any) -> Quantized:
        rows, columns = weight.shape
        return eight(weight) if rows < columns else four(weight)

    return {**config, "config_groups": groups}, quantize


def _float(strategy: str, stored: str) -> tuple[Mapping[str, Any], Callable[[Any], Quantized]]:
    args = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    config = {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
    }
    return config, _compressed(stored, **args)


METHODS: Mapping[str, tuple[Mapping[str, Any], Callable[[Any], Quantized]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, _fp8),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, _modelopt),
    "float channel": _float("channel", "float-quantized"),
    "float tensor": _float("tensor", "naive-quantized"),
    "int4 group": _packed(strategy="group", group_size=32, symmetric=True),
    "int4 zeros": _packed(strategy="group", group_size=64, symmetric=False),
    "int4 channel": _packed(strategy="channel", symmetric=True),
    "int4 and int8": _packed_in_two_ways(),
    "mxfp4": ({"quant_method": "mxfp4"}, _mxfp4),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, _gptq),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
        _gptq,
    ),
}
"""What a config says of each way to quantize a weight, and what does it."""


def part_name(module: str, end: str) -> str:
    """What a tensor of a quantized module is called."""
    return module + end if end.startswith("_") else f"{module}.{end}"


def quantize(folder: Path, method: str, modules: Callable[[str], bool]) -> Path:
    """Quantize the weights of some modules of the checkpoint in `folder`, whose copy beside it,
    `<folder>-decoded`, gets the floats that the library decodes them to.

    Returns the copy.
    """
    config, work = METHODS[method]
    copy = Path(shutil.copytree(folder, f"{folder}-decoded"))
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        quantized, decoded = {}, {}
        for name, tensor in tensors.items():
            module, _, end = name.rpartition(".")
            if end == "weight" and modules(module):
                parts, floats = work(tensor)
                quantized |= {part_name(module, end): item for end, item in parts.items()}
                decoded[name] = floats
            else:
                quantized[name] = decoded[name] = tensor
        save_file({name: item.contiguous() for name, item in quantized.items()}, path)
        save_file(decoded, copy / path.name)
    write_json(
        folder / "config.json",
        {**read_json(folder / "config.json"), "quantization_config": dict(config)},
    )
    return copy


def decoded_folder(folder: Path, target: Path) -> Path:
    """The checkpoint in BF16, as compressed-tensors decodes it."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint

    stored = read_all_tensors(folder)
    scaled = [name.removesuffix(".weight_scale_inv") for name in stored if "_scale_inv" in name]
    convert_checkpoint(folder, target, FP8BlockDequantizer(targets=scaled))
    return target


def floats_of_gpt_oss(folder: Path, target: Path) -> Path:
    """The checkpoint in BF16, as transformers decodes it and would save it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(folder, target)
    stored = load_file(target / "model.safetensors")
    for name in [name for name in stored if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        codes, scales = stored.pop(name), stored.pop(f"{stem}_scales")
        stored[stem] = convert_moe_packed_tensors(codes, scales).contiguous()
    save_file(stored, target / "model.safetensors")
    config = read_json(target / "config.json")
    del config["quantization_config"]
    write_json(target / "config.json", config)
    return target
