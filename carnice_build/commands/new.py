"""A first recipe: what a model's config, headers and small files say of how to build it.

No weight is read.  What is written is planned before it stays, so that it builds as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from carnice_build.checkpoint.profiles import Profiles
from carnice_build.commands import dataset as datasets
from carnice_build.commands.draft import Draft
from carnice_build.commands.new_asked import new_path, open_model, preset_of, text_of
from carnice_build.commands.new_found import draft_of
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import BackendError, CheckpointError, PlanError
from carnice_build.formats.base import Format
from carnice_build.formats.registry import FORMATS
from carnice_build.models.base import Architecture
from carnice_build.planning.planner import VariantPlan
from carnice_build.planning.repair import endings, with_partners
from carnice_build.recipe.merge import read_with_parents
from carnice_build.recipe.presets import presets
from carnice_build.recipe.schema import SourceSpec
from carnice_build.units import plural


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
    path = new_path(name, options.recipes)
    knobs = preset_of(preset)
    number_format = FORMATS[knobs["quantize"]["format"]].model_validate(knobs["quantize"])
    text = text_of(dataset, preset, knobs, options.recipes.parent)
    spec, checkpoint = open_model(model, options.recipes.parent)
    draft, found, architecture = draft_of(
        name, preset, knobs, number_format, spec, checkpoint, text
    )
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
    found += plan.conversion.notices
    found += [
        f"{item.name} is built beside it: {item.recipe.description}" for item in plan.companions
    ]
    return NewRecipe(path, plan, found, plan.format.extras(), profile)


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
        if kind is None:
            return
        # What ended the block is what there is to say, and a folder may have got other files.
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
