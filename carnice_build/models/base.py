"""What an architecture table says of a tensor, and how tables read a config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from carnice_build.errors import CheckpointError
from carnice_build.tensors import STACK


class Part(StrEnum):
    """The part of a model that a tensor belongs to; parts are never split across roles."""

    EMBED = "embed"
    LAYERS = "layers"
    BODY = "body"
    HEAD = "head"
    MTP = "mtp"
    TOWER = "tower"
    """An encoder of pictures or of sound."""


OPTIONAL_PARTS = (Part.MTP, Part.TOWER)
"""What checkpoints may lack, each as a whole."""


class Role(StrEnum):
    """What a tensor does in its module."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    """A matrix [rows, columns] that inputs are multiplied with, or a stack of such."""
    ROUTER = "router"
    """A matrix that says which experts a token goes to, or how much of a shared one it gets."""
    BIAS = "bias"
    NORM = "norm"
    CONV = "conv"
    STATE = "state"
    VISION = "vision"


QUANTIZABLE = (Role.EMBEDDING, Role.LINEAR)

LINEARS = (Role.LINEAR, Role.ROUTER)
"""What engines build as linears, and take for quantized unless a config says otherwise."""


@dataclass(frozen=True, slots=True)
class FusedIn:
    """Another way in which checkpoints hold a stack of experts: in one tensor, with others perhaps.

    Tensor `name` is [experts, of * rows, ...], of whose rows, in each expert, the stack has part
    number `part`, below the parts before it; if they take `turns`, it has each `of`-th row.
    The tensor called `turned` has columns for rows: [experts, columns, of * rows].
    """

    name: str
    part: int = 0
    of: int = 1
    turns: bool = False
    turned: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What the tensor may be called."""
        return (self.name,) if self.turned is None else (self.name, self.turned)

    def rows(self, rows: int) -> tuple[int, int, int]:
        """First, stop and step of a stack of so many `rows` among those of an expert."""
        if self.turns:
            return self.part, self.of * rows, self.of
        return self.part * rows, (self.part + 1) * rows, 1


@dataclass(frozen=True, slots=True)
class TensorFact:
    """One tensor that an architecture calls for: canonical name, shape, part, role and layer.

    A `*` in the name stands for the number of an expert: such a fact is of a *stack*, which holds
    the weights of all experts of a layer, [experts, rows, columns].
    `fused` is how else checkpoints hold it.
    One that is `optional` may be absent where the rest of its part is there: engines then take
    another tensor of the model in its place.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    role: Role
    layer: int | None = None
    fused: FusedIn | None = None
    optional: bool = False

    @property
    def module(self) -> str:
        """The path of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def stacked(self) -> bool:
        """Whether this is a stack of experts."""
        return STACK in self.name


