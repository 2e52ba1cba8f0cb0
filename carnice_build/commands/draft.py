"""The text of a first recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import yaml

from carnice_build.planning.repair import Repair
from carnice_build.recipe.presets import PREFIX

_WIDTH = 98


@dataclass(frozen=True)
class Section:
    """A section of a recipe that has little: its entries, one a line, each with why it is so."""

    name: str
    entries: Mapping[str, Any]
    why: Mapping[str, str]


@dataclass(frozen=True)
class Draft:
    """A recipe to be written: what it extends, its sources, its steps, and other sections.

    `title` and `about`, sentences, are for whoever reads it.
    """

    title: str
    variant: str
    preset: str
    about: Sequence[str]
    sources: Section
    steps: Sequence[Repair]
    others: Sequence[Section]

    def saying(self, name: str, entries: Mapping[str, Any], why: Mapping[str, str]) -> Draft:
        """The recipe with more in a section; what is appended to a list anyway grows."""
        others = {section.name: section for section in self.others}
        old = others.get(name, Section(name, {}, {}))
        both = entries.keys() & old.entries.keys()
        grown = {
            key: [
                *old.entries[key],
                *(item for item in entries[key] if item not in old.entries[key]),
            ]
            for key in both
        }
        whys = {key: f"{old.why[key]}; {why[key]}" for key in both}
        new = Section(name, {**old.entries, **entries, **grown}, {**old.why, **why, **whys})
        if name in others:
            others[name] = new
        else:
            others = {name: new, **others}
        return replace(self, others=list(others.values()))

    def text(self) -> str:
        """The recipe as YAML."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"# {self.title}, written by `carnice new`."
        for sentence in self.about:
            yield from _wrapped(sentence, "# - ", "#   ")
        yield ""
        yield f"extends: {PREFIX}{self.preset}"
        yield ""
        yield f"variant: {self.variant}"
        yield from _section(self.sources)
        if self.steps:
            yield ""
            yield "steps:"
            for step in self.steps:
                yield from _comment(step.why)
                yield f"  - {step.kind}: {_flow(step.params)}"
        for section in self.others:
            yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    yield ""
    yield f"{section.name}:"
    for key, value in section.entries.items():
        yield from _comment(section.why.get(key, ""))
        yield f"  {key}: {_flow(value)}"


def _comment(sentence: str) -> Iterator[str]:
    if sentence:
        capital = sentence[0].upper() if sentence.partition(" ")[0].isalpha() else sentence[0]
        yield from _wrapped(f"{capital}{sentence[1:]}.", "  # ", "  # ")


def _wrapped(text: str, first: str, later: str) -> list[str]:
    # YAML ends a comment at more characters than Python ends a line.
    return wrap(
        "".join(char if char.isprintable() else "?" for char in text),
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flow(value: Any) -> str:
    """A value on one line, as a person would write it."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=2**20, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n...\n").rstrip("\n")
