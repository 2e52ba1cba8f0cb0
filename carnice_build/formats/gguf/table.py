"""What llama.cpp's converter makes of a family, as a table of ours: `tables/<model_type>.yaml`.

Names are those of the family's architecture without `language_model.`, which the converter takes
away as well; a stack of experts has a `*`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from carnice_build.errors import PlanError, RecipeError, nearest
from carnice_build.models.table_schema import Formula
from carnice_build.recipe.schema import Strict
from carnice_build.yaml_tree import Node, read_tree

TABLES = Path(__file__).parent / "tables"

_COMMON = "common"

T = TypeVar("T", bound=Strict)


class Swap(Strict):
    """Rows, or columns, in blocks [first, second] that become blocks [second, first]."""

    first: Formula = Field(description="How many lie far from each other.")
    second: Formula = Field(description="How many lie beside each other.")
    size: Formula = Field(description="Rows or columns of each.")
    skip: Formula = Field(0, description="Rows before them that stay where they are.")
    columns: bool = Field(False, description="It is columns that change places.")


class HeadRows(Strict):
    """Of the rows of each of several heads of a matrix some, below those of the same name."""

    name: str = Field(description="GGUF's name in the block, with its end.")
    start: Formula = Field(0, description="The first of the rows of a head.")
    rows: Formula = Field(description="How many of them.")
    stacked: bool = Field(False, description="As a tensor [heads, rows, columns].")
    turned: bool = Field(False, description="With columns for rows: [heads, columns, rows].")


class Cut(Strict):
    """A matrix that becomes several tensors, by the rows of its heads."""

    heads: Formula = Field(description="How many it has.")
    parts: list[HeadRows] = Field(description="What becomes of the rows of a head, in order.")


class Merge(Strict):
    """Stacks of experts that become one, of which each expert has the rows of both."""

    other: str = Field(description="The stack whose rows follow.")
    name: str = Field(description="GGUF's name in the block, with its end.")


class Constant(Strict):
    """A tensor that no checkpoint holds: numbers that follow from the config."""

    how: str = Field(description="Which numbers; see `constants`.")
    when: Formula = Field(description="Whether it is there.")


class Parameter(Strict):
    """An entry of the metadata; of no value, it is left out."""

    key: str = Field(description="Behind the architecture's name, unless it is a `general.` one.")
    kind: str = Field(description="One of `gguf_values.KINDS`, or a list of such: `[i32]`.")
    value: Formula = Field(description="Of entries of the config.")
    when: Formula | None = Field(None, description="Whether it is there.")
    first: bool = Field(False, description="It stands before all but the architecture's name.")
    each: bool = Field(False, description="`value` is that of a layer; the entry has all of them.")


class Blocks(Strict):
    """The blocks of a tower."""

    prefix: str = Field(description="What their names begin with, before their number.")
    name: str = Field("v.blk", description="What GGUF's names begin with there.")
    modules: dict[str, str] = Field(description="Modules of a block.")


class Projector(Strict):
    """The file of the towers.

    A tensor of a block is called here what its name says behind the block's number, any other by
    its whole name, and so it is of GGUF's names.
    """

    tensors: dict[str, str] = Field(description="Modules outside of blocks.")
    blocks: list[Blocks] = Field(description="Those of each tower.")
    frames: list[str] = Field(
        default_factory=list,
        description="Convolutions over frames, that become one for each frame.",
    )
    functions: dict[str, str] = Field(
        default_factory=dict, description="What is computed of a tensor; see `ops`."
    )
    swaps: dict[str, Swap] = Field(
        default_factory=dict, description="Tensors in which rows or columns change places."
    )
    shapes: dict[str, list[Formula]] = Field(
        default_factory=dict, description="Tensors that are of another shape."
    )
    kinds: dict[str, Literal["F32", "F16", "half"]] = Field(
        default_factory=dict, description="Types of tensors by GGUF's names; see `named.Kind`."
    )
    unread: str | None = Field(
        None, description="What names of tensors begin with that llama.cpp does not read."
    )
    tokens: dict[str, str] = Field(
        default_factory=dict, description="Rows of the embedding, each of a token, by GGUF's names."
    )
    depth: Formula = Field("vision_config.depth", description="How many blocks it has.")
    parameters: list[Parameter] = Field(description="Its metadata.")


class Table(Strict):
    """A family: GGUF's names of modules (or of tensors) by ours, and what is done to weights."""

    about: str = Field(description="Where in the converter this is done.")
    arch: str = Field(description="What llama.cpp calls the architecture.")
    arch_if: dict[str, Formula] = Field(
        default_factory=dict, description="What else it calls it, each by when it does."
    )
    model: dict[str, str] = Field(description="Modules outside of layers.")
    layer: dict[str, str] = Field(description="Modules of a layer, also of the MTP head's.")
    mtp: dict[str, str] = Field(
        default_factory=dict, description="Modules of the MTP head; those of its layers by `layer`."
    )
    rounds: int = Field(
        1, description="Layers of the MTP head that are one block, each of them under a name."
    )
    headless: bool = Field(False, description="The MTP head is left out, as llama.cpp has none.")
    trimmed: bool = Field(
        False, description="Rows of the embedding for which there are no tokens are left out."
    )
    offsets: bool = Field(False, description="Norms that store w for a gain of 1 + w get the 1.")
    functions: dict[str, str] = Field(
        default_factory=dict, description="What is computed of a tensor of a layer; see `ops`."
    )
    squeezed: list[str] = Field(
        default_factory=list, description="Tensors of a layer that lose axes of size 1."
    )
    swaps: dict[str, Swap] = Field(
        default_factory=dict, description="Tensors of a layer in which heads change places."
    )
    shapes: dict[str, list[Formula]] = Field(
        default_factory=dict, description="Tensors of a layer that are of another shape."
    )
    cuts: dict[str, Cut] = Field(
        default_factory=dict, description="Tensors of a layer that become several."
    )
    merges: dict[str, Merge] = Field(
        default_factory=dict, description="Stacks of a layer that become one with another."
    )
    constants: dict[str, Constant] = Field(
        default_factory=dict, description="Tensors by GGUF's names that the config alone decides."
    )
    values: dict[str, Formula] = Field(default_factory=dict, description="Names for formulas.")
    defaults: dict[str, Any] = Field(
        default_factory=dict,
        description="Entries of the config where it does not state them, as transformers has them; "
        "a text is a formula.",
    )
    common: bool = Field(True, description="What is common to all begins the metadata.")
    parameters: list[Parameter] = Field(
        default_factory=list, description="The metadata that follows."
    )
    projector: Projector | None = Field(None, description="The file of its towers, if it has any.")


