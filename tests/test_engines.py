"""What `carnice verify --engine` says of engines that are missing, die, or answer nonsense.

The engines here are fakes; real ones are asked by `make test-engines`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Finished, Project

from carnice_build.checkpoint.gguf_header import encode_gguf
from carnice_build.checkpoint.gguf_values import Value
from carnice_build.commands.findings import folder_stamp, load_findings
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.engines import llama_cpp
from carnice_build.engines.check import (
    EngineSettings,
    ReadyEngine,
    check_engine,
    prepare_engine,
)
from carnice_build.engines.engine import LLAMA_CPP, MLX_LM, VLLM, Start, launch_of
from carnice_build.engines.forced import ENVIRONMENT, FORCED, options_on_processor
from carnice_build.engines.interpreter import FOLDER, TARGET, VARIABLE, engine_python
from carnice_build.engines.server import HOST, Patience, last_words, serve
from carnice_build.errors import EngineError
from carnice_build.extras import pip_install
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.result import Check, Outcome

Carnice = Callable[..., Finished]
Patch = pytest.MonkeyPatch
MLX, FP8 = "mlx-4bit", "fp8-dynamic"
OURS = ("--no-run", "--recipes", REPOSITORY / "recipes")
QUICK = Patience(start=20, answer=20)
SECONDS = 10


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: Patch) -> Callable[[str], Path]:
    """`fake("dies")`: a Python whose `mlx_lm.server` does that, named as that of engines."""
    package = tmp_path / "packages" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(REPOSITORY / "tests" / "fake_engine.py", package / "server.py")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(package.parent))} exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)

    def make(mode: str) -> Path:
        monkeypatch.setenv("FAKE_ENGINE", mode)
        monkeypatch.setenv(VARIABLE, str(python))
        return python

    return make


@pytest.fixture
def built(project: Project, carnice: Carnice) -> Options:
    """A folder for mlx-lm."""
    assert carnice("build", MLX, "--jobs", 2).code == 0
    return Options(out=project.out, cache=project.cache, recipes=project.recipes)


def asked(options: Options, patience: Patience = QUICK) -> Check:
    """The check of the folder by the fake."""
    engine = EngineSettings(MLX_LM.name, patience=patience)
    result = verify_variants([MLX], options, VerifySettings(run=False, engine=engine))
    return result.variants[0].checks[-1]


def gone(pid: int) -> bool:
    """Whether a process is no more, or will be in a moment."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True)
        if not found.stdout.strip() or found.stdout.strip().startswith(b"Z"):
            return True
        time.sleep(0.05)
    return False


def test_an_engine_that_is_not_installed_is_said_with_what_sets_it_up(
    carnice: Carnice, monkeypatch: Patch
) -> None:
    """One line names the Python that lacks it, and the target of the Makefile."""
    monkeypatch.setenv(VARIABLE, "/no/such/python")
    finished = carnice("verify", FP8, *OURS, "--engine", "vllm")

    assert (2, "") == (finished.code, finished.out)
    (line,) = finished.err.splitlines()
    assert "vllm is not installed for /no/such/python" in line
    assert TARGET in line
    assert f"\n{TARGET.split()[1]}:" in (REPOSITORY / "Makefile").read_text()


def test_a_client_that_is_not_installed_is_said_before_anything_is_checked(
    fake: Callable[[str], Path], monkeypatch: Patch
) -> None:
    """And with it the extra that brings it; nothing has to be built for that."""
    fake("answers")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EngineError) as caught:
        asked(Options(recipes=REPOSITORY / "recipes"))

    assert f"openai is not installed: {pip_install('engines')}" == str(caught.value)


