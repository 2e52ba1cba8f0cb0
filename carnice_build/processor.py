"""What of a machine decides how libraries round: its vector instructions, and kinds of GPUs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve2", "sve", "bf16", "asimd")
"""From the widest down, as Linux names them; torch picks its kernels by these."""

_MODEL = {"darwin": "machdep.cpu.brand_string"}
"""What `sysctl` calls the processor's model; `hw.model` on a system that is not here."""


@cache
def vector_instructions() -> str:
    """The machine's architecture and its widest instructions, such as `x86_64 avx512_bf16`.

    The same matrix product in torch differs in its last bits between them, so what libraries
    compute on one kind of processor must not pass for the result of another.
    A system that does not list instructions names the processor in their place, such as
    `arm64 Apple M2`: its matrix units, which torch uses there, differ from one to the next.
    """
    kind = _widest() if sys.platform == "linux" else _model()
    return f"{platform.machine()} {kind}".strip()


_DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver for Linux has a folder for each GPU."""


@cache
def gpus() -> tuple[str, ...]:
    """The kinds of NVIDIA GPUs that the driver names, such as `NVIDIA H100 80GB HBM3`, in order.

    A library's kernels differ from one kind to the next.  None where no such driver tells of any;
    torch would say as much of some, but takes seconds to be imported.
    """
    found = set()
    for path in _DRIVER.glob("*/information"):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        stated = (line.partition(":") for line in lines)
        found |= {value.strip() for key, _, value in stated if key.strip() == "Model"}
    return tuple(sorted(found))


def all_gpus() -> tuple[int, ...]:
    """The numbers of the NVIDIA GPUs that may be used, by CUDA's variable or else by the driver.

    The first one where neither tells of any.
    """
    count = len(visible_gpus()) or len(list(_DRIVER.glob("*")))
    return tuple(range(max(1, count)))


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` names, in CUDA's order; nothing where it is not set."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def _widest() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return next((name for name in _INSTRUCTIONS if name in flags), "")


def _model() -> str:
    name = _MODEL.get(sys.platform, "hw.model")
    try:
        answer = subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()
