"""From a recipe to a variant plan: every step run on headers, every output known."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from carnice_build.calibration.source import CalibrationSource
from carnice_build.checkpoint.assets import Assets, absent, damaged, taken_over
from carnice_build.checkpoint.checkpoint import Checkpoint, read_samples, source_view
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.checkpoint.generation import with_generation
from carnice_build.checkpoint.profiles import Source, SourceFinder
from carnice_build.checkpoint.quantized import METHODS, plain_config, stated_quantization
from carnice_build.errors import CheckpointError, PlanError, together
from carnice_build.formats.base import Companion, Conversion, Format
from carnice_build.formats.layout import PackLayout, Publication
from carnice_build.graph import Action, ActionGraph, ActionOutput, TensorRef, View
from carnice_build.models import UnknownFamily, architecture_of, replaced
from carnice_build.models.base import Architecture, Part
from carnice_build.models.untabled import Untabled
from carnice_build.planning.coded import coded, kept_as_they_are
from carnice_build.planning.gather import gathered
from carnice_build.planning.layout import SHARD_BYTES, pack_layouts
from carnice_build.plugins import failures_blamed, returned
from carnice_build.recipe.loader import Recipe
from carnice_build.recipe.schema import CalibrationSpec
from carnice_build.steps.base import Ask, Codes, PlanContext, Step, unanswered
from carnice_build.tensors import SourceTensor

if TYPE_CHECKING:
    from carnice_build.serving.facts import ServingFacts


@dataclass(frozen=True)
class VariantPlan:
    """One variant, worked out: where it comes from, what its tensors are, how they are packed.

    `view` holds the tensors that the format was given, as the steps and it prepared them;
    `files` holds the small files that are taken from the body, as the steps left them;
    `serving` what its launches follow from, when it has any; `dataset` what it is calibrated on;
    `notices` what a person may want to know before a build.
    `companions` are variants that are built along with this one, from the same view.
    """

    recipe: Recipe
    sources: Mapping[str, Source]
    architecture: Architecture
    view: View
    conversion: Conversion
    packs: tuple[PackLayout, ...]
    files: Mapping[str, bytes]
    serving: ServingFacts | None
    dataset: Dataset | None
    notices: tuple[str, ...]
    companions: tuple[VariantPlan, ...] = ()

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.recipe.variant

    @property
    def body(self) -> Checkpoint:
        """The checkpoint that the variant is made from."""
        return self.sources[self.recipe.body].checkpoint

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The published config.json, but for its quantization."""
        parts = {tensor.fact.part for tensor in self.conversion.tensors}
        return self.architecture.published_config(parts)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(tensor.ref.spec.nbytes for tensor in self.conversion.tensors)

    @property
    def refs(self) -> Mapping[str, TensorRef]:
        """Every tensor that an action is given or a pack holds, by its identity."""
        given = (ref for action in self.actions.values() for ref in action.inputs)
        packed = (slot.tensor.ref for pack in self.packs for slot in pack.slots)
        return {ref.identity: ref for refs in (given, packed) for ref in refs}

    @cached_property
    def actions(self) -> Mapping[str, Action]:
        """The actions by what they make: a tensor of the variant, or a step towards one."""
        found: dict[str, Action] = {}
        seen: set[str] = set()
        # Nearest first: through a chain of layers, a label would grow with every step.
        waiting = deque((tensor.ref, tensor.name) for tensor in self.conversion.tensors)
        while waiting:
            ref, label = waiting.popleft()
            if isinstance(ref.origin, ActionOutput) and ref.origin.action.identity not in seen:
                action = ref.origin.action
                seen.add(action.identity)
                found[label] = action
                for index, operand in enumerate(action.inputs):
                    waiting.append((operand, f"{label} < {index}"))
        return found

    @cached_property
    def damaged_files(self) -> Sequence[tuple[str, str]]:
        """Copied files that are not what they are called, and what is wrong; reads them all."""
        return tuple(damaged(self.files))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(pack.size for pack in self.packs)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over the elements of the source tensors they stand for."""
        return 8 * self.tensor_bytes / self.conversion.parameters

    @property
    def format(self) -> Format:
        """The recipe's number format."""
        assert isinstance(self.recipe.quantize, Format)
        return self.recipe.quantize


