"""How launches sample, and that a card says what they do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from serving_cases import NVFP4, launch_of, spec_of

from carnice_build.serving.launches import OVERRIDE
from carnice_build.serving.profile import Flag
from carnice_build.serving.render import serve_files
from carnice_build.serving.sampling import launch_sampling

PACKAGED = {"temperature": 1.0, "top_p": 0.95, "top_k": 20}
STATED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


@pytest.mark.parametrize(
    ("stated", "flags", "option", "served"),
    [
        ({}, {}, None, PACKAGED),
        (PACKAGED, {}, None, PACKAGED),
        (STATED, {}, {"temperature": 0.6}, STATED),
        ({"min_p": 0.1}, {}, {"min_p": 0.1}, {**PACKAGED, "min_p": 0.1}),
        (STATED, {"generation-config": "vllm"}, STATED, STATED),
        ({}, {"generation-config": "vllm"}, None, {}),
        (
            STATED,
            {"override-generation-config": {"temperature": 0.3}},
            {"temperature": 0.3},
            {**STATED, "temperature": 0.3},
        ),
    ],
)
def test_a_launch_sets_what_the_folder_does_not(
    stated: dict[str, Any],
    flags: dict[str, Any],
    option: dict[str, Any] | None,
    served: dict[str, Any],
) -> None:
    """What a recipe says of sampling and the packaged file does not is an option of the launch.

    Unless the recipe sets that option itself.
    """
    facts = replace(NVFP4, packaged_sampling=PACKAGED, stated_sampling=stated)
    launch = launch_of(spec_of("nvfp4-vllm", production={"flags": flags}), "production", facts)
    found = launch.flags.get("override-generation-config")

    assert option == (found.value if found else None)
    assert served == launch_sampling(launch, facts)


def test_a_profile_that_says_how_to_sample_is_taken_at_its_word() -> None:
    """As a recipe is, whose card may state something else."""
    profile = NVFP4.profiles["nvfp4-vllm"]
    data = profile.launches["production"]
    flag = Flag(value={"temperature": 0.3})
    launch = data.model_copy(update={"flags": {**data.flags, OVERRIDE: flag}})
    changed = profile.model_copy(update={"launches": {"production": launch}})
    facts = replace(NVFP4, profiles={"nvfp4-vllm": changed}, stated_sampling=STATED)
    found = launch_of(spec_of("nvfp4-vllm"), "production", facts).flags[OVERRIDE]

    assert {"temperature": 0.3} == found.value


def test_the_page_says_what_requests_get() -> None:
    """The numbers of each launch, and where they come from."""
    facts = replace(NVFP4, packaged_sampling=PACKAGED, stated_sampling=STATED)
    page = serve_files(spec_of("nvfp4-vllm"), facts)["serve/README.md"].decode()
    own = serve_files(spec_of("nvfp4-vllm"), NVFP4)["serve/README.md"].decode()
    none = replace(NVFP4, packaged_sampling={})
    bare = serve_files(spec_of("nvfp4-vllm"), none)["serve/README.md"].decode()

    assert "| `production` | temperature 0.6, top_p 0.95, top_k 20 |" in page
    assert "generation_config.json` and from `--override-generation-config`." in page
    assert "It comes from the folder's `generation_config.json`.\n" in own
    assert "| `production` | the engine's own, a temperature of 1 |" in bare
