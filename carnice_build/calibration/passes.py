"""Calibration: forward passes as actions, cut at the decoder layer.

tokens -> hidden(0) -> for each layer *i*: forward(i) -> hidden(i + 1), amax(i)

The hidden states are large and go when the next layer is done; what is kept of a layer are the
largest magnitudes that its linears were given.
No key holds anything of the quantizer, so all recipes of one body and one dataset share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from carnice_build.calibration.beside import Beside, passed_specs, told
from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.samples import samples, table_rows
from carnice_build.calibration.source import CalibrationSource
from carnice_build.calibration.tokens import LongestFirst, Tokens
from carnice_build.chat.files import template_files
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.checkpoint.checkpoint import Checkpoint
from carnice_build.checkpoint.datasets import whole_file
from carnice_build.dtypes import FLOAT_NAMES, ITEM_SIZE, NUMPY_NAME, TensorSpec
from carnice_build.errors import PlanError
from carnice_build.graph import ProcessOp, TensorRef, View
from carnice_build.models.base import Part, Passed, Role
from carnice_build.processor import vector_instructions
from carnice_build.recipe.schema import ByProfile, Order, count_for
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import STACK, SourceTensor, numbered


class Embed(ProcessOp):
    """The rows of the embedding for each token: the hidden states before the first layer.

    Inputs: tokens I32 [samples, length]; the embedding [vocabulary, hidden].
    Output: [samples, length, hidden] of `dtype`, zero behind the end of a sample.
    Parameter: `dtype`.
    """

    name = "calibration.embed"
    version = 1
    libraries = ("numpy",)
    transient = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states."""
        tokens, table = inputs
        return (TensorSpec(params["dtype"], (*tokens.shape, table.shape[1])),)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The tokens, and one sample twice."""
        (hidden,) = self.infer(params, inputs)
        return inputs[0].nbytes + 2 * hidden.row_bytes

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for a token that has no row."""
        import numpy as np

        from carnice_build.kernels.elementwise import cast

        table = inputs[1]
        for index, tokens in enumerate(samples(inputs[0])):
            rows = table_rows(table, tokens)
            out = np.empty(rows.shape, NUMPY_NAME[params["dtype"]])
            cast(rows, table.spec.dtype, params["dtype"], out)
            outputs[0].write_row(index, out)


@dataclass(frozen=True)
class Forward(ProcessOp):
    """One decoder layer over every sample, as transformers computes it.

    `workspace` are the bytes that one sample needs inside the layer; it changes no result.

    Inputs: tokens; hidden states [samples, length, hidden]; the layer's tensors; then what it is
    given beside them (`beside.passed_specs`).
    Outputs: the layer's own hidden states; amax F32 [linears], the largest magnitude of each
    linear's inputs over all samples, as modelopt's max calibrator has it; last, what the layer
    makes for others to be given.
    A stack of experts is as many linears; one that no token was sent to has 0.
    Parameters: `names` (of the tensors, within the layer), `linears` (of the modules in amax),
    `layer` (its number), `given` and `made` (`beside.told`, where there is any), `config` of the
    text model, and `dtype`, `attention`, `threads`, `device` and `processor` of the arithmetic.

    The number and the whole config are parameters though most layers compute alike whatever theirs:
    what else a layer depends on, only the code of its family knows.  That costs nothing within a
    model, whose layers never have equal tensors, and between models of equal layers but another
    depth it costs what they might have shared.
    """

    name = "calibration.forward"
    version = 3
    libraries = LAYER_LIBRARIES

    workspace: int = 0
    transient: frozenset[int] = frozenset({0})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, amax, and what is made."""
        amax = TensorSpec("F32", (sum(linear_counts(params, inputs[2:])),))
        return inputs[1], amax, *made_specs(params, inputs)

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample."""
        return inputs[0].shape[0]

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The layer, and what one sample of full length needs inside it."""
        return layer_memory(params, inputs, self.workspace)

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for NaN or infinity in what a linear is given.

        And BackendError for a linear of whose inputs nothing is known.
        """
        import numpy as np

        from carnice_build.calibration.layer_files import layer_name
        from carnice_build.calibration.layer_pass import run_layer

        made = len(outputs) - len(made_specs(params, [file.spec for file in inputs]))
        given = 2 + len(params["names"])
        seen = run_layer(
            params,
            samples(inputs[0]),
            inputs[1],
            inputs[2:given],
            inputs[given:],
            (outputs[0], *outputs[made:]),
            progress,
        )
        counts = linear_counts(params, [file.spec for file in inputs[2:]])
        linears = map(numbered, params["linears"], counts)
        prefix = layer_name(params, inputs[2:])
        outputs[1].write(np.array(seen.largest(linears, prefix), np.float32))
        for file in outputs[2:made]:
            stack = next(name for name in params["linears"] if STACK in name)
            experts = numbered(stack, file.spec.size)
            file.write(np.array([seen.tokens.get(name, 0) for name in experts], np.int64))


