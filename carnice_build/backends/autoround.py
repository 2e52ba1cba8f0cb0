"""AutoRound's sign-gradient rounding, driven through auto-round one decoder layer at a time.

The algorithm (https://aclanthology.org/2024.findings-emnlp.662) and its arithmetic are the
library's, by its public `AutoRound.quantize_block`; ours are the layers, which a run of the
whole library would feed a wrong mask on hybrid models, and what passes from one to the next.
Importing auto-round changes some functions of transformers, and its constructor seeds the
generators of this process: to be imported in worker processes alone.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from auto_round import AutoRound, QuantizationScheme, RTNConfig, SignRoundConfig
from torch import Tensor, nn

from carnice_build.backends.autoround_layer import (
    linear_layer,
    named_linears,
    without_log,
)
from carnice_build.backends.layer import LayerRunner, module_paths
from carnice_build.tensors import stacks

# Layers with as many bits are left alone.
WHOLE = 16

# The library quantizes no linear with a size that this does not divide, whatever it is told
# (auto_round/compressors/layer_config_resolver.py).
_UNIT = 32

# Where a layer stands in the model that the library is shown.
_PATH = "model.layers.0"


@dataclass(frozen=True)
class AutoRoundSettings:
    """Everything but the inputs that decides the bytes; names and defaults are the library's.

    `iters` 0 rounds to nearest.
    `lr` None means 1 / iters, `minmax_lr` None means `lr`.
    `layer_bits` gives single linears, by their names in the layer (`mlp.up_proj`), or those of all
    experts (`mlp.experts.*.up_proj`), other bits than `bits`; 16 leaves them alone.
    `amp` tunes a BF16 layer under autocast, as the library does by default; else all is float32.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    enable_minmax_tuning: bool = True
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    not_use_best_mse: bool = False
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    amp: bool = True
    seed: int = 42
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> Literal["bfloat16", "float32"]:
        """The type of weights and hidden states to tune in."""
        return "bfloat16" if self.amp else "float32"

    def bits_of(self, linear: str) -> int:
        """The bits of one linear of the layer, which may be an expert's."""
        stated = [name for name in (linear, *stacks(linear)) if name in self.layer_bits]
        return self.layer_bits[stated[0]] if stated else self.bits


