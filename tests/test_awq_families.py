"""AWQ builds of every family, held against llm-compressor's own `oneshot`."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from driving import Checkpoint
from family_builds import build_checked, write_family, write_texts
from oneshot import IGNORE, run_oneshot, tokenizer
from tiny import Tensor, bf16, read_all_tensors, read_json

from carnice_build.calibration.driver import Arithmetic, decoder_layers

RECIPE = """
calibration: {{dataset: rows.jsonl, samples: 3, threads: 1, attention: eager}}
quantize:
  format: compressed-tensors
  algorithm: awq
  targets: [Linear]
  config_groups:
    group_0:
      targets: [Linear]
      weights: {{num_bits: 4, symmetric: false, strategy: group, group_size: 128, observer: mse}}
  ignore: {ignore}
"""

OURS = ("re:.*(visual|vision_tower|multi_modal_projector).*", "re:.*(eh_proj|shared_head).*")
"""What the library's model has not, beside what the published recipe ignores."""

HEADS = {"num_key_value_heads": 4}
"""A head of keys and values for each of queries, so that `v_proj` can be smoothed."""


@dataclass(frozen=True)
class Case:
    """A family, what is changed in its config, and whether the library's own mappings will do.

    If they will not, it is given those of our recipe.yaml.
    Its patterns `plain` are for modules that neither side is to quantize.
    """

    family: str
    own: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()


CASES = [
    Case("llama"),
    Case("llama", changes={**HEADS, "attention_bias": True, "mlp_bias": True}),
    Case("qwen3"),
    Case("qwen3_moe", changes={"mlp_only_layers": []}),
    Case("qwen3_moe", own=False),
    Case("qwen2", changes=HEADS),
    Case("mistral3"),
    Case("gemma3_text", changes=HEADS),
    Case("gemma3"),
    Case("phi3"),
    Case("phi3", changes=HEADS),
    Case("glm4_moe", own=False),
    Case("deepseek_v3", own=False),
    Case("deepseek_v3", changes={"first_k_dense_replace": 0}),
    Case("qwen3_5_moe", own=False),
    Case("qwen3_next", own=False),
    Case("mixtral", own=False),
    Case("minimax_m2", own=False),
    Case("nemotron_h", own=False, changes=HEADS),
    Case("gpt_oss", own=False, changes=HEADS),
    Case("gemma4", own=False, changes={"hidden_size_per_layer_input": 128}),
    Case("gemma4_moe", own=False, plain=("re:.*router.proj",)),
]


def name_of(case: Case) -> str:
    marks = ["own" if case.own else "ours", *case.changes]
    return f"{case.family}-{'-'.join(marks)}"


@dataclass(frozen=True)
class Pair:
    """Our folder and the library's, and the checkpoint that both are of."""

    ours: Path
    theirs: Path
    source: Checkpoint

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Ours and theirs, named as in the checkpoint."""
        prefix = self.source.prefix
        theirs = read_all_tensors(self.theirs)
        return read_all_tensors(self.ours), {respelled(n, prefix): t for n, t in theirs.items()}


def parameters() -> list[Any]:
    """The cases, of which few are run every time."""
    often = ("llama", "qwen3_moe")
    return [
        pytest.param(case, id=name_of(case), marks=() if case.family in often else pytest.mark.wide)
        for case in CASES
    ]


@pytest.fixture(params=parameters())
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A family's checkpoint, smoothed and quantized by us and by the library."""
    case: Case = request.param
    monkeypatch.chdir(tmp_path)
    source = Checkpoint(write_family(tmp_path / "source", case.family, case.changes))
    texts = write_texts(tmp_path / "rows.jsonl")
    recipe = RECIPE.format(ignore=[*IGNORE, *case.plain, *OURS])
    ours = build_checked(tmp_path, source.folder, "awq", recipe)
    model = source.whole(Arithmetic("bfloat16", "eager", threads=1))
    keep_masks(type(model), monkeypatch)
    if case.family == "gemma4":
        keep_shared(len(texts), monkeypatch)
    run_oneshot(
        "mse",
        tmp_path / "theirs",
        [torch.tensor(tokenizer()(text)["input_ids"]) for text in texts],
        model,
        type(decoder_layers(model)[1][0]).__name__,
        None if case.own else list(mappings_beside(ours)),
        [*IGNORE, *case.plain],
    )
    return Pair(ours, tmp_path / "theirs", source)


