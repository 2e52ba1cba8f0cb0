"""Asks a folder's model, and the source where it is here, to call functions; see `calls`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carnice_build.chat.files import template_files
from carnice_build.checkpoint.assets import Assets
from carnice_build.errors import CheckpointError
from carnice_build.planning.planner import VariantPlan
from carnice_build.verification import torch_worker
from carnice_build.verification.agent import Task, tasks
from carnice_build.verification.calls import (
    NAME,
    TASKS,
    Answer,
    Asked,
    Row,
    Template,
    asked,
    judge_calls,
    read,
)
from carnice_build.verification.chat import chat_files
from carnice_build.verification.kept import KeptSource, versions
from carnice_build.verification.perplexity import SAMPLES_ON_CPU
from carnice_build.verification.process import Worker
from carnice_build.verification.result import Check, judged, skipped
from carnice_build.verification.running import SOURCE, RunSettings

OWN = f"{SOURCE}, own template"
"""The row of the source through the template that it was published with."""


def check_calls(
    variant: VariantPlan,
    folder: Path,
    name: str,
    model: Any,
    source: Any | None,
    settings: RunSettings,
    worker: Worker,
) -> Check:
    """Ask `model`, called `name` in the table; `source` is None where it is not on this machine.

    Both have a method `source` that gives a `ModelSource` in the worker's process.
    What a source answers is kept for variants to come.
    """
    try:
        packaged = Template.of(chat_files(folder))
        if packaged is None:
            return skipped(NAME, "there is no chat template that knows tools")
        count = max(10, round(TASKS * (settings.samples or SAMPLES_ON_CPU) / SAMPLES_ON_CPU))
        drawn = tasks(count)
        prompts = asked(drawn, packaged)
    except CheckpointError as error:
        return judged(NAME, [str(error)], "the chat template cannot be used")
    own = None if source is None else _own(variant, packaged)
    wanted = [(name, model, packaged, prompts)]
    if source is not None:
        wanted.append((SOURCE, source, packaged, prompts))
        if own is not None:
            wanted.append((OWN, source, own, asked(drawn, own)))
    kept = kept_source(settings)
    rows = {}
    for row, asking, template, texts in wanted:
        called = SOURCE if asking is source else row
        said = worker.call(
            torch_worker.answer, called, asking, texts, folder, settings.threads, kept
        )
        rows[row] = Row(row, _read(drawn, texts, said.texts, template))
    parser = packaged.format.tool_call_parser
    return judge_calls(rows[name], parser, rows.get(SOURCE), rows.get(OWN))


def kept_source(settings: RunSettings) -> KeptSource:
    """What is kept of a source that torch runs."""
    return settings.memory.of_source(SOURCE, **versions(*torch_worker.LIBRARIES))


def own_template(variant: VariantPlan) -> list[str]:
    """The texts of the source's own template, which decide what check `calls` finds."""
    try:
        return list(template_files(_source_files(variant)).values())
    except CheckpointError:
        return []


def _own(variant: VariantPlan, packaged: Template) -> Template | None:
    """The template of the source, if it is another one and can be used."""
    try:
        own = Template.of(_source_files(variant))
    except CheckpointError:
        return None
    return None if own is None or own.text == packaged.text else own


def _source_files(variant: VariantPlan) -> Assets:
    return Assets(variant.body, variant.format.engine_reads())


def _read(
    drawn: Sequence[Task], prompts: Sequence[Asked], texts: Sequence[str], template: Template
) -> list[Answer]:
    return [
        read(task, prompt.prompt, text, template.format)
        for task, prompt, text in zip(drawn, prompts, texts, strict=True)
    ]
