"""Two caches that meet in a remote: what one computed, the other fetches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from remotes import Team
from tiny import contents, read_safetensors, write_safetensors

pytest_plugins = ["remotes"]


def test_a_second_machine_computes_nothing(pushed: Team) -> None:
    """It fetches what the first one pushed, and its folder has the same bytes."""
    built = pushed.build("two")

    assert (0, True) == built.counts
    assert [] == built.notices
    assert pushed.output("one") == pushed.output("two")


def test_fetched_shards_are_finished_packs(pushed: Team) -> None:
    """A shard that was fetched whole is the same pack under the same name, linked not copied."""
    pushed.build("two")
    one, two = (
        sorted((pushed.project.root / name / "cache" / "packs").iterdir())
        for name in ("one", "two")
    )

    assert [path.name for path in one] == [path.name for path in two]
    assert {2} == {path.stat().st_nlink for path in two}


def test_objects_are_the_published_shards(pushed: Team) -> None:
    """A pack in the remote is the file that the model's folder has."""
    shards = {
        path.read_bytes()
        for path in (pushed.project.root / "one" / "build" / "mlx-4bit").glob("*.safetensors")
    }

    assert shards == {path.read_bytes() for path in pushed.objects("packs")}


def test_without_push_nothing_is_written(team: Team) -> None:
    """A remote is only read unless a build is told to push."""
    team.build("one")

    assert not team.folder.exists()


def test_pushing_again_puts_no_object(pushed: Team) -> None:
    """What is there is not put again, and the same contents are the same batch."""
    times = {path: path.stat().st_mtime_ns for path in pushed.objects("packs")}
    built = pushed.build("one", push=True)

    assert 0 == built.result.pushed_bytes
    assert times == {path: path.stat().st_mtime_ns for path in pushed.objects("packs")}
    assert 1 == len(pushed.objects("records"))


def test_what_differs_is_computed_and_the_rest_fetched(pushed: Team) -> None:
    """After an edit the second machine runs only the actions that the edit changed."""
    edit = ('quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}',)
    alone = pushed.build("alone", remote="", overrides=edit)
    built = pushed.build("two", overrides=edit)

    assert 1 == built.result.actions_run < alone.result.actions_run
    assert pushed.output("alone") == pushed.output("two")


def test_two_builds_may_fetch_into_one_cache(pushed: Team) -> None:
    """One waits for the other, and both have the whole folder."""
    places = [{"out": pushed.project.root / name} for name in ("left", "right")]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(pushed.build, "two", **place) for place in places]
        assert [0, 0] == [item.result().result.actions_run for item in both]

    left, right = (contents(place["out"] / "mlx-4bit") for place in places)
    assert left == right
    assert set(left.values()) == set(pushed.output("one").values())


def test_a_changed_source_is_not_taken_for_the_pushed_one(pushed: Team) -> None:
    """A checkpoint of this machine is read before results of it are believed."""
    changed = 0
    for shard in pushed.project.checkpoint.glob("*.safetensors"):
        tensors = read_safetensors(shard)
        for name, tensor in tensors.items():
            if name.endswith("layers.2.mlp.up_proj.weight"):
                data = bytearray(tensor.data)
                data[20_000] ^= 1  # where no sample looks
                tensors[name] = replace(tensor, data=bytes(data))
                changed += 1
        write_safetensors(shard, tensors)
    alone = pushed.build("alone", remote="")
    built = pushed.build("two")

    assert 1 == changed == built.result.actions_run < alone.result.actions_run
    assert pushed.output("alone") == pushed.output("two")
