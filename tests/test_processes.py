"""How the processes begin in which libraries work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from carnice_build.dtypes import TensorSpec
from carnice_build.execute import processes
from carnice_build.execute.processes import LocalRunner, _connect
from carnice_build.graph import ActionGraph, ActionOutput, ProcessOp
from carnice_build.tensor_file import TensorFile

pytestmark = pytest.mark.usefixtures("cold")

SPEC = TensorSpec("U8", (1,))
NOTE = "CARNICE_TEST_NOTE"


def held() -> str:
    """Whether Ctrl-C is held back from this thread."""
    return str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def noting(*arguments: Any) -> None:
    """Begin as a worker does, and note what was held back until then."""
    Path(os.environ[NOTE]).write_text(held())
    _connect(*arguments)


class Tell(ProcessOp):
    """Adds to the note."""

    name = "test.tell"
    version = 1
    libraries = ()

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        return (SPEC,)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        return 1

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        with Path(os.environ[NOTE]).open("a") as note:
            note.write(f" {held()}")


def test_an_interrupt_waits_until_a_worker_can_go_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is still importing would print where it was."""
    note, output = tmp_path / "note", tmp_path / "out"
    output.write_bytes(bytes(1))
    monkeypatch.setenv(NOTE, str(note))
    monkeypatch.setattr(processes, "_connect", noting)
    (ref,) = ActionGraph().add(Tell(), {})
    assert isinstance(ref.origin, ActionOutput)
    with LocalRunner(1, lambda _: None) as runner:
        runner.run(ref.origin.action, [], [TensorFile(SPEC, str(output))])

    assert "True False" == note.read_text()
    assert "False" == held()