@pytest.mark.parametrize(
    ("variant", "engine", "told"),
    [
        (MLX, "vllm", "expected --engine mlx-lm"),
        ("gguf-q8_0", "vllm", "expected --engine llama.cpp"),
        (FP8, "llama.cpp", "expected --engine vllm"),
        (FP8, "mlx-lm", "expected --engine vllm"),
        ("mlx-vlm-4bit", "mlx-lm", "its format is for mlx-vlm"),
        (FP8, "vlm", "did you mean 'vllm'"),
    ],
)
def test_a_folder_of_another_engine_is_refused_before_anything_is_checked(
    carnice: Carnice, variant: str, engine: str, told: str
) -> None:
    """Nothing has to be built for that."""
    finished = carnice("verify", variant, *OURS, "--engine", engine)

    assert (2, "") == (finished.code, finished.out)
    (line,) = finished.err.splitlines()
    assert told in line


def test_a_port_in_use_is_refused_before_anything_is_checked(
    carnice: Carnice, fake: Callable[[str], Path]
) -> None:
    """A port that is asked for is not given up for another."""
    fake("answers")
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        finished = carnice("verify", MLX, *OURS, "--engine", "mlx-lm", "--port", port)

    assert (2, "") == (finished.code, finished.out)
    (line,) = finished.err.splitlines()
    assert f"port {port}" in line


def test_a_port_is_that_of_an_engine(carnice: Carnice) -> None:
    """Without one it would do nothing, and say nothing of it."""
    finished = carnice("verify", MLX, *OURS, "--port", 8000)

    assert 2 == finished.code
    assert "there is no --engine" in finished.err


def test_an_engine_that_dies_while_loading_has_the_last_word(
    built: Options, carnice: Carnice, fake: Callable[[str], Path]
) -> None:
    """Its exception is the error, and not one that points to another; the rest is kept."""
    fake("dies")
    finished = carnice("verify", MLX, "--no-run", "--engine", "mlx-lm")

    assert 2 == finished.code
    (line,) = finished.err.splitlines()
    assert line.endswith("mlx-lm died with code 3: ValueError: no tensor of that name")
    kept = load_findings(built.cache, MLX, folder_stamp(built.out / MLX))
    assert kept is not None
    assert "round trip" in [check.name for check in kept.checks]


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("never ready", "is not ready after 2 s: loading"),
        ("silent", "did not answer within 2 s"),
        ("prose", "answers what no client can read"),
        ("no choices", "answers what no client can read"),
        ("no object", "answers what no client can read"),
        ("refuses", "no such model"),
        ("breaks off", "died with code 9: MemoryError: out of memory"),
    ],
)
def test_an_engine_that_does_not_answer_is_one_error(
    built: Options, fake: Callable[[str], Path], mode: str, told: str
) -> None:
    """Whatever it does instead; the command line makes exit code 2 of it."""
    fake(mode)
    slow = mode in ("never ready", "silent")
    with pytest.raises(EngineError) as caught:
        asked(built, Patience(2 if mode == "never ready" else 20, 2 if slow else 20))

    assert 2 == caught.value.exit_code
    assert told in str(caught.value)
    assert 1 == len(str(caught.value).splitlines())


def test_a_model_that_calls_no_tool_fails_the_check(
    built: Options, fake: Callable[[str], Path]
) -> None:
    """Counts are figures; what is too few is a sentence, and streams are put together."""
    fake("answers")
    check = asked(built)

    assert Outcome.FAILED is check.outcome
    calls, thoughts = check.problems
    assert "calls were read in 0 of 16 turns" in calls
    assert "reasoning was found in 0 of 10 turns" in thoughts
    counts = check.details["answers"]
    assert (10, 0) == (counts["streamed"], counts["changed"])
    assert json.dumps(check.details)


def against(ours: dict[str, dict[str, Any]], python: Path, text: Path, folder: Path) -> Check:
    """The fake as an engine that scores and drafts two tokens, beside such figures of ours."""

    def start(folder: Path, launch: object, environment: Mapping[str, str]) -> Start:
        return Start([], environment, "model", 2)

    engine = replace(MLX_LM, start=start, scores=True, counts=True)
    ready = ReadyEngine(engine, python, EngineSettings(engine.name, patience=QUICK))
    found = [Check(name, Outcome.PASSED, "", (), details) for name, details in ours.items()]
    return check_engine(ready, None, folder, text, 4, found)


