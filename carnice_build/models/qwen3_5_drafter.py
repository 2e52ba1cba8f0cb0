"""The MTP head of Qwen3.5 and Qwen3.6, which transformers leaves out, as a torch module.

The order of computation is that of vLLM's `qwen3_5_mtp`.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
)


class Drafter(nn.Module):
    """A full-attention layer on what a token and the state before it are mixed to.

    Weights are [out, in], norms have a gain of 1 + w.
    """

    def __init__(
        self, text_config: Mapping[str, Any], attention: str, tensors: Mapping[str, Tensor]
    ) -> None:
        """`tensors` are the head's, by their canonical names, of the type to compute in."""
        super().__init__()
        one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        config = Qwen3_5TextConfig(**{**text_config, **one_layer})
        config._attn_implementation = attention
        size = config.hidden_size
        with torch.device("meta"):
            self.fc = nn.Linear(2 * size, size, bias=False)
            self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, 0)])
            self.norm, self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = (
                Qwen3_5RMSNorm(size, eps=config.rms_norm_eps) for _ in range(3)
            )
        named = {name.removeprefix("mtp."): tensor for name, tensor in tensors.items()}
        self.load_state_dict(named, strict=True, assign=True)
        # Its frequencies are in no checkpoint, so it cannot be made on meta.
        self._rotary = Qwen3_5TextRotaryEmbedding(config)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor, visible: Tensor
    ) -> Tensor:
        """See `verification.drafting.DraftHead`."""
        normed = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        mixed = self.fc(torch.cat(normed, dim=-1))
        # Added to the attention's scores, which sdpa and eager understand alike.
        mask = torch.zeros(visible.shape, dtype=mixed.dtype, device=mixed.device)
        mask.masked_fill_(~visible.to(mixed.device), torch.finfo(mixed.dtype).min)
        # Time, height and width are one and the same for text.
        rotary = self._rotary(mixed, positions.to(mixed.device).expand(3, 1, -1))
        result: Tensor = self.norm(
            self.layers[0](mixed, position_embeddings=rotary, attention_mask=mask[None, None])
        )
        return result
