"""Pushing and pulling without a build, and what becomes of a remote in time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Finished
from remotes import Behaviour, Team, refusing

from carnice_build.errors import CarniceError
from carnice_build.remote import upload
from carnice_build.store.store import Store

pytest_plugins = ["remotes"]

Carnice = Callable[..., Finished]

DAY = 86_400


def aged(team: Team, days: float, part: str = "") -> None:
    """Make objects older, those whose path holds `part`."""
    for path in team.folder.rglob("*"):
        if path.is_file() and part in str(path):
            time = path.stat().st_mtime - days * DAY
            os.utime(path, (time, time))


def machine(team: Team, name: str) -> list[str]:
    """Arguments of a machine."""
    return ["--cache", str(team.project.root / name / "cache"), "--remote", team.url]


def test_push_and_pull_do_without_a_build(team: Team, carnice: Carnice) -> None:
    """What one machine pushes later another pulls before it builds, and then asks nobody."""
    team.build("one")
    pushed = carnice("cache", "push", "mlx-4bit", *machine(team, "one"))
    pulled = carnice("cache", "pull", "mlx-4bit", *machine(team, "two"))
    built = team.build("two", remote="")

    assert (0, 0) == (pushed.code, pulled.code), pushed.err + pulled.err
    assert "pushed 4 objects" in pushed.out
    assert "mlx-4bit: complete" in pulled.out
    assert 0 == built.result.actions_run
    assert team.output("one") == team.output("two")


def test_unfinished_packs_are_pushed_tensor_by_tensor(team: Team, carnice: Carnice) -> None:
    """What a build had made before it was stopped need not be made again elsewhere."""
    team.build("one")
    with Store(team.project.root / "one" / "cache") as store:
        store.demote(store.records.names("pack")[0])
    carnice("cache", "push", "mlx-4bit", *machine(team, "one"))

    assert 3 == len(team.objects("packs"))
    assert team.objects("blobs")
    assert (0, True) == team.build("two").counts
    assert team.output("one") == team.output("two")


def test_pushing_what_is_not_built_is_refused(team: Team, carnice: Carnice) -> None:
    """The sentence says which variant, and nothing is put."""
    (team.project.root / "one" / "cache").mkdir(parents=True)
    finished = carnice("cache", "push", "mlx-4bit", *machine(team, "one"))

    assert 2 == finished.code
    assert "nothing of mlx-4bit is built" in finished.err
    assert not team.folder.exists()


def test_pulling_tells_what_is_left_to_do(pushed: Team, carnice: Carnice) -> None:
    """A variant that nobody pushed has what it shares with others."""
    finished = carnice("cache", "pull", "mlx-6bit", *machine(pushed, "two"), "--json")
    (variant,) = json.loads(finished.out)["variants"]

    assert not variant["complete"]
    assert variant["missing_actions"] > 0


def test_stats_count_what_is_there(pushed: Team, carnice: Carnice) -> None:
    """Packs, batches, and which variants they are of."""
    found = json.loads(carnice("cache", "stats", "--remote", pushed.url, "--json").out)

    assert 4 == found["packs"]
    assert found["pack_bytes"] == found["needed_bytes"]
    assert (1, 1) == (found["batches"], found["believed"])
    assert ["mlx-4bit"] == found["variants"]


def test_gc_takes_what_nobody_pushed_for_long(pushed: Team, carnice: Carnice) -> None:
    """Old batches go, with the objects that they alone name; what younger ones name stays."""
    pushed.build("one", "mlx-6bit", push=True)
    shared = {path.name for path in pushed.objects("packs")}
    aged(pushed, 10)
    pushed.build("one", "mlx-6bit", push=True)
    finished = carnice("cache", "gc", "--remote", pushed.url, "--older-than", "7d")
    left = {path.name for path in pushed.objects("packs")}

    assert 0 == finished.code, finished.err
    assert left < shared
    assert 1 == len(pushed.objects("records"))
    assert (0, True) == pushed.build("two", "mlx-6bit").counts


def test_pushing_again_keeps_a_variant_alive(pushed: Team, carnice: Carnice) -> None:
    """The batch is put anew, so that its age is that of the last push."""
    aged(pushed, 10)
    pushed.build("one", push=True)
    finished = carnice("cache", "gc", "--remote", pushed.url, "--older-than", "7d", "--json")

    assert 0 == json.loads(finished.out)["files"]


def test_the_local_clock_takes_nothing(pushed: Team, carnice: Carnice) -> None:
    """In a remote whose clock is years behind, the newest object is still new."""
    aged(pushed, 5_000)
    finished = carnice("cache", "gc", "--remote", pushed.url, "--older-than", "7d", "--json")

    assert 0 == json.loads(finished.out)["files"]


def test_gc_keeps_what_others_named_with_keys_that_are_not_trusted(
    pushed: Team, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who collects need not believe a batch to leave what it names."""
    monkeypatch.setenv("CARNICE_KEY", str(pushed.project.root / "none.pem"))
    aged(pushed, 10, "packs")
    finished = carnice("cache", "gc", "--remote", pushed.url, "--older-than", "7d", "--json")

    assert 0 == json.loads(finished.out)["files"]


