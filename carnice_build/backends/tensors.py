"""Tensors of torch and arrays of numpy over the same memory; to be imported in workers alone."""

from __future__ import annotations

import torch
from torch import Tensor

from carnice_build.dtypes import NUMPY_NAME
from carnice_build.graph import TensorData

_TORCH_DTYPE = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_SAFETENSORS_DTYPE = {dtype: name for name, dtype in _TORCH_DTYPE.items()}


def as_tensor(data: TensorData) -> Tensor:
    """The tensor over the memory of `data`, whose array must be writable; nothing is copied."""
    return torch.from_numpy(data.array).view(_TORCH_DTYPE[data.dtype])


def as_data(tensor: Tensor) -> TensorData:
    """The numpy side of a tensor; shares its memory when that is on the CPU and contiguous."""
    dtype = _SAFETENSORS_DTYPE[tensor.dtype]
    carried = tensor.detach().cpu().contiguous().view(getattr(torch, NUMPY_NAME[dtype]))
    return TensorData(dtype, carried.numpy())
