"""A build makes the same bytes on systems and file systems that lack what Linux and ext4 have.

None of them is here: each is one of ours with some functions taken away, or made to refuse.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, TinyCheckpoint
from tiny import contents

from carnice_build import processor, system
from carnice_build.chat import render as rendering
from carnice_build.chat.render import Chat, render
from carnice_build.commands.build import build_variants
from carnice_build.errors import CheckpointError, StoreError
from carnice_build.execute.events import Event, Notice
from carnice_build.store.files import hold_range
from carnice_build.store.locks import Taken, locked
from carnice_build.store.packs import PartialPack
from carnice_build.store.store import Store
from carnice_build.store.upkeep import collect
from carnice_build.system import peak_memory, read_at, wait_briefly, write_at

Take = Callable[[pytest.MonkeyPatch], None]
VARIANTS = ("mlx-4bit", "mlx-6bit")
"""The second takes what is not quantized from the first one's packs."""


def refusing(owner: Any, name: str, code: int) -> Take:
    """A system whose `owner.name` always fails."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return lambda patch: patch.setattr(owner, name, refuse, raising=False)


def without(name: str) -> Take:
    """A system whose `os` has no such function."""
    return lambda patch: patch.delattr(os, name)


def copying_nothing(patch: pytest.MonkeyPatch) -> None:
    """A kernel whose `copy_file_range` says that there is nothing to copy."""
    patch.setattr(os, "copy_file_range", lambda *_: 0)


def in_small_pieces(patch: pytest.MonkeyPatch) -> None:
    """A system that refuses to read or write more than 1000 bytes at once, as macOS does 2 GB."""
    pread, preadv, pwrite = os.pread, os.preadv, os.pwrite

    def bounded(call: Callable[..., Any], size: Callable[[Any], int]) -> Callable[..., Any]:
        def checked(descriptor: int, what: Any, offset: int) -> Any:
            if size(what) > 1000:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(descriptor, what, offset)

        return checked

    patch.setattr(system, "_MOST", 1000)
    patch.setattr(os, "pread", bounded(pread, lambda count: count))
    patch.setattr(os, "preadv", bounded(preadv, lambda buffers: len(buffers[0])))
    patch.setattr(os, "pwrite", bounded(pwrite, len))


def with_nfs_locks(patch: pytest.MonkeyPatch) -> None:
    """Locks as NFS has them: shared ones of what may be read, others of what may be written."""
    flock = fcntl.flock

    def checked(descriptor: int, kind: int) -> None:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        wrong = os.O_WRONLY if kind & fcntl.LOCK_SH else os.O_RDONLY
        if mode == wrong and not kind & fcntl.LOCK_UN:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, kind)

    patch.setattr(fcntl, "flock", checked)


def without_syncing_folders(patch: pytest.MonkeyPatch) -> None:
    """A file system that cannot bring a folder to disk."""
    fsync = os.fsync

    def checked(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    patch.setattr(os, "fsync", checked)


def without_locks(code: int) -> Take:
    """A file system that has no locks, beside a local one that has."""
    flock = fcntl.flock

    def take(patch: pytest.MonkeyPatch) -> None:
        local = tempfile.TemporaryDirectory()  # goes with the patch
        patch.setattr(tempfile, "tempdir", local.name)

        def checked(descriptor: int, kind: int) -> None:
            own = {path.stat().st_ino for path in Path(local.name).rglob("*")}
            if os.fstat(descriptor).st_ino not in own:
                raise OSError(code, os.strerror(code))
            flock(descriptor, kind)

        patch.setattr(fcntl, "flock", checked)

    return take


LINKLESS = ("EXDEV", "EPERM", "EACCES", "EMLINK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS")
LOCKLESS = ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")

SYSTEMS: dict[str, Take] = {
    "no copy_file_range": without("copy_file_range"),
    "copy_file_range that copies nothing": copying_nothing,
    **{
        f"copy_file_range: {name}": refusing(os, "copy_file_range", getattr(errno, name))
        for name in ("EXDEV", "EINVAL", "ENOSYS", "EPERM")
    },
    "no preadv": without("preadv"),
    "reads and writes of a bounded size": in_small_pieces,
    "a full sync that a network does not have": refusing(fcntl, "fcntl", errno.ENOTSUP),
    "folders that cannot be synced": without_syncing_folders,
    "no modes": refusing(os, "chmod", errno.EPERM),
    **{
        f"no links: {name}": refusing(Path, "hardlink_to", getattr(errno, name))
        for name in LINKLESS
    },
    **{f"no locks: {name}": without_locks(getattr(errno, name)) for name in LOCKLESS},
    "locks as NFS has them": with_nfs_locks,
}


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoint
) -> dict[str, dict[str, bytes]]:
    """What the variants are on a system that has everything; filled by the first test."""
    return {}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_build_makes_the_same_bytes_without(
    project: Project,
    expected: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Whatever a system lacks, folders are the same, and are up to date the second time."""
    if not expected:
        build_variants(VARIANTS, project.options(out=project.root / "a", cache=project.root / "b"))
        expected.update({item: contents(project.root / "a" / item) for item in VARIANTS})
    with monkeypatch.context() as patch:
        if "full sync" in name:
            patch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        SYSTEMS[name](patch)
        for variant in VARIANTS:
            build_variants([variant], project.options())
        again = build_variants(VARIANTS, project.options())
        with Store(project.cache) as store:
            collect(store)

    assert expected == {item: project.built(item) for item in VARIANTS}
    assert [False, False] == [item.packaged for item in again.variants]


