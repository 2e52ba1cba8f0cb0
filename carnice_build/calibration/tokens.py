"""Op `calibration.tokens`: the text of a calibration, as the model would be given it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carnice_build.calibration.samples import PADDING
from carnice_build.dtypes import TensorSpec
from carnice_build.graph import ProcessOp
from carnice_build.tensor_file import TensorFile


class Tokens(ProcessOp):
    """The first rows of a dataset, rendered through the chat template and tokenized.

    Inputs: tokenizer.json, and the dataset when it is a file, each U8 [size].
    Output: I32 [samples, length]; a row is cut at `length` tokens and padded with -1.
    Parameters: `samples`, `length`, `joined` (rows are joined, in order, and cut into samples of
    exactly `length`; False if not given), `roles` (names that the template uses instead of the
    dataset's), `template` (its text, or None), `special_tokens` (what the template sees of the
    tokenizer, by name), `rows` (the form of the file: `jsonl`, `parquet` or `txt`), or `dataset`
    (name, subset, split and commit on the hub).
    """

    name = "calibration.tokens"
    version = 2
    libraries = ("tokenizers", "jinja2")

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """I32 [samples, length]."""
        return (TensorSpec("I32", (params["samples"], params["length"])),)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The tokenizer's tables, and what it needs for the longest row that may be."""
        return 1 << 30

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Raises CheckpointError, which names the row, when the data will not do."""
        import numpy as np

        from carnice_build.calibration.tokenizing import tokenize

        dataset = inputs[1].path if len(inputs) > 1 else None
        rows = np.full(outputs[0].spec.shape, PADDING, np.int32)
        for row, tokens in zip(rows, tokenize(params, inputs[0].read(), dataset), strict=True):
            row[: len(tokens)] = tokens
        outputs[0].write(rows)


class LongestFirst(ProcessOp):
    """The samples by falling length, in the very order in which llm-compressor takes them.

    Input and output: tokens I32 [samples, length], padded with -1.
    Parameter: `processor`, because the sort is torch's, which leaves samples of one length in an
    order that depends on the vector instructions it runs on.
    """

    name = "calibration.longest"
    version = 1
    libraries = ("torch",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """As the input."""
        return (inputs[0],)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The tokens twice."""
        return 2 * inputs[0].nbytes

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Move whole rows."""
        from carnice_build.calibration.tokenizing import longest_first

        rows = inputs[0].read()
        outputs[0].write(rows[longest_first((rows != PADDING).sum(axis=1).tolist())])


class LongestOrder(ProcessOp):
    """The numbers of samples in the order of `LongestFirst`, where they pass in another.

    Input: tokens I32 [samples, length], padded with -1.  Output: I32 [samples].
    Parameter: `processor`, as there.
    """

    name = "calibration.longest_order"
    version = 1
    libraries = ("torch",)

    def infer(
        self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """One number a sample."""
        return (TensorSpec("I32", inputs[0].shape[:1]),)

    def memory(self, params: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> int:
        """The tokens."""
        return inputs[0].nbytes

    def run(
        self,
        params: Mapping[str, Any],
        inputs: Sequence[TensorFile],
        outputs: Sequence[TensorFile],
        progress: Callable[[], None],
    ) -> None:
        """Sort them by length."""
        import numpy as np

        from carnice_build.calibration.tokenizing import longest_first

        lengths = (inputs[0].read() != PADDING).sum(axis=1).tolist()
        outputs[0].write(np.array(longest_first(lengths), np.int32))
