"""What `carnice new` finds of a model, and the draft of its recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.chat.tool_format import ToolFormat, tool_format
from carnice_build.checkpoint.assets import Assets, Reads, absent
from carnice_build.checkpoint.checkpoint import Checkpoint, source_view
from carnice_build.checkpoint.profiles import Source
from carnice_build.checkpoint.quantized import plain_config, stated_quantization
from carnice_build.checkpoint.readme import Readme, read_readme
from carnice_build.commands import dataset as datasets
from carnice_build.commands.draft import Draft, Section
from carnice_build.commands.new_asked import MAIN, open_on_hub
from carnice_build.errors import CarniceError, CheckpointError, PlanError
from carnice_build.formats.base import Format
from carnice_build.graph import ActionGraph, View
from carnice_build.models import UnknownFamily, architecture_of
from carnice_build.models.base import Architecture, Part
from carnice_build.planning.planner import untabled
from carnice_build.planning.repair import (
    Repair,
    globs,
    leftovers,
    outside,
    owners,
    renames,
    without,
)
from carnice_build.recipe.schema import SourceSpec
from carnice_build.steps.base import PlanContext
from carnice_build.steps.registry import STEPS
from carnice_build.units import plural

_BODY, _BASE = "body", "base"
_MOST_BASES = 4
"""Of the models that a card names as its base, those that are looked at for an MTP head."""


def draft_of(
    name: str,
    preset: str,
    knobs: Mapping[str, Any],
    number_format: Format,
    spec: dict[str, str],
    checkpoint: Checkpoint,
    text: Mapping[str, Any],
) -> tuple[Draft, list[str], Architecture]:
    """The recipe, sentences about what was found, and what the model is."""
    readme = read_readme(checkpoint)
    view = source_view(checkpoint)
    architecture = _architecture(checkpoint, view)
    found = [_size(checkpoint, architecture, view)]
    sources: dict[str, Any] = {_BODY: spec}
    why: dict[str, str] = {}
    found += architecture.unchecked
    steps, view = _repairs(checkpoint, architecture, view, number_format)
    architecture = _architecture(checkpoint, view)
    head = _head(architecture, view, readme, number_format)
    if head.source is not None:
        sources[_BASE] = head.source
        why[_BASE] = "what the model was made from, which still has the MTP head"
        steps += head.steps
    others = list(_ignored(architecture, view, knobs))
    found += [step.why for step in steps if step.why]
    found += _vision(architecture, view)
    found += head.said
    template, sentence, unreadable = _tools(checkpoint)
    found += sentence
    if unreadable and "package" in knobs:
        others.append(Section("package", {"serve": []}, {"serve": unreadable}))
    if "calibration" in knobs and not template and not text:
        raise PlanError(
            "has no chat template",
            where=checkpoint.where,
            expected=f"one, by which the dialogues that {preset} calibrates on become text, or "
            f"{datasets.OPTION} FILE.txt",
        )
    if text:
        others.append(Section("calibration", text, {}))
    others.append(_card(spec, readme))
    label = spec["model"] if "folder" not in spec else spec["folder"]
    told = {step.why for step in steps}
    title = f"{label} as {preset}"
    about = [sentence for sentence in found if sentence not in told]
    if "folder" not in spec:
        why[_BODY] = f"the commit that `{MAIN}` was at"
    draft = Draft(title, name, preset, about, Section("sources", sources, why), steps, others)
    return draft, found, architecture


def _architecture(checkpoint: Checkpoint, view: View) -> Architecture:
    """The table of the model's family, or what names and shapes say of one without."""
    try:
        return architecture_of(plain_config(checkpoint.config), checkpoint.where)
    except UnknownFamily:
        return untabled(checkpoint, view)


def _size(checkpoint: Checkpoint, architecture: Architecture, view: View) -> str:
    start = f"{architecture.name}: {plural(architecture.num_layers, 'layer')}"
    dtypes = ", ".join(sorted({ref.spec.dtype for ref in view.values()}))
    if stated_quantization(checkpoint.config) is not None:
        return f"{start}, quantized, in {dtypes}"
    count = sum(ref.spec.size for ref in view.values())
    shown = f"{count / 1e9:.1f} billion" if count >= 10**8 else f"{count:,}"
    return f"{start}, {shown} parameters in {dtypes}"


def _repairs(
    checkpoint: Checkpoint, architecture: Architecture, view: View, number_format: Format
) -> tuple[list[Repair], View]:
    """The steps that the model's own tensors need, and the view after them."""
    source = Source(_BODY, SourceSpec.model_validate({"model": "local/body"}), None, checkpoint)
    context = PlanContext(architecture, ActionGraph(), None, {}, {_BODY: source})
    steps: list[Repair] = []

    def add(repairs: Sequence[Repair]) -> None:
        nonlocal view
        for repair in repairs:
            step = STEPS[repair.kind].model_validate(repair.params)
            view = step.apply(view, context)
            steps.append(repair)

    stated = stated_quantization(checkpoint.config)
    if stated is not None:
        why = "the source is quantized already: its weights are read as the floats they stand for"
        add([Repair("decode", {}, why)])
        if number_format.keeps(str(stated.get("quant_method"))):
            # The plan says that they stay.
            steps.clear()
    add(renames(view, architecture))
    add(list(leftovers(view, architecture)))
    add(without(Part.TOWER, view, architecture, _no_vision(checkpoint, number_format)))
    return steps, view


