"""How the tensors and configs that transformers writes are spelled on the hub; see `zoo`.

Each function turns them into the hub's, in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

Tensors = dict[str, Any]
"""Torch tensors by their names on disk."""


def old_rope(_: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5: `rope_theta` and `torch_dtype`."""
    parameters = config.pop("rope_parameters", None)
    if parameters is not None:
        config["rope_theta"] = parameters.pop("rope_theta")
        if "partial_rotary_factor" in parameters:
            config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
        plain = parameters.get("rope_type", "default") == "default"
        config["rope_scaling"] = None if plain else parameters
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)


def qwen35_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """An MTP head, and the states of linear attention in float32."""
    text = config["text_config"]
    text["mtp_num_hidden_layers"], text["mtp_use_dedicated_embeddings"] = 1, False
    text["dtype"] = config.pop("dtype")
    for name in [name for name in tensors if name.endswith((".A_log", "linear_attn.norm.weight"))]:
        tensors[name] = tensors[name].float()
    full = text["layer_types"].index("full_attention")
    layer = f"model.language_model.layers.{full}."
    for name in [name for name in tensors if name.startswith(layer)]:
        tensors[f"mtp.layers.0.{name.removeprefix(layer)}"] = noise_like(
            f"mtp {name}", tensors[name]
        )
    hidden = text["hidden_size"]
    norm = tensors["model.language_model.norm.weight"]
    tensors["mtp.fc.weight"] = noise_like("mtp.fc", norm.new_empty(hidden, 2 * hidden))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = noise_like(f"mtp.{name}", norm)


def qwen35_moe_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """As `qwen35_hub`, with the experts of a layer in two tensors [E, 2I, H] and [E, H, I]."""
    _fuse_experts(tensors, "mlp.experts.")
    qwen35_hub(tensors, config)


def _fuse_experts(tensors: Tensors, infix: str) -> None:
    import torch

    firsts = [name for name in tensors if name.endswith(f"{infix}0.gate_proj.weight")]
    for first in firsts:
        prefix = first.removesuffix("0.gate_proj.weight")
        parts = {}
        for kind in ("gate", "up", "down"):
            names = list(_numbered(tensors, prefix, f".{kind}_proj.weight"))
            parts[kind] = torch.stack([tensors.pop(name) for name in names])
        tensors[f"{prefix}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}down_proj"] = parts["down"]


def _numbered(tensors: Tensors, prefix: str, suffix: str) -> Iterator[str]:
    number = 0
    while (name := f"{prefix}{number}{suffix}") in tensors:
        yield name
        number += 1


def qwen3_moe_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5."""
    old_rope(tensors, config)
    config["num_experts"] = config.pop("num_local_experts")


def qwen3_moe_fp8(tensors: Tensors, config: dict[str, Any]) -> None:
    """FP8 in blocks of 128 by 128, as Qwen publishes it beside the floats: routers stay plain."""
    qwen3_moe_hub(tensors, config)
    _fp8_blocks(tensors, config, keep=("lm_head", "embed_tokens", "mlp.gate."))


def qwen3_next_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """An MTP head like a decoder layer of full attention."""
    old_rope(tensors, config)
    layer = f"model.layers.{config['num_hidden_layers'] - 1}."
    for name in [name for name in tensors if name.startswith(layer)]:
        tensors[f"mtp.layers.0.{name.removeprefix(layer)}"] = noise_like(
            f"mtp {name}", tensors[name]
        )
    norm = tensors["model.norm.weight"]
    tensors["mtp.fc.weight"] = noise_like("mtp.fc", norm.new_empty(len(norm), 2 * len(norm)))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = noise_like(f"mtp.{name}", norm)


def next_layer(tensors: Tensors, config: dict[str, Any]) -> None:
    """The MTP head of GLM: one decoder layer more, with `eh_proj` and norms."""
    old_rope(tensors, config)
    config["num_nextn_predict_layers"] = 1
    count = config["num_hidden_layers"]
    last, extra = f"model.layers.{count - 1}.", f"model.layers.{count}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[extra + name.removeprefix(last)] = noise_like(f"mtp {name}", tensors[name])
    norm, table = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{extra}{name}.weight"] = noise_like(name, norm)
    tensors[f"{extra}eh_proj.weight"] = noise_like(
        "eh_proj", norm.new_empty(len(norm), 2 * len(norm))
    )
    tensors[f"{extra}embed_tokens.weight"] = table.clone()
    tensors[f"{extra}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    _wide_biases(tensors)


def _wide_biases(tensors: Tensors) -> None:
    """The correction of the router's scores in float32."""
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name] = tensors[name].float()


