"""Everything that a recipe may name; a new step or format is listed here, and nowhere else.

Packages add their own through the entry points `carnice_build.steps` and
`carnice_build.formats`, each naming a subclass of `Step` or `Format`.
"""

from __future__ import annotations

from carnice_build.errors import PluginError
from carnice_build.formats.autoround.format import AutoRoundFormat
from carnice_build.formats.base import Format
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.mlx.format import MlxFormat
from carnice_build.formats.nvfp4.format import Nvfp4Format
from carnice_build.recipe.schema import Vocabulary
from carnice_build.steps.base import Step
from carnice_build.steps.chat_template import ChatTemplate
from carnice_build.steps.drop import Drop
from carnice_build.steps.graft import Graft
from carnice_build.steps.rename import Rename
from carnice_build.transforms.plugins import Extensible

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


def vocabulary() -> Vocabulary:
    """The steps and formats of this installation; a broken one raises when it is asked for."""
    return Vocabulary(steps=_steps(), formats=_formats())


def usable_vocabulary() -> tuple[Vocabulary, list[PluginError]]:
    """The steps and formats that can be used, and what is wrong with all others."""
    problems: list[PluginError] = []
    found = Vocabulary(_steps().usable(problems), _formats().usable(problems))
    return found, problems


def _steps() -> Extensible[Step]:
    return Extensible(STEPS, "carnice_build.steps", Step)  # type: ignore[type-abstract]


def _formats() -> Extensible[Format]:
    return Extensible(FORMATS, "carnice_build.formats", Format)  # type: ignore[type-abstract]
