"""Launches worked out: the profile's data, the folder's facts and the recipe's changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from carnice_build.errors import PlanError, nearest
from carnice_build.recipe.serve import (
    FlagValue,
    HardwareChange,
    LaunchChange,
    Scalar,
    ServeSpec,
    is_model_name,
)
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.options import misfit
from carnice_build.serving.profile import (
    Engine,
    Flag,
    Hardware,
    LaunchData,
    ServingProfile,
    Variable,
    load_engine,
)
from carnice_build.units import plural

_UNCHANGED = LaunchChange.model_validate({})

_ALLOWED = "one that `carnice_build/serving/data/engines.yaml` lists"


OVERRIDE = "override-generation-config"
"""The option that says how to sample, over what `SOURCE` gives."""

SOURCE = "generation-config"
"""The option that says where sampling comes from, left out for the folder's own file."""


@dataclass(frozen=True)
class Option:
    """An option as it is written; `True` stands for one without a value."""

    value: FlagValue
    reason: str | None
    load_bearing: bool

    @property
    def text(self) -> str | None:
        """The argument after the option's name, None where there is none."""
        return None if self.value is True else _as_argument(self.value)


@dataclass(frozen=True)
class Launch:
    """One way to serve the folder, with every value known.

    `data` is what the profile says of it, `changed` the options and variables that the recipe set.
    """

    name: str
    data: LaunchData
    profile: ServingProfile
    engine: Engine
    image: str | None
    port: int
    hardware: Hardware | None
    served_name: str
    model_file: str | None
    flags: Mapping[str, Option]
    env: Mapping[str, Variable]
    changed: frozenset[str]

    def path(self, *parts: str) -> tuple[str, ...]:
        """The place in the recipe's section of something in this launch."""
        return ("launches", self.name, *parts)

    def arguments(self, model: str) -> list[str]:
        """The arguments after the engine's command, to serve the folder `model`."""
        option = self.engine.model_option
        served = f"{model}/{self.model_file}" if self.model_file else model
        found = [option, served] if option else [served]
        if self.served_name != model:
            found += [f"--{self.engine.words.name}", self.served_name]
        for name, flag in self.flags.items():
            text = f"{model}/{flag.text}" if name in self.engine.files else flag.text
            found += [f"--{name}"] if text is None else [f"--{name}", text]
        return found


def resolve_launches(spec: ServeSpec, facts: ServingFacts) -> tuple[Launch, ...]:
    """The launches of a recipe's section for a folder; not yet held against any rule.

    PlanError names what the profile or the engine does not know, or what follows from the folder.
    """
    profile = facts.profiles.get(spec.profile)
    fitting = [name for name in facts.profiles if facts.profiles[name].fits(facts.schemes)]
    if profile is None:
        raise PlanError(
            f"there is no serving profile {spec.profile!r} for {facts.quantization}",
            expected=" or ".join(fitting) or None,
            nearest=nearest(spec.profile, fitting),
            at=("profile",),
        )
    if spec.profile not in fitting:
        raise PlanError(
            f"the profile {spec.profile!r} is for {' or '.join(profile.schemes)}, "
            f"and this folder is in {' and '.join(facts.schemes)}",
            expected=" or ".join(fitting) or None,
            at=("profile",),
        )
    if not is_model_name(facts.repo):
        raise PlanError(f"the repository {facts.repo!r} is no name that a command can take")
    names = [
        name
        for name, data in profile.launches.items()
        if data.only_if is None or getattr(facts, data.only_if)
    ]
    for name in spec.launches:
        if name not in names:
            raise PlanError(
                f"the profile {spec.profile!r} has no launch {name!r}"
                + (" for this folder" if name in profile.launches else ""),
                expected=" or ".join(names),
                nearest=nearest(name, names),
                at=("launches", name),
            )
    return tuple(
        _launch(name, profile, spec.launches.get(name, _UNCHANGED), spec, facts) for name in names
    )


def _launch(
    name: str, profile: ServingProfile, change: LaunchChange, spec: ServeSpec, facts: ServingFacts
) -> Launch:
    data = profile.launches[name]
    engine = load_engine(data.engine)
    flags: dict[str, Option] = {}
    for flag, item in data.flags.items():
        value = _value(item, profile, facts)
        if value is not None and value is not False:
            flags[flag] = Option(value, item.reason, item.load_bearing)
    for flag, value in change.flags.items():
        at = ("launches", name, "flags", flag)
        _check_option(flag, value, engine, facts, at)
        _change(flags, flag, value)
    _state_sampling(flags, change.flags, engine, facts)
    for flag, option in flags.items():
        at = ("launches", name, *(("flags", flag) if flag in change.flags else ()))
        _check_value(flag, option.value, engine, at)
    return Launch(
        name=name,
        data=data,
        profile=profile,
        engine=engine,
        image=change.image or data.image,
        port=change.port or data.port,
        hardware=_hardware(data.hardware, change.hardware),
        served_name=spec.served_name or facts.repo,
        model_file=facts.model_file,
        flags=flags,
        env=_environment(data.env, change.env),
        changed=frozenset([*change.flags, *(f"env.{variable}" for variable in change.env)]),
    )


