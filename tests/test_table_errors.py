"""What a family table may not say, and what no config can make of its formulas."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from families import TABLED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zoo import FAMILIES

from carnice_build.errors import CarniceError, CheckpointError, RecipeError
from carnice_build.models import architecture_of, known_types, table_of
from carnice_build.models.base import Passed
from carnice_build.models.formulas import FormulaError, compiled, evaluate
from carnice_build.models.table import FamilyTable
from carnice_build.models.table_file import SHIPPED, TableFile, load_table
from carnice_build.models.table_schema import Bound

TABLE = """\
about: A family.
defaults:
  inner: 2 * hidden_size
values:
  wide: inner + 1
kind: "'full'"
model:
  - {name: embed.weight, part: embed, role: embedding, shape: [8, hidden_size]}
  - {repeat: layers, prefix: 'layers.{}.', rows: layer, part: layers}
blocks:
  layer:
    - {name: norm.weight, role: norm, shape: [hidden_size]}
    - {name: up.weight, role: linear, shape: [wide, hidden_size]}
"""
CONFIG = {"hidden_size": 16, "layers": 2, "name": "text", "many": [1, 2]}


def table(folder: Path, text: str = TABLE, config: Mapping[str, Any] = CONFIG) -> FamilyTable:
    """The table of `text`, evaluated."""
    path = folder / "family.yaml"
    path.write_text(text, encoding="utf-8")
    found = FamilyTable(path, config, "config.json")
    assert found.built
    return found


def test_the_table_of_these_tests_is_one(tmp_path: Path) -> None:
    """Values and defaults follow from what the config states."""
    found = table(tmp_path)

    assert (33, 16) == found.tensors["layers.1.up.weight"].shape


PASSED = """\
passed:
  - {argument: keys, key: kind, made: layer == 0, when: layer > 0, shapes: [[2, length, inner]]}
"""


def test_a_table_says_what_layers_are_given_of_others(tmp_path: Path) -> None:
    """By the last layer before it that makes such, with None for the length of a sample."""
    found = table(tmp_path, TABLE + PASSED)

    assert [] == found.passed(0)
    assert [Passed("keys", ((2, None, 32),), "full", 0)] == found.passed(1)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("made: layer == 0,", "", "`key` and `made` belong together"),
        ("[[2, length, inner]]", "[[2, inner]]", "has 'length' once"),
        ("key: kind, made: layer == 0,", "", None),
        ("[[2, length, inner]]", "[]", "at least 1 item"),
        ("made: layer == 0", "made: layer > 5", "which no layer before it makes"),
        ("length, inner", "length, 0 * inner", "a size of 1 or more"),
    ],
)
def test_what_layers_are_given_has_a_shape_and_a_maker(
    tmp_path: Path, right: str, wrong: str, said: str | None
) -> None:
    """Else the table is refused at its line; what has no key is made of tokens."""
    text = TABLE + PASSED.replace(right, wrong)

    if said is None:
        assert [None] == [item.maker for item in table(tmp_path, text).passed(1)]
    else:
        with pytest.raises(RecipeError, match=rf"family\.yaml:15:\d+.*{said}"):
            table(tmp_path, text).passed(1)


LIES = {
    "a formula that is none": ("shape: [wide,", "shape: [2 *,", 13, "'2 *' is no formula"),
    "one that calls": ("shape: [wide,", "shape: [open(1),", 13, "may call min, max, len, int"),
    "one that reaches out": ("2 * hidden_size", "hidden_size.real.imag", 3, "one dot"),
    "one that is too long": ("2 * hidden_size", "1" + "+1" * 200, 3, "400 characters"),
    "one of text": ("2 * hidden_size", "2 * 'x'", 3, "cannot count with 'x'"),
    "one that divides by zero": ("2 * hidden_size", "hidden_size // 0", 3, "divides by zero"),
    "one that has no such item": ("2 * hidden_size", "many[2]", 3, "has no value"),
    "a size that is none": ("shape: [wide,", "shape: [0 * wide,", 13, "gives 0 for config.json"),
    "a default that is no size": ("2 * hidden_size", "-2 * hidden_size", 3, "gives -32"),
    "a tensor twice": ("name: up.weight", "name: norm.weight", 13, "'layers.0.norm.weight' once"),
    "no such block": ("rows: layer", "rows: layers", 9, "there is no block 'layers'"),
    "no layers": ("part: layers", "part: mtp", 8, "has no decoder layers"),
    "an unknown role": ("role: linear", "role: lineal", 13, "'embedding', 'linear'"),
    "an unknown key": ("kind:", "kinds:", 6, "Extra inputs"),
    "names of rows": ("rows: layer,", "given: {inner: '9'}, rows: layer,", 9, "Extra inputs"),
    "a kind of its own": ("rows: layer,", "kind: \"'full'\", rows: layer,", 9, "of the table"),
    "a kind that is no name": ("\"'full'\"", "layer", 6, "gives 0 for layer 0"),
    "an end that is not there": ("2 * hidden_size", "wide", 3, "'inner' is follows from itself"),
    "modules without a name": ("about:", "modules: {up: []}\nabout:", 1, "modules.up"),
    "another that is not there": ("about:", "extends: other\nabout:", 1, "no table 'other'"),
    "itself": ("about:", "extends: family\nabout:", 1, "extends itself"),
    "another elsewhere": ("about:", "extends: ../other\nabout:", 1, "no table '../other'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_table_that_lies_is_told_where(tmp_path: Path, lie: str) -> None:
    """File and line of the entry, and what is wrong with it."""
    old, new, line, said = LIES[lie]
    assert old in TABLE
    with pytest.raises(RecipeError) as raised:
        table(tmp_path, TABLE.replace(old, new))

    assert f"family.yaml:{line}:" in str(raised.value)
    assert said in str(raised.value)


STACKS = """\
    - name: e.*.gate.weight
      role: linear
      shape: [4, wide, hidden_size]
      fused: {name: e.gate_up, of: 2}
    - name: e.*.up.weight
      role: linear
      shape: [4, inner + 1, hidden_size]
      fused: {name: e.gate_up, part: 1, of: 2}
