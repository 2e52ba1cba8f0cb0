"""A build in parts: machines that each do some of it, and one that puts it together."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrating import QUICK
from conftest import Finished, Project
from remotes import Team

from carnice_build.calibration.passes import Forward
from carnice_build.commands.parts import PartResult, build_part, part_of
from carnice_build.commands.plan import Plan, plan_variants
from carnice_build.errors import CarniceError
from carnice_build.execute.events import Event, Notice
from carnice_build.execute.parts import Part, divide, members_of
from carnice_build.execute.processes import LocalRunner
from carnice_build.graph import Action, ProcessOp
from carnice_build.remote.signing import new_key
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor

pytest_plugins = ["remotes", "calibrating"]

VARIANTS = ("mlx-4bit", "mlx-6bit")


def do(team: Team, number: int, count: int, *variants: str) -> PartResult:
    """A part, on a machine of its own."""
    options = team.options(f"part-{number}", push=True)
    return build_part(variants or VARIANTS, Part(number, count), options)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_all_of_the_work_and_none_of_it_twice(team: Team, count: int) -> None:
    """What the parts ran adds up to what one machine runs, and theirs is the same folder."""
    alone = team.build("alone", *VARIANTS, remote="")
    parts = [do(team, number, count) for number in range(1, count + 1)]
    built = team.build("whole", *VARIANTS)

    assert alone.result.actions_run == sum(part.actions_run for part in parts)
    assert alone.result.read_bytes == sum(part.read_bytes for part in parts)
    assert alone.result.actions_run == sum(part.actions for part in parts)
    assert 0 == built.result.actions_run
    assert team.output("alone") == team.output("whole")


def test_parts_are_of_like_sizes(team: Team) -> None:
    """No part reads more than the even share and the largest tensor."""
    plan = plan_variants(VARIANTS, team.options("one"))
    sizes = [source.stored_bytes for source in _sources(plan)]
    parts = [do(team, number, 3) for number in (1, 2, 3)]

    assert max(part.read_bytes for part in parts) <= sum(sizes) / 3 + max(sizes)


def test_machines_divide_alike(team: Team, tmp_path: Path) -> None:
    """Though a checkpoint in a folder is another file on each."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(team.project.root, copy)
    names = []
    for recipes in (team.project.recipes, copy / "recipes"):
        plan = plan_variants(VARIANTS, team.options("one", recipes=recipes))
        shares = divide(3, plan.variants, plan.graph)
        names.append(
            [
                sorted(item.name for item in _sources(plan) if item.identity in share.members)
                for share in shares
            ]
        )

    assert names[0] == names[1]


def _sources(plan: Plan) -> Iterable[SourceTensor]:
    refs = [ref for action in plan.graph for ref in action.inputs]
    refs += [slot.tensor.ref for item in plan.variants for p in item.packs for slot in p.slots]
    found = {ref.identity: ref.origin for ref in refs if isinstance(ref.origin, SourceTensor)}
    return found.values()


def test_a_missing_part_is_built_at_the_end(team: Team) -> None:
    """Its actions and no others."""
    alone = team.build("alone", *VARIANTS, remote="")
    first = do(team, 1, 2)
    built = team.build("whole", *VARIANTS)

    assert 0 < first.actions_run < alone.result.actions_run
    assert alone.result.actions_run - first.actions_run == built.result.actions_run
    assert team.output("alone") == team.output("whole")


def test_a_part_makes_no_folder(team: Team) -> None:
    """Which would be half of one."""
    do(team, 1, 2)

    assert not (team.project.root / "part-1" / "build").exists()


def test_a_part_that_was_done_is_not_done_again(team: Team) -> None:
    """Nothing is computed, and nothing pushed."""
    do(team, 1, 2)
    again = do(team, 1, 2)

    assert (0, 0) == (again.actions_run, again.pushed_bytes)


def test_more_parts_than_work(team: Team) -> None:
    """Those that get nothing do nothing, and say so."""
    parts = [do(team, number, 200, "mlx-4bit") for number in (1, 200)]

    assert [True, False] == [part.actions > 0 for part in parts]


