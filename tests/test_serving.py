"""Launches as data: the cards' commands are reproduced, and what cannot work is refused."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
from conftest import REPOSITORY
from pydantic import ValidationError
from serving_cases import (
    AWQ40B,
    FACTS,
    FP4,
    FP8,
    INT4,
    INT8,
    NVFP4,
    PROFILES,
    launch_of,
    refused,
    spec_of,
)

from carnice_build.chat.tool_format import tool_format
from carnice_build.errors import PlanError
from carnice_build.formats.compressed_tensors.format import CompressedFormat
from carnice_build.formats.compressed_tensors.schemes import PRESETS
from carnice_build.recipe.serve import ServeSpec
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import resolve_launches, setting
from carnice_build.serving.memory import GIB, estimate, kv_cache_bytes
from carnice_build.serving.profile import load_engine
from carnice_build.serving.render import serve_files
from carnice_build.serving.rules import check_launch, plan_launches


def flags_of(command: str) -> dict[str, Any]:
    """The options of a command line as people write it; JSON values as what they mean."""
    words = shlex.split(command)
    flags: dict[str, Any] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            following = words[index + 1] if index + 1 < len(words) else "--"
            value: Any = True if following.startswith("--") else following
            flags[word[2:]] = json.loads(value) if str(value).startswith("{") else value
    return flags


SPECULATION = """--speculative-config '{"method":"qwen3_5_mtp","num_speculative_tokens":3}'"""
V100 = """--max-num-batched-tokens 8192 --kv-cache-dtype fp8_e5m2
    --attention-backend FLASH_ATTN_V100
    --compilation-config '{"cudagraph_mode":"piecewise","cudagraph_capture_sizes":[1,2,4]}'
    --enable-prefix-caching --enable-auto-tool-choice --tool-call-parser qwen3_coder
    --reasoning-parser qwen3 --tensor-parallel-size 2 --served-model-name deckard-40b
    --model owner/Deckard-40B-W4A16-AWQ"""
TRUST = {"flags": {"trust-remote-code": True}}
PUBLISHED = [
    (
        {"profile": "nvfp4-vllm", "launches": {"production": TRUST}},
        "production",
        NVFP4,
        f"""--trust-remote-code --quantization modelopt --language-model-only
        --enable-auto-tool-choice --tool-call-parser qwen3_xml --reasoning-parser qwen3
        --max-model-len 262144 --max-num-seqs 2 --kv-cache-dtype fp8
        --gpu-memory-utilization 0.9 {SPECULATION}""",
    ),
    (
        {"profile": "nvfp4-vllm", "launches": {"interactive": TRUST}},
        "interactive",
        NVFP4,
        f"""--trust-remote-code --quantization modelopt --language-model-only
        --enable-auto-tool-choice --tool-call-parser qwen3_xml --reasoning-parser qwen3
        {SPECULATION} --gpu-memory-utilization 0.85 --max-model-len 16384""",
    ),
    (
        {
            "profile": "nvfp4-vllm",
            "launches": {"interactive": {"flags": {**TRUST["flags"], "max-model-len": 8192}}},
        },
        "interactive",
        replace(NVFP4, tool_call_parser=None),
        f"""--trust-remote-code --gpu-memory-utilization 0.85 --max-model-len 8192
        --language-model-only --quantization modelopt --reasoning-parser qwen3 {SPECULATION}""",
    ),
    (
        {"profile": "int4-autoround-vllm", "launches": {"two-cards": TRUST}},
        "two-cards",
        INT4,
        """--dtype float16 --tensor-parallel-size 2
        --disable-custom-all-reduce --max-model-len 262144 --gpu-memory-utilization 0.92
        --max-num-seqs 2 --kv-cache-dtype fp8_e5m2 --trust-remote-code --reasoning-parser qwen3
        --enable-auto-tool-choice --tool-call-parser hermes
        --speculative-config '{"method":"mtp","num_speculative_tokens":3}'""",
    ),
    (
        {"profile": "int4-autoround-vllm"},
        "one-card",
        INT4,
        """--dtype float16 --tensor-parallel-size 1
        --disable-custom-all-reduce --max-model-len 65536 --gpu-memory-utilization 0.92
        --max-num-seqs 1 --kv-cache-dtype fp8_e5m2 --reasoning-parser qwen3
        --enable-auto-tool-choice --tool-call-parser hermes
        --speculative-config '{"method":"mtp","num_speculative_tokens":3}'""",
    ),
    *(
        (
            {"profile": "w4a16-v100", "served_name": "deckard-40b"},
            launch,
            AWQ40B,
            f"""{V100} --max-model-len {context} --gpu-memory-utilization {share}
            --max-num-seqs {sequences}""",
        )
        for launch, context, share, sequences in (
            ("safe", 200_000, 0.85, 4),
            ("longer", 240_000, 0.87, 8),
            ("ceiling", 262_144, 0.89, 16),
        )
    ),
]


@pytest.mark.parametrize(("section", "name", "facts", "command"), PUBLISHED)
def test_a_published_command_is_reproduced(
    section: dict[str, Any], name: str, facts: ServingFacts, command: str
) -> None:
    """Every command of the source cards follows from a profile, flag by flag.

    But for `--quantization auto_round`, which vLLM now refuses, and the folder says anyway.
    """
    launch = launch_of(ServeSpec.model_validate(section), name, facts)

    assert flags_of(command) == flags_of(shlex.join(launch.arguments(facts.repo)))


def test_the_environment_of_v100_is_that_of_the_card() -> None:
    """All four variables, two of them mandatory."""
    env = launch_of(spec_of("w4a16-v100"), "ceiling", AWQ40B).env

    assert {
        "PYTORCH_CUDA_ALLOC_CONF": ("expandable_segments:True", True),
        "NCCL_P2P_DISABLE": ("1", True),
        "VLLM_WORKER_MULTIPROC_METHOD": ("spawn", False),
        "CUDA_VISIBLE_DEVICES": ("0,1", False),
    } == {name: (item.value, item.mandatory) for name, item in env.items()}


def test_the_source_of_a_folder_is_not_trusted_to_run_code() -> None:
    """No profile passes --trust-remote-code, and those whose card does say why not."""
    for name in PROFILES:
        profile = PROFILES[name]

        assert not any("trust-remote-code" in item.flags for item in profile.launches.values())
    assert "trust-remote-code" in PROFILES["nvfp4-vllm"].left_out
    assert "trust-remote-code" in PROFILES["int4-autoround-vllm"].left_out


REFUSED = [
    ("nvfp4-vllm", "production", {"flags": {"max-num-seqs": 4}}, "graph capture", "max-num-seqs"),
    ("nvfp4-vllm", "production", {"flags": {"max-num-seqs": "4"}}, "graph capture", "max-num-seqs"),
    ("nvfp4-vllm", "production", {"flags": {"max-num-seqs": False}}, "capture", "max-num-seqs"),
    (
        "nvfp4-vllm",
        "production",
        {"flags": {"max-num-seqs": 4, "max-model-len": False}},
        "graph capture",
        "max-num-seqs",
    ),
    (
        "int4-autoround-vllm",
        "two-cards",
        {"flags": {"disable-custom-all-reduce": False}},
        "all-reduce",
        "disable-custom-all-reduce",
    ),
    (
        "w4a16-v100",
        "safe",
        {"flags": {"kv-cache-dtype": "fp8_e4m3"}},
        "cannot do fp8_e4m3",
        "kv-cache-dtype",
    ),
    (
        "w4a16-v100",
        "ceiling",
        {"flags": {"compilation-config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}},
        "full CUDA graphs",
        "compilation-config",
    ),
    (
        "w4a16-v100",
        "safe",
        {"flags": {"compilation-config": False}},
        "vLLM's default",
        "compilation-config",
    ),
    (
        "w4a16-v100",
        "safe",
        {"flags": {"compilation-config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}},
        "more than four",
        "compilation-config",
    ),
    (
        "w4a16-v100",
        "safe",
        {"flags": {"kv-cache-auto-trim-ratio": 0}},
        "trimming",
        "kv-cache-auto-trim-ratio",
    ),
]


@pytest.mark.parametrize(("profile", "launch", "change", "reason", "flag"), REFUSED)
def test_a_combination_that_fails_is_refused(
    profile: str, launch: str, change: dict[str, Any], reason: str, flag: str
) -> None:
    """The error gives the reason, a way out, and the entry of the recipe that is to blame."""
    section = ServeSpec.model_validate({"profile": profile, "launches": {launch: change}})
    error = refused(section, FACTS[profile])

    assert reason in error.what
    assert error.expected
    assert ("launches", launch, "flags", flag) == error.at


@pytest.mark.parametrize(
    ("launch", "variable", "weights", "reason"),
    [
        ("safe", "PYTORCH_CUDA_ALLOC_CONF", 38_200_000_000, "fragmentation"),
        ("ceiling", "PYTORCH_CUDA_ALLOC_CONF", 19_000_000_000, "above a share of 0.85"),
        ("safe", "NCCL_P2P_DISABLE", 38_200_000_000, "two sockets"),
    ],
)
def test_a_mandatory_variable_cannot_be_left_out(
    launch: str, variable: str, weights: int, reason: str
) -> None:
    """The allocator's at any share for 40B and above 0.85 for all; NCCL's without NVLink."""
    section = {"profile": "w4a16-v100", "launches": {launch: {"env": {variable: False}}}}
    error = refused(ServeSpec.model_validate(section), replace(AWQ40B, weights_bytes=weights))

    assert reason in error.what
    assert ("launches", launch, "env", variable) == error.at


def test_what_a_small_model_can_do_without_is_not_asked_for() -> None:
    """A 27B at a share of 0.85 needs no setting of the allocator."""
    section = spec_of("w4a16-v100", safe={"env": {"PYTORCH_CUDA_ALLOC_CONF": False}})
    launch = launch_of(section, "safe", replace(AWQ40B, weights_bytes=19_000_000_000))

    assert "PYTORCH_CUDA_ALLOC_CONF" not in launch.env


def test_a_fine_combination_passes() -> None:
    """Four sequences are fine with two drafted tokens, with a shorter context, or with BF16."""
    for change in (
        {"speculative-config": {"num_speculative_tokens": 2}},
        {"max-model-len": 131_072},
        {"kv-cache-dtype": "auto"},
    ):
        spec = spec_of("nvfp4-vllm", production={"flags": {"max-num-seqs": 4, **change}})

        assert "4" == launch_of(spec, "production", NVFP4).flags["max-num-seqs"].text


def test_drafted_tokens_are_a_knob_inside_the_json() -> None:
    """A mapping is merged over the profile's, so the method need not be repeated."""
    change = {"flags": {"speculative-config": {"num_speculative_tokens": 1}}}
    launch = launch_of(spec_of("nvfp4-vllm", production=change), "production", NVFP4)

    assert {"method": "qwen3_5_mtp", "num_speculative_tokens": 1} == launch.flags[
        "speculative-config"
    ].value