"""
STACK_LIES = {
    "half of a tensor": ("e.gate_up, part: 1, of: 2", "e.up", 17, "'layers.0.e.gate_up' there are"),
    "the same half twice": ("part: 1", "part: 0", 21, "there are the parts 0, 0"),
    "another number of halves": ("part: 1, of: 2", "part: 1, of: 3", 21, "the parts 0, 1"),
    "a part beyond the last": ("part: 1, of: 2", "part: 2, of: 2", 21, "the parts 0, 2"),
    "stacks of other shapes": ("inner + 1", "inner", 21, "stacks of one shape"),
    "rows in turn and not": ("part: 1, of: 2", "part: 1, of: 2, turns: true", 21, "all of it"),
    "no stack": ("e.*.up", "e.up", 21, "'layers.0.e.up.weight' is no stack"),
}


def test_stacks_are_all_of_a_tensor(tmp_path: Path) -> None:
    """Such as gate and up."""
    found = table(tmp_path, TABLE + STACKS)

    assert (0, 1) == tuple(
        fact.fused.part for fact in found.built.values() if fact.fused and fact.layer == 1
    )


@pytest.mark.parametrize("lie", STACK_LIES)
def test_a_table_that_would_lose_experts_is_told_where(tmp_path: Path, lie: str) -> None:
    """What no stack takes of a fused tensor would be lost, and what two take be there twice."""
    old, new, line, said = STACK_LIES[lie]
    assert old in STACKS
    with pytest.raises(RecipeError) as raised:
        table(tmp_path, TABLE + STACKS.replace(old, new))

    assert f"family.yaml:{line}:" in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": "16"},
        {"hidden_size": 0},
        {"hidden_size": 2**40},
        {"hidden_size": True},
        {"hidden_size": [16]},
        {"layers": 0},
        {"layers": 10**6},
        {"layers": "2"},
        {"inner": "x"},
    ],
    ids=str,
)
def test_a_config_that_lies_is_told_by_its_entry(
    tmp_path: Path, entries: dict[str, object]
) -> None:
    """The table is right, so that the error is of the config."""
    (name,) = entries
    with pytest.raises(CheckpointError, match=f"config.json: config entry {name} is"):
        table(tmp_path, config={**CONFIG, **entries})


def test_a_list_of_layers_is_as_long_as_the_model(tmp_path: Path) -> None:
    """What each layer is, the config says for all of them."""
    text = TABLE.replace("\"'full'\"", "names[layer]")
    with pytest.raises(CheckpointError, match=r"config entry names is .* expected 2 entries"):
        table(tmp_path, text, {**CONFIG, "names": ["full"]})


def test_a_table_of_ones_own_comes_first_and_may_extend_ours(tmp_path: Path) -> None:
    """What it does not say is taken from the other, block by block."""
    (tmp_path / "family.yaml").write_text("about: Mine.\nextends: llama\ndefaults: {head_dim: 4}\n")
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = FamilyTable(tmp_path / "family.yaml", config, "config.json")

    assert (8, 16) == found.tensors["model.layers.0.self_attn.q_proj.weight"].shape


def test_what_is_extended_must_be_a_table(tmp_path: Path) -> None:
    """A list is told where it stands."""
    (tmp_path / "other.yaml").write_text("- about: Mine.\n")
    (tmp_path / "family.yaml").write_text("about: Mine.\nextends: other\n")
    with pytest.raises(RecipeError, match=r"other\.yaml:1:1: is no table"):
        FamilyTable(tmp_path / "family.yaml", CONFIG, "config.json")


# --- names beside the rows ------------------------------------------------------------------------

MISSPELT = {
    "a norm": ("smoothing: [{smooth: nrm, balance: [up]}]", 14, "smoothing.0.smooth", "norm"),
    "nothing to smooth": ("smoothing: [{smooth: '', balance: [up]}]", 14, "no row has ''", None),
    "what it balances": ("smoothing: [{smooth: norm, balance: [upp]}]", 14, "'upp'", "up"),
    "a norm that it balances": ("smoothing: [{smooth: norm, balance: [norm]}]", 14, "linear", None),
    "no balance": ("smoothing: [{smooth: norm, balance: []}]", 14, "at least 1 item", None),
    "inputs": ("inputs: [[up, upp]]", 14, "inputs.0.1: no row has 'upp'", "up"),
    "a part of a fusion": ("fusions: {a.b: [no.such, up]}", 14, "fusions.a.b.0", None),
    "a beginning": ("modules: {layer.: other.}", 14, "modules.layer.: no row", "layers."),
    "a glob": ("narrow: ['*.ups.weight']", 14, "narrow.0: no row has '*.ups.weight'", None),
}


@pytest.mark.parametrize("kind", MISSPELT)
def test_what_a_table_names_is_in_one_of_its_rows(tmp_path: Path, kind: str) -> None:
    """Else it would be left out in silence."""
    text, line, said, near = MISSPELT[kind]
    with pytest.raises(RecipeError) as raised:
        table(tmp_path, TABLE + text + "\n")

    assert f"family.yaml:{line}:" in str(raised.value)
    assert said in str(raised.value)
    assert near is None or f"did you mean '{near}'?" in str(raised.value)


NAMED = """\
smoothing: [{smooth: norm, balance: [up]}, {smooth: up, balance: [up]}]
inputs: [[up]]
fusions: {a.b: [up, up]}
modules: {layers.: model., embed: model.embed}
narrow: ['*.up.weight', 'layers.1.up.weight']
"""


def test_rows_may_be_off(tmp_path: Path) -> None:
    """A config that has them not makes no name wrong; nor does a number that only others have."""
    off = TABLE.replace("name: up.weight,", "name: up.weight, when: layer > 9,")
    found = table(tmp_path, off + NAMED)

    assert 2 == len(found.smoothing)


def test_what_is_taken_of_another_table_may_be_of_its_rows(tmp_path: Path) -> None:
    """Even of a block that is another here: what is not there is not smoothed."""
    (tmp_path / "other.yaml").write_text(TABLE + NAMED)
    blocks = "blocks: {layer: [{name: norm.weight, role: norm, shape: [8]}]}\n"
    found = table(tmp_path, f"about: Mine.\nextends: other\n{blocks}")

    assert ["layers.0.norm.weight", "layers.1.norm.weight"] == [*found.tensors][1:]


SIZES = """\
    - {name: gate_up.weight, role: linear, shape: [2 * wide, hidden_size]}
    - {name: down.weight, role: linear, shape: [hidden_size, wide]}
    - {name: e.*.up.weight, role: linear, shape: [4, wide, hidden_size]}
    - {name: e.*.down.weight, role: linear, shape: [4, hidden_size, wide]}