# --- reading, writing, syncing -------------------------------------------------------------------


@pytest.mark.parametrize("take", [without("preadv"), in_small_pieces])
def test_reading_ends_where_the_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Take
) -> None:
    """However a system reads, what is there is read, and its length is told."""
    content = bytes(range(256)) * 20
    (tmp_path / "file").write_bytes(content)
    take(monkeypatch)
    buffer = bytearray(6000)
    with (tmp_path / "file").open("r+b") as file:
        write_at(file.fileno(), memoryview(b"ab" * 1000), 100)
        count = read_at(file.fileno(), memoryview(buffer), 10)

    assert len(content) - 10 == count
    assert (content[:100] + b"ab" * 1000 + content[2100:])[10:] == bytes(buffer[:count])


def test_packs_are_synced_past_the_memory_of_a_drive(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where F_FULLFSYNC exists, it and not fsync brings a finished pack to disk."""
    full: list[int] = []
    own = fcntl.fcntl

    def recorded(descriptor: int, command: int, *rest: Any) -> Any:
        if command != 51:
            return own(descriptor, command, *rest)
        full.append(os.fstat(descriptor).st_ino)
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", recorded)
    build_variants(["mlx-4bit"], project.options())
    packs = {path.stat().st_ino for path in (project.cache / "packs").iterdir()}

    assert packs
    assert packs <= set(full)


def test_a_copy_on_a_plain_file_system_is_up_to_date(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links and with times of full even seconds only, nothing is copied a second time.

    A copy that somebody touched is.
    """
    utime = os.utime

    def coarse(path: Any, *, ns: tuple[int, int]) -> None:
        unit = 2 * 10**9
        utime(path, ns=(ns[0] // unit * unit, ns[1] // unit * unit))

    monkeypatch.setattr(os, "utime", coarse)
    refusing(Path, "hardlink_to", errno.ENOTSUP)(monkeypatch)
    build_variants(["mlx-4bit"], project.options())
    again = build_variants(["mlx-4bit"], project.options())
    shard = next((project.out / "mlx-4bit").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    touched = build_variants(["mlx-4bit"], project.options())

    assert (False, True) == (again.variants[0].packaged, touched.variants[0].packaged)


def test_a_range_is_kept_when_its_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker reads is a link to the whole file, or a copy of its range alone."""
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    linked = hold_range(source, 3, 4, tmp_path / "link")
    refusing(Path, "hardlink_to", errno.EACCES)(monkeypatch)
    copied = hold_range(source, 3, 4, tmp_path / "copy")
    source.unlink()

    assert (3, b"0123456789") == (linked, (tmp_path / "link").read_bytes())
    assert (0, b"3456") == (copied, (tmp_path / "copy").read_bytes())


# --- locks ---------------------------------------------------------------------------------------


@pytest.fixture(params=["flock", "no flock"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store on a file system with locks, and on one without."""
    if request.param == "no flock":
        without_locks(errno.ENOLCK)(monkeypatch)
    return Store(tmp_path / "cache")


def test_nothing_is_removed_while_a_build_runs(store: Store) -> None:
    """Builds share a cache, and `gc` has it alone, whether or not its file system has locks."""
    other = Store(store.root)
    with (
        store.in_use(),
        other.in_use(),
        pytest.raises(StoreError, match="a build is using the cache"),
    ):
        collect(other)
    collect(other)


def test_equal_work_is_done_by_one(store: Store) -> None:
    """A lease keeps other threads waiting, whether or not the file system has locks."""
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with Store(store.root).lease("work"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with store.lease("work"):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()

    assert ["first", "second"] == order


def test_a_pack_is_written_by_one(store: Store) -> None:
    """Who wants a pack that another writes waits and says so, and then has it."""
    first, second = (store.partial("a" * 64, b"header", 100) for _ in range(2))
    said = threading.Event()
    taken: list[bool] = []

    def want(pack: PartialPack) -> None:
        taken.append(pack.acquire(waiting=said.set))

    want(first)
    thread = threading.Thread(target=want, args=(second,))
    thread.start()
    waited = said.wait(10)
    first.close()
    thread.join()
    second.close()

    assert (True, [True, True]) == (waited, taken)


def test_work_folders_of_the_living_stay(store: Store) -> None:
    """Only those of dead builds are removed, whether or not the file system has locks."""
    dead = store.root / "partial" / "work-dead"
    dead.mkdir()
    with store.workspace() as first, Store(store.root).workspace() as second:
        left = {path for path in (store.root / "partial").iterdir() if path.is_dir()}

        assert {first, second} == left


def test_a_build_says_that_other_machines_do_not_see_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks in the cache's file system, one line says what must not be done."""
    without_locks(errno.ENOSYS)(monkeypatch)
    events: list[Event] = []
    build_variants(["mlx-4bit"], project.options(), events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]

    assert 1 == len(notices)
    assert "is on a file system without locks: builds on other machines must not" in notices[0]


def test_a_machine_without_any_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When not even the folder for temporary files has locks, that is said, with its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    refusing(fcntl, "flock", errno.ENOLCK)(monkeypatch)

    with (
        pytest.raises(StoreError, match=f"{tmp_path}: there are no file locks here"),
        locked(tmp_path / "lock"),
    ):
        pass


def test_a_lock_folder_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks do not go through a link that another user could have made."""
    without_locks(errno.ENOLCK)(monkeypatch)
    local = Path(tempfile.gettempdir())
    (local / "elsewhere").mkdir()
    (local / f"carnice-locks-{os.getuid()}").symlink_to(local / "elsewhere")

    with pytest.raises(StoreError, match="belongs to somebody else"), locked(tmp_path / "lock"):
        pass


def test_a_real_error_of_a_lock_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what says that there are no locks does without; a lock that is held is held."""
    refusing(fcntl, "flock", errno.EIO)(monkeypatch)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass
    monkeypatch.undo()

    with (
        locked(tmp_path / "lock"),
        pytest.raises(Taken),
        locked(tmp_path / "lock", wait=False),
    ):
        pass


# --- what a machine is ---------------------------------------------------------------------------


class Usage:
    """What `getrusage` gives on every system, in units of its own."""

    ru_maxrss = 5000


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_as_whoever_runs_us_says(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], count: str | None
) -> None:
    """Ours is for those who say nothing."""
    environ = dict(given)
    monkeypatch.setattr(os, "environ", environ)

    wait_briefly()

    assert count == environ.get("GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("platform", "unit"), [("darwin", 1), ("linux", 1024), ("freebsd14", 1024)]
)
def test_memory_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    """macOS counts it in bytes, others in units of 1024."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: Usage())

    assert 5000 * unit == peak_memory()


CPUINFO = {
    "x86_64 avx512_bf16": "flags\t\t: fpu sse2 avx2 avx512f avx512_bf16\n",
    "x86_64 avx2": "vendor_id : x\nflags\t\t: fpu sse2 avx2\n",
    "aarch64 sve": "BogoMIPS : 2100\nFeatures\t: fp asimd sve bf16\n",
    "aarch64 sve2": "Features\t: fp asimd sve bf16 sve2\n",
    "aarch64 asimd": "Features\t: fp asimd\n",
    "riscv64": "processor\t: 0\n",
}


@pytest.mark.parametrize("kind", CPUINFO)
def test_linux_lists_what_a_processor_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A key names the widest instructions of x86 and of ARM."""
    (tmp_path / "cpuinfo").write_text(CPUINFO[kind])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(processor, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "machine", lambda: kind.split()[0])

    assert kind == processor.vector_instructions.__wrapped__()


@pytest.mark.parametrize(
    ("platform", "name"), [("darwin", "machdep.cpu.brand_string"), ("freebsd14", "hw.model")]
)
def test_other_systems_name_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, name: str
) -> None:
    """macOS and the BSDs are asked for its model; one that does not answer has its architecture."""
    script = tmp_path / "sysctl"
    script.write_text(f'#!/bin/sh\n[ "$1 $2" = "-n {name}" ] && echo Apple M2\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    answered = processor.vector_instructions.__wrapped__()
    monkeypatch.setenv("PATH", "")

    assert ("arm64 Apple M2", "arm64") == (answered, processor.vector_instructions.__wrapped__())


LARGE = "{% set x = 'x' * 300000000 %}{% for i in range(90000) %}{% set y = i * i %}{% endfor %}"


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_a_template_is_watched_where_the_system_keeps_no_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """macOS lets a process take what it likes, so it is ended when it takes too much."""
    chats = [Chat([{"role": "user", "content": "x"}])] * 40
    monkeypatch.setattr(rendering, "_LIMITED", False)
    modest = render("{{ messages[0].content }}", chats, "modest")
    monkeypatch.setattr(rendering, "MAX_MEMORY", 100 * 2**20)

    with pytest.raises(CheckpointError, match="takes too long or too much memory to render"):
        render(LARGE, chats, "large")
    assert ["x"] * 40 == modest


def test_a_source_may_have_a_name_that_is_no_utf_8(project: Project, tmp_path: Path) -> None:
    """Folders are named by bytes; the model is the same, and is not read a second time."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        shutil.copytree(project.checkpoint, odd)
    except OSError:  # macOS takes no such name
        pytest.skip("names are UTF-8 here")
    places = {"out": odd / "out", "cache": odd / "cache", "sources": {"body": odd}}
    build_variants(["mlx-4bit"], project.options(sources={"body": project.checkpoint}))
    build_variants(["mlx-4bit"], project.options(**places))
    again = build_variants(["mlx-4bit"], project.options(**places))

    assert project.built("mlx-4bit") == contents(odd / "out" / "mlx-4bit")
    assert (0, 0) == (again.actions_run, again.read_bytes)


def test_kinds_of_gpus_are_what_the_driver_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, in one order; none without a driver."""
    monkeypatch.setattr(processor, "_DRIVER", tmp_path / "gpus")
    nothing = processor.gpus.__wrapped__()
    for place, kind in (("0000:01", "H100 80GB HBM3"), ("0000:02", "A100"), ("0000:03", "A100")):
        folder = tmp_path / "gpus" / place
        folder.mkdir(parents=True)
        text = f"Model: \t\t NVIDIA {kind}\nIRQ:   \t\t 0\nGPU UUID: \t GPU-{place}\n"
        (folder / "information").write_text(text)

    assert ((), ("NVIDIA A100", "NVIDIA H100 80GB HBM3")) == (
        nothing,
        processor.gpus.__wrapped__(),
    )
