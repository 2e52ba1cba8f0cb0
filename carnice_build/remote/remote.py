"""A remote, opened: its version checked, its batches read, and of these the believed ones indexed.

A plan costs the FORMAT, one listing of `records/`, and each batch that was not read before: those
that were are in `cache/remotes/<digest of the URL>/`, named by their digests as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from carnice_build.errors import StoreError
from carnice_build.remote.batches import (
    FORMAT,
    MAX_PACKED,
    Body,
    Unbelieved,
    name_of,
    open_envelope,
    read_body,
)
from carnice_build.remote.calls import Missing, RemoteFailure
from carnice_build.remote.index import Index
from carnice_build.remote.objects import Listed, Objects, Range
from carnice_build.store.digests import digest_texts, is_digest
from carnice_build.store.files import open_regular, write_atomically
from carnice_build.units import plural

MOST_BATCHES = 20_000
MOST_BYTES = 500_000_000
"""Of a remote that are looked at, the newest first."""


class Remote:
    """What a remote is, as far as anybody is believed about it."""

    def __init__(self, objects: Objects, trusted: Mapping[str, str], cache: Path) -> None:
        """Read what is new; StoreError for another version, RemoteFailure for no answer."""
        self.objects = objects
        self._absent: dict[str, list[str]] = {}
        self._trusted = trusted
        self._folder = cache / "remotes" / digest_texts([objects.url]) / "records"
        self.bodies: dict[str, Body] = {}
        if check_format(objects):
            self._read(batches_in(objects))
        self.index = Index(body for _, body in sorted(self.bodies.items()))

    @property
    def name(self) -> str:
        """Its URL, without what may be secret in it."""
        return self.objects.name

    @property
    def complaints(self) -> list[str]:
        """What counts as absent and why: a sentence for each reason."""
        return [
            f"batch {names[0][:12]}{_and_more(len(names) - 1)} counts as absent: it {reason}"
            for reason, names in self._absent.items()
        ]

    def close(self) -> None:
        """Let its threads go."""
        self.objects.close()

    def _read(self, listed: Mapping[str, Listed]) -> None:
        names = self._affordable(listed)
        new = {}
        for name in sorted(names):
            content = self._cached(name)
            if content is None:
                new[name] = listed[name].size
            else:
                self._believe(name, content)
        for name, content in self._download(new):
            self._believe(name, content)
            if name_of(content) == name:
                self._keep(name, content)
        self._drop_others(names)

    def _affordable(self, listed: Mapping[str, Listed]) -> set[str]:
        names: set[str] = set()
        total = 0
        for name in sorted(listed, key=lambda name: (-(listed[name].time or 0), name)):
            size = listed[name].size
            if not 0 < size <= MAX_PACKED:
                self._complain(name, f"has {size} bytes")
            elif len(names) == MOST_BATCHES or total + size > MOST_BYTES:
                self._complain(name, f"is older than the {len(names)} that are looked at")
            else:
                names.add(name)
                total += size
        return names

    def _download(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        ranges = [Range(f"records/{name}", 0, size) for name, size in sizes.items()]
        for item, content in self.objects.read_ranges(ranges):
            name = item.name.rpartition("/")[2]
            if isinstance(content, RemoteFailure):
                self._complain(name, f"cannot be read: {content}")
            else:
                yield name, content

    def _believe(self, name: str, content: bytes) -> None:
        try:
            self.bodies[name] = read_body(open_envelope(name, content), self._trusted)
        except Unbelieved as reason:
            self._complain(name, str(reason))

    def _complain(self, name: str, reason: str) -> None:
        self._absent.setdefault(reason, []).append(name)

    def _cached(self, name: str) -> bytes | None:
        try:
            with open_regular(self._folder / name) as file:
                content = file.read(MAX_PACKED)
        except OSError:
            return None
        return content if name_of(content) == name else None

    def _keep(self, name: str, content: bytes) -> None:
        with suppress(OSError):  # it may be somebody else's cache, or full
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / name, content)

    def _drop_others(self, names: Iterable[str]) -> None:
        with suppress(OSError):
            for path in list(self._folder.iterdir()):
                if path.name not in names and is_digest(path.name):
                    path.unlink()


def check_format(objects: Objects) -> bool:
    """Whether a remote is there and of this version; StoreError for another one."""
    try:
        found = objects.head("FORMAT", 100)
    except Missing:
        return False
    if found != FORMAT.encode():
        said = found[:40].decode(errors="replace").strip()
        raise StoreError(
            f"the remote is of the format {said!r}",
            where=objects.name,
            expected=f"{FORMAT.strip()!r}: another URL, or the carnice-build that wrote it",
        )
    return True


def batches_in(objects: Objects) -> dict[str, Listed]:
    """The batches of a remote, by their digests; of what else lies there nobody speaks."""
    listed = objects.listing("records")
    return {name: item for name, item in listed.items() if is_digest(name)}


def _and_more(count: int) -> str:
    return f" (like {plural(count, 'other')})" if count else ""
