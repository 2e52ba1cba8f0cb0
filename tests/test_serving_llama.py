"""What is served with llama.cpp: a file of the folder, by the words of its own parser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from serving_cases import GGUF, launch_of, refused, spec_of

from carnice_build.serving.memory import GIB, estimate
from carnice_build.serving.modelfile import CONTEXT
from carnice_build.serving.render import serve_files
from carnice_build.serving.rules import plan_launches
from carnice_build.serving.sampling import launch_sampling

PROFILE = "llama-server"
STATED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def page(facts: Any = GGUF) -> str:
    """serve/README.md."""
    return serve_files(spec_of(PROFILE), facts)["serve/README.md"].decode()


def test_the_file_is_served_and_not_the_folder() -> None:
    """Of split files the first, and the projector only where images are asked for."""
    launch = launch_of(spec_of(PROFILE), "fitted", GGUF)
    seeing = launch_of(spec_of(PROFILE), "vision", GGUF)

    assert ["--model", "/m/Carnice-V2-27b-Q4_K_M.gguf", "--alias", GGUF.repo] == launch.arguments(
        "/m"
    )[:4]
    assert "--mmproj" not in launch.arguments("/m")
    arguments = seeing.arguments("/m")
    assert "/m/mmproj-Carnice-V2-27b-F16.gguf" == arguments[arguments.index("--mmproj") + 1]


@pytest.mark.parametrize(
    ("change", "without"),
    [({"has_mtp": False}, "drafting"), ({"projector": None}, "vision")],
)
def test_a_folder_has_the_launches_that_its_parts_allow(
    change: dict[str, Any], without: str
) -> None:
    """No head, no drafts; no tower, no images; and a recipe cannot change what is not there."""
    facts = replace(GGUF, **change)
    names = [launch.name for launch in plan_launches(spec_of(PROFILE), GGUF)]
    found = [launch.name for launch in plan_launches(spec_of(PROFILE), facts)]
    error = refused(spec_of(PROFILE, **{without: {"flags": {"top-k": 1}}}), facts)

    assert [name for name in names if name != without] == found
    assert f"the profile 'llama-server' has no launch {without!r} for this folder" == error.what


def test_sampling_is_said_in_the_server_s_own_options() -> None:
    """What the recipe states and the file does not; an option that is there already stays."""
    facts = replace(GGUF, packaged_sampling={"top_p": 0.95, "top_k": 40}, stated_sampling=STATED)
    launch = launch_of(spec_of(PROFILE), "fitted", facts)
    changed = launch_of(spec_of(PROFILE, fitted={"flags": {"temp": 1.0}}), "fitted", facts)

    assert {"temp": 0.6, "top-k": 20} == {
        name: launch.flags[name].value for name in launch.flags if name != "jinja"
    }
    assert STATED == launch_sampling(launch, facts)
    assert 1.0 == changed.flags["temp"].value


def test_memory_is_that_of_the_types_that_keys_and_values_have() -> None:
    """16 layers, 4 heads of 256; q8_0 takes 34 bytes for 32 numbers, and q4_0 takes 18."""
    flags = {"cache-type-k": "q8_0", "cache-type-v": "q4_0", "ctx-size": 32_768}
    spec = spec_of(PROFILE, whole_context={"flags": flags})
    mixed = estimate(launch_of(spec, "whole-context", GGUF), GGUF)
    whole = estimate(launch_of(spec_of(PROFILE), "fitted", GGUF), GGUF)
    drafting = estimate(launch_of(spec_of(PROFILE), "drafting", GGUF), GGUF)
    seeing = estimate(launch_of(spec_of(PROFILE), "vision", GGUF), GGUF)

    assert 16 * 4 * 256 * 32_768 * (34 + 18) // 32 == mixed.kv_cache
    assert ("q8_0", "q4_0") == mixed.cache_types
    assert (262_144, 16 * GIB) == (whole.tokens, whole.kv_cache)
    assert 17 * GIB == drafting.kv_cache
    assert GGUF.projector_bytes == seeing.weights - whole.weights
    assert "| `whole-context` | 262,144 | q8_0 | 8.5 GiB" in page()
    assert "| `q4_0` | 4.5 GiB | 17.6 MiB |" in page()


def test_a_context_of_nothing_is_the_whole_one() -> None:
    """As the server means 0; more than the model was trained for is refused, and so is text."""
    spec = spec_of(PROFILE, fitted={"flags": {"ctx-size": 0}})
    more = spec_of(PROFILE, fitted={"flags": {"ctx-size": 262_145}})
    text = spec_of(PROFILE, fitted={"flags": {"ctx-size": "all"}})

    assert 262_144 == estimate(launch_of(spec, "fitted", GGUF), GGUF).tokens
    assert "ctx-size 262145 is more than the model's 262144" == refused(more, GGUF).what
    assert "ctx-size is 'all'" == refused(text, GGUF).what


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    (
        {"cache-type-v": "q8_0", "flash-attn": "off"},
        "flash attention alone",
        "flash-attn on, or cache-type-v f16",
    ),
    ({"cache-type-k": "fp8"}, "cache-type-k is 'fp8'", None),
    ({"mmproj": "other.gguf"}, "mmproj is not set by hand", None),
    ({"api-key": "x"}, "a published file must not hold a secret", None),
    ({"draft-max": 3}, "has no option draft-max, which went", "spec-draft-n-max"),
    ({"tools": "all"}, "tools is no option that a recipe sets", None),
    ({"rpc": "host:1"}, "rpc is no option that a recipe sets", None),
    ({"max-model-len": 4096}, "llama-server b11434 has no option 'max-model-len'", None),
]


@pytest.mark.parametrize(("flags", "what", "expected"), REFUSED)
def test_what_cannot_work_is_refused(
    flags: dict[str, Any], what: str, expected: str | None
) -> None:
    """By what its parser takes, by what it can do, and what no published file should ask for."""
    error = refused(spec_of(PROFILE, fitted={"flags": flags}), GGUF)

    assert what in error.what
    assert expected is None or expected == error.expected


def test_drafts_need_the_head() -> None:
    """Where the head is not packaged, a launch cannot draft with it, but by what was written."""
    facts = replace(GGUF, has_mtp=False)
    by_head = spec_of(PROFILE, fitted={"flags": {"spec-type": "draft-mtp"}})
    by_text = spec_of(PROFILE, fitted={"flags": {"spec-type": "ngram-simple"}})

    assert "the folder has no MTP head to draft with" in refused(by_head, facts).what
    assert "spec-type" in launch_of(by_text, "fitted", facts).flags


def test_ollama_gets_the_same_file_and_sampling() -> None:
    """By a path from the Modelfile; with no template, for Ollama's are not Jinja's."""
    facts = replace(GGUF, stated_sampling=STATED, packaged_sampling={})
    text = serve_files(spec_of(PROFILE), facts)["serve/Modelfile"].decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]

    assert [
        "FROM ../Carnice-V2-27b-Q4_K_M.gguf",
        f"PARAMETER num_ctx {CONTEXT}",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
        "PARAMETER top_k 20",
    ] == lines


def test_the_page_says_what_each_program_does_with_the_folder() -> None:
    """Images where the tower was kept, and how split files become one for Ollama."""
    split = replace(GGUF, projector=None, model_file="Carnice-V2-27b-Q4_K_M-00001-of-00004.gguf")

    assert "$ ollama create carnice-v2-27b-gguf -f serve/Modelfile" in page()
    assert "With `mmproj-Carnice-V2-27b-F16.gguf` beside it, it takes images." in page()
    assert "mmproj" not in page(split)
    assert f"llama-gguf-split --merge {split.model_file} whole.gguf" in page(split)
    assert "merge" not in page()
    assert "`--host 0.0.0.0` after the script's name" in page()
    assert "| `fitted` | the engine's own, a temperature of 0.8, top_k 40" in page(
        replace(GGUF, packaged_sampling={})
    )


def test_clients_find_it_on_its_own_port() -> None:
    """In the container, too, where the program is not on PATH."""
    files = serve_files(spec_of(PROFILE), GGUF)
    services = yaml.safe_load(files["serve/compose.yaml"])["services"]
    hermes = yaml.safe_load(files["serve/hermes/cli-config.yaml"])["model"]

    assert (["/app/llama-server"], ["8080:8080"]) == (
        services["fitted"]["entrypoint"],
        services["fitted"]["ports"],
    )
    assert ("custom", "http://localhost:8080/v1") == (hermes["provider"], hermes["base_url"])
    assert b"http://localhost:8080/v1/chat/completions" in files["serve/request.sh"]