@dataclass(frozen=True, slots=True)
class Fusion:
    """Linears that serving engines run as one, under one module's name."""

    module: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The numbers that the size of a KV cache follows from.

    `draft_layers` are the full-attention layers of the MTP head, which have a cache of their own.
    """

    full_attention_layers: int
    kv_heads: int
    head_dim: int
    draft_layers: int = 0


@dataclass(frozen=True, slots=True)
class SmoothingMapping:
    """The output of module `smooth` is divided, and the weights of `balance` multiplied.

    Names are relative to the decoder layer, as in `mlp.up_proj`; `balance` is all that reads the
    output, whether it is quantized or, as a router, never is.
    What experts have of one kind is smoothed expert by expert where `smooth` is a stack, too.
    A module of several in one, as `mlp.gate_up_proj`, is divided in its last rows.
    """

    smooth: str
    balance: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Passed:
    """What a decoder layer is given beside hidden states, for each sample.

    `argument` is the parameter of its `forward` in transformers.
    Without `key` that is a tensor, which the model makes of tokens before its layers; with one it
    is a mapping in which layer `maker` has put a tuple of tensors under `key`.
    `shapes` are those of the tensors, with None in the place of the sample's length.
    """

    argument: str
    shapes: tuple[tuple[int | None, ...], ...]
    key: str | None = None
    maker: int | None = None


class Architecture(ABC):
    """A model family's table, evaluated for one config; see `table` for those in YAML.

    Can be pickled, for worker processes read it too.
    `tabled` is false where names and shapes of tensors are all that is known, and nothing is
    checked by it: see `untabled`.
    """

    name: str
    num_layers: int
    dtype: str | None
    tabled: ClassVar[bool] = True

    @property
    def unchecked(self) -> Sequence[str]:
        """What no plan checks of such a model, in sentences."""
        return ()

    def of(self, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
        """What the model is if its tensors have these names and shapes: by a table, the same."""
        return self

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorFact]:
        """Every tensor that the config calls for, by canonical name, in model order."""

    @property
    def built(self) -> Mapping[str, TensorFact]:
        """`tensors`, and among them those of `ties`: a weight for every module of the model."""
        return self.tensors

    @property
    def unread(self) -> Mapping[str, TensorFact]:
        """Tensors that checkpoints may hold, too, though no model reads them."""
        return {}

    @property
    def ties(self) -> Mapping[str, str]:
        """What no file needs to hold, because it is another tensor of the model: a tied head."""
        return {}

    @property
    @abstractmethod
    def text_config(self) -> Mapping[str, Any]:
        """The entries that describe the text model, in the spelling of `published_config`.

        Their `model_type` is the one that transformers gives it, of which it makes a causal
        language model; what it would not understand is there in its own words, too.
        """

    @property
    def layer_config(self) -> Mapping[str, Any]:
        """`text_config` without what announces an MTP head: all that decoder layers depend on."""
        return self.text_config

    @abstractmethod
    def published_config(self, parts: Container[Part]) -> dict[str, Any]:
        """The config.json of a folder that holds these `parts`, before any quantization.

        A model has one, whatever the spelling of its source; it announces no MTP head that the
        folder does not hold.
        A vision tower that was left out stays in it: engines build it as long as the model is of
        this class.
        """

    @property
    @abstractmethod
    def kv_geometry(self) -> KvGeometry:
        """What the size of a KV cache follows from."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """The longest context, in tokens."""

    @property
    @abstractmethod
    def dimensions(self) -> Mapping[str, int]:
        """What two checkpoints must have in common for tensors of one to fit into the other."""

    @property
    def fusions(self) -> Sequence[Fusion]:
        """The modules that serving engines fuse, of the MTP head too."""
        return ()

    def shared_inputs(self, layer: int) -> Sequence[Sequence[str]]:
        """The linears of a decoder layer, by module path; those of one group read one input."""
        facts = self.tensors.values()
        return [[f.module] for f in facts if f.layer == layer and f.role is Role.LINEAR]

    @abstractmethod
    def layer_kind(self, layer: int) -> str:
        """What kind of decoder layer number `layer` is.

        One of transformers' layer types, without the `_attention` that most end in: `full`.
        Layers of one kind compute alike, whatever their numbers.
        """

    @abstractmethod
    def layer_prefix(self, layer: int) -> str:
        """What the names of the layer's tensors begin with."""

    def passed(self, layer: int) -> Sequence[Passed]:
        """What decoder layer number `layer` is given beside hidden states, most often nothing."""
        return ()

    @abstractmethod
    def module_kind(self, name: str) -> str:
        """What tables call the module of tensor `name`."""

    def engine_names(self, module: str) -> Sequence[str]:
        """What lists for engines call `module`, or a tensor of it: most often as checkpoints do.

        Where transformers builds it under another path, that one, for it takes lists as they are;
        and also the checkpoint's, for vLLM turns lists into its own names as it does tensors.
        """
        return (module,)

    def canonical_name(self, name: str) -> str | None:
        """The name that a misprefixed `name` should have, or None."""
        return None

    def keeps_dtype(self, name: str) -> bool:
        """True for tensors whose type libraries leave alone when they cast a model."""
        return False

    def offset_norm(self, name: str) -> bool:
        """True for norms that store w for a gain of 1 + w."""
        return False

    @property
    def smoothing(self) -> Sequence[SmoothingMapping]:
        """What AWQ may smooth in decoder layers, as llm-compressor has it for this model."""
        return ()

    @property
    def narrow_linears(self) -> Sequence[str]:
        """Globs of weights that engines do not take in INT4, for they are too small."""
        return ()

    @abstractmethod
    def token_bytes(self, kind: str, width: int) -> int:
        """Most bytes that a layer of `kind` needs for a token, at `width` bytes an activation.

        Without the weights, and without the scores that eager attention writes down.
        """

    @abstractmethod
    def attention_heads(self, kind: str) -> int:
        """Heads of a layer of `kind` that score each token by all before it; 0 if none does."""

    @property
    def eager(self) -> bool:
        """True where transformers has no attention for the family but `eager`."""
        return False

    @property
    def drafts(self) -> bool:
        """Whether it is known what an MTP head computes, so that there is a `draft_head`."""
        return False

    def draft_head(self, attention: str, tensors: Mapping[str, Any]) -> Any:
        """The MTP head as a torch module, in workers; see `verification.drafting.DraftHead`.

        `attention` is transformers' implementation; `tensors` are those of part `mtp`, by their
        canonical names, of the type to compute in.
        """
        raise NotImplementedError(f"{self.name} has no MTP head that could be run")

    @property
    def mlx_drafter(self) -> str | None:
        """The model type of the folder that mlx-vlm makes of the MTP head, None if of none."""
        return None


QUANTIZATION = ("quantization_config", "quantization")
"""The entries of a config that say how weights are quantized; null or empty, they say nothing."""

MOST_EXPERTS = 10_000
"""In one layer; as with layers."""

MOST_LAYERS = 10_000
"""No model comes near it; a config that says more would only exhaust memory."""


class ConfigReader:
    """Typed access to a config section; a missing or ill-typed entry is a CheckpointError.

    A null states nothing, so it is as good as missing.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self.where = where

    def error(self, key: str, expected: str) -> CheckpointError:
        """The error for entry `key`."""
        value = self._config.get(key, "missing")
        return CheckpointError(
            f"config entry {key} is {value!r}", where=self.where, expected=expected
        )

    @property
    def entries(self) -> Mapping[str, Any]:
        """The section as it is."""
        return self._config

    def states(self, key: str) -> bool:
        """True when there is an entry `key`."""
        return self._config.get(key) is not None

    def _value(self, key: str, default: object) -> object:
        return self._config[key] if self.states(key) else default

    def section(self, key: str) -> ConfigReader:
        """The nested section `key`."""
        value = self._config.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "a section")
        return ConfigReader(value, f"{self.where}: {key}")

    def optional_section(self, key: str) -> Mapping[str, Any]:
        """The entries of the nested section `key`, none when it is missing."""
        return self.section(key).entries if self.states(key) else {}

    def count(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """An integer from `least` to `most`."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"a count from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that is not 0 or less."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(key, "a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A list of strings."""
        value = self._value(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return tuple(value)
