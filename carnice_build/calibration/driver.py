"""A Qwen3.5 text model in torch, one decoder layer at a time, as transformers computes it.

Hidden states and logits have the bits that the whole `transformers` model gives for one sample
without padding, at the same arithmetic.  Holds no more than the tensors it is given: the caller
gathers rows of the embedding, builds a layer, runs its samples through it and drops it.
Needs the `torch` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, Qwen3_5TextConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
)

from carnice_build.checkpoint.dtypes import NUMPY_NAME
from carnice_build.graph import TensorData

Kind = Literal["linear", "full"]

_TORCH_DTYPE = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_SAFETENSORS_DTYPE = {dtype: name for name, dtype in _TORCH_DTYPE.items()}
_KINDS: Mapping[Kind, str] = {"linear": "linear_attention", "full": "full_attention"}


class NonFiniteInput(Exception):
    """The input of `linear`, a module's name relative to its layer, held NaN or infinity."""

    def __init__(self, linear: str) -> None:
        super().__init__(linear)
        self.linear = linear


@dataclass(frozen=True)
class Arithmetic:
    """How a forward pass computes; all of it but `device` belongs into the key of what follows."""

    dtype: Literal["bfloat16", "float32"]
    attention: Literal["sdpa", "eager"]
    threads: int
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and hidden states."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]


def as_tensor(data: TensorData) -> Tensor:
    """The tensor over the memory of `data`, whose array must be writable; nothing is copied."""
    return torch.from_numpy(data.array).view(_TORCH_DTYPE[data.dtype])


def as_data(tensor: Tensor) -> TensorData:
    """The numpy side of a tensor; shares its memory when that is on the CPU and contiguous."""
    dtype = _SAFETENSORS_DTYPE[tensor.dtype]
    carried = tensor.detach().cpu().contiguous().view(getattr(torch, NUMPY_NAME[dtype]))
    return TensorData(dtype, carried.numpy())


@dataclass
class Past:
    """What one layer remembers of the `length` positions that it has seen; see `start_past`."""

    cache: DynamicCache
    length: int = 0


class LayerwiseModel:
    """The parts of one text model, whose layers are of `kinds`.

    Hidden states are [samples, length, hidden] of the arithmetic's type.
    Samples that run together have one length: there is no padding anywhere.
    """

    def __init__(self, text_config: Mapping[str, Any], arithmetic: Arithmetic) -> None:
        """Take a checkpoint's `text_config`; sets the threads of this process's torch."""
        torch.set_num_threads(arithmetic.threads)
        self.arithmetic = arithmetic
        kind_of = {theirs: ours for ours, theirs in _KINDS.items()}
        whole = Qwen3_5TextConfig(**text_config)
        self.kinds: tuple[Kind, ...] = tuple(kind_of[kind] for kind in whole.layer_types or ())
        # transformers asks a config by index for a layer's kind: one index for each is enough.
        two_layers = {"num_hidden_layers": len(_KINDS), "layer_types": list(_KINDS.values())}
        self.config = Qwen3_5TextConfig(**{**text_config, **two_layers})
        # None would mean eager, which without a mask is silently not causal.
        self.config._attn_implementation = arithmetic.attention
        # Its frequencies are in no checkpoint, so it cannot be made on meta.
        self._rotary = Qwen3_5TextRotaryEmbedding(self.config).to(arithmetic.device)

    def embed(self, rows: Tensor) -> Tensor:
        """Hidden states [1, length, hidden] of a sample, given its rows of the embedding."""
        return self.place(rows).unsqueeze(0)

    def layer(self, kind: Kind, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A decoder layer with `tensors`, named as in `mlp.up_proj.weight`.

        RuntimeError, which names them, when a tensor is missing, left over or of another shape.
        """
        with torch.device("meta"):
            layer = Qwen3_5DecoderLayer(self.config, list(_KINDS).index(kind))
        return self._filled(layer, tensors)

    def final_norm(self, weight: Tensor) -> nn.Module:
        """The norm behind the last layer, with its stored weight [hidden]; its gain is 1 + w."""
        with torch.device("meta"):
            norm = Qwen3_5RMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        return self._filled(norm, {"weight": weight})

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: Tensor, past: Past | None = None) -> Tensor:
        """What `layer` makes of `hidden`, causally.

        Without a `past` of the layer's own, `hidden` begins at position 0.
        With one, it goes on where the last pass ended, by one position at a time after the first.
        """
        start = past.length if past else 0
        steps = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        positions = steps.expand(hidden.shape[0], -1)
        mask = None
        if layer.block_type == _KINDS["full"]:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
        result: Tensor = layer(
            hidden,
            position_embeddings=self.rotary(hidden, positions),
            attention_mask=mask,
            past_key_values=past.cache if past else None,
        )
        if past:
            past.length += hidden.shape[1]
        return result

    def start_past(self) -> Past:
        """An empty memory for one layer, of either kind."""
        return Past(DynamicCache(config=self.config))

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for text at `positions` [samples, length], in the type of `hidden`."""
        # Time, height and width are one and the same for text.
        cosines, sines = self._rotary(hidden, positions.expand(3, -1, -1))
        return cosines, sines

    @torch.no_grad()
    def logits(self, norm: nn.Module, head: Tensor, hidden: Tensor) -> Tensor:
        """Scores [samples, length, vocabulary] for the next token, in the type of `hidden`."""
        return functional.linear(norm(hidden), self.place(head))

    def _filled(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        placed = {name: self.place(tensor) for name, tensor in tensors.items()}
        module.load_state_dict(placed, strict=True, assign=True)
        return module.requires_grad_(False).eval()

    def place(self, tensor: Tensor) -> Tensor:
        """`tensor` in the arithmetic's type and on its device; the same one if it is there."""
        return tensor.to(self.arithmetic.device, self.arithmetic.torch_dtype)


@contextmanager
def input_amax(layer: nn.Module) -> Iterator[dict[str, float]]:
    """While this is open, collect the largest magnitude that each linear of `layer` is given.

    Names are relative to the layer (`mlp.up_proj`).
    The figures are those of modelopt's max calibrator, per tensor.
    A pass raises NonFiniteInput on NaN or infinity.
    """
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = (end.item() for end in torch.aminmax(inputs[0]))
            amax = max(-low, high)
            if not amax < float("inf"):
                raise NonFiniteInput(name)
            found[name] = max(amax, found.get(name, 0.0))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
