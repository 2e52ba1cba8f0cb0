"""Model cards and pages say what is in the folder, in words and numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Project
from reporting import sample_report

from carnice_build.commands.build import describe
from carnice_build.commands.options import Options
from carnice_build.commands.plan import names_of, plan_variants
from carnice_build.formats.variant import Shard
from carnice_build.package.files import render_files
from carnice_build.planning.planner import VariantPlan
from carnice_build.recipe.loader import list_recipes
from carnice_build.report.report_page import render_page
from carnice_build.report.report_table import render_markdown

VARIANTS = [path.stem for path in list_recipes(REPOSITORY / "recipes")]
STANDING_IN = names_of(Options(recipes=REPOSITORY / "recipes", profile="demo"))
"""Those that `demo/` has checkpoints for."""
LEFTOVER = re.compile(r"\{'|\['|\[\]|\{\}|\bNone\b|Undefined|\bnan\b|<[\w.]+ object|mappingproxy")
"""What Python prints of a value that is no text and no number."""

ROUNDED = """
extends: [_base/carnice-text.yaml, preset:int4-rtn]
variant: rounded
description: Rounded
quantize: {method: nearest}
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes, where profile `full` means the shapes of the real checkpoints."""
    root = tmp_path_factory.mktemp("cards")
    shutil.copytree(REPOSITORY / "recipes", root / "recipes")
    for name in ("demo", "benchmarks"):
        (root / name).symlink_to(REPOSITORY / name)
    profiles = root / "recipes" / "_profiles.yaml"
    table = yaml.safe_load(profiles.read_text())
    profiles.write_text(yaml.safe_dump({**table, "full": table["shapes"]}))
    return root


def pages(plan: VariantPlan) -> Iterator[tuple[str, str]]:
    """Names and texts of the pages and scripts of a variant that was only planned."""
    shards = [
        Shard(
            plan.shard_name(index),
            "0" * 64,
            Path(),
            layout.size,
            [(slot.tensor.name, slot.tensor.ref.spec, "0" * 64) for slot in layout.slots],
        )
        for index, layout in enumerate(plan.packs)
    ]
    rendered = render_files(describe(plan, shards, {}), plan.format)
    for name, content in rendered.files.items():
        if name.endswith((".md", ".sh")):
            yield name, content.decode()


@pytest.mark.parametrize(
    ("variant", "profile"),
    [(name, "demo") for name in STANDING_IN] + [(name, "full") for name in VARIANTS],
)
def test_no_page_shows_how_python_prints(everything: Path, variant: str, profile: str) -> None:
    """Pages and scripts of every recipe are prose and numbers, at the demo's size and in full."""
    options = Options(recipes=everything / "recipes", profile=profile)
    for plan in plan_variants([variant], options).variants:
        found = dict(pages(plan))

        assert "README.md" in found
        for name, text in found.items():
            assert [] == LEFTOVER.findall(text), name
            assert yaml.safe_load(text.split("---\n")[1]) if name == "README.md" else text


def test_no_page_of_a_report_shows_how_python_prints() -> None:
    """Nor does the table of a report, nor its HTML page, whatever was not measured."""
    report = sample_report()
    text = re.sub(r"<(script|style)\b.*?</\1>", "", render_page(report), flags=re.DOTALL)

    assert [] == LEFTOVER.findall(render_markdown(report))
    assert [] == LEFTOVER.findall(text)
    assert "mlx-mixed_3_6" in text


@pytest.mark.parametrize(
    ("profile", "row"),
    [("demo", "16 samples of at most 2048 tokens"), ("full", "256 samples of at most 2048 tokens")],
)
def test_a_card_gives_the_counts_of_its_profile(everything: Path, profile: str, row: str) -> None:
    """Of a number for each profile, the card has the one that was calibrated with."""
    options = Options(recipes=everything / "recipes", profile=profile)
    (plan,) = plan_variants(["w4a16-awq"], options).variants

    assert row in dict(pages(plan))["README.md"]


def test_a_card_gives_counts_that_the_recipe_leaves_out(everything: Path) -> None:
    """What holds by default is what was calibrated with, so it is on the card."""
    text = "extends: _base/carnice-mtp.yaml\nvariant: short\ndescription: x\n"
    text += "quantize: {format: nvfp4}\ncalibration: {dataset: demo/calibration.jsonl}\n"
    (everything / "recipes" / "short.yaml").write_text(text)
    (plan,) = plan_variants(["short"], Options(recipes=everything / "recipes")).variants

    assert "20 samples of at most 8192 tokens" in dict(pages(plan))["README.md"]


def test_a_card_of_a_model_that_is_nowhere_else_links_to_nothing(project: Project) -> None:
    """Its name is one that nobody else knows, so nobody is to look for its authors by it."""
    project.recipe(
        "mine",
        "variant: mine\ndescription: A\nquantize: {format: fp8-dynamic}\n"
        "sources: {body: {model: local/mine, folder: demo/qwen3.6-27b}}\n",
    )
    (plan,) = plan_variants(["mine"], project.options()).variants
    card = dict(pages(plan))["README.md"]

    assert "Please credit the authors of the model that it was made of." in card
    assert "GiB" not in card


def test_a_card_tells_of_no_calibration_that_was_not_run(project: Project) -> None:
    """A section that the format has no use for is not on the card, nor its dataset on record."""
    project.recipe("rounded", ROUNDED + "calibration: {dataset: rows.jsonl}\n")
    (project.root / "rows.jsonl").write_text('{"text": "x"}\n')
    (plan,) = plan_variants(["rounded"], project.options()).variants

    assert "Calibration" not in dict(pages(plan))["README.md"]
