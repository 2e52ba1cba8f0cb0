"""`carnice family`: a table from transformers alone, and tables of a project's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Project
from test_tables import CASES, expanded
from tiny import write_json
from zoo import write_zoo

from carnice_build.backends.families import described
from carnice_build.backends.skeletons import Skeletons
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import CheckpointError
from carnice_build.models import architecture_of, table_of, use_tables
from carnice_build.models.base import Part
from carnice_build.models.fitting import fit
from carnice_build.models.table import FamilyTable
from carnice_build.models.table_file import load_table

Carnice = Callable[..., Finished]

WRITTEN = {
    "llama": ["llama, sizes", "llama, biases"],
    "gpt_oss": ["gpt_oss"],
    "qwen3_moe": ["qwen3_moe, every other"],
    "deepseek_v3": ["deepseek_v3, biases"],
    "mistral3": ["mistral3"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, whose tables are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    use_tables(Path("recipes"))


@pytest.mark.parametrize("model_type", WRITTEN)
def test_a_table_written_by_the_command_is_one(
    folder: Path, carnice: Carnice, model_type: str
) -> None:
    """What transformers builds of other configs follows from it; roles and modules are as ours."""
    finished = carnice("family", model_type, "--replace")
    path = folder / "recipes" / "_families" / f"{model_type}.yaml"

    assert 0 == finished.code, finished.err
    assert str(path.relative_to(folder)) in finished.out
    assert "  carnice new NAME --from OWNER/MODEL|FOLDER --as PRESET" in finished.out.splitlines()
    assert "do not come out" not in finished.out
    for case in WRITTEN[model_type]:
        made = CASES[case].made()
        found = FamilyTable(path, made.config, case)
        assert made.shapes == expanded(found, made.shapes)
        ours = architecture_of(made.config, case)
        shared = [
            fact
            for fact in found.built.values()
            if fact.part is not Part.TOWER and fact.name in ours.built
        ]
        assert shared
        assert {fact.name: (fact.role, fact.part) for fact in shared} == {
            fact.name: (ours.built[fact.name].role, ours.built[fact.name].part) for fact in shared
        }
        assert [ours.engine_names(fact.module)[0] for fact in shared] == [
            found.engine_names(fact.module)[0] for fact in shared
        ]


def test_what_transformers_does_not_know_is_said(folder: Path, carnice: Carnice) -> None:
    """The file says what to look at: an MTP head, layers whose kinds a config leaves open."""
    finished = carnice("family", "qwen3_next", "--out", "mine.yaml")
    said = [
        line
        for line in (folder / "mine.yaml").read_text(encoding="utf-8").splitlines()
        if line.startswith("# not known: ")
    ]

    assert 0 == finished.code, finished.err
    assert any("^mtp.*" in line for line in said)
    assert any("layer_types" in line for line in said)
    assert any("smoothing" in line for line in said)


def test_a_table_that_is_there_is_not_overwritten(folder: Path, carnice: Carnice) -> None:
    """Somebody may have worked on it."""
    (folder / "mine.yaml").write_text("about: Mine.\n", encoding="utf-8")
    finished = carnice("family", "llama", "--out", "mine.yaml")

    assert 0 != finished.code
    assert "mine.yaml: is there already" in finished.err
    assert "about: Mine.\n" == (folder / "mine.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no_such_type"}, "has no 'no_such_type'"),
        ({"model_type": "nosuch"}, "has no 'nosuch'"),
        ({"model_type": "lama"}, "has no 'lama'; expected a model type of transformers, or a"),
        ({"hidden_size": 4}, "has no model_type"),
        (["llama"], "is not a JSON object"),
        ({"model_type": "siglip"}, "has no language model of 'siglip'"),
        ({"model_type": "granite", "num_hidden_layers": "many"}, "GraniteConfig of transformers"),
        (None, "cannot be read"),
    ],
    ids=[
        "unknown",
        "unlike any",
        "misspelt",
        "without a type",
        "no object",
        "no language model",
        "an entry of another type",
        "not there",
    ],
)
def test_what_is_no_model_is_one_sentence(
    folder: Path, carnice: Carnice, config: Any, said: str
) -> None:
    """Nothing is written."""
    if config is not None:
        write_json(folder / "config.json", config)
    finished = carnice("family", "config.json")

    assert 2 == finished.code
    assert said in finished.err
    assert ("did you mean 'llama'?" in finished.err) == ("'lama'" in said)
    assert "nanochat" not in finished.err
    assert 1 == len(finished.err.strip().splitlines())
    assert not (folder / "recipes").exists()


@pytest.mark.parametrize(
    ("model_type", "entries"),
    [
        ("llama", {"self": 1}),
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"hidden_size": {"a": 1}}),
        ("mistral3", {"text_config": "words"}),
    ],
)
def test_entries_that_transformers_does_not_take_are_one_error(
    model_type: str, entries: dict[str, Any]
) -> None:
    """It names the file and the class, whatever the class raises."""
    with pytest.raises(CheckpointError) as raised:
        described(model_type, entries, "config.json")

    assert "config.json: has entries that " in str(raised.value)


@pytest.mark.parametrize(
    "name", ["Trainer", "pipeline", "AutoModelForCausalLM", "AddedToken", "no"]
)
def test_an_architecture_that_is_no_model_is_not_called(name: str) -> None:
    """A config.json may name whatever transformers has; the type says which model it is."""
    skeletons = Skeletons("llama", {"architectures": [name]}, "config.json")

    assert "LlamaForCausalLM" == skeletons.model_class.__name__


def test_the_command_itself_loads_no_library(folder: Path) -> None:
    """transformers builds its models in a process of its own."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from carnice_build.commands.family import write_family\n"
        "from carnice_build.commands.options import Options\n"
        "if __name__ == '__main__':\n"
        "    write_family('olmo2', Path('mine.yaml'), Options())\n"
        "    print({'torch', 'transformers'} & sys.modules.keys())\n"
    )
    (folder / "script.py").write_text(code, encoding="utf-8")
    run = [sys.executable, "script.py"]
    output = subprocess.run(run, capture_output=True, text=True, check=True).stdout

    assert "set()" == output.strip()


