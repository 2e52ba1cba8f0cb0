"""Hostile recipes: whatever a stranger's YAML says, it is refused in one line or does no harm."""

from __future__ import annotations

import os

import pytest
import yaml
from attacking import Attack, check_named
from conftest import Project

from carnice_build import yaml_tree
from carnice_build.errors import RecipeError

pytest_plugins = ["attacking"]

HEAD = (
    "extends: [_base/carnice-text.yaml, preset:mlx-4bit]\n"
    "variant: bad\ndescription: x\nquantize: {bits: 4}\n"
)


def with_pattern(pattern: str) -> str:
    return f"{HEAD}steps+:\n  - drop: {{match: '{pattern}'}}\n"


def with_rename(pattern: str, to: str) -> str:
    return f"{HEAD}steps+:\n  - rename: {{from: '{pattern}', to: '{to}'}}\n"


NAMED = {
    # YAML that wants to be code
    "a Python object": ("a: !!python/object:os.system x\n", "cannot read the value 'x'"),
    "a Python call": ("a: !!python/object/apply:os.system [x]\n", "expected plain YAML"),
    "a Python name": ("a: !!python/name:os.system\n", "cannot read the value"),
    "a Python module as a mapping": ("a: !!python/module:os {}\n", "expected plain YAML"),
    "a tag of its own": ("a: !evil [x]\n", "has the tag '!evil'"),
    "a set": ("a: !!set {x}\n", "expected plain YAML"),
    "a merge key": ("a: &a {x: 1}\nb:\n  <<: *a\n", "cannot read the value '<<'"),
    # YAML that wants to be large
    "a list in itself": ("a: &a [*a]\n", "is nested more than 40 deep"),
    "a mapping in itself": ("&a\na: *a\n", "is nested more than 40 deep"),
    "400,000 brackets": ("[" * 400_000, "is nested more than 40 deep"),
    "400,000 dashes": ("- " * 400_000, "is nested more than 40 deep"),
    "200,000 braces": ("{a: " * 200_000, "is nested more than 40 deep"),
    "100,000 values": ("a: [" + "x," * 100_000 + "]", "holds more than 20000 values"),
    "60,000 anchors": (
        "".join(f"- &a{index} x\n" for index in range(60_000)),
        "holds more than 20000 values",
    ),
    "an unknown alias": ("a: *nowhere\n", "is not valid YAML"),
    # numbers that are slow or are none
    "a number to base 60 of 450,000 digits": ("a: 1" + ":1" * 450_000, "too long for a number"),
    "a number of 900,000 digits": ("a: " + "9" * 900_000, "too long for a number"),
    "a hexadecimal number of 900,000 digits": ("a: 0x" + "f" * 900_000, "too long for a number"),
    "a number past 2**63": ("a: 9223372036854775808\n", "too large a number"),
    "infinity": ("a: .inf\n", "is not a finite number"),
    "not a number": ("a: .nan\n", "is not a finite number"),
    "an empty number": ("a: !!int ''\n", "cannot read the value"),
    "a truth that is none": ("a: !!bool x\n", "cannot read the value"),
    "a time that is none": ("a: !!timestamp x\n", "cannot read the value"),
    "a day that is none": ("a: 2026-99-99\n", "cannot read the value"),
    # text that drives terminals
    "NUL": ('a: "\\0"\n', "holds a control character"),
    "an escape": ('a: "\\e[2J"\n', "holds a control character"),
    "an escape in a key": ('"\\e[2J": 1\n', "holds a control character"),
    "an escape as it is": ("a: \x1b[2J\n", "is not valid YAML"),
    "half a surrogate pair": ('a: "\\ud800"\n', "is not valid YAML"),
    "text turned round in a key": (HEAD + '"\u202epackage": 1\n', r"\u202e"),
    "a key of 10,000 characters": (HEAD + "? " + "x" * 10_000 + "\n: 1\n", "unknown key"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not valid YAML"),
    "a key that is a list": ("? [a]\n: 1\n", "has a key that is not text"),
    # files
    "itself as a parent": ("extends: bad.yaml\n", "extends itself"),
    "a parent with NUL": ('extends: "a\\0b"\n', "holds a control character"),
    "a parent of 5,000 characters": (f"extends: {'x' * 5000}\n", "which does not exist"),
    "a parent that is a list of lists": ("extends: [[a]]\n", "extends is not a file name"),
    "itself among its parents": ("extends: [bad.yaml, bad.yaml]\n", "extends itself"),
    "a parent that is a folder": ("extends: _base\n", "which does not exist"),
    "a parent that is a pipe": ("extends: pipe.yaml\n", "which does not exist"),
    "a parent that never ends": ("extends: zero.yaml\n", "which does not exist"),
    "a parent that is a loop": ("extends: loop.yaml\n", "which does not exist"),
    "a parent up and down": ("extends: _base/../../x.yaml\n", "which is outside"),
    # names
    "a variant with a slash": (HEAD.replace(": bad", ": a/b"), "is not a plain name"),
    "a variant that is a parent": (HEAD.replace(": bad", ": .."), "is not a plain name"),
    "a variant with a line": (HEAD.replace(": bad", ': "bad\\n"'), "is not a plain name"),
    "a variant of 101 characters": (HEAD.replace(": bad", ": " + "b" * 101), "not a plain name"),
    "a variant that is an option": (HEAD.replace(": bad", ": --help"), "is not a plain name"),
    "a model with three parts": (HEAD + "sources: {body: {model: a/b/c}}\n", "not a plain name"),
    "a model that is a URL": (
        HEAD + "sources: {body: {model: 'http://evil/x'}}\n",
        "is not a plain name",
    ),
    "no source": (
        "variant: bad\ndescription: x\nquantize: {format: mlx, bits: 4}\nsources: {}\n",
        "sources",
    ),
    # patterns
    "a pattern that runs away": (with_pattern("re:(a+)+$"), "could take too long"),
    "a pattern of many wildcards": (with_pattern("re:.*.*.*.*.*x"), "could take too long"),
    "alternatives that run away": (with_pattern("re:(a|a.)*$"), "could take too long"),
    "a rename that runs away": (with_rename("^(([a-z])+.)+[A-Z]$", "x"), "could take too long"),
    "a pattern of 100,000 characters": (with_pattern("re:" + "a" * 100_000), "more than 1000"),
    "a glob of 100,000 stars": (with_pattern("*a" * 50_000), "more than 1000 characters"),
    "a pattern nested 400 deep": (
        with_pattern("re:x" + "(" * 400 + ")" * 400),
        "matches no tensor",
    ),
    "a pattern of huge repetition": (with_pattern("re:a{99999999999}"), "is not a valid pattern"),
    "a glob of many stars": (with_pattern("*a" * 300 + "b"), "matches no tensor"),
    "a rename to a group that is not there": (with_rename("model", r"\9"), "valid replacement"),
    "a rename to 100,000 characters": (with_rename("model", "x" * 10**5), "characters"),
    "a rename to nothing": (with_rename("^.*$", ""), "twice"),
    "a rename that grows names": (
        with_rename("^(.*)$", r"\1" * 40),
        "expected at most 256",
    ),
    # numbers that are asked for
    "a negative count": (
        HEAD + "steps: [{drop: {match: '*visual*', expect: -1}}]\n",
        "matches 21 tensors; expected -1",
    ),
    "shards of nothing": (HEAD + "package: {shard: 0}\n", "is not a size"),
    "shards of less": (HEAD + "package: {shard: -5}\n", "is not a size"),
    "shards without end": (HEAD + f"package: {{shard: '{'9' * 400}'}}\n", "is not a size"),
    "shards of blanks": (HEAD + f"package: {{shard: '5{' ' * 10**5}x'}}\n", "is not a size"),
    "10,000 runs of layers": (
        HEAD + "layers: {a: [" + "{}," * 10_000 + "]}\n",
        "more than 100 runs of layers",
    ),
    "every 0th layer": (HEAD + "layers: {a: [{every: 0}]}\n", "layers.a.0.every"),
    "a layer before the first": (HEAD + "layers: {a: [{from: -1}]}\n", "is not a layer number"),
    "an eighth of nothing": (HEAD + "layers: {a: [{from: 1/00}]}\n", "is not a layer number"),
}


@pytest.mark.parametrize("what", NAMED)
def test_it_is_named(project: Project, attack: Attack, what: str) -> None:
    """One printable line says where and what, and there is no cache and no output."""
    text, part = NAMED[what]
    os.mkfifo(project.recipes / "pipe.yaml")
    (project.recipes / "zero.yaml").symlink_to("/dev/zero")
    (project.recipes / "loop.yaml").symlink_to("loop.yaml")
    project.recipe("bad", text)

    check_named(attack("build", "bad"), "carnice: recipes/bad.yaml", part)
    assert not project.cache.exists()
    assert not project.out.exists()


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize("count", [42, 1_000, 100_000])
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[\n", "[[[[[[[[[[[[[[a, "])
def test_depth_is_refused_in_words_of_ours(
    opening: str, count: int, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever nests, and whether or not the parser has a limit of its own, it is one sentence."""
    monkeypatch.setattr(yaml_tree, "_Loader", getattr(yaml, loader))

    with pytest.raises(RecipeError, match=r"^recipe:\d+: is nested more than 40 deep$"):
        yaml_tree.parse_tree(opening * count, "recipe")


@pytest.mark.parametrize("text", ["'" + "[" * 2_000 + "' x", f"a: # {'[' * 2_000}\n]"])
def test_brackets_in_text_nest_nothing(text: str) -> None:
    """Invalid YAML with many brackets in a value or a comment is not called deep."""
    with pytest.raises(RecipeError, match=r"^recipe:\d+:\d+: is not valid YAML"):
        yaml_tree.parse_tree(text, "recipe")


@pytest.mark.parametrize(
    ("name", "part"),
    [("pipe", "is not a file"), ("zero", "is not a file"), ("loop", "cannot read the file")],
)
def test_a_recipe_that_is_no_file_is_named(
    project: Project, attack: Attack, name: str, part: str
) -> None:
    """A pipe does not block, a device does not fill the memory, a loop of links ends."""
    os.mkfifo(project.recipes / "pipe.yaml")
    (project.recipes / "zero.yaml").symlink_to("/dev/zero")
    (project.recipes / "loop.yaml").symlink_to("loop.yaml")

    check_named(attack("build", name), f"recipes/{name}.yaml", part)


PROFILES = {
    "a list": ("- a\n", "is not a mapping of profiles"),
    "a profile that is a list": ("demo: [a]\n", "does not say where kai-os/Carnice-V2-27b is"),
    "a place that is a list": ("demo: {kai-os/Carnice-V2-27b: [a]}\n", "does not say where"),
    "an absolute place": ("demo: {kai-os/Carnice-V2-27b: /etc}\n", "is outside the project"),
    "a place up and down": ("demo: {kai-os/Carnice-V2-27b: a/../..}\n", "outside the project"),
    "a place with NUL": ('demo: {kai-os/Carnice-V2-27b: "a\\0"}\n', "a control character"),
    "a place that is a loop": ("demo: {kai-os/Carnice-V2-27b: loop}\n", "is not a folder"),
    "a place that is a pipe": ("demo: {kai-os/Carnice-V2-27b: pipe}\n", "is not a folder"),
    "a place of 5,000 characters": (f"demo: {{kai-os/Carnice-V2-27b: {'x' * 5000}}}\n", "cannot"),
}


@pytest.mark.parametrize("what", PROFILES)
def test_a_hostile_profile_is_named(project: Project, attack: Attack, what: str) -> None:
    """Profiles lead to folders inside the project, or nowhere."""
    text, part = PROFILES[what]
    os.mkfifo(project.root / "pipe")
    (project.root / "loop").symlink_to("loop")
    (project.recipes / "_profiles.yaml").write_text(text)

    check_named(attack("build", "mlx-4bit"), part)


def test_a_card_cannot_forge_its_metadata(project: Project, attack: Attack) -> None:
    """Text of a recipe stays a value of the card's front matter, whatever lines it holds."""
    project.recipe("bad", HEAD + 'card: {tags: ["x\\n---\\nlicense: evil\\n---"], license: mit}\n')

    assert 0 == attack("build", "bad").code
    front = yaml.safe_load(project.built("bad")["README.md"].decode().split("\n---\n")[0])
    assert "mit" == front["license"]


def test_a_card_is_no_template(project: Project, attack: Attack) -> None:
    """Template code in a recipe is text."""
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in y %}"
    project.recipe("bad", f'{HEAD}card: {{about: "{code}", title: "{code}"}}\n')

    assert 0 == attack("build", "bad").code
    assert code in project.built("bad")["README.md"].decode()


def test_many_steps_end(project: Project, attack: Attack) -> None:
    """Two thousand steps over every name take bounded time."""
    steps = "  - drop: {match: '*.nothing.*', optional: true}\n" * 2000
    project.recipe("bad", f"{HEAD}steps+:\n{steps}")

    assert 0 == attack("plan", "bad").code
