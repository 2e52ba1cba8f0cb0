"""Check `engine`: the folder in the engine that serves it, asked as its users ask.

The engine's figures are held against those of the other checks, which read the same text and
prompts: its arithmetic is BF16, so they are near and not equal.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from carnice_build.engines import llama_cpp
from carnice_build.engines.client import Client, load_openai
from carnice_build.engines.engine import Engine, check_fits, find_engine
from carnice_build.engines.interpreter import check_installed, engine_python
from carnice_build.engines.questions import Turns, ask_all, engine_tasks
from carnice_build.engines.server import Patience, free_port, serve
from carnice_build.planning.planner import VariantPlan
from carnice_build.serving.launches import Launch
from carnice_build.verification import acceptance, calls, perplexity
from carnice_build.verification.perplexity import Perplexity, cut, format_perplexity, tokens_of
from carnice_build.verification.result import Check, judged
from carnice_build.verification.running import Drafts

NAME = "engine"

Halves = Callable[[int, int], Perplexity | None]
"""Our perplexity over the second halves of so many sequences of a length; None for no such text."""

SAME_TEXT = 0.02
"""Nats that mean losses on the same tokens may differ by: BF16 and float32 sum in other orders."""
ERRORS = 4
"""Standard errors that mean lengths of drafts may be apart, those of both together."""
FEWEST = 0.5
"""Of calls asked for, the share that a parser must find: any less and it reads another form."""


@dataclass(frozen=True)
class EngineSettings:
    """An engine by its name; `port` is None for any, `beside` the folder with its environment.

    That is the folder with our own, for what lies beside recipes may be anybody's.
    """

    name: str
    port: int | None = None
    beside: Path = Path(sys.prefix).parent
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class ReadyEngine:
    """An engine that is installed, and may be started for a folder."""

    engine: Engine
    executable: Path
    settings: EngineSettings


def prepare_engine(settings: EngineSettings, variants: Sequence[VariantPlan]) -> ReadyEngine:
    """What can be said before anything runs: EngineError for what cannot work with all of them."""
    engine = find_engine(settings.name)
    for variant in variants:
        check_fits(engine, variant)
    free_port(settings.port)
    load_openai()
    return ReadyEngine(engine, _executable(engine, settings), settings)


def _executable(engine: Engine, settings: EngineSettings) -> Path:
    if not engine.module:
        return llama_cpp.server()
    python = engine_python(settings.beside)
    check_installed(python, engine.name, engine.package)
    return python


def check_engine(
    ready: ReadyEngine,
    launch: Launch | None,
    folder: Path,
    text: Path | None,
    samples: int | None,
    found: Sequence[Check],
    halves: Halves = lambda length, samples: None,
) -> Check:
    """Start the engine for the folder as its launch says, and ask; `found` has our figures.

    EngineError when it does not start or answers what is no answer.
    """
    engine, settings = ready.engine, ready.settings
    start = engine.start(folder.resolve(), launch, os.environ)
    ours = {check.name: check.details for check in found}
    both = _halves(ready, folder.resolve(), text, samples, halves)
    with serve(engine, start, ready.executable, settings.port, settings.patience) as server:
        client = Client(server, settings.patience)
        scored: list[Perplexity] = []
        drafts = None
        if engine.scores and text is not None:
            scored = list(_score(client, folder, text, samples))
        if engine.counts and text is not None and start.drafts:
            drafts = _draft(client, folder, text, samples)
        turns = ask_all(client, engine_tasks())
    problems = [
        *_perplexity_problems(scored, ours.get(perplexity.NAME, {})),
        *_half_problems(both),
        *_draft_problems(drafts, start.drafts, ours.get(acceptance.NAME, {})),
        *_turn_problems(turns, ours.get(calls.NAME, {})),
    ]
    details = {
        "engine": engine.name,
        "arguments": [str(item) for item in start.arguments if item != str(folder.resolve())],
        "perplexity": {str(item.length): asdict(item) for item in scored},
        "mtp": None if drafts is None else acceptance.drafts_json({start.drafts: drafts}),
        "answers": turns.as_json(),
    }
    if both:
        details["second_halves"] = {
            name: asdict(item) for name, item in zip(("engine", "ours"), both, strict=True)
        }
    return judged(NAME, problems, _summary(engine, scored, both, drafts, turns), details)


def _halves(
    ready: ReadyEngine, folder: Path, text: Path | None, samples: int | None, halves: Halves
) -> list[Perplexity]:
    """Perplexity over the second half of each sequence, by llama.cpp's own program and by us.

    Nothing unless both can tell.
    """
    program = None if ready.engine.module else llama_cpp.find_program(llama_cpp.PERPLEXITY)
    if program is None or text is None:
        return []
    length = min(perplexity.LENGTHS)
    own = halves(length, samples or perplexity.SAMPLES_ON_CPU)
    if own is None:
        return []
    patience = ready.settings.patience.start
    theirs = llama_cpp.measured(program, folder, text, length, own.samples, os.environ, patience)
    return [theirs, own]


def _half_problems(both: Sequence[Perplexity]) -> Iterator[str]:
    if not both:
        return
    theirs, own = both
    if theirs.mean is None or not math.isfinite(theirs.mean):
        yield f"{llama_cpp.PERPLEXITY} finds a perplexity that is not finite"
    elif own.mean and abs(math.log(theirs.mean / own.mean)) > SAME_TEXT:
        yield (
            f"{llama_cpp.PERPLEXITY} finds a perplexity of {theirs.mean:.3f} in the second halves "
            f"of {theirs.samples} sequences of {theirs.length}, where the same weights have "
            f"{own.mean:.3f} here"
        )


def _score(client: Client, folder: Path, text: Path, samples: int | None) -> Iterator[Perplexity]:
    """Perplexity at each length that the text has, over the sequences of check `perplexity`."""
    tokens = tokens_of(folder, text)
    for length in perplexity.LENGTHS:
        rows = cut(tokens, length, samples or perplexity.SAMPLES_ON_CPU)
        losses = [-score for row in rows for score in client.scores(row)]
        if losses:
            mean = math.fsum(losses) / len(losses)
            spread = math.fsum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1)
            figure = math.exp(mean) if math.isfinite(mean) else None
            error = figure and figure * math.sqrt(spread / len(losses))
            yield Perplexity(length, len(rows), figure, error)


def _draft(client: Client, folder: Path, text: Path, samples: int | None) -> Drafts | None:
    """What becomes of drafts in the continuations of check `mtp`."""
    from carnice_build.verification.torch_worker import NEW_TOKENS, PROMPTS, prompts_of

    before = client.drafts()
    for prompt in prompts_of(folder, text, samples or PROMPTS):
        client.write(prompt, NEW_TOKENS)
    after = client.drafts()
    if after is None or before is None:
        return after
    steps = after.steps - before.steps
    if not steps:
        return None
    pairs = zip(after.rates, before.rates, strict=True)
    return Drafts(steps, [(a * after.steps - b * before.steps) / steps for a, b in pairs])


def _perplexity_problems(theirs: Sequence[Perplexity], ours: Mapping[str, Any]) -> Iterator[str]:
    for item in theirs:
        own = ours.get(str(item.length), {})
        if item.mean is None:
            yield f"the loss at sequence length {item.length} is not finite"
        elif own.get("mean") and own["samples"] == item.samples:
            apart = abs(math.log(item.mean / own["mean"]))
            if apart > SAME_TEXT:
                yield (
                    f"perplexity {item.mean:.3f} at sequence length {item.length}, where the same "
                    f"weights have {own['mean']:.3f} here"
                )


def _draft_problems(theirs: Drafts | None, number: int, ours: Mapping[str, Any]) -> Iterator[str]:
    own = ours.get(acceptance.PACKAGED, {}).get(str(number))
    if number and theirs is None and own:
        yield "nothing is drafted, where the launch says to"
    if theirs is not None and own:
        apart = abs(theirs.mean_length - own["mean_length"])
        if apart > ERRORS * math.hypot(theirs.error, own["error"]):
            yield (
                f"{theirs.mean_length:.2f} tokens a step at n={number}, where the same head "
                f"gives {own['mean_length']:.2f} here"
            )


def _turn_problems(turns: Turns, ours: Mapping[str, Any]) -> Iterator[str]:
    found = turns.figures
    own = _parsed(ours)
    if found.parsed.rate < FEWEST * (own.rate if own else 1):
        text = f"calls were read in {found.parsed} turns that ask for them"
        yield f"{text}; our parser reads those of {own} here" if own else text
    if found.closed.count < FEWEST * found.closed.of:
        yield f"reasoning was found in {found.closed} turns with thinking"
    if turns.unasked:
        yield f"{turns.unasked} turns without thinking came with reasoning"
    if turns.leaked:
        yield f"{turns.leaked} answers hold tags of reasoning or of calls"
    if turns.changed:
        yield f"{turns.changed} of {turns.streamed} turns differ when they are streamed"


def _parsed(ours: Mapping[str, Any]) -> calls.Share | None:
    """What check `calls` read of the folder, which is the last of its rows.

    It may have asked more tasks than are asked here, or fewer.
    """
    if not ours:
        return None
    *_, row = ours.values()
    return calls.Share(row["parsed"]["count"], row["parsed"]["of"])


def _summary(
    engine: Engine,
    scored: Sequence[Perplexity],
    both: Sequence[Perplexity],
    drafts: Drafts | None,
    turns: Turns,
) -> str:
    parts = [f"{format_perplexity(item)} at {item.length}" for item in scored]
    parts += [f"{format_perplexity(item)} in second halves of {item.length}" for item in both[:1]]
    if drafts is not None:
        parts.append(f"{drafts.mean_length:.2f} tokens a step at n={len(drafts.rates)}")
    parts.append(str(turns.figures))
    return f"{engine.name}: " + "; ".join(parts)
