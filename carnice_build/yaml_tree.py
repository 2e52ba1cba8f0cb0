"""YAML as a tree that remembers where everything stands, within limits that nobody needs.

PyYAML's composer gives nodes with marks but expands nothing; values are made here, so that
size, depth, aliases and duplicate keys are checked before anything grows.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from carnice_build.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_NUMBER = 2**63
_MAX_LITERAL = 40

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:binary")
# Line ends and tabs are text; what else is below space, or in C1, drives terminals.
_CONTROL = frozenset(map(chr, (*range(32), *range(127, 160)))) - set("\t\n\r")

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A value and the place it was written, as `file:line:column` or as the override's text."""

    value: Scalar | dict[str, Node] | list[Node]
    where: str

    def plain(self) -> Any:
        """The value as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def find(self, path: Iterable[str | int]) -> Node:
        """The node at `path`, or the nearest one above it that exists."""
        node = self
        for part in path:
            value = node.value
            if isinstance(value, dict) and part in value:
                node = value[str(part)]
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                node = value[part]
            else:
                break
        return node


def read_tree(path: Path, name: str | None = None) -> Node:
    """Parse the YAML file `path`; RecipeError with file:line:column when it is not acceptable.

    `name` is what places and errors call the file.
    """
    name = name or str(path)
    try:
        # A pipe would wait for ever, a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RecipeError("is not a file", where=name)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError("is larger than 1 MB", where=name)
        text = content.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the file: {error.strerror}", where=name) from None
    except UnicodeDecodeError:
        raise RecipeError("is not UTF-8 text", where=name) from None
    return parse_tree(text, name)


def parse_tree(text: str, name: str, fixed_where: str | None = None) -> Node:
    """Parse YAML `text`; places are `name:line:column`, or `fixed_where` when that is given."""
    try:
        _check_limits(text, name, fixed_where)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = fixed_where or (f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name)
        raise RecipeError(f"is not valid YAML: {error.problem}", where=where) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"is not valid YAML: {error}", where=fixed_where or name) from None
    except UnicodeEncodeError:
        raise RecipeError("is not Unicode text", where=fixed_where or name) from None
    if root is None:
        return Node(None, fixed_where or name)
    return _Converter(name, fixed_where).convert(root, 0)


def _check_limits(text: str, name: str, fixed_where: str | None) -> None:
    """Refuse depth and size before libyaml's composer, which recurses in C, overflows the stack."""
    try:
        _count_events(text, name, fixed_where, _Loader)
    except yaml.YAMLError:
        # libyaml reads ahead and has a limit of its own to depth, of which it tells first.
        # PyYAML's parser in Python has none, and stops at ours.
        with suppress(yaml.YAMLError):
            _count_events(text, name, fixed_where, yaml.SafeLoader)
        raise


def _count_events(text: str, name: str, fixed_where: str | None, loader: Any) -> None:
    depth = count = 0
    for event in yaml.parse(text, Loader=loader):
        count += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH + 1:
            problem = f"is nested more than {MAX_DEPTH} deep"
        elif count > 2 * MAX_NODES:  # keys are nodes as well
            problem = f"holds more than {MAX_NODES} values"
        else:
            continue
        line = event.start_mark.line + 1 if event.start_mark else 1
        raise RecipeError(problem, where=fixed_where or f"{name}:{line}")


class _Converter:
    """Turns composed YAML nodes into `Node`s, counting as it goes."""

    def __init__(self, name: str, fixed_where: str | None) -> None:
        self._name = name
        self._fixed_where = fixed_where
        self._count = 0
        self._constructor = yaml.constructor.SafeConstructor()

    def _where(self, node: yaml.Node) -> str:
        if self._fixed_where:
            return self._fixed_where
        return f"{self._name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def convert(self, node: yaml.Node, depth: int) -> Node:
        where = self._where(node)
        self._count += 1
        # An alias is the same node again, so a bomb shows up here as a count.
        if self._count > MAX_NODES:
            raise RecipeError(f"holds more than {MAX_NODES} values", where=where)
        if depth > MAX_DEPTH:
            raise RecipeError(f"is nested more than {MAX_DEPTH} deep", where=where)
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTION_TAGS:
            raise RecipeError(f"has the tag {node.tag!r}", where=where, expected="plain YAML")
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, depth), where)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, depth + 1) for item in node.value], where)
        return Node(self._scalar(node, where), where)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        table: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self._where(key_node)
            key = self._scalar(key_node, where) if _is_scalar(key_node) else None
            if not isinstance(key, str):
                raise RecipeError("has a key that is not text", where=where)
            if key in table:
                raise RecipeError(f"has the key {key!r} twice", where=where)
            table[key] = self.convert(value_node, depth + 1)
        return table

    def _scalar(self, node: yaml.Node, where: str) -> Scalar:
        if node.tag not in _TEXT_TAGS and len(node.value) > _MAX_LITERAL:
            raise RecipeError(f"{node.value!r} is too long for a number", where=where)
        try:
            value: object = self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError):
            # PyYAML's constructors trip over their own feet on `!!int ''` or `!!bool x`.
            raise RecipeError(f"cannot read the value {node.value!r}", where=where) from None
        if value is not None and not isinstance(value, str | int | float | bool):
            # Dates and binaries: the author meant text.
            return str(node.value)
        if isinstance(value, str) and not _CONTROL.isdisjoint(value):
            raise RecipeError(f"{value!r} holds a control character", where=where)
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{node.value!r} is not a finite number", where=where)
        if isinstance(value, int) and abs(value) >= MAX_NUMBER:
            raise RecipeError(f"{node.value!r} is too large a number", where=where)
        return value


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)
