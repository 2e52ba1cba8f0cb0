"""What was measured is not measured again, unless something that decides it has changed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Project

from carnice_build.commands import verify
from carnice_build.commands.build import build_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.formats.library import Library
from carnice_build.store.digests import digest_bytes, is_digest
from carnice_build.verification.kept import Kept, KeptSource, Memory
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.result import Check, judged, skipped
from carnice_build.verification.running import PerplexityRow, Tables

FACTS = {"text": "a digest", "lengths": [256, 1024]}
ROWS = [
    PerplexityRow("BF16", Library.MLX_LM, [Perplexity(256, 8, 6.0, 0.1, 0.0)], source="a/model"),
    PerplexityRow("four", Library.MLX_LM, [Perplexity(256, 8, 7.0, 0.1, 0.2)]),
]


@dataclass(frozen=True)
class Figure:
    """What is measured here."""

    value: float


class Counter:
    """Measures, and says how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> Figure:
        """Another figure each time."""
        self.made += 1
        return Figure(float(self.made))


def only_file(root: Path) -> Path:
    """The one record of a cache."""
    (path,) = (root / "measured").iterdir()
    return path


def test_a_figure_is_measured_once_under_one_set_of_facts(tmp_path: Path) -> None:
    """Other facts are another figure, and so is one that is older than asked for."""
    measure, kept = Counter(), Kept(tmp_path)
    figures = [kept.measured(FACTS, Figure, measure)[0].value for _ in range(2)]
    other = kept.measured({**FACTS, "text": "another"}, Figure, measure)[0].value
    again = replace(kept, since=time.time() + 60).measured(FACTS, Figure, measure)[0].value

    assert ([1.0, 1.0], 2.0, 3.0) == (figures, other, again)


@pytest.mark.parametrize("content", [b"", b"no record", b"\x78\x01\x00"])
def test_a_damaged_record_is_absent(tmp_path: Path, content: bytes) -> None:
    """It is measured again, and nobody hears of it."""
    measure, kept = Counter(), Kept(tmp_path)
    kept.measured(FACTS, Figure, measure)
    only_file(tmp_path).write_bytes(content)

    assert 2.0 == kept.measured(FACTS, Figure, measure)[0].value
    assert 2.0 == kept.measured(FACTS, Figure, measure)[0].value


def test_a_record_of_another_kind_is_absent(tmp_path: Path) -> None:
    """What does not read as what is asked for was never measured."""
    measure, kept = Counter(), Kept(tmp_path)
    kept.keep(FACTS, judged("a check", [], "fine"), time.time())

    assert 1.0 == kept.measured(FACTS, Figure, measure)[0].value