def plan_variant(
    recipe: Recipe, finder: SourceFinder, graph: ActionGraph, ask: Ask = unanswered
) -> VariantPlan:
    """Run the recipe on headers; raises a CarniceError that says where the recipe is wrong.

    New actions go into `graph`, where other variants' equal actions may already be.
    `ask` answers what a format wants to know of a library.
    """
    sources = {name: _find(finder, recipe, name) for name in recipe.sources}
    body = sources[recipe.body]
    assert isinstance(recipe.quantize, Format)
    decodes = any(isinstance(step.params, Step) and step.params.decodes for step in recipe.steps)
    keeps = not decodes and _keeps_codes(body.checkpoint, recipe.quantize)
    view = source_view(body.checkpoint)
    architecture = _architecture(body.checkpoint, view, recipe.quantize)
    if keeps and not architecture.tabled:
        raise _quantized_already(body.checkpoint)
    context = PlanContext(
        architecture,
        graph,
        body.profile,
        recipe.layers,
        sources,
        ask=ask,
        find=finder.find_file,
    )
    with failures_blamed(recipe.quantize):
        assets = Assets(body.checkpoint, recipe.quantize.engine_reads())
    assets.check_places()
    files: Mapping[str, bytes] = assets
    for step in recipe.steps:
        with _located(recipe, "steps", step.index, step.kind), failures_blamed(step.params):
            assert isinstance(step.params, Step)
            view = returned(step.params.apply(view, context), dict, "apply")
            files = returned(step.params.edit(files, context), Mapping, "edit")
    view, notices = _without_copies(view, architecture, body.checkpoint.where)
    if own := replaced(str(body.checkpoint.config.get("model_type"))):
        notices = (*notices, f"{own.parent.name}/{own.name} counts, not the table that ships")
    # Steps may have changed names, which are all that is known of some models.
    architecture = architecture.of(_shapes(view))
    notices = (*notices, *architecture.unchecked)
    codes: Mapping[str, Codes] = {}
    if keeps:
        view, codes = coded(view, context)
        notices = (*notices, *kept_as_they_are(codes))
    view = gathered(view, architecture, body.checkpoint.where)
    files = with_generation(files, body.checkpoint.where)
    # From here on the model is the one that will be published.
    if architecture.tabled:
        parts = {architecture.tensors[name].part for name in view}
        published = architecture.published_config(parts)
        architecture = architecture_of(published, body.checkpoint.where)
    context = replace(context, architecture=architecture, codes=codes, files=files)
    dataset = None
    if recipe.calibration is not None:
        dataset = _find_dataset(finder, recipe, recipe.calibration)
        source = CalibrationSource(
            recipe.calibration,
            dataset,
            body.checkpoint,
            files,
            architecture,
            graph,
            body.profile,
            lambda entry: recipe.where("calibration", entry),
        )
        context = replace(context, calibration=source)
    with _located(recipe, "quantize"), failures_blamed(recipe.quantize):
        view = returned(recipe.quantize.prepare(view, context), dict, "prepare")
        companions = returned(recipe.quantize.companions(view, context), Sequence, "companions")
    plan = _formatted(recipe, view, files, context, dataset)
    along = tuple(
        _formatted(_named(recipe, item), view, _read(files, item.format), context, None)
        for item in companions
    )
    return replace(plan, notices=(*notices, *plan.notices), companions=along)


