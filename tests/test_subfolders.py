"""Published folders hold files in folders of their own, and never one outside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import contents

from carnice_build.checkpoint.checkpoint import INDEX_NAME, is_plain_path
from carnice_build.errors import StoreError
from carnice_build.formats.folder import BUILD_NAME, ModelFolder
from carnice_build.package.folder import LOCK_NAME, assemble, is_current
from carnice_build.store.digests import digest_bytes
from carnice_build.verification.digests import check_digests
from carnice_build.verification.result import Outcome

NAMES = ("config.json", "README.md", INDEX_NAME, "serve/run.sh", "serve/hermes/cli-config.yaml")
HOSTILE = (
    "",
    "/",
    "/etc/victim",
    "..",
    "../victim",
    "serve/../victim",
    "serve/../../victim",
    "serve/./victim",
    "serve//victim",
    "serve/",
    "./victim",
    ".git/config",
    "serve/.profile",
    ".victim",
    "serve\\victim",
    "serve/vic\0tim",
    "a/b/c/victim",
)


def files(content: bytes = b"hello") -> dict[str, bytes]:
    """Files of a folder with their build.json, whose key is `k`."""
    found = dict.fromkeys(NAMES, content)
    table = {
        name: {"size": len(item), "digest": digest_bytes(item)} for name, item in found.items()
    }
    record = {"key": "k", "files": table, "tensors": {}}
    return {**found, BUILD_NAME: json.dumps(record).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An assembled folder."""
    path = tmp_path / "out" / "variant"
    assemble(path, [], files())
    return path


def opened(folder: Path) -> ModelFolder:
    """The folder as `check_digests` gets it."""
    record = json.loads((folder / BUILD_NAME).read_bytes())
    return ModelFolder(folder, record, {}, {}, {}, [])


def test_files_lie_in_their_folders(folder: Path) -> None:
    """Every file is in its place, readable for all, and the build is current."""
    assert files() == contents(folder)
    assert {0o755} == {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()}
    assert is_current(folder, "k", [])
    assert Outcome.PASSED is check_digests(opened(folder), 1).outcome


def test_a_folder_is_replaced_whole(folder: Path) -> None:
    """What a new build does not have is gone, folders included."""
    assemble(folder, [], {"config.json": b"{}"})

    assert ["config.json"] == [path.name for path in folder.rglob("*")]
    assert {folder.name, LOCK_NAME} == {path.name for path in folder.parent.iterdir()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """Parents, absolute paths, empty, hidden and deep names: nothing is written at all."""
    with pytest.raises(StoreError, match="cannot hold a file"):
        assemble(tmp_path / "out" / "variant", [], {"config.json": b"{}", name: b"x"})
    assert {} == contents(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_of_such_a_name_is_not_believed(folder: Path, name: str) -> None:
    """build.json cannot make a build look outside, and verification says that it tries."""
    record = json.loads((folder / BUILD_NAME).read_bytes())
    record["files"][name] = {"size": 5}
    (folder / BUILD_NAME).write_text(json.dumps(record))
    check = check_digests(opened(folder), 1)

    assert not is_current(folder, "k", [])
    assert Outcome.FAILED is check.outcome
    assert any(repr(name) in problem for problem in check.problems)


@given(st.lists(st.sampled_from(["a", "..", ".", "", ".b", "c.d", "\\", "e f"]), max_size=5))
def test_an_accepted_path_stays_inside(parts: list[str]) -> None:
    """Whatever is accepted is below the folder, in at most two others, and written one way."""
    path = "/".join(parts)
    if is_plain_path(path):
        normal = os.path.normpath(f"/folder/{path}")

        assert f"/folder/{path}" == normal
        assert path.count("/") <= 2
        assert not any(part.startswith(".") for part in parts)


def test_damage_in_a_folder_is_seen(folder: Path) -> None:
    """A lost file, one of another size, and one of other bytes."""
    lost, longer, other = (folder / name for name in ("serve/run.sh", *NAMES[-1:], "config.json"))
    lost.unlink()

    assert not is_current(folder, "k", [])
    longer.write_bytes(b"hello, world")
    other.write_bytes(b"HELLO")
    problems = " ".join(check_digests(opened(folder), 1).problems)

    assert "serve/run.sh is missing" in problems
    assert "serve/hermes/cli-config.yaml has 12 bytes instead of 5" in problems
    assert "config.json is damaged" in problems


@pytest.mark.parametrize("name", ["serve", "serve/hermes", "serve/run.sh"])
def test_a_link_in_place_of_a_part_is_not_current(folder: Path, tmp_path: Path, name: str) -> None:
    """A folder or file that leads elsewhere is made anew, and what it leads to stays."""
    elsewhere = tmp_path / "elsewhere" / "part"
    elsewhere.parent.mkdir()
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = contents(elsewhere.parent)

    assert not is_current(folder, "k", [])
    assemble(folder, [], files())

    assert not (folder / name).is_symlink()
    assert is_current(folder, "k", [])
    assert before == contents(elsewhere.parent)