@pytest.mark.parametrize("at", [math.inf, math.nan, 1e300, -1.0, 4e9])
def test_a_record_from_no_day_that_was_is_absent(tmp_path: Path, at: float) -> None:
    """Clocks go wrong; `--again` would not measure anew what is of tomorrow."""
    measure, kept = Counter(), Kept(tmp_path)
    kept.keep(FACTS, Figure(7.0), at)

    assert 1.0 == kept.measured(FACTS, Figure, measure)[0].value


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link_out(path: Path) -> None:
    other = path.parents[2] / "outside"
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize("put", [_pipe, _link_out, Path.mkdir])
def test_what_is_no_file_of_the_cache_is_absent(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    """Nobody waits at a pipe, and nothing is read through a link."""
    measure, kept = Counter(), Kept(tmp_path / "cache")
    kept.measured(FACTS, Figure, measure)
    path = only_file(tmp_path / "cache")
    if put is not _link_out:
        path.unlink()
    put(path)

    assert 2.0 == kept.measured(FACTS, Figure, measure)[0].value


def test_where_nothing_can_be_kept_everything_is_measured(tmp_path: Path) -> None:
    """A cache that is a file, or none at all, costs time alone."""
    (tmp_path / "cache").touch()
    measure = Counter()
    for kept in (Kept(), Kept(tmp_path / "cache")):
        kept.measured(FACTS, Figure, measure)
        kept.measured(FACTS, Figure, measure)

    assert 4 == measure.made


def test_states_come_back_with_their_bits_and_damaged_ones_do_not(tmp_path: Path) -> None:
    """They are made once; a flipped bit makes them be made again."""
    states = np.random.default_rng(1).standard_normal((5, 3), np.float32)
    made: list[int] = []

    def make() -> np.ndarray:
        made.append(1)
        return states

    source = KeptSource(Kept(tmp_path), FACTS, "BF16")
    for _ in range(2):
        assert np.array_equal(states, source.states({"of": "tokens"}, 3, make))
    assert 1 == len(made)
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert np.array_equal(states, source.states({"of": "tokens"}, 3, make))
    assert 2 == len(made)
    part = states.tobytes()[4:]
    path.write_bytes(digest_bytes(part).encode() + part)

    assert np.array_equal(states, source.states({"of": "tokens"}, 3, make))
    assert 3 == len(made)
    os.utime(path, (time.time() + 86400,) * 2)

    assert np.array_equal(states, source.states({"of": "tokens"}, 3, make))
    assert 4 == len(made)


def test_of_models_that_are_compared_the_source_alone_is_kept(tmp_path: Path) -> None:
    """A variant's own figures are kept with its checks."""
    measure, source = Counter(), KeptSource(Kept(tmp_path), FACTS, "BF16")
    names = ("BF16", "four", "BF16", "four")
    figures = [source.measured(name, {}, Figure, measure).value for name in names]

    assert [1.0, 2.0, 1.0, 3.0] == figures


def measured_in(tables: Tables) -> Callable[[], Check]:
    """A check that passes and adds rows."""

    def make() -> Check:
        if not tables.has_source(Library.MLX_LM, "a/model"):
            tables.perplexities.append(ROWS[0])
        tables.perplexities.append(ROWS[1])
        return judged("perplexity", [], "7.000 at 256")

    return make


def test_a_check_that_is_known_brings_its_rows_and_its_day(tmp_path: Path) -> None:
    """The source's row comes along, once, also where another variant had brought it before."""
    memory = Memory(Kept(tmp_path), {"variant": "four"})
    before, alone, after = Tables([ROWS[0]]), Tables(), Tables([ROWS[0]])
    (made,) = memory.checks("perplexity", FACTS, before, measured_in(before))
    (known,) = memory.checks("perplexity", FACTS, alone, measured_in(Tables()))
    memory.checks("perplexity", FACTS, after, measured_in(Tables()))

    assert ("", time.strftime("%Y-%m-%d")) == (made.measured, known.measured)
    assert replace(made, problems=[]) == replace(known, problems=[], measured="")
    assert [row.name for row in ROWS] == [row.name for row in alone.perplexities]
    assert ROWS[1].found == alone.perplexities[1].found
    assert 2 == len(after.perplexities)


@pytest.mark.parametrize("check", [judged("mtp", ["no draft"], ""), skipped("mtp", "no text")])
def test_what_did_not_pass_is_made_again(tmp_path: Path, check: Check) -> None:
    """Whoever repairs something is not told what was."""
    memory, made = Memory(Kept(tmp_path), {}), []

    def make() -> Check:
        made.append(check)
        return check

    for _ in range(2):
        memory.checks("mtp", FACTS, Tables(), make)

    assert 2 == len(made)


def test_what_was_found_while_the_folder_changed_is_not_kept(project: Project) -> None:
    """As by a build: nobody knows of which of the two it is."""
    build_variants(["mlx-4bit"], project.options())
    more = project.out / "mlx-4bit" / "extra.json"

    def listen(variant: str, check: Check) -> None:
        if check.name == "chat":
            more.write_text("{}", encoding="utf-8")

    verify_variants(["mlx-4bit"], project.options(), VerifySettings(run=False), listen)
    more.unlink()

    assert {"round trip": False} == days(project)


def days(project: Project, **changes: bool) -> dict[str, bool]:
    """By the checks of a variant's files, whether they were known."""
    settings = VerifySettings(run=False, **changes)
    (result,) = verify_variants(["mlx-4bit"], project.options(), settings).variants
    return {item.name: bool(item.measured) for item in result.checks if item.name == "round trip"}


def test_verify_measures_again_what_changed_and_what_it_is_told_to(project: Project) -> None:
    """A folder with other bytes is another, be it of the same name; its page is not its model."""
    build_variants(["mlx-4bit"], project.options())
    folder = project.out / "mlx-4bit"

    assert [{"round trip": False}, {"round trip": True}] == [days(project), days(project)]
    assert {"round trip": False} == days(project, again=True)
    (folder / "extra.json").write_text("{}", encoding="utf-8")
    assert {"round trip": False} == days(project)
    (folder / "extra.json").unlink()
    (folder / "NOTES.md").write_text("Read by people.", encoding="utf-8")
    assert {"round trip": True} == days(project)


def test_a_folder_whose_files_are_damaged_has_no_memory(project: Project) -> None:
    """What was found of it when it was whole says nothing."""
    build_variants(["mlx-4bit"], project.options())
    days(project)
    config = project.out / "mlx-4bit" / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")

    assert {"round trip": False} == days(project)


def test_checks_that_begin_are_counted(project: Project) -> None:
    """Whoever waits sees how many of how many are done."""
    build_variants(["mlx-4bit"], project.options())
    heard: list[tuple[str, int, int]] = []

    def begins(variant: str, check: str, done: int, total: int) -> None:
        heard.append((check, done, total))

    verify.verify_variants(
        ["mlx-4bit"], project.options(), VerifySettings(run=False), begins=begins
    )

    assert [("digests", 0, 7), ("round trip", 3, 7)] == heard


def test_records_lie_under_digests(tmp_path: Path) -> None:
    """Nothing that facts say becomes a path."""
    Kept(tmp_path).keep({"variant": "../../x"}, Figure(1.0), 0.0)

    assert is_digest(only_file(tmp_path).name)
