"""Whatever the system does, a run ends with an exit code and a sentence of ours."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest
from conftest import Finished, Project

from carnice_build.cli import ending
from carnice_build.commands import build as building
from carnice_build.commands.build import build_variants
from carnice_build.kernels import _affine_loops as loops
from carnice_build.store.store import Store

Carnice = Callable[..., Finished]

LONG = "x" * 300


def shell(project: Project, command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Have a shell run `command`, in which `carnice` is the command line."""
    return subprocess.run(
        ["sh", "-c", f'carnice() {{ "{sys.executable}" -m carnice_build "$@"; }}; {command}'],
        cwd=project.root,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


def said(finished: Finished) -> list[str]:
    """What a run that went wrong said of it; it said nothing else."""
    assert finished.out == ""
    return finished.err.splitlines()


# --- places --------------------------------------------------------------------------------------


def loop(path: Path) -> None:
    """Links that lead to each other."""
    path.symlink_to("other")
    path.with_name("other").symlink_to(path.name)


def write(path: Path) -> None:
    """A file."""
    path.write_text("x")


PLACES: dict[str, tuple[str, Callable[[Path], None] | None, str]] = {
    "too long a name": (LONG, None, "File name too long"),
    "a file": ("place", write, "is not a folder"),
    "a folder in a file": ("place/inner", lambda path: write(path.parent), "Not a directory"),
    "links that lead nowhere": ("place", loop, ""),
}


@pytest.mark.parametrize("option", ["--out", "--cache"])
@pytest.mark.parametrize("what", PLACES)
def test_a_place_that_cannot_be_is_named(
    project: Project, carnice: Carnice, option: str, what: str
) -> None:
    """A build refuses it in one line, with exit code 2, before it does anything."""
    name, make, why = PLACES[what]
    if make is not None:
        make(project.root / name)
    finished = carnice("build", "mlx-4bit", option, name)
    (line,) = said(finished)

    assert 2 == finished.code
    assert line.startswith(f"carnice: {name[:100]}")
    assert why in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("cache", "stats", "--cache", LONG),
        ("plan", "mlx-4bit", "--source", f"body={LONG}"),
        ("plan", "mlx-4bit", "--recipes", LONG),
        ("diff", LONG, "build"),
        ("verify", "mlx-4bit", "--no-run", "--out", LONG),
        ("verify", "mlx-4bit", "--text", LONG),
        ("report", "--out", LONG),
        ("build", "mlx-4bit", "--trace", LONG),
        ("graph", "mlx-4bit", "--svg", LONG),
        ("graph", "mlx-4bit", "--mermaid", LONG),
    ],
    ids=" ".join,
)
def test_a_name_that_is_too_long_is_bad_input(
    project: Project, carnice: Carnice, arguments: tuple[str, ...]
) -> None:
    """Wherever a path is given, one line says what is wrong with it."""
    finished = carnice(*arguments)
    (line,) = said(finished)

    assert 2 == finished.code
    assert "xxxxx" in line


@pytest.mark.parametrize(
    ("content", "why"), [(b" \n", "has no text"), (b"\xff\xfe", "is not UTF-8 text")]
)
def test_a_text_that_no_model_can_read_is_bad_input(
    project: Project, carnice: Carnice, content: bytes, why: str
) -> None:
    """It would fail a folder that is sound."""
    (project.root / "text.txt").write_bytes(content)
    finished = carnice("verify", "mlx-4bit", "--text", "text.txt")

    assert [f"carnice: text.txt: {why}"] == said(finished)
    assert 2 == finished.code


