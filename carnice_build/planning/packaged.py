"""Where the parts of a folder come from, and what its chat template makes a model write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.errors import CheckpointError
from carnice_build.formats.variant import PackagedTemplate, Parent
from carnice_build.models.base import Part
from carnice_build.planning.planner import VariantPlan
from carnice_build.plugins import failures_blamed
from carnice_build.recipe.patterns import Patterns
from carnice_build.steps.chat_template import ChatTemplate
from carnice_build.steps.graft import Graft

_WORDS = {
    Part.MTP: "the MTP head",
    Part.TOWER: "the vision tower",
    Part.EMBED: "the embedding",
    Part.HEAD: "the output head",
}


def parents(variant: VariantPlan) -> Sequence[Parent]:
    """The sources of which something is in the folder or decided its weights, the body first."""
    taken: dict[str, list[str]] = {variant.recipe.body: ["the model"]}
    for source, words in _taken(variant):
        taken.setdefault(source, []).append(words)
    return [Parent(source, "; ".join(words)) for source, words in taken.items()]


def _taken(variant: VariantPlan) -> Iterator[tuple[str, str]]:
    for step in variant.recipe.steps:
        if isinstance(step.params, Graft):
            yield step.params.source, _grafted(step.params, variant)
    with failures_blamed(variant.format):
        yield from variant.format.takes().items()


def _grafted(graft: Graft, variant: VariantPlan) -> str:
    """The parts that the tensors belong to, else their names."""
    facts = variant.architecture.tensors
    names = Patterns(graft.match).select(list(facts))
    parts = {facts[name].part for name in names}
    if parts and parts <= _WORDS.keys():
        return " and ".join(words for part, words in _WORDS.items() if part in parts)
    return f"tensors {', '.join(map(str, Patterns(graft.match).texts))}"


def packaged_template(variant: VariantPlan) -> PackagedTemplate | None:
    """None where there is no chat template, or one that cannot be rendered."""
    where, template = next(iter(template_files(variant.files).items()), ("", None))
    if template is None:
        return None
    # A sandbox to render in takes as long to import as a small plan takes.
    from carnice_build.chat.tool_format import tool_format

    try:
        found = tool_format(template, where, special_tokens(variant.files))
    except CheckpointError:
        return None
    return PackagedTemplate(
        patched=any(isinstance(step.params, ChatTemplate) for step in variant.recipe.steps),
        tool_call_parser=found.tool_call_parser,
        reasoning_parser=found.reasoning_parser,
        flags=found.serving_flags(),
    )
