"""Where engines are installed: a Python of their own, which needs nothing of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from carnice_build.errors import EngineError

VARIABLE = "CARNICE_ENGINE_PYTHON"
FOLDER = ".venv-engines"
TARGET = "make engines"

_SECONDS = 60


def engine_python(beside: Path) -> Path:
    """The Python that `VARIABLE` names, or that of `FOLDER` in the folder `beside`, or ours."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    own = beside / FOLDER / "bin" / "python"
    return own if own.is_file() else Path(sys.executable)


def check_installed(python: Path, name: str, package: str) -> None:
    """EngineError unless `python` can import `package`, which holds the engine `name`."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    try:
        finished = subprocess.run(
            [str(python), "-c", code, package], capture_output=True, timeout=_SECONDS, check=False
        )
        found = finished.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        found = False
    if not found:
        raise EngineError(
            f"{name} is not installed for {python}",
            expected=f"{TARGET}, which sets up {FOLDER}, or a Python that has it in {VARIABLE}",
        )