UNKNOWN = [
    ({"profile": "nvfp4-vlm"}, "nvfp4-vllm", ("profile",)),
    (
        {"profile": "nvfp4-vllm", "launches": {"produktion": {}}},
        "production",
        ("launches", "produktion"),
    ),
    (
        {"profile": "nvfp4-vllm", "launches": {"production": {"flags": {"max-num-seq": 2}}}},
        "max-num-seqs",
        ("launches", "production", "flags", "max-num-seq"),
    ),
    (
        {"profile": "w4a16-v100", "launches": {"safe": {"flags": {"max-model-length": 1}}}},
        "max-model-len",
        ("launches", "safe", "flags", "max-model-length"),
    ),
]


@pytest.mark.parametrize(("section", "near", "at"), UNKNOWN)
def test_a_misspelt_name_gets_a_hint(
    section: dict[str, Any], near: str, at: tuple[str, ...]
) -> None:
    """Profiles, launches and options that do not exist are refused with the nearest that does."""
    facts = FACTS.get(section["profile"], NVFP4)
    error = refused(ServeSpec.model_validate(section), facts)

    assert near == error.nearest
    assert at == error.at


@pytest.mark.parametrize("flag", sorted(load_engine("vllm").reserved))
def test_what_follows_from_the_folder_is_not_set_by_hand(flag: str) -> None:
    """Model, parsers, quantization and the like are refused with where they come from."""
    error = refused(spec_of("nvfp4-vllm", production={"flags": {flag: "x"}}), NVFP4)

    assert f"{flag} is not set by hand" in error.what


