"""Models that are split over cards: what must come out even is known before a build."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from conftest import REPOSITORY
from serving_cases import AWQ40B, CARNICE, INT4, NVFP4, launch_of, refused, spec_of

from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.planning.sharding import sharding_of
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.sharding import Sharding, Split

CARDS = {"cards": 64, "vram": 96}


@cache
def planned(variant: str, profile: str) -> ServingFacts:
    """What the launches of one of our recipes follow from."""
    options = Options(recipes=REPOSITORY / "recipes", profile=profile)
    serving = plan_variants([variant], options).variants[0].serving
    assert serving is not None
    return serving


def units(sharding: Sharding) -> dict[str, tuple[int, int]]:
    """Size and group of each split, linears by their last two names."""
    return {
        ".".join(split.name.removeprefix("inputs of ").split(".")[-2:]): (split.size, split.unit)
        for split in sharding.splits
    }


@pytest.mark.parametrize(
    ("variant", "linears"),
    [
        (
            "nvfp4-text-mtp",
            {"linear_attn.out_proj": (6144, 16), "mlp.down_proj": (17408, 16)},
        ),
        (
            "int4-autoround",
            {"linear_attn.out_proj": (6144, 128), "mlp.down_proj": (17408, 128)},
        ),
        (
            "w4a16-rtn",
            {
                "linear_attn.out_proj": (6144, 1),
                "self_attn.o_proj": (6144, 128),
                "mlp.down_proj": (17408, 128),
            },
        ),
        (
            "fp8-dynamic",
            {"linear_attn.out_proj": (6144, 1), "mlp.down_proj": (17408, 1)},
        ),
    ],
)
def test_what_is_split_follows_from_the_plan(
    variant: str, linears: dict[str, tuple[int, int]]
) -> None:
    """Heads and vocabulary of the model, and its format's groups where inputs are cut."""
    sharding = planned(variant, "shapes").sharding

    assert 64 == sharding.layers
    assert {
        "attention heads": (24, 1),
        "key heads of linear attention": (16, 1),
        "value heads of linear attention": (48, 1),
        "KV heads": (4, 1),
        "rows of the padded vocabulary": (248320, 1),
        "attention heads of the vision tower": (16, 1),
        **linears,
    } == units(sharding)
    assert [1, 2, 4, 8] == sharding.possible(experts=True, tower=True)


@pytest.mark.parametrize("variant", ["nvfp4-text-mtp", "int4-autoround", "w4a16-rtn"])
def test_two_cards_can_share_the_demo(variant: str) -> None:
    """Which every profile for two cards asks of the model that ships with us."""
    assert None is planned(variant, "demo").sharding.refusal(2, experts=True, tower=True)


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        (3, "tensor-parallel-size 3 does not divide the 16 key heads of linear attention"),
        (5, "tensor-parallel-size 5 does not divide the 24 attention heads"),
        (16, "tensor-parallel-size 16 does not divide the 24 attention heads"),
    ],
)
def test_cards_that_cannot_share_a_model_are_refused(cards: int, said: str) -> None:
    """The error names launch, flag and numbers, and which sizes would do."""
    change = {"hardware": CARDS, "flags": {"tensor-parallel-size": cards}}
    error = refused(spec_of("nvfp4-vllm", production=change), NVFP4)

    assert f"the launch 'production' cannot work: {said}" == error.what
    assert "1 or 2 or 4 or 8" == error.expected
    assert ("launches", "production", "flags", "tensor-parallel-size") == error.at


def test_a_profile_s_own_cards_are_checked_too() -> None:
    """A model whose heads two cards cannot share is refused with the profile's default."""
    facts = replace(INT4, sharding=Sharding(64, (Split("attention heads", 25),)))

    assert (
        "does not divide the 25 attention heads"
        in refused(spec_of("int4-autoround-vllm"), facts).what
    )


