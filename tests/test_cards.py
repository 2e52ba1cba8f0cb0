"""Model cards and pages say what is in the folder, in words and numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Project
from reporting import sample_report
from tiny import write_json
from zoo import write_zoo

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
            plan.packs[index].name,
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
        "variant: mine\ndescription: A\n"
        "quantize: {format: compressed-tensors, scheme: FP8_DYNAMIC}\n"
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


def card_of(project: Project, text: str = "", **generation: object) -> str:
    """The card of an MLX variant of a checkpoint that states how to sample, or nothing of it."""
    write_json(project.base / "generation_config.json", {"eos_token_id": 2, **generation})
    (project.base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    project.recipe("plain", PLAIN + text)
    (plan,) = plan_variants(["plain"], project.options()).variants
    return dict(pages(plan))["README.md"]


PLAIN = """
extends: preset:mlx-4bit
variant: plain
description: Plain
sources: {body: {model: Qwen/Qwen3.6-27B}}
"""


def test_a_card_states_no_sampling_and_no_language_that_nobody_stated(project: Project) -> None:
    """Nor that a model thinks whose template has no word for it."""
    card = card_of(project)
    front = yaml.safe_load(card.split("---\n")[1])

    assert "language" not in front
    assert "--port 8080\n" in card
    assert "--temp" not in card
    assert "enable_thinking" not in card


def test_a_card_states_the_sampling_of_the_source(project: Project) -> None:
    """As its generation_config.json has it, unless that samples nothing."""
    card = card_of(project, temperature=0.15, top_k=40, top_p=10**400, min_p="x")
    greedy = card_of(project, temperature=0.15, do_sample=False)

    assert "--port 8080 --temp 0.15 --top-k 40\n" in card
    assert "--temp" not in greedy


def test_a_card_states_the_sampling_and_languages_of_the_recipe(project: Project) -> None:
    """Rather than those of the source."""
    text = "card: {language: [fr], sampling: {temperature: 0.7, top_p: 1}}\n"
    card = card_of(project, text, temperature=0.15)

    assert ["fr"] == yaml.safe_load(card.split("---\n")[1])["language"]
    assert "--port 8080 --temp 0.7 --top-p 1\n" in card


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("mlx-m")])
def test_cards_of_carnice_say_how_it_is_sampled(everything: Path, variant: str) -> None:
    """By the recipes that ship, whatever its generation_config.json says."""
    options = Options(recipes=everything / "recipes", profile="demo")
    (plan, *_) = plan_variants([variant], options).variants
    card = dict(pages(plan))["README.md"]

    assert ["en", "zh"] == yaml.safe_load(card.split("---\n")[1])["language"]
    assert "--temp 0.6 --top-p 0.95 --top-k 20\n" in card


@pytest.mark.parametrize(
    ("family", "preset", "library", "told"),
    [
        ("qwen3_moe", "w4a16-rtn", "vllm", 1),
        ("qwen3", "w4a16-rtn", "transformers", 0),
        ("qwen3_moe", "fp8-dynamic", "transformers", 0),
    ],
)
def test_a_card_of_w4a16_with_experts_is_for_vllm(
    project: Project, family: str, preset: str, library: str, told: int
) -> None:
    """transformers loads neither those of AWQ nor those rounded to nearest, but other folders."""
    source = write_zoo(project.root / "source", family, "transformers")
    text = "variant: plain\ndescription: Plain\nsources: {body: {model: a/b}}\n"
    project.recipe("plain", f"extends: preset:{preset}\n{text}")
    (plan,) = plan_variants(["plain"], project.options(sources={"body": source})).variants
    card = dict(pages(plan))["README.md"]

    assert library == yaml.safe_load(card.split("---\n")[1])["library_name"]
    assert told == card.count("\n- transformers does not load it")


def front(card: str) -> dict[str, Any]:
    """The metadata that the hub reads."""
    metadata: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return metadata


@pytest.fixture(scope="module")
def card_in_full(everything: Path) -> Callable[[str], str]:
    """The card of a recipe at full size."""

    def card(variant: str) -> str:
        options = Options(recipes=everything / "recipes", profile="full")
        (plan, *_) = plan_variants([variant], options).variants
        return dict(pages(plan))["README.md"]

    return card


CARNICE, QWEN = "kai-os/Carnice-V2-27b", "Qwen/Qwen3.6-27B"
GRID = "noonghunna/Qwen3.6-27B-int4-AutoRound"


@pytest.mark.parametrize(
    ("variant", "parents"),
    [
        ("int4-bf16-mtp", [CARNICE, QWEN, GRID]),
        ("nvfp4-text-mtp", [CARNICE, QWEN]),
        ("qwen-nvfp4-text-mtp", QWEN),
        ("mlx-4bit", CARNICE),
    ],
)
def test_the_hub_is_told_all_parents(
    card_in_full: Callable[[str], str], variant: str, parents: str | list[str]
) -> None:
    """The fine-tune first, then what its head and its grid are from; one alone is no list."""
    metadata = front(card_in_full(variant))

    assert parents == metadata["base_model"]
    assert "quantized" == metadata["base_model_relation"]


def test_a_card_says_which_part_is_from_where(card_in_full: Callable[[str], str]) -> None:
    """By repository and revision, each repository once."""
    section = card_in_full("int4-bf16-mtp").partition("## Made from")[2].partition("##")[0]
    rows = [line.split(" | ") for line in section.splitlines() if "huggingface" in line]

    assert [
        ["| The model", f"[`{CARNICE}`](https://huggingface.co/{CARNICE})"],
        [
            "| The MTP head; the weights that the grid was made for",
            f"[`{QWEN}`](https://huggingface.co/{QWEN})",
        ],
        [
            "| The INT4 grid that the weights are put on",
            f"[`{GRID}`](https://huggingface.co/{GRID})",
        ],
    ] == [row[:2] for row in rows]
    assert {"`main` |"} == {row[2] for row in rows}


def test_a_card_has_the_first_launch_and_a_link_to_the_others(
    card_in_full: Callable[[str], str],
) -> None:
    """With the options of the script that is recommended."""
    card = card_in_full("nvfp4-text-mtp")
    usage = card.partition("## Usage")[2].partition("## ")[0]

    assert "```bash\nvllm serve \\\n    path/to/nvfp4-text-mtp \\\n    --" in usage
    assert "    --kv-cache-dtype fp8 \\\n" in usage
    assert "    --language-model-only \\\n" in usage
    assert "](serve/README.md)" in usage


def test_a_card_tells_of_the_template_and_who_reads_its_calls() -> None:
    """That it was patched, where it was."""
    assert "is that of the source, patched: " in card_of_demo("int4-rtn")
    assert "parser `hermes` reads, and thoughts in that of `qwen3`." in card_of_demo("int4-rtn")
    assert "template has the model write tool calls" in card_of_demo("nvfp4-text-mtp")
    assert "parser `qwen3_xml` reads" in card_of_demo("nvfp4-text-mtp")


def card_of_demo(variant: str) -> str:
    """The card of a recipe at the demo's size."""
    options = Options(recipes=REPOSITORY / "recipes", profile="demo")
    (plan, *_) = plan_variants([variant], options).variants
    return dict(pages(plan))["README.md"]


