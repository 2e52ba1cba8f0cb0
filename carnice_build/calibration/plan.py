"""The plan of a calibration: its samples, and the layers to run them through.

What is done to a layer, and which actions follow from it, is for who asks for the layers:
`chain`, and formats with a step of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from carnice_build.calibration.beside import Beside, told
from carnice_build.calibration.passes import Embed
from carnice_build.calibration.source import CalibrationSource
from carnice_build.calibration.tokens import LongestFirst, Tokens
from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.datasets import whole_file
from carnice_build.dtypes import FLOAT_NAMES, ITEM_SIZE, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ANY_GPU, TensorRef, View
from carnice_build.models.base import Part, Passed, Role, TensorFact
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


class Calibration:
    """The samples of a calibration, before the first layer, and the layers to run them through.

    `tokens` is I32 [samples, length], `start` the hidden states [samples, length, hidden].
    """

    def __init__(self, view: View, source: CalibrationSource, order: Order = "given") -> None:
        """Calibrate the text model in `view` over `source`.

        The samples stand in `order` unless the recipe says in which.
        PlanError for an attention that transformers lacks for the family.
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
        self.tokens = self._tokens()
        if (self._spec.order or order) == "longest":
            params = {"processor": vector_instructions()}
            (self.tokens,) = self.graph.add(LongestFirst(), params, self.tokens)
        self.start = self._embed()

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
        )

    @property
    def of_tokens(self) -> Mapping[tuple[int, str], TensorRef]:
        """What layers are given that is made of tokens, by their numbers and what it is called."""
        return self._before_layers[0]

    @property
    def outside(self) -> tuple[TensorRef | None, tuple[str, ...]]:
        """The largest inputs of linears before the layers, F32 [linears], and their module paths.

        None without any.
        """
        return self._before_layers[1:]

    @cached_property
    def _before_layers(
        self,
    ) -> tuple[Mapping[tuple[int, str], TensorRef], TensorRef | None, tuple[str, ...]]:
        given = {
            (layer, item.argument): item
            for layer, passed in enumerate(self._passed)
            for item in passed
            if item.maker is None
        }
        if not given:
            return {}, None, ()
        parts = (Part.EMBED, Part.BODY)
        facts = [f for f in self._architecture.tensors.values() if f.part in parts]
        linears = tuple(fact.module for fact in facts if fact.role is Role.LINEAR)
        params = {
            "names": [fact.name for fact in facts],
            "tables": [fact.name for fact in facts if fact.role is Role.EMBEDDING],
            "linears": list(linears),
            "given": [[layer, told(item)] for (layer, _), item in given.items()],
            **self._arithmetic(),
        }
        op = Beside(frozenset(range(len(given))))
        tensors = (self._view[fact.name] for fact in facts)
        *made, amax = self.graph.add(op, params, self.tokens, *tensors)
        return dict(zip(given, made, strict=True)), amax, linears

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
        length, spec, architecture = self.start.spec.shape[1], self._spec, self._architecture
        token = architecture.token_bytes(kind, ITEM_SIZE[FLOAT_NAMES[spec.dtype]])
        if spec.attention == EAGER:
            # The scores, their softmax in float32, and both once more on the way.
            token += 12 * architecture.attention_heads(kind) * length
        return length * token

    def _embed(self) -> TensorRef:
        facts = self._architecture.tensors.values()
        table = next(fact for fact in facts if fact.part is Part.EMBED)
        params = {"dtype": FLOAT_NAMES[self._spec.dtype]}
        (hidden,) = self.graph.add(Embed(), params, self.tokens, self._view[table.name])
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
                expected=f"an entry for profile {profile}, or `default`"
                if profile
                else "`default`",
            )
        if found < least:
            raise PlanError(f"calibration.{name} is {found}", expected=f"at least {least}")
        return found


def _tokenizer(body: Checkpoint) -> TensorRef:
    file = body.assets.get("tokenizer.json")
    if file is None and body.buildable:
        raise PlanError("has no tokenizer.json, which the calibration needs", where=body.where)
    if file is None:
        return _file_ref(SourceTensor("tokenizer.json", TensorSpec("U8", (0,)), None, 0))
    return _file_ref(whole_file(file))


def _file_ref(tensor: SourceTensor) -> TensorRef:
    return TensorRef(tensor.spec, tensor)