LLAMA_SERVER = """\
#!/bin/sh
exec {python} {program} $(echo "$@" | grep -o -e '--\\(host\\|port\\) [^ ]*')
"""
"""The fake, which knows of no other options."""

LLAMA_PERPLEXITY = """\
#!/bin/sh
echo "$@" > {asked}
echo 'Final estimate: PPL = {figure} +/- 0.5' >&2
exit {code}
"""


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: Patch) -> Callable[..., EngineSettings]:
    """`llama(figure)`: llama.cpp's programs, of which the one that measures finds that."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def program(name: str, text: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def make(figure: float, code: int = 0) -> EngineSettings:
        monkeypatch.setenv("FAKE_ENGINE", "answers")
        monkeypatch.setenv("FAKE_LLAMA", "1")
        monkeypatch.setenv(llama_cpp.VARIABLE, str(folder))
        fake = REPOSITORY / "tests" / "fake_engine.py"
        server = LLAMA_SERVER.format(python=shlex.quote(sys.executable), program=fake)
        program(llama_cpp.SERVER, server)
        asked = tmp_path / "asked"
        text = LLAMA_PERPLEXITY.format(asked=asked, figure=figure, code=code)
        program(llama_cpp.PERPLEXITY, text)
        return EngineSettings(LLAMA_CPP.name, patience=QUICK)

    return make


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a split model, the file of its tower, and an MTP head."""
    folder = tmp_path / "split"
    folder.mkdir()
    parts = {"x.nextn_predict_layers": Value("u32", 1)}
    for name in ("m-Q8_0-00001-of-00002", "m-Q8_0-00002-of-00002", "mmproj-m-F16"):
        (folder / f"{name}.gguf").write_bytes(encode_gguf(parts, []).header)
    shutil.copy(REPOSITORY / "demo" / "qwen3.6-27b" / "tokenizer.json", folder)
    return folder


def by_llama(settings: EngineSettings, folder: Path, own: float) -> Check:
    """The check of the folder by the fakes, beside our figure of a text."""
    ready = prepare_engine(settings, [])
    ours = Perplexity(256, 4, own, 0.5)
    text = REPOSITORY / "demo" / "heldout.txt"
    return check_engine(ready, None, folder, text, 4, [], lambda length, samples: ours)


def test_llama_cpp_s_perplexity_is_held_against_ours(
    llama: Callable[..., EngineSettings], files: Path, tmp_path: Path
) -> None:
    """Over as many sequences; what it drafts is counted as vLLM's drafts are."""
    settings = llama(7.78)
    near, apart = by_llama(settings, files, 7.79), by_llama(settings, files, 9.0)

    assert not any("perplexity" in problem for problem in near.problems)
    assert "7.780 ± 0.500 in second halves of 256" in near.summary
    assert "2.20 tokens a step" in near.summary
    assert "--ctx-size 256 --chunks 4" in (tmp_path / "asked").read_text()
    assert "perplexity of 7.780 in the second halves of 4 sequences of 256" in apart.problems[0]
    assert json.dumps(near.details)


@pytest.mark.parametrize(
    ("added", "start", "said"), [(True, 7, "true"), (False, None, "false"), (None, None, "false")]
)
def test_llama_cpp_is_told_whether_sequences_begin_with_a_token(
    llama: Callable[..., EngineSettings],
    tmp_path: Path,
    added: bool | None,
    start: int | None,
    said: str,
) -> None:
    """By the file, or with none where it says nothing, whatever its tokenizer is."""
    settings = llama(7.78)
    values = {"tokenizer.ggml.bos_token_id": Value("u32", 7)}
    if added is not None:
        values["tokenizer.ggml.add_bos_token"] = Value("bool", added)
    (tmp_path / "m.gguf").write_bytes(encode_gguf(values, []).header)
    program = llama_cpp.find_program(llama_cpp.PERPLEXITY)
    assert program is not None
    llama_cpp.measured(
        program, tmp_path, tmp_path / "text", 256, 4, os.environ, settings.patience.start
    )

    assert start == llama_cpp.first_token(tmp_path)
    assert f"--override-kv tokenizer.ggml.add_bos_token=bool:{said}" in (
        (tmp_path / "asked").read_text()
    )


