"""Arithmetic on raw weight bits: the lowest layer, which imports nothing of this package.

Tensors arrive as numpy arrays whose dtype is given beside them by its safetensors name,
because numpy has no bfloat16: ``"BF16"`` is stored as uint16 bit patterns,
``"F16"`` as float16 and ``"F32"`` as float32.
"""
