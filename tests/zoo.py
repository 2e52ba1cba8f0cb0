"""Tiny random checkpoints of many model families, written by transformers or spelled as on the hub.

`write_zoo(folder, family, layout)` makes one:

- layout `transformers`: what `save_pretrained` of the installed version writes.
- layout `hub`: names, shapes, types and config entries as the family's published checkpoints have
  them: an MTP head, fused or quantized experts, FP8 blocks, `rope_theta` at the top of the config.

Hidden sizes are multiples of 128, and so is every input of a linear of the text model but the few
that a family fixes itself; there are four layers or more, of every kind that the family has, and
four experts where there are any.  Weights are random, the same in each run.
Tokenizer files are those of the demo, with its vocabulary of 2048.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Layout = Literal["transformers", "hub"]

VOCABULARY = 2048
HIDDEN = 256
LAYERS = 4
TOKENIZER = Path(__file__).parent.parent / "demo" / "qwen3.6-27b"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Tensors = dict[str, Any]
"""Torch tensors by their names on disk."""


@dataclass(frozen=True)
class Family:
    """How to make a family's checkpoint: transformers' class, the config, and the hub's layout.

    `config` holds the arguments of the config class of `model_type`; nested sections are dicts.
    `hub` turns tensors and config of transformers into those of the hub, in place.
    """

    model_type: str
    model: str
    config: dict[str, Any]
    hub: Callable[[Tensors, dict[str, Any]], None] | None = None


_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_QWEN35: dict[str, Any] = {
    **_TEXT,
    **_LINEAR_ATTENTION,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        **_DEFAULT_ROPE,
    },
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 16,
    "out_hidden_size": HIDDEN,
}
_QWEN_TOKENS = {
    "image_token_id": 4,
    "video_token_id": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
}
_PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 32,
    "image_size": 32,
    "patch_size": 8,
}
_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
_GEMMA3: dict[str, Any] = {
    **_TEXT,
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 64,
    "sliding_window": 64,
    "tie_word_embeddings": True,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}
_GEMMA4: dict[str, Any] = {
    **_TEXT,
    "num_hidden_layers": 6,
    "global_head_dim": 128,
    "sliding_window": 64,
    "tie_word_embeddings": True,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "vocab_size_per_layer_input": VOCABULARY,
}
_MLA: dict[str, Any] = {
    **{key: value for key, value in _TEXT.items() if key != "head_dim"},
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}


def _old_rope(_: Tensors, config: dict[str, Any]) -> None:
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


def _qwen35_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """An MTP head, and the states of linear attention in float32."""
    text = config["text_config"]
    text["mtp_num_hidden_layers"], text["mtp_use_dedicated_embeddings"] = 1, False
    text["dtype"] = config.pop("dtype")
    for name in [name for name in tensors if name.endswith((".A_log", "linear_attn.norm.weight"))]:
        tensors[name] = tensors[name].float()
    full = text["layer_types"].index("full_attention")
    layer = f"model.language_model.layers.{full}."
    for name in [name for name in tensors if name.startswith(layer)]:
        tensors[f"mtp.layers.0.{name.removeprefix(layer)}"] = _random(f"mtp {name}", tensors[name])
    hidden = text["hidden_size"]
    norm = tensors["model.language_model.norm.weight"]
    tensors["mtp.fc.weight"] = _random("mtp.fc", norm.new_empty(hidden, 2 * hidden))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = _random(f"mtp.{name}", norm)


def _qwen35_moe_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """As `_qwen35_hub`, with the experts of a layer in two tensors [E, 2I, H] and [E, H, I]."""
    _fuse_experts(tensors, "mlp.experts.")
    _qwen35_hub(tensors, config)


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


def _qwen3_moe_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5."""
    _old_rope(tensors, config)
    config["num_experts"] = config.pop("num_local_experts")


def _qwen3_next_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """An MTP head like a decoder layer of full attention."""
    _old_rope(tensors, config)
    layer = f"model.layers.{LAYERS - 1}."
    for name in [name for name in tensors if name.startswith(layer)]:
        tensors[f"mtp.layers.0.{name.removeprefix(layer)}"] = _random(f"mtp {name}", tensors[name])
    norm = tensors["model.norm.weight"]
    tensors["mtp.fc.weight"] = _random("mtp.fc", norm.new_empty(HIDDEN, 2 * HIDDEN))
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        tensors[f"mtp.{name}.weight"] = _random(f"mtp.{name}", norm)


