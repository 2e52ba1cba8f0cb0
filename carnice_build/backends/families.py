"""What transformers' models say of a family, to be called in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carnice_build.errors import BackendError
from carnice_build.extras import pip_install
from carnice_build.models.derive import Derivation, default_of
from carnice_build.models.write_table import Facts, table_text

if TYPE_CHECKING:
    from carnice_build.backends.skeletons import Skeletons


@dataclass(frozen=True)
class Described:
    """A table's text, what could not be known, and a small model: its config, names and shapes."""

    text: str
    unknown: tuple[str, ...]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


def described(model_type: str, entries: Mapping[str, Any], where: str) -> Described:
    """The family of a model type, or of the config.json `where` with these entries.

    CarniceError for what `Skeletons` refuses, and when torch is not installed.
    """
    try:
        from carnice_build.backends.skeletons import Skeletons
    except ImportError:
        raise BackendError("torch is not installed", expected=pip_install("torch")) from None
    skeletons = Skeletons(model_type, entries, where)
    samples = list(skeletons.samples())
    derivation = Derivation(samples, skeletons.owners())
    text = table_text(derivation, _facts(model_type, skeletons))
    return Described(text, tuple(derivation.unknown), skeletons.config(), samples[0].shapes)


def _facts(model_type: str, skeletons: Skeletons) -> Facts:
    defaults = {
        skeletons.name(path): found
        for path, value in skeletons.defaults.items()
        if (found := _default(value)) is not None
    }
    defaults |= {
        name: found
        for name, samples in skeletons.silent().items()
        if (found := default_of(name, samples))
    }
    for name, other in skeletons.aliases.items():
        if name in defaults and other not in defaults:
            defaults[other], defaults[name] = defaults[name], other
    return Facts(
        model_type=model_type,
        version=skeletons.version,
        text_section=skeletons.text,
        text_type=skeletons.text_type,
        towers=tuple(name for name in skeletons.sections if name != skeletons.text),
        ties=skeletons.ties(),
        modules=skeletons.modules(),
        tied=skeletons.tied,
        defaults=defaults,
        unloaded=tuple(skeletons.unloaded()),
    )


def _default(value: Any) -> str | None:
    """What stands for an entry in formulas; 0 for what is not there."""
    if value is None or isinstance(value, bool | int):
        return str(int(value or 0))
    return "[]" if isinstance(value, list) else None
