"""Check `fidelity`: rare names copied at temperature 0, and the typos that a model makes in them.

Counts of typos need many prompts to tell two observers apart, and a prompt takes a step for every
token.  So right answers are also read with the model (teacher forcing), which takes one pass each:
how often each token of a name is the likeliest, and the mean log-probability of such tokens,
against the first model name by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from carnice_build.errors import CheckpointError
from carnice_build.verification.copying import (
    SEED,
    Rendered,
    Verdict,
    edits,
    judge,
    render,
    tasks,
    written,
)
from carnice_build.verification.kept import NOT_KEPT, KeptSource
from carnice_build.verification.process import tell
from carnice_build.verification.result import Check, Outcome, count_error, judged
from carnice_build.verification.running import SOURCE

if TYPE_CHECKING:
    from carnice_build.calibration.text_model import ResidentModel

NAME = "fidelity"
ANSWERED = 24
READ = 160
READ_TOKENS = 1024
"""So many tokens are read at once, with those that fill up the rows of a batch."""

_MORE_TOKENS = 16
"""How far an answer may go beyond the length of the right one."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, as if names were independent; None where there is none."""

    value: float | None
    error: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "not finite"
        return f"{self.value:.4f} ± {math.nan if self.error is None else self.error:.4f}"


@dataclass(frozen=True)
class Fidelity:
    """How a model copies names.

    `exact`, `typos` and `misses` count its answers to `answered` questions at temperature 0;
    `edits` is the sum of the characters that are wrong in those with typos.
    `token_accuracy` and `log_probability` (nats) are means over the `tokens` of `read` names, given
    the right answer up to each.

    Against the first model: `same` counts the questions to which both wrote the same word, `lost`
    those that it alone copied exactly, `gained` those that this one alone did;
    `log_probability_change` is the mean difference.
    """

    answered: int
    exact: int
    typos: int
    misses: int
    edits: int
    read: int
    tokens: int
    token_accuracy: Estimate
    log_probability: Estimate
    same: int
    lost: int
    gained: int
    log_probability_change: Estimate

    @property
    def exact_error(self) -> float:
        """The standard error of `exact`, as a count."""
        return count_error(self.exact, self.answered)


@dataclass(frozen=True)
class Answer:
    """What a model wrote in the place of a name; `edits` are the characters that are wrong."""

    verdict: Verdict
    word: str | None
    edits: int


@dataclass(frozen=True)
class Reading:
    """For each token of a name, whether it is the likeliest, and its log-probability."""

    right: Sequence[bool]
    log_probabilities: Sequence[float]


@dataclass(frozen=True)
class Found:
    """What one model did with the questions, in their order."""

    answers: Sequence[Answer]
    readings: Sequence[Reading]


def measure(
    models: Mapping[str, Any],
    tokenizer: Any,
    arithmetic: Any,
    answered: int = ANSWERED,
    read: int = READ,
    seed: int = SEED,
    kept: KeptSource = NOT_KEPT,
) -> dict[str, Fidelity]:
    """The fidelity of each model, the first of which the others are compared with.

    Of `read` questions the first `answered` are answered, too.
    `models` are `ModelSource`s of one vocabulary, `arithmetic` an `Arithmetic` and `tokenizer`
    one of transformers, a fast one with a chat template; runs where torch is loaded, with one model
    in memory at a time.
    What the source did is `kept`.
    CheckpointError when the template does not take chats or calls of tools.
    """
    rendered = _rendered(tokenizer, max(answered, read), seed)
    questions = [_Question.of(task, tokenizer) for task in rendered]
    facts = {
        "fidelity": [question.facts for question in questions],
        "answered": answered,
        "read": read,
        **asdict(arithmetic),
    }

    def ask(source: Any) -> Found:
        return _found(source, questions[:answered], questions[:read], tokenizer, arithmetic)

    found = {
        name: kept.measured(name, facts, Found, partial(ask, source))
        for name, source in models.items()
    }
    reference = next(iter(found.values()))
    return {name: summarize(item, reference) for name, item in found.items()}


def summarize(found: Found, reference: Found) -> Fidelity:
    """The figures of one model, and against what `reference` did with the same questions."""
    answers = list(zip(found.answers, reference.answers, strict=True))
    verdicts = [answer.verdict for answer in found.answers]
    exact = [
        (one.verdict is Verdict.EXACT, other.verdict is Verdict.EXACT) for one, other in answers
    ]
    changes = [
        [new - old for new, old in zip(one.log_probabilities, other.log_probabilities, strict=True)]
        for one, other in zip(found.readings, reference.readings, strict=True)
    ]
    return Fidelity(
        answered=len(answers),
        exact=verdicts.count(Verdict.EXACT),
        typos=verdicts.count(Verdict.TYPO),
        misses=verdicts.count(Verdict.MISS),
        edits=sum(answer.edits for answer in found.answers if answer.verdict is Verdict.TYPO),
        read=len(changes),
        tokens=sum(map(len, changes)),
        token_accuracy=ratio([reading.right for reading in found.readings]),
        log_probability=ratio([reading.log_probabilities for reading in found.readings]),
        same=sum(one.word == other.word for one, other in answers),
        lost=exact.count((False, True)),
        gained=exact.count((True, False)),
        log_probability_change=ratio(changes),
    )


