"""GPTQ on a decoder layer and on a weight, from files to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carnice_build.backends import gptq
from carnice_build.backends.compressed import WeightScheme
from carnice_build.backends.tensors import as_data, as_tensor
from carnice_build.calibration import watch
from carnice_build.calibration.beside_files import BesideFiles
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.calibration.layer_files import HiddenStates, layer_name, layer_tensors
from carnice_build.calibration.layer_pass import check_device
from carnice_build.formats.compressed_tensors.gptq_ops import suffixes
from carnice_build.graph import NonFiniteValue, TensorData
from carnice_build.kernels.elementwise import non_finite_index
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import numbered


def hessians(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    given: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
) -> None:
    """Write a layer's Hessians; see `gptq_ops.Hessians` for the parameters and the files."""
    first = int(params["hands_on"])
    end = first + len(params["groups"])
    out = (outputs[0], *outputs[end:]) if first else ()
    run = _Pass(params, samples, hidden, given, out, progress)
    specs = {name: file.spec for name, file in zip(params["names"], weights, strict=True)}
    sharing = [
        linears
        for group, each in params["groups"]
        for linears in _sharing(group, each, prod(specs[f"{group[0]}.weight"].shape[:-2]))
    ]
    tensors = layer_tensors(params, weights)
    try:
        found = gptq.gather_hessians(
            run.driver, tensors, sharing, run.inputs, run.put, run.beside.given, params["norms"]
        )
    except gptq.NonFiniteInput as error:
        told = watch.NonFiniteInput(error.linear)
        raise told.by_sample(error.index, layer_name(params, weights)) from None
    rest = iter(found)
    for file in outputs[first:end]:
        for write in _matrices(file):
            write(next(rest).numpy())


def quantize(
    params: Mapping[str, Any],
    weight: TensorFile,
    hessian: TensorFile,
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
) -> None:
    """Quantize a weight, or each expert's; see `gptq_ops.GptqQuantize` for the files."""
    check_device(params["device"])
    torch.set_num_threads(params["threads"])
    settings = gptq.GptqSettings(
        _scheme(params),
        params["observer"],
        params["block_size"],
        params["dampening_frac"],
        params["actorder"],
    )
    counts, *files = outputs
    stacked = len(weight.spec.shape) > _MATRIX
    own = len(hessian.spec.shape) > _MATRIX
    matrices = prod(weight.spec.shape[:-2])
    nearest = 0
    for index in range(matrices):
        array = weight.read_row(index) if stacked else weight.read()
        bad_index = non_finite_index(array, weight.spec.dtype)
        if bad_index >= 0:
            raise NonFiniteValue(index * array.size + bad_index)
        made = gptq.quantize(
            as_tensor(TensorData(weight.spec.dtype, array)),
            torch.from_numpy(hessian.read_row(index) if own else hessian.read()),
            settings,
            params["device"],
        )
        nearest += made.nearest
        parts = [made.tensors[suffix] for suffix in suffixes(params)]
        for tensor, file in zip((*parts, made.weight)[: len(files)], files, strict=True):
            part = as_data(tensor).array
            if stacked:
                file.write_row(index, part)
            else:
                file.write(part)
        progress()
    counts.write(np.array([matrices, nearest], np.int64))


def advance(
    params: Mapping[str, Any],
    samples: Sequence[Any],
    hidden: TensorFile,
    weights: Sequence[TensorFile],
    given: Sequence[TensorFile],
    outputs: Sequence[TensorFile],
    progress: Callable[[], None],
) -> None:
    """Run samples through a layer as it is quantized; see `gptq_ops.GptqAdvance`."""
    run = _Pass(params, samples, hidden, given, outputs, progress)
    tensors = layer_tensors(params, weights)
    for linear, entries in params["schemes"].items():
        scheme = _scheme(entries)
        parts = {end: tensors.pop(f"{linear}.{end}") for end in suffixes(entries)}
        tensors[f"{linear}.weight"] = _dequantized(parts, scheme)
    gptq.pass_on(run.driver, tensors, run.inputs, run.put, run.beside.given, params["norms"])


_MATRIX = 2
"""Axes of a weight and of its Hessian; those of a stack of experts have one more."""


class _Pass:
    """Samples on their way through one layer; what it makes of them goes to `out`, if anywhere."""

    def __init__(
        self,
        params: Mapping[str, Any],
        samples: Sequence[Any],
        hidden: TensorFile,
        given: Sequence[TensorFile],
        out: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        check_device(params["device"])
        self.driver = LayerDriver(params["config"], params["layer"], Arithmetic.of(params))
        self.inputs = HiddenStates(hidden, samples, self.driver.enter)
        # What a layer makes for others, and nobody is to have, needs no place.
        made = params if out else {**params, "made": ()}
        self.beside = BesideFiles(made, samples, given, out[1:])
        self._out = out
        self._progress = progress

    def put(self, index: int, state: Tensor) -> None:
        """Take what the layer makes of sample `index`."""
        if self._out:
            self._out[0].write_row(index, as_data(state[0]).array)
            self.beside.put(index)
        self._progress()


def _sharing(group: Sequence[str], each: bool, experts: int) -> Iterator[list[str]]:
    """The linears of a group by their own names, those together that have one Hessian."""
    members = [numbered(linear, experts) for linear in group]
    if each:
        yield from map(list, zip(*members, strict=True))
    else:
        yield [name for names in zip(*members, strict=True) for name in names]


def _matrices(file: TensorFile) -> Iterator[Callable[[Any], None]]:
    """Writes each matrix of a stack in turn, or the only one."""
    if len(file.spec.shape) == _MATRIX:
        yield file.write
        return
    for index in range(file.spec.shape[0]):
        yield partial(file.write_row, index)


def _scheme(params: Mapping[str, Any]) -> WeightScheme:
    names = ("num_bits", "group_size", "strategy", "symmetric")
    return WeightScheme(**{name: params[name] for name in names})


def _dequantized(parts: Mapping[str, Tensor], scheme: WeightScheme) -> Tensor:
    """The weight of tensors on disk, or of each expert's."""
    if parts["weight_packed"].ndim == _MATRIX:
        return gptq.dequantize(parts, scheme)
    experts = range(len(parts["weight_packed"]))
    one_by_one = ({name: part[index] for name, part in parts.items()} for index in experts)
    return torch.stack([gptq.dequantize(one, scheme) for one in one_by_one])
