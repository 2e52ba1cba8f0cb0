"""The files under serve/, read back by those who will read them: a shell, YAML and JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from serving_cases import AWQ40B, FACTS, INT4, NVFP4, PROFILES, launch_of, spec_of

from carnice_build.package.folder import make_executable
from carnice_build.recipe.serve import ServeSpec
from carnice_build.serving.place import Place
from carnice_build.serving.render import serve_files
from carnice_build.serving.rules import plan_launches

LAUNCHES = [(name, launch) for name in FACTS for launch in PROFILES[name].launches]


def run_script(path: Path, program: str, folder: Path) -> tuple[list[str], str, dict[str, str]]:
    """Arguments, input and environment that a script hands to `program`, which is a stand-in."""
    stand_in = folder / program
    stand_in.write_text(
        '#!/bin/sh\nprintf "%s\\0" "$@" > arguments\nenv -0 > environment\ncat > input\n'
    )
    stand_in.chmod(0o755)
    subprocess.run(
        [str(path)],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        check=True,
    )
    environment = dict(
        entry.split("=", 1) for entry in (folder / "environment").read_text().split("\0")[:-1]
    )
    arguments = (folder / "arguments").read_text().split("\0")[:-1]
    return arguments, (folder / "input").read_text(), environment


def written(files: dict[str, bytes], folder: Path) -> Path:
    """`files` on disk."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    make_executable(folder, files)
    return folder / "serve"


@pytest.mark.parametrize(("profile", "name"), LAUNCHES)
def test_a_script_runs_its_launch(profile: str, name: str, tmp_path: Path) -> None:
    """A shell accepts it, and hands the engine the launch's arguments and environment."""
    facts = FACTS[profile]
    launch = launch_of(spec_of(profile), name, facts)
    script = written(serve_files(spec_of(profile), facts), tmp_path) / f"{name}.sh"
    command = launch.engine.command
    subprocess.run(["/bin/sh", "-n", str(script)], check=True)
    arguments, _, environment = run_script(script, command[0], tmp_path)

    port = [] if launch.port == launch.engine.port else ["--port", str(launch.port)]
    assert [*command[1:], *launch.arguments(str(tmp_path)), *port] == arguments
    assert facts.repo == arguments[arguments.index(f"--{launch.engine.words.name}") + 1]
    assert {key: item.value for key, item in launch.env.items()}.items() <= environment.items()


class Served:
    """Scripts of a folder, run from elsewhere with a stand-in for their engine."""

    def __init__(self, profile: str, model: Path, beside: Path) -> None:
        facts, spec = FACTS[profile], spec_of(profile)
        launch = plan_launches(spec, facts)[0]
        self.model_file = facts.model_file
        self.place = Place(f"serve/{profile}")
        self.script = model / self.place.folder / f"{launch.name}.sh"
        self.elsewhere = beside / "some where" / "else"
        self.elsewhere.mkdir(parents=True)
        written(serve_files(spec, facts, self.place), model)
        subprocess.run(["bash", "-n", str(self.script)], check=True)
        programs = beside / "bin"
        programs.mkdir()
        program = programs / launch.engine.command[0]
        program.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        program.chmod(0o755)
        self._environment = {
            "PATH": f"{programs}:{self.script.parent}:{os.environ['PATH']}",
            "CDPATH": str(beside),
        }

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """The command as it was called in a folder."""
        return subprocess.run(
            [*command, "--more"],
            cwd=folder,
            env=self._environment,
            check=False,
            capture_output=True,
            text=True,
        )

    def __call__(self, folder: Path, *command: str) -> str:
        """The model that the engine is given, or the folder of its file."""
        run = self.run(folder, *command)
        assert 0 == run.returncode, run.stderr
        arguments = run.stdout.split("\0")[:-1]
        assert "--more" == arguments[-1]
        where = arguments.index("--model") + 1 if "--model" in arguments else 1
        return arguments[where].removesuffix(f"/{self.model_file}")


@pytest.mark.parametrize("profile", FACTS)
@pytest.mark.parametrize("name", ["model", "a model's $HOME", "-model", "modèle"])
def test_a_script_serves_its_folder_from_anywhere(profile: str, name: str, tmp_path: Path) -> None:
    """Called by any path from any folder, it hands over the folder that it lies in."""
    model = tmp_path / name
    served = Served(profile, model, tmp_path)
    script, elsewhere = served.script, served.elsewhere

    assert {str(model)} == {
        served(elsewhere, str(script)),
        served(elsewhere, os.path.relpath(script, elsewhere)),
        served(elsewhere, "/bin/sh", str(script)),
        served(script.parent, f"./{script.name}"),
        served(script.parent, "/bin/sh", script.name),
        served(model, f"{served.place.folder}/{script.name}"),
        served(elsewhere, script.name),
    }


