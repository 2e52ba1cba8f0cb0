"""llm-compressor's AWQ search on one decoder layer at a time.

Scales and hidden states have the bits that `oneshot` has when it runs through the whole model,
at the same samples in the same order, one at a time, under eager attention and with the same
number of threads.  The library's own modifiers do the work, each layer in a session of its own.
What is found does not depend on the observer that later picks the integers: the search always
rounds with `memoryless_minmax`, and the next layer reads smoothed weights, not quantized ones.
Needs the `llmcompressor` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
import torch
from llmcompressor.core import LifecycleCallbacks, create_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from carnice_build.backends.compressed import WeightScheme, quiet
from carnice_build.backends.compressed_layer import (
    calibrating,
    hold_exactly,
    linear_layer,
    of_each_expert,
    offset_norms,
    put_outputs,
)
from carnice_build.backends.layer import LayerRunner, module_paths
from carnice_build.backends.tensors import as_data, as_tensor
from carnice_build.errors import BackendError
from carnice_build.graph import TensorData
from carnice_build.kernels import smoothing
from carnice_build.models.base import SmoothingMapping
from carnice_build.models.smoothing import mappings_of_layer
from carnice_build.tensors import STACK

Keep = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AwqSettings:
    """What a search depends on besides weights, samples and arithmetic.

    `norms` says how gains 1 + w are held: in the model's type, as llm-compressor does ("library"),
    which alters most norms a little, or in float32, which leaves alone what is not smoothed.
    """

    mappings: tuple[SmoothingMapping, ...]
    scheme: WeightScheme = field(default_factory=WeightScheme)
    n_grid: int = 20
    duo_scaling: bool | Literal["both"] = True
    norms: Literal["library", "exact"] = "library"


def smooth_layer(
    runner: LayerRunner,
    tensors: Mapping[str, Tensor],
    quantized: Collection[str],
    inputs: Sequence[Tensor],
    settings: AwqSettings,
    put_output: Callable[[int, Tensor], None],
    scratch: Path | None = None,
    beside: Callable[[int], Mapping[str, Any]] = lambda _: {},
) -> dict[str, Tensor]:
    """Search the smoothing of a layer, and give the smoothed layer's outputs to `put_output`.

    `tensors` are the layer's, named relative to it, and stay as they are; `quantized` are those
    of its linears that will be quantized.  Modules are named as the tensors are, here and in the
    settings.
    `inputs` are hidden states [1, length, hidden], one per sample; each is read twice, in order,
    and may be loaded as late as that.  `put_output` gets the index of a sample and what the next
    layer reads for it, [1, length, hidden], in order.
    `beside` gives what else the layer is called with for a sample, each time that it is.
    What the search has to hold for all samples at once, (3 hidden + intermediate) values per token
    and a mask per sample, lies in memory, or, given a folder `scratch` on a disk, in files without
    a name there, which vanish with the process.

    Every expert reads every token, as `oneshot` has it: what it makes of those that were not sent
    to it goes nowhere but into its own statistics.

    Returns for each mapping that applies the scales F64 [channels], of a stack [E, channels], by
    the name of its smooth layer: all that `apply_smoothing` needs.
    BackendError when the library finds none, as with hidden states that are not finite.
    """
    # A layer that the library has hooked is held by reference cycles: let the last one go first.
    gc.collect()
    layer = linear_layer(runner, {name: tensor.clone() for name, tensor in tensors.items()})
    paths = module_paths(runner, tensors)
    chosen = list(of_each_expert(quantized, paths))
    mappings = [
        mapping
        for stacked in settings.mappings
        for mapping in mappings_of_layer(list(_each_mapping(stacked, paths)), paths, chosen)
    ]
    norms = offset_norms(layer)
    if settings.norms == "exact":
        hold_exactly(layer)
    keep = _kept_in(scratch) if scratch else _kept_as_is
    search = _Search.of(mappings, paths, settings, keep, runner.device)
    quantizer = _quantizer(settings.scheme, [paths[name] for name in chosen])
    with quiet(), _session(layer, [search, quantizer]):
        for index, hidden in enumerate(inputs):
            runner.run(layer, hidden, beside(index))
        LifecycleCallbacks.sequential_epoch_end(list(layer.modules()))
        scales = {
            name: search.scales[path] for name, path in paths.items() if path in search.scales
        }
        _check_all_found(mappings, scales)
        if settings.norms == "library":
            with HooksMixin.disable_hooks():
                put_outputs(runner, layer, inputs, beside, put_output)
    if settings.norms == "exact":
        del layer
        smoothed = apply_smoothing(tensors, _stacked(settings.mappings, scales), settings, norms)
        put_outputs(runner, linear_layer(runner, smoothed), inputs, beside, put_output)
    return _stacked(settings.mappings, scales)


def _each_mapping(
    mapping: SmoothingMapping, modules: Collection[str]
) -> Iterator[SmoothingMapping]:
    """`mapping` of single modules: one for each expert if it smooths what experts have."""
    for number, smooth in enumerate(of_each_expert([mapping.smooth], modules)):
        own = STACK in mapping.smooth
        balance = (
            [name.replace(STACK, str(number)) for name in mapping.balance]
            if own
            else of_each_expert(mapping.balance, modules)
        )
        yield SmoothingMapping(smooth, tuple(balance))


def _stacked(
    mappings: Iterable[SmoothingMapping], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`scales` by the modules that `mappings` smooth, those of a stack [E, channels]."""
    result = {}
    for mapping in mappings:
        names = of_each_expert([mapping.smooth], scales)
        found = [scales[name] for name in names if name in scales]
        if found:
            result[mapping.smooth] = torch.stack(found) if STACK in mapping.smooth else found[0]
    return result