def test_the_folder_is_that_of_oneshot(pair: Pair) -> None:
    """Every tensor that it writes: of linears and experts, norms, routers, biases and the rest.

    config.json states the same, and ignores what the library has no linear for besides.
    """
    check_same(pair)


def check_same(pair: Pair, but: Callable[[str], bool] = lambda _: False) -> None:
    """Every tensor is equal but for those called so, and the library's config states the same."""
    ours, theirs = pair.tensors()
    stated, library = (
        read_json(folder / "config.json")["quantization_config"]
        for folder in (pair.ours, pair.theirs)
    )
    ignored, plain = (
        {respelled(name, pair.source.prefix) for name in config.pop("ignore")}
        for config in (stated, library)
    )

    assert len(theirs) > 20
    assert [] == [n for n in theirs if not (but(n) or same(ours.get(n), theirs[n]))]
    assert [] == [name for name in set(ours) - set(theirs) if not is_tower(name)]
    assert library == stated
    # The library lists `router` of a Gemma 4, whose linear is `router.proj`.
    assert [] == [name for name in plain - ignored if not is_router(name)]
    assert [] == [name for name in ignored - plain if not (is_tower(name) or is_router(name))]


def mappings_beside(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """What recipe.yaml in `folder` tells the library to smooth, by the names it has for modules."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    modifiers = recipe["default_stage"]["default_modifiers"]
    for mapping in modifiers["AWQModifier"]["mappings"]:
        smooth, *balance = map(library_name, (mapping["smooth_layer"], *mapping["balance_layers"]))
        yield smooth, balance


def same(ours: Tensor | None, theirs: Tensor) -> bool:
    """Whether they are equal; the library widens the few tensors whose type we leave alone."""
    if ours is not None and (ours.dtype, theirs.dtype) == ("BF16", "F32"):
        return bf16(np.frombuffer(theirs.data, np.float32)) == ours.data
    return ours == theirs


def is_tower(name: str) -> bool:
    return bool(re.search("visual|vision|multi_modal", name))


def is_router(name: str) -> bool:
    return name.endswith((".gate", ".router", ".router.proj", "_gate"))


def keep_masks(model_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's tracer from losing the mask of a model that chooses between two.

    It would be calibrated with eager attention and no mask, which is not causal.
    """
    module: Any = sys.modules[model_class.__module__]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        if create := getattr(module, name, None):
            monkeypatch.setattr(module, name, partial(called, create))


def keep_shared(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's tracer from losing what Gemma 4's layers leave for others.

    It would call each with an empty mapping, and end with a KeyError.
    All samples run through a layer in one order, as often as they do.
    """
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

    forward = Gemma4TextAttention.forward
    shared: list[dict[str, Any]] = [{} for _ in range(samples)]
    calls = Counter[int]()

    @wraps(forward)
    def remembering(
        self: Any, *args: Any, shared_kv_states: Mapping[str, Any], **named: Any
    ) -> Any:
        kept = shared[calls[self.layer_idx] % samples]
        calls[self.layer_idx] += 1
        return forward(self, *args, shared_kv_states=kept, **named)

    monkeypatch.setattr(Gemma4TextAttention, "forward", remembering)


def called(function: Callable[..., Any], **arguments: Any) -> Any:
    """What the tracer does not look into."""
    return function(**arguments)


RENAMED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What the library calls the linears of a Mixtral's experts."""


def library_name(pattern: str) -> str:
    """A pattern for modules, by the names that they have in the model that the library sees."""
    for ours, theirs in RENAMED.items():
        pattern = pattern.replace(f".{ours}$", f".{theirs}$")
    return pattern.replace("block_sparse_moe.", "mlp.")


def respelled(name: str, prefix: str) -> str:
    """A tensor's name in the checkpoint, whose text model begins with `prefix`."""
    if name.startswith("lm_head") and prefix.startswith("language_model."):
        return f"language_model.{name}"
    # Of a Mixtral the library gives back the name of the block, but not those of its linears.
    if ".block_sparse_moe.experts." in name:
        for ours, theirs in RENAMED.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
    return re.sub(r"^model\.(language_model\.)?", prefix, name)