def _next_layer(tensors: Tensors, config: dict[str, Any]) -> None:
    """The MTP head of GLM: one decoder layer more, with `eh_proj` and norms."""
    _old_rope(tensors, config)
    config["num_nextn_predict_layers"] = 1
    last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[extra + name.removeprefix(last)] = _random(f"mtp {name}", tensors[name])
    norm, table = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{extra}{name}.weight"] = _random(name, norm)
    tensors[f"{extra}eh_proj.weight"] = _random("eh_proj", norm.new_empty(HIDDEN, 2 * HIDDEN))
    tensors[f"{extra}embed_tokens.weight"] = table.clone()
    tensors[f"{extra}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    _wide_biases(tensors)


def _wide_biases(tensors: Tensors) -> None:
    """The correction of the router's scores in float32."""
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name] = tensors[name].float()


def _deepseek_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """FP8 in blocks of 128 by 128 for the linears of decoder layers.

    Without the MTP head, which mlx-lm knows by the number 61 of its layer alone.
    """
    _old_rope(tensors, config)
    _fp8_blocks(tensors, config, keep=("lm_head", "embed_tokens", "mlp.gate."))
    _wide_biases(tensors)


def _minimax_m2_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """FP8 in blocks of 128 by 128 for the linears of decoder layers."""
    _old_rope(tensors, config)
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


def _gpt_oss_hub(tensors: Tensors, config: dict[str, Any]) -> None:
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


def _nemotron_hub(_: Tensors, config: dict[str, Any]) -> None:
    """The kinds of the layers as one string, and `torch_dtype`."""
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    kinds = config.pop("layers_block_type")
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    config["num_hidden_layers"] = len(kinds)
    config["torch_dtype"] = config.pop("dtype")