def apply_smoothing(
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    settings: AwqSettings,
    norms: Collection[str],
) -> dict[str, Tensor]:
    """A layer's tensors smoothed, as they end on disk but for quantization.

    Given what `smooth_layer` was given and returned, by elementwise operations alone; `norms` are
    the layer's `offset_norms`.
    """
    result = dict(tensors)
    for mapping in settings.mappings:
        names = (mapping.smooth, *mapping.balance)
        if mapping.smooth in scales and all(f"{name}.weight" in tensors for name in names):
            vector = scales[mapping.smooth].numpy()
            for name in mapping.balance:
                _rewrite(result, f"{name}.weight", smoothing.multiply_columns, vector)
            for own in ("weight", "bias") if mapping.smooth not in norms else ():
                if f"{mapping.smooth}.{own}" in result:
                    _rewrite(result, f"{mapping.smooth}.{own}", smoothing.divide_rows, vector)
    for name in norms:
        divisor = scales[name].numpy() if name in scales else None
        exact = settings.norms == "exact"
        _rewrite(result, f"{name}.weight", smoothing.smooth_gain, divisor, exact)
    return result


class _Search(AWQModifier):
    """The library's search, which tells what it finds and keeps what it caches where we say."""

    _scales: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _keep: Keep = PrivateAttr()
    _device: str = PrivateAttr()
    _searching: bool = PrivateAttr(default=False)

    @classmethod
    def of(
        cls,
        mappings: Iterable[SmoothingMapping],
        paths: Mapping[str, str],
        settings: AwqSettings,
        keep: Keep,
        device: str,
    ) -> _Search:
        search = cls(
            mappings=[
                AWQMapping(paths[mapping.smooth], [paths[name] for name in mapping.balance])
                for mapping in mappings
            ],
            offload_device=None,
            duo_scaling=settings.duo_scaling,
            n_grid=settings.n_grid,
        )
        search._keep = keep
        search._device = device
        return search

    @property
    def scales(self) -> dict[str, Tensor]:
        return self._scales

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        for module in self._parent_args_cache:
            self._parent_args_cache[module] = _Arguments(self._keep, self._device)

    def _compute_best_scale(self, mapping: Any, outputs: Any, weights: Any) -> Tensor:
        self._searching = True
        scales: Tensor = super()._compute_best_scale(mapping, outputs, weights)
        self._searching = False
        self._scales[mapping.smooth_name] = scales.double().cpu()
        return scales

    def _run_samples(self, module: nn.Module) -> Any:
        """In a search each output is compared once, and need not outlive that."""
        results = (module(**arguments) for arguments in self._parent_args_cache[module])
        outputs = (result[0] if isinstance(result, tuple) else result for result in results)
        if self._searching:
            return outputs
        return _Placed([self._keep(output) for output in outputs], self._device)


