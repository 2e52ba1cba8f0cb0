"""Small checkpoints of families, made without torch, and what llama.cpp's converter made of them.

`golden/gguf_families.json` has the latter, which this file writes: `python tests/gguf_families.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf_converter import Written, converted, described, from_json, written
from tiny import Tensor, read_safetensors, write_json, write_safetensors

from carnice_build.models import architecture_of
from carnice_build.models.base import TensorFact
from carnice_build.tensors import numbered

FAMILIES = Path(__file__).parent / "golden" / "gguf_families.json"

TOKENS = 100
"""Of a vocabulary with fewer tokens than the embedding has rows."""

_TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
_GEMMA: dict[str, Any] = {
    **{key: value for key, value in _TEXT.items() if key not in ("rope_theta", "rms_norm_eps")},
    "sliding_window": 32,
    "query_pre_attn_scalar": 16,
}
_NEMOTRON: dict[str, Any] = {
    **{key: value for key, value in _TEXT.items() if "rope" not in key and "rms" not in key},
    "layer_norm_epsilon": 1e-5,
    "hybrid_override_pattern": "M*EM",
    "num_hidden_layers": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
_MINISTRAL_ROPE = {
    **_YARN,
    "rope_theta": 1000000.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_PATCHES = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_SOUNDS = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "conv_kernel_size": 5,
    "use_clipped_linears": True,
    "output_proj_dims": 24,
}
_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 32,
    "patch_size": 8,
}


def _without(entries: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in names}


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_TEXT},
    # As Llama 3.2, tied, with scaled rope; of attention with biases.
    "llama scaled": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_TEXT,
        "attention_bias": True,
        "rope_scaling": _LLAMA3,
        "tie_word_embeddings": True,
    },
    # All that a config may leave out.
    "llama bare": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_without(
            _TEXT,
            "head_dim",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        ),
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **_TEXT},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_without(_TEXT, "head_dim"),
        "num_local_experts": 11,
        "num_experts_per_tok": 2,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_TEXT},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_TEXT,
        "rope_scaling": _YARN,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_TEXT,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_GEMMA,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            **_GEMMA,
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA,
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {**_PATCHES, "use_clipped_linears": True},
        "audio_config": _SOUNDS,
    },
    "gemma4 experts": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA,
            "model_type": "gemma4_text",
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**_PATCHES, "standardize": True},
        "audio_config": None,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **_TEXT,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": _YARN,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        **_without(_TEXT, "rope_theta"),
        "rope_parameters": _MINISTRAL_ROPE,
    },
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": _PIXTRAL,
        "spatial_merge_size": 2,
    },
    "mistral3 of ministral": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {
            "model_type": "ministral3",
            **_without(_TEXT, "rope_theta"),
            "rope_parameters": _MINISTRAL_ROPE,
        },
        "vision_config": _PIXTRAL,
        "spatial_merge_size": 2,
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **_TEXT,
        **_GROUPED,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **_without(_TEXT, "head_dim"),
        **_GROUPED,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "kimi_k2": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        **_without(_TEXT, "head_dim"),
        **_GROUPED,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "scoring_func": "sigmoid",
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **_TEXT,
        "num_hidden_layers": 4,
        "partial_rotary_factor": 0.25,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "full_attention_interval": 4,
        "linear_num_value_heads": 8,
        "linear_num_key_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
    },
    "nemotron_h": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **_NEMOTRON,
        "num_nextn_predict_layers": 1,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **_without(_TEXT, "head_dim"),
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
        "pad_token_id": 0,
    },
    "phi3 longrope": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **_without(_TEXT, "head_dim"),
        "original_max_position_embeddings": 1024,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.1, 5.3, 6.7, 8.9],
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        },
        "pad_token_id": 0,
    },
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        **_TEXT,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "rotary_dim": 8,
        "use_qk_norm": True,
        "scoring_func": "sigmoid",
    },
}
"""Configs as published ones are spelled, by the family and what is particular about it."""


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """A checkpoint of a config in `folder`, which it makes; its numbers follow from names."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(
        folder / "tokenizer.json",
        {
            "model": {"vocab": {str(index): index for index in range(TOKENS - 1)}},
            "added_tokens": [{"id": TOKENS - 1, "content": "[IMG_BREAK]"}],
        },
    )
    write_json(folder / "tokenizer_config.json", {})
    write_json(
        folder / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    )
    architecture = architecture_of(config, "config.json")
    tied = (
        architecture.ties
        if "gemma" in str(config["model_type"]) or config.get("tie_word_embeddings")
        else {}
    )
    tensors: dict[str, Tensor] = {}
    for name, fact in architecture.tensors.items():
        if name not in tied:
            dtype = "F32" if architecture.keeps_dtype(name) else "BF16"
            tensors |= _stored(fact, dtype, quantized="quantization_config" in config)
    write_safetensors(folder / "model.safetensors", dict(sorted(tensors.items())))
    return folder


