"""The types of tensors in a GGUF file: what they are called and how many bytes a block takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class GgmlType(NamedTuple):
    """A type of ggml: its number in files, elements of a block, and bytes of one."""

    number: int
    elements: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements, which whole blocks must hold."""
        blocks, rest = divmod(columns, self.elements)
        if rest:
            raise ValueError(f"{columns} columns are not whole blocks of {self.elements}")
        return blocks * self.nbytes


TYPES: Mapping[str, GgmlType] = {
    "F32": GgmlType(0, 1, 4),
    "F16": GgmlType(1, 1, 2),
    "Q4_0": GgmlType(2, 32, 18),
    "Q4_1": GgmlType(3, 32, 20),
    "Q5_0": GgmlType(6, 32, 22),
    "Q5_1": GgmlType(7, 32, 24),
    "Q8_0": GgmlType(8, 32, 34),
    "Q2_K": GgmlType(10, 256, 84),
    "Q3_K": GgmlType(11, 256, 110),
    "Q4_K": GgmlType(12, 256, 144),
    "Q5_K": GgmlType(13, 256, 176),
    "Q6_K": GgmlType(14, 256, 210),
    "IQ2_XXS": GgmlType(16, 256, 66),
    "IQ2_XS": GgmlType(17, 256, 74),
    "IQ3_XXS": GgmlType(18, 256, 98),
    "IQ1_S": GgmlType(19, 256, 50),
    "IQ4_NL": GgmlType(20, 32, 18),
    "IQ3_S": GgmlType(21, 256, 110),
    "IQ2_S": GgmlType(22, 256, 82),
    "IQ4_XS": GgmlType(23, 256, 136),
    "I8": GgmlType(24, 1, 1),
    "I16": GgmlType(25, 1, 2),
    "I32": GgmlType(26, 1, 4),
    "I64": GgmlType(27, 1, 8),
    "F64": GgmlType(28, 1, 8),
    "IQ1_M": GgmlType(29, 256, 56),
    "BF16": GgmlType(30, 1, 2),
    "MXFP4": GgmlType(39, 32, 17),
}
"""Numbers and sizes as in ggml.h (`ggml_type`) and ggml-common.h."""