def test_a_split_model_is_loaded_by_its_first_file(files: Path) -> None:
    """With its tower, drafting with its head."""
    words, drafts = llama_cpp.arguments(files, None, "m")

    assert str(files / "m-Q8_0-00001-of-00002.gguf") == words[words.index("--model") + 1]
    assert str(files / "mmproj-m-F16.gguf") == words[words.index("--mmproj") + 1]
    assert "draft-mtp" == words[words.index("--spec-type") + 1]
    assert 1 == drafts


def test_programs_of_llama_cpp_that_are_not_there_are_said(
    llama: Callable[..., EngineSettings], files: Path, monkeypatch: Patch
) -> None:
    """And one that fails, with its last words."""
    with pytest.raises(EngineError, match="llama-perplexity died with code 3: Final estimate"):
        by_llama(llama(7, code=3), files, 7)
    monkeypatch.setenv(llama_cpp.VARIABLE, "/no/such/folder")
    with pytest.raises(EngineError, match="llama-server is not installed") as caught:
        prepare_engine(EngineSettings(LLAMA_CPP.name), [])
    assert llama_cpp.VARIABLE in str(caught.value)


def figures(mean: float, length: float, parsed: int) -> dict[str, dict[str, Any]]:
    """Details of our own checks."""
    row = {"mean_length": length, "error": 0.05}
    return {
        "perplexity": {"256": {"samples": 4, "mean": mean}},
        "mtp": {"head as packaged": {"2": row}},
        "calls": {"folder": {"parsed": {"count": parsed, "of": 80}}},
    }


def test_an_engine_s_figures_are_held_against_ours(
    fake: Callable[[str], Path], tmp_path: Path
) -> None:
    """Near enough is no problem; what is apart is, with both figures.

    Perplexity is e, and 2.2 tokens are made a step; of calls, ours are of more tasks.
    """
    folder, text = REPOSITORY / "demo" / "qwen3.6-27b", tmp_path / "text.txt"
    text.write_text((REPOSITORY / "demo" / "heldout.txt").read_text()[:8000])
    python = fake("answers")
    near = against(figures(2.72, 2.3, 0), python, text, folder)
    apart = against(figures(3, 2.9, 60), python, text, folder)

    assert ["reasoning was found in 0 of 10 turns with thinking"] == list(near.problems)
    assert "2.718 ± 0.000 at 256" in near.summary
    assert "2.20 tokens a step at n=2" in near.summary
    assert [
        "perplexity 2.718 at sequence length 256, where the same weights have 3.000 here",
        "2.20 tokens a step at n=2, where the same head gives 2.90 here",
        "calls were read in 0 of 16 turns that ask for them; our parser reads those of 60 of 80 "
        "here",
    ] == list(apart.problems)[:3]


