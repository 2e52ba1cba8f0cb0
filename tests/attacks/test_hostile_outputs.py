"""Hostile output folders: only what is a build is replaced, and nothing behind a link."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attacking import Attack, check_named, differing
from conftest import Project
from tiny import contents

from carnice_build.package.folder import LOCK_NAME

pytest_plugins = ["attacking"]


@pytest.mark.parametrize(
    "target",
    [
        "foreign",
        "empty",
        "nowhere",
    ],
)
def test_a_link_in_place_of_the_folder_leads_nowhere(
    project: Project, attack: Attack, target: str
) -> None:
    """A link is refused or replaced; what it leads to stays as it is."""
    (project.root / "empty").mkdir()
    (project.root / "foreign").mkdir()
    (project.root / "foreign" / "diary.txt").write_text("dear diary")
    project.out.mkdir()
    (project.out / "mlx-4bit").symlink_to(project.root / target)
    finished = attack("build", "mlx-4bit")

    assert {"diary.txt": b"dear diary"} == contents(project.root / "foreign")
    assert {} == contents(project.root / "empty")
    if finished.code:
        check_named(finished, "mlx-4bit", code=None)


@pytest.mark.parametrize("place", ["build", "build/mlx-4bit"])
def test_a_file_in_place_of_a_folder_is_named(project: Project, attack: Attack, place: str) -> None:
    """`--out`, or a variant's folder, that is a file."""
    path = project.root / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("dear diary")

    check_named(attack("build", "mlx-4bit"), place, code=None)
    assert "dear diary" == path.read_text()


def test_a_source_is_not_overwritten(project: Project, attack: Attack) -> None:
    """A checkpoint that lies where the variant would go is left alone."""
    shutil.move(project.checkpoint, project.out / "mlx-4bit")
    before = contents(project.out)
    finished = attack("build", "mlx-4bit", "--source", f"body={project.out / 'mlx-4bit'}")

    check_named(finished, "is a source of this build")
    assert [] == differing(before, contents(project.out))


def test_a_source_that_calls_itself_a_build_is_not_overwritten(
    project: Project, attack: Attack
) -> None:
    """A build.json in a checkpoint does not make it ours."""
    (project.checkpoint / "build.json").write_text('{"key": "x"}')
    shutil.move(project.checkpoint, project.out / "mlx-4bit")
    before = contents(project.out)
    attack("build", "mlx-4bit", "--source", f"body={project.out / 'mlx-4bit'}")

    assert [] == differing(before, contents(project.out))


RECORDS: dict[str, Callable[[dict[str, object]], object]] = {
    "a list": lambda record: [],
    "files that are a list": lambda record: record | {"files": []},
    "files that are numbers": lambda record: record | {"files": {"config.json": 1}},
    "files without sizes": lambda record: record | {"files": {"config.json": {}}},
    "files that are paths": lambda record: record | {"files": {"../../victim": {"size": 8}}},
    "files that are paths in disguise": lambda record: (
        record | {"files": {"serve/../../../victim": {"size": 8}}}
    ),
    "files that are absolute": lambda record: record | {"files": {"/etc/hostname": {"size": 8}}},
    "files that are hidden": lambda record: record | {"files": {"serve/.profile": {"size": 8}}},
    "files that are deep": lambda record: record | {"files": {"a/" * 500 + "b": {"size": 8}}},
    "no files": lambda record: record | {"files": {}},
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_forged_record_is_not_believed(project: Project, attack: Attack, what: str) -> None:
    """A build.json with the right key and nonsense beside it: the folder is made again."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    path = project.out / "mlx-4bit" / "build.json"
    record = RECORDS[what](json.loads(path.read_text()))
    path.write_text(json.dumps(record))
    (project.out / "mlx-4bit" / "config.json").write_text("{}")
    finished = attack("build", "mlx-4bit")

    if finished.code:
        check_named(finished, "holds files that are not a build", code=None)
    else:
        assert [] == differing(expected, project.built("mlx-4bit"))


def test_a_folder_behind_a_link_is_not_taken_for_ours(project: Project, attack: Attack) -> None:
    """A build.json that names a file behind a link: the folder is made again, the rest stays."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    foreign = project.root / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("dear diary")
    folder = project.out / "mlx-4bit"
    (folder / "serve").symlink_to(foreign)
    record = json.loads((folder / "build.json").read_text())
    record["files"]["serve/diary.txt"] = {"size": len("dear diary")}
    (folder / "build.json").write_text(json.dumps(record))
    attack("build", "mlx-4bit")

    assert not (folder / "serve").exists()
    assert [] == differing(expected, project.built("mlx-4bit"))
    assert {"diary.txt": b"dear diary"} == contents(foreign)


def test_an_edited_shard_is_linked_anew(project: Project, attack: Attack) -> None:
    """A shard of the folder that was replaced by other bytes of its size is put right."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    shard = next((project.out / "mlx-4bit").glob("*.safetensors"))
    size = shard.stat().st_size
    shard.unlink()
    shard.write_bytes(os.urandom(size))
    attack("build", "mlx-4bit")

    assert [] == differing(expected, project.built("mlx-4bit"))


def test_leftovers_are_not_followed(project: Project, attack: Attack) -> None:
    """What looks like the rest of a killed build, but leads elsewhere, is not emptied."""
    precious = project.root / "precious"
    precious.mkdir()
    (precious / "diary.txt").write_text("dear diary")
    project.out.mkdir()
    for name in (".mlx-4bit.old-1", ".mlx-4bit.new-1"):
        (project.out / name).symlink_to(precious)
    (project.out / ".mlx-4bit.old-2").mkdir()
    (project.out / ".mlx-4bit.old-2" / "link").symlink_to(precious)

    assert 0 == attack("build", "mlx-4bit").code
    assert {"diary.txt": b"dear diary"} == contents(precious)


def test_a_full_disk_while_packaging_is_named(
    project: Project, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space for the small files: one line, and no half a folder."""

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carnice_build.package.folder.link_or_copy", full)

    check_named(attack("build", "mlx-4bit"), "disk is full", code=1)
    assert [LOCK_NAME] == [path.name for path in project.out.iterdir()]
