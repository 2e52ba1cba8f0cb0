"""What transformers says of a family: names, shapes and modules of a model without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoo import FAMILIES, Layout, write_zoo

from carnice_build.checkpoint.checkpoint import open_checkpoint, source_view
from carnice_build.dtypes import TensorSpec
from carnice_build.graph import TensorRef, View
from carnice_build.models import table_of
from carnice_build.tensors import SourceTensor

Shapes = dict[str, tuple[int, ...]]

TABLED = [name for name, family in FAMILIES.items() if table_of(family.model_type)]
"""Of the zoo, those whose family has a table."""


@dataclass(frozen=True)
class Skeleton:
    """A model of transformers without weights, its config as it saves it, and what it would save.

    `owners` are the modules that own its tensors, by names of its own.
    """

    model: Any
    config: dict[str, Any]
    shapes: Shapes
    owners: Mapping[str, Any]


def skeleton(model_type: str, model: str, entries: Mapping[str, Any]) -> Skeleton:
    """transformers' class `model`, of a config with these `entries`."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(entries)))
    config.architectures = [model]
    with torch.device("meta"):
        made = getattr(transformers, model)(config)
    modules = dict(made.named_modules())
    state = made.state_dict()
    tied = set(made.all_tied_weights_keys)
    held = {name: tensor for name, tensor in state.items() if name not in tied}
    saved = revert_weight_conversion(made, held)
    return Skeleton(
        made,
        json.loads(config.to_json_string()),
        {name: tuple(tensor.shape) for name, tensor in saved.items()},
        {name: modules[name.rpartition(".")[0]] for name in state},
    )


def view_of(shapes: Mapping[str, tuple[int, ...]]) -> View:
    """Tensors of these shapes, as a shape file has them."""
    return {
        name: TensorRef(
            TensorSpec("BF16", shape), SourceTensor(name, TensorSpec("BF16", shape), None, 0)
        )
        for name, shape in shapes.items()
    }


@lru_cache
def zoo_shapes(folder: Path, family: str, layout: Layout) -> tuple[dict[str, Any], Shapes]:
    """The config and the shapes of a checkpoint of the zoo, as if it were not quantized."""
    checkpoint = open_checkpoint(write_zoo(folder / f"{family}-{layout}", family, layout))
    shapes: Shapes = {}
    for name, ref in source_view(checkpoint).items():
        if name.endswith("_blocks"):
            experts, rows, groups, _ = ref.spec.shape
            shapes[name.removesuffix("_blocks")] = (experts, groups * 32, rows)
        elif not re.search(r"(_scale_inv|_proj_scales)$", name):
            shapes[name] = ref.spec.shape
    return dict(checkpoint.config), shapes
