"""The code that family tables name, for what no table can say.

A table is data: it names code of this package, and no other.
Each is known by a word, and by its module and class, which is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

READERS: Mapping[str, str] = {
    "gemma4": "gemma4_config:Gemma4Config",
    "qwen3_5": "qwen3_5_config:Qwen35Config",
}
"""How a config.json with several spellings is read; see `readers.Reader`."""

DRAFTERS: Mapping[str, str] = {"qwen3_5": "qwen3_5_drafter:Drafter"}
"""What MTP heads compute; each brings torch, so that it is imported in workers alone.

See `Architecture.draft_head`.
"""


def loaded(place: str) -> Any:
    """The class at `place`, an entry of one of these."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"carnice_build.models.{module}"), name)