@pytest.mark.parametrize("flag", [0, os.ST_RDONLY])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    project: Project, carnice: Carnice, monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    """A build into a folder of somebody else, or on a read-only disk, does nothing first.

    One that is up to date there is.
    """
    carnice("build", "mlx-6bit")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flag))
    finished = carnice("build", "mlx-4bit")
    why = "Read-only file system" if flag else "Permission denied"

    assert [f"carnice: build/mlx-4bit: cannot hold a build: {why}"] == said(finished)
    assert 2 == finished.code
    assert 0 == carnice("build", "mlx-6bit").code


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "mlx-4bit", "--trace"),
        ("graph", "mlx-4bit", "--svg"),
        ("graph", "mlx-4bit", "--mermaid"),
        ("report", "--to"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("place", ["nowhere/file", "folder", "file/inner"])
def test_a_file_that_cannot_be_written_is_named(
    project: Project, carnice: Carnice, arguments: tuple[str, ...], place: str
) -> None:
    """An option that names a file to write says so in one line, and with exit code 2."""
    (project.root / "folder").mkdir()
    write(project.root / "file")
    if "report" in arguments:
        pytest.importorskip("plotly")
        carnice("build", "mlx-4bit")
        place = "file"
    finished = carnice(*arguments, place)
    (line,) = said(finished)

    assert 2 == finished.code
    assert place in line
    assert "carnice: " in line
    assert sorted(project.cache.glob("packs/*")) == [] or "report" in arguments


@pytest.mark.parametrize("option", ["--svg", "--mermaid", "--trace"])
def test_a_file_on_a_full_disk_is_named(project: Project, carnice: Carnice, option: str) -> None:
    """An error that comes with no name is given that of the file: the work failed, exit code 1."""
    finished = carnice("build" if option == "--trace" else "graph", "mlx-4bit", option, "/dev/full")

    assert (1, "carnice: /dev/full: No space left on device") == (
        finished.code,
        finished.err.splitlines()[-1],
    )


def test_a_working_folder_that_is_gone_is_bad_input(project: Project) -> None:
    """Relative places are nowhere then, and absolute ones are as they were."""
    go = "mkdir gone && cd gone && rmdir ../gone"
    lost = shell(project, f"{go} && carnice plan mlx-4bit")
    found = shell(project, f'{go} && carnice list --recipes "{project.recipes}"')

    assert (2, b"carnice: recipes: is not a folder") == (lost.returncode, lost.stderr[:33])
    assert (0, b"") == (found.returncode, found.stderr)


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan mlx-4bit", "list", "schema", "--help", "names"])
def test_output_that_cannot_be_written_is_said(project: Project, command: str) -> None:
    """A full disk behind standard output is one line on the other stream, and exit code 1."""
    finished = shell(project, f"carnice {command} > /dev/full")

    assert (1, b"carnice: standard output: No space left on device\n") == (
        finished.returncode,
        finished.stderr,
    )


def test_nothing_more_is_said_where_nothing_can_be(project: Project) -> None:
    """With both streams full there is the exit code alone."""
    finished = shell(project, "carnice list > /dev/full 2>&1")

    assert (1, b"", b"") == (finished.returncode, finished.stdout, finished.stderr)


@pytest.mark.parametrize("command", ["plan mlx-4bit", "list", "schema"])
def test_a_reader_that_has_seen_enough_is_no_error(project: Project, command: str) -> None:
    """A pipe that is closed at the other end ends a run without a word."""
    finished = shell(project, f"(sleep 0.1; carnice {command}; echo $? >&3) 3>&2 | true")

    assert b"1\n" == finished.stderr


def test_closed_streams_keep_their_numbers(project: Project) -> None:
    """A build with all streams closed makes the same bytes: none of its files is taken for one."""
    build_variants(["mlx-4bit"], project.options(out=project.root / "a", cache=project.root / "b"))
    finished = shell(project, "exec >&- 2>&- <&-; carnice build mlx-4bit")
    check = "import os\nfrom carnice_build.cli.streams import prepare_streams\nprepare_streams()\n"
    check += "os._exit(os.open(os.devnull, os.O_RDONLY))"
    number = shell(project, f"exec >&- 2>&- <&-; '{sys.executable}' -c '{check}'").returncode

    assert (0, 3) == (finished.returncode, number)
    assert project.built("mlx-4bit") == {
        name: (project.root / "a" / "mlx-4bit" / name).read_bytes()
        for name in project.built("mlx-4bit")
    }


ASCII: Mapping[str, str] = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


def test_a_terminal_without_utf_8_gets_escapes(project: Project) -> None:
    """What it has no character for is written out, in tables as in errors."""
    build_variants(["mlx-4bit", "mlx-6bit"], project.options())
    table = shell(project, "carnice diff mlx-4bit mlx-6bit --all", **ASCII)
    error = shell(project, "carnice plan naïve", **ASCII)

    assert (0, b"") == (table.returncode, table.stderr)
    assert b"\\u2192" in table.stdout
    assert 2 == error.returncode
    assert error.stderr.startswith(b"carnice: recipes: there is no recipe for the variant ")


def test_names_that_are_no_utf_8_can_be_said(project: Project) -> None:
    """A path of bytes that are no text is printed with escapes, on either stream."""
    build_variants(["mlx-4bit"], project.options())
    try:
        project.out.rename(project.root / os.fsdecode(b"o\xe9"))
    except OSError:  # macOS takes no such name
        pytest.skip("names are UTF-8 here")
    odd = "$(printf 'o\\351')"
    fine = shell(project, f'carnice diff "{odd}/mlx-4bit" "{odd}/mlx-4bit"', PYTHONUTF8="1")
    wrong = shell(project, f'carnice diff "{odd}" "{odd}"', PYTHONUTF8="1")

    assert (0, b"") == (fine.returncode, fine.stderr)
    assert b"o\\udce9/mlx-4bit" in fine.stdout
    assert (2, b"carnice: o\\udce9: ") == (wrong.returncode, wrong.stderr[:18])


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, b"interrupted"), (signal.SIGTERM, b"terminated")]
)
def test_a_build_that_is_told_to_stop_says_so(
    project: Project, number: signal.Signals, word: bytes
) -> None:
    """One line says that what was done is kept, and the exit code names the signal."""
    code = f"""
import os, signal, sys
from carnice_build.cli.main import run
from carnice_build.execute import session
told = []
def tell(session, count):
    if not told:
        told.append(count)
        os.kill(os.getpid(), {int(number)})
session._Run._progress = tell
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["carnice", "build", "mlx-4bit"]
run()
"""
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=project.root, capture_output=True, check=False)

    assert 128 + number == finished.returncode
    line = b"carnice: " + word + b"; what was finished is in the cache"
    assert line == finished.stderr.splitlines()[-1]
    assert b"Traceback" not in finished.stderr
    assert not project.out.exists()


