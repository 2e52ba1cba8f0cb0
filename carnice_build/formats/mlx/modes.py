"""How MLX stores a quantized module: its modes, what each leaves to choose, and who chooses it.

`affine` has bits and groups of several sizes; the others have one of each, codes that are floats,
and no biases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from carnice_build.errors import PlanError
from carnice_build.formats.base import OP
from carnice_build.formats.rules import Rule, Settings
from carnice_build.formats.scheme import Scheme

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]

AFFINE = "affine"
"""The mode of a module of which nothing else is said."""

MODES: Mapping[str, tuple[Collection[int], Collection[int]]] = {
    AFFINE: ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""What MLX has kernels for: bits and group sizes, by mode."""

_AFFINE_DEFAULTS = {"group_size": 64, "bits": 4}
"""What mlx takes where a module is said to be affine, and no more."""

_KNOBS = ("group_size", "bits")

Bits = Literal[2, 3, 4, 5, 6, 8]
GroupSize = Literal[16, 32, 64, 128]


class ModeRule(Rule):
    """How the modules that the rule is about are stored."""

    mode: Mode | None = Field(
        None,
        description="Their mode, from which bits and group size follow as far as the rule does not "
        "say them.",
    )
    bits: Bits | None = Field(None, description="Bits per weight.")
    group_size: GroupSize | None = Field(None, description="Weights that share a scale.")

    @field_validator(*_KNOBS)
    @classmethod
    def _fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        return fitting(value, info)


def fitting(value: int | None, info: ValidationInfo) -> int | None:
    """`bits` or `group_size` as they are; ValueError where the `mode` beside them has others."""
    mode = info.data.get("mode")
    if mode is not None and (why := contradiction(mode, str(info.field_name), value)):
        raise ValueError(why)
    return value


def contradiction(mode: str, knob: str, value: int | None) -> str | None:
    """Why a mode cannot have this `bits` or `group_size`; None where it can, or nothing is said."""
    bits, groups = MODES[mode]
    has = groups if knob == "group_size" else bits
    if value is None or value in has:
        return None
    *others, last = map(str, has)
    numbers = f"{', '.join(others)} or {last}" if others else last
    what = f"groups of {numbers}" if knob == "group_size" else f"{numbers} bits"
    return f"mode {mode} has {what}, not {value}"


def defaults(mode: str) -> dict[str, int]:
    """The group size and bits of a mode where nothing is said of them."""
    if mode == AFFINE:
        return dict(_AFFINE_DEFAULTS)
    (bits,), (group,) = MODES[mode]
    return {"group_size": group, "bits": bits}


def chosen(
    whole: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    rules: Sequence[tuple[int, ModeRule]],
) -> Settings | None:
    """`mode`, `group_size` and `bits` of a module; None when the last word is to skip it.

    They are the recipe's, `whole`, then what the model's `own` code says (which is of mode affine
    where it names none), then what rules say in turn.  Of another mode than before, what is not
    said is what the recipe has for that mode, or its defaults.
    Raises PlanError, at the rule, for what the mode that a module has then does not have.
    """
    state = _Choice(whole)
    if own:
        state.change(own.get("mode", AFFINE), own, None)
    skip = False
    for index, rule in rules:
        skip = rule.skip
        said = {name: value for name in _KNOBS if (value := getattr(rule, name)) is not None}
        state.change(rule.mode, said, ("rules", index))
    return None if skip else Settings(state.values, state.causes)


class _Choice:
    """Settings on their way, and which entry of the recipe said each."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self.values = dict(whole)
        self.causes: dict[str, tuple[str | int, ...]] = {OP: ("mode",)}
        self.causes |= {name: (name,) for name in _told(whole["mode"])}

    def change(
        self, mode: str | None, said: Mapping[str, Any], at: tuple[str | int, ...] | None
    ) -> None:
        """Take what is said, by the recipe's entry `at`, or by nobody in it."""
        if mode is not None and mode != self.values["mode"]:
            own = self._whole if mode == self._whole["mode"] else defaults(mode)
            self.values = {**own, "mode": mode}
            names = (OP, *_told(mode))
            self.causes = {} if at is None else dict.fromkeys(names, (*at, "mode"))
        mode = self.values["mode"]
        for name in _KNOBS:
            if name not in said:
                continue
            if why := contradiction(mode, name, said[name]):
                raise PlanError(why, expected="a `mode` in this rule", at=(*(at or ()), name))
            self.values[name] = said[name]
            if mode == AFFINE:
                self.causes.pop(name, None)
                if at is not None:
                    self.causes[name] = (*at, name)


def parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an action is told of settings: all that their mode leaves to choose."""
    return {name: values[name] for name in _told(values["mode"])}


def _told(mode: str) -> tuple[str, ...]:
    return _KNOBS if mode == AFFINE else ("mode",)


def scheme_of(values: Mapping[str, Any]) -> Scheme:
    """What such settings store."""
    mode = values["mode"]
    if mode == AFFINE:
        return Scheme(values["bits"], values["group_size"])
    return Scheme(values["bits"], values["group_size"], "float", mode.upper())


def mode_of(scheme: Scheme) -> str:
    """The mode of what `scheme_of` made."""
    return AFFINE if scheme.name is None else scheme.name.lower()
