"""What a step and a format are, and what they may ask of the plan they run in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carnice_build.checkpoint.assets import Reads
from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.datasets import Dataset
from carnice_build.checkpoint.model_dtype import stated_dtype
from carnice_build.checkpoint.profiles import Source
from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.errors import PlanError, nearest
from carnice_build.graph import ActionGraph, OutputTensor, TensorRef, View
from carnice_build.models.base import Architecture
from carnice_build.package.base import Packager
from carnice_build.recipe.layers import LayerSpan, layers_in
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import CalibrationSpec, Expectation, Strict
from carnice_build.transforms.elementwise import Elementwise


@dataclass(frozen=True)
class CalibrationSource:
    """A recipe's calibration, with its dataset found and the small files as they are packaged."""

    spec: CalibrationSpec
    dataset: Dataset
    body: Checkpoint
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class PlanContext:
    """What steps and formats may know besides the view: facts of the model, and the graph."""

    architecture: Architecture
    graph: ActionGraph
    profile: str | None
    layer_sets: Mapping[str, Sequence[LayerSpan]]
    sources: Mapping[str, Source]
    calibration: CalibrationSource | None = None

    @property
    def body(self) -> Checkpoint:
        """The checkpoint that the variant is made from: the recipe's first source."""
        return next(iter(self.sources.values())).checkpoint

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
        elif expect is not None and derive:
            wanted = len(patterns.select(self.architecture.tensors))
            why = " by the checkpoint's config"
        if wanted is not None and found != wanted:
            raise PlanError(f"{patterns} matches {found} tensors", expected=f"{wanted}{why}")


class Step(Strict):
    """A step of a recipe: its parameters, and how it rewires a view."""

    @abstractmethod
    def apply(self, view: View, context: PlanContext) -> View:
        """The view after the step; PlanError when the step does not fit the view."""

    def edit(self, files: Mapping[str, bytes], context: PlanContext) -> Mapping[str, bytes]:
        """The small files after the step: tokenizer, chat template and the like, by name."""
        return files


@dataclass(frozen=True)
class Conversion:
    """What a format makes of a view.

    `parameters` counts the elements of the source tensors that the variant keeps.
    `quantized` maps the path of each quantized module to its settings, as the format's config
    spells both; `defaults` are the settings that the config states for the whole model.
    `ignored` names what is not quantized, as the format's config spells it.
    `dtype` is what config.json states for the model, None where that is as the source has it.
    `figures` are small tensors whose numbers build.json states, by what they are of.
    `causes` says, by the name of an action's first output and by parameter, which entry below
    `quantize` in the recipe chose the value.
    """

    tensors: Sequence[OutputTensor]
    parameters: int
    defaults: Mapping[str, Any]
    quantized: Mapping[str, Mapping[str, Any]]
    causes: Mapping[str, Mapping[str, tuple[str | int, ...]]]
    ignored: Sequence[str] = ()
    dtype: str | None = None
    figures: Mapping[str, TensorRef] = field(default_factory=dict)


class Format(Strict):
    """A number format: its knobs, and how it turns a canonical view into published tensors."""

    def prepare(self, view: View, context: PlanContext) -> View:
        """The view as `convert` is to get it, and as checks compare what is published with it."""
        return view

    @abstractmethod
    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Published tensors in the order of the model; PlanError when a knob does not fit."""

    @abstractmethod
    def packager(self) -> Packager:
        """What writes the files beside the weights."""

    def engine_name(self) -> str | None:
        """What serving engines call the format, None when no profile of `serving` is for it."""
        return None

    def engine_reads(self) -> Collection[Reads]:
        """What the engine reads of a folder: it is copied from the source, and must be there."""
        return (Reads.TOKENIZER, Reads.PROCESSOR)

    def metadata(self) -> Mapping[str, str]:
        """What the shards' headers say in `__metadata__`."""
        return {"format": "pt"}

    def extras(self) -> tuple[str, ...]:
        """The optional dependencies, as in `pip install carnice-build[...]`, that a build needs."""
        return ()


def in_stated_dtype(view: View, context: PlanContext) -> View:
    """The view with its floats in the type that the config states, as libraries load a model.

    What mlx-lm does not cast either stays: engines hold these states in float32.
    """
    dtype = stated_dtype(context.body.config)
    keeps = context.architecture.mlx_keeps_dtype
    if dtype is None:
        return view
    return {name: ref if keeps(name) else cast(ref, dtype, context) for name, ref in view.items()}


def cast(ref: TensorRef, dtype: str, context: PlanContext) -> TensorRef:
    """A float tensor in another type of floats; any other as it is."""
    if ref.spec.dtype == dtype or ref.spec.dtype not in WIDE_FLOATS:
        return ref
    params = {"add": None, "dtype": dtype, "nonfinite": "refuse"}
    (made,) = context.graph.add(Elementwise(), params, ref)
    return made


def check_fusions(quantized: Container[str], view: View, architecture: Architecture) -> None:
    """Raise PlanError where a serving engine would fuse a quantized linear with a plain one."""
    for fusion in architecture.fusions:
        states = {part in quantized for part in fusion.parts if f"{part}.weight" in view}
        if len(states) > 1:
            raise PlanError(
                f"some of {', '.join(fusion.parts)} are quantized and some are not",
                expected=f"all or none, because serving engines fuse them to {fusion.module}",
            )


def require_match(patterns: Patterns, names: Sequence[str], what: str) -> list[str]:
    """The names that match; PlanError with the nearest name when a pattern matches none."""
    for text in patterns.texts:
        if Patterns(text).select(names):
            continue
        bare = text.strip("*.")
        # A glob such as `*.v_proj` names the end of a path, so ends are what it is compared with.
        depth = bare.count(".") + 1
        ends = {".".join(name.split(".")[-depth:]) for name in names}
        raise PlanError(f"{text} matches no {what}", nearest=nearest(bare, sorted(ends)))
    return patterns.select(names)