class ForwardExperts(Forward):
    """`Forward` through a layer with stacks of experts.

    The third output, I64 [experts], says how many tokens each expert was sent.
    """

    name = "calibration.forward_experts"
    figures = frozenset({2})

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """Hidden states, amax, counts, and what is made."""
        hidden, amax, *made = super().infer(params, inputs)
        counts = TensorSpec("I64", (max(linear_counts(params, inputs[2:])),))
        return hidden, amax, counts, *made


def made_specs(params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """What a layer makes for layers behind it."""
    return passed_specs(params["dtype"], inputs[0], params.get("made", ()))


def linear_counts(params: Mapping[str, Any], weights: Sequence[TensorSpec]) -> list[int]:
    """How many linears each entry of `linears` stands for: as many as there are experts, or one.

    `weights` are the tensors of `names`, and whatever comes behind them.
    """
    named = dict(zip(params["names"], weights, strict=False))
    return [
        named[f"{linear}.weight"].shape[0] if STACK in linear else 1 for linear in params["linears"]
    ]


def layer_memory(params: Mapping[str, Any], inputs: Sequence[TensorSpec], workspace: int) -> int:
    """Bytes for a layer beside what one sample needs inside it, `workspace`.

    `inputs` are tokens, hidden states, the layer's tensors, and what it is given of each sample.

    Fitted to `python -m benchmarks.calibration` on a CPU with torch 2.13 and transformers 5.17:
    1.05 to 1.25 times what was taken.
    """
    dtype = FLOAT_NAMES[params["dtype"]]
    named = list(zip(params["names"], inputs[2:], strict=False))
    weights = sum(spec.nbytes for _, spec in named)
    passed = (*inputs[2 + len(named) :], *made_specs(params, inputs))
    # What is cast is there twice, and so are stacks of experts, which transformers fuses.
    twice = (spec for name, spec in named if spec.dtype != dtype or STACK in name)
    placed = sum(spec.size * ITEM_SIZE[dtype] for spec in twice)
    beside = 2 * sum(spec.row_bytes for spec in passed)
    return (128 << 20) + weights + placed + beside + workspace


@dataclass(frozen=True)
class LayerPart:
    """A decoder layer as actions on it need it: its tensors, and what decides how it computes.

    `names` are those of `weights` within the layer, `linears` those of its linear modules;
    `params` holds what every forward pass through the layer depends on.
    `given` and `made` are what it is given beside hidden states, and makes for others.
    `workspace` are the bytes that one sample of full length needs inside the layer.
    """

    prefix: str
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
        """
        self._source = source
        self._spec = source.spec
        self._view = view
        self._architecture = source.architecture
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
        return {
            "config": dict(self._architecture.layer_config),
            "dtype": spec.dtype,
            "attention": spec.attention,
            "threads": spec.threads,
            "device": spec.device,
            "processor": vector_instructions(),
        }

    def _workspace(self, kind: str) -> int:
        length, spec, architecture = self.start.spec.shape[1], self._spec, self._architecture
        token = architecture.token_bytes(kind, ITEM_SIZE[FLOAT_NAMES[spec.dtype]])
        if spec.attention == "eager":
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
