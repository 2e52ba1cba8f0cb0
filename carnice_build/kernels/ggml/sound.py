"""Whether blocks have scales at all: weights beyond some millions leave none that F16 can hold.

llama-quantize looks at the same numbers (``ggml_validate_row_data``) and writes no file of others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_PLACES: Mapping[str, tuple[int, ...]] = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where in a block numbers of F16 begin (ggml-common.h), if not at its first byte alone."""

_EXPONENT = 0x7C
"""Of F16, in the higher of its bytes; with all of its bits a number is none."""

_NO_POWER = 0xFF


def first_unsound(type_name: str, blocks: Bytes) -> int:
    """The first of ``blocks``, uint8 [blocks, bytes], whose scale is NaN or infinity, or -1."""
    unsound = blocks[:, 0] == _NO_POWER if type_name == "MXFP4" else _infinite(type_name, blocks)
    return int(unsound.argmax()) if unsound.any() else -1


def _infinite(type_name: str, blocks: Bytes) -> NDArray[np.bool_]:
    if type_name == "IQ1_M":
        # The four highest bits of each of four numbers at its end make up the one of F16.
        highest = blocks[:, 55] & 0xF0 | blocks[:, 53] >> 4
        return np.asarray(highest & _EXPONENT == _EXPONENT, np.bool_)
    found = np.zeros(len(blocks), np.bool_)
    for place in _PLACES.get(type_name, (0,)):
        found |= blocks[:, place + 1] & _EXPONENT == _EXPONENT
    return found
