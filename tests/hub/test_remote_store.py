"""Results of a checkpoint on the hub travel by the hub's own hashes: nobody downloads it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Finished, Project
from fake_hub import FakeHub
from huggingface_hub import constants
from remotes import Team

pytest_plugins = ["hub_fixtures", "remotes"]

Carnice = Callable[..., Finished]


def weights(hub: FakeHub) -> int:
    """Bytes that were sent of shards."""
    return sum(count for file, count in hub.sent.items() if file.endswith(".safetensors"))


@pytest.fixture
def built(online: Project, team: Team, hub: FakeHub) -> Iterator[Team]:
    """A remote with mlx-4bit of the hub's model, and no Hugging Face cache any more."""
    team.build("one", profile="online", push=True)
    assert weights(hub) > 0
    shutil.rmtree(Path(constants.HF_HUB_CACHE))
    hub.sent.clear()
    yield team


@pytest.mark.parametrize("stream", [True, False])
def test_a_machine_that_never_read_the_checkpoint_reads_no_weight(
    built: Team, hub: FakeHub, stream: bool
) -> None:
    """It reads headers, and fetches results in the place of weights."""
    headers = sum(8 + length(path) for path in built.project.checkpoint.glob("*.safetensors"))
    second = built.build("two", profile="online", stream=stream)

    assert (0, True) == second.counts
    assert 0 == second.result.read_bytes
    assert weights(hub) < headers + 200_000
    assert built.output("one") == built.output("two")


def length(path: Path) -> int:
    """That of a shard's header."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_a_plan_shows_what_the_remote_has(built: Team, carnice: Carnice) -> None:
    """All actions are in the remote, nothing is to be read, and the table has a column for it."""
    places = ("--profile", "online", "--cache", built.project.root / "two", "--remote", built.url)
    plan = json.loads(carnice("plan", "mlx-4bit", *places, "--json").out)
    table = carnice("plan", "mlx-4bit", *places).out

    assert {"remote"} == {state for state, count in plan["actions"].items() if count}
    assert 0 == plan["bytes_to_read"] < plan["bytes_to_fetch"] <= plan["bytes_to_write"]
    assert "in the remote" in table
    assert "to fetch" in table
