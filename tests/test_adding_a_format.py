"""docs/adding-a-format.md: its two files, installed as a package, can do what our formats can."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from acme import MODULE, PAGE, PROFILE, faulty, install
from conftest import REPOSITORY, Finished, Project
from pages import code_blocks, files_of
from safetensors.torch import load_file
from tiny import read_json, write_json
from verifying import Copy

from carnice_build.commands.build import build_variants, describe
from carnice_build.commands.diff import State, diff_folders
from carnice_build.commands.plan import plan_variants
from carnice_build.formats.base import Format
from carnice_build.formats.card import render_card
from carnice_build.formats.checks import Library
from carnice_build.formats.folder import open_folder
from carnice_build.formats.registry import readers_of
from carnice_build.verification.kept import Memory
from carnice_build.verification.process import Workers
from carnice_build.verification.result import Outcome
from carnice_build.verification.runners import RUNNERS
from carnice_build.verification.running import RunSettings, Tables

VARIANT = "acme-fp8"
UP = "model.language_model.layers.1.mlp.up_proj"

Carnice = Callable[..., Finished]


@dataclass(frozen=True)
class Shown:
    """A command of the page, what the page shows of its output, and what it printed."""

    command: str
    lines: Sequence[str]
    finished: subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Acme:
    """The demo's project with the package installed, in which the page's commands have run."""

    project: Project
    module: Any
    commands: Sequence[Shown]

    @property
    def folder(self) -> Path:
        """The built variant."""
        return self.project.out / VARIANT


def run(command: str, lines: Sequence[str], root: Path, site: Path) -> Shown:
    """Run a command of the page in a process of its own, as a user with the package would."""
    _, *arguments = shlex.split(command)
    path = os.pathsep.join([str(site), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-m", "carnice_build", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    return Shown(command, lines, finished)


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Acme]:
    """Not to be changed by tests."""
    project = Project(tmp_path_factory.mktemp("acme") / "project")
    shutil.copytree(REPOSITORY / "recipes", project.recipes)
    (project.root / "demo").symlink_to(REPOSITORY / "demo")
    site = project.root / "site"
    install(site)
    shutil.copytree(site / "recipes", project.recipes, dirs_exist_ok=True)
    commands = []
    for language, block in code_blocks(PAGE):
        if language == "console":
            for command in block.removeprefix("$ ").split("\n$ "):
                first, *lines = command.splitlines()
                commands.append(run(first, lines, project.root, site))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.chdir(project.root)
        yield Acme(project, importlib.import_module("acme_fp8"), commands)
        sys.modules.pop("acme_fp8", None)


def test_the_package_is_two_files_and_every_block_is_run() -> None:
    """One module, one profile, what announces them, a recipe, and commands; no block is more."""
    blocks = list(code_blocks(PAGE))
    named = {language: set(files_of(PAGE, language)) for language in ("python", "yaml", "toml")}

    assert {"python", "yaml", "toml", "console"} == {language for language, _ in blocks}
    assert {
        "python": {MODULE},
        "yaml": {PROFILE, f"recipes/{VARIANT}.yaml"},
        "toml": {"pyproject.toml"},
    } == named
    assert all(block.startswith(("# ", "$ ")) for _, block in blocks)


def test_commands_print_what_the_page_shows(acme: Acme) -> None:
    """Every command ends well, and each line is the beginning of a printed one, in this order."""
    assert ["plan", "build", "verify", "explain", "diff"] == [
        shown.command.split()[1] for shown in acme.commands
    ]
    for shown in acme.commands:
        assert 0 == shown.finished.returncode, shown.finished.stderr
        printed = iter(shown.finished.stdout.splitlines())
        for line in shown.lines:
            beginning = line.partition("...")[0]
            assert any(found.startswith(beginning) for found in printed), (shown.command, line)


def test_what_looks_knows_the_format(acme: Acme, carnice: Carnice) -> None:
    """`list`, `schema` and `graph` have it as they have ours."""
    listed, schema, graph = carnice("list"), carnice("schema"), carnice("graph", VARIANT)

    assert (0, 0, 0) == (listed.code, schema.code, graph.code)
    assert "acme-fp8" in listed.out
    assert "Weights of decoder layers to leave alone, by name." in schema.out
    assert "acme-fp8.quantize<br/>62 actions" in graph.out


def test_folders_are_what_compressed_tensors_says(acme: Acme) -> None:
    """The library takes the config, and torch dequantizes modules as the format's readers do."""
    from compressed_tensors.quantization import QuantizationConfig

    folder = open_folder(acme.folder)
    config = QuantizationConfig.model_validate(folder.config["quantization_config"])
    stored: dict[str, torch.Tensor] = {}
    for shard in acme.folder.glob("*.safetensors"):
        stored |= load_file(shard)
    expected = stored[f"{UP}.weight"].float() * stored[f"{UP}.weight_scale"]
    readers = readers_of(folder)

    assert torch.float8_e4m3fn == stored[f"{UP}.weight"].dtype
    assert "channel" == config.config_groups["group_0"].weights.strategy
    assert {"lm_head", "re:^mtp.*"} < set(config.ignore)
    assert acme.module.AcmeReader in map(type, readers)
    for reader in readers:
        values = reader.values(folder.tensors, UP)
        np.testing.assert_array_equal(expected.numpy(), values.rows(0, values.shape[0]))


