"""llama.cpp's name for how a tokenizer splits a text before it merges pairs.

llama.cpp has the ways of splitting in its own code, each by a name; its converter knows the name
of a tokenizer by a hash of what it does to one text, so that a tokenizer that nobody listed has
none.  Here the regexes of tokenizer.json themselves are looked up, in `pre_tokenizers.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from carnice_build.errors import PlanError, nearest
from carnice_build.formats.gguf.tokenizer_file import NAME, TokenizerFile
from carnice_build.recipe.schema import Strict
from carnice_build.yaml_tree import read_tree

TABLE = Path(__file__).with_name("pre_tokenizers.yaml")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = "spaces as \u2581"
_LETTERS = "bytes as letters"


class Name(Strict):
    """A name of llama.cpp for a way of splitting."""

    families: list[str] = Field(
        default_factory=list, description="Globs of the `model_type`s that it is the name for."
    )
    whole_words: bool = Field(
        False, description="A word that is a token is one, whatever merges say (`ignore_merges`)."
    )


class Way(Strict):
    """A way of splitting: regexes, each applied to the pieces that the one before it leaves."""

    spaces: bool = Field(False, description="Spaces are first written as U+2581.")
    regexes: list[str] = Field(
        description="As tokenizer.json files have them; see `canonical`. What follows `bytes as"
        " letters` is applied to the letters that stand for the bytes of a text."
    )
    names: dict[str, Name] = Field(description="The first is taken where nothing else decides.")


class Table(Strict):
    """All ways that are known, and the names for which no regexes are."""

    ways: list[Way]
    others: list[str]


@cache
def table() -> Table:
    """The table of `pre_tokenizers.yaml`."""
    return Table.model_validate(read_tree(TABLE).plain())


def names() -> list[str]:
    """Every name that llama.cpp knows."""
    return [*(name for way in table().ways for name in way.names), *table().others]


def checked(name: str) -> str:
    """`name`, which a recipe gives; PlanError when llama.cpp does not know it."""
    if name not in names():
        raise PlanError(
            f"llama.cpp has no pre-tokenizer {name!r}",
            expected="one of its names, as llama-bpe or qwen2",
            nearest=nearest(name, names()),
            at=("tokenizer_pre",),
        )
    return name


def recognised(read: TokenizerFile, model_type: str) -> str:
    """The name for what a tokenizer does; PlanError when none is known for its regexes.

    Of several names for one way, the family's own is taken, then one that treats whole words as
    the tokenizer does.
    """
    done = tuple(steps(read.content))
    for way in table().ways:
        if done == _done(way):
            whole = read.model.get("ignore_merges") is True
            return min(way.names, key=lambda name: _rank(way.names[name], model_type, whole))
    raise PlanError(
        f"splits texts as no pre-tokenizer of llama.cpp that is known: {_shown(done)}",
        where=NAME,
        expected="`tokenizer_pre:` in the recipe, with llama.cpp's name for it",
        nearest=_nearest(done),
    )


def steps(content: Mapping[str, Any]) -> Iterator[str]:
    """What is done to a text before pairs are merged, each as a regex whose matches stand alone.

    Anything else is a word that no way has.
    """
    for kind, step in _flat(content.get("normalizer"), "normalizers"):
        if kind == "Replace" and step.get("content") == "\u2581":
            yield _SPACES if step.get("pattern") == {"String": " "} else "Replace"
        elif kind != "NFC":
            # llama.cpp composes no letters; texts mostly come composed, and it is let pass.
            yield f"normalizer {kind}"
    letters = False
    for kind, step in _flat(content.get("pre_tokenizer"), "pretokenizers"):
        if letters:
            yield _LETTERS
        yield from _pre_steps(kind, step)
        letters = kind == "ByteLevel"
    model = content.get("model")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        # What pairs are merged with in some models, and llama.cpp knows nothing of.
        if isinstance(model, dict) and model.get(key):
            yield f"{key} {str(model[key])[:20]!r}"


def _pre_steps(kind: str, step: Mapping[str, Any]) -> Iterator[str]:
    behaviour = step.get("behavior", "Isolated")
    if kind == "ByteLevel":
        if step.get("add_prefix_space", True):
            yield "a space before the text"
        if step.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits":
        yield r"\p{N}" if step.get("individual_digits", False) else r"\p{N}+"
    elif kind == "Punctuation" and behaviour in ("Isolated", "Contiguous"):
        yield _PUNCTUATION + ("+" if behaviour == "Contiguous" else "")
    elif kind == "Split":
        yield from _split(step)
    else:
        yield f"pre_tokenizer {kind}"


def _split(step: Mapping[str, Any]) -> Iterator[str]:
    pattern = step.get("pattern")
    pattern = pattern if isinstance(pattern, dict) else {}
    regex, text = pattern.get("Regex"), pattern.get("String")
    behaviour, inverted = step.get("behavior"), step.get("invert", False)
    if text == " " and behaviour == "MergedWithPrevious":
        # It stands after spaces were replaced, where there are none.
        return
    alone = behaviour == "Isolated" or (behaviour == "Removed" and inverted is True)
    found = regex if isinstance(regex, str) else re.escape(text) if isinstance(text, str) else None
    if alone and found is not None:
        yield canonical(found)
    else:
        yield f"Split {behaviour} at {found}"


def canonical(regex: str) -> str:
    """A regex as the table has it, without what only writes the same in other letters.

    Possessive quantifiers become greedy ones: llama.cpp has no others, and what follows them in
    these regexes cannot match what they gave back.
    """
    for letter, written in (("\r", r"\r"), ("\n", r"\n"), ("\t", r"\t")):
        regex = regex.replace(letter, written)
    for other in (
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        "'(?i:[sdmt]|ll|ve|re)",
        "(?i:'[sdmt]|'ll|'ve|'re)",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?i)'s|'t|'re|'ve|'m|'ll|'d",
    ):
        regex = regex.replace(other, _CONTRACTIONS)
    for other, ours in (("?+", "?"), ("++", "+"), (r"\p{N}{1}", r"\p{N}"), (r"\/", "/")):
        regex = regex.replace(other, ours)
    return regex


def _flat(step: Any, inside: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The steps of a normalizer or a pre-tokenizer, which are one or a sequence."""
    if step is None:
        return
    table = step if isinstance(step, dict) else {}
    listed = table.get(inside)
    if table.get("type") == "Sequence" and isinstance(listed, list):
        for entry in listed:
            nested = entry if isinstance(entry, dict) else {}
            yield str(nested.get("type")), nested
    else:
        yield str(table.get("type")), table


@cache
def _known() -> dict[tuple[str, ...], str]:
    return {_done(way): next(iter(way.names)) for way in table().ways}


def _done(way: Way) -> tuple[str, ...]:
    return (*([_SPACES] if way.spaces else ()), *way.regexes)


def _rank(name: Name, model_type: str, whole: bool) -> tuple[bool, bool]:
    """What sorts the best name first; of equals the first in the table wins."""
    ours = any(fnmatchcase(model_type, family) for family in name.families)
    return not ours, name.whole_words != whole


def _nearest(done: tuple[str, ...]) -> str | None:
    known = {" then ".join(way): name for way, name in _known().items()}
    found = nearest(" then ".join(done), known)
    return known[found] if found else None


def _shown(done: tuple[str, ...]) -> str:
    return ", then ".join(done) or "not at all"
