"""A build on a Ray cluster: nodes that are processes of this machine, with a cache each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Finished
from remotes import Team

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

from carnice_build.commands import node
from carnice_build.commands.cluster import (
    ClusterResult,
    build_on_cluster,
    check_address,
)
from carnice_build.commands.cluster_work import Work
from carnice_build.commands.remote import required_access
from carnice_build.commands.travelling import pack_project
from carnice_build.errors import CarniceError, CheckpointError, PlanError
from carnice_build.execute.events import Event, Notice
from carnice_build.remote.config import read_config
from carnice_build.remote.signing import new_key

pytest_plugins = ["remotes"]

VARIANTS = ("mlx-4bit",)

_WORKER = """
import os, sys, time
from pathlib import Path

def stuck(*arguments):
    sign = Path(os.environ["SIGN"])
    sign.with_name("new").write_text(str(os.getpid()))
    sign.with_name("new").rename(sign)
    time.sleep(600)

def failing(*arguments):
    raise BuildError("the disk is full", where="here")

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name == "carnice_build":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if any(item.endswith("default_worker.py") for item in sys.orig_argv):
    if os.environ["KIND"] == "bare":
        sys.meta_path.insert(0, Bare())
    else:
        from carnice_build.commands import node
        from carnice_build.errors import BuildError
        node.build_part = {"stuck": stuck, "failing": failing}[os.environ["KIND"]]
"""
"""Of odd nodes: one never ends a part, the disk of one is full, and one lacks this package."""


@dataclass
class Nodes:
    """A cluster of this machine that grows as tests want it."""

    cluster: Cluster
    count: int = 1
    events: list[Event] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it answers."""
        return str(self.cluster.address)

    def add(self, **environment: str) -> Any:
        """One more node, with these variables over those of all."""
        return self.cluster.add_node(**_SMALL, env_vars=_ENVIRONMENT | environment)

    def at_least(self, count: int) -> None:
        """Let there be so many."""
        for _ in range(self.count, count):
            self.add()
        self.count = max(self.count, count)

    def build(self, team: Team, machine: str, **changes: Any) -> ClusterResult:
        """Build VARIANTS with the nodes, from a machine with a cache of its own."""
        self.events.clear()
        options = team.options(machine, **({"push": True, "jobs": 1} | changes))
        return build_on_cluster(VARIANTS, self.address, options, self.events.append)

    @property
    def notices(self) -> list[str]:
        """What the last build said."""
        return [event.text for event in self.events if isinstance(event, Notice)]