def test_drafts_need_a_head() -> None:
    """Without an MTP head no launch drafts, and a recipe that wants to is refused."""
    facts = replace(NVFP4, has_mtp=False)
    error = refused(
        spec_of(
            "nvfp4-vllm",
            production={"flags": {"speculative-config": {"num_speculative_tokens": 1}}},
        ),
        facts,
    )

    assert "no MTP head" in error.what
    for launch in plan_launches(spec_of("nvfp4-vllm"), facts):
        assert "speculative-config" not in launch.flags


@pytest.mark.parametrize(
    "profile", [name for name in PROFILES if name not in ("w4a16-v100", "llama-server")]
)
def test_every_launch_uses_the_head_that_is_packaged(profile: str) -> None:
    """With an MTP head in the folder each launch drafts, and without one none.

    Those for V100 share out memory as their source card does, which drafts nothing; llama.cpp has
    a launch for it, which builds without MTP do not know.
    """
    for has_mtp in (True, False):
        facts = replace(FACTS[profile], has_mtp=has_mtp)

        assert {has_mtp} == {
            "speculative-config" in launch.flags
            for launch in plan_launches(spec_of(profile), facts)
        }


def test_a_folder_with_its_vision_tower_is_served_with_it() -> None:
    """--language-model-only is there for text-only folders alone, and needed there."""
    launch = launch_of(spec_of("nvfp4-vllm"), "production", NVFP4)
    seeing = launch_of(spec_of("nvfp4-vllm"), "production", replace(NVFP4, text_only=False))

    assert "language-model-only" in launch.flags
    assert "language-model-only" not in seeing.flags
    with pytest.raises(PlanError, match="no vision tower"):
        check_launch(seeing, NVFP4)


