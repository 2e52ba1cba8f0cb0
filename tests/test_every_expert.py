"""Stored scales of experts' inputs, held against llm-compressor, and what passes they take."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import Checkpoint
from family_builds import build_checked, options_of, write_family, write_texts
from oneshot import IGNORE, run_modifiers, tokenizer
from test_awq_families import Pair, check_same, keep_masks
from tiny import Tensor

from carnice_build.calibration.driver import Arithmetic, decoder_layers
from carnice_build.calibration.every_expert import EveryExpert
from carnice_build.commands.plan import plan_variants
from carnice_build.graph import ActionGraph

# --- as oneshot ----------------------------------------------------------------------------------

RECIPE = """
calibration: {{dataset: rows.jsonl, samples: 3, length: {}, threads: 1, attention: eager}}
quantize: {{format: compressed-tensors, scheme: {}, ignore: {}}}
"""

PLAIN = [*IGNORE, "re:.*router.proj", "re:.*(eh_proj|shared_head).*"]

FAMILIES = [
    "qwen3_5_moe",
    "qwen3_next",
    "gemma4_moe",
    "glm4_moe",
    "mixtral",
    "minimax_m2",
    "nemotron_h",
    "deepseek_v3",
]

LONG, ALIKE = 512, 60
"""Tokens, of samples as they are, and of samples that are all cut to one length."""


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("qwen3_moe", "NVFP4"),
        *(
            pytest.param(family, scheme, marks=pytest.mark.wide)
            for family, scheme in [("qwen3_moe", "FP8"), *((name, "NVFP4") for name in FAMILIES)]
        ),
    ],
)
def test_scales_of_experts_inputs_are_those_of_oneshot(
    family: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor, and config.json: each expert has the largest input of all tokens.

    Gains 1 + w are as they are in the passes, and here the library is kept from rounding them.
    """
    entry = import_module("llmcompressor.entrypoints.oneshot")
    monkeypatch.setattr(entry, "norm_calibration_context", nullcontext)

    check_same(both(family, scheme, tmp_path, monkeypatch))


@pytest.mark.wide
def test_scales_of_gpt_oss_differ_by_what_the_library_rounds_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds an expert's bias before it rounds a product to BF16, transformers after.

    That is half a unit in the last place, 2^-9 of a number, in each of the two products of each of
    four layers, and less than 2^-6 of any scale in the end.
    """
    pair = both("gpt_oss", "NVFP4", tmp_path, monkeypatch)
    ours, theirs = pair.tensors()

    def is_scale(name: str) -> bool:
        return name.endswith(".input_global_scale")

    check_same(pair, but=is_scale)
    for name in filter(is_scale, theirs):
        assert number(theirs[name]) == pytest.approx(number(ours[name]), rel=2**-6)


def both(family: str, scheme: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Folders of a family's checkpoint, ours and the library's."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    monkeypatch.chdir(root)
    source = Checkpoint(write_family(root / "source", family, {}))
    texts = write_texts(root / "rows.jsonl")
    # The library's observer takes what a linear of DeepSeek is given at one length alone.
    length = ALIKE if family == "deepseek_v3" else LONG
    ours = build_checked(root, source.folder, "mine", RECIPE.format(length, scheme, PLAIN))
    model = source.whole(Arithmetic("bfloat16", "eager", threads=1))
    keep_masks(type(model), monkeypatch)
    run_modifiers(
        [QuantizationModifier(scheme=scheme, ignore=PLAIN)],
        root / "theirs",
        [torch.tensor(tokenizer()(text)["input_ids"][:length]) for text in texts],
        model,
        type(decoder_layers(model)[1][0]).__name__,
    )
    return Pair(ours, root / "theirs", source)


def number(tensor: Tensor) -> float:
    """The only one that it holds."""
    return float(np.frombuffer(tensor.data, np.float32)[0])


# --- which passes there are ----------------------------------------------------------------------

SPARSE = 3
"""Layers of four that have experts."""

STATIC = "{{format: compressed-tensors, scheme: {}}}"
FP4 = STATIC.format("NVFP4")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with experts, of which nothing is built."""
    return write_family(tmp_path_factory.mktemp("source") / "source", "qwen3_moe", {})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, the current folder, with texts."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "rows.jsonl")
    (tmp_path / "recipes").mkdir()
    return tmp_path


def planned(root: Path, source: Path, quantize: str, more: str = "") -> ActionGraph:
    """The actions of a recipe."""
    recipes = root / "recipes"
    (recipes / "_profiles.yaml").write_text("demo: {}\n")
    (recipes / "mine.yaml").write_text(
        "variant: mine\ndescription: A\nsources: {body: {model: a/b}}\n"
        f"calibration: {{dataset: rows.jsonl, samples: 3, order: given{more}}}\n"
        f"quantize: {quantize}\n"
    )
    return plan_variants(["mine"], options_of(root, source)).graph


def passes(graph: ActionGraph, kind: str) -> set[str]:
    """Actions of the calibration."""
    return {item.identity for item in graph if item.op.name.startswith(f"calibration.{kind}")}


def test_experts_read_every_token_only_where_their_inputs_have_scales(
    root: Path, source: Path
) -> None:
    """In passes beside those that other recipes have, too, which stay as they are."""
    modelopt, asked, ignored = (
        planned(root, source, quantize)
        for quantize in (
            "{format: nvfp4}",
            FP4,
            "{format: compressed-tensors, scheme: NVFP4, ignore: '*.experts.*'}",
        )
    )

    assert passes(modelopt, "forward") == passes(asked, "forward") == passes(ignored, "forward")
    assert (0, SPARSE, 0) == tuple(
        len(passes(graph, "every_expert")) for graph in (modelopt, asked, ignored)
    )


def test_no_knob_of_a_quantizer_is_in_the_key_of_what_experts_read(
    root: Path, source: Path
) -> None:
    """Whichever scheme, and whichever of their linears have scales."""
    one, other, some = (
        passes(planned(root, source, quantize), "every_expert")
        for quantize in (
            FP4,
            STATIC.format("FP8"),
            STATIC.format("{FP8: '*.down_proj', FP8_DYNAMIC: Linear}"),
        )
    )

    assert one == other == some


def test_parts_read_every_token_by_themselves(root: Path, source: Path) -> None:
    """The largest of what they find is that of one chain, bit for bit."""
    graph = planned(root, source, FP4, ", parts: 2")
    found = [action for action in graph if isinstance(action.op, EveryExpert)]
    combined = [
        action
        for action in graph
        if action.op.name == "calibration.combine" and action.outputs[0].shape == (3 * 4,)
    ]

    assert [0, 2] * SPARSE == [action.op.first for action in found]  # type: ignore[attr-defined]
    assert SPARSE == len(combined)
