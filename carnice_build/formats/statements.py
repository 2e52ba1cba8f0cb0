"""Reading what a config states, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from carnice_build.formats.folder import section
from carnice_build.formats.scheme import Scheme


def names(value: object) -> list[str]:
    """A list of names, empty when it is something else."""
    return [str(item) for item in value] if isinstance(value, list) else []


def statements(where: str, stated: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """What `where` states otherwise than is wanted."""
    for key, value in wanted.items():
        if stated.get(key) != value:
            yield f"{where} states {key} {stated.get(key)!r} instead of {value!r}"


def states(stated: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """True when all that is wanted is stated."""
    return not any(statements("", stated, wanted))


def only_group(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights' scheme in `quantization_config`, empty when there is not one for all modules."""
    groups = section(section(config, "quantization_config"), "config_groups")
    if len(groups) != 1:
        return {}
    return section(section(groups, next(iter(groups))), "weights")


def as_scheme(stated: Mapping[str, Any], bits: str = "num_bits") -> Scheme | None:
    """The scheme that a config states, the width under the key `bits`; None when it is none."""
    width, group = stated.get(bits), stated.get("group_size")
    if type(width) is not int or not (group is None or (type(group) is int and group > 0)):
        return None
    return Scheme(width, group, "float" if stated.get("type") == "float" else "int")
