"""The steps that a recipe may name; a new one is listed here, and nowhere else.

Packages add their own through the entry point `carnice_build.steps`, a subclass of `Step`.
"""

from __future__ import annotations

from carnice_build.plugins import Extensible
from carnice_build.steps.base import Step
from carnice_build.steps.chat_template import ChatTemplate
from carnice_build.steps.drop import Drop
from carnice_build.steps.graft import Graft
from carnice_build.steps.rename import Rename

STEPS: Extensible[Step] = Extensible(
    {
        "rename": Rename,
        "drop": Drop,
        "graft": Graft,
        "chat_template": ChatTemplate,
    },
    "carnice_build.steps",
    Step,  # type: ignore[type-abstract]
)