@dataclass(frozen=True)
class QuantizedLinear:
    """A weight on its grid: weight = scale * (code - zero_point), rounded to the weight's type.

    `weight` is [out, in], BF16 (float32 without `amp`).
    `scale` is [out, in / group], of `scale_dtype`; when `sym` it is negative wherever the weight
    of largest magnitude is positive, for that weight gets code 0.
    `zero_point` is U8 [out, in / group], 2^(bits - 1) everywhere when `sym`.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class TunedLayer:
    """What became of a layer.

    `linears` holds the quantized ones, by their names in the layer, those of experts one by one.
    `outputs` and `quantized_outputs` are the next layer's `inputs` and `quantized_inputs`.
    The losses are mean squared errors of the layer's outputs over all samples: the quantized
    layer's on quantized inputs against the given layer's on full-precision inputs.
    """

    linears: Mapping[str, QuantizedLinear]
    outputs: list[Tensor]
    quantized_outputs: list[Tensor]
    nearest_loss: float
    loss: float


def tune_layer(
    runner: LayerRunner,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    quantized_inputs: Sequence[Tensor] | None,
    settings: AutoRoundSettings,
) -> TunedLayer:
    """Quantize the linears of a layer so that its outputs stay as they are on these samples.

    `runner` computes in the `dtype` of the settings, under sdpa.
    `tensors` are the layer's, named as in `mlp.up_proj.weight`; they are not changed.
    `inputs` are hidden states [1, length, hidden], one for each sample, as the full-precision
    layers before this one make them; `quantized_inputs` are those of the quantized ones, None
    for the first layer, where they are the same.
    The result depends on nothing that ran before, so a run that stops after layer k goes on from
    the two outputs of that layer, with the bits of one that never stopped.
    The number of threads was not seen to matter, but torch does not promise that: it belongs into
    a key.

    Differs from `AutoRound(...).quantize()` of a whole model in two things: every layer draws its
    batches from `seed` anew, and the last token of each sample counts in the loss.

    Raises ValueError when `layer_bits` names no linear of the layer, when a linear to be quantized
    has a size that 32 does not divide, when there is no sample, when samples of several lengths
    are to share a batch, and when an output is NaN or infinite.
    """
    _check_lengths(inputs, settings)
    inputs = [sample.to(runner.dtype) for sample in inputs]
    effective = inputs if quantized_inputs is None else list(quantized_inputs)
    outputs = run_in_batches(runner, linear_layer(runner, tensors), inputs, settings)

    names = {path: name for name, path in module_paths(runner, tensors).items()}
    layer = _quantizable_layer(runner, tensors, names, settings)
    _round_to_nearest(layer, runner, names, settings)
    nearest_outputs = run_in_batches(runner, layer, effective, settings)
    nearest_loss = _mean_squared_error(nearest_outputs, outputs)
    if not math.isfinite(nearest_loss):
        # The library would find no best iteration and return what it began with.
        raise ValueError("outputs of the layer are NaN or infinite on these samples")
    if not settings.iters:
        linears = _quantized_linears(layer, names, settings)
        return TunedLayer(linears, outputs, nearest_outputs, nearest_loss, nearest_loss)

    layer = _quantizable_layer(runner, tensors, names, settings)
    tuned_outputs = _tune(layer, runner, names, inputs, quantized_inputs, outputs, settings)
    loss = _mean_squared_error(tuned_outputs, outputs)
    linears = _quantized_linears(layer, names, settings)
    return TunedLayer(linears, outputs, tuned_outputs, nearest_loss, loss)


def _check_lengths(inputs: Sequence[Tensor], settings: AutoRoundSettings) -> None:
    if not inputs:
        raise ValueError("there is no sample to tune on")
    lengths = {sample.shape[1] for sample in inputs}
    if settings.batch_size > 1 and len(lengths) > 1:
        raise ValueError(
            f"samples of {min(lengths)} to {max(lengths)} tokens cannot share a batch, "
            "expected batch_size 1 or samples of one length"
        )


def _quantizable_layer(
    runner: LayerRunner,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    settings: AutoRoundSettings,
) -> nn.Module:
    """A layer whose weights may be overwritten, as the library does."""
    layer = linear_layer(runner, {name: tensor.clone() for name, tensor in tensors.items()})
    linears = {names[path]: linear for path, linear in named_linears(layer)}
    known = {name.removesuffix(".weight") for name in tensors} | set(names.values())
    unknown = sorted(settings.layer_bits.keys() - known)
    if unknown:
        raise ValueError(f"layer_bits names {', '.join(unknown)}, no linear of the layer")
    odd = [
        name
        for name, linear in linears.items()
        if settings.bits_of(name) < WHOLE and any(size % _UNIT for size in linear.weight.shape)
    ]
    if odd:
        raise ValueError(
            f"auto-round leaves {', '.join(odd)} alone for sizes that {_UNIT} does not divide, "
            f"expected layer_bits {WHOLE} for it"
        )
    return layer


@torch.no_grad()
def run_in_batches(
    runner: LayerRunner, layer: nn.Module, inputs: Sequence[Tensor], settings: AutoRoundSettings
) -> list[Tensor]:
    """The layer's outputs in the batches and with the arithmetic in which the library tunes."""
    size = settings.batch_size
    device = torch.device(runner.device).type
    outputs: list[Tensor] = []
    with torch.autocast(device, torch.bfloat16, enabled=settings.amp):
        for first in range(0, len(inputs), size):
            batch = torch.cat(list(inputs[first : first + size]))
            outputs += torch.split(runner.run(layer, batch), 1)
    return outputs