def _stored(fact: TensorFact, dtype: str, *, quantized: bool) -> dict[str, Tensor]:
    """What a published checkpoint has of a fact."""
    fused = fact.fused
    if fused is None:
        names = numbered(fact.name, fact.shape[0]) if fact.stacked else [fact.name]
        shape = fact.shape[1:] if fact.stacked else fact.shape
        return {name: _noise(name, dtype, shape) for name in names}
    experts, rows, *rest = fact.shape
    shape = (experts, fused.of * rows, *rest)
    if not quantized or not rest:
        return {fused.name: _noise(fused.name, dtype, shape)}
    plain, groups = fused.name.removesuffix(".weight"), rest[0] // 32
    return {
        f"{plain}_blocks": _noise(f"{plain}_blocks", "U8", (*shape[:2], groups, 16)),
        f"{plain}_scales": _noise(f"{plain}_scales", "U8", (*shape[:2], groups)),
    }


def _noise(name: str, dtype: str, shape: Sequence[int]) -> Tensor:
    """Numbers between 1/2 and 2, of both signs, or bytes of MXFP4: scales are near 1."""
    size = {"F32": 4, "BF16": 2, "U8": 1}[dtype]
    content = hashlib.shake_256(name.encode()).digest(size * prod(shape))
    if dtype == "U8" and name.endswith("_blocks"):
        return Tensor(dtype, tuple(shape), content)
    words = np.frombuffer(content, f"<u{size}")
    kept, added = {
        "F32": (0x80FFFFFF, 0x3F000000),
        "BF16": (0x80FF, 0x3F00),
        "U8": (0x07, 0x78),
    }[dtype]
    return Tensor(dtype, tuple(shape), (words & kept | added).astype(words.dtype).tobytes())


@dataclass(frozen=True)
class FamilyCase:
    """A file of one of the checkpoints, and what is done with an MTP head."""

    config: str
    mtp: bool = True
    projector: bool = False
    dtype: str = "F16"

    @property
    def name(self) -> str:
        """Its key in the golden file."""
        file = "mmproj" if self.projector else "model" if self.mtp else "plain"
        return f"{self.config}: {file}, {self.dtype}"

    def converted(self, folder: Path) -> Written:
        """By the converter, of the checkpoint in `folder`."""
        options = ["--mmproj"] if self.projector else [] if self.mtp else ["--no-mtp"]
        if self.projector and self.config == "mistral3":
            folder = _respelled(folder)
        return converted(folder, self.dtype, *options, pre="none")

    def described(self, folder: Path) -> Written:
        """By us."""
        made = described(folder, self.dtype, mtp=self.mtp, projector=self.projector)
        return written(made, self.dtype)


def _respelled(folder: Path) -> Path:
    """The checkpoint with names that do not hide the embedding of [IMG_BREAK] from the converter.

    Without that llama.cpp does not load the tower's file.
    """
    other = folder.parent / "respelled" / folder.name
    if not other.is_dir():
        shutil.copytree(folder, other)
        path = other / "model.safetensors"
        tensors = read_safetensors(path)
        plain = {name.replace("language_model.", ""): item for name, item in tensors.items()}
        write_safetensors(path, dict(sorted(plain.items())))
    return other


def family_cases() -> list[FamilyCase]:
    """Those of the golden file."""
    headless = [FamilyCase(name, mtp=False) for name in ("glm4_moe", "nemotron_h", "qwen3_next")]
    towers = [FamilyCase("gemma3", projector=True, dtype=dtype) for dtype in ("F16", "BF16")]
    towers += [FamilyCase("mistral3", projector=True, dtype=dtype) for dtype in ("F16", "F32")]
    towers += [FamilyCase("gemma4", projector=True, dtype=dtype) for dtype in ("F16", "BF16")]
    towers += [FamilyCase("gemma4 experts", projector=True, dtype="F32")]
    wide = [FamilyCase(name, dtype="BF16") for name in ("llama scaled", "nemotron_h")]
    return [*map(FamilyCase, CONFIGS), *headless, *towers, *wide]


@cache
def known_families() -> Mapping[str, Written]:
    """What the converter wrote, by the names of the cases."""
    return {name: from_json(tree) for name, tree in json.loads(FAMILIES.read_text()).items()}


def folder_of(case: FamilyCase, scratch: Path) -> Path:
    """The checkpoint of a case, made below `scratch`."""
    folder = scratch / case.config.replace(" ", "-")
    return folder if folder.is_dir() else write_checkpoint(folder, CONFIGS[case.config])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            case.name: case.converted(folder_of(case, Path(scratch))).as_json()
            for case in family_cases()
        }
    FAMILIES.write_text(json.dumps(found) + "\n")
