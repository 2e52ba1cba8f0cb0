"""Cards tell what `carnice verify` measured of the folder that they lie in, and nothing else."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from tiny import read_json, write_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.findings import folder_stamp, keep_findings
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifyResult, VerifySettings, verify_variants
from carnice_build.formats.library import Library
from carnice_build.formats.measured import Line, Measured
from carnice_build.report.verify_table import verify_json, verify_tables
from carnice_build.store.history import read_findings
from carnice_build.verification.measured import measured
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.running import SOURCE, PerplexityRow

FOUR = "mlx-4bit"
MODEL = "kai-os/Carnice-V2-27b"
FILES = VerifySettings(run=False)
COMMAND = f"carnice verify {FOUR} --text text.txt"
ROWS = (
    PerplexityRow(SOURCE, Library.MLX_LM, [Perplexity(256, 8, 6.0, 0.1)], source=MODEL),
    PerplexityRow(FOUR, Library.MLX_LM, [Perplexity(256, 8, 7.0, 0.25, kl=0.0125)]),
)
MORE_BITS = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}'


def pretend(
    project: Project,
    rows: tuple[PerplexityRow, ...] = ROWS,
    text: str = "text.txt",
    command: str = COMMAND,
) -> VerifyResult:
    """Have the cache say that the folder was run, and verify the rest of it."""
    options, folder = project.options(), project.out / FOUR
    (variant,) = plan_variants([FOUR], options).variants
    check = Check("perplexity", Outcome.PASSED, "7 at 256")
    keep_findings(
        options.cache,
        variant,
        folder_stamp(folder),
        [check],
        rows,
        ran=True,
        text=Path(text),
        command=command,
    )
    return verify_variants([FOUR], options, FILES)


def card(project: Project) -> str:
    return (project.out / FOUR / "README.md").read_text()


def written(folder: Path) -> set[tuple[str, int, int]]:
    """Each file by its name, what it is on disk, and when it was written."""
    stats = {path.name: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {(name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture
def told(project: Project) -> Project:
    """A folder whose card tells figures."""
    build_variants([FOUR], project.options())
    pretend(project)
    return project


def test_a_card_tells_nothing_that_was_not_measured(project: Project) -> None:
    """Neither after a build nor after checks that run no model."""
    build_variants([FOUR], project.options())
    built = card(project)
    result = verify_variants([FOUR], project.options(), FILES)

    assert "## Measured" not in built
    assert built == card(project)
    assert not result.variants[0].renewed


def test_a_card_tells_what_was_measured(told: Project) -> None:
    """Beside the source's figures, with the text and the command."""
    page = card(told)

    assert "| Perplexity, 256 tokens, 8 sequences | 6.000 ± 0.100 | 7.000 ± 0.250 |\n" in page
    assert "| KL to the source, 256 tokens, 8 sequences |  | 0.0125 nats a token |\n" in page
    assert "The held-out text is text.txt.\n" in page
    assert f"```bash\n{COMMAND}\n```\n" in page
    assert "stands in for the published one.\n\n| | BF16 source | This folder |\n" in page
    assert "MTP head, " not in page


def test_nothing_but_the_card_and_its_record_is_written(project: Project) -> None:
    """All else is the same file as before, and the record fits the card."""
    build_variants([FOUR], project.options())
    folder = project.out / FOUR
    before = written(folder)
    first = pretend(project)
    after = written(folder)
    second = verify_variants([FOUR], project.options(), FILES)

    assert {"README.md", "build.json"} == {name for name, _, _ in before ^ after}
    assert Outcome.PASSED == second.variants[0].checks[0].outcome
    assert f"{FOUR}: README.md now tells what was measured" == list(verify_tables(first))[-1]
    assert [True, False] == [
        verify_json(result)["variants"][0]["card_renewed"] for result in (first, second)
    ]


