"""A model whose family has no table, as far as the names and shapes of its tensors tell.

That is enough for formats that need no calibration and rename nothing.
What is not known is not claimed: which tensors should be there, which linears engines run as one,
how wide a token's activations are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from carnice_build.models.base import (
    MOST_LAYERS,
    QUANTIZATION,
    ConfigReader,
    FusedIn,
    Fusion,
    KvGeometry,
    Part,
    Passed,
    Role,
    SmoothingMapping,
    TensorFact,
)
from carnice_build.tensors import STACK

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"(?<=experts\.)(\d+)(?=\.)")
_TOWER = re.compile(r"(^|[._])(vision|visual|audio|vit|tower|projector|mm_)", re.IGNORECASE)
_ROUTER = re.compile(r"(^|[._])(router|gate|shared_expert_gate|wg)\.weight$")
_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe)\.weight$")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What `model_free_ptq` of llm-compressor takes for experts in one tensor, and for which ones."""


class Untabled:
    """Tensors by what their names look like; see `Architecture`."""

    def __init__(self, config: Mapping[str, Any], where: str, shapes: Shapes) -> None:
        """`shapes` are those of all tensors, by name."""
        self._source = dict(config), where, dict(shapes)
        self._root = ConfigReader(config, where)
        nested = self._root.states("text_config")
        self._text = self._root.section("text_config") if nested else self._root
        self.name = self._root.text("model_type", "a model without a type")
        self.dtype = self._root.text("dtype", "") or self._root.text("torch_dtype", "") or None
        self.num_layers = 1 + max(
            (fact.layer for fact in self.tensors.values() if fact.layer is not None), default=0
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Untabled, self._source

    @cached_property
    def tensors(self) -> Mapping[str, TensorFact]:
        """See `Architecture.tensors`: those that there are."""
        return {fact.name: fact for fact in _facts(self._source[2])}

    @property
    def built(self) -> Mapping[str, TensorFact]:
        """See `Architecture.built`."""
        return self.tensors

    @property
    def unread(self) -> Mapping[str, TensorFact]:
        """Nobody knows which."""
        return {}

    @property
    def ties(self) -> Mapping[str, str]:
        """Nothing is known to be another."""
        return {}

    @property
    def text_config(self) -> Mapping[str, Any]:
        """See `Architecture.text_config`."""
        return self._text.entries

    @property
    def layer_config(self) -> Mapping[str, Any]:
        """Nobody knows what announces an MTP head."""
        return self.text_config

    def published_config(self, parts: Container[Part]) -> dict[str, Any]:
        """As it is, but for how it was quantized."""
        return {key: value for key, value in self._source[0].items() if key not in QUANTIZATION}

    @property
    def kv_geometry(self) -> KvGeometry:
        """What most families call it; nothing where the config has other words."""
        text = self._text
        if not (text.states("num_key_value_heads") and text.states("hidden_size")):
            return KvGeometry(0, 1, 1)
        heads = text.count("num_attention_heads", 1)
        size = text.count("head_dim", max(1, text.count("hidden_size") // heads))
        return KvGeometry(self.num_layers, text.count("num_key_value_heads"), size)

    @property
    def max_positions(self) -> int:
        """The longest context, in tokens."""
        return self._text.count("max_position_embeddings", 4096)

    @property
    def dimensions(self) -> Mapping[str, int]:
        """Those that the config states."""
        names = ("hidden_size", "vocab_size")
        return {name: self._text.count(name) for name in names if self._text.states(name)}

    @property
    def fusions(self) -> Sequence[Fusion]:
        """None is known."""
        return ()

    def shared_inputs(self, layer: int) -> Sequence[Sequence[str]]:
        """Each linear by itself."""
        facts = self.tensors.values()
        return [[f.module] for f in facts if f.layer == layer and f.role is Role.LINEAR]

    def layer_kind(self, layer: int) -> str:
        """Nothing is known."""
        return "unknown"

    def layer_prefix(self, layer: int) -> str:
        """What the names of most layers begin with."""
        return f"model.layers.{layer}."

    def passed(self, layer: int) -> Sequence[Passed]:
        """Nothing is known."""
        return ()

    def optional(self, fact: TensorFact) -> bool:
        """What is there belongs there."""
        return False

    def engine_names(self, module: str) -> Sequence[str]:
        """See `Architecture.engine_names`: as checkpoints, for nothing else is known."""
        return (module,)

    def module_kind(self, name: str) -> str:
        """The module's path without numbers."""
        module = re.sub(r"\.(weight|scales|biases)$", "", name)
        return re.sub(r"^.*?\.?\w+\.\d+\.", "", module, count=1).replace(".*.", ".")

    def canonical_name(self, name: str) -> str | None:
        """No name is known to be better than another."""
        return None

    def keeps_dtype(self, name: str) -> bool:
        """Only what libraries of quantization cast is cast: weights."""
        return not name.endswith("weight")

    def offset_norm(self, name: str) -> bool:
        """None is known."""
        return False

    @property
    def smoothing(self) -> Sequence[SmoothingMapping]:
        """None is known."""
        return ()

    @property
    def narrow_linears(self) -> Sequence[str]:
        """None is known."""
        return ()

    def token_bytes(self, kind: str, width: int) -> int:
        """Nothing is calibrated without a table."""
        raise NotImplementedError(self.name)

    def attention_heads(self, kind: str) -> int:
        """Nothing is calibrated without a table."""
        raise NotImplementedError(self.name)

    @property
    def eager(self) -> bool:
        """Nothing is calibrated without a table."""
        raise NotImplementedError(self.name)

    @property
    def drafts(self) -> bool:
        """Nothing is known of heads."""
        return False

    def draft_head(self, attention: str, tensors: Mapping[str, Any]) -> Any:
        """Nothing is run without a table."""
        raise NotImplementedError(self.name)


def _facts(shapes: Shapes) -> Iterator[TensorFact]:
    stacks = _stacks(shapes)
    for name, shape in shapes.items():
        if name not in stacks:
            yield _fact(name, shape)
        elif isinstance(stack := stacks[name], TensorFact):
            yield stack
        else:
            yield from stack


def _fact(name: str, shape: tuple[int, ...], fused: FusedIn | None = None) -> TensorFact:
    part, role, layer = Part.BODY, Role.NORM if len(shape) == 1 else Role.STATE, None
    if (numbers := _LAYER.search(name)) and len(numbers[1]) < len(str(MOST_LAYERS)):
        part, layer = Part.LAYERS, int(numbers[1])
    if _TOWER.search(name):
        part, layer = Part.VISION, None
    if _EMBEDDING.search(name):
        part, role = (Part.EMBED if part is Part.BODY else part), Role.EMBEDDING
    elif _ROUTER.search(name):
        role = Role.ROUTER
    elif name.endswith(".weight") and len(shape) == (3 if STACK in name else 2):
        part, role = (Part.HEAD if part is Part.BODY else part), Role.LINEAR
    elif name.endswith(".bias"):
        role = Role.BIAS
    return TensorFact(name, shape, part, role, layer, fused)


def _stacks(shapes: Shapes) -> Mapping[str, TensorFact | Sequence[TensorFact]]:
    """Experts that are alike, as one: the fact at the first of each, nothing at the others."""
    members: dict[str, dict[int, str]] = {}
    for name in shapes:
        if match := _EXPERT.search(name):
            stack = f"{name[: match.start()]}*{name[match.end() :]}"
            members.setdefault(stack, {})[int(match[1])] = name
    found: dict[str, TensorFact | Sequence[TensorFact]] = {}
    for stack, names in members.items():
        if _alike(names, shapes) and stack.endswith(".weight"):
            shape = (len(names), *shapes[names[0]])
            found |= dict.fromkeys(names.values(), ())
            found[names[min(names)]] = _fact(stack, shape)
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        parts = _FUSED.get(last.removesuffix("weight").rstrip(".") or last, ())
        if owner.endswith("experts") and len(shape) == 3 and shape[1] % max(1, len(parts)) == 0:
            rows = shape[1] // max(1, len(parts))
            found[name] = [
                _fact(
                    f"{owner}.*.{part}.weight",
                    (shape[0], rows, shape[2]),
                    FusedIn(name, index, len(parts)),
                )
                for index, part in enumerate(parts)
            ] or [_fact(name, shape)]
    return found


def _alike(names: Mapping[int, str], shapes: Shapes) -> bool:
    sizes: Collection[tuple[int, ...]] = {shapes[name] for name in names.values()}
    return set(names) == set(range(len(names))) and len(sizes) == 1 and len(min(sizes)) == 2
