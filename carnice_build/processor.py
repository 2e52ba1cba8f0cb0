"""What of the processor decides how libraries round: the widest vector instructions it has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd")
"""From the widest down, as Linux names them; torch picks its kernels by these."""


@cache
def vector_instructions() -> str:
    """The machine's architecture and its widest instructions, such as `x86_64 avx512_bf16`.

    The same matrix product in torch differs in its last bits between them, so what libraries
    compute on one kind of processor must not pass for the result of another.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    widest = next((name for name in _INSTRUCTIONS if name in flags), "")
    return f"{platform.machine()} {widest}".strip()
