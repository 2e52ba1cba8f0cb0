"""The tables of options against the parsers that they were made from."""

from __future__ import annotations

import json
import runpy
import shutil
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


@pytest.mark.skipif(shutil.which("llama-server") is None, reason="there is no llama-server")
def test_the_table_of_llama_server_is_what_it_says_today() -> None:
    """Of the program on PATH, which is to be of the same release."""
    make = runpy.run_path(str(REPOSITORY / "benchmarks" / "make_options.py"))
    _, options = make["_PROGRAMS"]["llama-server"]()
    table = option_table("llama-server-b11434")
    made = {"program": "llama-server", "version": table.version, "options": options}

    assert type(table).model_validate(made) == table