def test_a_build_leaves_the_figures(told: Project) -> None:
    """It has nothing to do, and elsewhere it writes the same bytes."""
    page = card(told)
    record = (told.out / FOUR / "build.json").read_bytes()
    (again,) = build_variants([FOUR], told.options()).variants
    other = told.root / "elsewhere"
    build_variants([FOUR], told.options(out=other))

    assert not again.packaged
    assert page == card(told) == (other / FOUR / "README.md").read_text()
    assert record == (told.out / FOUR / "build.json").read_bytes()


def test_figures_are_of_weights(told: Project) -> None:
    """Others have none, and a card that says something else keeps them."""
    overrides = ("description=Other words",)
    build_variants([FOUR], told.options(overrides=overrides))
    reworded = card(told)
    verify_variants([FOUR], told.options(overrides=overrides), FILES)
    kept = card(told)
    build_variants([FOUR], told.options(overrides=(MORE_BITS,)))

    assert "Other words." in reworded
    assert "7.000 ± 0.250" in reworded
    assert reworded == kept
    assert "## Measured" not in card(told)


def test_figures_of_a_damaged_folder_are_not_told(project: Project) -> None:
    """Nobody knows what they are of."""
    build_variants([FOUR], project.options())
    path = project.out / FOUR / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b"e", b"a", 1))
    pretend(project)

    assert "## Measured" not in card(project)


def test_a_folder_of_another_recipe_is_left_alone(project: Project) -> None:
    """What would be written is not what a build of the recipe as it was has written."""
    build_variants([FOUR], project.options(overrides=(MORE_BITS,)))
    built = card(project)
    pretend(project)

    assert built == card(project)


def test_a_build_mends_a_card_without_its_record(told: Project) -> None:
    """As a verification leaves it that is killed between the two."""
    page, record = card(told), (told.out / FOUR / "build.json").read_bytes()
    write_json(
        told.out / FOUR / "build.json", {**read_json(told.out / FOUR / "build.json"), "key": "0"}
    )
    build_variants([FOUR], told.options())

    assert page == card(told)
    assert record == (told.out / FOUR / "build.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1},
        {"rows": [{"name": FOUR}]},
        {"made_by": ["carnice"]},
        {"checks": [{}]},
        {"content": None},
    ],
)
def test_damaged_findings_are_none(told: Project, change: Mapping[str, Any]) -> None:
    """The card is written without them."""
    found = read_findings(told.cache, FOUR)
    assert found is not None
    content = zlib.compress(json.dumps({**found, **change}).encode())
    (told.cache / "verified" / FOUR).write_bytes(content)
    build_variants([FOUR], told.options())

    assert "## Measured" not in card(told)


def test_nothing_in_findings_becomes_markup(project: Project) -> None:
    """Names of texts, rows and commands are words on the page, whoever wrote them."""
    build_variants([FOUR], project.options())
    bad = "<script>x</script>|[a](http://b)\n# Title\n```\n![c](d) **e**"
    row = PerplexityRow(f"{FOUR}, {bad}", Library.MLX_LM, ROWS[1].found)
    pretend(project, (ROWS[0], row), "a`[b](c)<i>|.txt", f"carnice verify '{bad}'")
    section = card(project).partition("## Measured")[2].partition("## Usage")[0]
    prose, _, code = section.partition("```bash\n")

    assert "<" not in prose
    assert "](" not in prose.replace("\\]", "")
    assert "The held-out text is a\\`\\[b\\](c)&lt;i&gt;\\|.txt.\n" in prose
    assert "# Title" not in prose.splitlines()
    assert "```" == code.splitlines()[1]
    assert 1 == code.count("```")
    table = [line for line in prose.splitlines() if line.startswith("|")]
    assert {4} == {line.replace("\\|", "").count("|") for line in table}


