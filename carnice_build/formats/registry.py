"""The formats that a recipe may name; a new one is listed here, and nowhere else.

Packages add their own through the entry point `carnice_build.formats`, a subclass of `Format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from carnice_build.errors import PluginError
from carnice_build.formats.base import Format
from carnice_build.plugins import Extensible, failures_blamed, returned

if TYPE_CHECKING:
    from carnice_build.formats.checks import FolderReader
    from carnice_build.formats.folder import ModelFolder

FORMATS: Extensible[Format] = Extensible(
    {
        "mlx": "carnice_build.formats.mlx.format:MlxFormat",
        "nvfp4": "carnice_build.formats.nvfp4.format:Nvfp4Format",
        "autoround": "carnice_build.formats.autoround.format:AutoRoundFormat",
        "compressed-tensors": "carnice_build.formats.compressed_tensors.format:CompressedFormat",
        "gguf": "carnice_build.formats.gguf.format:GgufFormat",
    },
    "carnice_build.formats",
    Format,  # type: ignore[type-abstract]
    named_by="format",
)

RETIRED: Mapping[str, str] = {
    "fp8-dynamic": "`format: compressed-tensors` with `scheme: FP8_DYNAMIC`",
}
"""What recipes say in place of a format that there was once, as an error expects it."""


def readers() -> list[type[FolderReader]]:
    """What reads the folders of each format, ours first; what cannot be used reads nothing."""
    from carnice_build.formats.published import PublishedReader

    found: list[type[FolderReader]] = []
    for number_format in FORMATS.usable([]).values():
        with suppress(PluginError), failures_blamed(number_format):
            found.append(returned(number_format.reader(), type, "reader"))
    return [*found, PublishedReader]


def readers_of(folder: ModelFolder) -> list[FolderReader]:
    """What reads a folder: none where no format here does.

    Formats may share a way to state what they are, and each tell the numbers of some folders.
    """
    found = []
    for reader in readers():
        with suppress(PluginError), failures_blamed(reader):
            if reader.takes(folder):
                found.append(reader(folder.config))
    return found


@cache
def packed_suffixes() -> frozenset[str]:
    """The ends of the names of a quantized module's tensors, in whatever format."""
    found: set[str] = set()
    for reader in readers():
        with suppress(PluginError), failures_blamed(reader):
            found.update(reader.suffixes)
    return frozenset(found)
