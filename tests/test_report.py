"""`carnice report` tells what builds and verifications left, and measures nothing itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, Project
from tiny import read_json, write_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.findings import folder_stamp, keep_findings, load_findings
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.report import Report, built_variants, collect_report, unverified
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.formats.library import Library
from carnice_build.store.history import BuildRecord, read_build_record
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.running import SOURCE, PerplexityRow

FOUR, MIXED = "mlx-4bit", "mlx-mixed_4_6"
MODEL = "kai-os/Carnice-V2-27b"
ONE_MORE_BIT = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", bits: 8}'
FILES = VerifySettings(run=False)


def collect(project: Project, *names: str) -> Report:
    options = project.options()
    return collect_report(names or built_variants(options), options)


def record(project: Project, name: str) -> BuildRecord:
    found = read_build_record(project.cache, name)
    assert found is not None
    return found


def test_a_build_leaves_what_it_did(project: Project) -> None:
    """Actions run, reused and shared are those of each variant's last build that did something."""
    both = build_variants([FOUR, MIXED], project.options())
    build_variants([FOUR, MIXED], project.options())

    four, mixed = record(project, FOUR), record(project, MIXED)
    actions = both.variants[0].actions_run
    common = 2 * actions - both.actions_run
    assert (actions, actions, 0, 1) == (four.actions, four.run, four.reused, four.builds)
    assert 0 < common < actions
    assert (common, common, 2) == (four.shared, mixed.shared, mixed.variants)
    assert four.elapsed >= both.seconds > 0
    assert four.seconds == both.variants[0].seconds > 0


def test_a_changed_knob_is_a_build_of_one_action(project: Project) -> None:
    """The record follows the last build, its totals follow all of them."""
    first = build_variants([FOUR], project.options()).variants[0].actions_run
    build_variants([FOUR], project.options(overrides=(ONE_MORE_BIT,)))

    found = record(project, FOUR)
    assert (1, 0, first - 1) == (found.run, found.shared, found.reused)
    assert (2, first + 1) == (found.builds, found.total_run)
    assert found.key == read_json(project.out / FOUR / "build.json")["key"]


def test_what_was_verified_is_reported(project: Project) -> None:
    """Each quantized module's error comes with its kind and layer; the rest is not verified."""
    build_variants([FOUR, MIXED], project.options())
    verify_variants([FOUR], project.options(), FILES)

    four, mixed = sorted(collect(project).variants, key=lambda variant: variant.variant)

    assert {"digests", "structure", "round trip"} <= {
        check.name for check in (four.findings.checks if four.findings else ())
    }
    places = {(item.kind, item.layer) for item in four.errors}
    assert {("embed_tokens", None), ("lm_head", None), ("mlp.down_proj", 7)} <= places
    assert all(0 < (item.error or 0) < 0.2 for item in four.errors)
    assert (None, []) == (mixed.findings, mixed.errors)
    assert [FOUR, MIXED] == unverified([FOUR, MIXED], project.options())


def test_another_folder_is_not_verified(project: Project) -> None:
    """Findings and build times are of one folder: a rebuilt one starts without."""
    build_variants([FOUR], project.options())
    verify_variants([FOUR], project.options(), FILES)
    build_variants([FOUR], project.options(overrides=(ONE_MORE_BIT,), cache=project.root / "other"))

    (four,) = collect(project).variants

    assert (None, None) == (four.findings, four.build)


def _truncate_page(folder: Path) -> None:
    (folder / "README.md").write_text("")


def _touch_config(folder: Path) -> None:
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate_page, _touch_config, shutil.rmtree])
def test_findings_are_of_the_very_files(project: Project, damage: Callable[[Path], None]) -> None:
    """What was found of a folder is not told of one that was built since, were its key the same."""
    build_variants([FOUR], project.options())
    key = read_json(project.out / FOUR / "build.json")["key"]
    verify_variants([FOUR], project.options(), FILES)
    damage(project.out / FOUR)
    build_variants([FOUR], project.options())

    (four,) = collect(project).variants

    assert key == read_json(project.out / FOUR / "build.json")["key"]
    assert four.findings is None


def test_a_folder_that_is_built_during_its_verification_is_not_verified(project: Project) -> None:
    """Findings are kept for the folder that was opened, not for the one that lies there now."""
    build_variants([FOUR], project.options())
    seen: list[str] = []

    def build_again(variant: str, check: Check) -> None:
        if not seen:
            build_variants([variant], project.options(overrides=(ONE_MORE_BIT,)))
        seen.append(check.name)

    verify_variants([FOUR], project.options(), FILES, build_again)

    (four,) = collect(project).variants

    assert seen
    assert four.findings is None


def test_what_a_build_leaves_alone_stays_verified(project: Project) -> None:
    """A build with nothing to do forgets nothing."""
    build_variants([FOUR], project.options())
    verify_variants([FOUR], project.options(), FILES)
    build_variants([FOUR], project.options())

    (four,) = collect(project).variants

    assert four.passed


