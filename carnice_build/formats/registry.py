"""The formats that a recipe may name; a new one is listed here, and nowhere else.

Packages add their own through the entry point `carnice_build.formats`, a subclass of `Format`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from carnice_build.formats.autoround.format import AutoRoundFormat
from carnice_build.formats.base import Format
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.fp8_dynamic.format import Fp8DynamicFormat
from carnice_build.formats.mlx.format import MlxFormat
from carnice_build.formats.nvfp4.format import Nvfp4Format
from carnice_build.plugins import Extensible

if TYPE_CHECKING:
    from carnice_build.formats.checks import FolderReader

FORMATS: Extensible[Format] = Extensible(
    {
        "mlx": MlxFormat,
        "nvfp4": Nvfp4Format,
        "autoround": AutoRoundFormat,
        "compressed-tensors": CompressedFormat,
        "fp8-dynamic": Fp8DynamicFormat,
    },
    "carnice_build.formats",
    Format,  # type: ignore[type-abstract]
    named_by="format",
)


def readers() -> list[type[FolderReader]]:
    """What reads the folders of each format; formats that cannot be used read nothing."""
    return [number_format.reader() for number_format in FORMATS.usable([]).values()]


@cache
def packed_suffixes() -> frozenset[str]:
    """The ends of the names of a quantized module's tensors, in whatever format."""
    return frozenset(suffix for reader in readers() for suffix in reader.suffixes)