def ratio(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean over all values, whose groups are independent and their members are not.

    The error is that of a ratio of two sums over the groups, the values and their number
    (Cochran, Sampling Techniques, 3rd edition, 6.4).
    """
    if not all(math.isfinite(value) for group in groups for value in group):
        return Estimate(None, None)
    total = sum(map(len, groups))
    mean = math.fsum(map(math.fsum, groups)) / total
    squares = math.fsum((math.fsum(group) - mean * len(group)) ** 2 for group in groups)
    count = len(groups)
    return Estimate(mean, math.sqrt(squares * count / (count - 1)) / total if count > 1 else None)


def judge_fidelity(found: Mapping[str, Fidelity]) -> Check:
    """The check's result: a model may make typos, but its log-probabilities must be numbers.

    Where the source copies nothing there was nothing to lose.
    """
    problems = [
        f"{name}: a log-probability is not finite"
        for name, item in found.items()
        if item.log_probability.value is None
    ]
    summary = "; ".join(
        f"{name} copies {item.exact} of {item.answered} names, {item.typos} with typos, "
        f"{item.log_probability} nats a token"
        for name, item in found.items()
    )
    details = {name: asdict(item) for name, item in found.items()}
    source = found.get(SOURCE)
    if source is not None and not source.exact and not problems:
        why = f"{SOURCE} itself copies no name, so this says nothing of the folder"
        return Check(NAME, Outcome.SKIPPED, f"{why}; {summary}", details=details)
    return judged(NAME, problems, summary, details)


def _rendered(tokenizer: Any, count: int, seed: int) -> list[Rendered]:
    try:
        return [render(task, tokenizer.apply_chat_template) for task in tasks(count, seed)]
    except CheckpointError:
        raise
    except Exception as error:  # whatever a template raises, as jinja2's own errors
        raise CheckpointError(f"the chat template cannot be used: {error}") from None


@dataclass(frozen=True)
class _Question:
    """A task in tokens: the prompt, all of it with the right answer, and where the name is.

    `names` are the places in `whole` of the tokens that hold a part of the name; `ends` are tokens
    behind which nothing counts.
    """

    task: Rendered
    prompt: Sequence[int]
    whole: Sequence[int]
    names: range
    ends: frozenset[int]

    @property
    def facts(self) -> list[Any]:
        """All that decides what a model makes of it, JSON-ready."""
        places = [self.names.start, self.names.stop]
        return [self.task.task.name, list(self.prompt), list(self.whole), places, sorted(self.ends)]

    @classmethod
    def of(cls, task: Rendered, tokenizer: Any) -> _Question:
        first = len(task.prompt)
        encoded = tokenizer(
            task.prompt + task.answer, add_special_tokens=False, return_offsets_mapping=True
        )
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        held = [
            place
            for place, (start, stop) in enumerate(spans)
            if start < first + task.stop and stop > first + task.start
        ]
        specials = set(tokenizer.all_special_ids)
        # What ends a turn is special, or is the tokenizer's own end.
        ends = {ids[place] for place in range(held[-1] + 1, len(ids)) if ids[place] in specials}
        prompt = tokenizer(task.prompt, add_special_tokens=False)["input_ids"]
        return cls(
            task,
            prompt,
            ids[: held[-1] + 1],
            range(held[0], held[-1] + 1),
            frozenset(ends | {tokenizer.eos_token_id}),
        )


def _found(
    source: Any,
    answered: Sequence[_Question],
    read: Sequence[_Question],
    tokenizer: Any,
    arithmetic: Any,
) -> Found:
    from carnice_build.calibration.text_model import OpenModel, ResidentModel

    model = ResidentModel(OpenModel(source, arithmetic))
    return Found(
        _answers(model, answered, tokenizer),
        readings(model, read),
    )


def _answers(model: Any, questions: Sequence[_Question], tokenizer: Any) -> list[Answer]:
    import torch

    from carnice_build.calibration.decoding import Prompt

    prompts = [
        Prompt(
            torch.tensor(question.prompt),
            len(question.whole) - len(question.prompt) + _MORE_TOKENS,
            question.ends,
        )
        for question in questions
    ]
    answers = []
    for question, said in zip(questions, model.continue_all(prompts), strict=True):
        text = tokenizer.decode(said.tokens[said.prompt :], skip_special_tokens=True)
        name = question.task.task.name
        word = written(text, name)
        distance = len(name) if word is None else edits(word, name)
        answers.append(Answer(judge(text, name), word, distance))
    return answers


def readings(model: ResidentModel, questions: Sequence[_Question]) -> list[Reading]:
    """How `model` reads the right answers, those of like lengths together.

    What stands behind an answer in its row is seen by nothing before it.
    """
    by_length = sorted(range(len(questions)), key=lambda index: len(questions[index].whole))
    found: dict[int, Reading] = {}
    while by_length:
        longest = len(questions[by_length[-1]].whole)
        count = max(1, READ_TOKENS // longest)
        batch, by_length = by_length[-count:], by_length[:-count]
        read = _read_together(model, [questions[index] for index in batch])
        found |= dict(zip(batch, read, strict=True))
        tell("names read", len(found), len(questions))
    return [found[index] for index in range(len(questions))]


def _read_together(model: ResidentModel, questions: Sequence[_Question]) -> list[Reading]:
    import torch

    rows = [torch.tensor(question.whole) for question in questions]
    states = model.known(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    # Each token is chosen by the state before it.
    chosen = [
        state[question.names.start - 1 : question.names.stop - 1]
        for state, question in zip(states, questions, strict=True)
    ]
    scores = model.scores(torch.cat(chosen)[None])[0].float().log_softmax(dim=-1).cpu()
    wanted = torch.cat(
        [row[item.names.start : item.names.stop] for row, item in zip(rows, questions, strict=True)]
    )
    right = scores.argmax(dim=-1) == wanted
    found = scores.gather(1, wanted[:, None])[:, 0].double()
    lengths = [len(question.names) for question in questions]
    return [
        Reading(one.tolist(), values.tolist())
        for one, values in zip(
            torch.split(right, lengths), torch.split(found, lengths), strict=True
        )
    ]
