"""The plan of a calibration: its samples, in parts, and the layers to run them through.

What is done to a layer, and which actions follow from it, is for who asks for the layers:
`chain`, and formats with a step of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from carnice_build.calibration.beside import Beside, told
from carnice_build.calibration.parts import Cut, shares
from carnice_build.calibration.passes import Embed
from carnice_build.calibration.source import CalibrationSource
from carnice_build.calibration.tokens import LongestFirst, LongestOrder, Tokens
from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.datasets import whole_file
from carnice_build.dtypes import FLOAT_NAMES, ITEM_SIZE, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ANY_GPU, TensorRef, View
from carnice_build.models.base import Part, Passed, Role, TensorFact
from carnice_build.models.caches import key_linears
from carnice_build.processor import gpus, vector_instructions
from carnice_build.recipe.schema import ByProfile, Order, count_for
from carnice_build.tensors import SourceTensor

AUTO, CPU = "auto", "cpu"
"""Devices that a recipe may name, beside one GPU of several."""

EAGER = "eager"
"""The attention that transformers has for every family, and that writes its scores down."""


@dataclass(frozen=True)
class LayerPart:
    """A decoder layer as actions on it need it: its tensors, and what decides how it computes.

    `facts` are what its family's table says of `weights`.
    `names` are those of `weights` within the layer, `linears` those of its linear modules;
    `params` holds what every forward pass through the layer depends on.
    `given` and `made` are what it is given beside hidden states, and makes for others.
    `workspace` are the bytes that one sample of full length needs inside the layer.
    `caches` says that it keeps keys and values of its own.
    """

    prefix: str
    facts: tuple[TensorFact, ...]
    names: tuple[str, ...]
    linears: tuple[str, ...]
    weights: tuple[TensorRef, ...]
    params: Mapping[str, Any]
    given: tuple[Passed, ...]
    made: tuple[Passed, ...]
    workspace: int
    caches: bool


@dataclass(frozen=True)
class Samples:
    """Samples that pass through the layers together, in one chain of actions.

    `first` is what number the first of them has among all.
    `tokens` is I32 [samples, length], `start` the hidden states [samples, length, hidden].
    `of_tokens` is what layers are given that is made of tokens, by their numbers and what it is
    called; `outside` are the largest inputs of linears before the layers, F32 [linears], None
    without any.
    """

    first: int
    tokens: TensorRef
    start: TensorRef
    of_tokens: Mapping[tuple[int, str], TensorRef]
    outside: TensorRef | None


class Calibration:
    """The samples of a calibration, before the first layer, and the layers to run them through.

    `parts` are what the samples are cut into, in their order; `outside_linears` the module paths
    of the linears before the layers, whose inputs each part tells of.
    """

    def __init__(self, view: View, source: CalibrationSource, order: Order = "given") -> None:
        """Calibrate the text model in `view` over `source`.

        The samples stand in `order` unless the recipe says in which.
        PlanError for an attention that transformers lacks for the family, and for counts of
        samples, tokens and parts that cannot be.
        """
        self._source = source
        self._spec = source.spec
        self._view = view
        self._architecture = architecture = source.architecture
        if architecture.eager and self._spec.attention != EAGER:
            raise PlanError(
                f"transformers has no attention {self._spec.attention} for {architecture.name}",
                expected=f"calibration.attention: {EAGER}",
            )
        self.graph = source.graph
        layers = range(self._architecture.num_layers)
        self._passed = [tuple(self._architecture.passed(layer)) for layer in layers]
        self._caching = key_linears(architecture).keys()
        self._given_tokens = tokens = self._tokens()
        self._ordered = bool(self._spec.order) or order == "longest"
        if (self._spec.order or order) == "longest":
            params = {"processor": vector_instructions()}
            (tokens,) = self.graph.add(LongestFirst(), params, tokens)
        self._length = tokens.spec.shape[1]
        self.outside_linears = self._outside_linears()
        self.parts = [self._part(first, cut) for first, cut in self._cut(tokens)]

    def whole(self, what: str) -> Samples:
        """All samples in one chain, for `what`, which does not follow from what parts find.

        PlanError where the recipe cuts them.
        """
        if len(self.parts) > 1:
            raise PlanError(
                f"{what} takes all samples together, and calibration.parts is {len(self.parts)}",
                where=self._source.where("parts"),
                expected="1",
            )
        return self.parts[0]

    def longest_order(self) -> TensorRef | None:
        """The numbers of samples as llm-compressor would take them, I32 [samples].

        None where they pass in it, or the recipe says in which order they do.
        """
        if self._ordered:
            return None
        params = {"processor": vector_instructions()}
        (order,) = self.graph.add(LongestOrder(), params, self._given_tokens)
        return order

    def layer(self, layer: int) -> LayerPart:
        """Decoder layer number `layer`."""
        architecture = self._architecture
        prefix = architecture.layer_prefix(layer)
        facts = [
            fact
            for fact in architecture.tensors.values()
            if fact.layer == layer and fact.part is Part.LAYERS
        ]
        names = tuple(fact.name.removeprefix(prefix) for fact in facts)
        linears = (fact.module for fact in facts if fact.role is Role.LINEAR)
        given, made = self._passed[layer], self._made_by(layer)
        beside = {"given": [told(item) for item in given], "made": [told(item) for item in made]}
        return LayerPart(
            prefix,
            tuple(facts),
            names,
            tuple(module.removeprefix(prefix) for module in linears),
            tuple(self._view[fact.name] for fact in facts),
            {
                "names": list(names),
                "layer": layer,
                **{name: items for name, items in beside.items() if items},
                **self._arithmetic(),
            },
            given,
            made,
            self._workspace(architecture.layer_kind(layer)),
            layer in self._caching,
        )

    def _cut(self, tokens: TensorRef) -> Iterator[tuple[int, TensorRef]]:
        """The tokens of each part, and what number its first sample has."""
        samples, count = tokens.spec.shape[0], self._count("parts", self._spec.parts, 1)
        if count > samples:
            raise self._refused("parts", count, f"at most {samples}, the number of samples")
        if count == 1:
            yield 0, tokens
            return
        sizes = shares(samples, count)
        cuts = self.graph.add(Cut(), {"sizes": sizes}, tokens)
        yield from zip(accumulate(sizes[:-1], initial=0), cuts, strict=True)

    def _part(self, first: int, tokens: TensorRef) -> Samples:
        of_tokens, outside = self._before_layers(first, tokens)
        return Samples(first, tokens, self._embed(tokens), of_tokens, outside)

    def _before_layers(
        self, first: int, tokens: TensorRef
    ) -> tuple[Mapping[tuple[int, str], TensorRef], TensorRef | None]:
        """What layers are given that is made of these tokens, and amax of what stands before."""
        given = self._given_of_tokens()
        if not given:
            return {}, None
        facts = self._facts_before()
        params = {
            "names": [fact.name for fact in facts],
            "tables": [fact.name for fact in facts if fact.role is Role.EMBEDDING],
            "linears": list(self.outside_linears),
            "given": [[layer, told(item)] for (layer, _), item in given.items()],
            **self._arithmetic(),
        }
        op = Beside(frozenset(range(len(given))), first)
        tensors = (self._view[fact.name] for fact in facts)
        *made, amax = self.graph.add(op, params, tokens, *tensors)
        return dict(zip(given, made, strict=True)), amax

    def _given_of_tokens(self) -> Mapping[tuple[int, str], Passed]:
        return {
            (layer, item.argument): item
            for layer, passed in enumerate(self._passed)
            for item in passed
            if item.maker is None
        }

    def _facts_before(self) -> list[TensorFact]:
        parts = (Part.EMBED, Part.BODY)
        return [fact for fact in self._architecture.tensors.values() if fact.part in parts]

    def _outside_linears(self) -> tuple[str, ...]:
        if not self._given_of_tokens():
            return ()
        return tuple(fact.module for fact in self._facts_before() if fact.role is Role.LINEAR)

    def _made_by(self, layer: int) -> tuple[Passed, ...]:
        """What a layer makes for those behind it, each once."""
        made = (item for passed in self._passed for item in passed if item.maker == layer)
        return tuple({(item.argument, item.key): item for item in made}.values())

    def _arithmetic(self) -> dict[str, Any]:
        """What every forward pass depends on, whichever layer it is through."""
        spec = self._spec
        device = spec.device
        if device == AUTO:
            device = ANY_GPU if gpus() else CPU
        return {
            "config": dict(self._architecture.layer_config),
            "dtype": spec.dtype,
            "attention": spec.attention,
            "threads": spec.threads,
            "device": device,
            "processor": vector_instructions(),
            **({"gpus": list(gpus())} if device != CPU else {}),
        }

    def _workspace(self, kind: str) -> int:
        length, spec, architecture = self._length, self._spec, self._architecture
        token = architecture.token_bytes(kind, ITEM_SIZE[FLOAT_NAMES[spec.dtype]])
        if spec.attention == EAGER:
            # The scores, their softmax in float32, and both once more on the way.
            token += 12 * architecture.attention_heads(kind) * length
        return length * token

    def _embed(self, tokens: TensorRef) -> TensorRef:
        facts = self._architecture.tensors.values()
        table = next(fact for fact in facts if fact.part is Part.EMBED)
        params = {"dtype": FLOAT_NAMES[self._spec.dtype]}
        (hidden,) = self.graph.add(Embed(), params, tokens, self._view[table.name])
        return hidden

    def _tokens(self) -> TensorRef:
        spec, dataset, body = self._spec, self._source.dataset, self._source.body
        template = next(iter(template_files(self._source.files).values()), None)
        params: dict[str, Any] = {
            "samples": self._count("samples", spec.samples, 1),
            "length": self._count("length", spec.length, 2),
            "roles": spec.roles,
            "template": template,
            "special_tokens": special_tokens(self._source.files),
        }
        inputs = [_tokenizer(body)]
        if dataset.file is not None:
            params["rows"] = dataset.file.name.rpartition(".")[2]
            inputs.append(_file_ref(whole_file(dataset.file)))
        else:
            params["dataset"] = {
                "name": dataset.name,
                "subset": spec.subset,
                "split": spec.split,
                "commit": dataset.commit,
            }
        if spec.joined:
            params["joined"] = True
        (tokens,) = self.graph.add(Tokens(), params, *inputs)
        return tokens

    def _count(self, name: str, count: ByProfile, least: int) -> int:
        profile = self._source.profile
        found = count_for(count, profile)
        if found is None:
            raise PlanError(
                f"calibration.{name} says nothing for this checkpoint",
                where=self._source.where(name),
                expected=f"an entry for profile {profile}, or `default`"
                if profile
                else "`default`",
            )
        if found < least:
            raise self._refused(name, found, f"at least {least}")
        return found

    def _refused(self, name: str, count: int, expected: str) -> PlanError:
        where = self._source.where(name)
        return PlanError(f"calibration.{name} is {count}", where=where, expected=expected)


def _tokenizer(body: Checkpoint) -> TensorRef:
    file = body.assets.get("tokenizer.json")
    if file is None and body.buildable:
        raise PlanError("has no tokenizer.json, which the calibration needs", where=body.where)
    if file is None:
        return _file_ref(SourceTensor("tokenizer.json", TensorSpec("U8", (0,)), None, 0))
    return _file_ref(whole_file(file))


def _file_ref(tensor: SourceTensor) -> TensorRef:
    return TensorRef(tensor.spec, tensor)