def test_what_a_part_is_given_is_made_where_it_does_not_come(
    small: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line names the tensor, the object and the remote.  Passes here count samples."""

    def run(_: LocalRunner, action: Action, inputs: Any, outputs: Sequence[TensorFile]) -> None:
        if isinstance(action.op, Forward):
            samples = outputs[0].spec.shape[0]
            outputs[1].write(np.full(outputs[1].spec.shape, samples, np.float32))

    monkeypatch.setattr(LocalRunner, "run", run)
    key = tmp_path / "key.pem"
    new_key(key)
    monkeypatch.setenv("CARNICE_KEY", str(key))
    team = Team(small, tmp_path / "remote", key)
    team.build("one", "nvfp4-text-mtp", push=True, overrides=QUICK)
    for path in team.objects("blobs"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    # Which has read the checkpoints.
    team.build("two", "nvfp4-text-mtp", remote="", overrides=(*QUICK, "calibration.samples=1"))
    events: list[Event] = []
    changed = (*QUICK, "quantize.defaults=modelopt-0.43", "quantize.keep=mtp.*")
    options = team.options("two", push=True, overrides=changed)
    done = build_part(["nvfp4-text-mtp"], Part(1, 1), options, events.append)
    said = [event.text for event in events if isinstance(event, Notice)]

    names = r"'output 1 of calibration.forward of [\w.]+' of blobs/\w\w/\w+"

    assert 1 == len(said)
    assert re.fullmatch(
        f"{re.escape(team.url)}: blobs/.* was altered .*not fetched: {names}\\)", said[0]
    )
    # The pass; what is found has the bytes that it had, and is quantized in another way.
    assert 3 == done.actions_run


def test_a_chain_of_a_calibration_is_one_machines(small: Project) -> None:
    """What it takes from layer to layer is too large to travel; what it finds is not."""
    plan = plan_variants(["nvfp4-text-mtp"], small.options(overrides=QUICK))
    shares = [members_of(Part(number, 3), plan.variants, plan.graph) for number in (1, 2, 3)]
    chain = {
        action.identity
        for action in plan.graph
        if isinstance(action.op, ProcessOp) and action.op.transient
    }
    actions = {action.identity for action in plan.graph}

    assert 1 == sum(bool(chain & share) for share in shares)
    assert actions <= frozenset().union(*shares)
    assert sum(map(len, shares)) == len(frozenset().union(*shares))


def test_chains_of_a_calibration_in_parts_are_several_machines(small: Project) -> None:
    """Each begins with the tokens; what puts them together is left to the end, with what follows.

    Weights, which follow from no chain, are one machine's as ever.
    """
    overrides = (*QUICK, "calibration.parts=2")
    plan = plan_variants(["nvfp4-text-mtp"], small.options(overrides=overrides))
    shares = [members_of(Part(number, 2), plan.variants, plan.graph) for number in (1, 2)]
    by_op: dict[str, list[int]] = {}
    for action in plan.graph:
        count = sum(action.identity in share for share in shares)
        by_op.setdefault(action.op.name, []).append(count)

    assert {1} == {*by_op["calibration.forward"], *by_op["calibration.embed"]}
    assert {2} == {*by_op["calibration.tokens"], *by_op["calibration.cut"]}
    assert {0} == {*by_op["calibration.combine"], *by_op["nvfp4.input_scales"]}
    assert {1} == {*by_op["nvfp4.quantize"]}
    forwards = [a.identity for a in plan.graph if a.op.name == "calibration.forward"]
    assert [len(forwards) // 2] * 2 == [sum(f in share for f in forwards) for share in shares]


@pytest.mark.parametrize(("device", "wanted"), [("cpu", 0), ("cuda", 1)])
def test_the_part_with_the_calibration_wants_its_device(
    small: Project, device: str, wanted: int
) -> None:
    """The others compute on no GPU; steps are in the same one."""
    overrides = (*QUICK, f"calibration.device={device}")
    plan = plan_variants(["nvfp4-text-mtp"], small.options(overrides=overrides))
    shares = divide(3, plan.variants, plan.graph)

    assert wanted == sum(share.wants_gpu for share in shares)
    assert 1 == sum(share.steps > 0 for share in shares)
    assert all(share.peak_bytes > 0 for share in shares)


@pytest.mark.parametrize("given", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(given: str) -> None:
    """With what it must look like."""
    with pytest.raises(CarniceError, match="is no part") as caught:
        part_of(given)

    assert "I/N" in caught.value.expected


def test_a_part_is_for_others(
    team: Team, carnice: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --push nobody would have it, and without a remote nobody could."""
    monkeypatch.chdir(team.project.root)
    alone = carnice("build", "mlx-4bit", "--part", "1/2", "--push")
    kept = carnice("build", "mlx-4bit", "--part", "1/2", "--remote", team.url)

    assert (2, 2) == (alone.code, kept.code)
    assert "--remote URL" in alone.err
    assert "--push with it" in kept.err
