"""Formulas of family tables: a small part of Python's expressions, over the entries of a config.

Numbers, comparisons, `and`, `or`, `not`, `x if y else z`, `in`, indices, and the functions `min`,
`max`, `len`, `int`, `sqrt` and `log`.  Nothing else is understood, so a formula can neither run
code nor take long: what comes from a config is never multiplied unless it is a number.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

MOST_CHARACTERS = 400
_MOST = 2**80
"""No product of sizes comes near it."""


class Scope(Protocol):
    """Where a formula finds what its names stand for."""

    def value(self, name: str) -> Any:
        """What `name` stands for; an error that says what was expected when there is none."""


class FormulaError(ValueError):
    """A formula is not one, or has no value here."""


_Compiled = Callable[[Scope], Any]

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "len": len,
    "int": int,
    "sqrt": math.sqrt,
    "log": math.log,
}


@cache
def compiled(text: str) -> _Compiled:
    """The formula `text`; FormulaError when it is none."""
    if len(text) > MOST_CHARACTERS:
        raise FormulaError(f"has more than {MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _compile(tree.body)
    except RecursionError:
        raise FormulaError("nests too deeply") from None
    except FormulaError:
        raise
    except (SyntaxError, ValueError, MemoryError):
        raise FormulaError("is no formula") from None


def evaluate(text: str, scope: Scope) -> Any:
    """The value of formula `text`; FormulaError when it has none, and what `scope` raises."""
    try:
        return compiled(text)(scope)
    except ZeroDivisionError:
        raise FormulaError("divides by zero") from None
    except RecursionError:
        raise FormulaError("nests too deeply") from None
    except (TypeError, LookupError, ValueError, OverflowError) as error:
        if isinstance(error, FormulaError):
            raise
        raise FormulaError(f"has no value: {error}") from None


def _compile(node: ast.expr) -> _Compiled:
    for kind, make in _NODES.items():
        if isinstance(node, kind):
            return make(node)
    raise FormulaError(f"cannot hold {type(node).__name__.lower()}")


def _constant(node: ast.Constant) -> _Compiled:
    value = node.value
    if not (value is None or isinstance(value, bool | int | float | str)):
        raise FormulaError(f"cannot hold {value!r}")
    return lambda _: value


def _name(node: ast.Name) -> _Compiled:
    name = node.id
    return lambda scope: scope.value(name)


def _dotted(node: ast.Attribute) -> _Compiled:
    if not isinstance(node.value, ast.Name):
        raise FormulaError("may have one dot in a name")
    name = f"{node.value.id}.{node.attr}"
    return lambda scope: scope.value(name)


def _number(value: Any) -> Any:
    # Text times a number, or filled in by `%`, could take all memory.
    if not isinstance(value, int | float) or abs(value) > _MOST:
        raise FormulaError(f"cannot count with {value!r}"[:80])
    return value


def _binary(node: ast.BinOp) -> _Compiled:
    if type(node.op) not in _ARITHMETIC:
        raise FormulaError(f"cannot hold {type(node.op).__name__.lower()}")
    apply = _ARITHMETIC[type(node.op)]
    left, right = _compile(node.left), _compile(node.right)
    return lambda scope: _number(apply(_number(left(scope)), _number(right(scope))))


def _unary(node: ast.UnaryOp) -> _Compiled:
    inner = _compile(node.operand)
    if isinstance(node.op, ast.Not):
        return lambda scope: not inner(scope)
    if isinstance(node.op, ast.USub):
        return lambda scope: -_number(inner(scope))
    raise FormulaError(f"cannot hold {type(node.op).__name__.lower()}")


def _boolean(node: ast.BoolOp) -> _Compiled:
    parts = [_compile(item) for item in node.values]
    stop_at = isinstance(node.op, ast.Or)

    def value(scope: Scope) -> Any:
        found: Any = None
        for part in parts:
            found = part(scope)
            if bool(found) is stop_at:
                break
        return found

    return value


def _comparison(node: ast.Compare) -> _Compiled:
    first = _compile(node.left)
    rest = [
        (_COMPARISONS[type(op)], _compile(item))
        for op, item in zip(node.ops, node.comparators, strict=True)
        if type(op) in _COMPARISONS
    ]
    if len(rest) < len(node.ops):
        raise FormulaError("cannot hold such a comparison")

    def value(scope: Scope) -> bool:
        left = first(scope)
        for compare, item in rest:
            right = item(scope)
            if not compare(left, right):
                return False
            left = right
        return True

    return value


def _choice(node: ast.IfExp) -> _Compiled:
    test, then, other = (_compile(item) for item in (node.test, node.body, node.orelse))
    return lambda scope: then(scope) if test(scope) else other(scope)


def _index(node: ast.Subscript) -> _Compiled:
    items, index = _compile(node.value), _compile(node.slice)
    return lambda scope: items(scope)[index(scope)]


def _list(node: ast.List | ast.Tuple) -> _Compiled:
    items = [_compile(item) for item in node.elts]
    return lambda scope: [_plain(item(scope)) for item in items]


def _plain(value: Any) -> Any:
    # Lists of lists of lists, each made of one that was made before, could not be compared.
    if isinstance(value, list | dict):
        raise FormulaError("cannot hold a list in a list")
    return value


def _call(node: ast.Call) -> _Compiled:
    if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
        raise FormulaError(f"may call {', '.join(_FUNCTIONS)} and nothing else")
    function = _FUNCTIONS[node.func.id]
    arguments = [_compile(item) for item in node.args]
    return lambda scope: function(*(item(scope) for item in arguments))


_NODES: Mapping[Any, Callable[[Any], _Compiled]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _dotted,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.Compare: _comparison,
    ast.IfExp: _choice,
    ast.Subscript: _index,
    (ast.List, ast.Tuple): _list,
    ast.Call: _call,
}


@cache
def names_in(text: str) -> frozenset[str]:
    """The names that formula `text` asks for."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    sections = {name.partition(".")[0] for name in found}
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        if isinstance(node, ast.Name) and node.id not in sections and node.id not in _FUNCTIONS:
            found.add(node.id)
    return frozenset(found)
