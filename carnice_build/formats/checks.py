"""The questions that the checks ask of a number format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from carnice_build.formats.base import OutputTensor
from carnice_build.formats.folder import ModelFolder
from carnice_build.formats.layout import PackLayout
from carnice_build.formats.library import Library
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import Floats, Values
from carnice_build.graph import TensorData
from carnice_build.models.base import Architecture
from carnice_build.tensors import SourceTensor

Tensors = Mapping[str, SourceTensor]

Rounding = Callable[[Floats], Floats]
"""From activations, float32 [rows, columns], to those that the engine computes with."""


class QuantizedValues(Values, Protocol):
    """A quantized module, dequantized, and how near it must be to its source.

    `tolerated` is the share of weights that may be further off.
    """

    tolerated: float

    def allowance(self, source: Floats, start: int) -> Floats:
        """The most that each weight may be off, given the rows of the source from `start` on."""


class FolderReader(ABC):
    """The weights of a folder, read back by what its config.json says and nothing else.

    `suffixes` are the ends of the names of a quantized module's tensors.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """True for the config.json of a folder of this format."""

    @classmethod
    def takes(cls, folder: ModelFolder) -> bool:
        """True for a folder of this format, which most often its config.json tells."""
        return cls.reads(folder.config)

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """A folder's tensors, and those of modules that are held together in one of them."""
        return tensors

    def parts(self, tensors: Tensors, architecture: Architecture) -> Mapping[str, Tensors]:
        """By the names of tensors that are another thing to the model, what they are, by its names.

        Several may have the same, of which each then holds a share.
        """
        return {}

    @abstractmethod
    def scheme(self, module: str) -> Scheme | None:
        """How config.json says that the quantized `module` is stored, None if it does not."""

    @abstractmethod
    def values(self, tensors: Tensors, module: str) -> Values:
        """The quantized `module`; Incomparable when its numbers cannot be told."""


class FormatChecks(ABC):
    """What a recipe's format says of its folders.  Can be sent to other processes."""

    library: ClassVar[Library]
    """What runs the folders."""

    @abstractmethod
    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """What is wrong in config.json and its like; the tensors are those that it should have.

        `architecture` is the one that config.json describes.
        """

    def pack_problems(self, pack: PackLayout, folder: Path) -> Iterator[str]:
        """What is wrong in the header of a file, of which the plan has `pack`."""
        return iter(())

    def by_module(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """A folder's tensors by the names that they have where each module has its own."""
        return tensors

    @abstractmethod
    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
        """The quantized `module`; Incomparable when its tensors do not fit together."""

    def compared(self, tensors: Sequence[OutputTensor]) -> None:
        """Raise Incomparable for a quantized module that has no source to be compared with."""
        return

    def prepared(self, source: TensorData) -> TensorData:
        """Source rows as the quantizer takes them."""
        return source


class TorchChecks(FormatChecks):
    """A format whose tensors have canonical names, and which torch runs dequantized."""

    library: ClassVar[Library] = Library.TRANSFORMERS
    activations: str = ""
    """What the engine does to the inputs of quantized linears; empty when nothing."""

    def input_rounding(self, tensors: Tensors, module: str) -> Rounding | None:
        """What the engine does to the inputs of the quantized `module`."""
        return None

    @abstractmethod
    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """Weights that engines fuse, float32 [rows, columns] each, quantized and dequantized."""
