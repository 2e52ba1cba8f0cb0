"""llama.cpp's programs: where they are, how its server is started, how another measures a text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from carnice_build.checkpoint.containers import PROJECTOR, is_statistics
from carnice_build.checkpoint.gguf_header import SUFFIX, read_gguf
from carnice_build.checkpoint.source import LocalFile
from carnice_build.engines.forced import LLAMA_FORCED, options_on_processor
from carnice_build.errors import EngineError
from carnice_build.serving.launches import Launch
from carnice_build.verification.perplexity import Perplexity

VARIABLE = "CARNICE_LLAMA_CPP"
SERVER = "llama-server"
PERPLEXITY = "llama-perplexity"

_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_FIRST = re.compile(r"-00001-of-\d{5}\.gguf$")
_ESTIMATE = re.compile(r"Final estimate: PPL = (\S+) \+/- (\S+)")
_ADDS_FIRST, _FIRST_TOKEN = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id"
_MOST_DRAFTS = 1
"""Where no launch says how many tokens to draft."""
_ATTEMPTS = 4
"""What the program has not written when it ends is lost; of small models that is the result."""


def find_program(name: str) -> Path | None:
    """A program in the folder that `VARIABLE` names, or on the path; None where it is not."""
    folder = os.environ.get(VARIABLE)
    found = shutil.which(name, path=folder or None)
    return None if found is None else Path(found).absolute()


def server() -> Path:
    """Where `llama-server` is; EngineError where it is not."""
    found = find_program(SERVER)
    if found is None:
        raise EngineError(
            f"{SERVER} is not installed",
            expected=f"llama.cpp's programs on PATH, or their folder in {VARIABLE}",
        )
    return found


def model_file(folder: Path) -> Path:
    """The file that a folder is loaded by: of split ones, the first; EngineError without any."""
    files = sorted(
        path
        for path in folder.glob(f"*{SUFFIX}")
        if not _is_projector(path) and not is_statistics(path.name)
    )
    found = [path for path in files if _FIRST.search(path.name) or not _SPLIT.search(path.name)]
    if not found:
        raise EngineError("holds no GGUF file to start with", where=str(folder))
    return found[0]


def _is_projector(path: Path) -> bool:
    return path.name.startswith(PROJECTOR)


def arguments(folder: Path, launch: Launch | None, name: str) -> tuple[list[str], int]:
    """How the server is started for a folder, and how many tokens it drafts a step.

    Without a launch that says so, it drafts where the file has an MTP head.
    """
    model = model_file(folder)
    found = ["--model", str(model), "--alias", name, "--offline", "--metrics"]
    found += [
        word
        for path in sorted(folder.glob(f"{PROJECTOR}*{SUFFIX}"))
        for word in ("--mmproj", str(path))
    ]
    options = options_on_processor(launch, LLAMA_FORCED)
    if launch is None and _has_head(model):
        options |= {"spec-type": "draft-mtp", "spec-draft-n-max": str(_MOST_DRAFTS)}
    for option, value in options.items():
        if option not in ("model", "alias", "mmproj"):
            found += [f"--{option}"] if value is None else [f"--{option}", value]
    drafts = options.get("spec-draft-n-max") if "spec-type" in options else None
    return found, int(drafts or 0)


def _has_head(model: Path) -> bool:
    metadata = read_gguf(LocalFile(model)).metadata
    return any(
        key.endswith(".nextn_predict_layers") and item.value for key, item in metadata.items()
    )


def first_token(folder: Path) -> int | None:
    """The token that a folder's file has put before texts; None without any."""
    metadata = read_gguf(LocalFile(model_file(folder))).metadata
    added, token = metadata.get(_ADDS_FIRST), metadata.get(_FIRST_TOKEN)
    return int(token.value) if added and added.value and token else None


def measured(
    program: Path,
    folder: Path,
    text: Path,
    length: int,
    samples: int,
    environment: Mapping[str, str],
    seconds: float,
) -> Perplexity:
    """What `llama-perplexity` finds of a text: over the second half of each sequence.

    In the place of the first token of each is `first_token`, if there is any.
    EngineError when it finds nothing.
    """
    command = [str(program), "--model", str(model_file(folder)), "--file", str(text.resolve())]
    command += ["--ctx-size", str(length), "--chunks", str(samples)]
    # Or it takes what is usual with the tokenizer where the file does not say.
    added = str(first_token(folder) is not None).lower()
    command += ["--override-kv", f"{_ADDS_FIRST}=bool:{added}"]
    for _ in range(_ATTEMPTS):
        try:
            finished = subprocess.run(
                command,
                capture_output=True,
                env=dict(environment),
                timeout=seconds,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"{PERPLEXITY} took more than {seconds:g} s") from None
        except OSError as error:
            raise EngineError(f"{PERPLEXITY} cannot be run: {error.strerror}") from None
        said = (finished.stdout + finished.stderr).decode(errors="replace")
        found = _ESTIMATE.search(said)
        if finished.returncode or found is not None:
            break
    if finished.returncode or found is None:
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        raise EngineError(f"{PERPLEXITY} died with code {finished.returncode}: {last[0].strip()}")
    return Perplexity(length, samples, float(found[1]), float(found[2]))