def test_a_table_in_the_place_of_one_that_ships_is_told(folder: Path, carnice: Carnice) -> None:
    """By the command that writes it, in the list of families, and by every plan that reads it."""
    project = Project(folder)
    write_zoo(folder / "source", "qwen2")
    elsewhere = carnice("family", "qwen2", "--out", "mine.yaml")
    before = carnice("family", "--list").out.splitlines()
    finished = carnice("family", "qwen2", "--replace")
    after = carnice("family", "--list").out.splitlines()
    assert 0 == carnice("new", "mine", "--from", "source", "--as", "fp8-dynamic").code
    (plan,) = plan_variants(["mine"], Options(recipes=project.recipes)).variants

    told = "  it counts from now on, not the table that ships for this type"
    assert told in finished.out.splitlines()
    assert told not in elsewhere.out.splitlines()
    assert ["qwen2", "ships"] == next(line.split() for line in before if "qwen2 " in line)
    assert len(before) == len(after)
    (line,) = (line for line in after if line not in before)
    assert "qwen2 this project's, in the place of the one that ships" == " ".join(line.split())
    assert "_families/qwen2.yaml counts, not the table that ships" in plan.notices


def test_a_table_that_ships_is_not_replaced_unasked(folder: Path, carnice: Carnice) -> None:
    """The error says what would be lost, and how to have the new one all the same."""
    finished = carnice("family", "llama")

    assert 2 == finished.code
    assert "llama.yaml: would count in the place of the table that ships" in finished.err
    assert "without 'smoothing', 'token_bytes'" in finished.err
    assert "--replace" in finished.err
    assert not (folder / "recipes").exists()


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("family", "[OPTIONS] [MODEL]"),
        ("build", "[OPTIONS] VARIANTS..."),
        ("diff", "[OPTIONS] A B"),
        ("new", "[OPTIONS] [NAME]"),
    ],
)
def test_the_usage_line_is_as_in_manuals(carnice: Carnice, command: str, usage: str) -> None:
    """Of all commands, whatever the library makes of their arguments."""
    line = carnice(command, "--help").out.splitlines()[0]

    assert line.endswith(f" {command} {usage}")


