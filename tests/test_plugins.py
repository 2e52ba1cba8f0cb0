"""Steps and formats of other packages: what is wrong with one is told by its name, and ends there.

Each test installs a package of one module in a folder of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, Finished, Project

from carnice_build.formats.registry import readers
from carnice_build.planning.vocabulary import usable_vocabulary
from carnice_build.recipe.loader import list_recipes
from carnice_build.recipe.schema import json_schema

Carnice = Callable[..., Finished]
Install = Callable[[str, str, str], None]

HEAD = """
from typing import Any, Callable, Literal
from pydantic import BaseModel, Field
from carnice_build.recipe.schema import Strict
from carnice_build.formats.base import Conversion, Format
from carnice_build.formats.mlx.format import MlxFormat
from carnice_build.steps.base import Step
"""
STEP = HEAD + "class Part(Step):\n    def apply(self, view, context):\n        return view\n"
OURS = [path.stem for path in list_recipes(REPOSITORY / "recipes")]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(package, module text, entry points)` puts a package on the path."""

    def call(package: str, module: str, entry_points: str) -> None:
        site = tmp_path / package
        site.mkdir()
        (site / f"{package}.py").write_text(module)
        info = site / f"{package}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return call


BROKEN_STEPS = {
    "a module that it needs": ("import no_such_module\n" + STEP, "ModuleNotFoundError: No module"),
    "an error on import": (STEP + "raise ValueError('at\\nonce')\n", "ValueError: at"),
    "an exit on import": (STEP + "raise SystemExit(0)\n", "cannot be loaded: SystemExit"),
    "no syntax": ("class Part(", "cannot be loaded: SyntaxError"),
    "no such class": (HEAD, "AttributeError: module 'broken' has no attribute 'Part'"),
    "a function": ("def Part(): ...\n", "is no subclass of carnice_build.steps.base.Step"),
    "any model": (HEAD + "class Part(BaseModel): ...\n", "is no subclass of"),
    "a format": (HEAD + "class Part(Format): ...\n", "is no subclass of"),
    "no method": (HEAD + "class Part(Step):\n    limit: int = 1\n", "does not define apply"),
    "a setting without a type": (STEP + "    limit = 3\n", "PydanticUserError: A non-annotated"),
    "a setting that is code": (STEP + "    key: Callable[[int], int]\n", "no schema describes"),
}
FORMAT_STEPS = "".join(
    f"    def {name}(self, *given): ...\n" for name in ("convert", "files", "checks", "reader")
)
BROKEN_FORMATS = {
    "no methods": (
        HEAD + "class Part(Format):\n    format: Literal['part']\n",
        "does not define checks and convert and files and reader",
    ),
    "no setting that names it": (
        HEAD + "class Part(Format):\n" + FORMAT_STEPS,
        "has no setting `format: Literal['part']`",
    ),
    "the name of another": (
        HEAD + "class Part(Format):\n    format: Literal['parts']\n" + FORMAT_STEPS,
        "has no setting `format: Literal['part']`",
    ),
    "a step": (STEP, "is no subclass of carnice_build.formats.base.Format"),
}
USES = {
    "step": "extends: mlx-4bit.yaml\nvariant: uses\ndescription: x\nsteps+: [{part: {}}]\n",
    "format": "extends: _base/carnice-text.yaml\nvariant: uses\ndescription: x\n"
    "quantize: {format: part}\n",
}
CASES = [
    *(("step", *BROKEN_STEPS[name]) for name in BROKEN_STEPS),
    *(("format", *BROKEN_FORMATS[name]) for name in BROKEN_FORMATS),
]


@pytest.mark.parametrize(("kind", "module", "problem"), CASES, ids=[*BROKEN_STEPS, *BROKEN_FORMATS])
def test_a_broken_plugin_is_one_sentence_with_its_name(
    project: Project, carnice: Carnice, install: Install, kind: str, module: str, problem: str
) -> None:
    """It is an error for recipes that use it, a warning for what looks at all, and else nothing."""
    install("broken", module, f"[carnice_build.{kind}s]\npart = broken:Part\n")
    alone = carnice("plan", "mlx-4bit")
    schema = carnice("schema")
    project.recipe("uses", USES[kind])
    used, listed = carnice("plan", "uses"), carnice("list")
    sentence = f"broken 1.5: {kind} 'part', broken:Part,"

    assert (0, "") == (alone.code, alone.err)
    assert (1, "") == (used.code, used.out)
    assert (0, 0) == (listed.code, schema.code)
    assert OURS == [line.split()[0] for line in listed.out.splitlines()]
    assert used.err.startswith(f"carnice: {sentence}")
    for finished in (used, listed, schema):
        assert 1 == finished.err.count("\n")
        assert sentence in finished.err
        assert problem in finished.err


