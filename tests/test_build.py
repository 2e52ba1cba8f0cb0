"""What a build promises, shown on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Project
from tiny import contents

from carnice_build.commands.build import BuildResult, build_variants

MLX = ("mlx-4bit", "mlx-mixed_3_6", "mlx-6bit")
ONE_DOWN_PROJ = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}'


def build(project: Project, *variants: str, **changes: Any) -> BuildResult:
    return build_variants(variants, project.options(**changes))


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_any_number_of_jobs_gives_the_same_folder(project: Project) -> None:
    """One worker and four make byte-identical folders."""
    folders = []
    for jobs in (1, 4):
        options = {"jobs": jobs, "cache": project.root / f"cache{jobs}", "out": project.root / "o"}
        build(project, "mlx-mixed_3_6", **options)
        folders.append(contents(project.root / "o"))
        shutil.rmtree(project.root / "o")

    assert folders[0] == folders[1]


def test_a_warm_cache_gives_the_same_folder_as_an_empty_one(project: Project) -> None:
    """What other variants left in the cache changes how a build is made, not what it makes."""
    build(project, "mlx-mixed_3_6", cache=project.root / "cold")
    cold = project.built("mlx-mixed_3_6")
    shutil.rmtree(project.out)
    build(project, "mlx-4bit", "mlx-6bit")
    build(project, "mlx-mixed_3_6")

    assert cold == project.built("mlx-mixed_3_6")


def test_several_variants_read_each_source_byte_once(project: Project) -> None:
    """Building three variants together reads no more than building one of them."""
    one = build(project, "mlx-4bit", cache=project.root / "other").read_bytes
    shutil.rmtree(project.out)
    three = build(project, *MLX).read_bytes

    assert one == three


def test_nothing_to_do_runs_nothing_and_reads_nothing(project: Project) -> None:
    """A second build runs no action, reads no weight and leaves every file as it is."""
    build(project, *MLX)
    before = {path: path.stat().st_mtime_ns for path in project.out.rglob("*")}
    again = build(project, *MLX)

    assert (again.actions_run, again.read_bytes, again.written_bytes) == (0, 0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in project.out.rglob("*")}


def test_one_knob_reruns_one_action_and_rewrites_one_shard(project: Project) -> None:
    """Changing the bits of one down_proj runs one action; the other shards stay the same files."""
    build(project, "mlx-4bit")
    before = inodes(project.out / "mlx-4bit")
    report = build(project, "mlx-4bit", overrides=(ONE_DOWN_PROJ,))
    after = inodes(project.out / "mlx-4bit")

    assert report.actions_run == 1
    assert [name for name in before if before[name] != after[name]] == [
        "model-00002-of-00004.safetensors"
    ]


def test_taking_a_knob_back_runs_nothing(project: Project) -> None:
    """The first build's tensors are still in the cache when its recipe comes back."""
    build(project, "mlx-4bit")
    first = project.built("mlx-4bit")
    build(project, "mlx-4bit", overrides=(ONE_DOWN_PROJ,))
    report = build(project, "mlx-4bit")

    assert report.actions_run == 0
    assert first == project.built("mlx-4bit")


def test_variants_share_what_they_have_in_common(project: Project) -> None:
    """After 4 and 6 bits, mixed_3_6 computes its 3-bit modules only."""
    build(project, "mlx-4bit", "mlx-6bit")
    report = build(project, "mlx-mixed_3_6")
    config = json.loads((project.out / "mlx-mixed_3_6" / "config.json").read_text())
    entries = [item for item in config["quantization"].values() if isinstance(item, dict)]
    three_bit = sum(1 for item in entries if item["bits"] == 3)

    assert report.actions_run == three_bit


def test_shards_that_are_equal_are_one_file(project: Project) -> None:
    """The unquantized tensors of all MLX variants are one inode."""
    build(project, *MLX)
    shared = {
        (project.out / name / "model-00003-of-00004.safetensors").stat().st_ino for name in MLX
    }

    assert len(shared) == 1


def test_a_variant_takes_its_size_on_disk_once(project: Project) -> None:
    """The packs in the cache are the very files of the build folder."""
    build(project, "mlx-4bit")
    packs = {path.stat().st_ino for path in (project.cache / "packs").iterdir()}

    assert packs == set(inodes(project.out / "mlx-4bit").values())


