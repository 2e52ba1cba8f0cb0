"""Scales of keys and values in a cache of FP8, from the ranges that a calibration found.

A scale is the largest magnitude over 448, the largest number of E4M3: an engine divides keys by
`k_scale` and values by `v_scale` before it puts them into the cache.
Layers without keys and values have none; those that are given another layer's are published with
its scales where the library has that, for an engine may read the cache under a layer's own name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.base import OutputTensor
from carnice_build.graph import ArrayOp, BadInput, TensorData, TensorRef, View, require_finite
from carnice_build.models.base import Architecture
from carnice_build.models.caches import attention_of, borrowed_keys, key_linears
from carnice_build.recipe.schema import Strict
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from carnice_build.calibration.chain import Activations
    from carnice_build.formats.folder import ModelFolder

Observer = Literal["minmax", "static_minmax"]

MAX: Observer = "static_minmax"
"""The observer that takes the largest magnitude of all samples, as modelopt does."""


class KvCache(Strict):
    """How engines are to hold keys and values."""

    format: Literal["fp8"] = Field(
        description="`fp8`: E4M3 under one scale for all keys of a layer, and one for all values."
    )

    @property
    def dtype(self) -> str:
        """What engines call the cache's type."""
        return self.format


class CacheScales(ArrayOp):
    """The scales of the keys and of the values of one layer: magnitude / 448.

    Inputs: the ranges F32 [samples, 4] of `Forward`; perhaps the order of samples, I32 [samples].
    Outputs: those of keys and of values, of type `dtype` and of `shape`, which holds one number.
    Parameters: `observer`, which is `static_minmax` for the largest of all samples, or `minmax` for
    llm-compressor's average, which moves by a hundredth with each sample, bit for bit as torch
    computes it in `dtype`; and `dtype`, `shape`.
    """

    name = "kv_cache.scales"
    version = 1
    libraries = ("numpy",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One number each."""
        spec = TensorSpec(params["dtype"], tuple(params["shape"]))
        return (spec, spec)

    def apply(
        self, params: Mapping[str, Any], inputs: Sequence[TensorData], outputs: Sequence[TensorData]
    ) -> None:
        """Fill the outputs; raises NonFiniteValue, and BadInput for what are no ranges."""
        import numpy as np

        from carnice_build.kernels.elementwise import non_finite_index
        from carnice_build.kernels.fp8_scale import tensor_scale

        ranges, dtype = inputs[0].array, params["dtype"]
        require_finite(non_finite_index(ranges, inputs[0].dtype))
        if (ranges[:, ::2] > ranges[:, 1::2]).any():
            raise BadInput(0, "was given a range that ends before it begins")
        if params["observer"] == MAX:
            ends = np.where([True, False] * 2, ranges.min(axis=0), ranges.max(axis=0))
        else:
            ends = _average(ranges if len(inputs) == 1 else ranges[inputs[1].array], dtype)
        for output, least, largest in zip(outputs, ends[::2], ends[1::2], strict=True):
            # Zero is in each range.
            output.array[...] = tensor_scale(max(-least, largest, np.float32(0)), dtype)[0]


def _average(ranges: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The average of [samples, 4] that moves from the first on, rounded to `dtype` at each step."""
    import numpy as np

    from carnice_build.kernels.elementwise import cast, narrow

    def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
        out = np.empty(values.shape, np.float32)
        cast(narrow(values, dtype), dtype, "F32", out)
        return out

    old, new = np.float32(1.0 - 0.01), np.float32(0.01)
    average, *rest = map(rounded, ranges)
    for sample in rest:
        average = rounded(rounded(average * old) + rounded(sample * new))
    return average


def check_caches(architecture: Architecture) -> None:
    """Raise PlanError for a model of which no layer has keys and values to scale."""
    if not key_linears(architecture):
        raise PlanError(
            f"no layer of {architecture.name} caches keys and values of its own",
            at=("kv_cache",),
            expected="no `kv_cache`: latent and linear attention have no scales of this kind",
        )


def _attentions(architecture: Architecture, borrowed: bool) -> dict[str, int]:
    """By the path of each attention that has scales, the layer whose keys and values they are of.

    With `borrowed`, also of those that are given another layer's.
    """
    own = key_linears(architecture)
    found = {attention_of(fact): layer for layer, fact in own.items()}
    for layer, maker in borrowed_keys(architecture).items() if borrowed else ():
        within = attention_of(own[maker]).removeprefix(architecture.layer_prefix(maker))
        found[architecture.layer_prefix(layer) + within] = maker
    return found


def cache_scales(
    context: PlanContext,
    view: View,
    maxima: Activations,
    pattern: str,
    *,
    observer: Observer = MAX,
    dtype: str | None = None,
    shape: Sequence[int] = (),
    borrowed: bool = False,
) -> dict[str, list[OutputTensor]]:
    """The scales of each attention that has any, by the name of the fact that they come after.

    `borrowed` gives attention that reads another layer's keys and values the scales of that layer.
    `pattern` makes a tensor's name of `{attention}`, the path of a module, and `{part}`, k or v.
    `dtype` is that of the weights where it is not given.
    """
    order = maxima.longest_order if observer != MAX else None
    scales: dict[int, Sequence[TensorRef]] = {}
    for layer, fact in key_linears(context.architecture).items():
        params = {
            "observer": observer,
            "dtype": dtype or view[fact.name].spec.dtype,
            "shape": list(shape),
        }
        inputs = (maxima.ranges(layer), *(() if order is None else (order,)))
        scales[layer] = context.graph.add(CacheScales(), params, *inputs)
    found: dict[str, list[OutputTensor]] = {}
    facts = context.architecture.tensors.values()
    for attention, layer in _attentions(context.architecture, borrowed).items():
        last = [fact for fact in facts if fact.module.startswith(f"{attention}.")][-1]
        found[last.name] = [
            OutputTensor(name, ref, last)
            for name, ref in zip(_names(attention, pattern), scales[layer], strict=True)
        ]
    return found


def _names(attention: str, pattern: str) -> list[str]:
    return [pattern.format(attention=attention, part=part) for part in ("k", "v")]


def scale_problems(
    folder: ModelFolder, architecture: Architecture, pattern: str, borrowed: bool = False
) -> Iterator[str]:
    """What is wrong with the scales that a folder should have; see `cache_scales`."""
    from carnice_build.formats.values import Incomparable, read_scale

    for attention in _attentions(architecture, borrowed):
        for name in _names(attention, pattern):
            try:
                read_scale(folder.tensors, name)
            except Incomparable as error:
                yield str(error)