def test_a_group_is_not_cut() -> None:
    """The module is named, with what a card would get of it and the group."""
    split = Split("inputs of model.layers.0.mlp.down_proj", 384, 128)
    facts = replace(AWQ40B, sharding=Sharding(64, (split,)))
    error = refused(spec_of("w4a16-vllm"), facts)

    assert (
        "the launch 'hopper' cannot work: tensor-parallel-size 2 leaves each card 192 of the 384 "
        "inputs of model.layers.0.mlp.down_proj, which is no multiple of the quantization group "
        "of 128"
    ) == error.what
    assert "1 or 3" == error.expected


def test_heads_of_the_cache_are_copied_to_more_cards() -> None:
    """Eight cards hold four KV heads twice; six could not."""
    heads = Split("KV heads", 4, repeated=True)

    assert [1, 2, 4, 8, 12, 16] == [n for n in range(1, 17) if heads.refusal(n) is None]


def test_experts_are_split_unless_each_card_has_whole_ones() -> None:
    """Expert parallelism deals experts out, so that their inputs are not cut."""
    experts = Split("inputs of model.layers.0.mlp.experts.*.down_proj", 384, 128, experts=True)
    facts = replace(NVFP4, sharding=Sharding(64, (experts,)))
    flags = {"tensor-parallel-size": 2}
    change = {"hardware": CARDS, "flags": {**flags, "enable-expert-parallel": True}}
    spec = spec_of("nvfp4-vllm", production=change)

    assert 2 == launch_of(spec, "production", facts).flags["tensor-parallel-size"].value
    assert (
        "experts"
        in refused(
            spec_of("nvfp4-vllm", production={"hardware": CARDS, "flags": flags}), facts
        ).what
    )


def test_a_tower_is_split_where_it_is_served() -> None:
    """Not in a text-only folder, nor where every card has all of it."""
    tower = Split("attention heads of the vision tower", 3, tower=True)
    facts = replace(AWQ40B, sharding=Sharding(64, (tower,)))
    whole = {"flags": {"mm-encoder-tp-mode": "data"}}

    assert "vision tower" in refused(spec_of("w4a16-vllm"), facts).what
    launch_of(spec_of("w4a16-vllm"), "hopper", replace(facts, text_only=True))
    launch_of(spec_of("w4a16-vllm", hopper=whole, ampere=whole), "hopper", facts)


@pytest.mark.parametrize(
    ("flags", "hardware", "said"),
    [
        ({"pipeline-parallel-size": 65}, {"cards": 65}, "65 is more than the 64 decoder layers"),
        ({"pipeline-parallel-size": 2}, {}, "pipeline-parallel-size 2 is more than the 1 cards"),
        (
            {"pipeline-parallel-size": 2, "tensor-parallel-size": 2},
            {"cards": 2},
            "tensor-parallel-size 2 x 2 is more than the 2 cards",
        ),
        ({"data-parallel-size": 2}, {}, "data-parallel-size 2 is more than the 1 cards"),
        (
            {"decode-context-parallel-size": 2},
            {},
            "decode-context-parallel-size 2 does not divide the tensor-parallel-size 1",
        ),
    ],
)
def test_stages_and_copies_of_a_model_are_counted(
    flags: dict[str, Any], hardware: dict[str, Any], said: str
) -> None:
    """Each stage has a layer at least, each has cards of its own, and so has each copy."""
    change = {"flags": flags, "hardware": hardware}

    assert said in refused(spec_of("nvfp4-vllm", production=change), NVFP4).what


def test_the_27b_is_as_the_other_tests_have_it() -> None:
    """The numbers that stand in `serving_cases`."""
    facts = units(planned("nvfp4-text-mtp", "shapes").sharding)

    assert units(CARNICE).items() <= facts.items()


def test_a_shared_expert_is_cut_where_the_others_are_dealt_out() -> None:
    """It is as wide as they are, and has a split of its own all the same."""
    options = Options(recipes=REPOSITORY / "recipes", profile="shapes")
    plan = plan_variants(["qwen3.6-35b-a3b-mlx-4bit"], options).variants[0]
    sharding = sharding_of(plan.architecture, plan.conversion)

    assert {"shared_expert": False, "experts.*": True} == {
        split.name.split(".mlp.")[1].removesuffix(".down_proj"): split.experts
        for split in sharding.splits
        if ".mlp." in split.name
    }