"""


@pytest.mark.parametrize(
    ("smooth", "balance", "fits"),
    [
        ("norm", "up", True),
        ("norm", "up, e.*.up", True),
        ("up", "down", True),
        ("gate_up", "down", True),
        ("e.*.up", "e.*.down", True),
        ("norm", "down", False),
        ("norm", "up, down", False),
        ("down", "down", False),
        ("up", "up", False),
        ("e.*.up", "down", False),
    ],
)
def test_what_is_smoothed_fits_what_balances_it(
    tmp_path: Path, smooth: str, balance: str, fits: bool
) -> None:
    """The table's line is told at the plan, before anything is calibrated."""
    text = f"{TABLE}{SIZES}smoothing: [{{smooth: {smooth}, balance: [{balance}]}}]\n"
    found = table(tmp_path, text)
    if fits:
        assert 1 == len(found.smoothing)
    else:
        with pytest.raises(RecipeError, match=r"family\.yaml:18:\d+: .* do not fit"):
            assert found.smoothing


# --- bounds ---------------------------------------------------------------------------------------


def bounds_of(name: str) -> Sequence[Bound]:
    """Those of the table of a family of the zoo."""
    path = table_of(FAMILIES[name].model_type)
    return load_table(path).table.bounds if path else []


BOUNDED = [name for name in TABLED if bounds_of(name) and name != "gemma4"]


