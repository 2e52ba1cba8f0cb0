"""Format `gguf`: what a folder must hold, and the numbers of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from carnice_build.formats.checks import FolderReader, QuantizedValues, Tensors, TorchChecks
from carnice_build.formats.folder import ModelFolder
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import Floats, Incomparable, Values
from carnice_build.models.base import Architecture


class GgufReader(FolderReader):
    """Not yet."""

    suffixes = ()

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return False

    def scheme(self, module: str) -> Scheme | None:
        return None

    def values(self, tensors: Tensors, module: str) -> Values:
        raise Incomparable(module)


class GgufChecks(TorchChecks):
    """Not yet."""

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        return iter(())

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
        raise Incomparable(module)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        raise Incomparable("blocks")