_SMALL = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
_ENVIRONMENT = {"CARNICE_KEY": "no-key.pem", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster, of one node at first; none of its nodes has a key."""
    first = _SMALL | {"env_vars": _ENVIRONMENT}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    try:
        yield Nodes(cluster)
    finally:
        cluster.shutdown()


@dataclass
class Odd:
    """A node that is not as others, and the sign that it makes when it is stuck."""

    node: Any
    sign: Path

    def wait(self) -> None:
        """Until it has begun with a part, for half a minute."""
        for _ in range(600):
            if self.sign.exists():
                return
            time.sleep(0.05)

    def ended(self) -> bool:
        """Whether the process is gone that was stuck, or goes within half a minute."""
        process = int(self.sign.read_text())
        for _ in range(600):
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def odd(nodes: Nodes, tmp_path: Path) -> Iterator[Callable[[str], Odd]]:
    """`odd("stuck")`: one more node, of this kind, while the test runs."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(_WORKER)
    path = os.pathsep.join([str(hooks), str(REPOSITORY)])
    added = []

    def add(kind: str) -> Odd:
        sign = tmp_path / "begun"
        added.append(nodes.add(PYTHONPATH=path, KIND=kind, SIGN=str(sign)))
        return Odd(added[0], sign)

    yield add
    for item in added:
        if item in nodes.cluster.worker_nodes:
            nodes.cluster.remove_node(item, allow_graceful=False)


def start(nodes: Nodes, team: Team, *options: str) -> subprocess.Popen[str]:
    """`carnice build --ray`, as a process of its own."""
    command = [sys.executable, "-m", "carnice_build", "build", *VARIANTS, *options]
    command += ["--ray", nodes.address, "--remote", team.url, "--push", "--jobs", "1"]
    return subprocess.Popen(
        command,
        cwd=team.project.root,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.wide
def test_a_node_that_dies_costs_what_it_was_doing(
    nodes: Nodes, team: Team, odd: Callable[[str], Odd]
) -> None:
    """Another one does that, and of Ray's alarm nobody hears."""
    alone = team.build("alone", *VARIANTS, remote="")
    stuck = odd("stuck")
    build = start(nodes, team, "--json", "--out", "driver/build")
    stuck.wait()
    nodes.cluster.remove_node(stuck.node, allow_graceful=False)
    out, said = build.communicate(timeout=60)
    done = json.loads(out)

    assert team.output("alone") == team.output("driver")
    assert (0, 0) == (done["build"]["actions_run"], done["left"])
    assert alone.result.actions_run == sum(part["actions"] for part in done["parts"])
    assert "raylet" not in said.lower()


@pytest.mark.wide
def test_what_a_node_cannot_do_another_one_does(
    nodes: Nodes, team: Team, odd: Callable[[str], Odd]
) -> None:
    """However many parts it takes because it is done with each at once."""
    alone = team.build("alone", *VARIANTS, remote="")
    odd("failing")
    done = nodes.build(team, "driver")
    told = [notice for notice in nodes.notices if "goes to another node" in notice]

    assert team.output("alone") == team.output("driver")
    assert (0, 0) == (done.left, done.build.actions_run)
    assert alone.result.actions_run == sum(part.actions for part in done.parts)
    assert told
    assert all("here: the disk is full" in notice for notice in told)


@pytest.mark.wide
def test_what_no_node_can_do_is_done_at_home(
    nodes: Nodes, team: Team, odd: Callable[[str], Odd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pushed from there."""
    monkeypatch.setattr(Work, "_has_other", lambda self, number: False)
    alone = team.build("alone", *VARIANTS, remote="")
    odd("failing")
    done = nodes.build(team, "driver")
    other = team.build("other", *VARIANTS)

    assert team.output("alone") == team.output("driver")
    assert done.left > 0
    assert 0 < done.build.actions_run < alone.result.actions_run
    assert (0, True) == other.counts
    assert any("here: the disk is full" in notice for notice in nodes.notices)


@pytest.mark.wide
def test_a_node_without_this_package_is_refused(
    nodes: Nodes, team: Team, odd: Callable[[str], Odd]
) -> None:
    """With the line that installs it."""
    odd("bare")

    with pytest.raises(PlanError, match="lacks carnice_build") as caught:
        nodes.build(team, "driver")

    assert "pip install" in caught.value.expected


def test_what_was_built_before_is_pushed_too(team: Team) -> None:
    """Though there is nothing to do for nodes."""
    team.build("driver", *VARIANTS, remote="")
    options = team.options("driver", push=True)
    done = build_on_cluster(VARIANTS, "127.0.0.1:1", options)
    other = team.build("other", *VARIANTS)

    assert done.build.pushed_bytes > 0
    assert (0, True) == other.counts


@pytest.mark.wide
def test_ctrl_c_ends_it_as_any_build(nodes: Nodes, team: Team, odd: Callable[[str], Odd]) -> None:
    """Though a node is in the midst of a part, which ends with it."""
    stuck = odd("stuck")
    build = start(nodes, team)
    stuck.wait()
    build.send_signal(signal.SIGINT)
    out, said = build.communicate(timeout=60)

    assert (130, "") == (build.returncode, out)
    assert "carnice: interrupted; what was finished is in the cache" == said.splitlines()[-1]
    assert "Traceback" not in said
    assert stuck.ended()


@pytest.mark.wide
def test_nodes_of_other_versions_are_refused(
    nodes: Nodes, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sentence that names both."""
    ours = node.__version__
    monkeypatch.setattr(node, "__version__", "9.9")

    with pytest.raises(PlanError, match=f"carnice-build {ours}, and the machine that asks has 9.9"):
        nodes.build(team, "driver")


@pytest.mark.wide
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_nodes_makes_the_same(
    nodes: Nodes, team: Team, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """As one machine alone; nothing is left to the driver, and no node had its key.

    What the nodes pushed, the driver signed: others have it, and a second build asks no cluster.
    """
    nodes.at_least(count)
    alone = team.build("alone", *VARIANTS, remote="")
    done = nodes.build(team, "driver")
    other = team.build("other", *VARIANTS)
    monkeypatch.setattr(Nodes, "address", "127.0.0.1:1")
    again = nodes.build(team, "driver")

    assert team.output("alone") == team.output("driver")
    assert (0, 0) == (done.build.actions_run, done.left)
    assert alone.result.actions_run == sum(part.actions for part in done.parts)
    assert 1 <= done.nodes <= count
    assert ((0, True), []) == (other.counts, other.notices)
    assert ((), 0) == (again.parts, again.build.actions_run)


def test_a_node_without_a_source_says_so(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the path that it must have."""
    options = team.options("driver", push=True)
    travelled = tmp_path / "travelled"
    travelled.mkdir()
    pack_project(travelled, options, required_access(options))
    errand = node.Errand(("mlx-4bit",), 1, options, {}, tmp_path / "elsewhere", ("demo",))
    monkeypatch.chdir(travelled)

    with pytest.raises(CheckpointError, match="elsewhere/demo: is not on this node"):
        node.options_here(errand, tmp_path / "node", tmp_path / "node" / "cache")


def test_no_private_key_and_no_weights_travel(team: Team, tmp_path: Path) -> None:
    """Recipes do, those too that git ignores, and whom the driver believes."""
    other = new_key(tmp_path / "other.pem").public
    third = new_key(tmp_path / "third.pem").public
    (team.project.root / "carnice.toml").write_text(
        f"[remote]\nkey = 'keys/key.pem'\n[trust]\nkeys = ['{other} a \"b\" c', '{third}']\n"
    )
    (team.project.recipes / ".gitignore").write_text("*\n")
    options = team.options("driver", push=True)
    pack_project(tmp_path / "travelled", options, required_access(options))
    names = {path.name for path in (tmp_path / "travelled").iterdir()}
    config = read_config(tmp_path / "travelled" / "recipes", None)

    assert {"recipes", "carnice.toml"} == names
    assert not (tmp_path / "travelled" / "recipes" / ".gitignore").exists()
    assert {other: 'a "b" c', third: "", team.signer.public: "this machine"} == config.trusted
    assert "key.pem" not in (tmp_path / "travelled" / "carnice.toml").read_text()


def test_large_files_do_not_travel(team: Team, tmp_path: Path) -> None:
    """They are refused by name, also behind a link."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (team.project.recipes / "linked").symlink_to(weights)
    large = weights / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    options = team.options("driver", push=True)

    with pytest.raises(CarniceError, match=r"model\.safetensors: is too large to travel"):
        pack_project(tmp_path / "travelled", options, required_access(options))


@pytest.mark.parametrize("given", ["", "here", "127.0.0.1", "http://127.0.0.1:1", "a:b", "a:99999"])
def test_what_is_no_address_is_refused(given: str) -> None:
    """With what it must look like."""
    with pytest.raises(PlanError, match="is no address") as caught:
        check_address(given)

    assert "auto, HOST:PORT" in caught.value.expected


def test_an_address_that_does_not_answer_is_one_line() -> None:
    """Whether nobody is there, or somebody who is no cluster."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = threading.Thread(target=_answer_as_no_cluster, args=[listener])
        other.start()
        port = listener.getsockname()[1]
        with pytest.raises(PlanError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
            check_address(f"127.0.0.1:{port}")
        other.join()
    with pytest.raises(PlanError, match="no Ray cluster answers"):
        check_address("ray://127.0.0.1:1")


def _answer_as_no_cluster(listener: socket.socket) -> None:
    line, _ = listener.accept()
    with line:
        line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        line.recv(100)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--push"], "--remote URL"),
        (["--remote", "{url}"], "--push with it"),
        (["--remote", "{url}", "--push", "--part", "1/2"], "no --ray with it"),
    ],
)
def test_nodes_meet_in_a_remote(
    team: Team, carnice: Callable[..., Finished], given: list[str], wanted: str
) -> None:
    """Without one to push to, there is nothing that they could do."""
    given = [item.format(url=team.url) for item in given]
    refused = carnice("build", "mlx-4bit", "--ray", "auto", *given)

    assert (2, 1) == (refused.code, len(refused.err.splitlines()))
    assert wanted in refused.err


def test_without_ray_there_is_a_line_that_installs_it(
    team: Team, carnice: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = carnice("build", "mlx-4bit", "--ray", "auto", "--remote", team.url, "--push")

    assert (2, 1) == (refused.code, len(refused.err.splitlines()))
    assert "pip install" in refused.err


def test_builds_without_a_cluster_know_no_ray(team: Team) -> None:
    """It is not imported, whatever is installed."""
    script = "import sys; from carnice_build.cli.main import run; sys.argv[0] = 'carnice'\n"
    script += "try: run()\nfinally: print('ray' in sys.modules)"
    command = [sys.executable, "-c", script, "build", "mlx-4bit"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    built = subprocess.run(
        command, cwd=team.project.root, env=environment, capture_output=True, text=True
    )

    assert "False" == built.stdout.splitlines()[-1]