DETAILS: Mapping[str, Mapping[str, Any]] = {
    "mtp": {
        "head as packaged": {
            "3": {"steps": 9, "rates": [0.9, 0.5, 0.25], "mean_length": 2.65, "error": 0.04},
            "1": {"steps": 9, "rates": [0.9], "mean_length": 1.9, "error": 0.02},
        },
        "no head": {"1": {"steps": 9, "rates": [0.0], "mean_length": 1.0, "error": 0.0}},
    },
    "calls": {
        "BF16": {"parsed": {"count": 2, "of": 40, "error": 1.4}},
        "BF16, own template": {"parsed": {"count": 40, "of": 40, "error": 0.0}},
        FOUR: {"parsed": {"count": 30, "of": 40, "error": 2.7}, "exact": {"count": 0, "of": 0}},
    },
    "fidelity": {
        "BF16": {"answered": 24, "exact": 18, "typos": 2},
        f"{FOUR}, rounded": {"answered": 24, "exact": 12, "typos": 0},
    },
}
LINES = (
    Line("MTP head, 1 draft a step: tokens a step", "", "1.90 ± 0.02"),
    Line("MTP head, 1 draft a step: accepted, by position", "", "90%"),
    Line("MTP head, 3 drafts a step: tokens a step", "", "2.65 ± 0.04"),
    Line("MTP head, 3 drafts a step: accepted, by position", "", "90% / 50% / 25%"),
    Line("Tool calls: answers that the parser finds a call in", "40 of 40 ± 0.0", "30 of 40 ± 2.7"),
    Line("Rare names copied exactly", "18 of 24 ± 2.1", "12 of 24 ± 2.4"),
    Line("Rare names with typos", "2 of 24 ± 1.4", "0 of 24 ± 0.5"),
)


def of_checks(
    details: Mapping[str, Mapping[str, Any]], outcome: Outcome = Outcome.PASSED
) -> Measured | None:
    checks = [Check(name, outcome, "", (), item) for name, item in details.items()]
    return measured(checks, (), "text.txt", {"mtp": "one", "fidelity": "two"}, FOUR)


def test_all_checks_that_run_the_model_are_told() -> None:
    """Each command once, and only those behind something that is told."""
    assert Measured(LINES, "text.txt", ("one", "two")) == _tupled(of_checks(DETAILS))
    assert Measured(LINES[5:], "", ("two",)) == _tupled(
        of_checks({"fidelity": DETAILS["fidelity"]})
    )
    assert of_checks(DETAILS, Outcome.SKIPPED) is None


def _tupled(found: Measured | None) -> Measured:
    assert found is not None
    return Measured(tuple(found.lines), found.text, tuple(found.commands))


def _wrong(name: str, *path: str, to: object) -> Mapping[str, Mapping[str, Any]]:
    """The details of one check, with another value at a place in them."""
    details = json.loads(json.dumps(DETAILS[name]))
    place = details
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return {name: details}


@pytest.mark.parametrize(
    "details",
    [
        _wrong("mtp", "head as packaged", to={"1": {"rates": [], "mean_length": 1, "error": 0}}),
        _wrong("mtp", "head as packaged", to={"<b>": DETAILS["mtp"]["no head"]["1"]}),
        _wrong("mtp", "head as packaged", "1", "error", to=float("nan")),
        _wrong("mtp", "head as packaged", "1", "rates", to=[7.0]),
        _wrong("mtp", "head as packaged", "1", "mean_length", to="<b>"),
        _wrong("calls", FOUR, "parsed", to={"count": "<b>", "of": 1, "error": 0}),
        _wrong("fidelity", "BF16", "exact", to=-1),
        _wrong("fidelity", "BF16", "answered", to=0),
        _wrong("fidelity", "BF16", to=[]),
    ],
)
def test_details_of_another_form_are_not_told(details: Mapping[str, Mapping[str, Any]]) -> None:
    """Nor numbers that are none."""
    assert of_checks(details) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), None, -1.0])
def test_a_perplexity_that_is_no_number_is_not_told(number: float | None) -> None:
    """As one of a model that is broken."""
    rows = [PerplexityRow(FOUR, Library.MLX_LM, [Perplexity(256, 8, number, 0.1, kl=number)])]

    assert measured((), rows, "text.txt", {}, FOUR) is None
