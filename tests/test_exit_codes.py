"""What the pages promise of exit codes is what the command line exits with."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable

import pytest
from conftest import REPOSITORY, Finished, Project

from carnice_build import errors
from carnice_build.cli.ending import TERMINATED
from carnice_build.store.store import Store

Carnice = Callable[..., Finished]
Patch = pytest.MonkeyPatch
FOUR = "mlx-4bit"


def _another_layout(project: Project, carnice: Carnice, patch: Patch) -> int:
    project.cache.mkdir()
    (project.cache / "FORMAT").write_text("carnice-cache 0\n")
    codes = {carnice("cache", "stats").code, carnice("build", FOUR).code}
    assert ["FORMAT"] == [path.name for path in project.cache.iterdir()]
    (code,) = codes
    return code


def _damaged_pack(project: Project, carnice: Carnice, patch: Patch) -> int:
    carnice("build", FOUR, "--jobs", 2)
    pack = next((project.cache / "packs").rglob("*.safetensors"))
    pack.chmod(0o644)
    time = pack.stat().st_mtime_ns
    with pack.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(pack, ns=(time, time))
    return carnice("cache", "verify").code


def _cache_in_use(project: Project, carnice: Carnice, patch: Patch) -> int:
    with Store(project.cache) as store, store.in_use():
        (code,) = {carnice("cache", "gc").code, carnice("cache", "verify").code}
    return code


def _disk_fills_up(project: Project, carnice: Carnice, patch: Patch) -> int:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("carnice_build.commands.build.assemble", full)
    finished = carnice("build", FOUR, "--jobs", 2)
    assert "what was finished is kept" in finished.err
    return finished.code


def _too_little_disk(project: Project, carnice: Carnice, patch: Patch) -> int:
    patch.setattr(Store, "free_bytes", lambda store: 0)
    return carnice("build", FOUR, "--jobs", 2).code


def _dead_worker(project: Project, carnice: Carnice, patch: Patch) -> int:
    return errors.BackendError.exit_code


def _unknown_key(project: Project, carnice: Carnice, patch: Patch) -> int:
    return carnice("plan", FOUR, "--set", "quantize.bit=4").code


def _failed_check(project: Project, carnice: Carnice, patch: Patch) -> int:
    carnice("build", FOUR, "--jobs", 2)
    (project.out / FOUR / "README.md").write_text("")
    return carnice("verify", FOUR, "--no-run").code


def _success(project: Project, carnice: Carnice, patch: Patch) -> int:
    return carnice("plan", FOUR).code


def _broken_off(project: Project, carnice: Carnice, patch: Patch) -> int:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr("carnice_build.commands.build.build_variants", interrupt)
    return carnice("build", FOUR).code


def _terminated(project: Project, carnice: Carnice, patch: Patch) -> int:
    # `test_endings` sends the signal, to a process of its own.
    return TERMINATED


def _another_remote(project: Project, carnice: Carnice, patch: Patch) -> int:
    (project.root / "remote").mkdir()
    (project.root / "remote" / "FORMAT").write_text("carnice-remote 0\n")
    return carnice("build", FOUR, "--remote", f"file://{project.root}/remote").code


def _remote_that_takes_nothing(project: Project, carnice: Carnice, patch: Patch) -> int:
    patch.setenv("CARNICE_KEY", str(project.root / "key.pem"))
    patch.setattr("carnice_build.remote.calls.FIRST_WAIT", 0.0)
    (project.root / "remote").write_text("no folder")
    carnice("cache", "keys", "new")
    finished = carnice("build", FOUR, "--remote", f"file://{project.root}/remote", "--push")
    assert (project.out / FOUR / "config.json").exists()
    return finished.code


Situation = Callable[[Project, Carnice, Patch], int]


def _new_without_a_preset(project: Project, carnice: Carnice, patch: Patch) -> int:
    finished = carnice("new", "mine", "--from", project.base, "--as", "mlx-4bits")
    assert not (project.recipes / "mine.yaml").exists()
    return finished.code


PROMISES: list[tuple[str, str, int, list[Situation]]] = [
    ("docs/new.md", "Each is one sentence and exit code 2", 2, [_new_without_a_preset]),
    ("docs/cache.md", "another layout version is refused with exit code 2", 2, [_another_layout]),
    ("docs/cache.md", "names what is damaged, exits 1 if anything is", 1, [_damaged_pack]),
    ("docs/cache.md", "while a build uses the cache (exit code 2)", 2, [_cache_in_use]),
    ("docs/cache.md", "and else stops with exit code 2", 2, [_too_little_disk]),
    (
        "docs/cache.md",
        "the disk fills up all the same, it stops with exit code 1",
        1,
        [_disk_fills_up],
    ),
    ("docs/remote.md", "another one is refused with exit code 2", 2, [_another_remote]),
    (
        "docs/remote.md",
        "A push that fails ends with exit code 1",
        1,
        [_remote_that_takes_nothing],
    ),
    (
        "docs/adding-a-backend.md",
        "worker that dies is a `BackendError` (exit code 1)",
        1,
        [_dead_worker],
    ),
    ("docs/adding-a-quant.md", "with the place in the file and exit code 2", 2, [_unknown_key]),
    ("docs/how-it-works.md", "one that fails makes the exit code 1", 1, [_failed_check]),
    ("docs/verify.md", "one that fails makes the exit code 1", 1, [_failed_check]),
    ("README.md", "| 0 | done |", 0, [_success]),
    ("README.md", "| 1 | a build could not be finished,", 1, [_disk_fills_up, _failed_check]),
    ("README.md", "| 2 | bad input:", 2, [_unknown_key, _too_little_disk, _cache_in_use]),
    ("README.md", "| 130, 143 | interrupted or terminated;", 130, [_broken_off]),
    ("README.md", "| 130, 143 | interrupted or terminated;", 143, [_terminated]),
]
CASES = [
    pytest.param(situation, code, id=f"{page} {code} {situation.__name__}")
    for page, _, code, situations in PROMISES
    for situation in situations
]


@pytest.mark.parametrize(("situation", "code"), CASES)
def test_a_promised_exit_code_is_kept(
    project: Project, carnice: Carnice, monkeypatch: Patch, situation: Situation, code: int
) -> None:
    """Whatever a page says that a command exits with, it does."""
    assert code == situation(project, carnice, monkeypatch)


def test_every_promise_is_tested() -> None:
    """A line of any page that speaks of an exit code is one of those above."""
    speaks = re.compile(
        r"exit code \d|exits \d|^\| \d+(, \d+)* \|.*(done|build|bad input|interrupted)"
    )
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        name = page.relative_to(REPOSITORY).as_posix()
        known = [text for where, text, _, _ in PROMISES if where == name]
        lines = [line for line in page.read_text().splitlines() if speaks.search(line)]

        assert [] == [line for line in lines if not any(text in line for text in known)], name
        assert [] == [text for text in known if not any(text in line for line in lines)], name
