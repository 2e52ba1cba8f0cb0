"""Tiny checkpoints with towers, and what `mlx_vlm.convert` makes of them.

`converted` is for tests that run where mlx-vlm is installed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from conftest import Project
from tiny import write_json
from zoo import FAMILIES, Family, write_family

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options

Zoo = Callable[[str], Path]
"""`vlm_zoo(case)` is the tiny checkpoint of a case."""

_GEMMA_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": 4,
    "position_embedding_size": 64,
}
_GEMMA_AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 8],
    "output_proj_dims": 64,
}


def _with(family: str, **entries: Any) -> Family:
    found = FAMILIES[family]
    return replace(found, config={**found.config, **entries})


def _gemma4_hub(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Bounds of activations as training leaves them, not those of a model that saw nothing."""
    respell = FAMILIES["gemma4"].hub
    assert respell is not None
    respell(tensors, config)
    for name, tensor in tensors.items():
        if name.endswith(("_min", "_max")):
            tensors[name] = tensor.clamp(-6, 6)


@cache
def families() -> Mapping[str, Family]:
    """By the name of a test's case."""
    gemma3 = FAMILIES["gemma3"].config
    return {
        "qwen3_5": FAMILIES["qwen3_5"],
        "qwen3_5_moe": FAMILIES["qwen3_5_moe"],
        # mlx-vlm looks for the size of an image in the text section.
        "gemma3": _with("gemma3", text_config={**gemma3["text_config"], "mm_tokens_per_image": 4}),
        "gemma4": replace(
            _with("gemma4", vision_config=_GEMMA_VISION, audio_config=_GEMMA_AUDIO),
            hub=_gemma4_hub,
        ),
        "gemma4_clipped": replace(
            _with(
                "gemma4",
                vision_config={**_GEMMA_VISION, "use_clipped_linears": True, "standardize": True},
            ),
            hub=_gemma4_hub,
        ),
        "gemma4_moe": _with("gemma4_moe", vision_config=_GEMMA_VISION),
    }


def write_vlm(folder: Path, name: str) -> Path:
    """Write the checkpoint of a case, as the hub has its like."""
    return write_family(folder, families()[name], "hub")


def converted(folder: Path, target: Path, **settings: Any) -> Path:
    """The folder that `mlx_vlm.convert -q --q-bits 4 --mtp` makes, and beside it `target`-mtp."""
    convert: Any = import_module("mlx_vlm.convert")
    utils: Any = import_module("mlx_vlm.utils")
    loaded = utils.load_processor
    # A tiny checkpoint has no processor that could be loaded, and nothing here asks for one.
    utils.load_processor = lambda *_, **__: object()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            known = {"q_bits": 4, "mtp": True, **settings}
            convert.convert(str(folder), str(target), quantize=True, **known)
    finally:
        utils.load_processor = loaded
    return target


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def options_for(project: Project, folder: Path, **content: Any) -> Options:
    """Where there is a recipe `seeing` for the checkpoint at `folder`."""
    quantize = {"format": "mlx", "target": "mlx-vlm", "bits": 4, **content.pop("quantize", {})}
    recipe = {
        "variant": "seeing",
        "description": "A model that sees",
        "sources": {"body": {"model": "example/seeing"}},
        "quantize": quantize,
        **content,
    }
    write_json(project.recipes / "seeing.yaml", recipe)
    return project.options(sources={"body": folder})


def built(project: Project, folder: Path, **content: Any) -> tuple[Path, Path]:
    """The folder of the model, and the one of its drafter."""
    build_variants(["seeing"], options_for(project, folder, **content))
    return project.out / "seeing", project.out / "seeing-mtp"
