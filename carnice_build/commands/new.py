"""A first recipe: what a model's config, headers and small files say of how to build it.

No weight is read.  What is written is planned before it stays, so that it builds as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.chat.tool_format import ToolFormat, tool_format
from carnice_build.checkpoint.assets import Assets, Reads, absent
from carnice_build.checkpoint.checkpoint import Checkpoint, open_checkpoint, source_view
from carnice_build.checkpoint.profiles import Profiles, Source
from carnice_build.checkpoint.quantized import plain_config, stated_quantization
from carnice_build.checkpoint.readme import Readme, read_readme
from carnice_build.commands import dataset as datasets
from carnice_build.commands.draft import Draft, Section
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import (
    BackendError,
    CarniceError,
    CheckpointError,
    PlanError,
    RecipeError,
    nearest,
)
from carnice_build.formats.base import Format
from carnice_build.formats.registry import FORMATS
from carnice_build.graph import ActionGraph, View
from carnice_build.models import UnknownFamily, architecture_of
from carnice_build.models.base import Architecture, Part
from carnice_build.planning.planner import VariantPlan, untabled
from carnice_build.planning.repair import (
    Repair,
    endings,
    globs,
    leftovers,
    outside,
    owners,
    renames,
    with_partners,
    without,
)
from carnice_build.recipe.merge import read_with_parents
from carnice_build.recipe.presets import presets
from carnice_build.recipe.schema import SourceSpec, check_name
from carnice_build.steps.base import PlanContext
from carnice_build.steps.registry import STEPS
from carnice_build.units import plural

_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")
_MAIN = "main"
_BODY, _BASE = "body", "base"
_MOST_BASES = 4
"""Of the models that a card names as its base, those that are looked at for an MTP head."""


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that was written, what was found of its model, and what it will be.

    `extras` are the optional dependencies of a build; `profile` must be named to build it from
    where it was looked at, None where it need not.
    """

    path: Path
    plan: VariantPlan
    found: Sequence[str]
    extras: Sequence[str]
    profile: str | None


def preset_descriptions() -> dict[str, str]:
    """What each preset is, in a sentence, by name."""
    return {
        name: str(read_with_parents(path).find(("description",)).value)
        for name, path in presets().items()
    }


def new_recipe(
    name: str,
    model: str,
    preset: str,
    options: Options | None = None,
    dataset: str | None = None,
) -> NewRecipe:
    """Write `recipes/NAME.yaml`, which builds `model` as `preset`.

    `model` is a folder or a repository on the hub, `dataset` what the preset is calibrated on in
    place of its own text: a file of the project, a folder with one, or a repository on the hub.
    Raises a CarniceError, and then writes nothing, for what cannot be built so.
    """
    options = options or Options()
    path = _new_path(name, options.recipes)
    knobs = _preset(preset)
    number_format = FORMATS[knobs["quantize"]["format"]].model_validate(knobs["quantize"])
    text = _text(dataset, preset, knobs, options.recipes.parent)
    spec, checkpoint = _open(model, options.recipes.parent)
    draft, found, architecture = _draft(name, preset, knobs, number_format, spec, checkpoint, text)
    profile = None
    if "folder" not in spec and (options.recipes / "_profiles.yaml").exists():
        profile = _profile(spec, options.recipes)
    options = replace(options, profile=profile, sources={}, overrides=(), stream=True)

    def planned() -> VariantPlan:
        write(draft.text())
        with datasets.offering_another({**knobs.get("calibration", {}), **text}):
            (plan, *_) = plan_variants([name], options).variants
        return plan

    with _written(path) as write:
        left: set[str] = set()
        while True:
            try:
                plan = planned()
                break
            except PlanError as error:
                if error.unfit.keys() <= left:
                    raise
                left |= error.unfit.keys()
                draft, sentence = _without_unfit(draft, error, number_format, architecture)
                found.append(sentence)
        if plan.dataset is not None and text and plan.dataset.file is not None:
            draft, sentences = _with_samples(draft, plan, text["dataset"])
            found += sentences
            plan = planned() if sentences else plan
    found += [
        f"{item.name} is built beside it: {item.recipe.description}" for item in plan.companions
    ]
    return NewRecipe(path, plan, found, plan.format.extras(), profile)


# --- what is asked for ----------------------------------------------------------------------------


def _new_path(name: str, recipes: Path) -> Path:
    try:
        check_name(name)
    except ValueError as error:
        raise RecipeError(str(error), where="NAME") from None
    path = recipes / f"{name}.yaml"
    if os.path.lexists(path):
        raise RecipeError(
            "is there already", where=str(path), expected="another name, or that file removed"
        )
    return path


