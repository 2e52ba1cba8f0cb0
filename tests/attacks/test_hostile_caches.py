"""Hostile caches: nonsense in the cache is made good again, or named, and never believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacking import Attack, RawRecords, check_named, differing
from conftest import Project

pytest_plugins = ["attacking"]

Damage = Callable[[Project], None]

VALUES = "UPDATE Cache SET mode = 1, filename = NULL, value = ?"


def packed(value: object) -> bytes:
    """A value or key as JSONDisk keeps it."""
    return zlib.compress(json.dumps(value).encode(), 1)


def every_value(value: bytes) -> Damage:
    """Put `value` into every row of the action cache."""
    return lambda project: RawRecords(project).run(VALUES, value) and None


def rows(kind: str, change: Callable[[Any], Any]) -> Damage:
    """Change the value of every entry of a kind."""

    def damage(project: Project) -> None:
        records = RawRecords(project)
        for row, key, value in records.run("SELECT rowid, key, value FROM Cache"):
            if json.loads(zlib.decompress(key)).startswith(f"{kind}:"):
                new = packed(change(json.loads(zlib.decompress(value))))
                records.run("UPDATE Cache SET value = ? WHERE rowid = ?", new, row)

    return damage


def everywhere(folder: str, change: Callable[[Path], object]) -> Damage:
    """Change every file in a folder of the cache."""

    def damage(project: Project) -> None:
        for path in sorted((project.cache / folder).iterdir()):
            path.chmod(0o644)
            change(path)

    return damage


def without_packs(damage: Damage) -> Damage:
    """The same with the packs gone, so that places are looked up."""

    def both(project: Project) -> None:
        damage(project)
        for path in (project.cache / "packs").iterdir():
            path.rename(project.cache / "partial" / layout_name(project, path.stem))

    return both


def layout_name(project: Project, pack: str) -> str:
    """The file name of the partial pack that became `pack`."""
    for key, value in RawRecords(project).run("SELECT key, value FROM Cache"):
        name = json.loads(zlib.decompress(key))
        if name.startswith("layout:") and json.loads(zlib.decompress(value)) == pack:
            return f"{name.removeprefix('layout:')}.safetensors"
    return "unknown.safetensors"


def forget_layouts(project: Project) -> None:
    """Forget which packs layouts became: everything has to be found through places."""
    records = RawRecords(project)
    for row, key in records.run("SELECT rowid, key FROM Cache"):
        if json.loads(zlib.decompress(key)).startswith("layout:"):
            records.run("DELETE FROM Cache WHERE rowid = ?", row)


def as_garbage(path: Path) -> None:
    path.write_bytes(b"garbage")


def same_size_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link_to_copy(path: Path) -> None:
    """A link to a file outside with the same bytes, and garbage after the first read of it."""
    outside = path.parent.parent.parent.parent / f"outside-{path.name}"
    shutil.copy2(path, outside)
    path.unlink()
    path.symlink_to(outside)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


RESULTS: dict[str, Damage] = {
    "values that are not compressed": every_value(b"garbage"),
    "values that are not JSON": every_value(zlib.compress(b"{")),
    "values that are numbers": every_value(packed(7)),
    "values that are null": every_value(packed(None)),
    "values that are nested deep": every_value(zlib.compress(b"[" * 100_000)),
    "digests that are paths": rows("layout", lambda value: "../../../../etc/passwd"),
    "digests that are paths in lists": rows("action", lambda value: ["../../x"] * len(value)),
    "digests in upper case": rows("layout", lambda value: value.upper()),
    "too few outputs": rows("action", lambda value: value[:-1]),
    "too many outputs": rows("action", lambda value: value * 2),
    "packs of negative size": rows("pack", lambda value: value | {"size": -1}),
    "packs of text": rows("pack", lambda value: value | {"size": "1"}),
    "packs without digests": rows("pack", lambda value: {"size": value["size"]}),
    "sources that are lists": rows("source", lambda value: [value]),
    "packs that are garbage": everywhere("packs", as_garbage),
    "packs that are garbage of the same size": everywhere("packs", same_size_garbage),
    "packs that are cut": everywhere("packs", truncated),
    "packs with one bit changed": everywhere("packs", one_bit),
    "packs that are empty": everywhere("packs", lambda path: os.truncate(path, 0)),
    "packs that are gone": everywhere("packs", Path.unlink),
    "places that are text": without_packs(rows("place", lambda value: "here")),
    "places in unknown layouts": without_packs(rows("place", lambda value: ["0" * 64, 0])),
    "places that are paths": without_packs(rows("place", lambda value: ["../../x", 0])),
    "places before the file": without_packs(rows("place", lambda value: [value[0], -8])),
    "places past the file": without_packs(rows("place", lambda value: [value[0], 2**40])),
    "places in the wrong place": without_packs(rows("place", lambda value: [value[0], 8])),
    "places in blobs": without_packs(rows("place", lambda value: ["", 0])),
    "partial packs that are garbage": without_packs(everywhere("packs", same_size_garbage)),
    "partial packs that are cut": without_packs(everywhere("packs", truncated)),
    "partial packs of the right bytes": without_packs(lambda project: None),
}


def forget_output(project: Project) -> None:
    shutil.rmtree(project.out)


@pytest.mark.parametrize("what", RESULTS)
def test_the_result_is_that_of_a_clean_cache(project: Project, attack: Attack, what: str) -> None:
    """What cannot be believed is made again: the same bytes."""
    assert 0 == attack("build", "mlx-4bit").code
    expected = project.built("mlx-4bit")
    forget_output(project)
    RESULTS[what](project)
    finished = attack("build", "mlx-4bit")

    assert 0 == finished.code, finished.err
    assert [] == differing(expected, project.built("mlx-4bit"))


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._path,)


def test_pickles_in_the_cache_are_not_loaded(project: Project, attack: Attack) -> None:
    """A row that says it is a pickle runs no code."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    forget_output(project)
    evil = pickle.dumps(Touch(project.root / "executed"))
    RawRecords(project).run("UPDATE Cache SET mode = 4, value = ?", evil)
    attack("build", "mlx-4bit")

    assert not (project.root / "executed").exists()
    assert [] == differing(expected, project.built("mlx-4bit"))


