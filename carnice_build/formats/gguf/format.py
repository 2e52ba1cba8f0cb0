"""Format `gguf`: the file that llama.cpp's converter and `llama-quantize` make of a checkpoint.

Names, shapes, order and metadata are the converter's (`naming`, `tokenizer`), types are those of
`llama-quantize` (`mixes`), and bytes those of ggml.
The tower of a model that has one goes into a file of its own, the projector.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from carnice_build.checkpoint.assets import Reads
from carnice_build.checkpoint.json import to_json
from carnice_build.errors import PlanError
from carnice_build.formats.base import OP, Conversion, Format
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.gguf.imatrix import OWN, ImatrixSpec
from carnice_build.formats.gguf.layout import GgufFile, gguf_layouts
from carnice_build.formats.gguf.made import Choice, Files
from carnice_build.formats.gguf.mixes import FLOATS, Request, mix_of, type_of
from carnice_build.formats.gguf.named import Named
from carnice_build.formats.gguf.tensors import FUSED, Backend, scheme_of
from carnice_build.formats.layout import PackLayout, Publication
from carnice_build.formats.rules import Rule, fitted
from carnice_build.formats.variant import Variant
from carnice_build.graph import View
from carnice_build.models.base import LINEARS, Architecture, Part
from carnice_build.recipe.schema import FileSpec
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.gguf.checks import GgufChecks, GgufReader
    from carnice_build.serving.profile import Serving

_LABEL = re.compile(r"[A-Za-z0-9_]{1,40}(-[A-Za-z0-9_]{1,40}){0,3}")
_NO_MODEL = re.compile(r"mmproj|imatrix|(mtp|eagle3|dflash|dspark)-|\d{5}-of-\d{5}-")
"""What is in names of files that llama.cpp takes for another thing: `gguf_filename_is_model`, and
parts of a split one."""

_FILES, _DRAFTS = "files", "mtp"
"""What `Conversion.stated` calls the files, and whether the MTP head is in them."""


class GgufRule(Rule):
    """Another type for some modules, as `--tensor-type` gives it."""

    type: str | None = Field(None, description="A type of ggml, such as `Q8_0` or `F16`.")

    @field_validator("type")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else _asked(type_of, value)


class GgufFormat(Format):
    """A GGUF, as llama.cpp makes, loads and publishes it."""

    format: Literal["gguf"]
    mix: str = Field(
        "Q4_K_M",
        description="The mix, by the name that llama-quantize has for it (`Q4_K_M`, `Q5_K_M`, "
        "`Q6_K`, `Q8_0`, `IQ4_XS`, ...), or `BF16`, `F16` or `F32`, as the converter writes them.",
    )
    label: str | None = Field(
        None,
        description="What the model's file is called in the place of the mix, where rules make "
        "another of it: `Q4_K_L`, or `UD-Q4_K_XL`.",
    )
    rules: list[GgufRule] = Field(
        default_factory=list, description="Exceptions; the last rule that fits a module wins."
    )
    pure: bool = Field(
        False, description="The mix's own type for all that it quantizes, as `--pure` asks for."
    )
    projector: Literal["F16", "BF16", "F32"] = Field(
        "F16",
        description="The type of the vision tower's file, `mmproj-...`, where the tower is kept.",
    )
    imatrix: ImatrixSpec | None = Field(
        None,
        description="What columns count, so that those of large inputs lose least: a published "
        "file of llama.cpp's, or `calibration` for passes of our own, whose file is packaged too.",
    )
    tokenizer_pre: str | None = Field(
        None,
        description="What llama.cpp calls the pre-tokenizer, where it is not recognized by what "
        "tokenizer.json does.",
    )

    backend: Backend = Field(
        "fused",
        description="Kernels of ours, where there are any for a type, or ggml itself (slower, and "
        "the same bytes); types that have none, such as `IQ3_S`, take ggml.",
    )

    @field_validator("mix")
    @classmethod
    def _known(cls, value: str) -> str:
        return _asked(mix_of, value)

    @field_validator("label")
    @classmethod
    def _found_by(cls, value: str | None) -> str | None:
        """As `llama-server -hf OWNER/NAME:LABEL` finds a file."""
        if value is None:
            return None
        if not _LABEL.fullmatch(value) or _NO_MODEL.search(f"{value}-"):
            raise ValueError(f"{value!r} is no label by which llama.cpp would find a model")
        return value

    @field_validator("imatrix", mode="before")
    @classmethod
    def _told_apart(cls, value: object) -> object:
        """A path alone would be one word for two things."""
        if value is None or value == OWN or isinstance(value, dict | FileSpec):
            return value
        expected = f"'{OWN}', or a file as `{{file: NAME.gguf}}`"
        raise PydanticKnownError("literal_error", {"expected": expected})

    def engine_reads(self) -> Collection[Reads]:
        """llama.cpp reads nothing beside its file; the tokenizer is what that is made of."""
        return (Reads.TOKENIZER, Reads.PROCESSOR)

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """config.json, which tells pages and other engines of the model."""
        return {"config.json": to_json(variant.config)}

    def card(self) -> Card:
        """See `Format.card`."""
        tags = ("gguf", "llama.cpp", *(("imatrix",) if self.imatrix is not None else ()))
        return Card(own_template(__package__), "gguf", tags)

    def checks(self) -> GgufChecks:
        """See `Format.checks`."""
        from carnice_build.formats.gguf.checks import GgufChecks

        return GgufChecks(self.mix, weighted=self.imatrix is not None)

    @classmethod
    def reader(cls) -> type[GgufReader]:
        """See `Format.reader`."""
        from carnice_build.formats.gguf.checks import GgufReader

        return GgufReader

    def extras(self) -> tuple[str, ...]:
        """ggml where it makes blocks; passes run in torch."""
        kinds = {self.mix, *(rule.type for rule in self.rules if rule.type)}
        own = any(kind.startswith("IQ") and kind not in FUSED for kind in kinds)
        ggml = ("ggml",) if own or self.backend == "ggml" else ()
        return (*ggml, "torch") if self.imatrix == OWN else ggml

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """See `Format.leaving`."""
        return {"rules+": [{"match": list(modules), "skip": True}]}

    @classmethod
    def serving(cls) -> Serving:
        """See `Format.serving`."""
        from carnice_build.serving.profile import Serving, ServingProfiles

        assert __package__ is not None
        return Serving("gguf", ServingProfiles(__package__, its_own=True))

    def layouts(self, conversion: Conversion, publication: Publication) -> Sequence[PackLayout]:
        """One file or split ones, and the projector's."""
        files: Sequence[GgufFile] = conversion.stated[_FILES]
        return [
            layout
            for file in files
            for layout in gguf_layouts(file, publication.model, publication.shard_bytes)
        ]

    @classmethod
    def keeps(cls, method: str) -> bool:
        """MXFP4, which ggml has too."""
        return method == "mxfp4"

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """The tensors of the files, in the order of those."""
        facts = context.architecture.tensors
        label = self.label or self.mix
        files = Files(
            self.mix, label, self.imatrix, self.tokenizer_pre, self.backend, view, context
        )
        request = Request(self.mix, pure=self.pure)
        description = files.described()
        named = description.tensors
        chosen = self._chosen(named, context)
        text = files.text(description, request, chosen)
        made = [text.file]
        if any(facts[name].part is Part.TOWER for name in view):
            made.append(files.tower(self.projector))
        drafts = any(item.fact.part is Part.MTP for item in named)
        kept = {
            name: ref for name, ref in view.items() if drafts or facts[name].part is not Part.MTP
        }
        kinds = {name: item.type for name, item in text.file.described.items()}
        quantized = {
            fact.module: scheme_of(kinds[item.name])
            for item in named
            for fact in (item.fact, item.merged)
            if fact is not None and kinds[item.name] not in FLOATS
        }
        return Conversion(
            tensors=[tensor for file in made for tensor in file.tensors],
            parameters=sum(ref.spec.size for ref in kept.values()),
            quantized=quantized,
            ignored=[
                fact.module
                for name, fact in facts.items()
                if name in kept and fact.role in LINEARS and fact.module not in quantized
            ],
            causes={
                tensor.name: dict.fromkeys(
                    (OP, "type", "dtype"), _cause(tensor.name, chosen, text.moved)
                )
                for tensor in text.file.tensors
            },
            stated={
                _FILES: [*made, text.statistics] if text.statistics else made,
                _DRAFTS: drafts,
            },
            notices=text.notices,
        )

    def _chosen(self, tensors: Sequence[Named], context: PlanContext) -> dict[str, Choice]:
        """The types that rules give to tensors, by GGUF's names."""
        layers = {item.fact.module: item.fact.layer for item in tensors}
        # The tensor of tied embeddings is what both modules read.
        tied = {_module(name): _module(own) for name, own in context.architecture.ties.items()}
        layers |= dict.fromkeys(tied)
        chosen: dict[str, Choice] = {}
        for index, rule in enumerate(self.rules):
            try:
                if rule.type is None and not rule.skip:
                    raise PlanError("says nothing", expected="`type` or `skip`")
                found = fitted(rule, layers, (), context)
                found |= {tied[path] for path in found if path in tied}
                about = [
                    item.name
                    for item in tensors
                    if item.fact.module in found and item.name.endswith(".weight")
                ]
                if found and not about and not rule.skip:
                    raise PlanError(f"{min(found)} has no weight that could be {rule.type}")
            except PlanError as error:
                raise error.revised(at=("rules", index)) from None
            cause = ("rules", index, "skip" if rule.skip else "type")
            chosen |= dict.fromkeys(about, Choice(None if rule.skip else rule.type, cause))
        return chosen


def _cause(
    name: str, chosen: Mapping[str, Choice], moved: Collection[str]
) -> tuple[str | int, ...]:
    """The entry of the section that a tensor's type follows from."""
    if name in chosen:
        return chosen[name].cause
    return ("rules",) if name in moved else ("mix",)


def _module(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


def _asked(known: Any, value: str) -> str:
    """The name in full; pydantic's error where nobody knows it."""
    try:
        return str(known(value))
    except PlanError as error:
        near = error.nearest and f"; did you mean {error.nearest!r}?"
        message = error.what + (near or f", expected {error.expected}")
        raise PydanticCustomError("unknown", "{message}", {"message": message}) from None