class _Common(Strict):
    about: str
    parameters: list[Parameter]


def families() -> list[str]:
    """The model types that have tables."""
    return sorted(path.stem for path in TABLES.glob("*.yaml") if path.stem != _COMMON)


@cache
def table_of(family: str) -> Table:
    """The table of a family by its model type; PlanError when it has none."""
    if family not in families():
        raise PlanError(
            f"GGUF has no names for tensors of {family}",
            expected=f"a model of {', '.join(families())}",
            nearest=nearest(family, families()),
            at=("format",),
        )
    path = TABLES / f"{family}.yaml"
    return _validated(Table, _tree(path), path)


@cache
def common_parameters() -> list[Parameter]:
    """The metadata that the converter writes of every text model, in its order."""
    path = TABLES / f"{_COMMON}.yaml"
    return _validated(_Common, _tree(path), path).parameters


def _tree(path: Path) -> dict[str, Node]:
    """The entries of a table, those that it takes of the one that it extends among them."""
    tree = read_tree(path).value
    assert isinstance(tree, dict)
    if "extends" not in tree:
        return tree
    inherited = _tree(TABLES / f"{tree.pop('extends').value}.yaml")
    for key, node in tree.items():
        old = inherited.get(key)
        if old is not None and isinstance(old.value, dict) and isinstance(node.value, dict):
            node = Node({**old.value, **node.value}, node.where)
        inherited[key] = node
    return inherited


def _validated(model: type[T], entries: dict[str, Node], path: Path) -> T:
    tree = Node(entries, str(path))
    try:
        return model.model_validate(tree.plain())
    except ValidationError as error:
        detail = error.errors()[0]
        raise RecipeError(detail["msg"], where=tree.find(detail["loc"]).where) from None
