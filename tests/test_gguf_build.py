"""Whole GGUF files of the demo: each byte is llama-quantize's, of the file that we built in BF16.

`golden/gguf_files.json` has the digests of what llama-quantize made, which
`python tests/test_gguf_build.py PROGRAM` writes; that the file in BF16 is the converter's is held
in `test_gguf_converter`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options

GOLDEN = REPOSITORY / "tests" / "golden" / "gguf_files.json"

MIXES = ("Q8_0", "Q4_K_M", "Q5_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "Q4_0", "Q5_1", "MXFP4_MOE")
"""Between them they have every type that a kernel of ours makes."""

WIDE = (*MIXES, "Q6_K", "Q4_K_S", "Q5_K_S", "Q3_K_S", "Q3_K_L", "Q5_0", "Q4_1", "IQ4_NL")

PROGRAM = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")


def build(folder: Path, mixes: tuple[str, ...]) -> dict[str, Path]:
    """The file of each mix, by the mix."""
    recipes = folder / "recipes"
    recipes.mkdir()
    shutil.copytree(REPOSITORY / "demo" / "qwen3.6-27b", folder / "demo")
    profiles = {"demo": {"owner/Model": "demo"}}
    (recipes / "_profiles.yaml").write_text(yaml.safe_dump(profiles))
    for mix in mixes:
        recipe = {
            "variant": mix.lower(),
            "description": f"{mix} for llama.cpp",
            "sources": {"body": {"model": "owner/Model"}},
            "steps": [{"drop": {"match": "model.visual.*"}}],
            "quantize": {"format": "gguf", "mix": mix},
        }
        (recipes / f"{mix.lower()}.yaml").write_text(yaml.safe_dump(recipe))
    options = Options(recipes=recipes, out=folder / "build", cache=folder / "cache", jobs=2)
    build_variants([mix.lower() for mix in mixes], options)
    return {mix: folder / "build" / mix.lower() / f"Model-{mix}.gguf" for mix in mixes}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quantized(program: str, source: Path, mix: str, folder: Path) -> Path:
    """What llama-quantize makes of a file."""
    made = folder / f"theirs-{mix}.gguf"
    subprocess.run([program, source, made, mix], check=True, capture_output=True)
    return made


def test_files_are_those_of_llama_quantize(tmp_path: Path) -> None:
    files = build(tmp_path, MIXES)
    golden = json.loads(GOLDEN.read_text())
    assert {mix: digest(path) for mix, path in files.items()} == {mix: golden[mix] for mix in MIXES}


@pytest.mark.wide
@pytest.mark.skipif(PROGRAM is None, reason="llama-quantize is not on PATH, nor LLAMA_QUANTIZE set")
def test_files_are_those_of_the_program_itself(tmp_path: Path) -> None:
    assert PROGRAM is not None
    source, *files = build(tmp_path, ("BF16", *WIDE)).items()
    for mix, path in files:
        theirs = quantized(PROGRAM, source[1], mix, tmp_path)
        assert path.read_bytes() == theirs.read_bytes(), mix
        theirs.unlink()


def renew(program: str, folder: Path) -> None:
    """Write the golden file anew."""
    (source,) = build(folder, ("BF16",)).values()
    found = {mix: digest(quantized(program, source, mix, folder)) for mix in WIDE}
    GOLDEN.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        renew(sys.argv[1], Path(place))