@pytest.mark.parametrize("wrong", [0, 10_001, -1, 1.5, "2", True])
@pytest.mark.parametrize("name", BOUNDED)
def test_entries_that_fit_no_experts_are_told(name: str, wrong: object) -> None:
    """Experts of a token, and of groups, are held against how many there are."""
    family = FAMILIES[name]
    for bound in bounds_of(name):
        config = json.loads(json.dumps({**family.config, "model_type": family.model_type}))
        text = config.get("text_config", config)
        text[bound.entry] = wrong
        with pytest.raises(CheckpointError, match=f"config entry {bound.entry} is {wrong!r}"):
            architecture_of(config, "config.json")


def test_every_family_with_experts_has_bounds() -> None:
    """And no other."""
    stacked = {
        name
        for name in known_types()
        if any("*" in row.name for block in loaded(name).table.blocks.values() for row in block)
    }

    assert stacked == {name for name in known_types() if loaded(name).table.bounds}


def loaded(name: str) -> TableFile:
    """The table of a type that ships."""
    return load_table(SHIPPED / f"{name}.yaml")


def test_where_there_are_no_experts_none_are_chosen() -> None:
    """Gemma 4 has entries for them that say nothing."""
    config = {**FAMILIES["gemma4"].config, "model_type": "gemma4"}

    assert architecture_of(config, "config.json").tensors


# --- formulas -------------------------------------------------------------------------------------

HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(max_size=20)
    | st.just("9" * 5000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
NAMES = ("a", "b", "c")
ATOMS = st.sampled_from([*NAMES, "0", "1", "-3", "2.5", "10 ** 9", "'x'", "None", "a.b", "[]"])
OPERATORS = ["+", "-", "*", "//", "/", "%", "**", "<<", "<", "==", "in", "and", "or"]
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(
            lambda parts: "({} {} {})".format(*parts)
        ),
        st.tuples(inner, inner).map(lambda parts: "{}[{}]".format(*parts)),
        st.tuples(inner, inner, inner).map(lambda parts: "({} if {} else {})".format(*parts)),
        st.tuples(st.sampled_from(["min", "max", "len", "int", "not ", "-", "print"]), inner).map(
            lambda parts: "{}({})".format(*parts)
        ),
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
    ),
    max_leaves=12,
)


class Names:
    """A scope of names, which counts what it is asked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def value(self, name: str) -> Any:
        if name not in self.values:
            raise FormulaError("has no such name")
        return self.values[name]


@settings(max_examples=400)
@given(EXPRESSIONS, st.fixed_dictionaries(dict.fromkeys(NAMES, HOSTILE)))
@example("a * 10 ** 9", {"a": "x"})
@example("int(a)", {"a": float("inf")})
@example("a % b", {"a": "%999999999d", "b": 1})
@example("a == b", {"a": [[1]] * 3, "b": [[1]] * 3})
def test_a_formula_has_a_value_or_says_that_it_has_none(text: str, values: dict[str, Any]) -> None:
    """Whatever a config holds, nothing else is raised, and no number grows without bounds."""
    try:
        found = evaluate(text, Names(values))
    except FormulaError:
        return

    assert not isinstance(found, int) or abs(found) <= 2**80 or found in _integers(values)


def _integers(value: Any) -> list[int]:
    """The numbers that a config states, and those that its texts spell."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in _integers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _integers(item)]
    if isinstance(value, int):
        return [value]
    if isinstance(value, float):
        return [int(value)] if math.isfinite(value) else []
    text = str(value)
    return [int(text)] if text.isdecimal() and len(text) < sys.get_int_max_str_digits() else []


