"""Digests of bytes: BLAKE3, in hexadecimal."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def digest_bytes(content: bytes | bytearray | memoryview) -> str:
    """Digest of a piece of memory."""
    return blake3(content).hexdigest()


def digest_texts(texts: Iterable[str]) -> str:
    """Digest of a list of texts; framed by length, so that no two lists look the same."""
    hasher = blake3()
    for text in texts:
        raw = text.encode()
        hasher.update(b"%d:%s;" % (len(raw), raw))
    return hasher.hexdigest()


def is_digest(value: object) -> bool:
    """True for a text that `digest_bytes` could have returned; checked before it names a path."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
