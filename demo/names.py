"""Random identifiers that no text contains, those of the package and one more kind."""

from __future__ import annotations

import random

from carnice_build.verification.names import camel, code, hex_id, identifier, nonsense, snake, words

__all__ = ["camel", "code", "hex_id", "identifier", "nonsense", "python_name", "snake", "words"]


def python_name(rng: random.Random) -> str:
    """A name that can stand in Python source."""
    return rng.choice((snake, camel, nonsense))(rng)
