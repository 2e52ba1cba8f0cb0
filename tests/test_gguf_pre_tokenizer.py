"""How a tokenizer splits texts is recognised by its own regexes, and is what llama.cpp does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from vocabularies import Made, byte_level, cases, made, regexes, source, split_by

from carnice_build.errors import PlanError
from carnice_build.formats.gguf.pre_tokenizer import Way, canonical, names, table

LETTERS = "bytes as letters"

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

WRITTEN = [
    ("gpt-4o", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
    ("qwen2", "'(?i:[sdmt]|ll|ve|re)"),
    ("qwen35", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"),
]
"""Ways to write English endings that tokenizer.json files have."""

TEXT = (
    "It's 3.14, I'LL take 12345 of x = 1;\r\n\t  the Ωmega \u00e9t\u00e9 caf\u00e9s. "
    "\u6211\u60f3\u5728 apple \u5de5\u4f5c1314 \ud55c\uae00\uff01 \u043d\u0435\u0449\u043e  \n\n  "
    "def f(a_b):\n    return '''x''' != \"y\"\u2026 \U0001f680 ------==== "
)

MARKS = "\u0e01\u0e33\u0e25\u0e31\u0e07  "
"""A word with marks on its letters, as most of South Asia writes."""


def tokenizer(pre_tokenizer: Any, model_type: str = "qwen3_5", **model: Any) -> Made:
    """A folder of a family whose tokenizer splits texts so."""
    content = byte_level("<end>")
    content["pre_tokenizer"] = pre_tokenizer
    content["model"] |= model
    return made(content, "Qwen3_5ForCausalLM", model_type, 262)


def pre(folder: Made) -> str:
    """The name that is written."""
    return str(folder.metadata()["tokenizer.ggml.pre"].value)


@pytest.mark.parametrize("way", table().ways, ids=lambda way: next(iter(way.names)))
def test_the_first_name_is_that_of_the_regexes(way: Way) -> None:
    """A family that has no name of its own has the first of those that split as it does."""
    if way.spaces or LETTERS in way.regexes:
        pytest.skip("is split otherwise than by regexes alone")
    first = next(iter(way.names))
    whole = way.names[first].whole_words
    assert first == pre(tokenizer(split_by(way.regexes), "another", ignore_merges=whole))
    assert way.regexes == [canonical(found) for found in way.regexes]


def test_no_two_ways_are_one() -> None:
    """Every name and every list of regexes stands once."""
    ways = [(way.spaces, *way.regexes) for way in table().ways]
    assert len(ways) == len(set(ways))
    assert len(names()) == len(set(names()))


@pytest.mark.parametrize(
    ("model_type", "whole", "name"),
    [
        ("llama", True, "llama-bpe"),
        ("glm4_moe", False, "glm4"),
        ("mistral3", True, "pixtral"),
        ("another", True, "llama-bpe"),
        ("another", False, "dbrx"),
    ],
)
def test_of_several_names_the_familys_own_is_taken(model_type: str, whole: bool, name: str) -> None:
    """Then one that treats words that are tokens as the tokenizer does."""
    steps = split_by(regexes("llama-bpe"))
    folder = tokenizer(steps, "another", ignore_merges=whole)
    if model_type == "glm4_moe":
        folder = cases()["glm4_moe"]
    elif model_type != "another":
        folder = Made(folder.files, "", model_type, config=folder.config)
    assert name == pre(folder)


@pytest.mark.parametrize(("name", "endings"), WRITTEN)
def test_a_regex_may_be_written_in_other_ways(name: str, endings: str) -> None:
    """Endings, line ends and possessive quantifiers do the same however they are written."""
    (found,) = regexes(name)
    other = found.replace(CONTRACTIONS, endings).replace(r"[\r\n]*", "[\r\n]*")
    other = other.replace(r"\p{N}]?", r"\p{N}]?+").replace(r"\p{N}]+", r"\p{N}]++")
    assert other != found
    assert pre(tokenizer(split_by([found]))) == pre(tokenizer(split_by([other])))


def test_digits_and_bytes_are_regexes_too() -> None:
    """Steps with names of their own do what a regex would."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, last]}
    assert "gpt-2" == pre(tokenizer(last))
    assert "starcoder" == pre(tokenizer(both))
    punctuation = {"type": "Punctuation", "behavior": "Contiguous"}
    three = {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated"}
    steps = [punctuation, last, {"type": "Digits", "individual_digits": False}, three]
    assert "falcon" == pre(tokenizer({"type": "Sequence", "pretokenizers": steps}))


@pytest.mark.parametrize(
    "steps",
    [
        split_by([r"\w+"]),
        split_by([regexes("qwen2")[0] + "|x"]),
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "MergedWithNext"},
        None,
        [],
        {"type": "Sequence", "pretokenizers": 7},
        {"type": "Sequence", "pretokenizers": [None, {"type": []}]},
        {"type": "Split", "pattern": ["x"], "behavior": {}},
    ],
)
def test_another_way_is_told_with_its_regexes(steps: Any) -> None:
    """It says what the tokenizer does, and that a recipe can name one."""
    with pytest.raises(
        PlanError, match=r"splits texts as no pre-tokenizer.*tokenizer_pre:"
    ) as error:
        tokenizer(steps).metadata()
    assert error.value.where == "tokenizer.json"
    assert "gpt-2" == tokenizer(steps).metadata("gpt-2")["tokenizer.ggml.pre"].value


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_marks_that_pairs_are_merged_with_are_another_way(key: str) -> None:
    """llama.cpp merges without them, and would split words otherwise; an empty one is none."""
    known = byte_level("<end>")

    assert "qwen2" == pre(tokenizer(known["pre_tokenizer"], "qwen2", **{key: ""}))
    with pytest.raises(PlanError, match=f"{key} '</w>'"):
        tokenizer(known["pre_tokenizer"], "qwen2", **{key: "</w>"}).metadata()