def _named(recipe: Recipe, companion: Companion) -> Recipe:
    """The recipe as that of the companion, which has no launches of its own."""
    suffix, repo, title = companion.suffix, recipe.card.repo, recipe.card.title
    named = {"repo": repo and repo + suffix, "title": title and title + suffix}
    return replace(
        recipe,
        variant=recipe.variant + suffix,
        description=companion.description,
        quantize=companion.format,
        package=recipe.package.model_copy(update={"serve": []}),
        card=recipe.card.model_copy(update=named),
    )


def _read(files: Mapping[str, bytes], number_format: Format) -> Mapping[str, bytes]:
    """Those of the files that the format's engine reads."""
    return {name: files[name] for name in taken_over(files, number_format.engine_reads())}


def _formatted(
    recipe: Recipe,
    view: View,
    files: Mapping[str, bytes],
    context: PlanContext,
    dataset: Dataset | None,
) -> VariantPlan:
    """What the recipe's format makes of the view."""
    assert isinstance(recipe.quantize, Format)
    body = context.sources[recipe.body].checkpoint
    with _located(recipe, "quantize"), failures_blamed(recipe.quantize):
        conversion = returned(recipe.quantize.convert(view, context), Conversion, "convert")
        metadata = returned(recipe.quantize.metadata(), Mapping, "metadata")
    _check_names(conversion)
    with failures_blamed(recipe.quantize):
        _check_files(body, files, recipe.quantize, conversion)
    packs = _layouts(recipe, body, conversion, metadata)
    serving = None
    if recipe.package.serve:
        # What launches are made of takes as long to import as a small plan takes.
        from carnice_build.planning.serve import plan_serving

        with _located(recipe, "package", "serve"):
            serving = plan_serving(recipe, context.architecture, conversion, files, packs)
    return VariantPlan(
        recipe=recipe,
        sources=context.sources,
        architecture=context.architecture,
        view=view,
        conversion=conversion,
        packs=tuple(packs),
        files=files,
        serving=serving,
        dataset=dataset,
        notices=tuple(conversion.notices),
    )


def _layouts(
    recipe: Recipe, body: Checkpoint, conversion: Conversion, metadata: Mapping[str, str]
) -> Sequence[PackLayout]:
    """The files that the format lays out itself, shards of safetensors where it does not."""
    number_format, shard = recipe.quantize, recipe.package.shard
    assert isinstance(number_format, Format)
    publication = Publication(recipe.variant, _model_name(recipe), shard)
    with _located(recipe, "package"), failures_blamed(number_format):
        own = number_format.layouts(conversion, publication)
    if own is not None:
        return returned(own, Sequence, "layouts")
    return pack_layouts(conversion.tensors, shard or SHARD_BYTES, metadata)


def _model_name(recipe: Recipe) -> str:
    """What files call the model: its name, less who published it."""
    return PurePosixPath(recipe.sources[recipe.body].model).name


def _architecture(checkpoint: Checkpoint, view: View, number_format: Format) -> Architecture:
    try:
        return architecture_of(plain_config(checkpoint.config), checkpoint.where)
    except UnknownFamily as error:
        model_type = checkpoint.config.get("model_type")
        if isinstance(model_type, str) and number_format.takes_untabled(model_type):
            return untabled(checkpoint, view)
        remote = ", whose code is not transformers' own" if "auto_map" in checkpoint.config else ""
        raise UnknownFamily(
            error.what + remote, where=error.where, expected=_way_out(error, model_type)
        ) from None


def _way_out(error: UnknownFamily, model_type: object) -> str:
    known = (error.expected or "").partition(";")[0]
    if not isinstance(model_type, str):
        return known
    return (
        f"{known}; `carnice family {model_type[:100]}` writes a table to begin with "
        "(docs/adding-a-family.md), and formats without calibration that rename nothing, such as "
        "that of the preset fp8-dynamic, build without one"
    )


def untabled(checkpoint: Checkpoint, view: View) -> Untabled:
    """What names and shapes say of a model whose family has no table."""
    return Untabled(plain_config(checkpoint.config), checkpoint.where, _shapes(view))


