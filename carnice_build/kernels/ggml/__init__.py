"""Quantization to ggml's types, byte for byte as ``ggml_quantize_chunk`` does it.

The rules are those of ggml-quants.c, built for x86-64 without fused multiply-add, as ggml's own
releases and the wheel libggml-python 0.20.2 are: a build that fuses gives other bytes. All
arithmetic is float32, and every sum keeps its order.

Newer sources of ggml cut off quotients before they round them in the search for Q2_K, Q4_K and
Q5_K with importance. That gives other bytes only where a quotient is none that adding
1.5 * 2**23 rounds: under importances or weights that differ by tens of powers of ten.
"""

from .decode import DECODERS, dequantize
from .quantize import QUANTIZERS, Quantizer, quantize
from .rows import checked_importance, checked_rows, wide_chunks
from .sound import first_unsound

__all__ = [
    "DECODERS",
    "QUANTIZERS",
    "Quantizer",
    "checked_importance",
    "checked_rows",
    "dequantize",
    "first_unsound",
    "quantize",
    "wide_chunks",
]
