"""What decoder layers are given beside hidden states, in files between the actions on them.

tokens -> beside -> a tensor for each layer that is given something made of tokens; amax
tokens, hidden(i), what was made for i -> forward(i) -> what layer i makes for layers behind it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.samples import samples
from carnice_build.dtypes import FLOAT_NAMES, TensorSpec
from carnice_build.graph import ProcessOp
from carnice_build.models.base import Passed
from carnice_build.tensor_file import TensorFile

Told = Sequence[Any]
"""A `Passed` as parameters have it: `argument`, `key` and `shapes`."""


def told(passed: Passed) -> Told:
    """What an action needs to know of `passed`."""
    return [passed.argument, passed.key, [list(shape) for shape in passed.shapes]]


def passed_specs(dtype: str, tokens: TensorSpec, passed: Sequence[Told]) -> list[TensorSpec]:
    """The files [samples, length, size] of `passed`, of the arithmetic's `dtype`."""
    sizes = (
        prod(size for size in shape if size is not None)
        for *_, shapes in passed
        for shape in shapes
    )
    return [TensorSpec(FLOAT_NAMES[dtype], (*tokens.shape, size)) for size in sizes]


@dataclass(frozen=True)
class Beside(ProcessOp):
    """What a model makes of tokens before its layers, and gives to them beside hidden states.

    Inputs: tokens I32 [samples, length]; the tensors of the model outside of its layers.
    Outputs: for each of `given`, [samples, length, size] of the arithmetic's type, zero behind the
    end of a sample; last, amax F32 [linears] as `Forward` has it.
    Parameters: `names` of the tensors; `tables`, those of them that have a row for each token;
    `linears`, the modules in amax; `given`, each the number of a layer and what it is given
    (`told`); `config` of the text model, and `dtype`, `attention`, `threads`, `device` and
    `processor` of the arithmetic.
    `first` is what number the first of these samples has among all; it changes no result.
    """

    name = "calibration.beside"
    version = 1
    libraries = LAYER_LIBRARIES

    transient: frozenset[int] = frozenset({0})
    first: int = 0

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One for each of `given`, and amax."""
        given = [passed for _, passed in params["given"]]
        amax = TensorSpec("F32", (len(params["linears"]),))
        return *passed_specs(params["dtype"], inputs[0], given), amax

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample."""
        return inputs[0].shape[0]

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """What is no table twice; of one sample, rows of tables and what is made, some times."""
        named = list(zip(params["names"], inputs[1:], strict=True))
        whole = sum(spec.nbytes for name, spec in named if name not in params["tables"])
        rows = sum(spec.row_bytes for name, spec in named if name in params["tables"])
        made = sum(spec.row_bytes for spec in self.infer(params, inputs))
        return (128 << 20) + 2 * whole + 4 * (inputs[0].shape[1] * rows + made)

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for a token that has no row, and for NaN or infinity in what a
        linear is given.
        """
        from carnice_build.calibration.beside_files import make_of_tokens

        tokens = samples(inputs[0])
        make_of_tokens(params, tokens, inputs[1:], outputs, progress, self.first)
