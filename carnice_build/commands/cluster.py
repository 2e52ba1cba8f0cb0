"""Building on a Ray cluster: parts are tasks of Ray, which places, retries and scales them.

This machine, the driver, plans and divides the work, signs what the nodes say they pushed, and at
the end makes the folders, by a usual build that fetches what is there and makes what is not.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from carnice_build.commands.build import BuildResult, build_variants, check_sources
from carnice_build.commands.options import Options
from carnice_build.commands.parts import PartResult
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.remote import required_access
from carnice_build.commands.rows import check_rows
from carnice_build.errors import PlanError, RecipeError, StoreError, printable
from carnice_build.execute.events import Listener
from carnice_build.extras import pip_install
from carnice_build.planning.status import survey
from carnice_build.store.store import Store

AUTO = "auto"

_ANSWER_SECONDS = 10.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4
"""How HTTP/2, which Ray speaks, is begun, and the kind of the frame that it answers with."""


@dataclass(frozen=True)
class ClusterResult:
    """What the build at the end did, and before it the nodes: so many, and what came of parts.

    `left` counts the parts that no node could do; `seconds` is wall clock until nodes were done.
    """

    build: BuildResult
    nodes: int
    parts: tuple[PartResult, ...]
    left: int
    seconds: float


def build_on_cluster(
    names: Sequence[str], address: str, options: Options, listen: Listener = lambda event: None
) -> ClusterResult:
    """Build the named variants on the cluster at `address`, `auto` for the one of this machine.

    Raises StoreError without a remote or without Ray, PlanError for an address where no cluster
    is and for nodes that have other versions, and whatever a build raises.
    """
    start = time.perf_counter()
    access = required_access(options)
    if not access.pushes:
        raise RecipeError("nodes meet in the remote", where="--ray", expected="--push with it")
    access.check_push()
    _require_ray()
    from carnice_build.commands.cluster_work import Work
    from carnice_build.commands.travelling import pack_project

    plan = plan_variants(names, options)
    check_rows(plan.variants)
    check_sources(plan.variants, options, lambda event: None)
    view = access.look()
    with Store(options.cache) as store:
        status = survey(plan.variants, store, view.index)
    work = Work(plan, status, access, options, listen)
    if work.left:
        with TemporaryDirectory() as folder:
            pack_project(Path(folder), options, access)
            with _connected(address, folder):
                work.run(names)
    seconds = time.perf_counter() - start
    # All that nodes pushed is there already: this machine pushes only where it has more.
    access = replace(access, pushes=not work.whole)
    built = build_variants(names, options, listen, access)
    done = [answer.result for answer in work.answers if answer.result is not None]
    nodes = len({answer.node for answer in work.answers})
    return ClusterResult(built, nodes, tuple(done), work.failed, seconds)


def _require_ray() -> None:
    # What happens to its processes, Ray says on the driver's standard output.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray  # noqa: F401
    except ImportError:
        raise StoreError(
            "ray is not installed", where="--ray", expected=pip_install("ray")
        ) from None


@contextmanager
def _connected(address: str, project: str) -> Iterator[None]:
    """Ray, with what is in the folder `project` as the place where its tasks work.

    PlanError when no cluster answers at `address`.
    """
    import ray

    check_address(os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address)
    ours = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            runtime_env={"working_dir": project},
            log_to_driver=False,
            logging_level="CRITICAL",
        )
    except Exception as error:
        if address == AUTO and isinstance(error, ConnectionError):
            raise PlanError(
                "no Ray cluster runs on this machine",
                where="--ray",
                expected="`ray start`, or an address",
            ) from None
        said = printable(str(error).strip().partition("\n")[0])
        raise PlanError(
            f"Ray did not connect: {said}", where="--ray", expected="a cluster that runs"
        ) from None
    finally:
        # Ray's own would end a build with another code than ours.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """PlanError unless something at `address` speaks as a cluster does.

    Ray itself asks for two minutes, and ends the process when it does not like the answers.
    """
    if address == AUTO:
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.scheme not in ("", "ray"):
        raise PlanError(
            f"{address!r} is no address of a Ray cluster",
            where="--ray",
            expected="auto, HOST:PORT or ray://HOST:PORT",
        )
    if not _speaks(host, port):
        raise PlanError(
            f"no Ray cluster answers at {address}", where="--ray", expected="one that runs"
        )


def _speaks(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _ANSWER_SECONDS) as line:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return True
            line.settimeout(_ANSWER_SECONDS)
            line.sendall(_PREFACE)
            head = line.recv(9, socket.MSG_WAITALL)
            return len(head) == 9 and head[3] == _SETTINGS
    except (OSError, UnicodeError):
        return False