def _shapes(view: View) -> dict[str, tuple[int, ...]]:
    return {name: ref.spec.shape for name, ref in view.items()}


def _find(finder: SourceFinder, recipe: Recipe, name: str) -> Source:
    return finder.find(name, recipe.sources[name])


def _find_dataset(finder: SourceFinder, recipe: Recipe, spec: CalibrationSpec) -> Dataset:
    try:
        return finder.find_dataset(spec)
    except CheckpointError as error:
        where = recipe.where("calibration", "dataset")
        raise error.of_entry("calibration.dataset", where) from None


def _keeps_codes(body: Checkpoint, number_format: Format) -> bool:
    """Whether the weights are quantized, and the format keeps them so; PlanError if it does not."""
    stated = stated_quantization(body.config)
    if stated is None:
        return False
    if number_format.keeps(str(stated.get("quant_method"))):
        return True
    raise _quantized_already(body)


def _quantized_already(body: Checkpoint) -> PlanError:
    stated = stated_quantization(body.config) or {}
    method = stated.get("quant_method") or "quantization_config"
    step = "a step `- decode: {}` to say that a quantized model is meant to be quantized again"
    return PlanError(
        f"is quantized already ({method})",
        where=body.where,
        expected=step if method in METHODS else "the weights that it was quantized from",
    )


@contextmanager
def _located(recipe: Recipe, *path: str | int) -> Iterator[None]:
    """Give errors of the block the place in the recipe at `path`."""
    try:
        yield
    except PlanError as error:
        if error.where is not None:
            raise
        raise error.revised(where=recipe.where(*path, *error.at)) from None


def _without_copies(
    view: View, architecture: Architecture, where: str
) -> tuple[View, tuple[str, ...]]:
    """The view without what is another tensor, or read by nobody, and what to say of it.

    Loaders disagree about such a tensor when it is not what the config ties it to: transformers
    takes both, mlx-lm and vLLM leave it out.
    """
    notices = []
    for name, other in architecture.ties.items():
        if name not in view:
            continue
        if other in view and _differ(view[name].origin, view[other].origin):
            raise PlanError(
                f"tensor {name!r} differs from {other!r}, to which config.json ties it",
                where=where,
                expected="`tie_word_embeddings: false` there to keep it, or a `drop` step for it",
            )
        notices.append(f"{name} of the source is left out, because config.json ties it to {other}")
    if unread := [name for name in view if name in architecture.unread]:
        more = f" and {len(unread) - 1} more" if unread[1:] else ""
        notices.append(f"{unread[0]}{more} are left out, because no model reads them")
    left_out = {*architecture.ties, *architecture.unread}
    kept = {name: ref for name, ref in view.items() if name not in left_out}
    return kept, tuple(notices)


def _differ(one: SourceTensor | ActionOutput, other: SourceTensor | ActionOutput) -> bool:
    """Whether samples of two tensors show that they differ."""
    if not (isinstance(one, SourceTensor) and isinstance(other, SourceTensor)):
        return False
    if one.spec != other.spec or one.file is None or other.file is None:
        return one.spec != other.spec
    pairs = zip(read_samples(one), read_samples(other), strict=True)
    return any(first != second for first, second in pairs)


def _check_files(
    body: Checkpoint, files: Mapping[str, bytes], format: Format, conversion: Conversion
) -> None:
    """Raise PlanError when the folder would lack what its engine cannot do without."""
    vision = any(tensor.fact.part is Part.TOWER for tensor in conversion.tensors)
    lacking = absent(files, format.engine_reads(), vision=vision)
    # A shape file has no files at all, and nothing is built from it.
    if lacking and body.buildable:
        raise together(
            lacking,
            lambda problem: PlanError(problem, where=body.where),
            "lacks files that the engine reads",
            body.where,
        )


def _check_names(conversion: Conversion) -> None:
    names = [name for tensor in conversion.tensors for name, _ in tensor.members]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise PlanError(f"two tensors of the output are named {twice!r}")
