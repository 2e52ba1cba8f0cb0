"""Without a network, what any tool left in the Hugging Face cache builds, or the error says why.

The caches are laid out here as `huggingface_hub` lays them out; there is no hub at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import pytest
from conftest import Finished, Project
from fake_hub import CARNICE, FakeHub
from fake_repo import Repo
from huggingface_hub import constants, set_client_factory, snapshot_download
from huggingface_hub.utils import _http
from test_hub import VARIANT
from tiny import contents, write_json

from carnice_build.calibration.hub_rows import rows_on_hub
from carnice_build.checkpoint import patience
from carnice_build.checkpoint.checkpoint import INDEX_NAME
from carnice_build.checkpoint.hub import open_hub
from carnice_build.checkpoint.hub_listing import dataset_commit
from carnice_build.commands.build import build_variants
from carnice_build.errors import CheckpointError

pytest_plugins = ["hub_fixtures"]

Carnice = Callable[..., Finished]
COMMIT, NEWER = "c" * 40, "d" * 40
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Cache:
    """A Hugging Face cache that some other tool wrote."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def folder(self, repo: str, kind: str = "models") -> Path:
        return self.home / "hub" / f"{kind}--{repo.replace('/', '--')}"

    def add(
        self,
        repo: str,
        source: Path,
        *,
        commit: str = COMMIT,
        branch: str | None = "main",
        links: bool = True,
        listed: bool = False,
        kind: str = "models",
    ) -> Path:
        """Keep the files of `source`, as links or as copies, and return the snapshot's folder."""
        root = self.folder(repo, kind)
        snapshot = root / "snapshots" / commit
        blobs = Repo(source, commit, set())
        names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
        for name in names:
            blob = root / "blobs" / blobs.content_id(name.as_posix())
            place = snapshot / name
            for folder in (blob.parent, place.parent):
                folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, blob if links else place)
            if links:
                place.symlink_to(os.path.relpath(blob, place.parent))
        if branch is not None:
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / branch).write_text(commit)
        if listed:
            files = {
                name.as_posix(): {
                    "size": (source / name).stat().st_size,
                    "blob_id": hashlib.sha1(name.name.encode()).hexdigest(),
                }
                for name in names
            }
            (root / "trees").mkdir(exist_ok=True)
            write_json(root / "trees" / f"{commit}.json", {"format_version": 1, "files": files})
        return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """An empty cache, and offline mode; a request to anybody fails the test."""
    home = tmp_path / "huggingface"
    for name, value in {
        "ENDPOINT": "http://127.0.0.1:1",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_HUB_OFFLINE": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    set_client_factory(_http.default_client_factory)
    yield Cache(home)
    set_client_factory(_http.default_client_factory)


@pytest.fixture
def offline(project: Project, cache: Cache) -> Project:
    """A project whose profile `online` means the hub for its body."""
    with (project.recipes / "_profiles.yaml").open("a") as file:
        file.write(f"online:\n  {CARNICE}: hub\n")
    return project


def files(folder: Path) -> dict[str, bytes]:
    """All files of a build but those that tell how it was made."""
    made = ("README.md", "build.json")
    return {name: content for name, content in contents(folder).items() if name not in made}


def built(project: Project, **options: Any) -> dict[str, bytes]:
    """The files of a build from the hub."""
    build_variants([VARIANT], project.options(profile="online", **options))
    return files(project.out / VARIANT)


def built_locally(project: Project) -> dict[str, bytes]:
    """The files of a build from the checkpoint itself."""
    other = {"out": project.root / "local", "cache": project.root / "other"}
    build_variants([VARIANT], project.options(**other))
    return files(project.root / "local" / VARIANT)


# Models

stream_or_not = pytest.mark.parametrize("stream", [False, True], ids=["download", "stream"])


@stream_or_not
@pytest.mark.parametrize("listed", [False, True], ids=["unlisted", "listed"])
@pytest.mark.parametrize("links", [False, True], ids=["copies", "links"])
def test_a_branch_builds_from_the_cache(
    offline: Project, cache: Cache, links: bool, listed: bool, stream: bool
) -> None:
    """What another tool put there has the bytes of a build from a folder, and names its commit."""
    cache.add(CARNICE, offline.checkpoint, links=links, listed=listed)

    assert built_locally(offline) == built(offline, stream=stream)
    record = json.loads((offline.out / VARIANT / "build.json").read_bytes())
    assert COMMIT == record["sources"]["body"]["commit"]


@stream_or_not
def test_a_pinned_commit_builds_without_a_branch(
    offline: Project, cache: Cache, stream: bool
) -> None:
    """A commit is its own name: `refs` is not needed."""
    cache.add(CARNICE, offline.checkpoint, branch=None)
    pinned = (f"sources.body.revision={COMMIT}",)

    assert built_locally(offline) == built(offline, stream=stream, overrides=pinned)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_command_line_builds_offline(offline: Project, cache: Cache, variable: str) -> None:
    """Either variable that the library knows keeps `carnice` off the network."""
    cache.add(CARNICE, offline.checkpoint)
    command = [sys.executable, "-m", "carnice_build", "build", VARIANT, "--profile", "online"]
    environment = {
        **{name: value for name, value in os.environ.items() if "OFFLINE" not in name},
        "HF_HOME": str(cache.home),
        "HF_ENDPOINT": "http://127.0.0.1:1",
        variable: "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert 0 == done.returncode, done.stderr
    assert built_locally(offline) == files(offline.out / VARIANT)


def test_a_download_of_the_library_builds_offline(
    project: Project, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `snapshot_download` itself put there builds, though we never asked the hub."""
    with (project.recipes / "_profiles.yaml").open("a") as file:
        file.write(f"online:\n  {CARNICE}: hub\n")
    hub.add(CARNICE, project.checkpoint, COMMIT)
    snapshot_download(CARNICE, revision=COMMIT, cache_dir=constants.HF_HUB_CACHE)
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pinned = (f"sources.body.revision={COMMIT}",)

    assert built_locally(project) == built(project, overrides=pinned)
    assert [] == hub.requests


def test_a_network_changes_nothing(project: Project, hub: FakeHub, cache: Cache) -> None:
    """What was built offline is not built again when the hub answers: its content is known."""
    with (project.recipes / "_profiles.yaml").open("a") as file:
        file.write(f"online:\n  {CARNICE}: hub\n")
    cache.add(CARNICE, project.checkpoint)
    built(project)
    hub.add(CARNICE, project.checkpoint, COMMIT)
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.hub_url, False
    report = build_variants([VARIANT], project.options(profile="online"))

    assert 0 == report.actions_run
    assert not [item for item in hub.requests if item.range]


def test_a_notice_tells_that_files_may_be_missing(
    offline: Project, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a cache that lists a repository's files can say that it holds all."""
    cache.add(CARNICE, offline.checkpoint, listed=True)
    open_hub(CARNICE, "main", stream=False)
    assert "" == caplog.text
    (cache.folder(CARNICE) / "trees" / f"{COMMIT}.json").rename(cache.home / "away")
    cache.add(CARNICE, offline.checkpoint, commit=NEWER, listed=False)
    open_hub(CARNICE, "main", stream=False)

    assert f"{CARNICE}@ddddddd is taken as the Hugging Face cache has it" in caplog.text


MISSING = {
    "the config": (["config.json"], "has no config.json"),
    "a shard": (SHARDS[1:], f"{SHARDS[1]}', which is missing"),
    "all shards": (SHARDS, f"names {len(SHARDS)} shards that are missing"),
    "all weights": ([*SHARDS, INDEX_NAME], "holds no safetensors file"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_the_cache_does_not_hold_is_named(offline: Project, cache: Cache, what: str) -> None:
    """An error of a part of a repository says what is missing, and that we are offline."""
    names, words = MISSING[what]
    snapshot = cache.add(CARNICE, offline.checkpoint)
    for name in names:
        (snapshot / name).unlink()

    with pytest.raises(CheckpointError) as caught:
        open_hub(CARNICE, "main", stream=False)
    assert words in caught.value.what
    assert "offline mode (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE) is on" in caught.value.what
    assert what != "all shards" or all(shard in str(caught.value) for shard in SHARDS)
    assert f"{CARNICE}@ccccccc" in str(caught.value.where)


@stream_or_not
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, *SHARDS, "tokenizer_config.json"])
@pytest.mark.parametrize("how", ["no link", "no blob"])
def test_a_listed_file_that_is_not_there_is_named(
    offline: Project, cache: Cache, name: str, stream: bool, how: str
) -> None:
    """Where the cache lists a repository's files, no build goes without one of them."""
    (offline.checkpoint / "tokenizer_config.json").write_text("{}")
    place = cache.add(CARNICE, offline.checkpoint, listed=True) / name
    (place if how == "no link" else place.resolve()).unlink()

    with pytest.raises(CheckpointError) as caught:
        built(offline, stream=stream)
    assert f"{CARNICE}@ccccccc/{name}" == caught.value.where
    assert "not in the Hugging Face cache, and offline mode (HF_HUB_OFFLINE" in caught.value.what


def test_a_file_that_was_cut_is_refused(offline: Project, cache: Cache) -> None:
    """A file that is shorter than the list says is an error, never a shorter model."""
    snapshot = cache.add(CARNICE, offline.checkpoint, listed=True)
    blob = (snapshot / SHARDS[0]).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match=f"{SHARDS[0]}: has .* in the Hugging Face cache"):
        built(offline)


@pytest.mark.parametrize("ref", [None, "", "f" * 40, "../../..", "main"])
def test_a_branch_that_is_nowhere_is_an_error(
    offline: Project, cache: Cache, ref: str | None
) -> None:
    """Without a commit that is there, the branch is named, and that we are offline."""
    cache.add(CARNICE, offline.checkpoint, branch=None)
    if ref is not None:
        (cache.folder(CARNICE) / "refs").mkdir()
        (cache.folder(CARNICE) / "refs" / "main").write_text(ref)

    with pytest.raises(CheckpointError, match=f"^{CARNICE}@main: .* offline mode"):
        open_hub(CARNICE, "main", stream=False)


def note_commit(project: Project, hub: FakeHub, commit: str) -> None:
    """Have us ask the hub for the branch, and note that it is at `commit`."""
    hub.add(CARNICE, project.checkpoint, commit)
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.hub_url, False
    assert commit == open_hub(CARNICE, "main", stream=True)[1]
    constants.HF_HUB_OFFLINE = True


@pytest.mark.parametrize("ours_is_newer", [False, True])
def test_a_branch_is_where_it_was_last_seen(
    offline: Project, hub: FakeHub, cache: Cache, ours_is_newer: bool
) -> None:
    """Of our own note and another tool's, the one that was made later counts."""
    note_commit(offline, hub, NEWER)
    cache.add(CARNICE, offline.checkpoint)
    ref = cache.folder(CARNICE) / "refs" / "main"
    os.utime(ref, (1, 1) if ours_is_newer else None)

    assert (NEWER if ours_is_newer else COMMIT) == open_hub(CARNICE, "main", stream=True)[1]


def test_a_hub_that_does_not_answer_leaves_the_cache(
    offline: Project, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a network and without offline mode it is the same, after as many attempts as ever."""
    cache.add(CARNICE, offline.checkpoint)
    constants.HF_HUB_OFFLINE = False

    assert COMMIT == open_hub(CARNICE, "main", stream=False)[1]
    assert f"cannot reach the hub: {CARNICE} stays at ccccccc" in caplog.text


def test_offline_nothing_need_be_written(offline: Project, cache: Cache) -> None:
    """A cache in which nothing can be noted, as on a read-only disk, is read all the same."""
    cache.add(CARNICE, offline.checkpoint)
    (cache.home / "assets").write_text("no folder")

    assert built_locally(offline) == built(offline)


# Datasets

NAME = "owner/lines"
ROWS = [{"text": f"There are {number} green bottles."} for number in range(12)]
CARD = """---
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/*.jsonl
- config_name: hard
  data_files: hard.jsonl
---
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose split `train` of subset `easy` has files that sort by more than one digit."""
    folder = tmp_path / "dataset"
    (folder / "easy").mkdir(parents=True)
    for index, row in enumerate(ROWS):
        (folder / "easy" / f"part-{index}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "hard.jsonl").write_text(json.dumps({"text": "Too many."}) + "\n")
    (folder / "README.md").write_text(CARD)
    return folder


def rows(subset: str = "easy") -> list[dict[str, Any]]:
    return list(rows_on_hub(NAME, subset, "train", COMMIT))


@pytest.fixture
def no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends a request fails."""

    def refuse(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        raise AssertionError(request.url)

    monkeypatch.setattr(httpx.Client, "send", refuse)


@pytest.mark.usefixtures("no_requests")
@pytest.mark.parametrize("links", [False, True], ids=["copies", "links"])
def test_a_dataset_is_read_from_the_cache(cache: Cache, dataset: Path, links: bool) -> None:
    """A whole dataset gives its rows by subset and split, without a request."""
    cache.add(NAME, dataset, listed=True, links=links, kind="datasets")
    by_name = sorted(range(len(ROWS)), key=str)

    assert COMMIT == dataset_commit(NAME, "main")
    assert sorted(ROWS, key=str) == sorted(rows(), key=str)
    assert [{"text": "Too many."}] == rows("hard")
    assert [ROWS[index] for index in by_name] == rows()


def test_a_dataset_gives_the_rows_that_the_hub_gives(
    hub: FakeHub, cache: Cache, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build with a network and one without calibrate on the same rows, in the same order."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.hub_url)
    monkeypatch.setenv("HF_ENDPOINT", hub.hub_url)
    cache.add(NAME, dataset, listed=True, kind="datasets")
    offline = rows()
    hub.add(f"datasets/{NAME}", dataset, COMMIT)
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.hub_url, False

    assert rows() == offline


@pytest.mark.usefixtures("no_requests")
@pytest.mark.parametrize("listed", [False, True], ids=["unlisted", "listed"])
def test_a_part_of_a_dataset_is_refused(cache: Cache, dataset: Path, listed: bool) -> None:
    """Rows of some files never pass for those of all; the error says how to get the rest."""
    snapshot = cache.add(NAME, dataset, listed=listed, kind="datasets")
    (snapshot / "easy" / "part-0.jsonl").unlink()

    with pytest.raises(CheckpointError) as caught:
        rows()
    assert ("easy/part-0.jsonl is not" in caught.value.what) is listed
    assert "offline mode" in caught.value.what
    assert f"`hf download --repo-type dataset {NAME}`" in str(caught.value.expected)


def test_a_dataset_that_is_nowhere_is_an_error(cache: Cache) -> None:
    """Neither its branch nor its rows are known."""
    with pytest.raises(CheckpointError, match=f"^datasets/{NAME}@main: .*offline mode"):
        dataset_commit(NAME, "main")
    with pytest.raises(CheckpointError, match=f"^datasets/{NAME}@{COMMIT}: is not as a whole"):
        rows()