# --- verify -------------------------------------------------------------------------------------


def copied(acme: Acme, place: Path) -> Copy:
    return Copy.of(VARIANT, acme.project.options(), place)


def test_verify_finds_a_weight_that_was_never_quantized_so(acme: Acme, tmp_path: Path) -> None:
    """The sign of one code, or the exponent of one scale: both are named with their module."""
    for name, position, bit in ((f"{UP}.weight", 77, 0x80), (f"{UP}.weight_scale", 6, 0x80)):
        folder = copied(acme, tmp_path / name)
        folder.flip(name, position, bit)
        problems = folder.problems()

        assert {"digests", "round trip"} == set(problems)
        assert f"module {UP}: " in problems["round trip"]
        assert "further from their source than 8 bits allow" in problems["round trip"]


def without_head(section: dict[str, Any]) -> None:
    section["ignore"].remove("lm_head")


def with_quantized(section: dict[str, Any]) -> None:
    section["ignore"].append(UP)


def without_mtp(section: dict[str, Any]) -> None:
    section["ignore"].remove("re:^mtp.*")


def one_scale(section: dict[str, Any]) -> None:
    section["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"


def static(section: dict[str, Any]) -> None:
    section["config_groups"]["group_0"]["input_activations"]["dynamic"] = False


def packed(section: dict[str, Any]) -> None:
    section["format"] = "pack-quantized"


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a head that is not listed": (without_head, "does not list lm_head, which is not quantized"),
    "an MTP head that is not listed": (without_mtp, "does not list mtp.fc, which is not quantized"),
    "a quantized module that is": (with_quantized, f"lists {UP}, which is quantized"),
    "another scheme of weights": (one_scale, "states strategy 'tensor' instead of 'channel'"),
    "static activations": (static, "states dynamic False instead of True"),
    "another storage": (packed, "states format 'pack-quantized' instead of 'float-quantized'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_what_config_json_states_wrongly(
    acme: Acme, tmp_path: Path, damage: str
) -> None:
    """Whatever would make an engine build another model than the folder holds."""
    change, problem = DAMAGES[damage]
    folder = copied(acme, tmp_path)
    config = read_json(folder.folder / "config.json")
    change(config["quantization_config"])
    write_json(folder.folder / "config.json", config)

    assert problem in folder.problems()["structure"]


def test_the_model_is_run(acme: Acme) -> None:
    """It says something, and its perplexity is near the source's, with rounded activations too."""
    (plan,) = plan_variants([VARIANT], acme.project.options()).variants
    tables = Tables()
    with Workers() as workers:
        settings = RunSettings(REPOSITORY / "demo" / "heldout.txt", (256,), 1, 2, workers, Memory())
        runner = RUNNERS[Library.TRANSFORMERS]
        checks = runner.run(plan.format.checks(), plan, acme.folder, settings, tables)
        found = list(islice(checks, 2))
    source, weights, served = tables.perplexities

    assert [("generate", Outcome.PASSED), ("perplexity", Outcome.PASSED)] == [
        (check.name, check.outcome) for check in found
    ]
    assert (VARIANT, f"{VARIANT}, activations in FP8") == (weights.name, served.name)
    for row in (weights, served):
        (measured,), (reference,) = row.found, source.found
        assert 0.9 < measured.mean / reference.mean < 1.1
        assert 1e-5 < measured.kl < 0.05


# --- diff ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlx(acme: Acme) -> Path:
    """The same source in 4 bits of MLX."""
    build_variants(["mlx-4bit"], acme.project.options())
    return acme.project.out / "mlx-4bit"


def quantized(acme: Acme) -> set[str]:
    """The modules that the format quantizes, by their canonical path."""
    (plan,) = plan_variants([VARIANT], acme.project.options()).variants
    return set(plan.conversion.quantized)


def test_diff_shows_numbers_against_the_source(acme: Acme) -> None:
    """Each quantized module is a fortieth off, as three bits of fraction have it."""
    found = diff_folders(acme.project.checkpoint, acme.folder, 2)
    differing = {item.module: item for item in found.modules if item.state is State.DIFFERENT}

    assert quantized(acme) == set(differing)
    for item in differing.values():
        assert ("BF16", "FP8") == (item.a.storage, item.b.storage)
        assert 0.02 < item.relative < 0.03


def test_diff_shows_numbers_against_another_format(acme: Acme, mlx: Path) -> None:
    """Modules of both meet by their canonical path, and are compared as numbers."""
    found = {item.module: item for item in diff_folders(mlx, acme.folder, 2).modules}

    for module in quantized(acme):
        assert ("4-bit g64", "FP8") == (found[module].a.storage, found[module].b.storage)
        assert 0.07 < found[module].relative < 0.12


def test_formats_that_share_a_config_are_asked_in_turn(acme: Acme, tmp_path: Path) -> None:
    """A folder that one of ours names and cannot read is read by the package's format."""
    folder = copied(acme, tmp_path).folder
    config = read_json(folder / "config.json")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    write_json(folder / "config.json", config)
    found = {item.module: item for item in diff_folders(acme.project.checkpoint, folder, 2).modules}

    assert 0.02 < found[UP].relative < 0.03


# --- card, launches, report ---------------------------------------------------------------------


def test_the_card_is_the_packages_own(acme: Acme) -> None:
    """Its words stand in README.md beside ours, and its tags beside the recipe's."""
    _, front, page = (acme.folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(front)

    assert {"compressed-tensors", "fp8", "vllm", "carnice", "8-bit"} <= set(metadata["tags"])
    assert "in FP8, by Acme." in page
    assert "| Activations | E4M3 with a scale for each token" in page
    assert "- FP8 is computed by cards since Ada" in page
    assert "| Quantized modules | 62 |" in page


def test_a_format_needs_no_card(acme: Acme) -> None:
    """Without one, README.md says what it says of all formats."""
    (plan,) = plan_variants([VARIANT], acme.project.options()).variants
    knobs = plan.format
    page = render_card(Format.card(knobs), knobs, describe(plan, [], {})).decode()

    assert "| Format | `acme-fp8` |" in page
    assert "library_name: transformers" in page
    assert "| Quantized modules | 62 |" in page


def test_launches_come_from_the_packages_profile(acme: Acme) -> None:
    """A script with its flags, and README.md with its caveat."""
    serve = acme.folder / "serve"
    script = (serve / "one-card.sh").read_text(encoding="utf-8")

    assert "    --language-model-only \\\n" in script
    assert "    --tool-call-parser qwen3_xml \\\n" in script
    assert "# For 1x 80 GB." in script
    assert "Nothing here was measured." in (serve / "README.md").read_text(encoding="utf-8")


def test_the_report_knows_the_variant(acme: Acme, carnice: Carnice) -> None:
    """With the errors that `verify` found."""
    carnice("verify", VARIANT, "--no-run")
    finished = carnice("report", VARIANT, "--json")

    assert 0 == finished.code, finished.err
    (variant,) = json.loads(finished.out)["variants"]
    assert ("acme-fp8", 62) == (variant["format"], len(variant["errors"]))


# --- what is wrong ------------------------------------------------------------------------------


def test_a_wrong_recipe_is_told_as_for_our_formats(acme: Acme, carnice: Carnice) -> None:
    """A key and a pattern that are not there, and linears that no engine could run as one."""
    key = carnice("plan", VARIANT, "--set", "quantize.kep=lm_head")
    pattern = carnice("plan", VARIANT, "--set", 'quantize.keep="*.qq_proj.weight"')
    fused = carnice("plan", VARIANT, "--set", 'quantize.keep="*.q_proj.weight"')

    assert (2, 2, 2) == (key.code, pattern.code, fused.code)
    assert "did you mean 'keep'" in key.err
    assert "*.qq_proj.weight matches no weight" in pattern.err
    assert "all or none, because serving engines fuse them" in fused.err


FAULTS = {
    "plan": ("prepare", "convert", "serving"),
    "build": ("files", "card", "apply"),
    "verify": ("checks", "config_problems", "values", "rows", "allowance"),
}
BODIES = [(command, method) for command, methods in FAULTS.items() for method in methods]
QUIET = {"verify": ("--no-run",)}


@pytest.mark.parametrize(("command", "method"), BODIES)
def test_a_fault_of_the_package_is_told_with_its_name(
    acme: Acme,
    carnice: Carnice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    method: str,
) -> None:
    """Whatever of it raises, and whoever called: one sentence, not a fault of ours."""
    install(tmp_path / "site", faulty(method))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "acme_fp8")
    places: tuple[object, ...] = ()
    if command == "build":
        places = ("--out", tmp_path / "build", "--cache", tmp_path / "cache")
    finished = carnice(command, VARIANT, *QUIET.get(command, ()), *places)

    assert 1 == finished.code
    assert finished.err.splitlines()[-1].startswith("carnice: acme-fp8 1.0: ")
    assert finished.err.endswith(" failed: LookupError: oh\n")


@pytest.mark.parametrize("method", ["reader", "reads"])
def test_a_format_that_reads_nothing_hides_no_other(
    acme: Acme, mlx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Folders of other formats are compared although the package's own reader is broken."""
    install(tmp_path / "site", faulty(method))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "acme_fp8")
    found = diff_folders(acme.project.checkpoint, mlx, 2)

    assert any(item.relative for item in found.modules)
