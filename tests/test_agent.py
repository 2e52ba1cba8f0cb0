"""Tasks of an agent that a seed draws."""

from __future__ import annotations

import json

from carnice_build.verification.agent import Kind, Task, tasks


def question_of(task: Task) -> str:
    """What the user says."""
    return str(task.messages[0]["content"])


def test_tasks_are_of_every_kind_alike_and_the_same_for_a_seed() -> None:
    """Half of each kind with thinking; another seed draws other values."""
    drawn = tasks(2 * len(Kind))
    assert {(kind, thinking) for kind in Kind for thinking in (False, True)} == {
        (task.kind, task.thinking) for task in drawn
    }
    assert drawn == tasks(2 * len(Kind))
    assert not {question_of(task) for task in drawn} & {question_of(task) for task in tasks(10, 2)}


def test_what_is_right_stands_in_the_conversation() -> None:
    """Functions that are offered, with values that the user names; a tool's values to tell."""
    for task in tasks(60):
        offered = {tool["function"]["name"]: tool["function"] for tool in task.tools}
        for call in task.calls:
            assert list(call.arguments) == offered[call.name]["parameters"]["required"]
            assert all(str(value) in question_of(task) for value in call.arguments.values())
        told = json.loads(task.messages[-1]["content"]) if task.values else {}
        assert list(task.values) == [str(value) for value in told.values()]
        assert bool(task.calls) is (task.kind is not Kind.ANSWER)
        assert (len(task.calls) > 1) is (task.kind is Kind.PARALLEL)


def test_the_right_turn_is_what_the_task_asks_for() -> None:
    """Its calls are the task's, its words hold the values, and it thinks when it shall."""
    for task in tasks(60):
        written = [call["function"] for call in task.turn.get("tool_calls", ())]
        assert [(call.name, call.arguments) for call in task.calls] == [
            (call["name"], call["arguments"]) for call in written
        ]
        assert all(value in task.turn["content"] for value in task.values)
        assert task.thinking is ("reasoning_content" in task.turn)
