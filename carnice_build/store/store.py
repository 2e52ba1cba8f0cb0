"""The store: where the bytes of a digest are, and how new bytes get in.

cache/FORMAT             the version of this layout
cache/records/           what is known (see `records`)
cache/packs/             finished packs, named by their digest
cache/partial/           packs being written, named by their layout
cache/blobs/             small tensors that no pack holds, named by their digest
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from carnice_build.checkpoint.containers import read_entries
from carnice_build.checkpoint.source import LocalFile
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import StoreError
from carnice_build.store.digests import digest_bytes, digest_texts
from carnice_build.store.files import sync_folder, write_atomically
from carnice_build.store.locks import Taken, locked
from carnice_build.store.outputs import Outputs
from carnice_build.store.packs import (
    Location,
    PartialPack,
    digest_range,
    extents,
    is_plain_file,
    read_header_bytes,
)
from carnice_build.store.records import PackRecord, Records
from carnice_build.system import make_durable, read_at

FORMAT = "carnice-cache 1\n"
_FOLDERS = ("packs", "partial", "blobs", "records")
_LEASES = 256


class Store:
    """One cache folder, shared by any number of builds at once."""

    def __init__(self, root: Path) -> None:
        """Open the cache at `root`, making it when it is not there.

        Raises StoreError when it cannot be used, or was written by another version.
        """
        self.root = root
        try:
            self._check_format()
            root.mkdir(parents=True, exist_ok=True)
            # The format first: a build that starts meanwhile must not find folders without it.
            if not (root / "FORMAT").exists():
                write_atomically(root / "FORMAT", FORMAT.encode())
            for name in _FOLDERS:
                (root / name).mkdir(exist_ok=True)
        except FileExistsError:
            raise StoreError("is not a folder", where=str(root)) from None
        except OSError as error:
            raise StoreError(f"cannot use the cache: {error.strerror}", where=str(root)) from None
        self.records = Records(root / "records")
        self._pack_states: dict[str, PackRecord] = {}
        self._pack_offsets: dict[str, dict[str, int]] = {}
        self.damaged: list[str] = []

    def _check_format(self) -> None:
        path = self.root / "FORMAT"
        if is_plain_file(path):
            with path.open("rb") as file:
                found = file.read(100).decode(errors="replace")
        else:
            known = os.path.lexists(path) or any((self.root / name).exists() for name in _FOLDERS)
            found = "" if known else FORMAT
        if found != FORMAT:
            raise StoreError(
                f"the cache is of the format {found.strip()[:40]!r}",
                where=str(self.root),
                expected=f"{FORMAT.strip()!r}: remove the folder, or name another with --cache",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.records.close()

    def free_bytes(self) -> int:
        """Bytes that can still be written where the cache is."""
        return shutil.disk_usage(self.root).free

    def pack_path(self, pack: str) -> Path:
        """Where the finished pack of this digest is."""
        return self.root / "packs" / f"{pack}.safetensors"

    def _partial_path(self, layout: str) -> Path:
        return self.root / "partial" / f"{layout}.safetensors"

    def _blob_path(self, digest: str) -> Path:
        return self.root / "blobs" / digest[:2] / digest

    def pack_record(self, pack: str) -> PackRecord | None:
        """The record of a finished pack that is there and as it was left, else None.

        A pack whose size or time changed is damaged: it is named in `damaged` and taken out, so
        that what it held is made again.
        """
        known = self._pack_states.get(pack)
        if known is None:
            # A pack that is not there may be on its way there: another thread is finishing it.
            known = self._check_pack(pack)
            if known is not None:
                self._pack_states[pack] = known
        return known

    def _check_pack(self, pack: str) -> PackRecord | None:
        path = self.pack_path(pack)
        if not os.path.lexists(path):
            return None
        record = self.records.pack(pack)
        if record is not None and is_plain_file(path) and self._is_as_recorded(pack, record):
            return record
        self.damaged.append(str(path))
        self.demote(pack)
        return None

    def _is_as_recorded(self, pack: str, record: PackRecord) -> bool:
        """True when the file is as it was left, and header and digests are those it is named by."""
        stat = self.pack_path(pack).stat()
        if (stat.st_size, stat.st_mtime_ns) != (record.size, record.mtime_ns):
            return False
        header = read_header_bytes(self.pack_path(pack), record.header)
        return digest_texts([digest_bytes(header), *record.digests]) == pack

    def demote(self, pack: str) -> None:
        """Make a damaged pack a partial one: what is whole in it is used, the rest made again.

        The bytes are copied first, because build folders share the pack's file.
        """
        path = self.pack_path(pack)
        record = self.records.pack(pack)
        self._pack_states.pop(pack, None)
        if record is not None and is_plain_file(path):
            partial = self._partial_path(record.layout)
            if not os.path.lexists(partial):
                temporary = partial.with_suffix(".demoted")
                shutil.copyfile(path, temporary)
                temporary.rename(partial)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def finished_pack(self, layout: str, header: bytes | None = None) -> str | None:
        """The finished pack that this layout became, if it is still there.

        With `header`, only a pack that begins with these bytes.
        """
        pack = self.records.pack_of_layout(layout)
        if pack is None or self.pack_record(pack) is None:
            return None
        if header is None:
            return pack
        if read_header_bytes(self.pack_path(pack), len(header)) != header:
            return None
        return pack

    def lookup(self, key: str, specs: Sequence[TensorSpec]) -> Outputs | None:
        """What the action with this key made, if it ever ran: outputs of these types and shapes."""
        digests = self.records.outputs(key, len(specs))
        return None if digests is None else Outputs(digests, specs, self.locate)

    def locate(self, digest: str, count: int) -> Location | None:
        """Where `count` bytes of this digest can be copied from.

        In a finished pack the pack itself says where they are.
        Bytes in an unfinished pack may not have survived a crash, so they are digested first.
        """
        place = self.records.place(digest)
        if place is None:
            return None
        layout, offset = place
        if not layout:
            path = self._blob_path(digest)
            return Location(path, 0) if digest_range(path, 0, count) == digest else None
        path = self._partial_path(layout)
        # Twice, because the pack may be finished between the two looks at it.
        for _ in range(2):
            pack = self.finished_pack(layout)
            if pack:
                found = self._offsets_in(pack).get(digest)
                return Location(self.pack_path(pack), found) if found is not None else None
            if digest_range(path, offset, count) == digest:
                return Location(path, offset)
        return None

    def _offsets_in(self, pack: str) -> dict[str, int]:
        """Where each digest's bytes begin in a finished pack."""
        if pack not in self._pack_offsets:
            record = self.pack_record(pack)
            assert record is not None, "a pack that was just found is gone"
            entries = read_entries(LocalFile(self.pack_path(pack)))
            places = zip(extents(entries, record.counts), record.digests, strict=True)
            self._pack_offsets[pack] = {
                digest: extent.offset for extent, digest in places if extent.nbytes
            }
        return self._pack_offsets[pack]

    def holds(self, digest: str, place: tuple[str, int]) -> bool:
        """True when the file that a place speaks of exists; its bytes are not looked at."""
        layout, _ = place
        if not layout:
            return self._blob_path(digest).exists()
        return self.finished_pack(layout) is not None or self._partial_path(layout).exists()

    def partial(self, layout: str, header: bytes, size: int) -> PartialPack:
        """A pack to write; its owner must `acquire` it first."""
        return PartialPack(self._partial_path(layout), layout, header, size)

    def finish(self, partial: PartialPack, digests: Sequence[str], counts: Sequence[int]) -> str:
        """Seal a completely written pack and move it into the store; returns its digest.

        Each of `digests` is over as many of the header's tensors as `counts` says.
        """
        partial.seal()
        pack = digest_texts([partial.header_digest, *digests])
        self._pack_states.pop(pack, None)
        if self.pack_record(pack):
            self.records.set_pack_of_layout(partial.layout, pack)
            partial.path.unlink()
        else:
            stat = partial.path.stat()
            record = PackRecord(
                stat.st_size,
                stat.st_mtime_ns,
                partial.layout,
                tuple(digests),
                tuple(counts),
                partial.header_bytes,
            )
            # Records first: a crash in between leaves a partial pack that is found again.
            with self.records.together():
                self.records.set_pack(pack, record)
                self.records.set_pack_of_layout(partial.layout, pack)
            partial.path.rename(self.pack_path(pack))
            sync_folder(self.pack_path(pack).parent)
            self._pack_states[pack] = record
        partial.close()
        return pack

    @contextmanager
    def lease(self, identity: str, kind: str = "short") -> Iterator[None]:
        """Hold the work named `identity` alone, among all threads and processes.

        Few files serve as locks, so unrelated work of the same kind may wait too, but a holder
        never takes a second lease, so nobody waits forever.  The system releases the lock of a
        dead process.
        """
        folder = self.root / "leases"
        folder.mkdir(exist_ok=True)
        stripe = int(digest_texts([identity])[:8], 16) % _LEASES
        with locked(folder / f"{kind}-{stripe:02x}"):
            yield

    @contextmanager
    def in_use(self) -> Iterator[bool]:
        """Keep others from removing anything while the block runs.

        Gives False when only builds on this machine are kept from it.
        """
        with locked(self.root / "lock", shared=True) as everywhere:
            yield everywhere

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep builds out while the block runs; StoreError when one is running."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.root / "lock", wait=False))
            except Taken:
                raise StoreError(
                    "a build is using the cache", where=str(self.root), expected="no build"
                ) from None
            yield

    def put_blob(self, content: memoryview) -> str:
        """Store a small tensor by itself; returns its digest."""
        digest = digest_bytes(content)
        path = self._blob_path(digest)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, bytes(content))
        self.records.set_place(digest, "", 0)
        return digest

    def blob(self, digest: str) -> Path | None:
        """The file of a tensor that is stored by itself."""
        path = self._blob_path(digest)
        return path if is_plain_file(path) else None

    def adopt_blob(self, path: Path, digest: str, *, durable: bool) -> None:
        """Move the file of a tensor with this digest into the store.

        What need not be `durable` may be lost with the machine's power, which is noticed.
        """
        if durable:
            with path.open("rb") as file:
                make_durable(file.fileno())
        target = self._blob_path(digest)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        self.records.set_place(digest, "", 0)

    def drop_blob(self, digest: str) -> None:
        """Remove a tensor that was stored by itself, if it is there."""
        self._blob_path(digest).unlink(missing_ok=True)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder for files that only this build needs; those of dead builds are removed."""
        parent = self.root / "partial"
        for left in parent.glob("work-*"):
            with suppress(OSError), _locked(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        while True:
            folder = Path(tempfile.mkdtemp(dir=parent, prefix="work-"))
            with _locked(folder) as free:
                # Another build may have taken it for a dead one's before it was locked.
                if free and folder.exists():
                    try:
                        yield folder
                    finally:
                        shutil.rmtree(folder, ignore_errors=True)
                    return


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder by a file in it; tells whether nobody else has, and it is there."""
    with ExitStack() as stack:
        try:
            if folder.is_symlink():
                raise NotADirectoryError(folder)
            stack.enter_context(locked(folder / "lock", wait=False))
        except (FileNotFoundError, NotADirectoryError, Taken):
            yield False
        else:
            yield True


def read_location(location: Location, buffer: memoryview) -> None:
    """Fill `buffer` with bytes of the cache."""
    with location.path.open("rb", buffering=0) as file:
        if read_at(file.fileno(), buffer, location.offset) < len(buffer):
            raise StoreError("is shorter than it was", where=str(location.path))
