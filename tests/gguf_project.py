"""A project with the stand-ins that ship, of which llama.cpp knows the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, Project
from gguf import GGUFReader

from carnice_build.checkpoint.gguf_header import ALIGNMENT

DEMO = REPOSITORY / "demo"

TYPES_OF_FLOATS = {"F32", "F16", "BF16"}


def stand_in(project: Project) -> Project:
    """The project, with that for its tiny checkpoint, and its base for the other."""
    for folder in (project.checkpoint, project.base):
        shutil.rmtree(folder)
        shutil.copytree(DEMO / folder.name, folder)
    return project


def tensors(*files: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of the tensors of one file, or of split ones, as gguf-py reads them."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in files:
        for item in GGUFReader(file).tensors:
            assert item.name not in found
            shape = tuple(int(size) for size in item.shape)
            found[item.name] = (item.tensor_type.name, shape, item.data.tobytes())
    return found


def metadata(file: Path) -> dict[str, Any]:
    """What a file says beside its tensors."""
    fields = GGUFReader(file).fields
    return {key: item.contents() for key, item in fields.items() if not key.startswith("GGUF.")}


def gap(file: Path) -> int:
    """A place between two tensors, where a file has zeros; 0 where no tensor needs them."""
    ends = (int(item.data_offset + item.n_bytes) for item in GGUFReader(file).tensors)
    return next((end for end in ends if end % ALIGNMENT), 0)
