"""Recipes: inheritance, overrides, places in files, and sets of layers."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Project

from carnice_build.cli.arguments import complete_variant
from carnice_build.errors import RecipeError
from carnice_build.planning.vocabulary import vocabulary
from carnice_build.recipe.backtracking import ways
from carnice_build.recipe.layers import LayerSpan, layers_in
from carnice_build.recipe.loader import Recipe, list_recipes, load_recipe
from carnice_build.recipe.merge import override, read_with_parents
from carnice_build.recipe.patterns import Patterns, compile_pattern
from carnice_build.recipe.presets import PREFIX, presets
from carnice_build.yaml_tree import parse_tree

MINIMAL = """\
variant: child
description: A minimal recipe
sources:
  body: {model: owner/name}
quantize:
  format: mlx
  bits: 4
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, vocabulary(), overrides)


def merged(path: Path) -> Any:
    return read_with_parents(path).plain()


def changed(text: str, *assignments: str) -> Any:
    """What YAML `text` becomes after these `--set`."""
    tree = parse_tree(text, "x.yaml")
    for assignment in assignments:
        tree = override(tree, assignment)
    return tree.plain()


@pytest.mark.parametrize("path", list_recipes(REPOSITORY / "recipes"), ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    """Each recipe of the repository is valid and declares the variant it is named after."""
    assert path.stem == load(path).variant


# --- extends -------------------------------------------------------------------------------------


def test_a_child_changes_keys_of_its_parent(tmp_path: Path) -> None:
    """Mappings merge key by key, to any depth."""
    write(tmp_path, "parent.yaml", "a: {x: 1, y: {p: 1, q: 2}}\nb: 1\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\na: {y: {q: 3, r: 4}}\n")

    assert merged(child) == {"a": {"x": 1, "y": {"p": 1, "q": 3, "r": 4}}, "b": 1}


def test_a_child_replaces_lists(tmp_path: Path) -> None:
    """A list of the child takes the place of the parent's."""
    write(tmp_path, "parent.yaml", "a: [1, 2]\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\na: [3]\n")

    assert merged(child) == {"a": [3]}


def test_a_plus_appends(tmp_path: Path) -> None:
    """`key+` adds a list, or a single value, to the parent's list; or begins one."""
    write(tmp_path, "parent.yaml", "a: [1, 2]\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\na+: [3]\nb: {c+: 4}\n")

    assert merged(child) == {"a": [1, 2, 3], "b": {"c": [4]}}


def test_a_plus_needs_a_list(tmp_path: Path) -> None:
    """Appending to a number says where that was asked for."""
    write(tmp_path, "parent.yaml", "a: 1\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\na+: [3]\n")

    with pytest.raises(RecipeError, match=r"child.yaml:2:5: cannot append: the value is not a li"):
        merged(child)


def test_several_parents_append_in_their_order(tmp_path: Path) -> None:
    """`key+` of any parent appends to what the parents before it gave, at any depth."""
    write(tmp_path, "base.yaml", "card: {tags: [base]}\nsteps: [1]\n")
    write(tmp_path, "one.yaml", "extends: base.yaml\ncard: {tags+: [one]}\nsteps+: [2]\n")
    write(tmp_path, "two.yaml", "card: {tags+: [two]}\n")
    write(tmp_path, "three.yaml", "extends: two.yaml\ncard: {tags+: three}\nsteps+: [3]\n")
    child = write(
        tmp_path, "child.yaml", "extends: [one.yaml, three.yaml]\ncard: {tags+: [child]}\n"
    )

    assert {
        "card": {"tags": ["base", "one", "two", "three", "child"]},
        "steps": [1, 2, 3],
    } == merged(child)


def test_a_list_of_a_later_parent_replaces_the_earlier_ones(tmp_path: Path) -> None:
    """Without a plus, a list is the whole list, and what follows appends to that."""
    write(tmp_path, "one.yaml", "a: [1]\nb+: [1]\n")
    write(tmp_path, "two.yaml", "a: [2]\nb: [2]\n")
    write(tmp_path, "three.yaml", "a+: [3]\nb+: [3]\n")
    child = write(tmp_path, "child.yaml", "extends: [one.yaml, two.yaml, three.yaml]\n")

    assert {"a": [2, 3], "b": [2, 3]} == merged(child)


def test_a_parent_of_several_parents_counts_once(tmp_path: Path) -> None:
    """A file that two parents extend stands before both, and undoes nothing of the first."""
    write(tmp_path, "base.yaml", "a: [0]\nb: 0\nc: 0\n")
    write(tmp_path, "one.yaml", "extends: base.yaml\na+: [1]\nb: 1\nc: 1\n")
    write(tmp_path, "two.yaml", "extends: base.yaml\na+: [2]\nc: 2\n")
    child = write(tmp_path, "child.yaml", "extends: [one.yaml, two.yaml]\n")

    assert {"a": [0, 1, 2], "b": 1, "c": 2} == merged(child)


def test_every_recipe_has_the_tags_of_all_its_parents() -> None:
    """What any file of a recipe appends to `card.tags` is on its card."""
    for path in list_recipes(REPOSITORY / "recipes"):
        tags = set(load(path).card.tags)
        waiting = [path]
        while waiting:
            file = waiting.pop()
            tree = yaml.safe_load(file.read_text())
            parents = tree.get("extends", [])
            parents = [parents] if isinstance(parents, str) else parents
            waiting += [
                presets()[parent.removeprefix(PREFIX)]
                if parent.startswith(PREFIX)
                else file.parent / parent
                for parent in parents
            ]

            assert set(tree.get("card", {}).get("tags+", [])) <= tags, (path, file)


def test_a_preset_is_extended_by_its_name(tmp_path: Path) -> None:
    """`preset:NAME` is a file of the package, and what it says has its place there."""
    path = write(tmp_path, "child.yaml", "extends: preset:mlx-6bit\nc: 3\n")
    tree = read_with_parents(path)

    assert 6 == tree.find(("quantize", "bits")).value
    assert "carnice_build/presets/mlx-6bit.yaml:6:9" == tree.find(("quantize", "bits")).where
    assert 3 == tree.find(("c",)).value


@pytest.mark.parametrize("name", ["preset:mlx-4bt", "mlx-4bit", "preset:../mlx-4bit"])
def test_a_preset_that_is_none_is_refused_with_the_nearest(tmp_path: Path, name: str) -> None:
    """A misspelt name, one without its prefix, and one that leads elsewhere."""
    path = write(tmp_path, "child.yaml", f"extends: {name}\n")

    with pytest.raises(RecipeError, match=r"child.yaml:1:10: .*did you mean 'preset:mlx-4bit'"):
        read_with_parents(path)


@pytest.mark.parametrize("name", presets())
def test_a_preset_lacks_nothing_but_a_source(tmp_path: Path, name: str) -> None:
    """With a source it is a recipe, and it names neither a model nor a profile of ours."""
    text = f"extends: preset:{name}\nvariant: child\nsources: {{body: {{model: owner/name}}}}\n"
    tree = read_with_parents(write(tmp_path, "child.yaml", text)).plain()
    loaded = load(tmp_path / "child.yaml")

    assert loaded.description
    served = "llama-server" if name.startswith("gguf-") else "vllm"
    assert loaded.quantize.serving() is None or [served] == [
        spec.profile for spec in loaded.package.serve
    ]
    assert not {"demo", "full", "carnice", "qwen"} & set(re.findall(r"\w+", str(tree).lower()))


def test_parents_are_found_from_the_file_that_names_them(tmp_path: Path) -> None:
    """`extends` in `_base/middle.yaml` is relative to `_base`."""
    write(tmp_path, "_base/top.yaml", "a: 1\n")
    write(tmp_path, "_base/middle.yaml", "extends: top.yaml\nb: 2\n")
    child = write(tmp_path, "child.yaml", "extends: _base/middle.yaml\nc: 3\n")

    assert merged(child) == {"a": 1, "b": 2, "c": 3}


def test_a_missing_parent_is_named_with_the_nearest(tmp_path: Path) -> None:
    """A misspelt `extends` suggests the file that was meant."""
    write(tmp_path, "_base/text.yaml", "a: 1\n")
    child = write(tmp_path, "child.yaml", "extends: _base/txt.yaml\n")

    with pytest.raises(RecipeError, match=r"child.yaml:1:10: .* did you mean '_base/text.yaml'"):
        merged(child)


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    """A loop of any length ends, and the file that closes it is named."""
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    first = write(tmp_path, "a.yaml", "extends: b.yaml\n")

    with pytest.raises(RecipeError, match=r"b.yaml:1:1: extends itself"):
        merged(first)


def test_a_chain_of_parents_has_an_end(tmp_path: Path) -> None:
    """More than 16 parents are refused."""
    for index in range(20):
        write(tmp_path, f"r{index}.yaml", f"extends: r{index + 1}.yaml\n")

    with pytest.raises(RecipeError, match="extends more than 16 others"):
        merged(tmp_path / "r0.yaml")


# --- --set ---------------------------------------------------------------------------------------


def test_set_changes_a_leaf() -> None:
    """A dotted path leads to the value; what is written there is YAML."""
    assert changed("a: {b: 1, c: 2}", "a.b=5") == {"a": {"b": 5, "c": 2}}
    assert changed("a: 0", "a=[1, 2]") == {"a": [1, 2]}
    assert changed("a: 0", "a=x=y") == {"a": "x=y"}


def test_set_makes_what_is_missing() -> None:
    """Mappings on the way are made."""
    assert changed("{}", "a.b.c=1") == {"a": {"b": {"c": 1}}}


def test_set_counts_into_lists() -> None:
    """A number in the path is a position in a list."""
    assert changed("a: [{b: 1}, {b: 2}]", "a.1.b=5") == {"a": [{"b": 1}, {"b": 5}]}


def test_set_appends() -> None:
    """`key+=value` adds to a list."""
    assert changed("a: [1]", "a+=2") == {"a": [1, 2]}
    assert changed("a: [1]", "a+=[2, 3]") == {"a": [1, 2, 3]}


def test_later_sets_win() -> None:
    """Overrides apply in the order they are given."""
    assert changed("a: 1", "a=2", "a=3") == {"a": 3}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a", "is not PATH=VALUE"),
        ("=1", "is not PATH=VALUE"),
        ("a..b=1", "is not PATH=VALUE"),
        (".".join("a" * 1000) + "=1", "is not PATH=VALUE"),
        ("list.7=1", "'7' is not a position in the list; expected 0 to 1"),
        ("list.x=1", "'x' is not a position in the list"),
        ("list." + "9" * 5000 + "=1", "is not a position in the list"),
        ("number.b=1", "'b' is below a value that has no keys"),
        ("number+=1", "cannot append"),
        ("a=[1", "is not valid YAML"),
        ("a=!!python/object:os.system x", "cannot read the value"),
        ("a=\udcff", "is not Unicode text"),
    ],
)
def test_a_wrong_set_is_quoted(assignment: str, message: str) -> None:
    """The error names the option as it was given."""
    with pytest.raises(RecipeError) as caught:
        changed("{list: [1, 2], number: 3}", assignment)

    assert f"--set {assignment}" == caught.value.where
    assert message in str(caught.value)


