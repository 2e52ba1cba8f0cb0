"""What each variant's actions were when it was last built, for `explain` alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from carnice_build.store.files import write_atomically

Facts = dict[str, str]
"""The fields of an action's key, by name, as `keys.write_key` walks them."""

MAX_BYTES = 200_000_000


def write_history(root: Path, variant: str, actions: Mapping[str, Facts]) -> None:
    """Remember `actions`, by what they make, as the last build of `variant` in the cache `root`."""
    folder = root / "history"
    folder.mkdir(exist_ok=True)
    content = json.dumps(actions, separators=(",", ":")).encode()
    write_atomically(folder / variant, zlib.compress(content, 1))


def read_history(root: Path, variant: str) -> dict[str, Facts] | None:
    """The actions of the variant's last build; None when there was none or it is unreadable."""
    try:
        packed = (root / "history" / variant).read_bytes()
        value = json.loads(zlib.decompressobj().decompress(packed, MAX_BYTES))
    except (OSError, ValueError, zlib.error, RecursionError):
        return None
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        return None
    return value
