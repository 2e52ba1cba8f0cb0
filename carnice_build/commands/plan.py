"""Planning: recipes read, run on headers, and compared with what the cache has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from carnice_build.checkpoint.profiles import Profiles, SourceFinder
from carnice_build.commands.asking import Asking
from carnice_build.commands.collector import no_collections
from carnice_build.commands.options import Options
from carnice_build.commands.remote import RemoteView, remote_access
from carnice_build.commands.rows import check_rows
from carnice_build.errors import PlanError, PluginError, nearest
from carnice_build.graph import ActionGraph
from carnice_build.planning.planner import VariantPlan, plan_variant
from carnice_build.planning.same_names import told_of_same_names
from carnice_build.planning.status import BuildStatus, survey
from carnice_build.planning.vocabulary import vocabulary
from carnice_build.recipe.loader import Recipe, find_recipe, list_recipes, load_recipe
from carnice_build.store.store import Store


@dataclass(frozen=True)
class Plan:
    """Variants worked out together: equal actions are one action.

    Those that are built along with another come right after it.
    """

    variants: tuple[VariantPlan, ...]
    graph: ActionGraph


@no_collections()
def plan_variants(names: Sequence[str], options: Options) -> Plan:
    """Plan the named variants; raises a CarniceError for the first thing that is wrong."""
    if isinstance(names, str):
        names = [names]
    graph = ActionGraph()
    recipes = [_load(name, options) for name in dict.fromkeys(names)]
    _check_sources(recipes, options)
    profiles = Profiles(options.recipes)
    finders: dict[str, SourceFinder] = {}
    ask = Asking(options.cache)
    variants: list[VariantPlan] = []
    for recipe in recipes:
        profile = options.profile or _default(profiles, recipe, options)
        if profile not in finders:
            finders[profile] = SourceFinder(
                profiles, profile, options.sources, stream=options.stream
            )
        variant = plan_variant(recipe, finders[profile], graph, ask)
        variants += [variant, *variant.companions]
    _check_companions(variants, options)
    return Plan(tuple(told_of_same_names(variants)), graph)


def _check_companions(variants: Sequence[VariantPlan], options: Options) -> None:
    """Raise PlanError for what is built along with a variant, and is one of its own as well."""
    known = {path.stem for path in list_recipes(options.recipes)}
    for companion in (item for variant in variants for item in variant.companions):
        if companion.name in known:
            raise PlanError(
                f"{companion.name} would be another folder of this variant, and there is a recipe "
                "of that name",
                where=companion.recipe.where("variant"),
                expected="another name",
            )


def _default(profiles: Profiles, recipe: Recipe, options: Options) -> str:
    sources = recipe.sources.items()
    return profiles.default(spec for name, spec in sources if name not in options.sources)


def _check_sources(recipes: Sequence[Recipe], options: Options) -> None:
    known = {name for recipe in recipes for name in recipe.sources}
    for name in options.sources:
        if name not in known:
            raise PlanError(
                f"--source {name}: no recipe has a source of that name",
                nearest=nearest(name, known),
            )


def _load(name: str, options: Options) -> Recipe:
    path = find_recipe(name, options.recipes)
    return load_recipe(path, vocabulary(), options.overrides)


@dataclass(frozen=True)
class PlanResult:
    """A plan and what of it the cache has already; `remote` is None where none is configured."""

    plan: Plan
    status: BuildStatus
    remote: RemoteView | None = None

    @property
    def variants(self) -> tuple[VariantPlan, ...]:
        """The variants, worked out: tensors, packs, sizes, bits per weight."""
        return self.plan.variants


@no_collections()
def plan_and_survey(names: Sequence[str], options: Options | None = None) -> PlanResult:
    """Plan the named variants and ask the cache; an empty cache is made where there is none.

    Reads headers only, and counts a calibration's rows; asks a remote that is configured.
    Raises a CarniceError for the first thing that is wrong.
    """
    options = options or Options()
    access = remote_access(options)
    plan = plan_variants(names, options)
    check_rows(plan.variants)
    with Store(options.cache) as store:
        remote = access.look() if access else None
        return PlanResult(
            plan, survey(plan.variants, store, remote.index if remote else None), remote
        )


def names_of(options: Options) -> list[str]:
    """The names of all variants, or of those whose models the profile has."""
    paths = list_recipes(options.recipes)
    if options.profile is None:
        return [path.stem for path in paths]
    profiles = Profiles(options.recipes)
    recipes = (load_recipe(path, vocabulary()) for path in paths)
    return [
        recipe.variant
        for recipe in recipes
        if profiles.has(options.profile, recipe.sources.values())
    ]


def list_variants(options: Options, warn: Callable[[PluginError], None]) -> list[Recipe]:
    """Every recipe of the folder, checked for form.

    A recipe that needs a broken plugin is left out, and `warn` is told why.
    """
    found = []
    for path in list_recipes(options.recipes):
        try:
            found.append(load_recipe(path, vocabulary()))
        except PluginError as error:
            warn(error)
    return found


def extras_of(names: Sequence[str], options: Options) -> list[str]:
    """The optional dependencies that building these variants needs."""
    extras: set[str] = set()
    for name in names:
        recipe = _load(name, options)
        extras.update(recipe.quantize.extras())  # type: ignore[attr-defined]
    return sorted(extras)