def _mean_squared_error(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    pairs = list(zip(outputs, references, strict=True))
    squares = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return squares / sum(output.numel() for output in outputs)


def _round_to_nearest(
    layer: nn.Module, runner: LayerRunner, names: Mapping[str, str], settings: AutoRoundSettings
) -> None:
    # A module, not a folder's name, is what keeps the library off its "model-free" path, which
    # would quantize more than it was asked to.
    config = RTNConfig(disable_opt_rtn=True)
    with _library(layer, runner, names, config, settings, samples=1) as library:
        library.quantize_block(layer, inputs=None)
    # The library leaves on the processor what it is done with.
    layer.to(runner.device)


def _tune(
    layer: nn.Module,
    runner: LayerRunner,
    names: Mapping[str, str],
    inputs: Sequence[Tensor],
    quantized_inputs: Sequence[Tensor] | None,
    references: Sequence[Tensor],
    settings: AutoRoundSettings,
) -> list[Tensor]:
    """Tune `layer` in place; returns its outputs."""
    config = SignRoundConfig(
        iters=settings.iters,
        lr=settings.lr,
        minmax_lr=settings.minmax_lr,
        enable_minmax_tuning=settings.enable_minmax_tuning,
        gradient_accumulate_steps=settings.gradient_accumulate_steps,
        not_use_best_mse=settings.not_use_best_mse,
    )
    calls = [(((sample,), runner.arguments(sample)),) for sample in inputs]
    with (
        _library(layer, runner, names, config, settings, samples=len(inputs)) as library,
        _given_mappings(layer, calls[0][0][1]),
        torch.enable_grad(),
    ):
        # The library empties the lists that it is given.
        outputs, _ = library.quantize_block(
            layer,
            inputs=calls,
            q_input=None if quantized_inputs is None else list(quantized_inputs),
            device=runner.device,
            reference_output=list(references),
        )
    layer.to(runner.device)
    return [output.to(runner.device) for output in outputs]


@contextmanager
def _given_mappings(layer: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Give `layer` those of its `arguments` that are mappings, empty ones, when it is called.

    The library passes on none, and a layer puts into them what others may want.
    """
    names = [name for name, item in arguments.items() if isinstance(item, MutableMapping)]

    def fill(_: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, named | {name: UserDict() for name in names}

    hook = layer.register_forward_pre_hook(fill, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _library(
    layer: nn.Module,
    runner: LayerRunner,
    names: Mapping[str, str],
    config: RTNConfig | SignRoundConfig,
    settings: AutoRoundSettings,
    samples: int,
) -> Iterator[Any]:
    """auto-round, made for a model whose only layer is `layer`, and silent.

    `names` are those of its linears, by their paths in the layer.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # The library collects garbage again and again, each time among all that its imports made.
    gc.freeze()
    try:
        with (
            without_log(),
            TemporaryDirectory(prefix="auto-round-") as folder,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            library = AutoRound(
                _wrapped(layer, runner, folder),
                tokenizer="",
                scheme=QuantizationScheme(
                    bits=settings.bits,
                    group_size=settings.group_size,
                    sym=settings.sym,
                    data_type="int",
                    act_bits=16,
                ),
                alg_configs=config,
                layer_config={
                    f"{_PATH}.{path}": {"bits": settings.bits_of(names[path])}
                    for path, _ in named_linears(layer)
                    if settings.bits_of(names[path]) != settings.bits
                },
                nsamples=samples,
                batch_size=settings.batch_size,
                scale_dtype=settings.scale_dtype,
                amp=settings.amp,
                seed=settings.seed,
                device_map=runner.device,
                enable_torch_compile=False,
                low_cpu_mem_usage=False,
                trust_remote_code=False,
            )
            library.post_init()
            # Without this the layer runs in batches of 8 whatever was asked for.
            library.alg_composer.block_forward.batch_size = settings.batch_size
            yield library
    finally:
        gc.unfreeze()
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _wrapped(layer: nn.Module, runner: LayerRunner, folder: str) -> Any:
    """The least model that the library accepts.

    It looks for a config in the folder of that name, and in the current one when there is none,
    to find out whether the model is multimodal.
    """
    wrapper: Any = nn.Module()
    wrapper.model = nn.Module()
    wrapper.model.layers = nn.ModuleList([layer])
    runner.config.save_pretrained(folder)
    wrapper.name_or_path = folder
    # The library may change it.
    wrapper.config = deepcopy(runner.config)
    wrapper.dtype = runner.dtype
    return wrapper


def _quantized_linears(
    layer: nn.Module, names: Mapping[str, str], settings: AutoRoundSettings
) -> dict[str, QuantizedLinear]:
    """What the library left in the linears of `layer`."""
    return {
        names[path]: _quantized_linear(linear)
        for path, linear in named_linears(layer)
        if settings.bits_of(names[path]) < WHOLE
    }


def _quantized_linear(linear: Any) -> QuantizedLinear:
    zero_point = torch.as_tensor(linear.zp).to(torch.uint8).expand(linear.scale.shape)
    return QuantizedLinear(linear.weight.detach(), linear.scale, zero_point.contiguous())
