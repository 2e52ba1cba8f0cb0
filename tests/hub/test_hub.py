"""Checkpoints on a hub are planned without their weights, and built as if they were here."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Finished, Project
from fake_hub import CARNICE, QWEN, TOKEN, FakeHub
from huggingface_hub import constants
from tiny import contents, read_json, write_json

from carnice_build.checkpoint.checkpoint import INDEX_NAME, open_checkpoint
from carnice_build.checkpoint.header import encode_header, read_header
from carnice_build.checkpoint.hub import open_hub, open_hub_file
from carnice_build.checkpoint.hub_listing import ALLOWED
from carnice_build.checkpoint.source import LocalFile
from carnice_build.commands.build import build_variants
from carnice_build.commands.plan import plan_variants
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import CheckpointError, RecipeError

pytest_plugins = ["hub_fixtures"]

Carnice = Callable[..., Finished]
VARIANT = "mlx-4bit"
ONLINE = ("--profile", "online")


def weights(hub: FakeHub) -> int:
    """Bytes that were sent of shards."""
    return sum(count for file, count in hub.sent.items() if file.endswith(".safetensors"))


def without_source(folder: dict[str, bytes]) -> dict[str, Any]:
    """The files of a build, card and build.json without what they say of the source's commit."""
    record = json.loads(folder["build.json"])
    record.pop("sources")
    record.pop("key")
    record["files"].pop("README.md")
    card = re.sub(rb"`(main|c{40})`", b"its revision", folder["README.md"])
    return {**folder, "build.json": record, "README.md": card}


def on_disk(project: Project) -> set[str]:
    """Names of the files of the models in the Hugging Face cache."""
    snapshots = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*")
    return {path.name for path in snapshots}


def test_plan_reads_headers_only(online: Project, hub: FakeHub, carnice: Carnice) -> None:
    """A plan fetches both configs, the index and the heads of the shards, and no tokenizer."""
    finished = carnice("plan", VARIANT, *ONLINE, "--json")

    assert finished.code == 0, finished.err
    assert on_disk(online) == {"config.json", "generation_config.json", INDEX_NAME}
    assert all(last < 1 << 16 for _, last in hub.ranges())
    assert len(hub.ranges()) == 2


def test_second_plan_fetches_nothing(online: Project, hub: FakeHub) -> None:
    """Only the branch is looked up again."""
    plan_variants([VARIANT], online.options(profile="online"))
    hub.forget()

    plan_variants([VARIANT], online.options(profile="online"))

    assert [request.file for request in hub.requests] == [f"/api/models/{CARNICE}/revision/main"]


def test_pinned_commit_is_not_looked_up(online: Project, hub: FakeHub) -> None:
    """A recipe that names a commit which is known asks the hub nothing."""
    open_hub(CARNICE, "c" * 40, stream=False)
    hub.forget()

    checkpoint, commit = open_hub(CARNICE, "c" * 40, stream=False)

    assert commit == "c" * 40
    assert checkpoint.tensors
    assert not hub.requests


def test_full_size_plan_moves_little(project: Project, hub: FakeHub, tmp_path: Path) -> None:
    """The plan of the 27B recipe fetches less than 2 MB of its 55 GB, at the real names."""
    shapes = read_json(REPOSITORY / "benchmarks" / "shapes" / "carnice-v2-27b.json")
    folder = tmp_path / "full"
    write_sparse(folder, shapes["config"], shapes["tensors"])
    repo = hub.add(CARNICE, folder)
    for path in folder.glob("*.safetensors"):
        repo.hashes[path.name] = hashlib.sha256(path.name.encode()).hexdigest()
    shutil.copyfile(REPOSITORY / "recipes" / "_profiles.yaml", project.recipes / "_profiles.yaml")

    plan = plan_variants(["mlx-mixed_3_6"], project.options(profile="full"))

    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 54e9
    assert plan.variants[0].weights_bytes > 13e9
    assert hub.bytes_sent < 2e6


def test_an_estimate_tells_what_the_hub_will_send(
    online: Project, hub: FakeHub, carnice: Carnice
) -> None:
    """Of shards every byte that is wanted, and beside these no more than headers."""
    planned = carnice("plan", VARIANT, *ONLINE, "--bandwidth", "1GB/s", "--json")
    expected = json.loads(planned.out)["estimate"]["bytes"]["from_hub"]
    before = weights(hub)
    build_variants([VARIANT], online.options(profile="online", stream=True))

    assert 0 <= weights(hub) - before - expected < 50_000