def _preset(name: str) -> Mapping[str, Any]:
    """What a preset says."""
    known = presets()
    if name not in known:
        raise RecipeError(
            f"there is no preset {name!r}",
            where="--as",
            expected="one of those that `carnice new --list` shows",
            nearest=nearest(name, known),
        )
    plain = read_with_parents(known[name]).plain()
    assert isinstance(plain, dict)
    return plain


def _text(
    dataset: str | None, preset: str, knobs: Mapping[str, Any], root: Path
) -> Mapping[str, Any]:
    """What the recipe says of the text that it is calibrated on; nothing where the preset does."""
    if dataset is None:
        return {}
    if "calibration" not in knobs:
        calibrated = [name for name in presets() if "calibration" in _preset(name)]
        raise RecipeError(
            f"{preset} is not calibrated",
            where=datasets.OPTION,
            expected=f"a preset that is: {', '.join(calibrated)}",
        )
    return datasets.named(dataset, root)


def _open(model: str, root: Path) -> tuple[dict[str, str], Checkpoint]:
    """What a recipe says of the source, and the checkpoint."""
    path = Path(model)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if is_folder:
        return _folder(path, root), open_checkpoint(path)
    if not datasets.REPOSITORY.fullmatch(model) or path.exists():
        raise CheckpointError(
            "is no folder, and no name on the hub", where=model, expected="FOLDER or OWNER/MODEL"
        )
    checkpoint, commit = _open_on_hub(model)
    return {"model": model, "revision": commit}, checkpoint


def _open_on_hub(model: str) -> tuple[Checkpoint, str]:
    # The hub's library is slow to import.
    from carnice_build.checkpoint.hub import open_hub

    return open_hub(model, _MAIN, stream=True)


def _folder(path: Path, root: Path) -> dict[str, str]:
    place = Path(os.path.abspath(path))  # noqa: PTH100 (a link may be there to be changed)
    if not str(place).isprintable():
        raise CheckpointError("has a name that no recipe can hold", where=str(path))
    below = Path(os.path.abspath(root))  # noqa: PTH100
    shown = place.relative_to(below) if place.is_relative_to(below) else place
    snapshot = _SNAPSHOT.search(place.as_posix())
    if snapshot:
        model = {"model": f"{snapshot[1]}/{snapshot[2]}", "revision": snapshot[3]}
    else:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).lstrip("._-")[:90]
        model = {"model": f"local/{plain or 'model'}"}
    return {**model, "folder": shown.as_posix()}


def _profile(spec: Mapping[str, str], recipes: Path) -> str | None:
    """The profile that takes the model from the hub, None where it is taken from there anyway."""
    profiles = Profiles(recipes)
    wanted = profiles.on_hub(spec["model"])
    default = profiles.default([SourceSpec.model_validate(spec)])
    return None if wanted == default else wanted


class _written:
    """A new file while the block runs, and after it unless that raises; gives what writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Path] = []

    def __enter__(self) -> Callable[[str], object]:
        folder = self._path.parent
        self._made = [item for item in (folder, *folder.parents) if not item.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._path.touch(exist_ok=False)
        return partial(self._path.write_text, encoding="utf-8")

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._path.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()


# --- what is found --------------------------------------------------------------------------------


def _draft(
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
        why[_BODY] = f"the commit that `{_MAIN}` was at"
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
            checkpoint, commit = _open_on_hub(model)
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


def _without_unfit(
    draft: Draft, error: PlanError, number_format: Format, architecture: Architecture
) -> tuple[Draft, str]:
    """The recipe without the modules that the format cannot quantize, and what is said of them.

    Raises `error` where the format has no words for it.
    """
    known = {fact.module for fact in architecture.tensors.values()}
    modules = set(error.unfit)
    if number_format.serving() is not None:
        modules = with_partners(modules, architecture)
    entries = number_format.leaving(endings(sorted(modules), known), architecture)
    if not entries:
        raise error
    reasons = ", ".join(dict.fromkeys(error.unfit.values()))
    alike = ", and engines run the others as one with these" if modules > error.unfit.keys() else ""
    stay = "module stays" if len(modules) == 1 else "modules stay"
    why = f"{len(modules)} {stay} in full precision, because {reasons}{alike}"
    return draft.saying("quantize", entries, dict.fromkeys(entries, why)), why


def _with_samples(draft: Draft, plan: VariantPlan, file: str) -> tuple[Draft, list[str]]:
    """The recipe with as many samples as its dataset, a file, has, and what is said of that."""
    try:
        wanted, there = datasets.sample_counts(plan)
    except BackendError as error:
        return draft, [f"whether {file} has enough samples shows when it is built: {error}"]
    if there == wanted:
        return draft, []
    if not there:
        raise CheckpointError("gives no sample", where=file, expected="a longer text")
    why = f"{file} has no more"
    return draft.saying("calibration", {"samples": there}, {"samples": why}), [
        f"it is calibrated on {plural(there, 'sample')}, not {wanted}: {why}"
    ]


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
