"""Large models at full size: what their published checkpoints hold, by ranges of numbers in names.

`make_shapes` writes these down as shape files, and says where the facts come from.
A row is a name, in which `[0-2,5]` stands for the numbers 0, 1, 2 and 5, with a type and a shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Config = dict[str, Any]
Rows = dict[str, tuple[str, list[int]]]

FP8_BLOCK = 128
MXFP4_BLOCK = 32


def numbers(found: Iterable[int]) -> str:
    """The range that stands for these numbers, in rising order, in a name."""
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return f"[{','.join('-'.join(map(str, run)) for run in runs)}]"


def bf16(prefix: str, shapes: Mapping[str, list[int]]) -> Rows:
    """Rows of BF16 tensors, names behind a prefix."""
    return {prefix + name: ("BF16", shape) for name, shape in shapes.items()}


def fp8(prefix: str, shapes: Mapping[str, list[int]]) -> Rows:
    """Weights of linears in FP8, with a scale for each block of 128 by 128 weights."""
    rows: Rows = {}
    for name, (height, width) in shapes.items():
        grid = [-(-height // FP8_BLOCK), -(-width // FP8_BLOCK)]
        rows[f"{prefix}{name}.weight"] = ("F8_E4M3", [height, width])
        rows[f"{prefix}{name}.weight_scale_inv"] = ("F32", grid)
    return rows


def gated(name: str, inner: int, hidden: int) -> dict[str, list[int]]:
    """The three linears of a gated MLP, names without `.weight`."""
    return {
        f"{name}.gate_proj": [inner, hidden],
        f"{name}.up_proj": [inner, hidden],
        f"{name}.down_proj": [hidden, inner],
    }


def weights(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The same linears, their weights named."""
    return {f"{name}.weight": shape for name, shape in shapes.items()}


# --- Qwen3.6-35B-A3B ------------------------------------------------------------------------------


def qwen35_moe() -> tuple[Config, Rows]:
    """Qwen3.6-35B-A3B: linear and full attention, fused experts, vision tower, MTP head."""
    layers, hidden, experts, inner, vocabulary = 40, 2048, 256, 512, 248320
    kinds = ["full" if index % 4 == 3 else "linear" for index in range(layers)]
    text: Config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": 248044,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": inner,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 16,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    vision: Config = {
        "deepstack_visual_indexes": [],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4304,
        "model_type": "qwen3_5_moe",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config: Config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "video_token_id": 248057,
        "vision_config": vision,
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }
    full = {
        "self_attn.q_proj.weight": [2 * 4096, hidden],
        "self_attn.k_proj.weight": [512, hidden],
        "self_attn.v_proj.weight": [512, hidden],
        "self_attn.o_proj.weight": [hidden, 4096],
        "self_attn.q_norm.weight": [256],
        "self_attn.k_norm.weight": [256],
    }
    linear = {
        "linear_attn.in_proj_qkv.weight": [8192, hidden],
        "linear_attn.in_proj_z.weight": [4096, hidden],
        "linear_attn.in_proj_b.weight": [32, hidden],
        "linear_attn.in_proj_a.weight": [32, hidden],
        "linear_attn.out_proj.weight": [hidden, 4096],
        "linear_attn.conv1d.weight": [8192, 1, 4],
        "linear_attn.A_log": [32],
        "linear_attn.dt_bias": [32],
        "linear_attn.norm.weight": [128],
    }
    every = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "mlp.gate.weight": [experts, hidden],
        "mlp.experts.gate_up_proj": [experts, 2 * inner, hidden],
        "mlp.experts.down_proj": [experts, hidden, inner],
        "mlp.shared_expert_gate.weight": [1, hidden],
        **weights(gated("mlp.shared_expert", 512, hidden)),
    }
    by_kind = {
        kind: numbers(index for index, found in enumerate(kinds) if found == kind)
        for kind in ("full", "linear")
    }
    prefix = "model.language_model.layers."
    rows = {
        **bf16("model.language_model.", {"embed_tokens.weight": [vocabulary, hidden]}),
        **bf16(f"{prefix}{numbers(range(layers))}.", every),
        **bf16(f"{prefix}{by_kind['full']}.", full),
        **bf16(f"{prefix}{by_kind['linear']}.", linear),
        **bf16("model.language_model.", {"norm.weight": [hidden]}),
        **bf16("", {"lm_head.weight": [vocabulary, hidden]}),
        **bf16(
            "mtp.",
            {
                "fc.weight": [hidden, 2 * hidden],
                "norm.weight": [hidden],
                "pre_fc_norm_embedding.weight": [hidden],
                "pre_fc_norm_hidden.weight": [hidden],
            },
        ),
        **bf16("mtp.layers.0.", {**every, **full}),
        **_qwen_vision(hidden),
    }
    return config, rows