# --- the work ------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., None]:
    """What raises `error` in the place of work."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.EIO, "Input/output error", "/a/shard"), 1, "/a/shard: Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "Too many open files"),
        (OSError(errno.EROFS, "Read-only file system", b"/a"), 2, "/a: Read-only file system"),
        (OSError("something else"), 1, "something else"),
        (MemoryError(), 1, "there is not enough memory; expected a smaller --memory"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(
    project: Project,
    carnice: Carnice,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    """Wherever it comes from, it is one line with the file's name and no traceback."""
    monkeypatch.setattr(building, "plan_variants", failing(error))
    finished = carnice("build", "mlx-4bit")

    assert (code, [f"carnice: {line}"]) == (finished.code, said(finished))


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
@pytest.mark.parametrize("call", ["fsync", "pwrite", "ftruncate", "open", "chmod"])
def test_a_disk_that_fails_under_a_build_is_named(
    project: Project, carnice: Carnice, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    """Whichever call of the store fails, the last line names the cache; the next build succeeds."""
    Store(project.cache)
    code = getattr(errno, name)
    own = getattr(os, call)

    def fail(*arguments: object, **options: object) -> object:
        # Reading goes on; the checkpoint is on another disk.
        if call == "open" and not os.fspath(arguments[0]).startswith("cache"):  # type: ignore[call-overload]
            return own(*arguments, **options)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        finished = carnice("build", "mlx-4bit")

    assert 1 == finished.code
    assert finished.err.splitlines()[-1].startswith("carnice: cache: ")
    assert "Traceback" not in finished.err
    assert 0 == carnice("build", "mlx-4bit").code


def test_a_bug_shows_where_it_is_and_whom_to_tell(
    project: Project, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours keeps its traceback; the line below says that it is one."""
    monkeypatch.setattr(building, "_build", failing(KeyError("surprise")))
    finished = carnice("build", "mlx-4bit")
    lines = finished.err.splitlines()

    assert 1 == finished.code
    assert "Traceback (most recent call last):" == lines[0]
    assert [
        "KeyError: 'surprise'",
        "carnice: this is a bug in carnice-build; please report it",
    ] == [
        lines[-2],
        lines[-1].partition(" with the lines above")[0],
    ]


@pytest.mark.parametrize(
    ("entries", "end"),
    [
        ([], ""),
        (["Homepage, https://a.example"], ""),
        (["Homepage, https://a.example", "Issues, https://b.example/x"], " to https://b.example/x"),
    ],
)
def test_the_address_for_bugs_is_the_package_s_own(
    carnice: Carnice, monkeypatch: pytest.MonkeyPatch, entries: list[str], end: str
) -> None:
    """None is made up: it is that of the metadata, if there is one."""
    data = metadata("carnice-build")
    del data["Project-URL"]
    for entry in entries:
        data["Project-URL"] = entry
    monkeypatch.setattr(ending, "metadata", lambda name: data)
    monkeypatch.setattr(ending, "typer", SimpleNamespace(echo=lambda text, err: print(text)))

    assert 1 == ending.ending(failing(ValueError("x")))
    assert end == ending._tracker()


def test_kernels_compile_where_numba_may_write_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither the package's folder nor the home folder to write to, they run all the same."""
    tried = []
    njit = numba.njit

    def refuse(**options: bool | str) -> object:
        tried.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    double = loops._kernel(lambda x: 2 * x)

    assert (6, [True, False]) == (double(3), tried)
