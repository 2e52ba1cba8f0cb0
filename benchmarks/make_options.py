"""Make the tables of options: what the servers' own parsers take.

    python benchmarks/make_options.py vllm      # in an environment with vLLM, its CPU build will do
    python benchmarks/make_options.py mlx-lm    # in one with mlx-lm

Each writes `carnice_build/serving/data/options/PROGRAM-VERSION.json`, by which recipes and profiles
are checked where the server is not installed.
It imports nothing of ours, for the environments of servers lack what ours has.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "carnice_build" / "serving" / "data" / "options"

_PLAIN = {bool: "switch", int: "int", float: "float", str: "text", dict: "section"}
_PARSERS = {
    "int": ["int"],
    "float": ["float"],
    "str": ["text"],
    "loads": ["section"],
    "parse_dataclass": ["section"],
    "union_dict_and_str": ["section", "text"],
    "human_readable_int": ["size"],
    "human_readable_int_or_auto": ["size"],
    "_parse_size": ["size"],
}
_LISTS = (list, set, tuple, frozenset, typing.Sequence)


def main(program: str) -> None:
    """Write the table of `program`."""
    release, options = _PROGRAMS[program]()
    lines = [f"{json.dumps(name)}: {json.dumps(options[name])}" for name in sorted(options)]
    head = json.dumps({"program": program, "version": release})[:-1]
    text = head + ', "options": {\n' + ",\n".join(lines) + "\n}}\n"
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{program}-{release}.json").write_text(text, encoding="utf-8")


def _mlx_lm() -> tuple[str, dict[str, Any]]:
    """The options of `mlx_lm.server`, whose parser lives as long as its `main` parses."""
    from mlx_lm import server

    class Parsing(Exception):
        """Carries the parser out."""

    def stop(parser: argparse.ArgumentParser) -> None:
        raise Parsing(parser)

    parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop
    try:
        server.main()
    except Parsing as caught:
        (parser,) = caught.args
    finally:
        argparse.ArgumentParser.parse_args = parse
    return version("mlx-lm"), dict(_options(parser, {}))


def _vllm() -> tuple[str, dict[str, Any]]:
    """The options of `vllm serve`, and the names that its registries know."""
    # Their wheels are for other builds of torch than the CPU's, and the parser needs none of them.
    sys.modules.update(dict.fromkeys(("torchvision", "torchaudio", "torchcodec")))
    import vllm
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    hints = {field.name: field.type for field in dataclasses.fields(AsyncEngineArgs)}
    hints |= typing.get_type_hints(FrontendArgs)
    sections = typing.get_type_hints(VllmConfig)
    hints |= {name: sections[name] for name in hints.keys() & sections.keys()}
    internal = {kind for hint in sections.values() for kind in _members(hint) if _is_class(kind)}
    options = dict(_options(make_arg_parser(FlexibleArgumentParser()), hints, internal))
    for option, names in {
        "load-format": _LOAD_FORMAT_TO_MODEL_LOADER,
        "quantization": QUANTIZATION_METHODS,
        "reasoning-parser": ReasoningParserManager.list_registered(),
        "tool-call-parser": ToolParserManager.list_registered(),
    }.items():
        options[option]["choices"] = sorted(names)
    return vllm.__version__, options


_PROGRAMS: Mapping[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "mlx-lm": _mlx_lm,
    "vllm": _vllm,
}


def _options(
    parser: argparse.ArgumentParser, hints: Mapping[str, Any], internal: Set[type] = frozenset()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parser's options by name; `hints` say more of some, by destination."""
    for action in parser._actions:
        names = [name[2:] for name in action.option_strings if name.startswith("--")]
        if not names or "help" in names:
            continue
        hint = hints.get(action.dest)
        fact: dict[str, Any] = {"types": _types(action), **_names(action, names)}
        if action.nargs in ("+", "*"):
            fact["many"] = True
        fact |= _choices(action, hint)
        default = action.default
        if isinstance(default, enum.Enum):
            default = default.name.lower()
        if isinstance(default, bool | int | float | str) and default != argparse.SUPPRESS:
            fact["default"] = default
        if fact["types"][0] == "section" and (section := _section(action, hint)):
            fact["keys"] = dict(_keys(section, internal))
        yield names[0], fact