def test_parsers_follow_from_the_packaged_template() -> None:
    """The demo's template writes XML calls; each profile names its parser for that form."""
    form = tool_format((REPOSITORY / "demo" / "chat_template.jinja").read_text())

    for profile, parser in (("nvfp4-vllm", "qwen3_xml"), ("w4a16-vllm", "qwen3_coder")):
        facts = replace(
            FACTS[profile],
            tool_call_parser=form.tool_call_parser,
            reasoning_parser=form.reasoning_parser,
        )
        launch = plan_launches(spec_of(profile), facts)[0]

        assert parser == launch.flags["tool-call-parser"].value
        assert "qwen3" == launch.flags["reasoning-parser"].value


def test_a_template_without_calls_gets_no_parser() -> None:
    """No tool options and no tools in the request where the template has no form for calls."""
    facts = replace(NVFP4, tool_call_parser=None, reasoning_parser=None)
    launch = launch_of(spec_of("nvfp4-vllm"), "production", facts)

    assert not launch.flags.keys() & {
        "enable-auto-tool-choice",
        "tool-call-parser",
        "reasoning-parser",
    }
    assert b'"tools"' not in serve_files(spec_of("nvfp4-vllm"), facts)["serve/request.sh"]


def test_a_profile_for_another_format_is_refused() -> None:
    """The error names the profiles that fit the folder."""
    error = refused(spec_of("nvfp4-vllm"), AWQ40B)

    assert "no serving profile 'nvfp4-vllm' for compressed-tensors" in error.what
    assert "w4a16-v100 or w4a16-vllm or vllm" == error.expected


