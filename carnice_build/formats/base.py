"""What a format is: everything that the rest of the program asks of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.assets import Reads
from carnice_build.checkpoint.model_dtype import stated_dtype
from carnice_build.dtypes import WIDE_FLOATS, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.card import Card
from carnice_build.formats.elementwise import Elementwise
from carnice_build.formats.layout import PackLayout, Publication
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import Architecture, Part, TensorFact
from carnice_build.recipe.schema import Strict
from carnice_build.steps.base import PlanContext
from carnice_build.tensors import STACK, members

if TYPE_CHECKING:
    # These bring numpy, or models of launches.
    from carnice_build.formats.checks import FolderReader, FormatChecks
    from carnice_build.serving.profile import Serving


OP = "op"
"""What `Conversion.causes` calls the op of an action, beside its parameters."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a variant: its published name, its bytes, and the source tensor it stands for.

    A `*` in the name publishes a stack as one tensor an expert.
    """

    name: str
    ref: TensorRef
    fact: TensorFact

    @property
    def members(self) -> Sequence[tuple[str, TensorSpec]]:
        """The tensors as the folder names them, in the order of their bytes."""
        return members(self.name, self.ref.spec)

    @property
    def count(self) -> int:
        """How many `members` there are."""
        return self.ref.spec.shape[0] if STACK in self.name else 1


@dataclass(frozen=True)
class Conversion:
    """What a format makes of a view.

    `parameters` counts the elements of the source tensors that the variant keeps.
    `quantized` maps the path of each quantized module, as the format's config spells it, to how
    its weight is stored.
    `ignored` names what is not quantized: modules as the checkpoint spells them, and patterns.
    `dtype` is what config.json states for the model, None where that is as the source has it.
    `figures` are small tensors whose numbers build.json states, by what they are of.
    `stated` is what else the format's `files` state; its form is the format's own.
    `kv_cache` is what engines call the type of a cache whose scales are stored, None without any.
    `notices` are sentences that a person may want to know before a build.
    `causes` says, by the name of an action's first output and by parameter, which entry below
    `quantize` in the recipe chose the value; by `OP`, which chose the op itself.
    """

    tensors: Sequence[OutputTensor]
    parameters: int
    quantized: Mapping[str, Scheme]
    causes: Mapping[str, Mapping[str, tuple[str | int, ...]]] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    dtype: str | None = None
    figures: Mapping[str, TensorRef] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    kv_cache: str | None = None
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class Companion:
    """A folder that is built along with another, whose name it has with `suffix` behind it."""

    suffix: str
    description: str
    format: Format


class Format(Strict):
    """A number format: its knobs, and how it turns a canonical view into published tensors."""

    def takes_untabled(self, model_type: str) -> bool:
        """Whether names and shapes of a model's tensors are enough, where its type has no table."""
        return False

    @classmethod
    def keeps(cls, method: str) -> bool:
        """Whether weights quantized by a `quant_method` are published with the codes they have.

        A recipe of such a model without a step that decodes them is given `PlanContext.codes`.
        """
        return False

    def prepare(self, view: View, context: PlanContext) -> View:
        """The view as `convert` is to get it, and as checks compare what is published with it."""
        return view

    @abstractmethod
    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Published tensors in the order of the model; PlanError when a knob does not fit."""

    @abstractmethod
    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """The files beside the weights that are this format's, by name: config.json at least."""

    def companions(self, view: View, context: PlanContext) -> Sequence[Companion]:
        """Further folders that are built along, of the same view.

        PlanError when a knob asks for one that cannot be.
        """
        return ()

    def takes(self) -> Mapping[str, str]:
        """What the format takes of other sources than the body, in words, by the source's name."""
        return {}

    def card(self) -> Card:
        """What the model card says of the format: what it says of all, unless there is more."""
        return Card()

    @abstractmethod
    def checks(self) -> FormatChecks:
        """What `verify` asks of a folder that was built with these knobs."""

    @classmethod
    @abstractmethod
    def reader(cls) -> type[FolderReader]:
        """What reads the format's folders, whoever made them."""

    @classmethod
    def serving(cls) -> Serving | None:
        """What serving engines call the format and how it is launched; None when none serves it."""
        return None

    def schemes(self) -> tuple[str, ...]:
        """What the format's serving profiles call the schemes of a folder; () where it has one."""
        return ()

    def engine_reads(self) -> Collection[Reads]:
        """What the engine reads of a folder: it is copied from the source, and must be there."""
        return (Reads.TOKENIZER, Reads.PROCESSOR)

    def leaves_out(self) -> Mapping[Part, str]:
        """The parts of a model that the engine knows nothing of, each with a sentence about it."""
        return {}

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """What a recipe says below `quantize` so that modules stay as they are.

        `modules` are globs over paths of modules; a key that ends in `+` appends to the list that
        these knobs have.  Nothing where the format has no words for it.
        """
        return {}

    def layouts(
        self, conversion: Conversion, publication: Publication
    ) -> Sequence[PackLayout] | None:
        """The files that tensors go into; None for shards of safetensors.

        PlanError, whose place is below `package`, where they cannot be made so.
        """
        return None

    def metadata(self) -> Mapping[str, str]:
        """What the shards' headers say in `__metadata__`."""
        return {"format": "pt"}

    def extras(self) -> tuple[str, ...]:
        """The optional dependencies, as in `pip install '.[...]'`, that a build needs."""
        return ()


def in_stated_dtype(view: View, context: PlanContext) -> View:
    """The view with its floats in the type that the config states, as libraries load a model.

    What mlx-lm does not cast either stays: engines hold these states in float32.
    """
    dtype = stated_dtype(context.body.config)
    keeps = context.architecture.keeps_dtype
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
