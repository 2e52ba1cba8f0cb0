"""GGUF files of families in llama.cpp: they load, and compute what our own forward pass does.

Files are in F32, so that what differs is the order of sums, the cache and values of GELU, which
llama.cpp has in F16, and which experts are chosen where two are nearly as good.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from family_builds import build_checked, options_of, write_family
from tiny import write_json
from vocabularies import sentencepiece_json
from zoo import TOKENIZER_FILES

from carnice_build.commands.plan import plan_variants
from carnice_build.engines import llama_cpp
from carnice_build.formats.gguf.checks import GgufChecks
from carnice_build.verification.run_torch import dequantized
from carnice_build.verification.torch_worker import measure_halves

pytestmark = pytest.mark.engine

TEXT = REPOSITORY / "demo" / "heldout.txt"
LENGTH, SAMPLES = 128, 12

SPELLED = {
    "glm4_moe": {
        "<|object_ref_start|>": "[gMASK]",
        "<|object_ref_end|>": "<|user|>",
        "<|box_start|>": "<|observation|>",
    },
    "phi3": {"PreTrainedTokenizerFast": "GPT2Tokenizer"},
}
"""What the files of the tokenizer at hand have, and what a family's have instead."""

GEMMA4 = {"vocab_size": 269, "vocab_size_per_layer_input": 269}
"""As many tokens as the tokenizer has that a file of Gemma 4 takes."""

CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {},
    "phi3": {},
    "ministral3": {},
    "gemma3_text": {},
    "gemma4": GEMMA4,
    # Of all experts, for another choice where two are nearly as good moves it by up to a percent.
    "gemma4_moe": {**GEMMA4, "top_k_experts": 4},
    "glm4_moe": {},
    "deepseek_v3": {},
    # Of its rope, llama.cpp rounds where interpolation begins and ends.
    "gpt_oss": {},
    # llama.cpp has no dense layers of these two.
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": {},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba"]},
    # As on the hub, where `rotary_dim` says it alone.
    "minimax_m2": {"partial_rotary_factor": None},
}
"""What is changed in configs of the zoo."""


@pytest.mark.parametrize("family", CHANGES)
def test_llama_cpp_computes_what_we_do(tmp_path: Path, family: str) -> None:
    """Within 0.2 %, of perplexities over the same tokens."""
    program = llama_cpp.find_program(llama_cpp.PERPLEXITY)
    if program is None:
        pytest.skip(f"no {llama_cpp.PERPLEXITY} on PATH or in {llama_cpp.VARIABLE}")
    model = write_family(tmp_path / "model", family, CHANGES[family])
    for name in TOKENIZER_FILES:
        text = (model / name).read_text(encoding="utf-8")
        for own, theirs in SPELLED.get(family, {}).items():
            text = text.replace(own, theirs)
        (model / name).write_text(text, encoding="utf-8")
    pre = ", tokenizer_pre: qwen35"
    if CHANGES[family].items() >= GEMMA4.items():
        pre = ""
        write_json(model / "tokenizer.json", sentencepiece_json(gemma=True))
        write_json(model / "tokenizer_config.json", {"bos_token": "<bos>"})
    recipe = f"quantize: {{format: gguf, mix: F32{pre}}}\n"
    folder = build_checked(tmp_path, model, "whole", recipe)
    (plan,) = plan_variants(["whole"], options_of(tmp_path, model)).variants

    theirs = llama_cpp.measured(program, folder, TEXT, LENGTH, SAMPLES, os.environ, 120)
    stored, start = dequantized(GgufChecks("F32"), plan, folder), llama_cpp.first_token(folder)
    ours = measure_halves(stored, folder, TEXT, LENGTH, SAMPLES, 1, start)

    assert ours is not None
    assert ours.mean is not None
    assert theirs.mean == pytest.approx(ours.mean, rel=2e-3)