@pytest.mark.parametrize("profile", ["nvfp4-vllm", "w4a16-v100"])
def test_a_link_to_a_script_serves_the_script_s_folder(profile: str, tmp_path: Path) -> None:
    """Whether the link is to the script, to a link to it, or to a folder above it."""
    model = tmp_path / "model"
    served = Served(profile, model, tmp_path)
    links = tmp_path / "links" / "of mine"
    links.mkdir(parents=True)
    (links / "absolute").symlink_to(served.script)
    (links / "relative").symlink_to(os.path.relpath(served.script, links))
    (links / "chained").symlink_to("relative")
    (links / "folder").symlink_to(served.script.parent)
    (links / "model").symlink_to(model)
    (links / f"broken {served.script.name}").write_bytes(served.script.read_bytes())
    below = f"model/{served.place.folder}/{served.script.name}"

    assert {str(model)} == {
        served(served.elsewhere, str(links / "absolute")),
        served(served.elsewhere, str(links / "relative")),
        served(served.elsewhere, os.path.relpath(links / "chained", served.elsewhere)),
        served(links, "/bin/sh", "chained"),
        served(links, f"folder/{served.script.name}"),
        served(links, below),
    }
    alone = served.run(links, "/bin/sh", f"broken {served.script.name}")
    assert (1, f"broken {served.script.name} is not in the folder of its model\n") == (
        alone.returncode,
        alone.stderr,
    )


def test_a_script_in_the_hub_s_cache_serves_the_snapshot(tmp_path: Path) -> None:
    """There every file is a link to one among others, which has no model around it."""
    snapshot = tmp_path / "snapshots" / "0123"
    served = Served("nvfp4-vllm", snapshot, tmp_path)
    blob = tmp_path / "blobs" / "abcd"
    blob.parent.mkdir()
    served.script.rename(blob)
    served.script.symlink_to(os.path.relpath(blob, served.script.parent))

    assert str(snapshot) == served(served.elsewhere, str(served.script))


def test_a_script_says_from_where_it_runs() -> None:
    """So does the request, and the compose file by the command to run."""
    files = serve_files(spec_of("nvfp4-vllm"), NVFP4)
    script, request = files["serve/production.sh"].decode(), files["serve/request.sh"].decode()

    assert "# Serves the model in .., as seen from this file, from wherever it is called" in script
    assert "from wherever it is called" in request
    assert b"docker compose -f serve/compose.yaml up" in files["serve/compose.yaml"]


def test_a_script_says_why_above_the_command() -> None:
    """Each reason of an option stands in a comment, and no comment breaks the command."""
    script = serve_files(spec_of("nvfp4-vllm"), NVFP4)["serve/production.sh"].decode()
    comments, _, command = script.partition("set -eu")
    text = " ".join(line.lstrip("# ") for line in comments.splitlines())

    assert "--max-num-seqs 2: four sequences" in text
    assert "#" not in command
    assert 13 == command.count("\\\n")


def test_a_hostile_value_stays_one_argument(tmp_path: Path) -> None:
    """Quotes, dollars and backticks of a recipe reach the engine as they are, also by compose."""
    value = """a'b"c $HOME `id` \\ ${X}"""
    change = {"flags": {"response-role": value}, "env": {"TEXT": value}}
    files = serve_files(spec_of("nvfp4-vllm", production=change), NVFP4)
    script = written(files, tmp_path) / "production.sh"
    arguments, _, environment = run_script(script, "vllm", tmp_path)
    service = yaml.safe_load(files["serve/compose.yaml"])["services"]["production"]

    assert value == arguments[arguments.index("--response-role") + 1]
    assert value == environment["TEXT"]
    assert value.replace("$", "$$") in service["command"]
    assert value.replace("$", "$$") == service["environment"]["TEXT"]


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_serves_the_same_launches(profile: str) -> None:
    """One service for each launch: image, port, folder, cards, and the arguments as a list."""
    facts = FACTS[profile]
    text = serve_files(spec_of(profile), facts)["serve/compose.yaml"].decode()
    services = yaml.safe_load(text)["services"]

    assert "&" not in text
    assert [launch.name for launch in plan_launches(spec_of(profile), facts)] == list(services)
    for launch in plan_launches(spec_of(profile), facts):
        service, engine = services[launch.name], launch.engine

        assert list(engine.entrypoint or engine.command) == service["entrypoint"]
        assert launch.arguments("/model") == service["command"]
        name = service["command"].index(f"--{engine.words.name}") + 1
        assert facts.repo == service["command"][name]
        assert [f"{launch.port}:{engine.port}"] == service["ports"]
        assert ["..:/model:ro"] == service["volumes"]
        shared = {"shm_size": "16gb", "ipc": "host"}
        own = {key: value for key, value in service.items() if key in shared}
        assert own == ({} if profile == "llama-server" else shared)
        assert [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}] == service["deploy"][
            "resources"
        ]["reservations"]["devices"]