# --- places --------------------------------------------------------------------------------------


def test_an_error_in_a_parent_is_placed_in_the_parent(tmp_path: Path) -> None:
    """What a child inherits is blamed on the file where it stands."""
    write(tmp_path, "parent.yaml", MINIMAL.replace("bits: 4", "bits: 7"))
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nvariant: child\n")

    with pytest.raises(RecipeError, match=r"parent.yaml:7:9: quantize\.bits: .*got 7"):
        load(child)


def test_an_error_from_set_is_placed_there(tmp_path: Path) -> None:
    """What `--set` wrote is blamed on it, not on the file."""
    child = write(tmp_path, "child.yaml", MINIMAL)

    with pytest.raises(RecipeError, match=r"^--set quantize.bits=7: quantize\.bits"):
        load(child, "quantize.bits=7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pakage: {shard: 5GB}", r":8:9: unknown key 'pakage'; did you mean 'package'"),
        ("package: {shrad: 5GB}", r":8:18: unknown key 'package.shrad'; did you mean 'shard'"),
        ("package: {shard: 5XB}", r":8:18: package.shard: '5XB' is not a size"),
        ("layers: {a: [{form: 1}]}", r":8:21: unknown key 'layers.a.0.form'; did you mean 'from'"),
        ("layers: {a: [{to: 1/0}]}", r":8:19: layers.a.0.to: '1/0' is not a layer number"),
        ("layers: {a: []}", r":8:13: layers.a: an empty set of layers"),
        ("steps: {drop: x}", r":8:8: steps: "),
        ("steps: [{dorp: {match: x}}]", r":8:9: unknown step 'dorp'; .*did you mean 'drop'"),
        ("steps: [{drop: {match: x}, rename: {}}]", r":8:9: a step has 2 keys; expected one"),
        ("steps: [{drop: {mtach: x}}]", r"unknown key 'steps.0.drop.mtach'; did you mean 'match'"),
        ("steps: [{drop: {match: 're:('}}]", r":8:24: .*'re:\(' is not a valid pattern"),
        ("steps: [{rename: {from: '(', to: x}}]", r":8:25: .*is not a valid pattern"),
        ("variant: other", r":8:1: has the key 'variant' twice"),
    ],
)
def test_every_error_has_a_place_and_a_hint(tmp_path: Path, line: str, message: str) -> None:
    """File, line and column, the key, what was expected and the nearest valid name."""
    path = write(tmp_path, "child.yaml", MINIMAL + line + "\n")

    with pytest.raises(RecipeError, match=message):
        load(path)