def _qwen_vision(out: int, depth: int = 27, hidden: int = 1152, inner: int = 4304) -> Rows:
    merged = 4 * hidden
    block = {
        "attn.qkv.weight": [3 * hidden, hidden],
        "attn.qkv.bias": [3 * hidden],
        "attn.proj.weight": [hidden, hidden],
        "attn.proj.bias": [hidden],
        "mlp.linear_fc1.weight": [inner, hidden],
        "mlp.linear_fc1.bias": [inner],
        "mlp.linear_fc2.weight": [hidden, inner],
        "mlp.linear_fc2.bias": [hidden],
        **{f"norm{n}.{part}": [hidden] for n in (1, 2) for part in ("weight", "bias")},
    }
    return {
        **bf16(
            "model.visual.",
            {
                "patch_embed.proj.weight": [hidden, 3, 2, 16, 16],
                "patch_embed.proj.bias": [hidden],
                "pos_embed.weight": [2304, hidden],
            },
        ),
        **bf16(f"model.visual.blocks.{numbers(range(depth))}.", block),
        **bf16(
            "model.visual.merger.",
            {
                "norm.weight": [hidden],
                "norm.bias": [hidden],
                "linear_fc1.weight": [merged, merged],
                "linear_fc1.bias": [merged],
                "linear_fc2.weight": [out, merged],
                "linear_fc2.bias": [out],
            },
        ),
    }


# --- Qwen3-235B-A22B ------------------------------------------------------------------------------


def qwen3_moe() -> tuple[Config, Rows]:
    """Qwen3-235B-A22B: one tensor an expert."""
    layers, hidden, experts, inner, vocabulary = 94, 4096, 128, 1536, 151936
    config: Config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 94,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }
    prefix = f"model.layers.{numbers(range(layers))}."
    layer = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.q_proj.weight": [8192, hidden],
        "self_attn.k_proj.weight": [512, hidden],
        "self_attn.v_proj.weight": [512, hidden],
        "self_attn.o_proj.weight": [hidden, 8192],
        "self_attn.q_norm.weight": [128],
        "self_attn.k_norm.weight": [128],
        "mlp.gate.weight": [experts, hidden],
        **weights(gated(f"mlp.experts.{numbers(range(experts))}", inner, hidden)),
    }
    rows = {
        **bf16("model.", {"embed_tokens.weight": [vocabulary, hidden]}),
        **bf16(prefix, layer),
        **bf16("model.", {"norm.weight": [hidden]}),
        **bf16("", {"lm_head.weight": [vocabulary, hidden]}),
    }
    return config, rows


# --- gpt-oss-120b ---------------------------------------------------------------------------------


def gpt_oss() -> tuple[Config, Rows]:
    """gpt-oss-120b: experts in MXFP4, 32 weights to a block of 16 bytes and a scale."""
    layers, hidden, experts, inner, vocabulary = 36, 2880, 128, 2880, 201088
    config: Config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    linears = {"q": [4096, hidden], "k": [512, hidden], "v": [512, hidden], "o": [hidden, 4096]}
    layer = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.sinks": [64],
        "mlp.router.weight": [experts, hidden],
        "mlp.router.bias": [experts],
        "mlp.experts.gate_up_proj_bias": [experts, 2 * inner],
        "mlp.experts.down_proj_bias": [experts, hidden],
    }
    for name, shape in linears.items():
        layer |= {
            f"self_attn.{name}_proj.weight": shape,
            f"self_attn.{name}_proj.bias": shape[:1],
        }
    prefix = f"model.layers.{numbers(range(layers))}."
    rows = {
        **bf16("model.", {"embed_tokens.weight": [vocabulary, hidden]}),
        **bf16(prefix, layer),
        **bf16("model.", {"norm.weight": [hidden]}),
        **bf16("", {"lm_head.weight": [vocabulary, hidden]}),
    }
    for name, height, width in (
        ("gate_up_proj", 2 * inner, hidden),
        ("down_proj", hidden, inner),
    ):
        blocks = [experts, height, width // MXFP4_BLOCK]
        rows[f"{prefix}mlp.experts.{name}_blocks"] = ("U8", [*blocks, MXFP4_BLOCK // 2])
        rows[f"{prefix}mlp.experts.{name}_scales"] = ("U8", blocks)
    return config, rows


# --- DeepSeek-V3 and Kimi-K2 ----------------------------------------------------------------------

FP8: Config = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}


def _latent_config(**own: Any) -> Config:
    """What the configs of DeepSeek-V3 and Kimi-K2 have in common, and what `own` has besides."""
    config: Config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": FP8,
        "rms_norm_eps": 1e-06,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
    }
    return dict(sorted({**config, **own}.items()))


def _latent_rows(config: Config, prefix: str, moe: str) -> Rows:
    """The decoder layers named by `prefix`; of them, those by `moe` have experts."""
    hidden, heads, experts = (
        config[name] for name in ("hidden_size", "num_attention_heads", "n_routed_experts")
    )
    inner = config["moe_intermediate_size"]
    attention = {
        "q_a_proj": [1536, hidden],
        "q_b_proj": [heads * 192, 1536],
        "kv_a_proj_with_mqa": [512 + 64, hidden],
        "kv_b_proj": [heads * 256, 512],
        "o_proj": [hidden, heads * 128],
    }
    mlps = {
        **gated(f"mlp.experts.{numbers(range(experts))}", inner, hidden),
        **gated("mlp.shared_experts", inner, hidden),
    }
    norms = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.q_a_layernorm.weight": [1536],
        "self_attn.kv_a_layernorm.weight": [512],
    }
    return {
        **bf16(prefix, norms),
        **fp8(f"{prefix}self_attn.", attention),
        **bf16(moe, {"mlp.gate.weight": [experts, hidden]}),
        f"{moe}mlp.gate.e_score_correction_bias": ("F32", [experts]),
        **fp8(moe, mlps),
    }


