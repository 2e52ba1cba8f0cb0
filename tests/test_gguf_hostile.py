"""What may be asked of a GGUF file, and what may be in a checkpoint, that few ask or have."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Finished, Project
from gguf_project import DEMO, tensors
from tiny import read_all_tensors, read_json, write_json, write_shards

from carnice_build.dtypes import ITEM_SIZE

Carnice = Callable[..., Finished]
Tiny = Callable[..., Path]

RECIPE = """\
variant: {name}
description: A
sources: {{body: {{model: local/model}}}}
quantize: {knobs}
"""


def write(project: Project, knobs: str, name: str = "a") -> None:
    """Write a recipe for `model`."""
    (project.recipes / "_profiles.yaml").write_text("demo: {local/model: model}\n")
    project.recipe(name, RECIPE.format(name=name, knobs=knobs))


def checkpoint(project: Project, tiny_checkpoint: Tiny, **options: Any) -> Path:
    """A checkpoint `model` with the tokenizer of the stand-in that ships."""
    folder = tiny_checkpoint(project.root / "model", vocabulary=2048, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "qwen3.6-27b" / name, folder)
    return folder


def built(project: Project, carnice: Carnice, knobs: str) -> Mapping[str, str]:
    """The types of the tensors of the file that is built."""
    write(project, knobs)
    assert 0 == carnice("build", "a").code
    (file,) = [file for file in (project.out / "a").glob("model-*.gguf") if file.is_file()]
    return {name: kind for name, (kind, *_) in tensors(file).items()}


def test_a_rule_for_a_tied_head_is_about_the_embedding(
    project: Project, carnice: Carnice, tiny_checkpoint: Tiny
) -> None:
    """As llama.cpp reads that one for both, and as `--output-tensor-type` takes it."""
    checkpoint(project, tiny_checkpoint, tied=True)
    found = built(
        project, carnice, "{format: gguf, mix: Q8_0, rules: [{match: lm_head, type: F32}]}"
    )

    assert ("F32", "Q8_0") == (found["token_embd.weight"], found["blk.0.ffn_up.weight"])
    assert "output.weight" not in found


def test_what_a_rule_leaves_alone_has_the_type_of_the_model(
    project: Project, carnice: Carnice, tiny_checkpoint: Tiny
) -> None:
    """BF16 would take bits from weights of a model in F16."""
    folder = checkpoint(project, tiny_checkpoint)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": "float16"})
    found = built(
        project, carnice, '{format: gguf, mix: Q8_0, rules: [{match: "*.up_proj", skip: true}]}'
    )

    assert ("F16", "Q8_0") == (found["blk.0.ffn_up.weight"], found["blk.0.ffn_down.weight"])


def damage(folder: Path, name: str, element: int, number: Callable[[int], bytes]) -> None:
    """Have the bytes that `number` gives for so many in a tensor, and all in one shard."""
    held = read_all_tensors(folder)
    damaged = bytearray(held[name].data)
    size = ITEM_SIZE[held[name].dtype]
    damaged[element * size : (element + 1) * size] = number(size)
    held[name] = replace(held[name], data=bytes(damaged))
    write_shards(folder, held, 1)


def not_a_number(size: int) -> bytes:
    """NaN in so many bytes."""
    return b"\xff" * (size - 1) + b"\x7f"


SWAPPED = {"linear_attn.in_proj_qkv.weight": 1025 * 3 + 77, "linear_attn.A_log": 1}


@pytest.mark.parametrize("name", SWAPPED)
def test_what_is_not_finite_is_named_as_the_checkpoint_has_it(
    project: Project, carnice: Carnice, tiny_checkpoint: Tiny, name: str
) -> None:
    """Where heads are reordered too: the tensor and the element are the checkpoint's."""
    full = f"model.language_model.layers.0.{name}"
    damage(checkpoint(project, tiny_checkpoint), full, SWAPPED[name], not_a_number)
    write(project, "{format: gguf, mix: BF16}")
    finished = carnice("build", "a")

    assert 2 == finished.code
    assert f"tensor {full!r} holds NaN or infinity at element {SWAPPED[name]}" in finished.err


@pytest.mark.parametrize("module", ["mlp.up_proj", "linear_attn.out_proj"])
def test_what_no_scale_of_a_block_holds_is_named_as_the_checkpoint_has_it(
    project: Project, carnice: Carnice, tiny_checkpoint: Tiny, module: str
) -> None:
    """Rather than written as NaN; llama-quantize refuses such a model, too."""
    full = f"model.language_model.layers.0.{module}.weight"
    element = 128 * 71 + 37
    damage(checkpoint(project, tiny_checkpoint), full, element, lambda _: b"\x00\xff")
    write(project, "{format: gguf, mix: Q8_0}")
    finished = carnice("build", "a")

    assert 2 == finished.code
    said = f"{full}' holds a number too large for the scale of a block of Q8_0 at element {element}"
    assert said in finished.err


def test_nothing_but_the_package_reaches_into_the_kernels_of_ggml() -> None:
    """Two threads that import it by different modules each would wait for the other, and fail."""
    package = REPOSITORY / "carnice_build" / "kernels" / "ggml"
    reaching = [
        (file.name, node.module)
        for file in (REPOSITORY / "carnice_build").rglob("*.py")
        if file.parent != package
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("carnice_build.kernels.ggml.")
    ]
    assert [] == reaching