def test_a_way_that_is_nearly_known_names_the_nearest() -> None:
    """A regex with one letter more is told apart, and its likeliest name is said."""
    with pytest.raises(PlanError) as error:
        tokenizer(split_by([regexes("qwen2")[0] + "|x"])).metadata()
    assert error.value.nearest == "qwen2"


def test_a_name_that_llama_cpp_does_not_know_is_refused() -> None:
    """The recipe's name is looked up before anything is written."""
    with pytest.raises(PlanError, match=r"llama\.cpp has no pre-tokenizer 'qwen-2'") as error:
        cases()["demo"].metadata("qwen-2")
    assert error.value.nearest == "qwen2"
    assert error.value.at == ("tokenizer_pre",)


# What follows holds the table against llama.cpp's source.


@cache
def llama_cpp() -> str:
    """llama.cpp's own code of vocabularies."""
    return (source() / "src" / "llama-vocab.cpp").read_text()


def named_types() -> Mapping[str, str]:
    """The type in its code of every name."""
    found: dict[str, str] = {}
    start = llama_cpp().index('tokenizer_pre == "default"')
    asked = r'((?:\s*tokenizer_pre == "[^"]+"\s*\|?\|?)+)\)\s*\{'
    taken = r"\s*pre_type\s*=\s*LLAMA_VOCAB_PRE_TYPE_(\w+);"
    for names_of, kind in re.findall(asked + taken, llama_cpp()[start - 20 :]):
        found |= dict.fromkeys(re.findall(r'"([^"]+)"', names_of), kind)
    return found


def typed_regexes() -> Mapping[str, list[str]]:
    """The regexes in its code of every type."""
    start = llama_cpp().index("switch (vocab.get_pre_type())")
    body = llama_cpp()[start : llama_cpp().index("default regex for BPE", start)]
    found: dict[str, list[str]] = {}
    for labels, block in re.findall(
        r"((?:\s*case LLAMA_VOCAB_PRE_TYPE_\w+:)+)(.*?)break;", body, re.DOTALL
    ):
        lines = "\n".join(
            line.split("//")[0] if line.lstrip().startswith("//") else line
            for line in block.split("\n")
        )
        texts = [json.loads(text) for text in re.findall(r'"(?:[^"\\]|\\.)*"', lines)]
        found |= dict.fromkeys(re.findall(r"TYPE_(\w+):", labels), texts)
    return found


