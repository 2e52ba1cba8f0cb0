"""The demo architecture: Qwen3.5's own modules in small, with the multi-token-prediction head."""

from __future__ import annotations

from typing import Any

import torch
from bpe import VOCABULARY
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

LAYERS = 8


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` of the base model: the real one's keys with small numbers."""
    token = tokenizer.get_vocab().__getitem__
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": token("<|image_pad|>"),
        "model_type": "qwen3_5",
        "text_config": _text_config(token("<|endoftext|>")),
        "tie_word_embeddings": False,
        "transformers_version": "5.17.0",
        "video_token_id": token("<|video_pad|>"),
        "vision_config": _vision_config(),
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
    }


def _text_config(end_of_text: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": end_of_text,
        "dtype": "bfloat16",
        "eos_token_id": end_of_text,
        "full_attention_interval": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (LAYERS // 4),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "output_gate_type": "swish",
        "pad_token_id": None,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _vision_config() -> dict[str, Any]:
    return {
        "deepstack_visual_indexes": [],
        "depth": 3,
        "dtype": "bfloat16",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "model_type": "qwen3_5",
        "num_heads": 2,
        "num_position_embeddings": 256,
        "out_hidden_size": 128,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


class DraftHead(nn.Module):
    """The MTP head: from h_t and the token after it to a hidden state for the token after that."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        full_attention = config.layer_types.index("full_attention")
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, full_attention)])
        self.norm = Qwen3_5RMSNorm(size, eps=eps)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(size, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size, eps=eps)

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states after `norm`; all inputs are aligned at the position of `hidden`."""
        both = torch.cat(
            [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1
        )
        mixed = self.layers[0](self.fc(both), position_embeddings=rotary, attention_mask=None)
        normed: Tensor = self.norm(mixed)
        return normed


class DraftingModel(nn.Module):
    """The real model class beside its MTP head, which transformers leaves out."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        settings = Qwen3_5Config(**config)
        settings._attn_implementation = "sdpa"
        self.main = Qwen3_5ForConditionalGeneration(settings).float()
        self.mtp = DraftHead(settings.text_config)
        std = config["text_config"]["initializer_range"]
        for module in self.mtp.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, Qwen3_5RMSNorm):
                nn.init.zeros_(module.weight)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """The text model's states after its final norm."""
        states: Tensor = self.main.model.language_model(
            input_ids=tokens, use_cache=False
        ).last_hidden_state
        return states

    def draft_states(self, tokens: Tensor, hidden: Tensor, start: int = 0) -> Tensor:
        """The head's states at positions `start`...; `tokens` are those that follow each state."""
        text = self.main.model.language_model
        steps = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        rotary = text.rotary_emb(hidden, steps.expand(3, tokens.shape[0], -1))
        states: Tensor = self.mtp(text.embed_tokens(tokens), hidden, rotary)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Vocabulary scores of hidden states, the model's own or the head's."""
        scores: Tensor = self.main.lm_head(states)
        return scores


def next_token_loss(
    model: DraftingModel, tokens: Tensor, weights: Tensor, states: Tensor
) -> Tensor:
    """Cross entropy of `tokens[:, 1:]` given `states`; `weights` says which tokens count."""
    return _weighted_loss(model.logits(states[:, :-1]), tokens[:, 1:], weights[:, 1:])


def draft_loss(model: DraftingModel, tokens: Tensor, states: Tensor) -> Tensor:
    """Cross entropy of the token after the next, predicted by the MTP head."""
    drafted = model.draft_states(tokens[:, 1:-1], states[:, :-2])
    return functional.cross_entropy(model.logits(drafted).flatten(0, 1), tokens[:, 2:].flatten())


def _weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    flat = weights.flatten().to(losses.dtype)
    return (losses * flat).sum() / flat.sum().clamp(min=1)
