"""How names are copied: the tasks, how answers are judged, and the figures on the demo model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from demo_model import BASE, source, weights, whole_model
from hypothesis import given
from hypothesis import strategies as st

from carnice_build.calibration.driver import Arithmetic
from carnice_build.errors import CheckpointError
from carnice_build.verification.copying import Verdict, edits, judge, render, tasks, written
from carnice_build.verification.fidelity import (
    Answer,
    Estimate,
    Fidelity,
    Found,
    Reading,
    judge_fidelity,
    measure,
    ratio,
    summarize,
)
from carnice_build.verification.result import Outcome

FLOAT32 = Arithmetic("float32", "sdpa", threads=1)
ANSWERED, READ = 4, 6
WORDS = st.text("ab-_9", max_size=6)


@cache
def tokenizer() -> Any:
    """The demo's, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


@cache
def measured() -> dict[str, Fidelity]:
    """The demo, and the same with its head turned round, which says other things."""
    turned = source(**{"lm_head.weight": weights()["lm_head.weight"].flip(0)})
    return measure({"BF16": source(), "turned": turned}, tokenizer(), FLOAT32, ANSWERED, READ)


# --- tasks ---------------------------------------------------------------------------------------


def test_tasks_are_the_same_every_time() -> None:
    """A seed gives its tasks, more of them begin with the same, and another seed gives others."""
    assert tasks(9) == tasks(12)[:9]
    assert {task.name for task in tasks(40)}.isdisjoint(task.name for task in tasks(40, seed=2))


def test_tasks_ask_for_what_stands_in_the_question() -> None:
    """A third each: repeat, look up, call a tool; the name is in the question and the answer."""
    asked = tasks(30)

    assert {"an answer", "a value", "a tool call"} == {task.kind for task in asked}
    assert 10 == sum(task.kind == "a tool call" for task in asked)
    for task in asked:
        rendered = render(task, tokenizer().apply_chat_template)

        assert task.name in rendered.prompt
        assert task.name == rendered.answer[rendered.start : rendered.stop]


def test_names_are_in_no_text() -> None:
    """None of 300 names stands in the demo's texts."""
    texts = [
        (BASE.parent / name).read_text(encoding="utf-8")
        for name in ("heldout.txt", "calibration.jsonl")
    ]

    assert not [task.name for task in tasks(300) for text in texts if task.name in text]


def test_a_template_without_answers_is_refused() -> None:
    """What does not write the name behind its prompt cannot be measured."""
    with pytest.raises(CheckpointError, match="behind its own prompt"):
        render(tasks(1)[0], lambda messages, **options: "always the same")


# --- judging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "word", "verdict"),
    [
        ("amber_gate_12", "amber_gate_12", Verdict.EXACT),
        ("It is `amber_gate_12`.", "amber_gate_12", Verdict.EXACT),
        ("<parameter=x>\namber_gate_12\n</parameter>", "amber_gate_12", Verdict.EXACT),
        ("amber_gate_123", "amber_gate_123", Verdict.TYPO),
        ("amber_gote_12", "amber_gote_12", Verdict.TYPO),
        ("I cannot do that", "that", Verdict.MISS),
        ("", None, Verdict.MISS),
    ],
)
def test_an_answer_is_judged_by_its_nearest_word(
    answer: str, word: str | None, verdict: Verdict
) -> None:
    """Whole words count, whatever stands around them; far from the name is no typo."""
    assert (word, verdict) == (
        written(answer, "amber_gate_12"),
        judge(answer, "amber_gate_12"),
    )