def _value(flag: Flag, profile: ServingProfile, facts: ServingFacts) -> FlagValue | None:
    if flag.only_if and not getattr(facts, flag.only_if):
        return None
    if flag.fact is None:
        return flag.value
    if flag.fact == "tools":
        return facts.tool_call_parser is not None
    value: str | int | bool | None = getattr(facts, flag.fact)
    return profile.parsers.get(str(value), value) if flag.fact == "tool_call_parser" else value


def _check_option(
    flag: str, value: FlagValue, engine: Engine, facts: ServingFacts, at: tuple[str, ...]
) -> None:
    """PlanError where a recipe cannot set the option."""
    if flag in engine.reserved:
        raise PlanError(f"{flag} is not set by hand: {engine.reserved[flag]}", at=at)
    if flag in engine.retired:
        retired = engine.retired[flag]
        raise PlanError(
            f"{engine.release} has no option {flag}, which went with {retired.since}",
            expected=retired.instead,
            at=at,
        )
    known = [*engine.options, *engine.own_options]
    if flag not in known and engine.fact(flag):
        raise PlanError(f"{flag} is no option that a recipe sets", expected=_ALLOWED, at=at)
    if flag not in known:
        near = nearest(flag, known)
        raise PlanError(f"{engine.release} has no option {flag!r}", nearest=near, at=at)
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        raise PlanError(f"{flag} is JSON in a text", expected="keys and values", at=at)
    if flag == "speculative-config" and value is not False and not facts.has_mtp:
        raise PlanError("the folder has no MTP head to draft with", at=at)


def _check_value(flag: str, value: FlagValue, engine: Engine, at: tuple[str, ...]) -> None:
    """PlanError where the engine's parser would not take the option's value."""
    fact = engine.fact(flag)
    if fact is None:
        raise PlanError(f"{engine.release} has no option {flag!r}", at=at)
    if found := misfit(flag, value, fact, engine.own_choices.get(flag, ())):
        raise found.error(at)


def _change(flags: dict[str, Option], flag: str, value: FlagValue) -> None:
    old = flags.get(flag)
    if value is False:
        flags.pop(flag, None)
        return
    reason = "set by the recipe"
    if old is not None:
        if isinstance(old.value, dict) and isinstance(value, dict):
            value = {**old.value, **value}
        reason += f"; the profile has {old.text or 'it without a value'}"
        reason += f": {old.reason}" if old.reason else ""
    flags[flag] = Option(value, reason, load_bearing=False)


def sampling_of_folder(
    flags: Mapping[str, Option], facts: ServingFacts
) -> Mapping[str, int | float]:
    """What an engine with these options takes from the folder's generation_config.json.

    Or from the model's own file, which has it from there.
    """
    source = flags.get(SOURCE)
    return facts.packaged_sampling if source is None or source.value == "auto" else {}


def _state_sampling(
    flags: dict[str, Option],
    changes: Mapping[str, FlagValue],
    engine: Engine,
    facts: ServingFacts,
) -> None:
    """Set what the card states of sampling and the folder's own file does not.

    Unless the profile or the recipe speaks of the option itself.
    """
    own = sampling_of_folder(flags, facts)
    missing: dict[str, Scalar | list[Scalar]] = {
        name: item for name, item in facts.stated_sampling.items() if own.get(name) != item
    }
    reason = "what the recipe says of sampling, and the folder's generation_config.json does not"
    if engine.sampling:
        for name, value in missing.items():
            option = engine.sampling.get(name)
            if option and option not in flags and option not in changes:
                assert not isinstance(value, list)
                flags[option] = Option(value, reason, load_bearing=False)
        return
    if not missing or OVERRIDE in flags or OVERRIDE in changes:
        return
    flags[OVERRIDE] = Option(missing, reason, load_bearing=False)


def _hardware(given: Hardware | None, change: HardwareChange) -> Hardware | None:
    changes = change.model_dump(exclude_none=True)
    if not changes:
        return given
    old = given.model_dump() if given else {"cards": 1}
    values = {**old, **changes}
    memory = f" of {values['vram']:g} GiB" if values.get("vram") else ""
    return Hardware(**{**values, "name": plural(values["cards"], "card") + memory})


def _environment(
    given: Mapping[str, Variable], changes: Mapping[str, Scalar]
) -> dict[str, Variable]:
    changed = {
        name: Variable(value=_as_argument(value), reason="set by the recipe")
        for name, value in changes.items()
    }
    merged = {**given, **changed}
    return {name: item for name, item in merged.items() if changes.get(name) is not False}


def _as_argument(value: FlagValue) -> str:
    if isinstance(value, dict):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def setting(launch: Launch, key: str, facts: ServingFacts) -> Any:
    """The value of a setting as rules name it, the engine's default where it is left out."""
    kind, _, name = key.partition(".")
    if kind == "env":
        return launch.env[name].value if name in launch.env else None
    if kind == "hardware":
        return getattr(launch.hardware, name, None)
    if key == "fact.weights_gb":
        return facts.weights_bytes / 1e9
    if kind == "fact":
        return getattr(facts, name)
    engine = launch.engine
    default = engine.defaults.get(key, engine.parser.default(key))
    option = launch.flags.get(kind)
    if key == engine.words.context and (option is None or option.value == default):
        return facts.max_positions
    if option is None:
        return default
    if not name:
        return option.value
    return option.value.get(name, default) if isinstance(option.value, dict) else default
