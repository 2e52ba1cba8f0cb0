"""The names in folders of MLX, by the family's table; none of a family without one."""

from __future__ import annotations

from collections.abc import Mapping

from carnice_build.dtypes import TensorSpec
from carnice_build.formats.mlx.table import table_of, trace_of
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Traced
from carnice_build.models.base import Architecture


def published(architecture: Architecture, target: Target) -> Mapping[str, Traced]:
    """What a folder holds of each tensor that the config calls for, by its canonical name.

    What a folder holds twice is there a second time by its own name.
    Types are those of a model in BF16.
    """
    table = table_of(architecture.name, target)
    if table is None:
        return {}
    facts = architecture.tensors
    specs = {name: TensorSpec("BF16", fact.shape) for name, fact in facts.items()}
    found: dict[str, Traced] = {}
    for item in trace_of(table, specs, facts, None).tensors:
        source = item.sources[0].name
        found[item.name if source in found else source] = item
    return found