def write_sparse(folder: Path, config: Any, tensors: dict[str, list[Any]]) -> None:
    """A checkpoint with true headers and 5 GB shards that take no disk, and a big tokenizer."""
    folder.mkdir()
    shards: list[list[tuple[str, TensorSpec]]] = []
    room = 0
    for name, (dtype, shape) in tensors.items():
        spec = TensorSpec(dtype, tuple(shape))
        if spec.nbytes > room:
            shards.append([])
            room = 5_000_000_000
        shards[-1].append((name, spec))
        room -= spec.nbytes
    weight_map = {}
    for index, shard in enumerate(shards):
        path = folder / f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        header = encode_header(shard, {"format": "pt"})
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for _, spec in shard))
        weight_map |= dict.fromkeys((name for name, _ in shard), path.name)
    write_json(folder / "config.json", config)
    write_json(folder / INDEX_NAME, {"weight_map": weight_map})
    (folder / "tokenizer.json").write_bytes(b" " * 20_000_000)


@pytest.mark.parametrize("mode", [(), ("--stream",)], ids=["download", "stream"])
def test_build_is_the_same_as_from_disk(
    online: Project, hub: FakeHub, carnice: Carnice, mode: tuple[str, ...]
) -> None:
    """A build from the hub has the bytes of a local one, and says which commit it is of."""
    finished = carnice("build", VARIANT, *ONLINE, *mode)
    assert finished.code == 0, finished.err
    remote = online.built(VARIANT)
    folders = f"  {CARNICE}: demo/carnice-v2-27b\n"
    (online.recipes / "_profiles.yaml").write_text(f"online:\n{folders}")
    carnice("build", VARIANT, *ONLINE, "--out", "local", "--cache", "other")

    assert without_source(contents(online.root / "local" / VARIANT)) == without_source(remote)
    record = json.loads(remote["build.json"])["sources"]["body"]
    assert record == {"model": CARNICE, "revision": "main", "profile": "online", "commit": "c" * 40}
    assert f"| `{'c' * 40}` |" in remote["README.md"].decode()


def test_local_build_names_no_commit(online: Project, carnice: Carnice) -> None:
    """What build.json says of a local source has not changed."""
    carnice("build", VARIANT)

    assert "commit" not in json.loads(online.built(VARIANT)["build.json"])["sources"]["body"]


def test_download_keeps_shards_and_stream_does_not(online: Project, hub: FakeHub) -> None:
    """The shards are in the Hugging Face cache afterwards, with --stream they are not."""
    build_variants([VARIANT], online.options(profile="online", stream=True))
    streamed = {name for name in on_disk(online) if name.endswith(".safetensors")}
    build_variants([VARIANT], online.options(profile="online", cache=online.root / "other"))

    assert streamed == set()
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= on_disk(
        online
    )


def test_stream_asks_once_for_each_tensor_and_never_for_vision(
    online: Project, hub: FakeHub
) -> None:
    """Each tensor of the text model is one request; no range touches the vision tower."""
    plan = plan_variants([VARIANT], online.options(profile="online"))
    hub.forget()
    build_variants([VARIANT], online.options(profile="online", stream=True))
    entries = {
        path.name: read_header(LocalFile(path)).entries
        for path in online.checkpoint.glob("*.safetensors")
    }
    vision = {
        (file, entry.offset + at)
        for file, found in entries.items()
        for entry in found
        if "visual" in entry.name
        for at in (0, entry.spec.nbytes - 1)
    }
    asked = [
        (request.file.rpartition("/")[2], request.range)
        for request in hub.requests
        if request.host == "cdn" and request.range
    ]

    assert vision
    assert plan.variants
    for file, (first, last) in asked:
        assert not any(name == file and first <= place <= last for name, place in vision)
    text = [e for found in entries.values() for e in found if "visual" not in e.name]
    assert len(text) == len(asked)
    assert sum(entry.spec.nbytes for entry in text) == weights(hub)


