"""Options of launches, held against tables of what the servers' own parsers take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import REPOSITORY
from serving_cases import FACTS, NVFP4, PROFILES, launch_of, refused, spec_of

from carnice_build.recipe.serve import FlagValue
from carnice_build.serving.launches import resolve_launches
from carnice_build.serving.options import OptionFact, misfit, option_table
from carnice_build.serving.profile import load_engine

ENGINES = ("vllm", "1cat-vllm", "llama-server")
VLLM = load_engine("vllm")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_of_an_engine_is_the_parser_s(engine: str) -> None:
    """What a recipe may set or not, and what rules look at, is in the table; what went is not."""
    data = load_engine(engine)
    settings = [key.partition(".")[0] for rule in data.rules for key in rule.when]
    named = {*data.options, *data.reserved, *data.own_choices}
    named |= {name for name in settings if name not in ("fact", "env", "hardware")}

    assert set() == {name for name in named if data.fact(name) is None}
    assert set() == {name for name in data.retired if name in data.parser.names}
    assert set() == data.own_options.keys() & data.parser.names.keys()
    assert set() == data.retired.keys() & set(data.options)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_rules_assume_is_a_value_of_its_option(engine: str) -> None:
    """And no default of the parser is said again."""
    data = load_engine(engine)
    for key, value in data.defaults.items():
        name, _, inner = key.partition(".")
        fact = data.fact(name)
        assert fact is not None
        given: Any = {inner: value} if inner else value

        assert None is misfit(name, given, fact)
        assert value != data.parser.default(name)


def test_every_engine_of_a_profile_has_a_table() -> None:
    """Each launch of ours names one of the engines that are looked at here."""
    used = {launch.engine for item in PROFILES.values() for launch in item.launches.values()}

    assert set(ENGINES) == used


@pytest.mark.parametrize("profile", PROFILES)
def test_every_option_of_a_launch_has_a_value_that_the_parser_takes(profile: str) -> None:
    """Of a profile's own values, and of those that follow from a folder, as they are written."""
    for launch in resolve_launches(spec_of(profile), FACTS[profile]):
        words = launch.arguments("/model")
        written = [word[2:] for word in words if word.startswith("--")]
        for name in written:
            assert launch.engine.fact(name) is not None, name
        for name, option in launch.flags.items():
            fact = launch.engine.fact(name)
            assert fact is not None

            assert None is misfit(name, option.value, fact, launch.engine.own_choices.get(name, ()))
            assert (option.text is None) == ("switch" in fact.types)


REFUSED: list[tuple[dict[str, FlagValue], str, str | None, str | None, tuple[str, ...]]] = [
    (
        {"swap-space": 4},
        "vllm 0.32.0 has no option swap-space, which went with 0.18.0",
        "kv-offloading-size for a cache in the host's memory",
        None,
        ("swap-space",),
    ),
    (
        {"calculate-kv-scales": True},
        "vllm 0.32.0 has no option calculate-kv-scales, which went with 0.28.0",
        "none: scales come with the weights, or are 1",
        None,
        ("calculate-kv-scales",),
    ),
    (
        {"max-num-seqs": "many"},
        "max-num-seqs is 'many'",
        "a whole number",
        None,
        ("max-num-seqs",),
    ),
    ({"max-num-seqs": 2.5}, "max-num-seqs is 2.5", "a whole number", None, ("max-num-seqs",)),
    (
        {"max-num-seqs": True},
        "max-num-seqs has no value",
        "a whole number",
        None,
        ("max-num-seqs",),
    ),
    ({"enforce-eager": 1}, "enforce-eager is 1", "true or false", None, ("enforce-eager",)),
    (
        {"kv-cache-dtype": "fp8_e4m3fn"},
        "kv-cache-dtype is 'fp8_e4m3fn'",
        None,
        "fp8_e4m3",
        ("kv-cache-dtype",),
    ),
    (
        {"dtype": {"weights": "half"}},
        "dtype takes no keys",
        "auto or bfloat16 or float or float16 or float32 or half",
        None,
        ("dtype",),
    ),
    (
        {"speculative-config": 3},
        "speculative-config is 3",
        "keys and values",
        None,
        ("speculative-config",),
    ),
    (
        {"speculative-config": {"num_speculative_token": 3}},
        "speculative-config has no key 'num_speculative_token'",
        None,
        "num_speculative_tokens",
        ("speculative-config", "num_speculative_token"),
    ),
    (
        {"speculative-config": {"method": "qwen35_mtp"}},
        "speculative-config: method is 'qwen35_mtp'",
        None,
        "qwen3_5_mtp",
        ("speculative-config", "method"),
    ),
    (
        {"speculative-config": {"num_speculative_tokens": "3"}},
        "speculative-config: num_speculative_tokens is '3'",
        "a whole number",
        None,
        ("speculative-config", "num_speculative_tokens"),
    ),
    (
        {"compilation-config": {"cudagraph_capture_sizes": 4}},
        "compilation-config: cudagraph_capture_sizes is 4",
        "a list",
        None,
        ("compilation-config", "cudagraph_capture_sizes"),
    ),
    (
        {"middleware": "x"},
        "middleware is no option that a recipe sets",
        "one that `carnice_build/serving/data/engines.yaml` lists",
        None,
        ("middleware",),
    ),
]


