"""What a step is, and what steps and formats may ask of the plan they run in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from carnice_build.calibration.source import CalibrationSource
from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.profiles import Source
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError, nearest
from carnice_build.graph import ActionGraph, View
from carnice_build.models.base import Architecture
from carnice_build.recipe.layers import LayerSpan, layers_in
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import Expectation, FileSpec, Strict
from carnice_build.tensors import ByteSource, SourceTensor

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Question(Generic[T_co]):
    """What a plan wants to know of a library: a function that says it, as text.

    `function` is `module:name`, of a module that may import the library; it gets the `arguments`,
    which JSON can hold, and its answer is that of the `libraries`' versions and of `version`.
    `parse` makes of the text what is wanted, and raises ValueError for a text that is no answer.
    `extra` is the optional dependency that brings the libraries.
    """

    function: str
    arguments: tuple[Any, ...]
    libraries: tuple[str, ...]
    version: int
    parse: Callable[[str], T_co]
    extra: str


class Ask(Protocol):
    """Answers questions about libraries, which no plan imports."""

    def __call__(self, question: Question[T], /) -> T:
        """The answer; PlanError where the libraries are missing, BackendError where they fail."""


FindFile = Callable[[FileSpec], ByteSource]
"""Finds a file that a recipe names; CheckpointError where it is not there."""


def unfound(spec: FileSpec) -> ByteSource:
    """For plans that find no files."""
    raise PlanError(f"needs {spec.file}, and nobody was named who could find it")


def unanswered(question: Question[T], /) -> T:
    """For plans that ask nobody."""
    raise PlanError(f"needs {question.libraries[0]}, and nobody was named who could be asked")


@dataclass(frozen=True)
class Codes:
    """A quantized weight as the checkpoint has it, for formats that keep it so.

    `stored` are its tensors there, by their names; `parts` those of a fact alone, which may be one
    of several stacks in them, by the ends of the names.
    """

    stored: Mapping[str, TensorSpec]
    parts: Mapping[str, SourceTensor]


@dataclass(frozen=True)
class PlanContext:
    """What steps and formats may know besides the view: facts of the model, and the graph.

    `codes` are the weights, by the names of the view, that are to be published as they are; the
    view has the floats that they stand for.
    `files` are the body's small files as the steps left them; formats are given them, not steps.
    """

    architecture: Architecture
    graph: ActionGraph
    profile: str | None
    layer_sets: Mapping[str, Sequence[LayerSpan]]
    sources: Mapping[str, Source]
    calibration: CalibrationSource | None = None
    ask: Ask = unanswered
    find: FindFile = unfound
    codes: Mapping[str, Codes] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def body(self) -> Checkpoint:
        """The checkpoint that the variant is made from: the recipe's first source."""
        return next(iter(self.sources.values())).checkpoint

    def calibrated(self, key: str | None = None) -> CalibrationSource:
        """What the recipe calibrates on; PlanError when it does not say.

        `key` is what needs it in the format's section, if the format does not by itself.
        """
        if self.calibration is None:
            what = f"`{key}`" if key else "the format"
            raise PlanError(f"{what} needs a section `calibration`", at=(key or "format",))
        return self.calibration

    def layers(self, name: str) -> frozenset[int]:
        """The decoder layers of the recipe's named set; PlanError when it has none so named."""
        if name not in self.layer_sets:
            raise PlanError(
                f"there is no set of layers {name!r}",
                expected="one of those under `layers`",
                nearest=nearest(name, self.layer_sets),
            )
        return layers_in(list(self.layer_sets[name]), self.architecture.num_layers)

    def check_count(
        self, expect: Expectation, patterns: Patterns, found: int, *, derive: bool = True
    ) -> None:
        """Raise PlanError unless `found` names matched, as the recipe expects.

        Counts by profile hold for that profile's own checkpoints.
        For any other, the count is that of the matching names in the architecture's table, or,
        where `derive` is false because the names are not the table's yet, is not checked.
        """
        wanted, why = None, ""
        if isinstance(expect, int):
            wanted = expect
        elif expect is not None and self.profile in expect:
            wanted, why = expect[self.profile], f" for profile {self.profile}"
        elif expect is not None and derive and self.architecture.tabled:
            wanted = len(patterns.select(self.architecture.tensors))
            why = " by the checkpoint's config"
        if wanted is not None and found != wanted:
            raise PlanError(f"{patterns} matches {found} tensors", expected=f"{wanted}{why}")


class Step(Strict):
    """A step of a recipe: its parameters, and how it rewires a view.

    One that `decodes` gives quantized weights as floats: it lets a recipe begin with them.
    """

    decodes: ClassVar[bool] = False

    @abstractmethod
    def apply(self, view: View, context: PlanContext) -> View:
        """The view after the step; PlanError when the step does not fit the view."""

    def edit(self, files: Mapping[str, bytes], context: PlanContext) -> Mapping[str, bytes]:
        """The small files after the step: tokenizer, chat template and the like, by name."""
        return files


def _parts(name: str, depth: int, anywhere: bool) -> Iterator[str]:
    """What a path ends in, `depth` of its parts; or all that is as deep `anywhere` in it."""
    path = name.split(".")
    end = max(0, len(path) - depth)
    return (".".join(path[at : at + depth]) for at in range(0 if anywhere else end, end + 1))


def require_match(patterns: Patterns, names: Sequence[str], what: str) -> list[str]:
    """The names that match; PlanError with the nearest name when a pattern matches none."""
    found = patterns.select(names)
    for text in patterns.texts:
        if Patterns(text).select(found) if len(patterns.texts) > 1 else found:
            continue
        bare = text.strip("*.")
        # A glob such as `*.v_proj` names the end of a path, so ends are what it is compared with;
        # one such as `*.mlp.*` names what is anywhere.
        parts = {
            part for name in names for part in _parts(name, bare.count(".") + 1, text.endswith("*"))
        }
        raise PlanError(f"{text} matches no {what}", nearest=nearest(bare, sorted(parts)))
    return found