def test_stream_reuses_what_is_on_disk(online: Project, hub: FakeHub) -> None:
    """A shard that was downloaded before is not fetched again."""
    build_variants([VARIANT], online.options(profile="online"))
    hub.forget()

    build_variants(
        [VARIANT],
        online.options(profile="online", stream=True, cache=online.root / "other"),
    )

    assert weights(hub) == 0


def test_only_shards_with_wanted_tensors_are_downloaded(
    online: Project, hub: FakeHub, carnice: Carnice
) -> None:
    """A shard of nothing but vision stays on the hub."""
    move_vision(online.checkpoint)
    finished = carnice("build", VARIANT, *ONLINE)

    assert finished.code == 0, finished.err
    assert "vision.safetensors" not in on_disk(online)


def move_vision(folder: Path) -> None:
    """Write the checkpoint's vision tower into a shard of its own."""
    from tiny import read_all_tensors, write_safetensors

    tensors = read_all_tensors(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    parts = {"text.safetensors": {}, "vision.safetensors": {}}
    for name, tensor in tensors.items():
        parts["vision.safetensors" if "visual" in name else "text.safetensors"][name] = tensor
    for file, part in parts.items():
        write_safetensors(folder / file, part)
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_json(folder / INDEX_NAME, {"weight_map": weight_map})


@pytest.mark.parametrize("stream", [False, True], ids=["download", "stream"])
def test_second_run_works_offline(
    online: Project, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """What was built before is planned and built again without a request."""
    build_variants([VARIANT], online.options(profile="online", stream=stream))
    first = online.built(VARIANT)
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    report = build_variants([VARIANT], online.options(profile="online", stream=stream))

    assert report.actions_run == 0
    assert first == online.built(VARIANT)
    assert not hub.requests


def test_downloaded_shards_build_anew_offline(
    online: Project, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty cache of ours is filled from the Hugging Face cache."""
    build_variants([VARIANT], online.options(profile="online"))
    first = online.built(VARIANT)
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    other = online.options(profile="online", cache=online.root / "other", out=online.root / "out")
    build_variants([VARIANT], other)

    assert first == contents(online.root / "out" / VARIANT)
    assert not hub.requests


def test_offline_without_anything_is_an_error(
    online: Project, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the model and HF_HUB_OFFLINE."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(CheckpointError, match=r"Carnice-V2-27b@main.*HF_HUB_OFFLINE"):
        open_hub(CARNICE, "main", stream=False)


def test_unreachable_hub_leaves_what_is_known(
    online: Project, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a network the last known commit of a branch is used, and said so."""
    open_hub(CARNICE, "main", stream=False)
    nowhere = "http://127.0.0.1:1"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)

    _, commit = open_hub(CARNICE, "main", stream=False)

    assert commit == "c" * 40
    assert "cannot reach the hub" in caplog.text


def test_identity_outlives_a_commit(online: Project, hub: FakeHub) -> None:
    """A shard that a new commit did not touch keeps its identity, and what is known of it."""
    build_variants([VARIANT], online.options(profile="online", stream=True))
    hub.add(CARNICE, online.checkpoint, "e" * 40)
    hub.forget()

    report = build_variants([VARIANT], online.options(profile="online", stream=True))

    assert report.actions_run == 0
    assert weights(hub) == 0
    record = read_json(online.out / VARIANT / "build.json")["sources"]["body"]
    assert record["commit"] == "e" * 40


def test_a_profile_may_mix_folders_and_the_hub(online: Project, hub: FakeHub) -> None:
    """`hub` may stand for a single model."""
    with (online.recipes / "_profiles.yaml").open("a") as file:
        file.write(f"mixed:\n  {QWEN}: demo/qwen3.6-27b\n  {CARNICE}: hub\n")

    plan = plan_variants([VARIANT], online.options(profile="mixed"))

    assert plan.variants[0].sources["body"].revision == "c" * 40


def test_the_repository_has_a_full_profile() -> None:
    """`--profile full` means the hub."""
    profiles = REPOSITORY / "recipes" / "_profiles.yaml"

    assert "\nfull: hub" in profiles.read_text()


def test_profile_of_another_word_is_refused(project: Project) -> None:
    """Only `hub` may stand for a whole profile."""
    with (project.recipes / "_profiles.yaml").open("a") as file:
        file.write("odd: nub\n")

    with pytest.raises((CheckpointError, RecipeError), match="odd"):
        plan_variants([VARIANT], project.options(profile="odd"))


def test_other_files_are_never_touched(online: Project, hub: FakeHub, carnice: Carnice) -> None:
    """Pickles, code and pictures of a repository are not asked for, not even their sizes."""
    for name in ("pytorch_model.bin", "modeling_carnice.py", "training_args.bin", "cat.png"):
        (online.checkpoint / name).write_bytes(b"boom")
    finished = carnice("build", VARIANT, *ONLINE)

    assert finished.code == 0, finished.err
    suffixes = {
        request.file.rpartition(".")[2] for request in hub.requests if "resolve" in request.file
    }
    assert suffixes <= {pattern.rpartition(".")[2] for pattern in ALLOWED}


def test_one_file_of_a_repository_is_fetched(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any name, and no other with it; offline it is there again, and another is named."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "imatrix.gguf_file").write_bytes(b"GGUF and more")
    (folder / "model.gguf").write_bytes(b"large")
    hub.add("owner/quants", folder)
    content = bytearray(13)
    file = open_hub_file("owner/quants", "main", "imatrix.gguf_file")
    file.read_into(0, memoryview(content))

    assert (b"GGUF and more", 13) == (bytes(content), file.size)
    assert {"imatrix.gguf_file"} == {
        request.file.rpartition("/")[2] for request in hub.requests if "resolve" in request.file
    }
    with pytest.raises(CheckpointError, match=r"has no file imatrix\.gguf") as raised:
        open_hub_file("owner/quants", "main", "imatrix.gguf")
    assert "imatrix.gguf_file" == raised.value.nearest
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert file.identity == open_hub_file("owner/quants", "main", "imatrix.gguf_file").identity


TEMPLATES = "additional_chat_templates"


@pytest.mark.parametrize("mode", [(), ("--stream",)], ids=["download", "stream"])
def test_named_templates_are_taken_over(
    online: Project, hub: FakeHub, carnice: Carnice, mode: tuple[str, ...]
) -> None:
    """Templates in the one folder that transformers reads are fetched, and nothing else below."""
    for name in ("tool_use.jinja", "rag.jinja", "notes.json", ".hidden.jinja", "more/deep.jinja"):
        path = online.checkpoint / TEMPLATES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{{{{ messages }}}} {name}")
    (online.checkpoint / "original").mkdir()
    for name in ("params.json", "consolidated.00.safetensors", "template.jinja"):
        (online.checkpoint / "original" / name).write_bytes(b"boom")
    finished = carnice("build", VARIANT, *ONLINE, *mode)

    assert finished.code == 0, finished.err
    asked = {request.file.partition("/resolve/")[2] for request in hub.requests}
    inner = {name.partition("/")[2] for name in asked if name.count("/") > 1}
    assert {f"{TEMPLATES}/tool_use.jinja", f"{TEMPLATES}/rag.jinja"} == inner
    built = online.built(VARIANT)
    assert {f"{TEMPLATES}/tool_use.jinja", f"{TEMPLATES}/rag.jinja"} == {
        name for name in built if name.startswith(TEMPLATES)
    }
    assert b"{{ messages }} rag.jinja" == built[f"{TEMPLATES}/rag.jinja"]


UNCLEAR: dict[str, tuple[str, ...]] = {
    "one file beside the index": ("model.safetensors",),
    "another set beside the index": ("model-00001-of-00001.safetensors",),
    "an adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "an adapter that is pickled": ("adapter_model.bin",),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_a_repository_is_judged_as_a_folder_is(online: Project, hub: FakeHub, what: str) -> None:
    """Which files are the model is one question, with one answer for both."""
    for name in UNCLEAR[what]:
        shutil.copyfile(online.base / "model.safetensors", online.checkpoint / name)
    told = []
    for where, opened in (
        (str(online.checkpoint), lambda: open_checkpoint(online.checkpoint)),
        (f"{CARNICE}@{'c' * 7}", lambda: open_hub(CARNICE, "main", stream=False)),
    ):
        with pytest.raises(CheckpointError) as caught:
            opened()
        told.append(str(caught.value).replace(where, "where"))

    assert told[0] == told[1]
    assert told[0].startswith("where: ")
    assert not any(request.range for request in hub.requests)


def test_a_repository_may_hold_second_copies(online: Project, hub: FakeHub) -> None:
    """`consolidated.safetensors` and a variant of another precision are not even looked at."""
    before = open_hub(CARNICE, "main", stream=False)[0]
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        (online.checkpoint / name).write_bytes(b"boom")
    hub.add(CARNICE, online.checkpoint, "e" * 40)
    after = open_hub(CARNICE, "main", stream=False)[0]

    assert list(before.tensors) == list(after.tensors)


def test_a_pointer_on_the_hub_is_named(online: Project, hub: FakeHub, carnice: Carnice) -> None:
    """A pointer that was uploaded as if it were the tokenizer is refused before any work."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 7\n"
    (online.checkpoint / "tokenizer.json").write_text(pointer)
    finished = carnice("build", VARIANT, *ONLINE, "--stream")

    assert 2 == finished.code
    assert "tokenizer.json: is a Git LFS pointer" in finished.err
    assert all(last < 1 << 16 for _, last in hub.ranges())


def test_repository_of_pickles_is_refused(online: Project, hub: FakeHub) -> None:
    """The error names the pickle, which was not fetched."""
    for path in online.checkpoint.glob("*.safetensors*"):
        path.unlink()
    (online.checkpoint / INDEX_NAME).unlink(missing_ok=True)
    (online.checkpoint / "pytorch_model.bin").write_bytes(b"boom")

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*expected safetensors"):
        open_hub(CARNICE, "main", stream=False)


@pytest.mark.parametrize("mode", [(), ("--stream",)], ids=["download", "stream"])
def test_token_stays_with_the_hub(
    online: Project,
    hub: FakeHub,
    carnice: Carnice,
    mode: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A gated model is built; the CDN never sees the token, and nothing written holds it."""
    caplog.set_level("DEBUG")
    hub.gated[CARNICE] = TOKEN
    finished = carnice("build", VARIANT, *ONLINE, *mode, "--trace", "trace.json")

    assert finished.code == 0, finished.err
    assert {f"Bearer {TOKEN}"} == {r.token for r in hub.requests if r.host == "hub"}
    assert {None} == {r.token for r in hub.requests if r.host == "cdn"}
    said = finished.out + finished.err + caplog.text
    assert TOKEN not in said
    home = Path(constants.HF_HUB_CACHE).parent
    for path in [*online.root.rglob("*"), *home.rglob("*")]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_gated_model_says_what_to_do(
    online: Project, hub: FakeHub, carnice: Carnice, caplog: pytest.LogCaptureFixture
) -> None:
    """A token without access ends in exit code 2 and where to ask, and is not shown."""
    hub.gated[CARNICE] = "hf_another"
    finished = carnice("build", VARIANT, *ONLINE)

    assert finished.code == 2
    assert "gated" in finished.err
    assert f"{hub.hub_url}/{CARNICE}" in finished.err
    assert TOKEN not in finished.out + finished.err + caplog.text
    assert len(hub.requests) == 1


def test_unknown_repository_and_revision(online: Project, hub: FakeHub) -> None:
    """Each is named, with what may be wrong, and not asked for twice."""
    with pytest.raises(CheckpointError, match=r"owner/none@main.*no such repository.*HF_TOKEN"):
        open_hub("owner/none", "main", stream=False)
    with pytest.raises(CheckpointError, match=r"has no revision 'v9'"):
        open_hub(CARNICE, "v9", stream=False)
    assert len(hub.requests) == 2


def test_wrong_description_is_refused(online: Project, hub: FakeHub) -> None:
    """A commit that is none never becomes part of a path."""
    hub.repos[CARNICE].commit = "../../etc"

    with pytest.raises(CheckpointError, match="malformed"):
        open_hub(CARNICE, "main", stream=False)


def test_answer_for_another_commit_is_refused(online: Project, hub: FakeHub) -> None:
    """A recipe that pins a commit gets that one or an error."""
    hub.repos[CARNICE].branches.add("e" * 40)

    with pytest.raises(CheckpointError, match=r"answers for commit c{40}"):
        open_hub(CARNICE, "e" * 40, stream=False)


def test_local_profiles_do_not_import_the_library(project: Project) -> None:
    """Planning from folders starts without huggingface_hub."""
    code = (
        "import sys; from carnice_build.cli.main import app\n"
        "app(['plan', 'mlx-4bit'], standalone_mode=False)\n"
        "assert not {'huggingface_hub', 'httpx'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
