"""How often a remote is asked: once for what it knows, and by range for what is wanted of it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from remotes import Behaviour, Team

from carnice_build.commands.plan import plan_and_survey
from carnice_build.remote import download
from carnice_build.remote.batches import Body, PackEntry
from carnice_build.remote.index import Index, RemotePlace
from carnice_build.remote.objects import Objects
from carnice_build.remote.remote import Remote
from carnice_build.remote.upload import push
from carnice_build.store.digests import digest_bytes, digest_texts

pytest_plugins = ["remotes"]

ACTIONS = 50_000


def digest(number: int) -> str:
    """One of many."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def large_body() -> Body:
    """What 50,000 actions with three outputs each would leave, in 200 packs."""
    actions = {digest(-n): [digest(3 * n + k) for k in (0, 1, 2)] for n in range(1, ACTIONS + 1)}
    outputs = [item for digests in actions.values() for item in digests]
    packs = {}
    for start in range(0, len(outputs), 750):
        digests = outputs[start : start + 750]
        name = digest_texts([digest(0), *digests])
        sizes = [1_000] * len(digests)
        packs[name] = PackEntry(size=8 + 750_000, header=digest(0), digests=digests, sizes=sizes)
    return Body(variants=["large"], actions=actions, packs=packs)


def test_plans_of_many_actions_take_three_requests(team: Team, behaviour: Behaviour) -> None:
    """The version, a listing, and the batch; of what was read before, only the first two."""
    body = large_body()
    push(Objects(team.odd), {"large": body}, {}, team.signer, print, print)
    behaviour.calls.clear()
    cache = team.project.root / "two" / "cache"
    first = Remote(Objects(team.odd), {team.signer.public: ""}, cache)
    asked = dict(behaviour.calls)
    behaviour.calls.clear()
    second = Remote(Objects(team.odd), {team.signer.public: ""}, cache)

    assert {"connect": 1, "read": 2, "list": 1} == asked
    assert {"connect": 1, "read": 1, "list": 1} == dict(behaviour.calls)
    for remote in (first, second):
        known = [remote.index.outputs(key, 3) for key in body.actions]
        assert ACTIONS == len(known) - known.count(None)
        assert all(remote.index.place(item, 1_000) for found in known for item in found or ())


def test_plans_ask_for_no_object(pushed: Team, behaviour: Behaviour) -> None:
    """A plan costs as much as opening the remote does."""
    behaviour.calls.clear()
    plan_and_survey(["mlx-4bit"], pushed.options("two", remote=pushed.odd))

    assert {"connect": 1, "read": 2, "list": 1} == dict(behaviour.calls)


def test_whole_shards_come_in_one_request_each(pushed: Team, behaviour: Behaviour) -> None:
    """Neighbouring tensors of an object are asked for together."""
    behaviour.calls.clear()
    pushed.build("two", remote=pushed.odd)

    expected = {"connect": 1, "read": 2 + len(pushed.objects("packs")), "list": 1}

    assert expected == dict(behaviour.calls)


def test_bytes_over_the_wire_are_those_of_the_output(pushed: Team) -> None:
    """Tensors are fetched once, and nothing but tensors."""
    built = pushed.build("two")
    shards = list((pushed.project.root / "two" / "build" / "mlx-4bit").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)

    assert sum(path.stat().st_size for path in shards) - headers == built.result.fetched_bytes


def test_a_build_with_nothing_to_do_asks_nobody(pushed: Team, behaviour: Behaviour) -> None:
    """What is in the cache needs no remote."""
    pushed.build("two")
    behaviour.calls.clear()
    pushed.build("two", remote=pushed.odd)

    assert {} == dict(behaviour.calls)


def object_of(team: Team, sizes: list[int]) -> tuple[dict[str, RemotePlace], dict[str, bytes]]:
    """An object of tensors of these sizes: their places and bytes by digest."""
    random = np.random.default_rng(0)
    contents = [random.bytes(size) for size in sizes]
    (team.folder / "packs").mkdir(parents=True)
    (team.folder / "packs" / "x").write_bytes(b"".join(contents))
    places, offset = {}, 0
    for content in contents:
        places[digest_bytes(content)] = RemotePlace("packs/x", offset, len(content))
        offset += len(content)
    return places, {digest_bytes(content): content for content in contents}


SIZES = {
    "small": [10, 20, 30, 40],
    "one of several requests": [350],
    "all kinds": [10, 350, 99, 100, 101, 7, 200, 1],
}


@pytest.mark.parametrize("sizes", SIZES)
def test_tensors_arrive_as_they_are(
    team: Team, monkeypatch: pytest.MonkeyPatch, sizes: str
) -> None:
    """However they are cut into requests and joined, each has its bytes, in order."""
    monkeypatch.setattr(download, "REQUEST_BYTES", 100)
    places, contents = object_of(team, SIZES[sizes])
    found = {name: bytearray() for name in contents}
    for event in download.download(Objects(team.url), places):
        if isinstance(event, download.Ended):
            assert event.failure is None
        else:
            assert len(found[event.digest]) == event.offset
            found[event.digest] += event.content

    assert contents == found


def test_gaps_are_read_where_that_costs_less_than_a_request(
    team: Team, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other of many small tensors comes in one request."""
    places, _ = object_of(team, [1_000] * 50)
    wanted = dict(list(places.items())[::2])
    arrived = list(download.download(Objects(team.odd), wanted))

    assert 1 == behaviour.calls["read"]
    assert 25 == sum(isinstance(event, download.Ended) for event in arrived)


def test_the_first_batch_counts_where_two_differ() -> None:
    """By name, so that all machines choose the same."""
    one, two = (Body(actions={digest(0): [digest(number)]}) for number in (1, 2))

    assert (digest(1),) == Index([one, two]).outputs(digest(0), 1)


def test_interrupted_fetches_go_on(
    pushed: Team, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrived before a build was stopped is not fetched again."""
    monkeypatch.setattr(download, "REQUEST_BYTES", 50_000)

    def stop(asked: str, path: str) -> None:
        if asked == "read" and "/packs/" in path and behaviour.calls["read"] > 6:
            raise KeyboardInterrupt

    behaviour.hooks.append(stop)
    with pytest.raises(KeyboardInterrupt):
        pushed.build("two", remote=pushed.odd)
    behaviour.hooks.clear()
    built = pushed.build("two", remote=pushed.odd)
    whole = pushed.build("three", remote=pushed.odd)

    assert 0 == built.result.actions_run
    assert 0 < built.result.fetched_bytes < whole.result.fetched_bytes
    assert pushed.output("one") == pushed.output("two")