def _gemma3_text_hub(_: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = None
    config["sliding_window_pattern"] = len(config.pop("layer_types"))
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")


def _gemma3_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """As `_gemma3_text_hub`, in its section."""
    _gemma3_text_hub(tensors, config["text_config"])
    config["torch_dtype"] = config.pop("dtype")
    _stated_vocabulary(tensors, config)


def _gemma4_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """What differs in layers of full attention, in entries of their own."""
    text = config["text_config"]
    full = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = full["head_dim"]
    text["num_global_key_value_heads"] = full.get("num_key_value_heads")
    _stated_vocabulary(tensors, config)


def _stated_vocabulary(_: Tensors, config: dict[str, Any]) -> None:
    """The size of the vocabulary at the top, where mlx-lm looks: it takes Gemma's for granted."""
    config["vocab_size"] = config["text_config"]["vocab_size"]


def _mistral3_hub(tensors: Tensors, config: dict[str, Any]) -> None:
    """The config as it was before transformers 5."""
    text = config["text_config"]
    text["dtype"] = config["dtype"]
    _old_rope(tensors, text)
    del text["torch_dtype"]
    config["torch_dtype"] = config.pop("dtype")


FAMILIES: dict[str, Family] = {
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {"text_config": _QWEN35, "vision_config": _QWEN_VISION, **_QWEN_TOKENS},
        _qwen35_hub,
    ),
    "qwen3_5_text": Family("qwen3_5_text", "Qwen3_5ForCausalLM", _QWEN35),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {
                **_QWEN35,
                **_EXPERTS,
                "shared_expert_intermediate_size": 128,
            },
            "vision_config": _QWEN_VISION,
            **_QWEN_TOKENS,
        },
        _qwen35_moe_hub,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_TEXT,
            **_EXPERTS,
            **_LINEAR_ATTENTION,
            "shared_expert_intermediate_size": 128,
            "decoder_sparse_step": 1,
            "partial_rotary_factor": 0.25,
        },
        _qwen3_next_hub,
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _TEXT, _old_rope),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
        _qwen3_moe_hub,
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", {**_TEXT, "tie_word_embeddings": True}, _old_rope),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
        _old_rope,
    ),
    "llama": Family("llama", "LlamaForCausalLM", _TEXT, _old_rope),
    "mistral": Family(
        "mistral", "MistralForCausalLM", {**_TEXT, "sliding_window": None}, _old_rope
    ),
    "mistral3": Family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "model_type": "mistral"},
            "vision_config": _PIXTRAL,
            "image_token_index": 4,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        _mistral3_hub,
    ),
    "ministral3": Family("ministral3", "Ministral3ForCausalLM", {**_TEXT, "sliding_window": None}),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        _old_rope,
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_TEXT, "query_pre_attn_scalar": 64, "sliding_window": 64, "tie_word_embeddings": True},
        _old_rope,
    ),
    "gemma3_text": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _gemma3_text_hub),
    "gemma3": Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA3,
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 5,
            "eoi_token_index": 6,
            "image_token_index": 4,
        },
        _gemma3_hub,
    ),
    "gemma4": Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **_GEMMA4,
                "hidden_size_per_layer_input": 64,
                "num_kv_shared_layers": 3,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            },
            "vision_config": None,
            "audio_config": None,
        },
        _gemma4_hub,
    ),
    "gemma4_moe": Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **_GEMMA4,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 384,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
            },
            "vision_config": None,
            "audio_config": None,
        },
        _gemma4_hub,
    ),
    "glm4": Family("glm4", "Glm4ForCausalLM", {**_TEXT, "partial_rotary_factor": 0.5}, _old_rope),
    "glm4_moe": Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **_TEXT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        _next_layer,
    ),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3ForCausalLM", _MLA, _deepseek_hub),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
        _gpt_oss_hub,
    ),
    "nemotron_h": Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            **_TEXT,
            "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 2,
            "ssm_state_size": 32,
            "conv_kernel": 4,
            "mlp_hidden_act": "relu2",
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "moe_shared_expert_intermediate_size": 128,
            "n_group": 1,
            "topk_group": 1,
        },
        _nemotron_hub,
    ),
    "minimax": Family(
        "minimax",
        "MiniMaxForCausalLM",
        {
            **_TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        },
    ),
    "minimax_m2": Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {
            **_TEXT,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "rotary_dim": 32,
            "use_qk_norm": True,
        },
        _minimax_m2_hub,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        {**_TEXT, "original_max_position_embeddings": 512},
        _old_rope,
    ),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _TEXT, _old_rope),
    "olmoe": Family(
        "olmoe",
        "OlmoeForCausalLM",
        {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2},
        _old_rope,
    ),
    "granite": Family("granite", "GraniteForCausalLM", _TEXT, _old_rope),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _TEXT, _old_rope),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", _TEXT, _old_rope),
}


def write_zoo(folder: Path, family: str, layout: Layout = "transformers") -> Path:
    """Write the checkpoint of `family`, a key of FAMILIES, into `folder`, which it makes.

    A family whose published checkpoints are spelled as transformers writes them has one layout.
    """
    return write_family(folder, FAMILIES[family], layout)


def write_family(folder: Path, entry: Family, layout: Layout = "transformers") -> Path:
    """As `write_zoo`, of any family."""
    _save(entry, folder)
    if layout == "hub" and entry.hub is not None:
        _respell(folder, entry.hub)
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    if "vision_config" in entry.config:
        (folder / "preprocessor_config.json").write_text("{}")
    return folder


def _save(entry: Family, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    config = AutoConfig.for_model(entry.model_type, **json.loads(json.dumps(entry.config)))
    config.architectures = [entry.model]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, entry.model)(config)
    state = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if value.is_floating_point():
                value.copy_(_random(name, value, around=value if value.ndim < 2 else None))
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def _random(name: str, like: Any, around: Any = None) -> Any:
    """A tensor like `like`, random by its name; near 1 for norms, or near `around`."""
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(like.shape, generator=generator) * 0.05
    if around is None and like.ndim < 2:
        around = torch.ones(like.shape)
    return (noise if around is None else noise + around.float()).to(like.dtype)


def _respell(folder: Path, hub: Callable[[Tensors, dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hub(tensors, config)
    path.unlink()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
