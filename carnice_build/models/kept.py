"""Which modules a library leaves alone, by patterns that speak of many families at once."""

from __future__ import annotations

from collections.abc import Mapping

MTP_HEADS = "mtp.*"
"""In a list: that MTP heads stay as they are, whatever the family calls their tensors."""

KEEP_LISTS: Mapping[str, tuple[str, ...]] = {
    "modelopt-0.47": (
        "*block_sparse_moe.gate*",
        "*linear_attn.conv1d*",
        "*self_attention.conv1d*",
        "*linear_attn.in_proj_a*",
        "*linear_attn.in_proj_b*",
        "*lm_head*",
        "*mixer.conv1d*",
        "*mlp.gate.*",
        "*mlp.shared_expert_gate.*",
        "*output_layer*",
        "*proj_out.*",
        "*router*",
        MTP_HEADS,
        "output.*",
        "*embed_vision*",
        "*vision_tower*",
        "*visual*",
        "*vision_model*",
        "*multi_modal_projector*",
    ),
    "modelopt-0.43": (
        "*block_sparse_moe.gate*",
        "*linear_attn.conv1d*",
        "*lm_head*",
        "*mixer.conv1d*",
        "*mlp.gate.*",
        "*mlp.shared_expert_gate.*",
        "*output_layer*",
        "*proj_out.*",
        "*router*",
        "output.*",
    ),
}
"""What `NVFP4_DEFAULT_CFG` leaves alone, by the version of modelopt that says so.

0.47: the patterns of its `default_disabled_quantizers`, which a test compares with the installed
library.  0.43: those that the model cards made with it name; `mtp.*` and the vision tower are
not among them, because transformers had left out the one and the recipes excluded the other.
"""
