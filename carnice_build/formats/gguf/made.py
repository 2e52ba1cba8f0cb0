"""The files of a variant: what `naming` describes, in the types of a mix, with its importance."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from carnice_build.checkpoint.containers import PROJECTOR, STATISTICS
from carnice_build.checkpoint.gguf_header import Described
from carnice_build.checkpoint.gguf_values import Metadata
from carnice_build.checkpoint.model_dtype import stated_dtype
from carnice_build.checkpoint.readme import front_matter
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.gguf.imatrix import (
    OWN,
    ImatrixSpec,
    Importances,
    Order,
    Passes,
    Wanted,
    imatrix_source,
    imatrix_tensors,
    importance_refs,
)
from carnice_build.formats.gguf.imatrix_file import imatrix_metadata
from carnice_build.formats.gguf.layout import GgufFile
from carnice_build.formats.gguf.mix_rules import EMBEDDING, OUTPUT
from carnice_build.formats.gguf.mixes import (
    FLOATS,
    Assigned,
    ImportanceFile,
    Request,
    Tensor,
    assign,
    file_type,
    model_of,
    quantizable,
    quantized_metadata,
)
from carnice_build.formats.gguf.named import Named
from carnice_build.formats.gguf.naming import (
    About,
    Description,
    describe,
    describe_projector,
)
from carnice_build.formats.gguf.tensors import Backend, made_of
from carnice_build.formats.gguf.tokenizer import tokenizer_metadata
from carnice_build.formats.gguf.tokenizer_file import NAME as TOKENIZER
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import LINEARS
from carnice_build.steps.base import PlanContext

_SWAPPED = (1, 0, 2)


class Choice(NamedTuple):
    """A type that a rule gives, None for what stays as it is, and where the recipe says so."""

    type: str | None
    cause: tuple[str | int, ...]


@dataclass(frozen=True)
class Text:
    """The model's own file, the one of the importance it was made with, and what to tell.

    `moved` are tensors that no rule is about, but that have another type than without the rules.
    """

    file: GgufFile
    statistics: GgufFile | None
    notices: Sequence[str]
    moved: Collection[str] = ()


@dataclass(frozen=True)
class Files:
    """Makes the files of a view.

    `mix` is what most weights are to be, `label` what the model's file calls it, and `imatrix`
    where importance comes from.
    """

    mix: str
    label: str
    imatrix: ImatrixSpec | None
    tokenizer_pre: str | None
    backend: Backend
    view: View
    context: PlanContext

    def text(
        self, description: Description, request: Request, chosen: Mapping[str, Choice]
    ) -> Text:
        """The model's own file, which `described` describes, as `request` asks for it.

        `chosen` are the types of tensors that rules are about.
        """
        metadata: Metadata = {**description.metadata, **self._vocabulary(description)}
        if self.mix in FLOATS and not chosen:
            self._check_weighed()
            types = {item.name: written_as(item, self.mix) for item in description.tensors}
            file = self._file(description.tensors, types, metadata, {})
            return Text(file, None, [*self._uncounted(), *description.notices])
        written = [
            Tensor(item.name, item.shape, written_as(item, self.written))
            for item in description.tensors
        ]
        found, statistics = self._importance(description.tensors, description.architecture)
        request = replace(request, importance=bool(found and found.refs))
        model = model_of(metadata)
        try:
            assigned = assign(written, model, _with_rules(request, chosen, written))
        except PlanError as error:
            raise error.revised(at=("rules",) if chosen else None) from None
        moved = _moved(assigned, assign(written, model, request) if chosen else assigned, chosen)
        _check_heard(assigned, chosen, description.architecture)
        refs = found.refs if found else {}
        self._check_importance(assigned, refs, chosen)
        _check_kept(assigned)
        named = {item.name: item for item in description.tensors}
        file = self._file(
            [named[item.tensor.name] for item in assigned],
            {item.tensor.name: item.type for item in assigned},
            quantized_metadata(metadata, self.mix, self._importance_file(found)),
            refs,
        )
        notices = [*self._uncounted(), *description.notices, *_unfit(assigned), *_told(moved)]
        notices += found.notices if found else ()
        return Text(file, statistics, notices, moved)

    def described(self) -> Description:
        """What is in the model's own file beside the vocabulary, in the converter's order."""
        context = self.context
        about = self._about(self.written)
        return describe(context.architecture, self.view, context.graph, about, context.codes)

    def tower(self, outtype: str) -> GgufFile:
        """The projector's file."""
        about = self._about(outtype)
        description = describe_projector(
            self.context.architecture, self.view, self.context.graph, about
        )
        types = {item.name: written_as(item, outtype) for item in description.tensors}
        file = self._file(description.tensors, types, description.metadata, {})
        return replace(file, prefix=PROJECTOR, ending=f"-{outtype}", may_split=False)

    @property
    def written(self) -> str:
        """The type of matrices before a mix changes them: that of the model, so that what a rule
        leaves alone loses nothing."""
        if self.mix in FLOATS:
            return self.mix
        return stated_dtype(self.context.body.config) or "BF16"

    def _about(self, outtype: str) -> About:
        body = self.context.body
        source = next(iter(self.context.sources.values()))
        return About(
            name=source.spec.model,
            files=self.context.files,
            card=self._card,
            file_type=file_type(outtype),
            where=body.where,
        )

    @cached_property
    def _card(self) -> Mapping[str, Any]:
        """Of the source, whose page is read once for all files."""
        return front_matter(self.context.body)

    @property
    def _has_vocabulary(self) -> bool:
        """False for a shape file without a tokenizer, of which sizes alone are wanted."""
        return self.context.body.buildable or TOKENIZER in self.context.files

    def _uncounted(self) -> Sequence[str]:
        if self._has_vocabulary:
            return ()
        return (f"{self.context.body.where} has no vocabulary, which comes on top",)

    def _vocabulary(self, description: Description) -> Metadata:
        (rows,) = {item.ref.spec.shape[0] for item in description.tensors if item.name == EMBEDDING}
        body = self.context.body
        if not self._has_vocabulary:
            return {}
        values = tokenizer_metadata(
            self.context.files,
            body.config,
            self.context.architecture.name,
            rows,
            self.tokenizer_pre,
            body.where,
        )
        tokens = len(values["tokenizer.ggml.tokens"].value)
        if tokens != rows:
            raise CheckpointError(
                f"has {tokens} tokens and an embedding of {rows} rows, which llama.cpp does not "
                "load",
                where=body.where,
                expected="as many",
            )
        return values

    def _file(
        self,
        named: Sequence[Named],
        types: Mapping[str, str],
        metadata: Metadata,
        importance: Mapping[str, TensorRef],
    ) -> GgufFile:
        graph = self.context.graph
        tensors = [
            made_of(item, types[item.name], importance.get(item.name), graph, self.backend)
            for item in named
        ]
        described = {
            item.name: Described(item.name, types[item.name], item.ref.spec.shape) for item in named
        }
        return GgufFile("", f"-{self.label}", metadata, tensors, described, may_split=True)

    def _importance(
        self, named: Sequence[Named], arch: str
    ) -> tuple[Importances | None, GgufFile | None]:
        """What the recipe names, and the file of what our own passes found."""
        if self.imatrix is None:
            return None, None
        graph = self.context.graph
        try:
            source = imatrix_source(self.imatrix, self.view, self.context)
            wanted = [
                _wanted(item)
                for item in named
                if quantizable(Tensor(item.name, item.shape, item.kind), arch)
            ]
            found = importance_refs(graph, source, wanted)
        except PlanError as error:
            raise error.revised(at=("imatrix",)) from None
        if not isinstance(source, Passes):
            return found, None
        items = imatrix_tensors(graph, source, wanted)
        facts = {item.name: item.fact for item in named}
        tensors = [
            OutputTensor(item.name, ref, facts[item.name.rpartition(".")[0]]) for item, ref in items
        ]
        metadata = imatrix_metadata(source.datasets, source.chunks, source.chunk_size)
        described = {item.name: item for item, _ in items}
        file = GgufFile("", f"-{STATISTICS.partition('.')[0]}", metadata, tensors, described, False)
        return found, file

    def _importance_file(self, found: Importances | None) -> ImportanceFile | None:
        """What the file says of the importance it was made with.

        Its name is that of the recipe, without a folder: where it lies on a machine is nobody's
        business, and would give the file other bytes on each.
        """
        if found is None or self.imatrix is None:
            return None
        source = next(iter(self.context.sources.values()))
        own = f"{PurePosixPath(source.spec.model).name}-{STATISTICS}"
        name = own if self.imatrix == OWN else PurePosixPath(self.imatrix.file).name
        dataset = found.datasets[0] if found.datasets else None
        return ImportanceFile(name, dataset, found.entries, found.chunks)

    def _check_importance(
        self,
        assigned: Iterable[Assigned],
        refs: Mapping[str, TensorRef],
        chosen: Mapping[str, Choice],
    ) -> None:
        for item in assigned:
            if item.needs_importance and item.tensor.name not in refs:
                raise PlanError(
                    f"{item.type} is of no use for {item.tensor.name} without its importance",
                    expected="a rule with another type" if self.imatrix else "`imatrix`",
                    at=chosen.get(item.tensor.name, Choice(None, ("mix",))).cause,
                )

    def _check_weighed(self) -> None:
        if self.imatrix is not None:
            raise PlanError(
                f"nothing is quantized by importance in {self.mix}",
                expected="no `imatrix`, or another mix",
                at=("imatrix",),
            )