def test_a_variant_is_named_as_its_file(tmp_path: Path) -> None:
    """A recipe in the wrong file says which name was expected."""
    path = write(tmp_path, "other.yaml", MINIMAL)

    with pytest.raises(RecipeError, match=r":1:10: declares the variant 'child'; .*'other'"):
        load(path)


# --- layers --------------------------------------------------------------------------------------


def mlx_lm_uses_more_bits(index: int, count: int) -> bool:
    """The rule of `mixed_quant_predicate_builder` in mlx-lm's convert.py."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def test_the_sensitive_layers_are_those_of_mlx_lm() -> None:
    """For any number of layers, the recipe's spans say mlx-lm's rule, without code."""
    recipe = load(REPOSITORY / "recipes" / "mlx-mixed_3_6.yaml")
    for count in range(1, 200):
        expected = {index for index in range(count) if mlx_lm_uses_more_bits(index, count)}

        assert expected == layers_in(recipe.layers["sensitive"], count)


@pytest.mark.parametrize(
    ("span", "count", "layers"),
    [
        ({}, 4, [0, 1, 2, 3]),
        ({"to": 2}, 4, [0, 1]),
        ({"from": "1/2"}, 5, [2, 3, 4]),
        ({"from": "7/8"}, 4, [3]),
        ({"from": 1, "every": 3, "start": 1}, 10, [2, 5, 8]),
        ({"to": 99}, 3, [0, 1, 2]),
        ({"from": 5}, 3, []),
    ],
)
def test_a_span_is_cut_to_the_model(span: dict[str, Any], count: int, layers: list[int]) -> None:
    """Fractions are rounded down, and no layer is past the last."""
    assert layers == list(LayerSpan.model_validate(span).layers(count))


# --- patterns ------------------------------------------------------------------------------------


def test_globs_cover_the_whole_name() -> None:
    """`*` crosses dots; a glob without one is the name itself."""
    names = ["lm_head", "a.v_proj", "a.b.v_proj", "a.v_proj.x"]

    assert Patterns("*.v_proj").select(names) == ["a.v_proj", "a.b.v_proj"]
    assert Patterns("lm_head").select(names) == ["lm_head"]
    assert Patterns(r"re:a\.b").select(names) == ["a.b.v_proj"]


@pytest.mark.parametrize(
    "regex",
    [
        r"^(model\.)?(language_model\.){2,}visual\.",
        r"^(model\.)?(language_model\.)+",
        r"(model\.|language_model\.)+",
        r"^(.*)\.layers\.(\d+)\.(.*)$",
        r"(?:ab|ac)+",
        r"(x|y|z)*",
    ],
)
def test_ordinary_expressions_are_accepted(regex: str) -> None:
    """Repetitions of plain text, and a few wildcards, are cheap."""
    assert compile_pattern(f"re:{regex}")


@pytest.mark.parametrize(
    "regex",
    [
        "(a+)+$",
        "(a*)*b",
        "(a|aa)+$",
        "(|a)+$",
        "(?i:ab|AB)+$",
        r"(a)(\1+)+$",
        "(?:a*b)*c",
        "(?:a?){40}a{40}",
        "a?" * 30 + "a" * 30,
        ".*.*.*.*x",
        "(a(?=a*))*",
    ],
)
def test_expressions_that_can_run_away_are_refused(regex: str) -> None:
    """A repetition inside a repetition, or too many side by side, is refused before use."""
    with pytest.raises(ValueError, match="could take too long on some names"):
        compile_pattern(f"re:{regex}")


def test_ways_multiply() -> None:
    """Choices beside each other multiply; plain text offers none."""
    assert ways("abc", 10) == 1
    assert ways("a*", 10) == 11
    assert ways("b?a*", 10) == 2 * 11
    assert ways("(?:c|de|d)a*", 10) == 3 * 11


def test_the_shell_completes_names_of_variants(project: Project) -> None:
    """Recipes are offered, parts of recipes are not."""
    assert ["mlx-mixed_2_6", "mlx-mixed_3_4", "mlx-mixed_3_6", "mlx-mixed_4_6"] == complete_variant(
        "mlx-mixed"
    )
    assert "_profiles" not in complete_variant("")
