"""Formulas that numbers follow from: products and sums of entries that explain all samples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

_FACTORS = (1, 2, 3, 4)
_MOST_NAMES = 6

Vector = tuple[int, ...]


def fit(
    targets: Sequence[int], scopes: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> str | None:
    """The simplest formula over `names` that gives each target in its scope; None for none.

    A number when all targets are equal.
    """
    target = tuple(targets)
    if len(set(target)) == 1 and not names:
        return str(target[0])
    vectors = {name: vector for name in names if (vector := _vector(name, scopes))}
    for terms in (_simple(target, vectors), _doubled(target, vectors), _tripled(target, vectors)):
        if terms is not None:
            return terms
    return str(target[0]) if len(set(target)) == 1 else None


def _vector(name: str, scopes: Sequence[Mapping[str, Any]]) -> Vector | None:
    values = [scope.get(name) for scope in scopes]
    numbers = [value for value in values if type(value) is int and value > 0]
    return tuple(numbers) if len(numbers) == len(values) else None


def _monomials(
    vectors: Mapping[str, Vector], degree: int, *, quotients: bool = True
) -> Iterator[tuple[str, Vector]]:
    """Products of up to `degree` entries, or quotients that leave no rest, simplest first."""
    atoms = dict(vectors)
    if quotients and len(vectors) <= _MOST_NAMES:
        for one, two in ((a, b) for a in vectors for b in vectors if a != b):
            pairs = list(zip(vectors[one], vectors[two], strict=True))
            if all(a % b == 0 for a, b in pairs):
                atoms[f"({one} // {two})"] = tuple(a // b for a, b in pairs)
    for count in range(1, degree + 1):
        for chosen in combinations_with_replacement(atoms, count):
            product = [1] * len(next(iter(vectors.values())))
            for name in chosen:
                product = [a * b for a, b in zip(product, atoms[name], strict=True)]
            for factor in _FACTORS:
                text = " * ".join(chosen if factor == 1 else (str(factor), *chosen))
                yield text, tuple(factor * value for value in product)


def _simple(target: Vector, vectors: Mapping[str, Vector]) -> str | None:
    if not vectors:
        return None
    for text, vector in _monomials(vectors, 3):
        if vector == target:
            return text[1:-1] if re.fullmatch(r"\([^()]*\)", text) else text
    return None


def _doubled(target: Vector, vectors: Mapping[str, Vector]) -> str | None:
    if not vectors:
        return None
    seen: dict[Vector, str] = {}
    for text, vector in _monomials(vectors, 3, quotients=len(vectors) <= 3):
        rest = tuple(a - b for a, b in zip(target, vector, strict=True))
        if rest in seen:
            return f"{seen[rest]} + {text}"
        seen.setdefault(vector, text)
    return None


def _tripled(target: Vector, vectors: Mapping[str, Vector]) -> str | None:
    if not vectors or len(vectors) > _MOST_NAMES:
        return None
    terms = list(_monomials(vectors, 2, quotients=False))
    seen = {vector: text for text, vector in reversed(terms)}
    for index, (one, first) in enumerate(terms):
        for two, second in terms[index:]:
            rest = tuple(a - b - c for a, b, c in zip(target, first, second, strict=True))
            if rest in seen:
                return f"{one} + {two} + {seen[rest]}"
    return None