def test_rows_cannot_name_files_to_remove(project: Project, attack: Attack) -> None:
    """A row that keeps its value in a file outside of the cache cannot make us delete it."""
    attack("build", "mlx-4bit")
    victim = project.root / "victim"
    victim.write_text("precious")
    forget_output(project)
    everywhere("packs", Path.unlink)(project)
    RawRecords(project).run("UPDATE Cache SET mode = 2, value = NULL, filename = '../../victim'")
    attack("build", "mlx-4bit")

    assert "precious" == victim.read_text()


def test_swapped_layouts_are_not_believed(project: Project, attack: Attack) -> None:
    """A record that gives a shard another shard's pack does not swap the shards."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    forget_output(project)
    records = RawRecords(project)
    found = [
        (row, value)
        for row, key, value in records.run("SELECT rowid, key, value FROM Cache")
        if json.loads(zlib.decompress(key)).startswith("layout:")
    ]
    for (row, _), (_, value) in zip(found, [*found[1:], found[0]], strict=True):
        records.run("UPDATE Cache SET value = ? WHERE rowid = ?", value, row)
    attack("build", "mlx-4bit")

    assert [] == differing(expected, project.built("mlx-4bit"))


def test_packs_of_too_few_digests_are_not_believed(project: Project, attack: Attack) -> None:
    """A record that knows fewer tensors than its pack holds is no record."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    forget_output(project)
    rows("pack", lambda value: value | {"digests": value["digests"][:-1]})(project)
    attack("build", "mlx-4bit")

    assert [] == differing(expected, project.built("mlx-4bit"))


def test_places_in_finished_packs_are_not_believed(project: Project, attack: Attack) -> None:
    """A place that is inside a finished pack, but wrong, does not lend its bytes."""
    attack("build", "mlx-4bit", "mlx-6bit")
    attack("build", "mlx-mixed_4_6", "--cache", "cache/other", "--out", "build/clean")
    expected = {
        path.name: path.read_bytes() for path in (project.out / "clean/mlx-mixed_4_6").iterdir()
    }
    rows("place", lambda value: [value[0], 4096])(project)
    attack("build", "mlx-mixed_4_6")

    assert [] == differing(expected, project.built("mlx-mixed_4_6"))


