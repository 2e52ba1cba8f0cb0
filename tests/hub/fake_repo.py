"""A folder as a repository of the hub: what its API says of the files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Repo:
    """A folder served as one commit of a repository; `branches` name it too."""

    folder: Path
    commit: str
    branches: set[str]
    changed: set[str] = field(default_factory=set)
    hashes: dict[str, str] = field(default_factory=dict)

    def content_id(self, file: str) -> str:
        """SHA-256 of a file in LFS, git's blob hash of another."""
        if file not in self.hashes:
            self.hashes[file] = _content_id(self.folder / file)
        flipped = self.hashes[file][::-1]
        return flipped if file in self.changed else self.hashes[file]

    def siblings(self) -> list[dict[str, Any]]:
        """All files, as the description of a repository has them."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return [self._sibling(path.relative_to(self.folder).as_posix()) for path in found]

    def _sibling(self, file: str) -> dict[str, Any]:
        content, size = self.content_id(file), (self.folder / file).stat().st_size
        if len(content) == 40:
            return {"rfilename": file, "size": size, "blobId": content}
        lfs = {"sha256": content, "size": size, "pointerSize": 134}
        return {"rfilename": file, "size": size, "blobId": "b" * 40, "lfs": lfs}

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What is in a folder, as a listing has it."""
        path = self.folder / folder
        found = path.rglob("*") if recursive else path.iterdir()
        return [self.entry(file.relative_to(self.folder).as_posix()) for file in sorted(found)]

    def entry(self, name: str) -> dict[str, Any]:
        """A file or a folder, as a listing has it."""
        path = self.folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "f" * 40, "size": 0}
        size, content = path.stat().st_size, self.content_id(name)
        entry = {"type": "file", "path": name, "oid": content[:40], "size": size}
        if len(content) == 40:
            return entry
        return entry | {"lfs": {"oid": content, "size": size, "pointerSize": 134}}


def _content_id(path: Path) -> str:
    with path.open("rb") as file:
        if path.suffix in (".safetensors", ".parquet"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