def _latent_model(config: Config, extra: int = 0) -> Rows:
    """The whole model; `extra` decoder layers with experts stand behind the last."""
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    every = f"model.layers.{numbers(range(layers + extra))}."
    moe = f"model.layers.{numbers(range(dense, layers + extra))}."
    first = f"model.layers.{numbers(range(dense))}."
    return {
        **bf16("model.", {"embed_tokens.weight": [vocabulary, hidden]}),
        **_latent_rows(config, every, moe),
        **fp8(first, gated("mlp", config["intermediate_size"], hidden)),
        **bf16("model.", {"norm.weight": [hidden]}),
        **bf16("", {"lm_head.weight": [vocabulary, hidden]}),
    }


def _next_token(prefix: str, hidden: int) -> Rows:
    """What a layer that predicts the token after the next has besides a decoder layer."""
    return bf16(
        prefix,
        {
            "enorm.weight": [hidden],
            "hnorm.weight": [hidden],
            "eh_proj.weight": [hidden, 2 * hidden],
            "shared_head.norm.weight": [hidden],
        },
    )


def deepseek_v3() -> tuple[Config, Rows]:
    """DeepSeek-V3: FP8 in blocks, latent attention, an MTP layer with its own copy of both ends."""
    config = _latent_config(
        bos_token_id=0,
        eos_token_id=1,
        first_k_dense_replace=3,
        max_position_embeddings=163840,
        model_type="deepseek_v3",
        n_group=8,
        n_routed_experts=256,
        num_attention_heads=128,
        num_key_value_heads=128,
        num_nextn_predict_layers=1,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        rope_theta=10000,
        routed_scaling_factor=2.5,
        topk_group=4,
        transformers_version="4.33.1",
        vocab_size=129280,
    )
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    ends = {
        "embed_tokens.weight": [vocabulary, hidden],
        "shared_head.head.weight": [vocabulary, hidden],
    }
    last = "model.layers.61."
    return config, {
        **_latent_model(config, extra=1),
        **_next_token(last, hidden),
        **bf16(last, ends),
    }