def test_a_launch_without_files_has_the_parsers_too(project: Project) -> None:
    """They follow from the template, whether there is a folder `serve/` or not."""
    template = (REPOSITORY / "demo" / "qwen3.6-27b" / "chat_template.jinja").read_text()
    (project.base / "chat_template.jinja").write_text(template)
    text = "variant: plain\ndescription: Plain\nsources: {body: {model: Qwen/Qwen3.6-27B}}\n"
    project.recipe(
        "plain", f"{text}quantize: {{format: compressed-tensors, scheme: FP8_DYNAMIC}}\n"
    )
    (plan,) = plan_variants(["plain"], project.options()).variants
    card = dict(pages(plan))["README.md"]

    assert (
        "--enable-auto-tool-choice --tool-call-parser qwen3_xml --reasoning-parser qwen3\n" in card
    )


@pytest.mark.parametrize(
    ("generation", "told"),
    [
        ({"temperature": 0.6}, "`generation_config.json` in this folder says so"),
        ({"temperature": 1}, "send this with each request"),
    ],
)
def test_a_card_says_who_samples_so(
    project: Project, generation: dict[str, object], told: str
) -> None:
    """The file that is packaged, if it says what the recipe says; else nobody but the reader."""
    write_json(project.base / "generation_config.json", generation)
    text = "variant: plain\ndescription: Plain\nsources: {body: {model: Qwen/Qwen3.6-27B}}\n"
    text += "card: {sampling: {temperature: 0.6}}\n"
    project.recipe(
        "plain", f"{text}quantize: {{format: compressed-tensors, scheme: FP8_DYNAMIC}}\n"
    )
    (plan,) = plan_variants(["plain"], project.options()).variants
    section = dict(pages(plan))["README.md"].partition("## Sampling")[2]

    assert section.startswith("\n\n| temperature |\n|---|\n| 0.6 |\n")
    assert told in section


def test_nvfp4_is_for_vllm(card_in_full: Callable[[str], str]) -> None:
    """transformers takes packed weights of ModelOpt's for weights of other sizes."""
    assert "vllm" == front(card_in_full("nvfp4-text-mtp"))["library_name"]
