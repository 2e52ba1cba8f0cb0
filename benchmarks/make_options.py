"""Make the tables of options: what the servers' own parsers take.

    python benchmarks/make_options.py vllm      # in an environment with vLLM, its CPU build will do
    python benchmarks/make_options.py mlx-lm    # in one with mlx-lm
    python benchmarks/make_options.py llama-server b11434   # with that build of it on PATH

Each writes `carnice_build/serving/data/options/PROGRAM-VERSION.json`, by which recipes and profiles
are checked where the server is not installed.
It imports nothing of ours, for the environments of servers lack what ours has.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Set
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
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


def main(program: str, named: str | None = None) -> None:
    """Write the table of `program`, whose release is `named` where it cannot tell."""
    release, options = _PROGRAMS[program]()
    release = named or release
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


def _llama_server() -> tuple[str, dict[str, Any]]:
    """The options of `llama-server`: their names by its help, what they take by asking it.

    A build from a source archive does not know its number.
    """
    usage = _asked("--help").stdout
    options: dict[str, Any] = {}
    for entry in re.split(r"\n(?=-)", usage):
        head, _, text = entry.partition("\n")
        found = re.match(r"-[\w.-]+(?:, +-[\w.-]+)*", head)
        if found is None or head.startswith("-----") or "has been removed" in entry:
            continue
        names = found[0].replace(",", "").split()
        # What the value is called comes next; what the option is for, two columns on at least.
        rest = head[found.end() :]
        value, _, said = ("" if rest.startswith("  ") else rest.strip()).partition("  ")
        on = [name for name in names if not name.startswith("--no-")] or names
        short = [name for name in on if not name.startswith("--")]
        long = [name[2:] for name in on if name.startswith("--")]
        if long[0] in ("help", "version"):
            continue
        if len(on) < len(names):
            # An opposite may be short, too, and then stands before its long name.
            first = next(index for index, name in enumerate(names) if name not in on)
            short = [name for name in short if names[first - 1] != name or first == 1]
        off = [name[2:] for name in names if name not in on]
        about = re.sub(r"\s+", " ", f"{said} {rest} {text}")
        fact: dict[str, Any] = (
            _taken(f"--{long[0]}", value, about) if value else {"types": ["switch"]}
        )
        more = {"off": next(iter(off), None), "aliases": long[1:], "short": short}
        options[long[0]] = {
            **fact,
            **{key: item for key, item in more.items() if item},
            **_default(about, fact),
        }
    (release,) = re.findall(r"version: (\S+)", _asked("--version").stderr)
    return release, options


def _asked(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Some options open the file that they are given before anything else is read.
    with TemporaryDirectory() as folder:
        return subprocess.run(
            ["llama-server", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


def _takes(option: str, value: str) -> bool:
    """Whether the parser takes it: with `--help` after it, nothing else happens."""
    return _asked(option, value, "--help").returncode == 0


def _taken(option: str, value: str, about: str) -> dict[str, Any]:
    """What an option takes, of which the help calls the value `value`."""
    refused = _asked(option, "x", "--help")
    if refused.returncode == 0:
        return {"types": ["text"]}
    words = re.findall(r"'([a-z][\w-]*)'|(?<= - )([a-z][\w+-]*):|(?<=default: )([a-z]+)\)", about)
    words = [word for pair in words for word in pair if word]
    for function, kind in {"stoi": "int", "stof": "float", "stod": "float"}.items():
        if function in refused.stderr:
            if not _takes(option, "1,x"):
                # Every part is a number, and there may be several.
                return {"types": ["text"]}
            also = [word for word in dict.fromkeys(words) if _takes(option, word)]
            return {"types": [kind], **({"also": also} if also else {})}
    if _takes(option, "{}"):
        return {"types": ["section"]}
    listed = re.search(r"allowed values: ([\w, .-]+)", about)
    names = re.split(r"[,|]", value.strip("{}[]<>")) + (listed[1].split(",") if listed else words)
    taken = [name for name in dict.fromkeys(map(str.strip, names)) if name and _takes(option, name)]
    return {"types": ["text"], **({"choices": taken} if len(taken) > 1 else {})}


def _default(about: str, fact: Mapping[str, Any]) -> dict[str, Any]:
    found = re.search(r"default: '?([\w.-]+)", about)
    if found is None:
        return {}
    (kind,), text = fact["types"], found[1]
    if kind == "switch" and text in ("enabled", "true", "disabled", "false"):
        return {"default": text in ("enabled", "true")}
    if kind in ("int", "float") and re.fullmatch(r"-?\d+(\.\d+)?", text):
        return {"default": {"int": int, "float": float}[kind](text)}
    return {"default": text} if text in (*fact.get("choices", ()), *fact.get("also", ())) else {}


_PROGRAMS: Mapping[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "llama-server": _llama_server,
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
    main(*sys.argv[1:])
