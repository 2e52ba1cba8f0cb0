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

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zoo_hub import (
    Tensors,
    deepseek_hub,
    gemma3_hub,
    gemma3_text_hub,
    gemma4_hub,
    gpt_oss_hub,
    minimax_m2_hub,
    mistral3_hub,
    nemotron_hub,
    next_layer,
    noise_like,
    old_rope,
    qwen3_moe_fp8,
    qwen3_moe_hub,
    qwen3_next_hub,
    qwen35_hub,
    qwen35_moe_hub,
)

Layout = Literal["transformers", "hub"]

VOCABULARY = 2048
HIDDEN = 256
LAYERS = 4
TOKENIZER = Path(__file__).parent.parent / "demo" / "qwen3.6-27b"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


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


FAMILIES: dict[str, Family] = {
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {"text_config": _QWEN35, "vision_config": _QWEN_VISION, **_QWEN_TOKENS},
        qwen35_hub,
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
        qwen35_moe_hub,
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
        qwen3_next_hub,
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _TEXT, old_rope),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
        qwen3_moe_hub,
    ),
    "qwen3_moe_fp8": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
        qwen3_moe_fp8,
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", {**_TEXT, "tie_word_embeddings": True}, old_rope),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
        old_rope,
    ),
    "llama": Family("llama", "LlamaForCausalLM", _TEXT, old_rope),
    "mistral": Family("mistral", "MistralForCausalLM", {**_TEXT, "sliding_window": None}, old_rope),
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
        mistral3_hub,
    ),
    "ministral3": Family("ministral3", "Ministral3ForCausalLM", {**_TEXT, "sliding_window": None}),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        old_rope,
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_TEXT, "query_pre_attn_scalar": 64, "sliding_window": 64, "tie_word_embeddings": True},
        old_rope,
    ),
    "gemma3_text": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, gemma3_text_hub),
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
        gemma3_hub,
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
        gemma4_hub,
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
        gemma4_hub,
    ),
    "glm4": Family("glm4", "Glm4ForCausalLM", {**_TEXT, "partial_rotary_factor": 0.5}, old_rope),
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
        next_layer,
    ),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3ForCausalLM", _MLA, deepseek_hub),
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
        gpt_oss_hub,
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
        nemotron_hub,
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
            # Without it transformers 5.17 turns whole heads, and libraries with it.
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
        },
        minimax_m2_hub,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        {**_TEXT, "original_max_position_embeddings": 512},
        old_rope,
    ),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _TEXT, old_rope),
    "olmoe": Family(
        "olmoe",
        "OlmoeForCausalLM",
        {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2},
        old_rope,
    ),
    "granite": Family("granite", "GraniteForCausalLM", _TEXT, old_rope),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _TEXT, old_rope),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", _TEXT, old_rope),
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
                value.copy_(noise_like(name, value, around=value if value.ndim < 2 else None))
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)


def _respell(folder: Path, hub: Callable[[Tensors, dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hub(tensors, config)
    path.unlink()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
