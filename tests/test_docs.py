"""What the documentation says is so: its examples run, its links lead somewhere."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import runpy
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, Finished, Project
from pages import DOCS, files_of, shown, write_files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from test_house import LAYERS, PACKAGE
from tiny import Tensor, read_all_tensors, read_json

from carnice_build.formats.registry import FORMATS
from carnice_build.models import GROUP as FAMILIES
from carnice_build.models import known_types
from carnice_build.planning.vocabulary import vocabulary
from carnice_build.recipe.schema import json_schema
from carnice_build.steps.registry import STEPS

FOLDERS = (".", "docs", "demo", "cache", "tests/attacks")
PAGES = sorted(page for folder in FOLDERS for page in (REPOSITORY / folder).glob("*.md"))
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix()
)

Carnice = Callable[..., Finished]


def test_first_five_minutes(tmp_path: Path, carnice: Carnice) -> None:
    """The commands of README.md print on the demo checkpoints what it shows."""
    recipes = ("--recipes", REPOSITORY / "recipes", "--cache", tmp_path / "cache")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    knob = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}'
    commands: list[tuple[object, ...]] = [
        ("build", "mlx-mixed_3_6", "--out", tmp_path / "build"),
        ("build", "mlx-mixed_3_6", "--out", tmp_path / "build"),
        ("explain", "mlx-mixed_3_6", "--set", knob),
        ("build", "mlx-4bit", "mlx-6bit", "--out", tmp_path / "build"),
        ("explain", "mlx-mixed_4_6"),
    ]
    finished = [carnice(*command, *recipes) for command in commands]

    assert [0] * len(commands) == [item.code for item in finished]
    for item in (*finished[:3], finished[4]):
        # Seconds and memory depend on the machine.
        figures = r"in [\d.]+ s, peak memory [\d.]+ [MG]B"
        printed = re.sub(figures, "in ... s, peak memory ... MB", item.out)
        assert printed in readme


def test_reference_is_current() -> None:
    """docs/recipes.md says what the schema says; `python docs/make_reference.py` makes it so."""
    render = runpy.run_path(str(DOCS / "make_reference.py"))["render"]
    page = shown("recipes.md")

    assert render(page) == page


PARTS: dict[str, type[BaseModel]] = {
    **{f"Step {kind}": step for kind, step in STEPS.items()},
    **{f"Format {kind}": number_format for kind, number_format in FORMATS.items()},
}


def knobs(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a step or format, and of the sections below it, with what is known of each."""
    for name, field in model.model_fields.items():
        yield field.alias or name, field
        for nested in models_in(field.annotation):
            yield from knobs(nested)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a key may hold, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from models_in(part)


@pytest.mark.parametrize("part", PARTS)
def test_every_knob_is_described(part: str) -> None:
    """Each key has a description, which is in the part's own chapter of docs/recipes.md.

    The key `format` is what the chapter is called by.
    """
    (chapter,) = re.findall(rf"^### {part}\n(.*?)(?=^###? |\Z)", shown("recipes.md"), re.M | re.S)
    rows = chapter.splitlines()
    found = [(key, field.description) for key, field in knobs(PARTS[part]) if key != "format"]
    expected = [(key, text) for key, text in found if text]

    assert expected == found
    for key, text in found:
        assert any(row.startswith(f"| `{key}` |") and f"| {text} |" in row for row in rows), key


def test_schema_accepts_shipped_recipes() -> None:
    """Each file is valid by itself, as an editor sees it."""
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    schema = json_schema(vocabulary())
    validator.check_schema(schema)
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        if path.name != "_profiles.yaml":
            errors = validator(schema).iter_errors(yaml.safe_load(path.read_text()))

            assert [error.message for error in errors] == [], path


