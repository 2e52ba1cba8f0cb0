"""What mlx-lm or mlx-vlm makes of a family, as a table of ours: a trace without mlx.

**A family with a file in `tables/` (`tables/mlx-vlm/` for mlx-vlm) is converted by it, whether or
not mlx is installed; any other is traced, which takes mlx** (`conversion`).  So what people build
most never waits for mlx, and what a table cannot say (anything but other names, a 1 added, an axis
moved, experts stacked, a tensor twice) is never guessed.  A test holds every table against the
trace of its family.

Names are those of the family's architecture: a stack of experts has a `*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from carnice_build.dtypes import FLOAT_NAMES, WIDE_FLOATS, TensorSpec
from carnice_build.errors import RecipeError
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Step, Trace, Traced, TracedSource
from carnice_build.models.base import Part, TensorFact
from carnice_build.recipe.patterns import Patterns
from carnice_build.recipe.schema import Strict
from carnice_build.yaml_tree import read_tree

TABLES = Path(__file__).parent / "tables"

FOLDERS: Mapping[Target, Path] = {Target.MLX_LM: TABLES, Target.MLX_VLM: TABLES / "mlx-vlm"}

_TEXT = (Part.EMBED, Part.LAYERS, Part.BODY, Part.HEAD)


class Table(Strict):
    """A family: globs of names of the source (`shift`, `last`), or of MLX (the others)."""

    about: str = Field(description="Where in the library this is done.")
    parts: tuple[Part, ...] = Field(
        _TEXT, description="What it keeps: not the towers and the MTP head, unless they are named."
    )
    rename: list[tuple[str, str]] = Field(
        default_factory=list,
        description="Beginnings of names and what stands there instead; the first that fits.",
    )
    replace: list[tuple[str, str]] = Field(
        default_factory=list, description="Pieces of names and what stands there instead, in turn."
    )
    shift: list[str] = Field(default_factory=list, description="Norms to which it adds 1.")
    last: list[str] = Field(
        default_factory=list, description="Convolutions, whose axis number 1 goes last."
    )
    copies: dict[str, str] = Field(
        default_factory=dict,
        description="Tensors of the source that it writes a second time, and under which name.",
    )
    plain: list[str] = Field(
        default_factory=list, description="Weights of modules that cannot be quantized."
    )
    uncast: list[str] = Field(default_factory=list, description="Tensors whose type stays.")
    own: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="What the model's own code says of modules, by glob."
    )
    rope_parameters: bool = Field(False, description="It reads `rope_parameters`.")
    windows: bool = Field(
        False, description="Layers with a window have a theta of their own, `rope_local_base_freq`."
    )
    top: list[str] = Field(
        default_factory=list, description="Entries of the text model that it reads at the top."
    )
    entries: dict[str, str] = Field(
        default_factory=dict,
        description="Entries of config.json that it reads, by what else they may be called.",
    )
    needs: list[str] = Field(
        default_factory=list, description="Entries without which it cannot load a model."
    )
    sections: list[str] = Field(
        default_factory=list, description="Sections without which it cannot load a model."
    )
    every_nth: bool = Field(
        False,
        description="It can only run a model of which every n-th layer has full attention, for it "
        "goes by `full_attention_interval` alone.",
    )


@cache
def table_of(family: str, target: Target) -> Table | None:
    """The table of a family by its model type; None when it has none."""
    path = FOLDERS[target] / f"{family}.yaml"
    if not path.is_file():
        return None
    tree = read_tree(path)
    try:
        return Table.model_validate(tree.plain())
    except ValidationError as error:
        detail = error.errors()[0]
        raise RecipeError(detail["msg"], where=tree.find(detail["loc"]).where) from None


def trace_of(
    table: Table,
    tensors: Mapping[str, TensorSpec],
    facts: Mapping[str, TensorFact],
    dtype: str | None,
) -> Trace:
    """What the library makes of these tensors, stacks among them, cast to `dtype`."""
    evaluated = _Evaluated(table, FLOAT_NAMES.get(dtype or ""))
    kept = {name: spec for name, spec in tensors.items() if facts[name].part in table.parts}
    found = [evaluated.traced(name, spec) for name, spec in kept.items()]
    for name, copy in table.copies.items():
        if name in kept:
            found.append(replace(evaluated.traced(name, kept[name]), name=copy))
    modules = {
        item.module: evaluated.settings(item.module)
        for item in found
        if evaluated.quantizable(item)
    }
    return Trace(tuple(found), modules)


class _Evaluated:
    """A table with its globs compiled."""

    def __init__(self, table: Table, dtype: str | None) -> None:
        self._table = table
        self._dtype = dtype
        self._shift = Patterns(table.shift)
        self._last = Patterns(table.last)
        self._plain = Patterns(table.plain)
        self._uncast = Patterns(table.uncast)
        self._own = [(Patterns(glob), own) for glob, own in table.own.items()]

    def traced(self, name: str, spec: TensorSpec) -> Traced:
        """What becomes of a tensor."""
        shape, steps = spec.shape, list[Step]()
        if self._last.matches(name):
            axes = (0, *range(2, len(shape)), 1)
            # No byte moves when all that moves is an axis of size 1.
            same = shape[1] == 1
            shape = tuple(shape[axis] for axis in axes)
            steps.append(Step("reshape" if same else "transpose", (0,), (shape if same else axes,)))
        if self._shift.matches(name):
            steps.append(Step("add_number", (0,), (1.0,)))
        found = self._renamed(name)
        dtype = spec.dtype
        if self._dtype and dtype in WIDE_FLOATS and not self._uncast.matches(found):
            dtype = self._dtype
        return Traced(found, TensorSpec(dtype, shape), (TracedSource(name, spec),), tuple(steps))

    def _renamed(self, name: str) -> str:
        for start, instead in self._table.rename:
            if name.startswith(start):
                name = instead + name.removeprefix(start)
                break
        for piece, instead in self._table.replace:
            name = name.replace(piece, instead)
        return name

    def quantizable(self, item: Traced) -> bool:
        """Whether the library quantizes the tensor's module."""
        weight = item.name.endswith(".weight") and len(item.spec.shape) > 1 and not item.steps
        return weight and not self._plain.matches(item.name)

    def settings(self, path: str) -> Mapping[str, Any]:
        """What the model's own code says of a module."""
        return next((own for patterns, own in self._own if patterns.matches(path)), {})