def _names(action: argparse.Action, names: list[str]) -> dict[str, Any]:
    """The other names of an option: its opposite, what means the same, what has one dash."""
    opposite = isinstance(action, argparse.BooleanOptionalAction)
    off = f"no-{names[0]}" if opposite else None
    aliases = [name for name in names[1:] if name != off]
    short = [text for text in action.option_strings if not text.startswith("--")]
    found = {"off": off, "aliases": aliases, "short": short}
    return {key: value for key, value in found.items() if value}


def _types(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return ["switch"]
    parse = action.type
    # `optional_type` and `parse_type` of vLLM wrap the function that counts.
    while getattr(parse, "__closure__", None) and parse.__name__ in (
        "_optional_type",
        "_parse_type",
    ):
        parse = parse.__closure__[0].cell_contents
    return _PARSERS.get(getattr(parse, "__name__", "str"), ["text"])


def _choices(action: argparse.Action, hint: Any) -> dict[str, Any]:
    """What an option takes; where a plugin could add to it, what there is without."""
    listed = action.choices or (action.metavar if isinstance(action.metavar, list) else None)
    if listed:
        return {"choices": [item for item in listed if item is not None]}
    if getattr(action.type, "__name__", "") == "human_readable_int_or_auto":
        return {"also": ["auto", "-1"]}
    return _enum_choices(_members(hint))


def _section(action: argparse.Action, hint: Any) -> type | None:
    """The dataclass that an option's JSON becomes."""
    found = [kind for kind in _members(hint) if _is_class(kind)]
    # `parse_dataclass` of vLLM holds it as a default.
    found += [item for item in getattr(action.type, "__defaults__", None) or () if _is_class(item)]
    return found[0] if found else None


def _keys(section: type, internal: Set[type]) -> Iterator[tuple[str, dict[str, Any]]]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        members = list(_members(hints[field.name]))
        made = bool(internal & {_kind(member) for member in members})
        if field.init and not made and not field.name.startswith("_"):
            yield field.name, _key(members)


def _key(members: list[Any]) -> dict[str, Any]:
    """What a key of a section takes; no types where it could be anything."""
    fact: dict[str, Any] = _enum_choices(members)
    types_found = {"text", "int"} if fact else set()
    for member in members:
        kind = typing.get_origin(member) or member
        if kind is typing.Literal:
            values = typing.get_args(member)
            types_found |= {_PLAIN[type(value)] for value in values}
            if str not in members:
                fact["choices"] = sorted({*fact.get("choices", ()), *values}, key=str)
        elif kind in _PLAIN:
            types_found.add(_PLAIN[kind])
        elif kind in _LISTS:
            types_found.add("list")
        elif _is_class(kind):
            types_found.add("section")
        elif kind is not type(None) and not _is_enum(kind):
            return {"types": []}
    return {"types": sorted(types_found), **fact}


def _enum_choices(members: typing.Iterable[Any]) -> dict[str, Any]:
    names: set[Any] = set()
    for kind in filter(_is_enum, members):
        for item in kind:
            names.add(item.name.lower())
            if isinstance(item.value, int) and not isinstance(item.value, bool):
                names.add(item.value)
            elif isinstance(item.value, str) and "." not in item.value:
                names.add(item.value.lower())
    # Enums are read by the names of their members, in any case.
    return {"choices": sorted(names - {""}, key=str), "folded": True} if names else {}


def _members(hint: Any) -> Iterator[Any]:
    """The types that a hint allows."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType):
        for item in typing.get_args(hint):
            yield from _members(item)
    else:
        yield hint


def _kind(member: Any) -> Any:
    return typing.get_origin(member) or member


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


if __name__ == "__main__":
    main(sys.argv[1])
