"""Build quantized variants of language models from declarative recipes.

    from carnice_build import Options, build, plan, verify

These names are the public interface; they are loaded when first used, so that importing the
package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from carnice_build.version import __version__

if TYPE_CHECKING:
    from carnice_build.commands.build import BuildResult
    from carnice_build.commands.build import build_variants as build
    from carnice_build.commands.options import Options
    from carnice_build.commands.plan import PlanResult
    from carnice_build.commands.plan import plan_and_survey as plan
    from carnice_build.commands.verify import VerifyResult, VerifySettings
    from carnice_build.commands.verify import verify_variants as verify
    from carnice_build.errors import CarniceError

__all__ = [
    "BuildResult",
    "CarniceError",
    "Options",
    "PlanResult",
    "VerifyResult",
    "VerifySettings",
    "__version__",
    "build",
    "plan",
    "verify",
]

_PLACES = {
    "BuildResult": ("commands.build", "BuildResult"),
    "CarniceError": ("errors", "CarniceError"),
    "Options": ("commands.options", "Options"),
    "PlanResult": ("commands.plan", "PlanResult"),
    "VerifyResult": ("commands.verify", "VerifyResult"),
    "VerifySettings": ("commands.verify", "VerifySettings"),
    "build": ("commands.build", "build_variants"),
    "plan": ("commands.plan", "plan_and_survey"),
    "verify": ("commands.verify", "verify_variants"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
