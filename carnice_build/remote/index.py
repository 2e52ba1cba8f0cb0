"""All believed batches of a remote as one: what it knows, and where it has a digest's bytes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from carnice_build.remote.batches import Body
from carnice_build.store.digests import digest_texts


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """Bytes of a tensor in an object of a remote; a hint, for they are digested on arrival."""

    name: str
    offset: int
    count: int


def pack_name(pack: str) -> str:
    """The object of a pack."""
    return f"packs/{pack}.safetensors"


def blob_name(digest: str) -> str:
    """The object of a tensor by itself."""
    return f"blobs/{digest[:2]}/{digest}"


class Index:
    """Looked up as a cache's records are; where two batches differ, the first one counts."""

    def __init__(self, bodies: Iterable[Body] = ()) -> None:
        self._outputs: dict[str, list[str]] = {}
        self._sources: dict[str, str] = {}
        self._samples: dict[str, str] = {}
        self._figures: dict[str, list[int | float]] = {}
        self._places: dict[str, RemotePlace] = {}
        for body in reversed(list(bodies)):
            self._add(body)

    def _add(self, body: Body) -> None:
        self._outputs.update(body.actions)
        self._sources.update(body.sources)
        self._samples.update(body.samples)
        self._figures.update(body.figures)
        for digest, count in body.blobs.items():
            self._places[digest] = RemotePlace(blob_name(digest), 0, count)
        for name, pack in body.packs.items():
            offset = pack.header_bytes
            for digest, count, taken in zip(pack.digests, pack.sizes, pack.places, strict=True):
                self._places[digest] = RemotePlace(pack_name(name), offset, count)
                offset += taken

    def supposing(self, sources: Mapping[str, str]) -> Self:
        """The same, if sources of these identities had these contents."""
        other = type(self)()
        other.__dict__ |= self.__dict__
        named = {digest_texts([identity]): digest for identity, digest in sources.items()}
        other._sources = self._sources | named
        return other

    def without(self, digests: Container[str]) -> Self:
        """The same, if the tensors with these digests were nowhere."""
        other = type(self)()
        other.__dict__ |= self.__dict__
        other._places = {name: place for name, place in self._places.items() if name not in digests}
        return other

    def outputs(self, key: str, count: int) -> tuple[str, ...] | None:
        """Digests of the `count` outputs of the action with this key."""
        found = self._outputs.get(key)
        return tuple(found) if found is not None and len(found) == count else None

    def source_digest(self, identity: str) -> str | None:
        """Content digest of the source bytes with this identity."""
        return self._sources.get(digest_texts([identity]))

    def sampled_digest(self, sample: str) -> str | None:
        """Content digest of a tensor that had this sample."""
        return self._samples.get(sample)

    def figure(self, digest: str) -> list[int | float] | None:
        """The numbers in a small tensor."""
        return self._figures.get(digest)

    def place(self, digest: str, count: int) -> RemotePlace | None:
        """Where `count` bytes of this digest are said to be."""
        place = self._places.get(digest)
        return place if place is not None and place.count == count > 0 else None
