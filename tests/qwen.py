"""How the demo's family names its tensors."""

from __future__ import annotations

BODY = "model.language_model."
VISION = "model.visual."
EMBEDDING = f"{BODY}embed_tokens.weight"
HEAD = "lm_head.weight"