@pytest.mark.parametrize(
    ("profile", "facts", "said", "fitting"),
    [
        ("w4a16-v100", FP8, "FP8_DYNAMIC", "fp4-vllm or fp8-vllm or vllm"),
        ("fp8-vllm", FP4, "NVFP4A16 and FP8_DYNAMIC", "fp4-vllm or vllm"),
        ("fp8-vllm", INT8, "W8A8", "int8-vllm or vllm"),
    ],
)
def test_a_profile_for_other_schemes_is_refused(
    profile: str, facts: ServingFacts, said: str, fitting: str
) -> None:
    """A folder of several schemes needs a profile for all of them; the error names some."""
    error = refused(spec_of(profile), facts)

    assert (
        f"the profile {profile!r} is for {' or '.join(PROFILES[profile].schemes)}, " in error.what
    )
    assert f"and this folder is in {said}" in error.what
    assert fitting == error.expected
    assert ("profile",) == error.at


SUPPORT = CompressedFormat.serving().support["vllm"]


def test_profiles_and_facts_of_engines_name_schemes_that_exist() -> None:
    """Every scheme that a profile is for is one of the format, and is spoken of."""
    named = {name for profile in PROFILES.values() for name in profile.schemes}

    assert named <= set(SUPPORT) <= set(PRESETS)


def test_a_page_says_which_cards_run_its_schemes() -> None:
    """Of each scheme of the folder, whichever the profile; a format without schemes says none."""
    page = serve_files(spec_of("vllm"), FP4)["serve/README.md"].decode()
    other = serve_files(spec_of("vllm"), NVFP4)["serve/README.md"].decode()

    for name in FP4.schemes:
        assert f"| `{name}` | {SUPPORT[name].runs} | {SUPPORT[name].since} |" in page
    assert "## Cards" not in other


@pytest.mark.parametrize("repo", ["--help", "", "a b", "a\nb", "$(id)"])
def test_a_repository_that_a_command_would_misread_is_refused(repo: str) -> None:
    """What a recipe calls its repository is the first argument of a command."""
    assert "no name" in refused(spec_of("nvfp4-vllm"), replace(NVFP4, repo=repo)).what


@pytest.mark.parametrize(
    "section",
    [
        {"profile": "nvfp4-vllm", "lunches": {}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"flag": {}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"flags": {"--max-num-seqs": 2}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"flags": {"dtype": "a\nb"}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"flags": {"dtype": [1]}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"env": {"A=B; rm": "1"}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"env": {"A": "1\n2"}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"env": {"A": None}}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"image": "a b"}}},
        {"profile": "nvfp4-vllm", "launches": {"production": {"port": 0}}},
        {"profile": "nvfp4-vllm", "served_name": "--help"},
    ],
)
def test_a_malformed_section_is_refused(section: dict[str, Any]) -> None:
    """Unknown keys, and names and values that could leave their place in a script."""
    with pytest.raises(ValidationError) as caught:
        ServeSpec.model_validate(section)
    assert 1 == caught.value.error_count()


def test_a_section_may_be_a_name() -> None:
    """`serve: nvfp4-vllm` means the profile as it is, also to editors."""
    assert spec_of("nvfp4-vllm") == ServeSpec.model_validate("nvfp4-vllm")
    assert {"type": "string"} in ServeSpec.model_json_schema()["anyOf"]


def test_the_cache_of_the_40b_is_twelve_gib() -> None:
    """24 layers, 4 heads of 256, one byte, 262,144 tokens; the card says about 12.6 GB."""
    size = kv_cache_bytes(24, 4, 256, 1, 262_144)

    assert 12.0 == size / GIB
    assert 12.6 == pytest.approx(size / 1e9, rel=0.03)


@pytest.mark.parametrize(("name", "gib"), [("safe", 9.16), ("longer", 10.99), ("ceiling", 12.0)])
def test_every_rung_of_the_ladder_has_its_estimate(name: str, gib: float) -> None:
    """Each rung fits on two V100 with the weights, and the README shows what it takes."""
    launch = launch_of(spec_of("w4a16-v100"), name, AWQ40B)
    memory = estimate(launch, AWQ40B)
    page = serve_files(spec_of("w4a16-v100"), AWQ40B)["serve/README.md"].decode()

    assert gib == pytest.approx(memory.kv_cache / GIB, abs=0.005)
    assert memory.budget is not None
    assert memory.needed <= memory.budget
    ladder = page.partition("## Context ladder")[2].partition("\n## ")[0]
    assert f"{memory.kv_cache / GIB:.1f} GiB ({memory.kv_cache / 1e9:.1f} GB)" in ladder