def _no_vision(checkpoint: Checkpoint, number_format: Format) -> str:
    """Why a vision tower is left out, empty when it stays."""
    if why := number_format.leaves_out().get(Part.TOWER):
        return why
    lacking = absent(checkpoint.assets, (Reads.PROCESSOR,), vision=True)
    return f"{lacking[0]}, so it is left out" if lacking else ""


def _vision(architecture: Architecture, view: View) -> list[str]:
    """What may be done about a vision tower that is there."""
    return [
        f"the vision tower stays; the step `- drop: {{match: {_shown(step.params['match'])}}}` "
        "makes a model for text alone"
        for step in without(Part.TOWER, view, architecture, "not wanted")
    ]


def _shown(match: str | list[str]) -> str:
    return f"'{match}'" if isinstance(match, str) else str(match)


@dataclass(frozen=True)
class _Head:
    """What becomes of the MTP head: sentences, and where it is grafted from."""

    said: Sequence[str] = ()
    source: Mapping[str, str] | None = None
    steps: Sequence[Repair] = ()


def _head(architecture: Architecture, view: View, readme: Readme, number_format: Format) -> _Head:
    known = owners(architecture, view)
    names = [name for name, fact in known.items() if fact.part is Part.MTP]
    there = [name for name in names if name in view]
    if why := number_format.leaves_out().get(Part.MTP):
        return _Head([why] if there else [])
    if there or not names:
        return _Head(["the MTP head stays"] if there else [])
    tried = []
    for model in readme.base_models[:_MOST_BASES]:
        try:
            checkpoint, commit = open_on_hub(model)
            base = architecture_of(checkpoint.config, checkpoint.where)
        except CarniceError as error:
            tried.append(f"{model} cannot be looked at ({error.sentence(model)})")
            continue
        if stated_quantization(checkpoint.config) is not None:
            tried.append(f"{model} is quantized")
        elif any(name not in checkpoint.tensors for name in names):
            tried.append(f"{model} has none either")
        elif base.dimensions != architecture.dimensions:
            tried.append(f"that of {model} is of another size")
        else:
            match: Any = globs(names, checkpoint.tensors)
            params = {"from": _BASE, "match": match if len(match) > 1 else match[0]}
            why = f"config.json announces an MTP head, which the files lack: that of {model}"
            graft = Repair("graft", {**params, "expect": len(names)}, why)
            return _Head((), {"model": model, "revision": commit}, [graft])
    why = "; ".join(tried) or "README.md names no model that it was made from"
    return _Head([f"there will be no MTP head, which config.json announces: {why}"])


def _ignored(architecture: Architecture, view: View, knobs: Mapping[str, Any]) -> Iterator[Section]:
    """What a format that quantizes all linears must leave alone besides what the preset names."""
    found = outside(architecture, view, knobs["quantize"].get("ignore", "*"))
    if found:
        yield Section("quantize", {"ignore+": found}, {"ignore+": "outside of the decoder layers"})


def _tools(checkpoint: Checkpoint) -> tuple[bool, list[str], str]:
    """Whether there is a chat template, what it makes the model write, and why it cannot be used.

    The last is empty where it can.
    """
    files = Assets(checkpoint, (Reads.TOKENIZER,))
    try:
        templates = template_files(files)
        if not templates:
            return False, ["there is no chat template"], ""
        where, template = next(iter(templates.items()))
        return True, [_spoken(tool_format(template, where, special_tokens(files)))], ""
    except CheckpointError as error:
        return True, [], f"no launches, for they follow from the chat template: {error.sentence()}"


def _spoken(found: ToolFormat) -> str:
    calls = (
        f"tool calls are written as vLLM's parser {found.tool_call_parser} reads them"
        if found.tool_call_parser
        else "the chat template writes no tool calls in a form that is known here"
    )
    return f"{calls}, thoughts between <think> tags" if found.reasoning else calls


def _card(spec: Mapping[str, str], readme: Readme) -> Section:
    entries: dict[str, Any] = {"license": readme.license or "unknown"}
    why = {"license": "" if readme.license else "the source does not say"}
    if readme.languages:
        entries["language"] = list(readme.languages)
    if spec["model"].startswith("local/") and readme.base_models:
        entries["base_model"] = readme.base_models[0]
        why["base_model"] = "what the folder's own README.md says it was made from"
    return Section("card", entries, why)
