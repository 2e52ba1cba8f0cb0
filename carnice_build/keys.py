"""What identifies an action: one function says it, a sink digests it or shows it.

Because the key and any explanation of it come from the same walk, they cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from blake3 import blake3

from carnice_build.dtypes import TensorSpec


class KeySink(Protocol):
    """Receives, in a fixed order, every fact that can change an action's bytes."""

    def field(self, name: str, value: str) -> None:
        """Take the fact `name`."""


class DigestSink:
    """Digests the facts; framed by length, so that no two lists of facts look the same."""

    def __init__(self) -> None:
        self._facts: list[str] = []

    def field(self, name: str, value: str) -> None:
        """Take one fact."""
        self._facts.append(f"{len(name)}:{name}={len(value)}:{value};")

    def digest(self) -> str:
        """The digest of all facts so far, in hexadecimal."""
        return blake3("".join(self._facts).encode()).hexdigest()


def write_key(
    sink: KeySink,
    *,
    op: str,
    op_version: int,
    libraries: Iterable[str],
    params: Mapping[str, Any],
    inputs: Iterable[tuple[TensorSpec, str]],
) -> None:
    """Walk everything that can change the bytes of an action's outputs.

    `inputs` pairs each input's type and shape with what identifies its bytes: a content digest
    for the action key, a file identity for the identity of an action whose inputs are unread.
    """
    sink.field("op", op)
    sink.field("op version", str(op_version))
    for library in libraries:
        sink.field(f"library {library}", library_version(library))
    for name in sorted(params):
        sink.field(f"parameter {name}", canonical_json(params[name]))
    for index, (spec, content) in enumerate(inputs):
        sink.field(f"input {index}", f"{spec.dtype} {list(spec.shape)} {content}")


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces."""
    return _CANONICAL.encode(value)


@cache
def library_version(name: str) -> str:
    """Version of the installed distribution `name`; `absent` when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
