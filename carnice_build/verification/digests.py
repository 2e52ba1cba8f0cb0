"""Check `digests`: every file and tensor is there, with the size and digest of build.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from carnice_build.checkpoint.checkpoint import is_plain_path
from carnice_build.formats.folder import BUILD_NAME, ModelFolder
from carnice_build.store.digests import digest_texts
from carnice_build.store.packs import digest_range
from carnice_build.tensors import numbered
from carnice_build.units import format_size
from carnice_build.verification.result import Check, judged

NAME = "digests"

_MOST_EXPERTS = 100_000
"""No layer has as many; a build.json that says more would only exhaust memory."""


def check_digests(folder: ModelFolder, jobs: int) -> Check:
    """Read every byte of the folder and compare; a damaged tensor is named."""
    files, tensors = _table(folder.record, "files"), _table(folder.record, "tensors")
    if files is None or tensors is None:
        return judged(NAME, [f"{BUILD_NAME} is missing or damaged"], "nothing to compare with")
    present, problems = _sizes(folder.path, files)
    problems += _tensors(folder, tensors, jobs)
    problems += _headers(folder, present, tensors)
    problems += _small_files(folder.path, present)
    read = sum(item["size"] for item in present.values())
    summary = f"{len(files)} files, {len(tensors)} tensors, {format_size(read)}"
    return judged(NAME, problems, summary, {"files": len(files), "tensors": len(tensors)})


def _table(record: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]] | None:
    value = record.get(key)
    if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
        return value
    return None


def _sizes(folder: Path, files: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The files that are there in the right size, and what is wrong with the others."""
    present: dict[str, Any] = {}
    problems: list[str] = []
    for name, item in files.items():
        if not is_plain_path(name):
            problems.append(f"{BUILD_NAME} names {name!r}, which is no file of the folder")
            continue
        try:
            size = (folder / name).stat().st_size
        except OSError:
            problems.append(f"file {name} is missing")
            continue
        if size != item.get("size"):
            problems.append(f"file {name} has {size} bytes instead of {item.get('size')}")
        else:
            present[name] = item
    return present, problems


def _tensors(folder: ModelFolder, tensors: Mapping[str, Any], jobs: int) -> Iterator[str]:
    def damage(name: str) -> str | None:
        names = _members(name, tensors[name])
        found = [folder.stored[member] for member in names if member in folder.stored]
        if len(found) < len(names) or not found:
            return f"tensor {name} is missing"
        shard = folder.shard_of(names[0])
        if shard != tensors[name].get("file"):
            return f"tensor {name} is in {shard} instead of {tensors[name].get('file')}"
        count = sum(tensor.spec.nbytes for tensor in found)
        if found[-1].offset + found[-1].spec.nbytes - found[0].offset != count:
            return f"the experts of {name} do not lie one behind another"
        digest = digest_range(folder.path / shard, found[0].offset, count)
        if digest != tensors[name].get("digest"):
            return f"tensor {name} in {shard} is damaged: its digest differs"
        return None

    with ThreadPoolExecutor(jobs) as pool:
        yield from filter(None, pool.map(damage, tensors))


def _headers(
    folder: ModelFolder, present: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Iterator[str]:
    """A pack is named after its header and its tensors' digests, so the headers are covered too."""
    held = {name: _members(name, item) for name, item in tensors.items()}
    firsts = {members[0]: name for name, members in held.items()}
    covered = {member for members in held.values() for member in members}
    for shard, names in folder.shards.items():
        expected = present.get(shard, {}).get("pack")
        if expected is None or not covered.issuperset(names):
            continue
        start = min((folder.stored[name].offset for name in names), default=0)
        header = digest_range(folder.path / shard, 0, start)
        slots = (firsts[name] for name in names if name in firsts)
        digests = [str(tensors[slot].get("digest")) for slot in slots]
        if header is None or digest_texts([header, *digests]) != expected:
            yield f"the header of {shard} differs"


def _members(name: str, item: Mapping[str, Any]) -> list[str]:
    """The tensors of the folder that an entry of build.json is about."""
    shape = item.get("shape")
    if not (isinstance(shape, list) and shape and type(shape[0]) is int):
        return [name]
    return numbered(name, min(shape[0], _MOST_EXPERTS)) or [name]


def _small_files(folder: Path, present: Mapping[str, Any]) -> Sequence[str]:
    return [
        f"file {name} is damaged: its digest differs"
        for name, item in present.items()
        if "digest" in item and digest_range(folder / name, 0, item["size"]) != item["digest"]
    ]
