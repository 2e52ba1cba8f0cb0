"""The part of check `structure` that looks at what stands beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from carnice_build.checkpoint.assets import absent, damaged, read_copied, taken_over
from carnice_build.checkpoint.containers import SUFFIXES
from carnice_build.checkpoint.source import LocalFile, refuse_pointer
from carnice_build.errors import CheckpointError
from carnice_build.models.base import Part
from carnice_build.planning.planner import VariantPlan


def small_file_problems(variant: VariantPlan, folder: Path) -> Iterator[str]:
    """Links to nothing, Git LFS pointers, and files that the engine reads but not as they are."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.exists():
            yield f"{name} is a link to nothing"
        elif path.is_file() and not name.endswith(SUFFIXES):
            found[name] = path
    for name in variant.files:
        if name not in found:
            yield f"{name} is missing, which the source has"
    reads = variant.format.engine_reads()
    vision = any(tensor.fact.part is Part.TOWER for tensor in variant.conversion.tensors)
    yield from absent(found, reads, vision=vision)
    taken = taken_over(found, reads)
    contents: dict[str, bytes] = {}
    for name, path in found.items():
        try:
            file = LocalFile(path)
            refuse_pointer(file)
            if name in taken:
                contents[name] = read_copied(file)
        except CheckpointError as error:
            yield f"{name} {error.what}"
    for name, problem in damaged(contents):
        yield f"{name} {problem}"
