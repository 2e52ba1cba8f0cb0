"""Which steps a checkpoint needs before its tensors are those of its model.

What `carnice new` writes into a recipe; the plan of that recipe decides whether it is enough.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.graph import View
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.planning.gather import stored
from carnice_build.planning.unknown import BUFFERS
from carnice_build.recipe.patterns import Patterns, expression
from carnice_build.tensors import STACK, stacks


@dataclass(frozen=True)
class Repair:
    """A step as a recipe has it: its kind, its parameters, and why it is there."""

    kind: str
    params: Mapping[str, Any]
    why: str


def owners(architecture: Architecture, names: Collection[str]) -> dict[str, TensorFact]:
    """The names that a checkpoint with these `names` has for the tensors of its model."""
    facts = architecture.built.values()
    return {name: fact for fact in facts for name in stored(fact, names)[0]}


def renames(view: View, architecture: Architecture) -> list[Repair]:
    """Steps that take prefixes away, or put them before names, until they are the model's."""
    known = owners(architecture, view)
    wanted = {name: name for name in view if name in known}
    wanted |= {
        name: proper
        for name in view
        if name not in known and (proper := _canonical(name, architecture))
    }
    changes = Counter(_prefixes(*pair) for pair in wanted.items() if pair[0] != pair[1])
    changes = Counter(dict(sorted(changes.items(), key=lambda item: (-len(item[0][0]), item[0]))))
    for patterns in (_plain(changes), _telling(changes, wanted)):
        if patterns and _rewritten(wanted, patterns):
            why = "the names of the published files have other prefixes than the model's"
            return [
                Repair("rename", {"from": old, "to": new}, "" if index else why)
                for index, (old, new) in enumerate(patterns)
            ]
    return []


def _canonical(name: str, architecture: Architecture) -> str | None:
    """As `Architecture.canonical_name`, for one of a stack of experts as well."""
    if proper := architecture.canonical_name(name):
        return proper
    for spelled, number in stacks(name).items():
        stack = architecture.canonical_name(spelled)
        if stack is not None and STACK in stack:
            return stack.replace(STACK, str(number))
    return None


def _prefixes(name: str, proper: str) -> tuple[str, str]:
    """What stands before the end that both names have in common, in each of them."""
    old, new = name.split("."), proper.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return "".join(f"{part}." for part in old), "".join(f"{part}." for part in new)


def _plain(changes: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    return [(f"^{re.escape(old)}", new) for old, new in changes if old]


def _telling(
    changes: Mapping[tuple[str, str], int], wanted: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Patterns that look at the next part of the name as well."""
    found = []
    for old, new in changes:
        nexts = {
            name[len(old) :].split(".")[0]
            for name, proper in wanted.items()
            if name != proper and _prefixes(name, proper) == (old, new)
        }
        ahead = "|".join(map(re.escape, sorted(nexts)))
        ahead = f"(?:{ahead})" if len(nexts) > 1 else ahead
        found.append((rf"^{re.escape(old)}(?={ahead}\.)", new))
    return found


def _rewritten(wanted: Mapping[str, str], patterns: Iterable[tuple[str, str]]) -> bool:
    """Whether these patterns, one after another, make of each name what it should be."""
    compiled = [(re.compile(old), new) for old, new in patterns]
    for name, proper in wanted.items():
        for pattern, new in compiled:
            name = pattern.sub(new, name, count=1)
        if name != proper:
            return False
    return True


def leftovers(view: View, architecture: Architecture) -> Iterator[Repair]:
    """Steps that leave out what is no tensor of the model: buffers, and a copy of a tied head."""
    known = owners(architecture, view)
    ends = Counter(name.rpartition(".")[2] for name in view if name not in known)
    for end in sorted(BUFFERS & ends.keys()):
        # A glob covers the whole name, so that of a bare one has no dot.
        match = f"*{end}" if end in view else f"*.{end}"
        params = {"match": match, "expect": ends[end]}
        yield Repair("drop", params, f"{end} is no weight: a model computes it")
    for name, other in architecture.ties.items():
        if name in view:
            why = f"config.json ties {name} to {other}, so it is left out"
            yield Repair("drop", {"match": name, "expect": 1}, why)


def without(part: Part, view: View, architecture: Architecture, why: str) -> list[Repair]:
    """A step that leaves out a part of the model, if the view has it and there is a reason."""
    if not why:
        return []
    known = owners(architecture, view)
    names = [name for name in view if name in known and known[name].part is part]
    return [dropped(names, view, why)] if names else []


def dropped(names: Collection[str], view: View, why: str) -> Repair:
    """A step that leaves out these tensors of the view."""
    found = globs(names, view)
    match: Any = found[0] if len(found) == 1 else found
    return Repair("drop", {"match": match, "expect": len(names)}, why)


def outside(architecture: Architecture, view: View, ignored: str | Sequence[str]) -> list[str]:
    """Patterns for the linears outside of the decoder layers that are not `ignored` already."""
    linears = {
        fact.module: fact
        for name, fact in owners(architecture, view).items()
        if name in view and fact.role is Role.LINEAR
    }
    patterns = Patterns(ignored)
    found = [
        module
        for module, fact in linears.items()
        if fact.part is not Part.LAYERS and not patterns.matches(module)
    ]
    return [expression(glob) for glob in globs(found, linears)]


def globs(names: Collection[str], among: Iterable[str]) -> list[str]:
    """The shortest globs that match these of all names, and no other."""
    others = set(among).difference(names)
    taken = {prefix for name in others for prefix in _paths(name)}
    found: dict[str, None] = {}
    for name in names:
        paths = list(_paths(name))
        shortest = next((path for path in paths if path not in taken), name)
        found[shortest if shortest == name else f"{shortest}.*"] = None
    return list(found)


def with_partners(modules: Collection[str], architecture: Architecture) -> set[str]:
    """These modules and what serving engines run as one with them.

    That are the parts of a fused linear, and all linears of the experts of a layer.
    """
    linears = {fact.module for fact in architecture.tensors.values() if fact.role is Role.LINEAR}
    found = set(modules)
    for fusion in architecture.fusions:
        if not found.isdisjoint(fusion.parts):
            found |= linears.intersection(fusion.parts)
    experts = {module.partition(STACK)[0] for module in found if STACK in module}
    return found | {
        module for module in linears if STACK in module and module.partition(STACK)[0] in experts
    }


def endings(names: Collection[str], among: Iterable[str]) -> list[str]:
    """The shortest globs for ends of paths that match these of all names, and no other."""
    others = set(among).difference(names)
    taken = {end for name in others for end in _ends(name)}
    found: dict[str, None] = {}
    for name in names:
        shortest = next((end for end in _ends(name) if end not in taken), name)
        found[name if shortest == name else f"*.{shortest}"] = None
    return list(found)


def _ends(name: str) -> Iterator[str]:
    """The ends of a path, shortest first; none begins with the place of an expert's number."""
    parts = name.split(".")
    ends = (parts[-length:] for length in range(1, len(parts) + 1))
    return (".".join(end) for end in ends if end[0] != STACK)


def _paths(name: str) -> Iterator[str]:
    """The paths that a name is at or below, shortest first."""
    parts = name.split(".")
    return (".".join(parts[: depth + 1]) for depth in range(len(parts)))
