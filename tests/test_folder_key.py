"""A folder's key covers all that the folder holds, and a build keeps only what it would write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from conftest import Project
from tiny import read_json, write_json

import carnice_build
from carnice_build.commands.build import BuiltVariant, build_variants
from carnice_build.formats import card
from carnice_build.formats.autoround import files as autoround
from carnice_build.package import files as base
from carnice_build.serving import readme

ROUNDED = """
extends: [_base/carnice-text.yaml, preset:int4-rtn]
variant: rounded
description: Rounded
quantize: {method: nearest}
"""

Patch = pytest.MonkeyPatch


@pytest.fixture
def rounded(project: Project) -> Project:
    """A project with a variant that has a card, files of a packager and serving files, built."""
    project.recipe("rounded", ROUNDED)
    assert build(project).packaged
    return project


def build(project: Project) -> BuiltVariant:
    """Build the variant."""
    (report,) = build_variants(["rounded"], project.options()).variants
    return report


def _edit_card_template(patch: Patch, root: Path) -> None:
    templates = Path(card.__file__).parent / "templates"
    shutil.copytree(templates, root / "templates")
    page = root / "templates" / "_torch.md.j2"
    page.write_text(page.read_text().replace("## Licence", "## Terms"))
    loader = jinja2.FileSystemLoader(root / "templates")
    patch.setattr(jinja2, "PackageLoader", lambda package: loader)


def _edit_packager(patch: Patch, root: Path) -> None:
    patch.setattr(autoround, "VERSION", "0.15.2")


def _edit_card_facts(patch: Patch, root: Path) -> None:
    facts = card._facts
    patch.setattr(card, "_facts", lambda variant: {**facts(variant), "title": "Another"})


def _edit_page_of_serving(patch: Patch, root: Path) -> None:
    patch.setattr(readme, "_sizes", lambda memory: ["a", "b", "c", "d"])


def _edit_index(patch: Patch, root: Path) -> None:
    patch.setattr(base, "_index", lambda variant: b"{}")


def _edit_provenance(patch: Patch, root: Path) -> None:
    patch.setattr(base, "source_records", lambda variant: {})


def _edit_version(patch: Patch, root: Path) -> None:
    patch.setattr(base, "__version__", carnice_build.__version__ + ".post1")


@pytest.mark.parametrize(
    "edit",
    [
        _edit_card_template,
        _edit_packager,
        _edit_card_facts,
        _edit_page_of_serving,
        _edit_index,
        _edit_provenance,
        _edit_version,
    ],
)
def test_whatever_would_be_written_otherwise_is_written(
    rounded: Project,
    tmp_path: Path,
    monkeypatch: Patch,
    edit: Callable[[Patch, Path], None],
) -> None:
    """An edit of code or templates that changes one file makes the folder anew, and no weight."""
    before = rounded.built("rounded")
    edit(monkeypatch, tmp_path)
    first, second = build(rounded), build(rounded)
    after = rounded.built("rounded")

    changed = {name for name in before if before[name] != after[name]}
    assert (True, 0, False) == (first.packaged, first.actions_run, second.packaged)
    assert {"build.json"} <= changed
    assert not any(name.endswith(".safetensors") for name in changed)


def test_the_key_is_that_of_what_is_written(rounded: Project) -> None:
    """build.json names every other file by its digest, and its key is a digest of all it says."""
    folder = rounded.out / "rounded"
    record = read_json(folder / "build.json")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    assert names - {"build.json"} == set(record["files"])
    assert record.pop("key") == base.Rendered({}, record).key


@pytest.mark.parametrize("change", [{"recipe": {}}, {"parameters": 1}, {"figures": {"a": [1.0]}}])
def test_every_entry_of_the_record_is_in_the_key(rounded: Project, change: dict[str, Any]) -> None:
    """Two records that differ anywhere have two keys."""
    record = read_json(rounded.out / "rounded" / "build.json")
    key = record.pop("key")

    assert key != base.Rendered({}, {**record, **change}).key


def test_a_record_that_was_edited_is_made_anew(rounded: Project) -> None:
    """A folder under another key is not the one that would be built."""
    path = rounded.out / "rounded" / "build.json"
    record = read_json(path)
    write_json(path, {**record, "key": "0" * 64})

    assert build(rounded).packaged
    assert record == read_json(path)


# --- scripts -------------------------------------------------------------------------------------


def modes(project: Project) -> dict[str, int]:
    """The modes of all files of the folder but shards."""
    folder = project.out / "rounded"
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }


def test_scripts_can_be_run_and_nothing_else(rounded: Project) -> None:
    """Launches and the request have mode 0755, all other files 0644."""
    found = modes(rounded)
    scripts = {name for name in found if name.endswith(".sh")}

    assert {"serve/request.sh"} < scripts
    assert {0o755} == {found[name] for name in scripts}
    assert {0o644} == {mode for name, mode in found.items() if name not in scripts}


def test_a_build_with_nothing_to_do_lets_scripts_be_run_again(rounded: Project) -> None:
    """A copy that lost its modes gets them back, and no file is written."""
    before = modes(rounded)
    scripts = list((rounded.out / "rounded" / "serve").glob("*.sh"))
    for script in scripts:
        script.chmod(0o600)
    times = [script.stat().st_mtime_ns for script in scripts]

    assert not build(rounded).packaged
    assert before == modes(rounded)
    assert times == [script.stat().st_mtime_ns for script in scripts]
