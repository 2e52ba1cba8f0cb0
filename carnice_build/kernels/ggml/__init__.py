"""Quantization to ggml's types, byte for byte as ``ggml_quantize_chunk`` does it.

The rules are those of ggml-quants.c, built for x86-64 without fused multiply-add, as ggml's own
releases and the wheel libggml-python 0.20.2 are: a build that fuses gives other bytes. All
arithmetic is float32, and every sum keeps its order.
"""

from .quantize import QUANTIZERS, Quantizer, quantize

__all__ = ["QUANTIZERS", "Quantizer", "quantize"]
