"""llm-compressor's GPTQ on one decoder layer at a time: Hessians, integers, and what they compute.

All three have the bits that `oneshot` has when it runs through the whole model, at the same
samples in the same order, one at a time, under eager attention, with the same number of threads
and the same linear algebra below torch.
Hessians are accumulated by the library's own code, and so are the integers found, by its modifier,
a matrix at a time.  It would compute a Hessian for every linear; those that read one input have
equal ones, and here one is computed for all of them.
Needs the `llmcompressor` extra; to be imported in worker processes alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor, compress_module
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from llmcompressor.modifiers.quantization.calibration import observe
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.utils.helpers import calibration_forward_context
from loguru import logger
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from carnice_build.backends.compressed import Observer, WeightScheme, quiet
from carnice_build.backends.compressed_layer import calibrating, hold_exactly, linear_layer
from carnice_build.backends.layer import LayerRunner, module_paths
from carnice_build.errors import BackendError

try:
    logger.level("METRIC")
except ValueError:
    # The modifier logs at this level, which the library makes only where it may log.
    logger.level("METRIC", no=38)

Norms = Literal["library", "exact"]

_MINMAX: Observer = "memoryless_minmax"


class NonFiniteInput(Exception):
    """What `linear` of a layer was given of sample `index` holds NaN or infinity."""

    def __init__(self, linear: str, index: int) -> None:
        super().__init__(linear, index)
        self.linear = linear
        self.index = index


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What the integers of a weight depend on besides its Hessian; names are the library's."""

    scheme: WeightScheme
    observer: Observer
    block_size: int = 128
    dampening_frac: float = 0.01
    actorder: Literal["static", "weight"] | None = "static"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight's tensors as they stand on disk, by the end of their names.

    `weight` [out, in] is what the library goes on with, in the type that the weight had.
    `nearest` says that it was rounded to nearest, because its Hessian has no inverse.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    nearest: bool


def gather_hessians(
    runner: LayerRunner,
    tensors: Mapping[str, Tensor],
    sharing: Sequence[Sequence[str]],
    inputs: Sequence[Tensor],
    put_output: Callable[[int, Tensor], None],
    beside: Callable[[int], Mapping[str, Any]] = lambda _: {},
    norms: Norms = "library",
) -> list[Tensor]:
    """The Hessian F32 [in, in] of each group of linears that read one input, on the CPU.

    `sharing` are these groups, by the linears' names among `tensors`, each expert's by its own.
    `inputs` are hidden states [1, length, hidden], one per sample, each of which is read once;
    `put_output` gets what the layer makes of them.
    Every expert reads every token, as `oneshot` has it.
    NonFiniteInput for what a linear is given; BackendError where the linears of a group are given
    different things, or nothing.
    """
    # A layer that was hooked is held by reference cycles: let the last one go first.
    gc.collect()
    layer = linear_layer(runner, tensors)
    if norms == "exact":
        hold_exactly(layer)
    paths = module_paths(runner, tensors)
    groups = [_Group(layer, paths, linears) for linears in sharing]
    with calibrating(layer), calibration_forward_context(layer):
        for index, hidden in enumerate(inputs):
            put_output(index, _run(runner, layer, hidden, beside, index))
            for group in groups:
                group.given = None
    return [group.hessian() for group in groups]


def _run(
    runner: LayerRunner,
    layer: nn.Module,
    hidden: Tensor,
    beside: Callable[[int], Mapping[str, Any]],
    index: int,
) -> Tensor:
    try:
        return runner.run(layer, hidden, beside(index))
    except _NonFinite as error:
        raise NonFiniteInput(error.linear, index) from None


class _NonFinite(Exception):
    def __init__(self, linear: str) -> None:
        super().__init__(linear)
        self.linear = linear