def test_new_quant_plans_to_the_stated_size(project: Project, carnice: Carnice) -> None:
    """The recipe of adding-a-quant.md plans at full size to the figures that the page gives."""
    write_files("adding-a-quant.md", "yaml", project.root)
    shutil.copy(REPOSITORY / "recipes" / "_profiles.yaml", project.recipes)
    (project.root / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    finished = carnice("plan", "mlx-mixed_4_8", "--profile", "shapes", "--json")
    page = shown("adding-a-quant.md")

    assert finished.code == 0, finished.err
    (variant,) = json.loads(finished.out)["variants"]
    assert f"{variant['bits_per_weight']:.3f} bits per weight" in page
    assert f"{variant['weights_bytes'] / 1e9:.1f} GB" in page
    assert f"{sum(variant['actions'].values())} to read first" in page


@pytest.fixture
def clip_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project with the package and the recipe of adding-a-transform.md installed."""
    site = project.root / "site"
    write_files("adding-a-transform.md", "python", site)
    write_files("adding-a-transform.md", "yaml", project.root)
    info = site / "clip_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clip-weights\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[carnice_build.steps]\nclip = clip_weights.step:ClipStep\n"
    )
    monkeypatch.syspath_prepend(site)
    return project


def test_new_step_is_planned(clip_project: Project, carnice: Carnice) -> None:
    """A step from an installed package adds its actions to the plan."""
    del clip_project
    explained = carnice("explain", "mlx-4bit-clipped")

    assert explained.code == 0, explained.err
    assert "8 x clip: never built here" in explained.out


def test_new_step_refuses_unknown_key(clip_project: Project, carnice: Carnice) -> None:
    """The step's parameters are checked like those of any other."""
    recipe = clip_project.recipes / "mlx-4bit-clipped.yaml"
    recipe.write_text(recipe.read_text().replace("limit:", "limt:"))
    finished = carnice("plan", "mlx-4bit-clipped")

    assert finished.code == 2
    assert "did you mean 'limit'?" in finished.err


def test_new_step_clips(clip_project: Project, carnice: Carnice) -> None:
    """The built variant differs from mlx-4bit in the clipped modules alone, by smaller scales."""
    finished = carnice("build", "mlx-4bit", "mlx-4bit-clipped", "--jobs", 2)

    assert finished.code == 0, finished.err
    plain = read_all_tensors(clip_project.out / "mlx-4bit")
    clipped = read_all_tensors(clip_project.out / "mlx-4bit-clipped")
    changed = {name.rpartition(".")[0] for name in plain if plain[name] != clipped[name]}
    config = read_json(clip_project.checkpoint / "config.json")
    layers = range(config["text_config"]["num_hidden_layers"])
    assert changed == {f"language_model.model.layers.{layer}.mlp.down_proj" for layer in layers}
    # From -0.05 to 0.05 in 15 steps, one of which may be lost to have zero on a step.
    assert max(largest_scale(clipped[f"{module}.scales"]) for module in changed) < 0.1 / 14 * 1.01
    assert min(largest_scale(plain[f"{module}.scales"]) for module in changed) > 0.1 / 14 * 1.01


def largest_scale(tensor: Tensor) -> float:
    """The largest magnitude in a BF16 tensor."""
    bits = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
    return float(np.abs(bits.view("<f4")).max())


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that is there."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]

    assert missing == []


@each_page
def test_paths_of_a_page_exist(page: Path) -> None:
    """What a page calls a path of the repository is one, or a file that the page itself makes.

    In the package, paths may begin with one of its folders: `formats/base.py`.
    """
    text = page.read_text(encoding="utf-8")
    whole = re.findall(r"(?<![\w/.-])((?:carnice_build|tests|recipes)/[\w./-]*\w)", text)
    folders = "|".join(layer for layer in LAYERS if (PACKAGE / layer).is_dir())
    inner = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    made = {name for language in ("yaml", "python") for name in files_of(page, language)}
    missing = [path for path in whole if path not in made and not (REPOSITORY / path).exists()]
    missing += [path for path in inner if not (PACKAGE / path).exists()]

    assert [] == missing


@each_page
def test_names_of_a_page_exist(page: Path) -> None:
    """What a page calls a module, class or function of the package is one, or an entry point."""
    names = set(re.findall(r"\bcarnice_build(?:\.\w+)+", page.read_text(encoding="utf-8")))
    missing = [name for name in sorted(names - {FAMILIES}) if not is_a_name(name)]

    assert [] == missing


def is_a_name(dotted: str) -> bool:
    """True when it can be imported, or is in a module that can."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


@each_page
def test_members_of_a_page_exist(page: Path) -> None:
    """What a page calls something of a class of ours, as `Format.files`, the class has."""
    pairs = re.findall(r"`([A-Z]\w+)\.(\w+)", page.read_text(encoding="utf-8"))
    ours = members()
    missing = [f"{name}.{part}" for name, part in pairs if part not in ours.get(name, {part})]

    assert [] == missing


@cache
def members() -> dict[str, set[str]]:
    """The classes of the package, and what is defined in each."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                parts = found.setdefault(node.name, set())
                parts |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                parts |= {
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                parts |= {
                    target.id
                    for item in node.body
                    if isinstance(item, ast.Assign)
                    for target in item.targets
                    if isinstance(target, ast.Name)
                }
    return found


def table(page: str, heading: str) -> list[str]:
    """The first cells of the table below a heading, without its own two rows."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (chapter,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"^\| ([^|]+?) \|", chapter, re.M)[1:]


def test_layers_are_told_in_their_order() -> None:
    """CONTRIBUTING.md lists the layers that `test_house` holds, from the top down."""
    assert [f"`{layer}`" for layer in LAYERS] == table("CONTRIBUTING.md", "Layout")


def test_every_variant_is_in_the_readme() -> None:
    """README.md lists each recipe that ships, and no other."""
    shipped = {path.stem for path in (REPOSITORY / "recipes").glob("[!_]*.yaml")}

    assert shipped == set(re.findall(r"`([^`]+)`", " ".join(table("README.md", "Variants"))))


def test_every_profile_is_told() -> None:
    """serving.md lists the launches of each format that an engine serves."""
    served = {name: kind.serving() for name, kind in FORMATS.items()}
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", shown("serving.md"), re.M))
    listed = {name: set(re.findall(r"`([^`]+)`", cell)) for name, cell in rows.items()}

    assert {name: set(serving.profiles) for name, serving in served.items() if serving} == listed


def test_the_schemes_of_profiles_are_told() -> None:
    """serving.md lists those of each profile that is not for all of its format."""
    servings = [serving for kind in FORMATS.values() if (serving := kind.serving())]
    told = {
        name: ", ".join(profile.schemes)
        for serving in servings
        for name, profile in serving.profiles.items()
        if profile.schemes
    }

    assert told == dict(re.findall(r"^- `([^`]+)`: (.+)$", shown("serving.md"), re.M))


def test_what_engines_make_of_schemes_is_told() -> None:
    """compressed-tensors.md has what pages in `serve/` say of cards."""
    serving = FORMATS["compressed-tensors"].serving()
    assert serving is not None
    rows = [
        f"| `{name}` | {support.runs} | {support.since} |"
        for name, support in serving.support["vllm"].items()
    ]
    page = shown("compressed-tensors.md").splitlines()

    assert [] == [row for row in rows if row not in page]


def test_every_variant_of_the_demo_is_in_the_table_of_formats() -> None:
    """formats.md has each recipe of Carnice, once."""
    found = re.findall(r"^\| `[^`]+` \| [^|]+ \| ([^|]+) \|", shown("formats.md"), re.M)
    named = re.findall(r"`([^`]+)`", " ".join(found))
    shipped = {path.stem for path in (REPOSITORY / "recipes").glob("[!_]*.yaml")}

    assert sorted(named) == sorted(shipped - {"qwen3.6-35b-a3b-mlx-4bit"})


def test_every_fact_of_a_family_is_told() -> None:
    """adding-a-family.md names all that an `Architecture` must say."""
    page = shown("adding-a-family.md")
    facts = {name for name in members()["Architecture"] if not name.startswith("_")}

    assert set() == {name for name in facts if f"`{name}`" not in page}


def test_every_family_is_told() -> None:
    """models.md names each model type that has a table."""
    page = shown("models.md")

    assert set() == {name for name in known_types() if f"`{name}`" not in page}


def test_changes_are_told_once() -> None:
    """Each version in CHANGELOG.md has each section at most once, in the order of the format."""
    order = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    for version in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        sections = re.findall(r"^### (.*)$", version, re.M)
        entries = re.findall(r"^- .*$", version, re.M)

        assert [name for name in order if name in sections] == sections
        assert sorted(set(entries)) == sorted(entries)


def test_api_example_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the API page plans and builds as it stands."""
    code = (REPOSITORY / "docs" / "api.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)

    assert names["variant"].bits_per_weight > 5.5
    assert names["result"].actions_run > 0
    assert type(names["seen"][-1]).__name__ == "Packaged"


def test_the_api_offers_what_it_says() -> None:
    """Every public name can be imported, and an unknown one is an AttributeError."""
    import carnice_build

    for name in carnice_build.__all__:
        assert getattr(carnice_build, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = carnice_build.nonsense