def _check_heard(assigned: Sequence[Assigned], chosen: Mapping[str, Choice], arch: str) -> None:
    """Raise PlanError for types that llama-quantize does not give, whatever it is told.

    A rule may be about norms as well as matrices, as one for a whole layer is.
    """
    unheard: dict[tuple[str | int, ...], Assigned] = {}
    for item in assigned:
        choice = chosen.get(item.tensor.name)
        if choice is not None and choice.type not in (None, item.wanted):
            unheard.setdefault(choice.cause, item)
            if quantizable(item.tensor, arch):
                raise _unheard(item, choice)
    heard = {
        choice.cause
        for item in assigned
        for choice in [chosen.get(item.tensor.name)]
        if choice is not None and choice.type == item.wanted
    }
    for cause, item in unheard.items():
        if cause not in heard:
            raise _unheard(item, chosen[item.tensor.name])


def _unheard(item: Assigned, choice: Choice) -> PlanError:
    name = item.tensor.name
    return PlanError(
        f"{name} stays {item.type}: llama-quantize does not make it {choice.type}", at=choice.cause
    )


def _check_kept(assigned: Iterable[Assigned]) -> None:
    """Raise PlanError where codes that the checkpoint has would become those of another type."""
    for item in assigned:
        if item.requantized:
            raise PlanError(
                f"{item.tensor.name} is {item.tensor.type} in the checkpoint",
                expected="`mix: MXFP4_MOE`, which keeps it, or a step `- decode: {}`",
                at=("mix",),
            )