def test_a_place_past_all_files_is_not_believed(project: Project, attack: Attack) -> None:
    """An offset of 10**30 is no offset."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    forget_output(project)
    without_packs(rows("place", lambda value: [value[0], 10**30]))(project)
    attack("build", "mlx-4bit")

    assert [] == differing(expected, project.built("mlx-4bit"))


def linked_partials(project: Project, make: Callable[[Path], object]) -> None:
    """Put something in the places of all partial packs."""
    for path in list((project.cache / "packs").iterdir()):
        name = layout_name(project, path.stem)
        path.unlink()
        make(project.cache / "partial" / name)


@pytest.mark.parametrize(
    "kind",
    [
        "link",
        "pipe",
        "folder",
    ],
)
def test_partial_packs_that_are_no_files_do_no_harm(
    project: Project, attack: Attack, kind: str
) -> None:
    """A link is not written through, a pipe does not block, a folder is no pack."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    forget_output(project)
    victims = project.root / "victims"
    victims.mkdir()

    def link(path: Path) -> None:
        (victims / path.name).write_text("precious")
        path.symlink_to(victims / path.name)

    make: dict[str, Callable[[Path], object]] = {
        "link": link,
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }
    linked_partials(project, make[kind])
    finished = attack("build", "mlx-4bit", seconds=4)

    assert {"precious"} >= {path.read_text() for path in victims.iterdir()}
    if finished.code:
        check_named(finished, "cache", code=None)
    else:
        assert [] == differing(expected, project.built("mlx-4bit"))


@pytest.mark.parametrize(
    "kind",
    [
        "link",
        "folder",
        "pipe",
    ],
)
def test_packs_that_are_no_files_do_no_harm(project: Project, attack: Attack, kind: str) -> None:
    """A link out of the cache is not published, a folder or a pipe is no pack."""
    attack("build", "mlx-4bit")
    expected = project.built("mlx-4bit")
    forget_output(project)
    make: dict[str, Callable[[Path], object]] = {
        "link": link_to_copy,
        "folder": as_folder,
        "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    }
    everywhere("packs", make[kind])(project)
    finished = attack("build", "mlx-4bit")

    if finished.code:
        check_named(finished, "cache", code=None)
    else:
        assert [] == differing(expected, project.built("mlx-4bit"))
        assert not any(path.is_symlink() for path in (project.out / "mlx-4bit").iterdir())


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "a version that is a folder": lambda cache: (cache / "FORMAT").mkdir(),
    "a version from the future": lambda cache: (cache / "FORMAT").write_text("carnice-cache 99\n"),
    "a version with escapes": lambda cache: (cache / "FORMAT").write_text("\x1b[2J\x07"),
    "a version that is binary": lambda cache: (cache / "FORMAT").write_bytes(bytes(range(256))),
    "packs that are a file": lambda cache: (
        (cache / "FORMAT").write_text("carnice-cache 1\n"),
        (cache / "packs").write_text("x"),
    ),
    "records that are a file": lambda cache: (
        (cache / "FORMAT").write_text("carnice-cache 1\n"),
        (cache / "records").write_text("x"),
    ),
    "a database that is garbage": lambda cache: (
        (cache / "FORMAT").write_text("carnice-cache 1\n"),
        (cache / "records").mkdir(),
        (cache / "records" / "cache.db").write_bytes(b"garbage" * 1000),
    ),
    "a database that is a folder": lambda cache: (
        (cache / "FORMAT").write_text("carnice-cache 1\n"),
        (cache / "records" / "cache.db").mkdir(parents=True),
    ),
    "a database of other tables": lambda cache: (
        (cache / "FORMAT").write_text("carnice-cache 1\n"),
        (cache / "records").mkdir(),
        other_tables(cache / "records" / "cache.db"),
    ),
}


def other_tables(path: Path) -> None:
    import sqlite3

    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE Cache (x)")


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_cache_that_cannot_be_used_is_named(project: Project, attack: Attack, what: str) -> None:
    """One line says which cache, and nothing is built."""
    project.cache.mkdir()
    UNUSABLE[what](project.cache)

    check_named(attack("build", "mlx-4bit"), "carnice: cache", code=None)
    assert not project.out.exists()


def test_a_version_that_is_a_pipe_does_not_block(project: Project, attack: Attack) -> None:
    """FORMAT is a file or nothing."""
    project.cache.mkdir()
    os.mkfifo(project.cache / "FORMAT")

    check_named(attack("build", "mlx-4bit", seconds=2), "carnice: cache", code=None)


def test_a_version_without_end_is_not_read(project: Project, attack: Attack) -> None:
    """FORMAT is read up to its first line at most."""
    project.cache.mkdir()
    (project.cache / "FORMAT").symlink_to("/dev/zero")

    check_named(attack("build", "mlx-4bit"), "carnice: cache", code=None)


def test_a_cache_that_is_a_file_is_named(project: Project, attack: Attack) -> None:
    """`--cache` wants a folder."""
    project.cache.write_text("x")

    check_named(attack("build", "mlx-4bit"), "carnice: cache", code=None)