@given(st.text(max_size=60))
def test_no_text_is_more_than_a_formula(text: str) -> None:
    """It is one that these names suffice for, or none at all."""
    try:
        compiled(text)
    except FormulaError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__bases__[0].__subclasses__()",
        "[x for x in range(9)]",
        "(lambda: 1)()",
        "f'{a}'",
        "a := 1",
        "2 ** 99999999",
        "1 << 99999999",
        "len(*a)",
        "max(a, key=len)",
        "a[1:2]",
        "a.b.c",
        "b'x'",
        "1j",
        "...",
        "await a",
        "{1: 2}",
    ],
)
def test_what_is_no_formula_never_runs(text: str) -> None:
    """Calls of anything but four functions, attributes, comprehensions, powers: all are refused."""
    with pytest.raises(FormulaError):
        evaluate(text, Names({"a": [1, 2], "b": 1}))


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("family", TABLED)
def test_no_config_makes_a_table_that_ships_fail_otherwise(family: str, data: Any) -> None:
    """Entries that hold anything, or are missing: the model is known, or one sentence says why."""
    entry = FAMILIES[family]
    config = {"model_type": entry.model_type, **json.loads(json.dumps(entry.config))}
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sections))
        name = data.draw(st.sampled_from(sorted(section)))
        if name != "model_type":
            section[name] = data.draw(HOSTILE)
    try:
        architecture = architecture_of(config, "config.json")
        found = (architecture.tensors, architecture.fusions, architecture.smoothing)
        found += (architecture.kv_geometry, architecture.published_config(set()))
        found += (architecture.shared_inputs(0), architecture.text_config)
        found += tuple(architecture.passed(layer) for layer in range(architecture.num_layers))
    except CarniceError as error:
        assert len(str(error)) < 10_000
    else:
        assert all(item is not None for item in found)


@pytest.mark.parametrize("model_type", known_types())
def test_a_bare_config_is_a_model_or_one_sentence(model_type: str) -> None:
    """With a type and nothing else: defaults fill what is missing, or it is told."""
    try:
        found = architecture_of({"model_type": model_type}, "config.json")
    except CarniceError as error:
        assert "config.json: " in str(error)
    else:
        assert found.tensors


def test_tables_that_ship_are_files_of_their_own() -> None:
    """The folder holds tables, each under the name of a model type."""
    assert {path.stem for path in SHIPPED.iterdir()} == set(known_types())


@pytest.mark.parametrize("key", ["reader", "drafter"])
def test_a_table_cannot_name_code_of_others(tmp_path: Path, key: str) -> None:
    """What it may name is a word that this package knows."""
    with pytest.raises(RecipeError, match=f"{key}: 'payload:Payload' is none of .*qwen3_5"):
        table(tmp_path, f"{TABLE}{key}: payload:Payload\n")


def test_values_built_of_values_are_evaluated_once(tmp_path: Path) -> None:
    """However often the next asks for the one before; else forty would take days."""
    chain = [f"  v{index}: v{index - 1} + v{index - 1}" for index in range(1, 40)]
    values = "\n".join(["values:", "  v0: layer + 1", *chain, "  wide: v39 - v39 + 4"])
    text = TABLE.replace("values:\n  wide: inner + 1", values)

    assert (4, 16) == table(tmp_path, text).tensors["layers.1.up.weight"].shape


def test_a_config_cannot_ask_for_experts_without_end(tmp_path: Path) -> None:
    """Each would get a name."""
    text = TABLE.replace("name: up.weight", "name: experts.*.up.weight")
    text = text.replace("shape: [wide, hidden_size]", "shape: [count, wide, hidden_size]")

    with pytest.raises(CheckpointError, match="4194304 experts in a layer by count"):
        table(tmp_path, text, {**CONFIG, "count": 1 << 22}).tensors  # noqa: B018