def test_a_project_has_tables_of_its_own(folder: Path, carnice: Carnice) -> None:
    """A checkpoint of a type without a table is planned as soon as the project has one."""
    project = Project(folder)
    write_zoo(folder / "source", "olmo2")
    project.recipes.mkdir()
    (project.recipes / "_profiles.yaml").write_text("demo:\n  tiny/olmo2: source\n")
    project.recipe(
        "int4",
        "variant: int4\ndescription: Tiny\nquantize: {format: nvfp4}\n"
        "calibration: {dataset: rows.jsonl, samples: 1, length: 8}\n"
        "sources: {body: {model: tiny/olmo2}}\n",
    )
    (folder / "rows.jsonl").write_text('{"text": "words"}\n', encoding="utf-8")
    unknown = carnice("plan", "int4")
    written = carnice("family", "source/config.json")
    plan = plan_variants(["int4"], Options(recipes=project.recipes))

    assert "carnice family olmo2" in unknown.err
    assert 0 == written.code, written.err
    assert "olmo2" == plan.variants[0].architecture.name


def test_the_tables_of_one_project_are_not_those_of_another(folder: Path) -> None:
    """Whose recipes are read last, its tables count, as they are in its folder now."""
    one, two = folder / "one", folder / "two"
    for project, name in ((one, "first"), (two, "second")):
        (project / "_families").mkdir(parents=True)
        (project / "_families" / f"{name}.yaml").write_text("about: Mine.\nextends: llama\n")
    Options(recipes=one)
    Options(recipes=two)

    assert table_of("first") is None
    assert table_of("second") == (two / "_families" / "second.yaml").resolve()


def test_an_edited_table_is_read_again(folder: Path) -> None:
    """Whoever works on one sees what it says now, and what those say that it extends."""
    path, other = folder / "family.yaml", folder / "other.yaml"
    other.write_text("about: Mine.\nextends: llama\n")
    found = []
    for edited, text in (
        (path, "about: Mine.\nextends: other\n"),
        (other, "about: Mine.\nextends: llama\ndefaults: {more: 3}\n"),
        (path, "about: Mine.\nextends: other\ndefaults: {more: 7}\n"),
    ):
        edited.write_text(text)
        os.utime(edited, ns=(len(found), len(found)))
        found.append(load_table(path).table.defaults.get("more"))

    assert [None, "3", "7"] == found


def test_a_table_that_now_comes_first_is_the_one_that_is_extended(folder: Path) -> None:
    """One of a project's own with the name of one that ships, as soon as it is there."""
    path = folder / "family.yaml"
    path.write_text("about: Mine.\nextends: llama\n")
    before = load_table(path).table.defaults.get("more")
    (folder / "llama.yaml").write_text("about: Mine.\nextends: llama\ndefaults: {more: 3}\n")

    assert before is None
    assert "3" == load_table(path).table.defaults["more"]


@pytest.mark.parametrize(
    ("target", "names", "formula"),
    [
        ([6, 10, 12], "ab", "a * b"),
        ([7, 9, 11], "ab", "a + 2 * b"),
        ([6, 10, 6], "a", "2 * a"),
        ([12, 20, 12], "ac", "4 * a"),
        ([4, 4, 4], "", "4"),
        ([1, 5, 17], "abc", None),
    ],
)
def test_formulas_are_the_simplest_that_fit(
    target: list[int], names: str, formula: str | None
) -> None:
    """Products before sums, and numbers where nothing else changes."""
    scopes = [{"a": 3, "b": 2, "c": 8}, {"a": 5, "b": 2, "c": 8}, {"a": 3, "b": 4, "c": 8}]

    assert formula == fit(target, scopes, list(names))