@pytest.mark.wide
def test_the_names_are_those_of_llama_cpp() -> None:
    """Every name that its code knows stands in the table, and no other."""
    assert sorted({*named_types(), "default"}) == sorted(names())


def pieces(text: str, patterns: list[str]) -> list[str]:
    """A text in the pieces that llama.cpp's regexes leave."""
    found = [text]
    for pattern in patterns:
        found = [piece for whole in found for piece in _alone(pattern, whole)]
    return found


def _alone(pattern: str, text: str) -> Iterator[str]:
    end = 0
    for match in regex.finditer(pattern, text):
        yield from filter(None, (text[end : match.start()], match.group()))
        end = match.end()
    yield from filter(None, [text[end:]])


OWN_CODE = {"kimi-k2": "has code of its own", "superbpe": "splits where nothing is matched"}
OWN_CODE |= {"bloom": "has brackets that are read in two ways", "viking": "as bloom"}
OWN_CODE |= {"deepseek-llm": "keeps numbers whole, of which no two digits are one token"}

MARKS_APART = ("tekken", "gpt-4o")
"""Where it takes marks for no part of a word, though the tokenizers do."""


@pytest.mark.wide
@pytest.mark.parametrize("way", table().ways, ids=lambda way: next(iter(way.names)))
def test_llama_cpp_splits_as_the_regexes_do(way: Way) -> None:
    """A text falls into the same pieces by the table's regexes and by those in its code."""
    first = next(iter(way.names))
    if way.spaces or LETTERS in way.regexes or first in OWN_CODE:
        pytest.skip(OWN_CODE.get(first, "is split otherwise than by regexes alone"))
    types = {named_types()[name] for name in way.names}
    steps = [pre_tokenizers.Split(Regex(found), "isolated") for found in way.regexes]
    text = TEXT + ("" if first in MARKS_APART else MARKS)
    ours = [text for text, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]
    for kind in types:
        assert ours == pieces(text, typed_regexes()[kind])


VOCABULARIES = [
    *("gpt-2", "llama-bpe", "qwen35", "deepseek-coder", "deepseek-llm", "starcoder", "gemma-4"),
]
"""Those that llama.cpp has for its own tests, as GGUF files with texts and their tokens."""


@pytest.mark.wide
@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_give_llama_cpps_tokens(name: str) -> None:
    """The regexes of a name, before the pairs of its own vocabulary, give the tokens it should."""
    folder = source() / "models"
    if not (folder / f"ggml-vocab-{name}.gguf").is_file():
        pytest.skip("llama.cpp's vocabularies are not here")
    whole = _tokenizer(folder / f"ggml-vocab-{name}.gguf")
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    for text, line in zip(texts.split("\n__ggml_vocab_test__\n"), lines, strict=False):
        assert [int(number) for number in line.split()] == whole.encode(text).ids


def _tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of a vocabulary in GGUF that splits as the table says for its name."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    pre = value("pre") if "tokenizer.ggml.pre" in fields else "gemma4"
    way = next(way for way in table().ways if pre in way.names)
    tokens, kinds = value("tokens"), value("token_type")
    vocab = {text: number for number, text in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in value("merges")]
    model = models.BPE(
        vocab, pairs, ignore_merges=way.names[pre].whole_words, byte_fallback=way.spaces
    )
    whole = Tokenizer(model)
    if way.spaces:
        whole.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        steps = [pre_tokenizers.Split(Regex(found), "isolated") for found in way.regexes]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        whole.pre_tokenizer = pre_tokenizers.Sequence([*steps, letters])
    added = [text for text, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)]
    whole.add_tokens([AddedToken(text, normalized=False) for text in added])
    return whole
