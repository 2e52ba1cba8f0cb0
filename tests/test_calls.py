"""How answers of models that are asked to call functions are read and judged."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from conftest import REPOSITORY

from carnice_build.chat.hermes import to_hermes
from carnice_build.chat.tool_format import Syntax, ToolFormat
from carnice_build.verification.agent import Kind, Task, tasks
from carnice_build.verification.calls import (
    Row,
    Share,
    Template,
    asked,
    judge_calls,
    read,
    summarize,
)
from carnice_build.verification.result import Outcome, count_error

XML = ToolFormat(Syntax.QWEN3_XML, reasoning=True)
HERMES = ToolFormat(Syntax.HERMES, reasoning=True)
DRAWN = tasks(40)
OPEN = "<|im_start|>assistant\n<think>\n"


def written(task: Task, syntax: Syntax) -> str:
    """The right turn in a syntax, as a model writes it behind its prompt."""
    thought = task.turn.get("reasoning_content", "")
    calls = []
    for call in task.calls:
        if syntax is Syntax.HERMES:
            body = json.dumps({"name": call.name, "arguments": call.arguments})
        else:
            given = "".join(
                f"<parameter={key}>\n{value}\n</parameter>\n"
                for key, value in call.arguments.items()
            )
            body = f"<function={call.name}>\n{given}</function>"
        calls.append(f"<tool_call>\n{body}\n</tool_call>")
    text = "\n".join([str(task.turn["content"]), *calls]).strip()
    return f"{thought}\n</think>\n\n{text}" if task.thinking else text


def row(name: str, texts: Sequence[str], template: ToolFormat = HERMES) -> Row:
    """A model that wrote these texts, read as a server does."""
    pairs = zip(DRAWN, texts, strict=True)
    return Row(
        name, [read(task, OPEN if task.thinking else "", text, template) for task, text in pairs]
    )


def right(syntax: Syntax = Syntax.HERMES) -> list[str]:
    """All right turns."""
    return [written(task, syntax) for task in DRAWN]


def silent(texts: Sequence[str], keep: int) -> list[str]:
    """The turns with words in the place of all calls but the first `keep`."""
    kept = iter(range(len(texts)))
    return [
        text if not task.calls or next(kept) < keep else "</think>I cannot."
        for task, text in zip(DRAWN, texts, strict=True)
    ]


@pytest.mark.parametrize("template", [XML, HERMES])
def test_right_answers_are_right_in_every_figure(template: ToolFormat) -> None:
    """In either form, with and without a thought before it."""
    found = summarize(row("model", right(template.syntax), template).answers)
    calling = Share(32, 32)
    assert (calling,) * 4 == (found.parsed, found.named, found.keyed, found.exact)
    assert (Share(8, 8), Share(20, 20), Share(16, 16)) == (
        found.parallel,
        found.closed,
        found.continued,
    )
    assert not found.foreign


def test_each_figure_asks_for_more_than_the_one_before() -> None:
    """A call may be readable, of the right function, with the right keys, or exact."""
    task = next(task for task in DRAWN if task.kind is Kind.SINGLE and not task.thinking)
    (call,) = task.calls
    key = next(iter(call.arguments))

    def figures(name: str, arguments: dict[str, object]) -> tuple[bool, ...]:
        body = json.dumps({"name": name, "arguments": arguments})
        answer = read(task, "", f"<tool_call>{body}</tool_call>", HERMES)
        return bool(answer.calls), answer.named, answer.keyed, answer.right

    whole = dict(call.arguments)
    assert (True, True, True, True) == figures(call.name, whole)
    assert (True, True, True, False) == figures(call.name, {**whole, key: "other"})
    assert (True, True, False, False) == figures(call.name, {**whole, "more": 1})
    assert (True, False, False, False) == figures("other", whole)


def test_the_order_of_parallel_calls_does_not_count() -> None:
    """But each must be there, and none twice."""
    task = next(task for task in DRAWN if task.kind is Kind.PARALLEL and not task.thinking)
    calls = written(task, Syntax.HERMES).split("\n<tool_call>")
    first, *others = [calls[0], *(f"<tool_call>{call}" for call in calls[1:])]
    assert read(task, "", "\n".join([*others, first]), HERMES).right
    assert not read(task, "", first, HERMES).named
    assert not read(task, "", "\n".join([first, *others, first]), HERMES).named


def test_words_must_hold_what_the_tool_gave_and_no_call() -> None:
    """Each value as a word of its own."""
    task = next(task for task in DRAWN if task.kind is Kind.ANSWER and not task.thinking)
    text = written(task, Syntax.HERMES)
    assert read(task, "", text, HERMES).right
    assert not read(task, "", text.replace(task.values[0], f"x{task.values[0]}"), HERMES).right
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert not read(task, "", f"{text}{call}", HERMES).right


def test_a_thought_must_be_closed_once() -> None:
    """A turn that is cut off while thinking, and marks in the answer, are told."""
    task = next(task for task in DRAWN if task.thinking)
    assert read(task, OPEN, "Hm.\n</think>\n\nYes.", HERMES).closed
    assert not read(task, OPEN, "Hm.", HERMES).closed
    assert not read(task, OPEN, "Hm.</think>Yes.</think>", HERMES).closed


def test_a_form_that_the_parser_does_not_read_is_a_finding() -> None:
    """The form, how often it was written, and the parser stand in the problem."""
    texts = right()
    texts[:30] = right(Syntax.QWEN3_XML)[:30]
    check = judge_calls(row("int4", texts), "hermes")
    assert Outcome.FAILED is check.outcome
    assert [
        "int4 writes tool calls as qwen3_xml in 24 of 32 answers, which parser hermes does not read"
    ] == list(check.problems)


def test_a_template_without_a_form_has_no_parser() -> None:
    """What the model writes is read by none."""
    nothing = ToolFormat(Syntax.NONE, reasoning=True)
    (problem,) = judge_calls(row("int4", right(), nothing), None).problems
    assert problem.endswith("hermes in 32 of 32 answers, which no parser of its launches reads")


def test_a_slip_is_no_finding() -> None:
    """Up to 8 of 32: with one in ten, as many come about oftener than once in a hundred times."""
    texts = right()
    calling = [index for index, task in enumerate(DRAWN) if task.calls]
    for index in calling[:7]:
        texts[index] = written(DRAWN[index], Syntax.QWEN3_XML)
    assert Outcome.PASSED is judge_calls(row("int4", texts), "hermes").outcome
    for index in calling[:9]:
        texts[index] = written(DRAWN[index], Syntax.QWEN3_XML)
    assert Outcome.FAILED is judge_calls(row("int4", texts), "hermes").outcome


def test_a_template_that_makes_a_model_silent_is_a_finding() -> None:
    """The source calls through its own template and not through the packaged one."""
    check = judge_calls(
        row("int4", silent(right(), 1)),
        "hermes",
        row("BF16", silent(right(), 2)),
        row("BF16, own template", right(Syntax.QWEN3_XML), XML),
    )
    assert [
        "int4 makes readable calls in 1 of 32 answers, BF16, own template in 32 of 32; "
        "what lost them is the packaged template"
    ] == list(check.problems)


def test_weights_that_make_a_model_silent_are_told_from_a_template() -> None:
    """The source calls through both."""
    own = row("BF16, own template", right(Syntax.QWEN3_XML), XML)
    (problem,) = judge_calls(
        row("int4", silent(right(), 1)), "hermes", row("BF16", right()), own
    ).problems
    assert problem.endswith("what lost them is its weights")


def test_where_the_source_makes_no_calls_nothing_can_be_lost() -> None:
    """The check passes and says so; with a few calls, chance could have taken them."""
    check = judge_calls(row("int4", silent(right(), 0)), "hermes", row("BF16", silent(right(), 5)))
    assert Outcome.PASSED is check.outcome
    assert check.summary.startswith("BF16 itself makes next to no calls, so none can be lost; ")


def test_worse_than_the_source_is_no_finding_while_half_is_left() -> None:
    """A quantized model may do worse, which the figures tell."""
    check = judge_calls(row("int4", silent(right(), 16)), "hermes", row("BF16", right()))
    assert Outcome.PASSED is check.outcome
    assert {"count": 16, "of": 32, "error": count_error(16, 32)} == check.details["int4"]["parsed"]
    assert 2.5 < count_error(16, 32) < 8**0.5
    assert count_error(0, 16) == count_error(16, 16) > 0


def test_tasks_are_rendered_with_their_right_turns() -> None:
    """Through both forms of the demo's template; what is right is right when it is read."""
    path = REPOSITORY / "demo" / "carnice-v2-27b" / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    for source in (text, to_hermes(text)):
        template = Template.of({"chat_template.jinja": source.encode()})
        assert template is not None
        for task, item in zip(DRAWN, asked(DRAWN, template), strict=True):
            answer = item.right.split("<|im_end|>")[0]
            assert read(task, item.prompt, answer, template.format).right
