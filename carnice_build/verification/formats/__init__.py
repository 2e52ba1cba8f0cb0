"""What verifying has to know of each number format: one file a format, listed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from carnice_build.transforms.autoround import AutoRoundFormat
from carnice_build.transforms.base import Format
from carnice_build.transforms.compressed import CompressedFormat
from carnice_build.transforms.mlx import MlxFormat
from carnice_build.transforms.nvfp4 import Nvfp4Format
from carnice_build.verification.formats.autoround import AutoRoundChecks
from carnice_build.verification.formats.base import FormatChecks
from carnice_build.verification.formats.compressed import CompressedChecks
from carnice_build.verification.formats.mlx import MlxChecks
from carnice_build.verification.formats.nvfp4 import Nvfp4Checks

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