def deepseek_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """FP8 in blocks of 128 by 128 for the linears of decoder layers.

    Without the MTP head, which mlx-lm knows by the number 61 of its layer alone.
    """
    old_rope(tensors, config)
    _fp8_blocks(tensors, config, keep=("lm_head", "embed_tokens", "mlp.gate."))
    _wide_biases(tensors)


def minimax_m2_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """FP8 in blocks of 128 by 128 for the linears of decoder layers; `rotary_dim` alone."""
    old_rope(tensors, config)
    del config["partial_rotary_factor"]
    config["shared_intermediate_size"] = 0
    _fp8_blocks(tensors, config, keep=("lm_head", "embed_tokens", "block_sparse_moe.gate."))
    _wide_biases(tensors)


def _fp8_blocks(tensors: Tensors, config: dict[str, Any], keep: tuple[str, ...]) -> None:
    """Store linears as F8_E4M3 with a `weight_scale_inv` for each block of 128 by 128."""
    import torch

    for name in list(tensors):
        weight = tensors[name]
        if not name.endswith(".weight") or weight.ndim != 2 or any(part in name for part in keep):
            continue
        rows, columns = weight.shape
        down, across = -(-rows // 128), -(-columns // 128)
        padded = torch.zeros(down * 128, across * 128)
        padded[:rows, :columns] = weight.float()
        blocks = padded.view(down, 128, across, 128)
        scale = (blocks.abs().amax(dim=(1, 3)) / 448.0).clamp(min=1e-12)
        codes = (blocks / scale[:, None, :, None]).view(down * 128, across * 128)
        tensors[name] = codes[:rows, :columns].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def gpt_oss_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """Experts in MXFP4: `_blocks` [E, rows, groups, 16] of two codes each, `_scales` as E8M0."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters
    config["torch_dtype"] = config.pop("dtype")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        weight = tensors.pop(name).transpose(1, 2).contiguous().float()
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _mxfp4(weight)
    config["quantization_config"] = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }


def _mxfp4(weight: Any) -> tuple[Any, Any]:
    """Codes [..., columns / 32, 16] and scales [..., columns / 32] of a float32 `weight`."""
    import torch

    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = weight.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).clamp(min=1e-30).log2().floor().clamp(-125, 125) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - grid).abs().argmin(-1).to(torch.uint8)
    codes |= (scaled < 0).to(torch.uint8) << 3
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, (exponent + 127).to(torch.uint8)


def nemotron_hub(_: Tensors, config: dict[str, Any]) -> None:
    """The kinds of the layers as one string, and `torch_dtype`."""
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    kinds = config.pop("layers_block_type")
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    config["num_hidden_layers"] = len(kinds)
    config["torch_dtype"] = config.pop("dtype")


def gemma3_text_hub(_: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = None
    config["sliding_window_pattern"] = len(config.pop("layer_types"))
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")


def gemma3_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """As `gemma3_text_hub`, in its section; the tower in a module of its own."""
    for name in [name for name in tensors if name.startswith("vision_tower.")]:
        rest = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        tensors[f"vision_tower.vision_model.{rest}"] = tensors.pop(name)
    gemma3_text_hub(tensors, config["text_config"])
    config["torch_dtype"] = config.pop("dtype")
    _stated_vocabulary(tensors, config)


def gemma4_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """What differs in layers of full attention, in entries of their own."""
    text = config["text_config"]
    full = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = full["head_dim"]
    text["num_global_key_value_heads"] = full.get("num_key_value_heads")
    _stated_vocabulary(tensors, config)


def _stated_vocabulary(_: Tensors, config: dict[str, Any]) -> None:
    """The size of the vocabulary at the top, where mlx-lm looks: it takes Gemma's for granted."""
    config["vocab_size"] = config["text_config"]["vocab_size"]


def mistral3_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5."""
    text = config["text_config"]
    text["dtype"] = config["dtype"]
    old_rope(tensors, text)
    del text["torch_dtype"]
    config["torch_dtype"] = config.pop("dtype")


def noise_like(name: str, like: Any, around: Any = None) -> Any:
    """A tensor like `like`, random by its name; near 1 for norms, or near `around`."""
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(like.shape, generator=generator) * 0.05
    if around is None and like.ndim < 2:
        around = torch.ones(like.shape)
    return (noise if around is None else noise + around.float()).to(like.dtype)
