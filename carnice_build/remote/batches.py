"""What a push remembers, as one signed object: `records/<BLAKE3 of its bytes>`.

A batch is zlib over JSON: the format's number, a public key, a signature and the body as text.
The signature is over the layout's version and the body's bytes, so nothing in it can be changed,
and no part of it moved to another key, without the private key.
The same contents signed by the same key are the same bytes under the same name.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from carnice_build.remote.signing import Signer, is_signed
from carnice_build.store.digests import digest_bytes, digest_texts

FORMAT = "carnice-remote 1\n"

MAX_PACKED = 64_000_000
MAX_TEXT = 256_000_000
"""Bytes of a batch as it travels, and unpacked."""

MOST_ENTRIES = 100_000
"""Of each kind in one batch; what is more goes into further batches."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[int | float, Field(allow_inf_nan=False)]


class Unbelieved(Exception):
    """Why a batch counts as absent, as a clause for people."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PackEntry(_Strict):
    """A pack: bytes of the file, digest of its header, digests and bytes of what follows that.

    What follows lies end to end, each filled up to a multiple of `alignment`.
    """

    size: Size
    header: Digest
    digests: list[Digest]
    sizes: list[Size]
    alignment: Annotated[int, Field(ge=1, le=1 << 20)] = 1

    @model_validator(mode="after")
    def _fits(self) -> PackEntry:
        if len(self.sizes) != len(self.digests) or self.header_bytes < 8:
            raise ValueError("sizes do not fit")
        return self

    @property
    def header_bytes(self) -> int:
        """Bytes before the first tensor."""
        return self.size - sum(self.places)

    @property
    def places(self) -> list[int]:
        """Bytes from the beginning of each tensor to that of the next."""
        return [size + -size % self.alignment for size in self.sizes]

    @property
    def identity(self) -> str:
        """The digest that a pack of these contents has."""
        return digest_texts([self.header, *self.digests])


class Body(_Strict):
    """What is known, as in a cache's records.

    `actions` maps action keys to digests of outputs; `sources` the digest of a source tensor's
    identity to that of its content, `samples` that of a sample of it; `blobs` digests to bytes.
    """

    variants: list[Annotated[str, Field(max_length=200)]] = []
    actions: dict[Digest, list[Digest]] = {}
    figures: dict[Digest, list[Number]] = {}
    packs: dict[Digest, PackEntry] = {}
    blobs: dict[Digest, Size] = {}
    sources: dict[Digest, Digest] = {}
    samples: dict[Digest, Digest] = {}

    @model_validator(mode="after")
    def _named_rightly(self) -> Body:
        for name, pack in self.packs.items():
            if pack.identity != name:
                raise ValueError("a pack has another digest")
        return self


class Envelope(_Strict):
    """A body as text, and who signed it."""

    format: Literal[1]
    key: Annotated[str, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
    signature: Annotated[str, Field(max_length=200)]
    body: str


def split(body: Body) -> Iterator[Body]:
    """The body in parts of no more than `MOST_ENTRIES` of each kind."""
    tables: Mapping[str, dict[str, object]] = {
        name: getattr(body, name)
        for name in ("actions", "figures", "packs", "blobs", "sources", "samples")
    }
    longest = max(map(len, tables.values()))
    for start in range(0, max(longest, 1), MOST_ENTRIES):
        parts = {
            name: dict(list(table.items())[start : start + MOST_ENTRIES])
            for name, table in tables.items()
        }
        yield Body.model_construct(variants=body.variants, **parts)  # type: ignore[arg-type]


def encode(body: Body, signer: Signer) -> bytes:
    """The bytes of a batch."""
    text = body.model_dump_json()
    envelope = Envelope(
        format=1, key=signer.public, signature=signer.sign(_signed(text)), body=text
    )
    return zlib.compress(envelope.model_dump_json().encode(), 6)


def name_of(content: bytes) -> str:
    """What a batch of these bytes is called."""
    return digest_bytes(content)


def open_envelope(name: str, content: bytes) -> Envelope:
    """What is in the object of this name; Unbelieved when it is no batch."""
    if digest_bytes(content) != name:
        raise Unbelieved("was altered")
    try:
        return Envelope.model_validate_json(_unpacked(content))
    except (ValidationError, zlib.error, ValueError):
        raise Unbelieved("is no batch of this format") from None


def read_body(envelope: Envelope, trusted: Container[str] | None) -> Body:
    """The body, if a trusted key signed it (None: any key); else Unbelieved.

    Before that is known, nothing looks into it.
    """
    if trusted is not None and envelope.key not in trusted:
        raise Unbelieved(f"is signed by {envelope.key}, which is not trusted")
    if not is_signed(_signed(envelope.body), envelope.key, envelope.signature):
        raise Unbelieved("has a wrong signature")
    try:
        return Body.model_validate_json(envelope.body)
    except ValidationError:
        raise Unbelieved("is not of the form that batches have") from None


def _signed(text: str) -> bytes:
    return FORMAT.encode() + text.encode()


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(content, MAX_TEXT)
    if not unpacker.eof:
        raise ValueError("larger than any batch, or cut short")
    return text