def test_what_is_skipped_stays_as_it_was_found(project: Project) -> None:
    """A verification without running the model forgets no perplexity."""
    build_variants([FOUR], project.options())
    options, folder = project.options(), project.out / FOUR
    (variant,) = plan_variants([FOUR], options).variants
    measured = Check("perplexity", Outcome.PASSED, "7 at 256")
    rows = [
        PerplexityRow(SOURCE, Library.MLX_LM, [Perplexity(256, 8, 6.0, 0.1)], source=MODEL),
        PerplexityRow(f"{FOUR}, rounded", Library.MLX_LM, [Perplexity(256, 8, 7.0, 0.1)]),
        PerplexityRow(MIXED, Library.MLX_LM, [Perplexity(256, 8, 8.0, 0.1)]),
    ]
    text = Path("some") / "text.txt"
    keep_findings(
        options.cache, variant, folder_stamp(folder), [measured], rows, ran=True, text=text
    )

    verify_variants([FOUR], options, FILES)

    found = load_findings(options.cache, FOUR, folder_stamp(folder))
    assert found is not None
    assert (True, "text.txt", rows[:2]) == (found.ran, found.text, found.rows)
    checks = {check.name: check for check in found.checks}
    assert "7 at 256" == checks["perplexity"].summary
    assert Outcome.PASSED == checks["round trip"].outcome
    assert [] == unverified([FOUR], options)


def test_sharing_counts_each_byte_once(project: Project) -> None:
    """Tensors of equal content are shared, and a file with many links is on disk once."""
    report = build_variants([FOUR, MIXED], project.options())

    found = collect(project, FOUR, MIXED)

    (four, common), (back, mixed) = found.sharing.tensor_bytes
    assert common == back
    assert 0 < common < four < mixed
    assert sum(item.size for item in report.variants) < found.sharing.outputs
    shards = {path.stat().st_ino: path.stat().st_size for path in project.out.rglob("*.saf*")}
    small = [path for path in project.out.rglob("*") if path.is_file() and ".saf" not in path.name]
    assert (
        sum(shards.values()) + sum(path.stat().st_size for path in small) == found.sharing.folders
    )
    assert found.sharing.folders < found.sharing.outputs
    assert report.actions_run == found.sharing.distinct_actions
    assert sum(item.actions_run for item in report.variants) == found.sharing.actions


def test_the_command_writes_page_and_table(
    project: Project, carnice: Callable[..., Finished]
) -> None:
    """Without names, everything that is built is in OUT/report, in the order of size."""
    build_variants([MIXED, FOUR], project.options())

    run = carnice("report")

    assert (0, "") == (run.code, run.err)
    page, table = map(Path, run.out.split())
    assert {"index.html", "report.md"} == {page.name, table.name}
    assert (project.root / "build" / "report" / "index.html").stat().st_size > 1_000_000
    rows = [line.split("|")[1].strip() for line in table.read_text().splitlines() if "|" in line]
    assert [FOUR, MIXED] == rows[-2:]
    assert [FOUR] == [
        item["variant"] for item in json.loads(carnice("report", FOUR, "--json").out)["variants"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "holds no build"),
        ((FOUR,), "carnice build mlx-4bit"),
        (("mlx-4bits",), "no recipe for the variant 'mlx-4bits'"),
    ],
)
def test_what_is_not_built_is_named(
    project: Project, carnice: Callable[..., Finished], arguments: tuple[str, ...], message: str
) -> None:
    """A report of nothing, or of what is not there, is an error in one line."""
    run = carnice("report", *arguments)

    assert 0 != run.code
    assert message in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b'{"key": 1}', b'{"checks": [{}]}', b"[" * 100_000]
)
def test_a_damaged_memory_is_no_memory(project: Project, content: bytes) -> None:
    """Whatever stands in the cache's notes, the folder is reported without them."""
    build_variants([FOUR], project.options())
    verify_variants([FOUR], project.options(), FILES)
    for name in ("builds", "verified", "history"):
        (project.cache / name / FOUR).write_bytes(content)

    (four,) = collect(project).variants

    assert (None, None) == (four.findings, four.build)


@pytest.mark.parametrize("damage", [{"recipe": []}, {"sources": {}}, {"tensors": {"a": 1}}])
def test_a_damaged_folder_is_named(
    project: Project, carnice: Callable[..., Finished], damage: dict[str, Any]
) -> None:
    """A build.json that says nonsense is an error with the folder's name."""
    build_variants([FOUR], project.options())
    path = project.out / FOUR / "build.json"
    write_json(path, read_json(path) | damage)

    run = carnice("report")

    assert 0 != run.code
    assert f"{FOUR}: build.json is damaged" in run.err


def test_data_alone_loads_no_library_that_plots_or_computes(project: Project) -> None:
    """`--json` needs neither plotly nor numpy."""
    build_variants([FOUR], project.options())
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print([m for m in ('plotly', 'numpy') if m in sys.modules]))\n"
        "from carnice_build.cli.main import run\n"
        "run()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "report", "--json"], capture_output=True, text=True, check=True
    )

    assert "[]" == run.stdout.splitlines()[-1]