def kimi_k2() -> tuple[Config, Rows]:
    """Kimi-K2-Instruct: DeepSeek's architecture with 384 experts and no MTP layer."""
    config = _latent_config(
        bos_token_id=163584,
        eos_token_id=163585,
        first_k_dense_replace=1,
        max_position_embeddings=131072,
        model_type="kimi_k2",
        n_group=1,
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        num_nextn_predict_layers=0,
        rope_scaling={
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        rope_theta=50000.0,
        routed_scaling_factor=2.827,
        topk_group=1,
        transformers_version="4.48.3",
        vocab_size=163840,
    )
    # A buffer, which a training library left; half of hidden_size / num_attention_heads.
    buffer = {"inv_freq": [56]}
    layers = numbers(range(config["num_hidden_layers"]))
    return config, {
        **_latent_model(config),
        **bf16(f"model.layers.{layers}.self_attn.rotary_emb.", buffer),
    }


# --- GLM-4.6 --------------------------------------------------------------------------------------


def glm4_moe() -> tuple[Config, Rows]:
    """GLM-4.6: BF16, one tensor an expert, an MTP layer that shares both ends with the model."""
    layers, dense, hidden, experts, inner = 92, 3, 5120, 160, 1536
    vocabulary = 151552
    config: Config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": dense,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 202752,
        "model_type": "glm4_moe",
        "moe_intermediate_size": inner,
        "n_group": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.54.0",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": vocabulary,
    }
    every = f"model.layers.{numbers(range(layers + 1))}."
    moe = f"model.layers.{numbers(range(dense, layers + 1))}."
    layer = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.q_proj.weight": [12288, hidden],
        "self_attn.q_proj.bias": [12288],
        "self_attn.k_proj.weight": [1024, hidden],
        "self_attn.k_proj.bias": [1024],
        "self_attn.v_proj.weight": [1024, hidden],
        "self_attn.v_proj.bias": [1024],
        "self_attn.o_proj.weight": [hidden, 12288],
        "self_attn.q_norm.weight": [128],
        "self_attn.k_norm.weight": [128],
    }
    mlps = {
        **gated(f"mlp.experts.{numbers(range(experts))}", inner, hidden),
        **gated("mlp.shared_experts", inner, hidden),
    }
    first = gated("mlp", 12288, hidden)
    rows = {
        **bf16("model.", {"embed_tokens.weight": [vocabulary, hidden]}),
        **bf16(every, layer),
        **bf16(f"model.layers.{numbers(range(dense))}.", weights(first)),
        **bf16(moe, {"mlp.gate.weight": [experts, hidden], **weights(mlps)}),
        f"{moe}mlp.gate.e_score_correction_bias": ("F32", [experts]),
        **bf16("model.", {"norm.weight": [hidden]}),
        **bf16("", {"lm_head.weight": [vocabulary, hidden]}),
        **_next_token(f"model.layers.{layers}.", hidden),
    }
    return config, rows


# --- Gemma 4 31B ----------------------------------------------------------------------------------


def gemma4() -> tuple[Config, Rows]:
    """Gemma 4 31B: sliding and full attention, whose keys are its values; a vision tower."""
    layers, hidden, inner, vocabulary = 60, 5376, 21504, 262144
    kinds = ["full" if index % 6 == 5 else "sliding" for index in range(layers)]
    text: Config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "max_position_embeddings": 262144,
        "model_type": "gemma4_text",
        "num_attention_heads": 32,
        "num_global_key_value_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 16,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": vocabulary,
        "vocab_size_per_layer_input": vocabulary,
    }
    vision: Config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 72,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 4304,
        "max_position_embeddings": 131072,
        "model_type": "gemma4_vision",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10240,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "standardize": True,
        "use_clipped_linears": False,
    }
    config: Config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "boi_token_id": 255999,
        "dtype": "bfloat16",
        "eoi_token_id": 258882,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.5.0.dev0",
        "vision_config": vision,
        "vision_soft_tokens_per_image": 280,
    }
    every = {
        "layer_scalar": [1],
        **{
            f"{name}_layernorm.weight": [hidden]
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        },
        **weights(gated("mlp", inner, hidden)),
    }
    prefix = "model.language_model.layers."
    rows = {
        **bf16("model.language_model.", {"embed_tokens.weight": [vocabulary, hidden]}),
        **bf16(f"{prefix}{numbers(range(layers))}.", every),
    }
    for kind, head, kv_heads in (("sliding", 256, 16), ("full", 512, 4)):
        linears = {
            "q_proj": [32 * head, hidden],
            "k_proj": [kv_heads * head, hidden],
            "o_proj": [hidden, 32 * head],
        }
        if kind == "sliding":
            linears["v_proj"] = linears["k_proj"]
        attention = {**weights(linears), "q_norm.weight": [head], "k_norm.weight": [head]}
        where = numbers(index for index, found in enumerate(kinds) if found == kind)
        rows |= bf16(f"{prefix}{where}.self_attn.", attention)
    return config, {
        **rows,
        **bf16("model.language_model.", {"norm.weight": [hidden]}),
        **_gemma_vision(hidden),
    }


def _gemma_vision(out: int, depth: int = 27, hidden: int = 1152, inner: int = 4304) -> Rows:
    linears = {
        **{f"self_attn.{name}_proj": [hidden, hidden] for name in "qkvo"},
        **gated("mlp", inner, hidden),
    }
    block = {
        **{f"{name}.linear.weight": shape for name, shape in linears.items()},
        "self_attn.q_norm.weight": [72],
        "self_attn.k_norm.weight": [72],
        **{
            f"{name}_layernorm.weight": [hidden]
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        },
    }
    return {
        **bf16(
            "model.vision_tower.",
            {
                "std_bias": [hidden],
                "std_scale": [hidden],
                "patch_embedder.position_embedding_table": [2, 10240, hidden],
                "patch_embedder.input_proj.weight": [hidden, 768],
            },
        ),
        **bf16(f"model.vision_tower.encoder.layers.{numbers(range(depth))}.", block),
        **bf16("model.embed_vision.embedding_projection.", {"weight": [out, hidden]}),
    }