def test_gc_of_a_remote_is_by_age(pushed: Team, carnice: Carnice) -> None:
    """Without an age it is refused: all would go that others are just pushing."""
    finished = carnice("cache", "gc", "--remote", pushed.url)

    assert 2 == finished.code
    assert "by age alone; expected --older-than AGE" in finished.err


def test_a_collection_beside_a_push_loses_nothing(
    pushed: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that go after the pusher saw them are put again once its batch is there."""
    real = upload.encode

    def encode_while_collected(*arguments: object) -> bytes:
        for path in pushed.objects("packs"):
            path.unlink()
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(upload, "encode", encode_while_collected)
    pushed.build("one", push=True)

    assert (0, True) == pushed.build("two").counts


def test_a_pusher_that_dies_leaves_nothing_visible(team: Team, behaviour: Behaviour) -> None:
    """Without its batch, objects that it put are as good as absent; the next push completes it."""
    behaviour.hooks.append(refusing("put", KeyboardInterrupt, "/records/"))
    with pytest.raises(KeyboardInterrupt):
        team.build("one", remote=team.odd, push=True)
    assert 4 == len(team.objects("packs"))

    assert 0 == team.build("two").result.fetched_bytes
    behaviour.hooks.clear()
    assert 0 == team.build("one", remote=team.odd, push=True).result.pushed_bytes
    assert (0, True) == team.build("three").counts


def test_half_an_object_is_never_seen(team: Team, behaviour: Behaviour) -> None:
    """An object has its name once it is whole; what a dead pusher left has another."""
    behaviour.hooks.append(refusing("put", KeyboardInterrupt, "/packs/"))
    with pytest.raises(KeyboardInterrupt):
        team.build("one", remote=team.odd, push=True)

    assert [] == [path for path in team.objects("packs") if path.suffix == ".safetensors"]


def test_pushers_may_push_at_once(team: Team, carnice: Carnice) -> None:
    """Two machines that push the same and different variants leave a whole remote."""
    for name in ("one", "two"):
        team.build(name, "mlx-4bit", "mlx-6bit")
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(team.build, name, "mlx-4bit", other, push=True)
            for name, other in (("one", "mlx-6bit"), ("two", "mlx-mixed_3_6"))
        ]
        assert all(item.result() for item in both)

    built = team.build("three", "mlx-4bit", "mlx-6bit", "mlx-mixed_3_6")
    assert (0, True) == built.counts


def test_a_remote_that_is_full_ends_a_push_in_a_sentence(team: Team, behaviour: Behaviour) -> None:
    """The build is complete, exit code 1 says that it was not pushed, and nothing is visible."""
    from remotes import full

    behaviour.hooks.append(refusing("put", full, "/packs/"))
    with pytest.raises(
        CarniceError, match="cannot push: the remote failed: No space left"
    ) as error:
        team.build("one", remote=team.odd, push=True)

    assert 1 == error.value.exit_code
    assert Path(team.project.root / "one" / "build" / "mlx-4bit" / "config.json").exists()
    assert [] == team.objects("records")