def test_nothing_is_left_running(
    tmp_path: Path, fake: Callable[[str], Path], monkeypatch: Patch
) -> None:
    """Neither the server nor what it started."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    python = fake("answers")
    with serve(MLX_LM, Start([], os.environ, "model"), python, None, QUICK):
        numbers = [int(pid) for pid in pids.read_text().split()]

    assert all(map(gone, numbers))


def test_a_server_dies_with_us(
    tmp_path: Path, fake: Callable[[str], Path], monkeypatch: Patch
) -> None:
    """Also where we are killed, and can do nothing about it; its log goes too."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    python = fake("answers")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from carnice_build.engines.engine import MLX_LM, Start\n"
        "from carnice_build.engines.server import Patience, serve\n"
        "start = Start([], os.environ, 'model')\n"
        "with serve(MLX_LM, start, Path(sys.argv[1]), None, Patience(20, 20)):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(python)])

    assert -9 == finished.returncode
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    end = time.monotonic() + SECONDS
    while any(place.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert [] == list(place.iterdir())


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it said nothing"),
        ("loading\n\n", "loading"),
        ("ValueError: one\nwarnings.warn(\n", "ValueError: one"),
        (
            "(EngineCore pid=7) ERROR 11-26 10:15:05 [core.py:1] \x1b[1mKeyError: 'a'\x1b[0m\n"
            "(APIServer pid=6) RuntimeError: Engine core failed. See root cause above.\n",
            "KeyError: 'a'",
        ),
        (
            "(Worker pid=8) ERROR 11-26 10:15:05 [a.py:1] ValueError: no kernel. Reasons: \n"
            "(Worker pid=8) ERROR 11-26 10:15:05 [a.py:1]  One cannot do that.\n"
            "(Worker pid=8) ERROR 11-26 10:15:05 [a.py:1]  Another cannot either.\n"
            "(EngineCore pid=7) Exception: It failed. See stack trace for root cause.\n",
            "ValueError: no kernel. Reasons: One cannot do that.",
        ),
        (
            "(Worker pid=8) ERROR 11-26 10:15:05 [a.py:1] ValueError: no kernel. Reasons: \n"
            "(Worker pid=8) ERROR 11-26 10:15:05 [a.py:1] \n"
            "(EngineCore pid=7) INFO 11-26 10:15:05 [b.py:1] waiting\n",
            "ValueError: no kernel. Reasons:",
        ),
        (
            "x.ValidationError: 1 validation error for Config\n  Value error, no heads\n  more\n",
            "x.ValidationError: 1 validation error for Config Value error, no heads",
        ),
    ],
)
def test_last_words_are_those_that_say_why(tmp_path: Path, log: str, said: str) -> None:
    """Engines write much after what went wrong."""
    (tmp_path / "log").write_text(log)

    assert said == last_words(tmp_path / "log")


@pytest.mark.parametrize("variant", ["int4-bf16-mtp", "w4a16-rtn", "fp8-dynamic", "nvfp4-text-mtp"])
def test_a_folder_is_served_by_its_own_launch(variant: str) -> None:
    """Options are the launch's, but for those in the table; each entry of that has a reason."""
    options = Options(recipes=REPOSITORY / "recipes")
    (planned,) = plan_variants([variant], options).variants
    launch = launch_of(planned)
    assert launch is not None
    found = options_on_processor(launch)
    forced = {item.flag for item in FORCED}
    own = {name: flag.text for name, flag in launch.flags.items() if name not in forced}

    assert own == {name: value for name, value in found.items() if name not in forced}
    assert found["tool-call-parser"] == launch.flags["tool-call-parser"].text
    assert {"1", "4096", "bfloat16"} == {
        found[flag] for flag in ("tensor-parallel-size", "max-model-len", "dtype")
    }
    assert "gpu-memory-utilization" not in found
    assert found.get("kv-cache-dtype") in (None, "auto")
    assert all(item.reason for item in FORCED)
    assert all(reason for _, reason in ENVIRONMENT.values())
    start = VLLM.start(Path("/folder"), launch, {})
    assert (3 if "speculative-config" in own else 0) == start.drafts


def test_engines_have_a_python_of_their_own(tmp_path: Path, monkeypatch: Patch) -> None:
    """The variable's, then that of the environment beside ours, then ours."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Path(sys.executable) == engine_python(tmp_path)
    own = tmp_path / FOLDER / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert own == engine_python(tmp_path)
    monkeypatch.setenv(VARIABLE, "/another/python")
    assert Path("/another/python") == engine_python(tmp_path)