@pytest.mark.parametrize(("flags", "what", "expected", "near", "at"), REFUSED)
def test_a_value_that_the_parser_would_not_take_is_refused(
    flags: dict[str, FlagValue],
    what: str,
    expected: str | None,
    near: str | None,
    at: tuple[str, ...],
) -> None:
    """The error says what the option takes, and where in the recipe it stands."""
    error = refused(spec_of("nvfp4-vllm", production={"flags": flags}), NVFP4)

    assert (what, expected, near) == (error.what, error.expected, error.nearest)
    assert ("launches", "production", "flags", *at) == error.at


@pytest.mark.parametrize(
    "flags",
    [
        {"max-model-len": 16384, "max-num-batched-tokens": "8k"},
        {"no-enable-prefix-caching": True},
        {"cpu-offload-gb": "0.5"},
        {"attention-backend": "flashinfer"},
        {"compilation-config": {"cudagraph_mode": "PIECEWISE", "mode": 3}},
        {"override-generation-config": {"temperature": 0.6, "anything": "else"}},
    ],
)
def test_a_value_that_the_parser_takes_passes(flags: dict[str, FlagValue]) -> None:
    """Counts with a suffix, opposites, numbers as texts, names in any case, and free keys."""
    launch = launch_of(spec_of("nvfp4-vllm", production={"flags": flags}), "production", NVFP4)

    assert flags.keys() <= launch.flags.keys()


def test_a_fork_s_own_option_is_checked_too() -> None:
    """By what the engine's data says of it."""
    error = refused(
        spec_of("w4a16-v100", safe={"flags": {"kv-cache-auto-trim-ratio": "low"}}),
        FACTS["w4a16-v100"],
    )

    assert "kv-cache-auto-trim-ratio is 'low'" == error.what


def test_what_another_package_s_profile_sets_is_checked() -> None:
    """A profile's own value that the parser refuses is blamed on the launch."""
    profile = PROFILES["vllm"]
    data = profile.launches["vllm"]
    flag = data.flags["language-model-only"].model_copy(update={"fact": None, "value": "yes"})
    launch = data.model_copy(update={"flags": {"dtype": flag}})
    facts = FACTS["vllm"]
    broken = profile.model_copy(update={"launches": {"vllm": launch}})
    facts = type(facts)(**{**vars(facts), "profiles": {"vllm": broken}})
    error = refused(spec_of("vllm"), facts)

    assert ("dtype is 'yes'", ("launches", "vllm")) == (error.what, error.at)


def test_a_table_says_of_which_release_it_is() -> None:
    """In the file as in its name; types and defaults are the parser's."""
    table = option_table("vllm-0.32.0")

    assert ("vllm", "0.32.0") == (table.program, table.version)
    assert 0.92 == table.default("gpu-memory-utilization")
    assert OptionFact(types=("switch",)) == table.names["no-enable-prefix-caching"]
    assert "qwen3_xml" in table.options["tool-call-parser"].choices
    assert "inc" in table.options["quantization"].choices


def commands(page: str) -> Iterator[list[str]]:
    """The words of every call of mlx_lm.server in a page."""
    for call in re.findall(r"mlx_lm\.server[^\n`]*", page):
        yield call.split()[1:]


def test_commands_in_pages_are_of_options_that_there_are() -> None:
    """Cards and pages call mlx_lm.server with what its parser takes."""
    known = option_table("mlx-lm-0.32.2").names
    pages = [*REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("carnice_build/formats/mlx/*.j2")]
    calls = [call for page in pages for call in commands(page.read_text("utf-8"))]
    options = {word[2:] for call in calls for word in call if word.startswith("--")}

    assert "model" in options
    assert set() == options - known.keys()
