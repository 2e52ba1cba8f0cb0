"""Everything that a recipe may name; a new step or format is listed here, and nowhere else.

Packages add their own through the entry points `carnice_build.steps` and
`carnice_build.formats`, each naming a subclass of `Step` or `Format`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from carnice_build.recipe.schema import Vocabulary
from carnice_build.transforms.autoround import AutoRoundFormat
from carnice_build.transforms.base import Format, Step
from carnice_build.transforms.chat_template import ChatTemplate
from carnice_build.transforms.compressed import CompressedFormat
from carnice_build.transforms.drop import Drop
from carnice_build.transforms.graft import Graft
from carnice_build.transforms.mlx import MlxFormat
from carnice_build.transforms.nvfp4 import Nvfp4Format
from carnice_build.transforms.rename import Rename

STEPS: dict[str, type[Step]] = {
    "rename": Rename,
    "drop": Drop,
    "graft": Graft,
    "chat_template": ChatTemplate,
}
FORMATS: dict[str, type[Format]] = {
    "mlx": MlxFormat,
    "nvfp4": Nvfp4Format,
    "autoround": AutoRoundFormat,
    "compressed-tensors": CompressedFormat,
}


class _Extensible(Mapping[str, Any]):
    """Our own entries first; installed packages are asked only for names we do not have."""

    def __init__(self, builtin: Mapping[str, Any], group: str) -> None:
        self._builtin = builtin
        self._group = group

    def __getitem__(self, name: str) -> Any:
        if name in self._builtin:
            return self._builtin[name]
        for entry in entry_points(group=self._group, name=name):
            return entry.load()
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        for entry in entry_points(group=self._group):
            if entry.name not in self._builtin:
                yield entry.name

    def __len__(self) -> int:
        return sum(1 for _ in self)


def vocabulary() -> Vocabulary:
    """The steps and formats of this installation."""
    return Vocabulary(
        steps=_Extensible(STEPS, "carnice_build.steps"),
        formats=_Extensible(FORMATS, "carnice_build.formats"),
    )