def _moved(
    assigned: Iterable[Assigned], plain: Iterable[Assigned], chosen: Mapping[str, Choice]
) -> dict[str, tuple[str, str]]:
    """The types with and without rules of tensors that no rule is about, where they differ.

    llama-quantize counts no tensor whose type it is told, so those after it have other places.
    """
    without = {item.tensor.name: item.type for item in plain}
    return {
        item.tensor.name: (item.type, without[item.tensor.name])
        for item in assigned
        if item.tensor.name not in chosen and item.type != without[item.tensor.name]
    }


def _told(moved: Mapping[str, tuple[str, str]]) -> list[str]:
    if not moved:
        return []
    name, (own, without) = next(iter(moved.items()))
    more = f", and {len(moved) - 1} more other types" if len(moved) > 1 else ""
    return [
        f"the rules give {name} {own} instead of {without}{more}: as in llama-quantize, a tensor"
        " that a rule is about does not count for those after it"
    ]


def _unfit(assigned: Iterable[Assigned]) -> list[str]:
    """What to tell of tensors whose columns are no whole blocks, a sentence for all that are alike.

    They get the type that llama-quantize falls back to.
    """
    alike: dict[str, list[Assigned]] = {}
    for item in assigned:
        if item.notice:
            alike.setdefault(item.notice.removeprefix(item.tensor.name), []).append(item)
    return [_together(items[0], len(items) - 1) for items in alike.values()]


def _together(first: Assigned, others: int) -> str:
    words = (first.notice or "").removeprefix(first.tensor.name)
    if not others:
        return first.tensor.name + words
    return f"{first.tensor.name} and {others} more" + words.replace("; it gets", "; they get")


def written_as(item: Named, outtype: str) -> str:
    """The type in which the converter writes a tensor to a file of `outtype`."""
    if item.codes is not None:
        return item.kind
    if item.kind == "matrix":
        return outtype
    return "F16" if item.kind == "half" and outtype == "F16" else "F32"


def _with_rules(
    request: Request, chosen: Mapping[str, Choice], written: Iterable[Tensor]
) -> Request:
    """Rules as llama-quantize is told of them: what stays gets the type that it has."""
    types = {
        item.name: chosen[item.name].type or item.type for item in written if item.name in chosen
    }
    named = {name: kind for name, kind in types.items() if name not in (OUTPUT, EMBEDDING)}
    return replace(request, named=named, output=types.get(OUTPUT), embedding=types.get(EMBEDDING))


def _wanted(item: Named) -> Wanted:
    """What importance a tensor could have."""
    # What is cut out of a matrix is given other vectors than that, or by other columns.
    whole = len(item.ref.spec.shape) == len(item.fact.shape)
    module = item.fact.module if item.fact.role in LINEARS and whole else None
    columns = Order(item.swapped[:3], _SWAPPED) if item.swapped is not None else None
    return Wanted(item.name, item.ref.spec.shape, module, columns)
