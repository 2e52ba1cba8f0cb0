"""YAML as a tree that remembers where everything stands, within limits a recipe never needs.

PyYAML's composer gives nodes with marks but expands nothing; values are made here, so that
size, depth, aliases and duplicate keys are checked before anything grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from carnice_build.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 40

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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


def read_tree(path: Path) -> Node:
    """Parse the YAML file `path`; RecipeError with file:line:column when it is not acceptable."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError("is larger than 1 MB", where=str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise RecipeError("is not UTF-8 text", where=str(path)) from None
    return parse_tree(text, str(path))


def parse_tree(text: str, name: str, fixed_where: str | None = None) -> Node:
    """Parse YAML `text`; places are `name:line:column`, or `fixed_where` when that is given."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = fixed_where or (f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name)
        raise RecipeError(f"is not valid YAML: {error.problem}", where=where) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"is not valid YAML: {error}", where=name) from None
    if root is None:
        return Node(None, fixed_where or name)
    return _Converter(name, fixed_where).convert(root, 0)


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
        try:
            value = self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError):
            raise RecipeError(f"cannot read the value {node.value!r}", where=where) from None
        if value is not None and not isinstance(value, str | int | float | bool):
            # Dates and binaries: the author meant text.
            return str(node.value)
        return value


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)
