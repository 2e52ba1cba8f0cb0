"""`carnice new` for models on the hub: pinned, grafted from what they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Finished, Project, TinyCheckpoint
from fake_hub import CARNICE, QWEN, FakeHub
from huggingface_hub import constants
from tiny import read_json, write_json

from carnice_build.commands.build import build_variants
from carnice_build.commands.new import new_recipe

pytest_plugins = ["hub_fixtures"]

Carnice = Callable[..., Finished]

COMMIT = "c" * 40
FRONT = "---\nlicense: apache-2.0\nbase_model: {base}\n---\n# A model\n"


@pytest.fixture
def models(
    hub: FakeHub, tmp_path: Path, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Carnice and its base on the hub, and an empty folder, which is the current one.

    Carnice's config announces the MTP head that its files lack.
    """
    folder = tiny_checkpoint(tmp_path / "carnice", seed=1, mtp=False, prefix=True, shards=2)
    config = read_json(folder / "config.json")
    config["text_config"]["mtp_num_hidden_layers"] = 1
    write_json(folder / "config.json", config)
    (folder / "README.md").write_text(FRONT.format(base=QWEN))
    hub.add(CARNICE, folder, COMMIT)
    hub.add(QWEN, tiny_checkpoint(tmp_path / "qwen", seed=0), "d" * 40)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return folder


def written(name: str = "mine") -> dict[str, Any]:
    """What the recipe says."""
    content = yaml.safe_load(Path("recipes", f"{name}.yaml").read_text())
    assert isinstance(content, dict)
    return content


def test_the_commit_is_pinned_and_no_weight_is_fetched(models: Path, hub: FakeHub) -> None:
    """Of the shards, only headers; of small files, what decides the recipe."""
    new_recipe("mine", CARNICE, "mlx-4bit")

    assert {"model": CARNICE, "revision": COMMIT} == written()["sources"]["body"]
    assert "apache-2.0" == written()["card"]["license"]
    assert all(last < 1 << 16 for _, last in hub.ranges())


def test_a_missing_mtp_head_is_taken_from_the_base(models: Path) -> None:
    """The card of the source names it, and the recipe pins its commit as well."""
    new_recipe("mine", CARNICE, "int4-rtn")
    build_variants(["mine"])
    record = json.loads(Path("build/mine/build.json").read_text())
    (graft,) = (step["graft"] for step in written()["steps"] if "graft" in step)

    assert {"from": "base", "match": "mtp.*", "expect": 15} == graft
    assert {"model": QWEN, "revision": "d" * 40} == written()["sources"]["base"]
    assert 15 == sum(name.startswith("mtp.") for name in record["tensors"])
    assert "full" == record["sources"]["body"]["profile"]


def test_mlx_wants_no_mtp_head(models: Path, hub: FakeHub) -> None:
    """And the base is not even asked for."""
    new_recipe("mine", CARNICE, "mlx-4bit")

    assert ["body"] == list(written()["sources"])
    assert not [request for request in hub.requests if QWEN in request.file]


@pytest.mark.parametrize(
    ("base", "options", "sentence"),
    [
        ("nobody/nothing", {}, "nobody/nothing cannot be looked at"),
        (QWEN, {"hidden": 256}, f"that of {QWEN} is of another size"),
        (QWEN, {"mtp": False}, f"{QWEN} has none either"),
    ],
)
def test_a_head_that_does_not_fit_is_left(
    models: Path,
    hub: FakeHub,
    tmp_path: Path,
    tiny_checkpoint: TinyCheckpoint,
    base: str,
    options: dict[str, Any],
    sentence: str,
) -> None:
    """The recipe is written without one, and says why."""
    (models / "README.md").write_text(FRONT.format(base=base))
    hub.add(QWEN, tiny_checkpoint(tmp_path / "other", **options), "d" * 40)
    new = new_recipe("mine", CARNICE, "int4-rtn")

    assert sentence in " ".join(new.found)
    assert ["body"] == list(written()["sources"])


def test_a_build_takes_the_pinned_commit(models: Path, hub: FakeHub, carnice: Carnice) -> None:
    """Whatever `main` is at by then."""
    new_recipe("mine", CARNICE, "mlx-4bit")
    hub.repos[CARNICE].branches.clear()
    finished = carnice("build", "mine")

    assert 0 == finished.code, finished.err
    assert list(Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/{COMMIT}/*.safetensors"))


def test_no_such_repository_is_refused(models: Path, carnice: Carnice) -> None:
    """In the hub's own words, and nothing is written."""
    finished = carnice("new", "mine", "--from", "nobody/nothing", "--as", "mlx-4bit")

    assert (2, "") == (finished.code, finished.out)
    assert "no such repository" in finished.err
    assert [] == list(Path().iterdir())


def test_profiles_that_mean_something_else_are_said(online: Project, carnice: Carnice) -> None:
    """Beside recipes whose stand-ins have the model, what is typed next names the hub."""
    finished = carnice("new", "mine", "--from", QWEN, "--as", "mlx-4bit")
    (command,) = (line.split() for line in finished.out.splitlines() if "carnice build" in line)

    assert ["--profile", "online"] == command[-2:]
    assert 0 == carnice(*command[1:]).code


def test_a_project_that_never_goes_to_the_hub_is_told(
    project: Project, hub: FakeHub, carnice: Carnice
) -> None:
    """Where no profile leads there, the recipe could not be built."""
    hub.add("some/model", project.base, COMMIT)
    finished = carnice("new", "mine", "--from", "some/model", "--as", "mlx-4bit")

    assert 2 == finished.code
    assert "recipes/_profiles.yaml:1:1: no profile takes some/model from the hub" in finished.err
    assert not (project.recipes / "mine.yaml").exists()