def test_a_broken_plugin_does_not_hide_another(
    project: Project, carnice: Carnice, install: Install
) -> None:
    """Of two packages, the sound one is used, listed, and in the schema."""
    install("broken", "import no_such_module\n", "[carnice_build.steps]\nother = broken:Part\n")
    install("sound", STEP, "[carnice_build.steps]\npart = sound:Part\n")
    project.recipe("uses", USES["step"])
    planned, listed, schema = carnice("plan", "uses"), carnice("list"), carnice("schema")

    assert (0, 0, 0) == (planned.code, listed.code, schema.code)
    assert ("", "") == (planned.err, listed.err)
    assert "uses" in listed.out
    assert "broken 1.5: step 'other'" in schema.err
    steps = json.loads(schema.out)["properties"]["steps"]["items"]["oneOf"]
    assert {"part"} < {kind for step in steps for kind in step["properties"]}


CONVERTS = (
    HEAD
    + """
class Part(MlxFormat):
    format: Literal['part']
    bits: int = 4
"""
)
FAILING = {
    "an error in convert": (
        CONVERTS + "    def convert(self, view, context):\n        return {}['group_size']\n",
        "broken 1.5: Part failed: KeyError: 'group_size'",
    ),
    "a result that lacks something": (
        CONVERTS + "    def convert(self, view, context):\n        return Conversion(tensors=[])\n",
        "broken 1.5: Part failed: TypeError: Conversion.__init__() missing",
    ),
    "an error in what engines call it": (
        CONVERTS + "    def serving(self):\n        raise LookupError('engine')\n",
        "broken 1.5: Part failed: LookupError: engine",
    ),
    "settings without bits": (
        CONVERTS
        + "    def convert(self, view, context):\n"
        + "        from dataclasses import replace\n"
        + "        made = super().convert(view, context)\n"
        + "        return replace(made, quantized=dict.fromkeys(made.quantized, {}))\n",
        "broken 1.5: Part failed: AttributeError: 'dict' object has no attribute",
    ),
    "an error in its files": (
        CONVERTS + "    def files(self, variant):\n" + "        raise RuntimeError('no files')\n",
        "broken 1.5: Part failed: RuntimeError: no files",
    ),
    "a file of everybody's": (
        CONVERTS + "    def files(self, variant):\n        return {'README.md': b''}\n",
        "broken 1.5: Part failed: ValueError: files gave 'README.md', which is no file",
    ),
    "a shard of its own": (
        CONVERTS + "    def files(self, variant):\n        return {variant.shards[0].name: b''}\n",
        "broken 1.5: Part failed: ValueError: files gave 'model-00001-of-",
    ),
    "nothing from convert": (
        CONVERTS + "    def convert(self, view, context):\n        return None\n",
        "broken 1.5: Part failed: TypeError: convert gave NoneType",
    ),
    "a number for metadata": (
        CONVERTS + "    def metadata(self):\n        return 5\n",
        "broken 1.5: Part failed: TypeError: metadata gave int",
    ),
    "an exit": (
        CONVERTS + "    def prepare(self, view, context):\n        raise SystemExit(0)\n",
        "broken 1.5: Part failed: SystemExit: 0",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_plugin_is_named(
    project: Project, carnice: Carnice, install: Install, name: str
) -> None:
    """What a format of another package raises, while it is planned or packaged, is one sentence."""
    module, sentence = FAILING[name]
    install("broken", module, "[carnice_build.formats]\npart = broken:Part\n")
    serve = "package: {serve: nvfp4-vllm}\n" if "engines" in name else ""
    project.recipe("uses", USES["format"] + serve)
    finished = carnice("build", "uses", "--jobs", 1)

    assert 1 == finished.code
    assert sentence in finished.err.splitlines()[-1]
    assert "Traceback" not in finished.err
    assert not (project.out / "uses").exists()


def test_a_reader_that_is_none_keeps_no_other_folder_from_being_read(install: Install) -> None:
    """The readers of all other formats are there."""
    ours = readers()
    module = CONVERTS + "    @classmethod\n    def reader(cls):\n        return None\n"
    install("broken", module, "[carnice_build.formats]\npart = broken:Part\n")

    assert ours == readers()


NESTED = """
class Rule(Strict):
    {key}: int = Field(description="Mine.")

class Part(MlxFormat):
    format: Literal['{name}']
    more: list[Rule]
"""


def test_models_of_one_name_have_a_schema_each(install: Install) -> None:
    """Two packages, and ours, may call their models alike; each keeps its own keys."""
    for name, key in (("one", "first"), ("two", "second")):
        text = HEAD + NESTED.format(name=name, key=key)
        install(name, text, f"[carnice_build.formats]\n{name} = {name}:Part\n")
    found, problems = usable_vocabulary()
    schema = json_schema(found)
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)

    def complaints(form: str, **section: object) -> list[str]:
        return [
            error.message
            for error in validator.iter_errors({"quantize": section | {"format": form}})
        ]

    assert [] == problems
    assert [] == complaints("one", more=[{"first": 1}], rules=[{"match": "*", "bits": 4}])
    assert [] == complaints("two", more=[{"second": 1}])
    assert complaints("one", more=[{"second": 1}])
    assert complaints("two", more=[{"first": 1}])
    assert complaints("mlx", more=[{"first": 1}])