class _Arguments(IntermediatesCache):
    """What a module was called with, once per sample, its tensors kept where we say."""

    def __init__(self, keep: Keep, device: str) -> None:
        super().__init__(offload_device=None)
        self._keep = keep
        self._device = device

    def append(self, values: dict[str, Any]) -> None:
        super().append(tree_map_only(Tensor, self._keep, dict(values)))

    def fetch(self, batch_index: int, input_names: list[str] | None = None) -> dict[str, Any]:
        """What was appended, on the device that computes."""
        found = super().fetch(batch_index, input_names)
        placed: dict[str, Any] = tree_map_only(Tensor, lambda item: item.to(self._device), found)
        return placed

    def pin_memory(self, batch_index: int, input_names: list[str] | None = None) -> None:
        """Do nothing: the library would pin without asking whether there is an accelerator."""


class _Placed(Sequence[Tensor]):
    """Tensors wherever they are kept, each on `device` while it is looked at."""

    def __init__(self, kept: Sequence[Tensor], device: str) -> None:
        self._kept = kept
        self._device = device

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return self._kept[index].to(self._device)


def _kept_as_is(tensor: Tensor) -> Tensor:
    return tensor


_LEFT_FREE = 0.25
"""The share of a GPU's memory that is not filled with what is kept."""


def _has_room(device: torch.device) -> bool:
    """Whether more may stay on a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds and does not use is free, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return bool(free > _LEFT_FREE * total)


def _kept_in(folder: Path) -> Keep:
    """Move tensors to files without a name, which the system frees with the last reference.

    On a GPU they stay as long as they leave a part of its memory free: where they are changes the
    time that the search takes and none of its bits.
    """

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_cuda and _has_room(tensor.device):
            return tensor
        data = as_data(tensor)
        with TemporaryFile(dir=folder) as file:
            data.array.tofile(file)
            file.flush()
            pages = np.memmap(file, data.array.dtype, mode="c", shape=data.array.shape)
        return as_tensor(TensorData(data.dtype, pages))

    return keep


def _quantizer(scheme: WeightScheme, quantized: Collection[str]) -> QuantizationModifier:
    group = scheme.group(sorted(quantized), "memoryless_minmax")
    return QuantizationModifier(config_groups={"group_0": group})


@contextmanager
def _session(layer: Any, recipe: list[Any]) -> Iterator[None]:
    """A session of llm-compressor around passes through `layer`, as `oneshot` sets it up."""
    with create_session() as session, calibrating(layer):
        session.initialize(model=layer, start=-1, recipe=recipe)
        LifecycleCallbacks.calibration_start()
        with calibration_forward_context(layer), DisableQuantization(layer):
            session.state.loss_masks = None
            session.state.sequential_prefetch = False
            yield
        LifecycleCallbacks.calibration_end()
        session.finalize()


def _check_all_found(mappings: Iterable[SmoothingMapping], scales: Mapping[str, Tensor]) -> None:
    for mapping in mappings:
        if mapping.smooth not in scales:
            raise BackendError(
                f"llm-compressor found no scales between {mapping.smooth} and "
                f"{', '.join(mapping.balance)}",
                expected="finite hidden states and layers whose shapes fit each other",
            )


def _rewrite(
    tensors: dict[str, Tensor], name: str, kernel: Callable[..., int], *parameters: Any
) -> None:
    """Replace a tensor by what a kernel of `smoothing` makes of it."""
    source = as_data(tensors[name])
    out = np.empty_like(source.array)
    experts = range(len(out)) if STACK in name else (...,)
    for expert in experts:
        own = (p[expert] if isinstance(p, np.ndarray) and p.ndim > 1 else p for p in parameters)
        if kernel(source.array[expert], source.dtype, *own, out[expert]) >= 0:
            raise BackendError(f"{name} holds NaN or infinity", expected="finite weights")
    tensors[name] = as_tensor(TensorData(source.dtype, out))
