"""A checkpoint opened on its headers: every tensor's name, type, shape and place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnice_build.checkpoint.header import Header, read_header
from carnice_build.checkpoint.json import DuplicateKey, parse_json
from carnice_build.checkpoint.shapes import read_shapes
from carnice_build.checkpoint.shards import Index, model_shards, refuse_adapter
from carnice_build.checkpoint.source import LocalFile, local_files, read_all
from carnice_build.errors import CheckpointError, together
from carnice_build.graph import TensorRef, View
from carnice_build.tensors import ByteSource, SourceTensor


def source_view(checkpoint: Checkpoint) -> View:
    """The tensors of a checkpoint under their names on disk."""
    return {name: TensorRef(tensor.spec, tensor) for name, tensor in checkpoint.tensors.items()}


INDEX_NAME = "model.safetensors.index.json"
TEMPLATE_FOLDER = "additional_chat_templates"
"""Where transformers keeps named chat templates beside the default one."""

MAX_JSON_BYTES = 200_000_000

HeaderReader = Callable[[Sequence[ByteSource]], Iterable[Header]]
"""The headers of shards, in their order."""

_SAMPLES = 16
_SAMPLE_BYTES = 4096


def read_samples(tensor: SourceTensor) -> Iterator[bytes]:
    """A few kilobytes spread over a tensor that has bytes.

    Tensors of one type and shape whose samples differ have different content; of equal samples,
    perhaps the same.
    """
    assert tensor.file is not None
    count = tensor.spec.nbytes
    buffer = bytearray(min(_SAMPLE_BYTES, count))
    step = max(1, (count - len(buffer)) // (_SAMPLES - 1))
    for start in range(0, count - len(buffer) + 1, step)[:_SAMPLES]:
        tensor.file.read_into(tensor.offset + start, memoryview(buffer))
        yield bytes(buffer)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by their name on disk, the config, and the small files beside them."""

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    assets: Mapping[str, ByteSource]

    @property
    def buildable(self) -> bool:
        """False for a shape file: it can be planned, but has no bytes to build from."""
        return all(tensor.file is not None for tensor in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder of safetensors shards, or a shape file; reads headers and JSON only."""
    inner = path / TEMPLATE_FOLDER
    try:
        if path.is_file():
            return _open_shapes(path)
        if not path.is_dir():
            raise CheckpointError("is not a folder", where=str(path))
        files = local_files(path)
        templates = local_files(inner, ".jinja") if inner.is_dir() else {}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from None
    below = {f"{TEMPLATE_FOLDER}/{name}": file for name, file in templates.items()}
    return assemble_checkpoint(str(path), {**files, **below})


def assemble_checkpoint(
    where: str,
    files: Mapping[str, ByteSource],
    *,
    others: Collection[str] = (),
    read_headers: HeaderReader = lambda shards: map(read_header, shards),
) -> Checkpoint:
    """A checkpoint of these files, in the order of their names; reads headers and JSON only.

    `others` names files that are there too, but must not be touched.
    """
    refuse_adapter(where, [*files, *others])
    if "config.json" not in files:
        raise CheckpointError("has no config.json", where=where)
    config = _load_json(files["config.json"])
    index = _read_index(f"{where}/{INDEX_NAME}", files[INDEX_NAME]) if INDEX_NAME in files else None
    shards = model_shards(where, files, index, others)
    headers = read_headers([files[shard] for shard in shards])
    tensors: dict[str, SourceTensor] = {}
    problems: list[tuple[str, str]] = []
    for shard, header in zip(shards, headers, strict=True):
        problems += _add_shard(tensors, files[shard], header, index, shard)
    if problems:
        what = f"holds {len(problems)} tensors in a wrong place"
        raise together(problems, lambda item: CheckpointError(item[1], where=item[0]), what, where)
    if index is not None and (missing := sorted(set(index.weight_map) - set(tensors))):
        raise _not_held(index, missing)
    assets = {name: file for name, file in files.items() if not name.endswith(".safetensors")}
    return Checkpoint(where, config, tensors, assets)


def _add_shard(
    tensors: dict[str, SourceTensor],
    source: ByteSource,
    header: Header,
    index: Index | None,
    shard: str,
) -> Iterator[tuple[str, str]]:
    """Add the shard's tensors; yields what the other shards or the index say against one."""
    for entry in header.entries:
        stated = index.weight_map.get(entry.name) if index else None
        if entry.name in tensors:
            other = _file_name(tensors[entry.name])
            yield source.name, f"tensor {entry.name!r} is also in {other}"
        elif index is not None and stated != shard:
            says = f"says {stated!r}" if stated else "does not name it"
            yield source.name, f"tensor {entry.name!r} is here, but the index {says}"
        else:
            tensors[entry.name] = SourceTensor(entry.name, entry.spec, source, entry.offset)


def _not_held(index: Index, missing: Sequence[str]) -> CheckpointError:
    def error(name: str) -> CheckpointError:
        shard = index.weight_map[name]
        return CheckpointError(
            f"names tensor {name!r} in {shard!r}, which does not hold it", where=index.where
        )

    what = f"names {len(missing)} tensors that no shard holds"
    return together(missing, error, what, index.where)


def _file_name(tensor: SourceTensor) -> str:
    return tensor.file.name if tensor.file else "a shape file"


def _read_index(where: str, file: ByteSource) -> Index:
    table = _load_json(file).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(item, str) for item in table.values()):
        raise CheckpointError("has no weight_map of names to shards", where=file.name)
    for shard in sorted(set(table.values())):
        if not is_plain_name(shard):
            raise CheckpointError(f"names a shard outside the folder: {shard!r}", where=where)
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"names {shard!r}, which is not safetensors", where=where)
    return Index(INDEX_NAME, where, table)


def is_plain_name(name: str) -> bool:
    """True for a bare file name: no folder part, no parent, no NUL."""
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def is_plain_path(path: str) -> bool:
    """True for plain names joined by `/`, at most two folders deep and none of them hidden.

    They are text: bytes that are not UTF-8 and control characters are in no name of ours.
    """
    names = path.split("/")
    plain = all(is_plain_name(name) and name[0] != "." for name in names)
    return len(names) <= 3 and plain and path.isprintable()


def _load_json(file: ByteSource) -> dict[str, Any]:
    if file.size > MAX_JSON_BYTES:
        raise CheckpointError(f"has {file.size} bytes, too many for JSON", where=file.name)
    try:
        value = parse_json(read_all(file))
    except DuplicateKey as error:
        raise CheckpointError(f"names {error.key!r} twice", where=file.name) from None
    except (ValueError, RecursionError):
        raise CheckpointError("is not valid JSON", where=file.name) from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=file.name)
    return value


def _open_shapes(path: Path) -> Checkpoint:
    config, specs = read_shapes(str(path), _load_json(LocalFile(path)))
    tensors = {name: SourceTensor(name, spec, None, 0) for name, spec in specs.items()}
    return Checkpoint(str(path), config, tensors, {})
