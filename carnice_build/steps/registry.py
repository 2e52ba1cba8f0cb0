"""The steps that a recipe may name; a new one is listed here, and nowhere else.

Packages add their own through the entry point `carnice_build.steps`, a subclass of `Step`.
"""

from __future__ import annotations

from carnice_build.plugins import Extensible
from carnice_build.steps.base import Step

STEPS: Extensible[Step] = Extensible(
    {
        "decode": "carnice_build.steps.decode:Decode",
        "rename": "carnice_build.steps.rename:Rename",
        "drop": "carnice_build.steps.drop:Drop",
        "graft": "carnice_build.steps.graft:Graft",
        "chat_template": "carnice_build.steps.chat_template:ChatTemplate",
    },
    "carnice_build.steps",
    Step,  # type: ignore[type-abstract]
)
