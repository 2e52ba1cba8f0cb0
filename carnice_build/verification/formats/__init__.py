"""What verifying has to know of each number format: one file a format, listed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from carnice_build.formats.autoround.checks import AutoRoundChecks
from carnice_build.formats.autoround.format import AutoRoundFormat
from carnice_build.formats.base import Format
from carnice_build.formats.checks import FormatChecks
from carnice_build.formats.compressed_tensors.checks import CompressedChecks
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.mlx.checks import MlxChecks
from carnice_build.formats.mlx.format import MlxFormat
from carnice_build.formats.nvfp4.checks import Nvfp4Checks
from carnice_build.formats.nvfp4.format import Nvfp4Format

_CHECKS: Mapping[type[Format], Callable[[Any], FormatChecks]] = {
    MlxFormat: MlxChecks,
    Nvfp4Format: Nvfp4Checks,
    AutoRoundFormat: AutoRoundChecks,
    CompressedFormat: CompressedChecks,
}


def checks_of(number_format: Format) -> FormatChecks | None:
    """What is known of the format; None for one that a package brought."""
    make = _CHECKS.get(type(number_format))
    return make(number_format) if make else None
