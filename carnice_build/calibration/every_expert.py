"""What experts are given when every expert is given every token, as llm-compressor calibrates them.

hidden(i) -> for each layer *i* with experts: everyone(i) -> amax of its experts' linears

A pass sends a token to the experts that the router chooses; what all of them make of it is a
statistic of its own, for whoever asks.  It follows from hidden states that the passes make anyhow,
depends on no knob of a quantizer, and hands nothing on: the chain of passes is the one that all
other recipes of the body and the dataset have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.calibration.libraries import LAYER_LIBRARIES
from carnice_build.calibration.passes import layer_inputs, layer_memory, linear_counts
from carnice_build.calibration.samples import samples
from carnice_build.calibration.work import everyone_work
from carnice_build.dtypes import TensorSpec
from carnice_build.graph import ProcessOp
from carnice_build.rates import Work
from carnice_build.tensor_file import TensorFile


@dataclass(frozen=True)
class EveryExpert(ProcessOp):
    """The largest inputs of experts that are all given every token of every sample.

    Inputs: those of `Forward`; `workspace` and `first` are as there.
    Output: amax F32 [linears], as `Forward` has it, of each expert of each of `linears` in turn.
    Parameters: those of `Forward` but `caches`; `linears` are the stacks alone.
    """

    name = "calibration.every_expert"
    version = 1
    libraries = LAYER_LIBRARIES

    workspace: int = 0
    first: int = 0

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One number for each expert of each stack."""
        return (TensorSpec("F32", (sum(linear_counts(params, inputs[2:])),)),)

    def steps(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """One for each sample."""
        return inputs[0].shape[0]

    def work(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> Work:
        """One pass, and all experts for all tokens."""
        return everyone_work(params, inputs)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """That of a pass, in which one expert may be sent every token, too."""
        return layer_memory(params, inputs, self.workspace)

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError for NaN or infinity in what an expert is given.

        And BackendError for experts that are not called as transformers calls them.
        """
        import numpy as np

        from carnice_build.calibration.every_expert_pass import largest_of_everyone

        weights, given = layer_inputs(params, inputs)
        found = largest_of_everyone(
            params, samples(inputs[0]), inputs[1], weights, given, progress, self.first
        )
        outputs[0].write(np.array(found, np.float32))