def test_the_pinned_image_is_that_of_the_card() -> None:
    """The INT4 card's nightly on port 8070; an engine without an image asks for one."""
    int4 = serve_files(spec_of("int4-autoround-vllm"), INT4)["serve/compose.yaml"]
    v100 = serve_files(spec_of("w4a16-v100"), AWQ40B)["serve/compose.yaml"]
    service = yaml.safe_load(int4)["services"]["two-cards"]

    assert "vllm/vllm-openai:nightly-7a1eb8ac2ec4ea69338c51dc7afd4b15010abfa8" == service["image"]
    assert ["8070:8000"] == service["ports"]
    assert yaml.safe_load(v100)["services"]["safe"]["image"].startswith("${VLLM_IMAGE:?")


def test_a_request_asks_for_three_cities(tmp_path: Path) -> None:
    """curl gets the address and valid JSON with a tool and parallel calls."""
    folder = written(serve_files(spec_of("int4-autoround-vllm"), INT4), tmp_path)
    arguments, body, _ = run_script(folder / "request.sh", "curl", tmp_path)
    request = json.loads(body)

    assert "http://localhost:8070/v1/chat/completions" == arguments[0]
    assert INT4.repo == request["model"]
    assert "get_weather" == request["tools"][0]["function"]["name"]
    assert ("auto", True, 400) == (
        request["tool_choice"],
        request["parallel_tool_calls"],
        request["max_tokens"],
    )
    assert all(city in request["messages"][1]["content"] for city in ("Tokyo", "Paris", "New York"))


def test_clients_ask_for_the_served_name() -> None:
    """Hermes and the request use the name and port of the first launch."""
    section = {
        "profile": "w4a16-v100",
        "served_name": "deckard-40b",
        "launches": {"safe": {"port": 9000}},
    }
    files = serve_files(ServeSpec.model_validate(section), AWQ40B)

    assert {
        "model": {
            "default": "deckard-40b",
            "provider": "vllm",
            "base_url": "http://localhost:9000/v1",
        }
    } == yaml.safe_load(files["serve/hermes/cli-config.yaml"])
    assert b'"model": "deckard-40b"' in files["serve/request.sh"]


def test_the_page_holds_what_the_profile_has() -> None:
    """Flags with reasons, requirements, caveats, ladder, sampling, looping and checklists."""
    page = serve_files(spec_of("w4a16-v100"), AWQ40B)["serve/README.md"].decode()
    int4 = serve_files(spec_of("int4-autoround-vllm"), INT4)["serve/README.md"].decode()

    for part in (
        "| `--kv-cache-dtype` (load-bearing) | `fp8_e5m2` | half the cache; a V100 cannot",
        "| `PYTORCH_CUDA_ALLOC_CONF` (mandatory) | `expandable_segments:True` |",
        "| 200000 | 0.85 | 4 | 9.2 GiB (9.8 GB) | `safe` |",
        "| fiction and dialogue | 0.7 | 0.95 | 20 | 1.05 to 1.1 |",
        "| tool calls | 0.3 to 0.5 |",
        "1. Give it a system prompt, were it one sentence: `Be vivid and precise.`",
        "## Out of memory while it answers (not while it starts)",
        "The source model card reports for `ceiling`: about 12.6 GB.",
    ):
        assert part in page
    for part in (
        "## What the source model card reports",
        "| 2x RTX 3090 (recommended) | 24 GB each | 262K | 72 / 80 tokens/s",
        "#40361",
        "60K tokens",
        "`--trust-remote-code`: the source card passes it",
    ):
        assert part in int4
    assert "Context ladder" not in int4


@pytest.mark.parametrize("profile", PROFILES)
def test_tables_are_whole(profile: str) -> None:
    """Every row of a table has as many cells as its head, and nothing is left unfilled."""
    page = serve_files(spec_of(profile), FACTS[profile])["serve/README.md"].decode()
    width = 0
    for line in page.splitlines():
        cells = line.replace("\\|", "").count("|")
        width = cells if not width or not cells else width

        assert cells in (0, width)
    assert "None" not in page
    assert "\n\n\n" not in page


def test_an_override_is_told_from_the_profile_s_value() -> None:
    """The reason for a replaced value is not given as one for the new value."""
    change = {"flags": {"max-num-seqs": 1}}
    page = serve_files(spec_of("nvfp4-vllm", production=change), NVFP4)["serve/README.md"].decode()

    assert "| `--max-num-seqs` | `1` | set by the recipe; the profile has 2: four sequences" in page


def test_the_files_are_the_same_every_time() -> None:
    """Same section and facts, same bytes."""
    for profile, facts in FACTS.items():
        assert serve_files(spec_of(profile), facts) == serve_files(spec_of(profile), facts)


def test_a_folder_gets_these_files() -> None:
    """All below serve/, one script for each launch."""
    assert {
        "serve/production.sh",
        "serve/interactive.sh",
        "serve/compose.yaml",
        "serve/hermes/cli-config.yaml",
        "serve/request.sh",
        "serve/README.md",
    } == set(serve_files(spec_of("nvfp4-vllm"), NVFP4))