@given(WORDS, WORDS)
def test_edits_are_levenshteins(one: str, other: str) -> None:
    """The textbook's recursion gives the same number, both ways round."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, same)

    assert distance(len(one), len(other)) == edits(one, other) == edits(other, one)


# --- figures -------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-9, 9), min_size=1, max_size=5), min_size=2, max_size=6))
def test_a_ratio_has_the_error_of_its_groups(groups: list[list[float]]) -> None:
    """The mean over all values, and with groups of one the usual standard error."""
    values = np.concatenate(groups)
    ones = [[value] for value in values]
    alone = ratio(ones)

    assert math.isclose(values.mean(), ratio(groups).value or 0.0, abs_tol=1e-12)
    assert alone.error is not None
    assert math.isclose(values.std(ddof=1) / len(values) ** 0.5, alone.error, abs_tol=1e-12)


def test_an_error_grows_with_what_members_share() -> None:
    """Ten times the same value in each group tells no more than once."""
    once, often = ratio([[0.0], [1.0], [2.0]]), ratio([[0.0] * 10, [1.0] * 10, [2.0] * 10])

    assert often.error == pytest.approx(once.error)
    assert "1.0000 ± 0.5774" == str(once)


def found(*answers: Answer) -> Found:
    """Answers, and readings that are the worse the more is wrong in them."""
    return Found(answers, [Reading([not item.edits], [-float(item.edits)]) for item in answers])


def test_a_model_is_counted_against_the_first() -> None:
    """Lost and gained copies, equal words, and the mean change of log-probabilities."""
    exact, typo = Answer(Verdict.EXACT, "amber", 0), Answer(Verdict.TYPO, "ambr", 1)
    miss = Answer(Verdict.MISS, "no", 5)
    figures = summarize(found(exact, typo, exact, typo), found(exact, exact, miss, typo))

    assert (2, 2, 0, 2) == (figures.exact, figures.typos, figures.misses, figures.edits)
    assert (2, 1, 1) == (figures.same, figures.lost, figures.gained)
    assert 0.5 == figures.token_accuracy.value
    assert 1.0 == figures.log_probability_change.value
    assert 0.0 < figures.exact_error < 1.0


def test_figures_are_those_of_the_whole_model() -> None:
    """Log-probabilities, the likeliest tokens and the greedy answers are transformers' own."""
    model: Any = whole_model("float32", "sdpa")
    scored, right, exact = [], [], 0
    for index, task in enumerate(tasks(READ)):
        rendered = render(task, tokenizer().apply_chat_template)
        encoded = tokenizer()(rendered.prompt + rendered.answer, return_offsets_mapping=True)
        ids = torch.tensor(encoded.input_ids)
        first = len(rendered.prompt) + rendered.start
        places = [
            place
            for place, (start, stop) in enumerate(encoded.offset_mapping)
            if start < first + len(task.name) and stop > first
        ]
        with torch.no_grad():
            scores = model(ids[None]).logits[0].log_softmax(-1)
        scored += [float(scores[place - 1, ids[place]]) for place in places]
        right += [bool(scores[place - 1].argmax() == ids[place]) for place in places]
        if index < ANSWERED:
            prompt = torch.tensor([tokenizer()(rendered.prompt).input_ids])
            end = tokenizer().convert_tokens_to_ids("<|im_end|>")
            said = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=places[-1] + 1 - prompt.shape[1] + 16,
                eos_token_id=end,
                pad_token_id=end,
                do_sample=False,
            )
            text = tokenizer().decode(said[0, prompt.shape[1] :], skip_special_tokens=True)
            exact += judge(text, task.name) is Verdict.EXACT
    ours = measured()["BF16"]

    assert (ANSWERED, READ) == (ours.answered, ours.read)
    assert (len(scored), exact) == (ours.tokens, ours.exact)
    assert ours.log_probability.value == pytest.approx(np.mean(scored), abs=1e-5)
    assert ours.token_accuracy.value == np.mean(right)


def test_the_first_model_is_its_own_reference() -> None:
    """It agrees with itself; one with another head does not, and says less of what is right."""
    first, other = measured().values()

    assert (ANSWERED, 0, 0, Estimate(0.0, 0.0)) == (
        first.same,
        first.lost,
        first.gained,
        first.log_probability_change,
    )
    assert other.same < ANSWERED
    assert (other.log_probability_change.value or 0) < 0


def test_a_typo_fails_no_check_but_a_number_that_is_none_does() -> None:
    """The summary states the counts; a log-probability that is not finite is a problem."""
    good = {name: replace(item, exact=max(1, item.exact)) for name, item in measured().items()}
    bad = {"x": replace(good["BF16"], log_probability=Estimate(None, None))}
    check = judge_fidelity(good)

    assert Outcome.PASSED is check.outcome
    assert f"BF16 copies {good['BF16'].exact} of {ANSWERED} names" in check.summary
    assert Outcome.FAILED is judge_fidelity(bad).outcome


def test_a_source_that_copies_nothing_lets_nothing_be_said() -> None:
    """Then no folder passes by it; the figures are told all the same."""
    check = judge_fidelity({name: replace(item, exact=0) for name, item in measured().items()})

    assert Outcome.SKIPPED is check.outcome
    assert "BF16 itself copies no name" in check.summary
    assert f"BF16 copies 0 of {ANSWERED} names" in check.summary
    assert check.details


@pytest.mark.parametrize("values", [[math.nan, 0.0], [-math.inf, 0.0], [-math.inf, math.inf]])
def test_no_figure_is_made_of_what_is_not_finite(values: list[float]) -> None:
    """There is neither a mean nor an error."""
    assert Estimate(None, None) == ratio([[value] for value in values])
    assert "not finite" == str(ratio([values]))


def test_one_name_has_no_error() -> None:
    """What is spread over nothing is not known."""
    assert Estimate(1.0, None) == ratio([[0.0, 2.0]])
