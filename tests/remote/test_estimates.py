"""Estimates for machines that meet in a remote, against what such machines do."""

from __future__ import annotations

from io import StringIO

from remotes import Team
from rich.console import Console

from carnice_build.commands.estimate import estimate_plan
from carnice_build.commands.parts import build_part
from carnice_build.commands.plan import plan_and_survey
from carnice_build.execute.parts import Part
from carnice_build.planning.estimate import Estimate, Machines
from carnice_build.rates import Rates
from carnice_build.report.plan_table import plan_view

pytest_plugins = ["remotes"]

VARIANTS = ("mlx-4bit", "mlx-6bit")


def estimated(team: Team, count: int, machine: str) -> Estimate:
    """The estimate for so many machines, of what the cache of one and the remote lack."""
    machines = Machines(count, cores=2, bandwidth=1e9, rates=Rates())
    return estimate_plan(plan_and_survey(VARIANTS, team.options(machine)), machines)


def test_nodes_do_what_parts_do(team: Team) -> None:
    """They read as many bytes, and push as many but for tensors that turn out to be equal.

    The build at the end fetches that, and reads the folder to know it.
    """
    found = estimated(team, 3, "nobody")
    options = [team.options(f"part-{number}", push=True) for number in (1, 2, 3)]
    parts = [build_part(VARIANTS, Part(i, 3), item) for i, item in enumerate(options, 1)]
    built = team.build("whole", *VARIANTS).result

    assert [part.read_bytes for part in parts] == [node.read for node in found.nodes]
    pushed, planned = sum(part.pushed_bytes for part in parts), found.together.fetched
    assert planned == sum(node.pushed for node in found.nodes)
    assert 0.97 * planned < built.fetched_bytes <= pushed <= planned
    assert built.read_bytes == found.together.read


def test_what_is_in_the_remote_is_fetched(team: Team) -> None:
    """And neither read nor made again, by who knows the source."""
    team.build("one", *VARIANTS, push=True)
    (unread,) = estimated(team, 1, "two").nodes
    team.build("two", "mlx-mixed_2_6", remote="")
    (node,) = estimated(team, 1, "two").nodes

    assert (0, True) == (unread.fetched, unread.read > 0)
    assert (0, True) == (node.read, 0 < node.fetched <= node.packs)


def test_a_plan_says_that_it_cannot_know(team: Team) -> None:
    """What a remote has of a checkpoint in a folder, until that was read once."""
    team.build("one", push=True)
    said = []
    for _ in range(2):
        result = plan_and_survey(["mlx-4bit"], team.options("two"))
        console = Console(width=120, file=StringIO())
        console.print(plan_view(result, 2**30, 2))
        said.append("files here that were never read" in console.file.getvalue())  # type: ignore[attr-defined]
        team.build("two", "mlx-6bit", remote="")

    assert [True, False] == said
