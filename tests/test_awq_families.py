"""AWQ builds of every family, held against llm-compressor's own `oneshot`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import Checkpoint
from family_builds import build_checked, write_family, write_texts
from oneshot import IGNORE, run_oneshot, tokenizer
from tiny import Tensor, bf16, read_all_tensors

from carnice_build.calibration.driver import Arithmetic
from carnice_build.checkpoint.checkpoint import open_checkpoint
from carnice_build.models import architecture_of
from carnice_build.models.base import Architecture

RECIPE = """
calibration: {{dataset: rows.jsonl, samples: 3, threads: 1, attention: eager}}
quantize:
  format: compressed-tensors
  algorithm: awq
  targets: [Linear]
  config_groups: {{group_0: {{targets: [Linear], weights: {{observer: mse}}}}}}
  ignore: {ignore}
"""

OURS = ("re:.*(visual|vision_tower|multi_modal_projector).*", "re:.*(eh_proj|shared_head).*")
"""What the library's model has not, beside what the published recipe ignores."""

HEADS = {"num_key_value_heads": 4}
"""A head of keys and values for each of queries, so that `v_proj` can be smoothed."""


@dataclass(frozen=True)
class Case:
    """A family, what is changed in its config, and whether the library's own mappings will do."""

    family: str
    own: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)


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
]


def name_of(case: Case) -> str:
    marks = ["own" if case.own else "ours", *case.changes]
    return f"{case.family}-{'-'.join(marks)}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_tensor_that_oneshot_writes_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """Packed weights of linears and experts, norms, routers, biases and what stays plain."""
    monkeypatch.chdir(tmp_path)
    source = write_family(tmp_path / "source", case.family, case.changes)
    texts = write_texts(tmp_path / "rows.jsonl")
    recipe = RECIPE.format(ignore=[*IGNORE, *OURS])
    ours = read_all_tensors(build_checked(tmp_path, source, "awq", recipe))
    theirs = oneshot_of(source, tmp_path / "theirs", texts, monkeypatch, own=case.own)

    assert len(theirs) > 20
    assert [] == [name for name in theirs if not same(ours.get(name), theirs[name])]
    assert [] == sorted(name for name in set(ours) - set(theirs) if not is_tower(name))


def same(ours: Tensor | None, theirs: Tensor) -> bool:
    """Whether they are equal; the library widens the few tensors whose type we leave alone."""
    if ours is not None and (ours.dtype, theirs.dtype) == ("BF16", "F32"):
        return bf16(np.frombuffer(theirs.data, np.float32)) == ours.data
    return ours == theirs


def is_tower(name: str) -> bool:
    return bool(re.search("visual|vision|multi_modal", name))


def oneshot_of(
    source: Path, folder: Path, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch, *, own: bool
) -> dict[str, Tensor]:
    """What the library writes of the checkpoint's text model, named as the checkpoint is."""
    checkpoint = Checkpoint(source)
    opened = open_checkpoint(source)
    architecture = architecture_of(opened.config, opened.where)
    model = checkpoint.whole(Arithmetic("bfloat16", "eager", threads=1))
    keep_masks(type(model), monkeypatch)
    (layer,) = model._no_split_modules
    rows = [torch.tensor(tokenizer()(text)["input_ids"]) for text in texts]
    mappings = None if own else list(concrete(architecture))
    run_oneshot("mse", folder, rows, model, layer, mappings)
    return {
        respelled(name, checkpoint.prefix): tensor
        for name, tensor in read_all_tensors(folder).items()
    }


def keep_masks(model_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's tracer from losing the mask of a model that chooses between two.

    It would be calibrated with eager attention and no mask, which is not causal.
    """
    module: Any = sys.modules[model_class.__module__]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        if create := getattr(module, name, None):
            monkeypatch.setattr(module, name, partial(called, create))


def called(function: Callable[..., Any], **arguments: Any) -> Any:
    """What the tracer does not look into."""
    return function(**arguments)


def concrete(architecture: Architecture) -> Iterator[tuple[str, list[str]]]:
    """Our mappings layer by layer and expert by expert, by the names of the library's modules."""
    facts = {fact.module: fact for fact in architecture.tensors.values()}
    for mapping in architecture.smoothing:
        for layer in range(architecture.num_layers):
            prefix = architecture.layer_prefix(layer)
            names = [prefix + name for name in (mapping.smooth, *mapping.balance)]
            if not all(name in facts for name in names):
                continue
            counts = {facts[name].shape[0] for name in names if "*" in name}
            experts = range(counts.pop() if counts else 1)
            if "*" in mapping.smooth:
                for expert in experts:
                    smooth, *balance = (library_name(name, layer, expert) for name in names)
                    yield smooth, balance
            else:
                smooth, *each = names
                yield (
                    library_name(smooth, layer, 0),
                    [
                        library_name(name, layer, expert)
                        for name in each
                        for expert in (experts if "*" in name else [0])
                    ],
                )


def library_name(name: str, layer: int, expert: int) -> str:
    """A module's name in the model that the library sees."""
    inner = name.partition(f"layers.{layer}.")[2].replace("*", str(expert))
    inner = inner.replace("block_sparse_moe.", "mlp.")
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        inner = re.sub(rf"\.{ours}$", f".{theirs}", inner)
    return f"model.layers.{layer}.{inner}"


def respelled(name: str, prefix: str) -> str:
    """A tensor's name in the checkpoint, whose text model begins with `prefix`."""
    if name.startswith("lm_head") and prefix.startswith("language_model."):
        return f"language_model.{name}"
    return re.sub(r"^model\.", prefix, name)