def test_the_card_s_concurrency_is_below_our_bound() -> None:
    """6.98 requests of full length, the card says: what the cache leaves room for, and no more."""
    memory = estimate(launch_of(spec_of("nvfp4-vllm"), "production", NVFP4), NVFP4)
    assert memory.budget is not None

    assert 6.98 <= (memory.budget - memory.weights) / memory.kv_cache <= 8.1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hardware": {"vram": 24}}, "needs 8.5 GiB for 262144 tokens and 18.3 GiB for weights"),
        ({"flags": {"max-model-len": 262_145}}, "more than the model's 262144"),
        ({"flags": {"max-model-len": "auto"}}, "is no count"),
        ({"flags": {"max-model-len": "257K"}}, "max-model-len 263168 is more than"),
        ({"flags": {"max-num-seqs": 0}}, "max-num-seqs 0 is no count"),
        ({"flags": {"max-num-batched-tokens": 0}}, "max-num-batched-tokens 0 is no count"),
        (
            {"flags": {"speculative-config": {"num_speculative_tokens": 0}}},
            "speculative-config.num_speculative_tokens 0 is no count",
        ),
        ({"flags": {"gpu-memory-utilization": 90}}, "is no share"),
        ({"flags": {"tensor-parallel-size": 2}}, "more than the 1 cards"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(change: dict[str, Any], reason: str) -> None:
    """Weights, one full request, context and cards are held against what is stated."""
    assert reason in refused(spec_of("nvfp4-vllm", production=change), NVFP4).what


@pytest.mark.parametrize(("written", "tokens"), [("16k", 16000), ("16K", 16384), ("1.5k", 1500)])
def test_a_count_may_be_written_short(written: str, tokens: int) -> None:
    """As vLLM's own parser takes it."""
    spec = spec_of("nvfp4-vllm", production={"flags": {"max-model-len": written}})

    assert tokens == estimate(launch_of(spec, "production", NVFP4), NVFP4).tokens


def test_more_cards_make_room() -> None:
    """Stated hardware replaces the profile's; beyond its heads every card holds one."""
    change = {"hardware": {"cards": 8, "vram": 24}, "flags": {"tensor-parallel-size": 8}}
    memory = estimate(
        launch_of(spec_of("nvfp4-vllm", production=change), "production", NVFP4), NVFP4
    )

    assert kv_cache_bytes(17, 8, 256, 1, 262_144) == memory.kv_cache
    assert int(8 * 24 * GIB * 0.9) == memory.budget


@pytest.mark.parametrize("profile", PROFILES)
def test_rules_and_profiles_name_what_exists(profile: str) -> None:
    """Options, settings, ladder and left-out options of the data are known to the engine."""
    data = PROFILES[profile]
    launches = resolve_launches(spec_of(profile), FACTS[profile])
    for launch in launches:
        engine = launch.engine
        known = {*engine.options, *engine.own_options, *engine.reserved}

        assert launch.data.flags.keys() <= known
        assert data.left_out.keys() <= known
        for rule in (*engine.rules, *data.rules):
            for key, condition in rule.when.items():
                setting(launch, key, FACTS[profile])
                kind = key.partition(".")[0]

                assert kind in known | {"env", "fact", "hardware"}
                assert 1 == len(condition.model_fields_set)
    assert {rung.launch for rung in data.ladder} <= data.launches.keys()
    assert "request" not in data.launches


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_load_bearing_has_a_reason(profile: str) -> None:
    """No load-bearing option stands there unexplained."""
    for launch in PROFILES[profile].launches.values():
        assert all(flag.reason for flag in launch.flags.values() if flag.load_bearing)
