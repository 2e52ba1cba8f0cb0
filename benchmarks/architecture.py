"""The Qwen3.5 / 3.6 architecture as the benchmarks need it: a config, and the tensors it implies.

Names and shapes come from transformers' own classes, built on the meta device; nothing here
spells a shape.
Dtypes are not in the classes but in the published files; `make_shapes` says what is known of them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Config = dict[str, Any]
Tensors = dict[str, tuple[str, list[int]]]

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}
ROTARY_SHARE = 0.25
FULL_ATTENTION_INTERVAL = 4


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes that differ between models of this family; the defaults are Qwen3.6-27B's."""

    layers: int = 64
    vocabulary: int = 248320
    hidden: int = 5120
    intermediate: int = 17408
    heads: int = 24
    kv_heads: int = 4
    head_dim: int = 256
    linear_key_heads: int = 16
    linear_value_heads: int = 48
    linear_head_dim: int = 128
    vision_depth: int = 27
    vision_hidden: int = 1152
    vision_intermediate: int = 4304
    vision_heads: int = 16


def model_config(size: Dimensions, *, vision: bool = True, mtp: bool = True) -> Config:
    """The config.json of a checkpoint of this size; without `vision` it has no vision_config."""
    config: Config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "language_model_only": False,
        "model_type": "qwen3_5",
        "text_config": _text_config(size, mtp=mtp),
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "video_token_id": 248057,
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }
    if vision:
        config["vision_config"] = _vision_config(size)

    return dict(sorted(config.items()))


def tensor_table(config: Config, *, float32_state: bool = False) -> Tensors:
    """Name -> (dtype, shape) of every tensor of the checkpoint, in the order of its names.

    With `float32_state`, `A_log` and `linear_attn.norm` are F32, as Qwen3.5 ships them; Qwen3.6
    ships BF16 throughout.
    """
    shapes = _model_shapes(config)
    if "vision_config" not in config:
        shapes = {name: shape for name, shape in shapes.items() if ".visual." not in name}
    if config["text_config"]["mtp_num_hidden_layers"]:
        shapes |= _mtp_shapes(config)

    return {
        name: (_dtype(name, float32_state=float32_state), shape)
        for name, shape in sorted(shapes.items())
    }


def byte_count(tensors: Tensors) -> int:
    """Bytes of the tensors' data."""
    return sum(ITEM_BYTES[dtype] * prod(shape) for dtype, shape in tensors.values())


def _dtype(name: str, *, float32_state: bool) -> str:
    state = name.endswith((".linear_attn.A_log", ".linear_attn.norm.weight"))

    return "F32" if float32_state and state else "BF16"


def _text_config(size: Dimensions, *, mtp: bool) -> Config:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": 248044,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": FULL_ATTENTION_INTERVAL,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "layer_types": [_layer_type(index) for index in range(size.layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": size.linear_head_dim,
        "linear_num_key_heads": size.linear_key_heads,
        "linear_num_value_heads": size.linear_value_heads,
        "linear_value_head_dim": size.linear_head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": int(mtp),
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "output_gate_type": "swish",
        "pad_token_id": None,
        "partial_rotary_factor": ROTARY_SHARE,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": _mrope_section(size.head_dim),
            "partial_rotary_factor": ROTARY_SHARE,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": size.vocabulary,
    }


def _vision_config(size: Dimensions) -> Config:
    return {
        "deepstack_visual_indexes": [],
        "depth": size.vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": size.vision_hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": size.vision_intermediate,
        "model_type": "qwen3_5",
        "num_heads": size.vision_heads,
        "num_position_embeddings": 2304,
        "out_hidden_size": size.hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _layer_type(index: int) -> str:
    full = (index + 1) % FULL_ATTENTION_INTERVAL == 0

    return "full_attention" if full else "linear_attention"


def _mrope_section(head_dim: int) -> list[int]:
    """Time, height and width parts of the rotated half dimensions: 11, 11, 10 at head_dim 256."""
    total = int(head_dim * ROTARY_SHARE) // 2

    return [(total + 2 - part) // 3 for part in range(3)]


def _model_shapes(config: Config) -> dict[str, list[int]]:
    """What transformers' model holds; it never holds the MTP head."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    settings = Qwen3_5Config(**deepcopy(config))  # it edits the dictionaries it is given
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(settings)  # type: ignore[no-untyped-call]

    return _shapes_of(model)


def _mtp_shapes(config: Config) -> dict[str, list[int]]:
    """The MTP head: one full-attention decoder layer, three norms, and `fc` from 2H to H."""
    import torch
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    text = Qwen3_5TextConfig(**{**deepcopy(config["text_config"]), **one_layer})
    with torch.device("meta"):
        layer = Qwen3_5DecoderLayer(text, 0)
        head = torch.nn.ModuleDict(
            {
                "fc": torch.nn.Linear(2 * text.hidden_size, text.hidden_size, bias=False),
                "layers": torch.nn.ModuleList([layer]),
                "norm": Qwen3_5RMSNorm(text.hidden_size),
                "pre_fc_norm_embedding": Qwen3_5RMSNorm(text.hidden_size),
                "pre_fc_norm_hidden": Qwen3_5RMSNorm(text.hidden_size),
            }
        )

    return {f"mtp.{name}": shape for name, shape in _shapes_of(head).items()}


def _shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