class _Group:
    """Linears that read one input, and its Hessian so far."""

    def __init__(self, layer: nn.Module, paths: Mapping[str, str], linears: Sequence[str]) -> None:
        self._linears = linears
        self._called: set[str] = set()
        self._leader: nn.Module | None = None
        self._hessian: Tensor | None = None
        self._count: Tensor | None = None
        self.given: Tensor | None = None
        for linear in linears:
            module = layer.get_submodule(paths[linear])
            module.register_forward_hook(self._hook(linear))

    def _hook(self, linear: str) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
            self._called.add(linear)
            self._leader = self._leader or module
            if module is self._leader:
                self._accumulate(linear, module, given[0])
            elif self.given is None or not torch.equal(given[0], self.given):
                raise BackendError(
                    f"{linear} is given something else than {self._linears[0]}",
                    expected="one input, as the table of the model's family has it under `inputs`",
                )

        return see

    def _accumulate(self, linear: str, module: nn.Module, given: Tensor) -> None:
        """As `GPTQModifier.calibrate_module`."""
        if not torch.isfinite(given).all():
            raise _NonFinite(linear)
        if self._hessian is None or self._count is None:
            self._hessian = make_empty_hessian(module)
            self._count = torch.zeros((), device=given.device)
        self._hessian, self._count = accumulate_hessian(given, module, self._hessian, self._count)
        self.given = given

    def hessian(self) -> Tensor:
        """What was accumulated, over the number of samples; it is given away."""
        missing = [linear for linear in self._linears if linear not in self._called]
        if missing or self._hessian is None or self._count is None:
            raise BackendError(
                f"transformers gave {missing[0]} no input",
                expected="linears that are called, or a pattern for it under `ignore`",
            )
        # Divided as the library does it, but in place.
        found = self._hessian.div_(self._count).cpu()
        self._hessian = None
        return found


def quantize(
    weight: Tensor, hessian: Tensor, settings: GptqSettings, device: str = "cpu"
) -> Quantized:
    """The integers of a linear's `weight` [out, in], given its Hessian F32 [in, in].

    The tensors, on the CPU: `weight_packed` I32 [out, in * bits / 32], `weight_scale` of the
    weight's type [out, groups], `weight_zero_point` I32 [out * bits / 32, groups] unless the
    scheme is symmetric, `weight_shape` I64 [2].
    Weight and Hessian are used up.
    BackendError where the library ends in the factors of a Hessian.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
    # The library looks for modules below a model.
    model = nn.Sequential(linear)
    with quiet(), torch.no_grad():
        modifier: Any = GPTQModifier(
            config_groups={"group_0": settings.scheme.group(["Linear"], settings.observer)},
            block_size=settings.block_size,
            dampening_frac=settings.dampening_frac,
            actorder=settings.actorder,
            batched_quantization=None,
        )
        QuantizationMixin.initialize_quantization(modifier, model)
        QuantizationMixin.start_calibration(modifier, model)
        observe(linear, "weight")
        modifier._module_names = {linear: "weight"}
        modifier._hessians = {linear: hessian.to(device)}
        modifier._num_samples = {linear: torch.ones((), device=device)}
        del hessian
        try:
            modifier.compress_module_list([linear])
        except LinAlgError as error:
            raise BackendError(
                f"llm-compressor finds no inverse of a Hessian: {error}",
                expected="other samples, or a larger dampening_frac",
            ) from None
        nearest = bool(modifier._rtn_fallback_module_names)
        QuantizationMixin.end_calibration(modifier, model)
        made = linear.weight.detach().cpu()
        compress_module(linear)
    tensors = {name: tensor.detach().cpu() for name, tensor in linear.state_dict().items()}
    return Quantized(tensors, made, nearest)


def dequantize(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> Tensor:
    """`Quantized.weight`, from what stands on disk of it, where codes have 5 bits at most.

    The library makes the codes on disk of the weight that it goes on with, k steps s rounded to
    BF16, as k s / s and the sum with the zero point, each rounded to BF16 too: half a unit in the
    last place is 2^-8 of a number, so the first is off by k / 128 steps, and the second by as much
    as 1 / 16 for codes of 5 bits.  With k below 32 that is less than half a step and the code comes
    back; with one bit more it may be its neighbour.
    """
    group = QuantizationScheme.model_validate(scheme.group(["Linear"], _MINMAX))
    with torch.no_grad():
        weight: Tensor = PackedQuantizationCompressor.decompress(dict(tensors), group)["weight"]
    return weight


def pass_on(
    runner: LayerRunner,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    put_output: Callable[[int, Tensor], None],
    beside: Callable[[int], Mapping[str, Any]] = lambda _: {},
    norms: Norms = "library",
) -> None:
    """Run samples through a layer whose quantized weights are among `tensors`, dequantized.

    As `gather_hessians` does, and what comes out is what the next layer is calibrated with.
    """
    gc.collect()
    layer = linear_layer(runner, tensors)
    if norms == "exact":
        hold_exactly(layer)
    with calibrating(layer), calibration_forward_context(layer):
        for index, hidden in enumerate(inputs):
            put_output(index, runner.run(layer, hidden, beside(index)))
