"""The names in folders of MLX, by the family's table; none of a family without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.mlx.table import Table, table_of, trace_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Traced
from carnice_build.models.base import Architecture
from carnice_build.tensors import STACK


def drafter_table(architecture: Architecture) -> Table | None:
    """What becomes of the model's MTP head; None where mlx-vlm makes no drafter of it."""
    head = architecture.mlx_drafter
    return None if head is None else table_of(head, Target.MLX_VLM)


def published(architecture: Architecture, target: Target) -> Mapping[str, Traced]:
    """What a folder holds of each tensor that the config calls for, by its canonical name.

    What a folder holds twice is there a second time by its own name.
    Types are those of a model in BF16.
    """
    return _names(architecture, table_of(architecture.name, target))


def published_drafter(architecture: Architecture) -> Mapping[str, Traced]:
    """As `published`, of the folder with the MTP head alone."""
    return _names(architecture, drafter_table(architecture))


def known_names(architecture: Architecture) -> Mapping[str, Traced]:
    """As `published`, whatever library a folder is for: no two call two tensors alike."""
    targets = (published(architecture, target) for target in Target)
    found = (published_drafter(architecture), *targets)
    return dict(item for names in found for item in names.items())


def stack_names(name: str) -> Iterator[str]:
    """What tensor `name` of a folder of MLX may be called as a stack of experts.

    Where no table says it: mlx-lm calls most `switch_mlp`, some as checkpoints do.
    """
    for part in (".switch_mlp.", ".experts."):
        if part in name:
            yield name.replace(part, f".experts.{STACK}.")


def _names(architecture: Architecture, table: Table | None) -> Mapping[str, Traced]:
    if table is None:
        return {}
    facts = architecture.tensors
    specs = {name: TensorSpec("BF16", fact.shape) for name, fact in facts.items()}
    found: dict[str, Traced] = {}
    for item in trace_of(table, specs, facts, None).tensors:
        source = item.sources[0].name
        found[item.name if source in found else source] = item
    return found