def test_the_same_bytes_elsewhere_are_not_computed_again(project: Project) -> None:
    """A copied source is read, found equal, and no action runs."""
    build(project, "mlx-4bit")
    copy = Path(shutil.copytree(project.checkpoint, project.root / "copy"))
    report = build(project, "mlx-4bit", sources={"body": copy})

    assert report.actions_run == 0
    assert report.read_bytes > 0


def test_a_sample_that_deceives_costs_a_second_look_not_a_wrong_weight(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When every tensor looks like one seen before, the full digests still decide."""
    from carnice_build.execute import array_job

    build(project, "mlx-4bit", cache=project.root / "honest")
    honest = project.built("mlx-4bit")
    shutil.rmtree(project.out)
    monkeypatch.setattr(
        array_job, "sample_digest", lambda source: f"{source.spec.shape}"[:9].ljust(64)
    )
    build(project, "mlx-4bit")

    assert honest == project.built("mlx-4bit")


def test_a_changed_source_tensor_reruns_its_own_actions_only(project: Project) -> None:
    """Rewriting a shard with one weight changed runs one action."""
    build(project, "mlx-4bit")
    shard = next(iter(sorted(project.checkpoint.glob("*.safetensors"))))
    raw = bytearray(shard.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    name = next(name for name in header if name.endswith("mlp.up_proj.weight"))
    start = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
    raw[start : start + 2] = b"\x80\x3f"
    shard.write_bytes(raw)
    report = build(project, "mlx-4bit")

    assert report.actions_run == 1


def test_a_folder_that_lost_a_file_is_made_whole(project: Project) -> None:
    """A deleted config.json comes back without any action."""
    build(project, "mlx-4bit")
    first = project.built("mlx-4bit")
    (project.out / "mlx-4bit" / "config.json").unlink()
    report = build(project, "mlx-4bit")

    assert report.actions_run == 0
    assert first == project.built("mlx-4bit")


def test_a_copied_folder_serves_where_links_cannot(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across file systems the shards are copies with the same bytes, and stay up to date."""
    import errno

    build(project, "mlx-4bit", cache=project.root / "linked")
    linked = project.built("mlx-4bit")
    shutil.rmtree(project.out)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    build(project, "mlx-4bit")

    assert linked == project.built("mlx-4bit")


def start(project: Project, *variants: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "carnice_build", "build", *variants]
    return subprocess.Popen(command, cwd=project.root, stdout=-1, stderr=-1)


def test_a_killed_build_loses_nothing_that_was_finished(project: Project) -> None:
    """kill -9 at several moments, then a build: the same bytes, and finished actions stay done."""
    reference = build(project, *MLX, cache=project.root / "reference")
    expected = contents(project.out)
    for delay in (0.35, 0.5, 0.65, 0.8, 1.0):
        shutil.rmtree(project.cache, ignore_errors=True)
        shutil.rmtree(project.out)
        process = start(project, *MLX)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        records = project.cache / "records"
        finished = _actions_on_record(project) if records.exists() else 0
        report = build(project, *MLX)

        assert report.actions_run == reference.actions_run - finished
        assert expected == contents(project.out)


def _actions_on_record(project: Project) -> int:
    from carnice_build.store.records import Records

    records = Records(project.cache / "records")
    count = len(records.names("action"))
    records.close()
    return count


@pytest.mark.parametrize("builds", [("mlx-4bit",) * 4, ("mlx-6bit", "mlx-mixed_3_6")])
def test_builds_at_once_share_a_cache(project: Project, builds: tuple[str, ...]) -> None:
    """Concurrent builds end well, agree with a lone one, and run no action twice."""
    alone = build(project, *set(builds), cache=project.root / "alone")
    expected = contents(project.out)
    shutil.rmtree(project.out)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "carnice_build", "build", name, "--json"],
            cwd=project.root,
            stdout=subprocess.PIPE,
        )
        for name in builds
    ]
    results = [json.loads(process.communicate()[0]) for process in processes]

    assert expected == contents(project.out)
    assert alone.actions_run == sum(result["actions_run"] for result in results)


