"""The tables of options against the parsers that they were made from."""

from __future__ import annotations

import json
import subprocess

import pytest
from conftest import REPOSITORY

from carnice_build.engines.check import EngineSettings
from carnice_build.engines.interpreter import engine_python
from carnice_build.serving.options import option_table

pytestmark = pytest.mark.engine

ASKED = """
import json, runpy, sys
release, options = runpy.run_path(sys.argv[1])["_PROGRAMS"][sys.argv[2]]()
print(json.dumps([release, options]))
"""


@pytest.mark.parametrize("program", ["vllm", "mlx-lm"])
def test_a_table_is_what_the_parser_says_today(program: str) -> None:
    """Made anew by the script that made it, every option is the same."""
    python = engine_python(EngineSettings(program).beside)
    script = str(REPOSITORY / "benchmarks" / "make_options.py")
    run = subprocess.run(
        [str(python), "-c", ASKED, script, program], capture_output=True, check=True
    )
    release, options = json.loads(run.stdout.splitlines()[-1])
    table = option_table(f"{program}-{release}")

    assert (program, release) == (table.program, table.version)
    assert (
        type(table).model_validate({"program": program, "version": release, "options": options})
        == table
    )