def test_a_damaged_pack_is_named_and_only_its_rotten_tensor_made_again(
    project: Project, carnice: Callable[..., Finished]
) -> None:
    """`cache verify` names the tensor; the next build runs one action and gives the old bytes."""
    build(project, "mlx-4bit")
    expected = project.built("mlx-4bit")
    pack = max((project.cache / "packs").iterdir(), key=lambda path: path.stat().st_size)
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"\xff\xff\xff")
    verdict = carnice("cache", "verify")
    report = build(project, "mlx-4bit")

    assert verdict.code == 1
    assert "damaged: language_model." in verdict.out
    assert report.actions_run == 1
    assert expected == project.built("mlx-4bit")


def test_gc_keeps_what_build_folders_need(
    project: Project, carnice: Callable[..., Finished]
) -> None:
    """After a folder is deleted, gc removes its packs, and the other variant stays a no-op."""
    build(project, "mlx-4bit", "mlx-6bit")
    shutil.rmtree(project.out / "mlx-6bit")
    removed = json.loads(carnice("cache", "gc", "--json").out)
    again = build(project, "mlx-4bit")

    assert removed["files"] == 3
    assert again.actions_run == 0
    assert project.built("mlx-4bit")


def test_json_says_what_was_done(project: Project, carnice: Callable[..., Finished]) -> None:
    """`build --json` ends with one object of figures."""
    result = json.loads(carnice("build", "mlx-4bit", "--json").out)
    (variant,) = result["variants"]

    assert variant["folder"] == "build/mlx-4bit"
    assert variant["actions_run"] == result["actions_run"] > 0
    assert result["read_bytes"] > result["written_bytes"] > 0
    assert result["peak_memory"] > 0
    assert 4.5 < variant["bits_per_weight"] < 5


def test_a_trace_shows_every_job(project: Project, carnice: Callable[..., Finished]) -> None:
    """`--trace` writes complete events that Chrome can load."""
    carnice("build", "mlx-4bit", "--trace", "trace.json")
    events = json.loads((project.root / "trace.json").read_text())["traceEvents"]

    assert {event["ph"] for event in events} == {"X"}
    assert {event["cat"] for event in events} == {"job", "sync"}
    assert all(event["dur"] >= 0 for event in events)


def test_mlx_itself_can_be_the_backend(project: Project) -> None:
    """The library's own kernel, in a worker process, makes the same tensors."""
    pytest.importorskip("mlx.core")
    build(project, "mlx-mixed_3_6")
    fused = project.built("mlx-mixed_3_6")
    build(project, "mlx-mixed_3_6", overrides=("quantize.backend=mlx",))
    reference = project.built("mlx-mixed_3_6")
    shards = [name for name in fused if name.endswith(".safetensors")]

    assert [fused[name] for name in shards] == [reference[name] for name in shards]


def test_an_interrupted_build_says_so_and_keeps_its_work(project: Project) -> None:
    """Ctrl-C ends with one line and its own exit code, and the next build succeeds."""
    process = start(project, *MLX)
    while not (project.cache / "FORMAT").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    build(project, *MLX)

    assert process.returncode in (0, 130)
    assert b"Traceback" not in err
    assert build(project, *MLX).actions_run == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("2M")` mounts a file system of that size, or gives the one there that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: str) -> Path:
        again = ["remount,"] if folder.is_mount() else [""]
        mount = ["mount", "-t", "tmpfs", "-o", f"{again[0]}size={size}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a file system here")
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("size", ["150k", "300k", "600k", "900k", "1200k"])
def test_a_disk_that_fills_up_leaves_a_usable_cache(
    project: Project,
    small_disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    carnice: Callable[..., Finished],
    size: str,
) -> None:
    """A really full disk ends the build with one line; with room again, nothing is done twice."""
    from carnice_build.store.store import Store

    clean = build(project, "mlx-4bit", cache=project.root / "clean", out=project.root / "clean-out")
    disk = small_disk(size)
    monkeypatch.setattr(Store, "free_bytes", lambda self: 10**12)
    places = ("--cache", disk / "cache", "--out", disk / "build")
    failed = carnice("build", "mlx-4bit", *places)
    small_disk("40M")
    finished = json.loads(carnice("cache", "stats", "--json", *places[:2]).out)["actions"]
    report = build(project, "mlx-4bit", cache=disk / "cache", out=disk / "build")

    assert failed.code == 1
    assert "disk is full" in failed.err.splitlines()[-1]
    assert "Traceback" not in failed.err
    assert report.actions_run == clean.actions_run - finished
    assert contents(project.root / "clean-out") == contents(disk / "build")
