"""What a family table says: the schema of `models/tables/*.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from carnice_build.models.base import Part, Role
from carnice_build.models.formulas import FormulaError, compiled
from carnice_build.models.own_code import DRAFTERS, READERS


def _formula(text: str | int) -> str:
    try:
        compiled(str(text))
    except FormulaError as error:
        raise ValueError(f"{text!r} {error}") from None
    return str(text)


Formula = Annotated[str | int, AfterValidator(_formula)]
"""A formula over the entries of the text model's config; see `formulas`."""


def _known(words: Mapping[str, str]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in words:
            raise ValueError(f"{word!r} is none of {', '.join(words)}")
        return word

    return check


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FusedRow(_Strict):
    """Another way in which checkpoints hold a stack of experts: as one tensor, whole or a part."""

    name: str = Field(description="Name of the tensor [experts, of * rows, columns].")
    part: int = Field(0, ge=0, description="Which part of each expert's rows this stack is.")
    of: int = Field(1, ge=1, description="How many stacks the tensor holds, one below another.")
    turns: bool = Field(False, description="Their rows take turns instead.")
    turned: str | None = Field(
        None, description="Name of the tensor when it is [experts, columns, of * rows]."
    )


class Row(_Strict):
    """A tensor, or a group of tensors that is there once for each of something."""

    name: str = Field(
        description="Name behind the group's prefix; a `*` stands for the number of an expert."
    )
    shape: list[Formula] = Field(description="Sizes; for a stack of experts, how many comes first.")
    role: Role = Field(description="What the tensor does in its module.")
    when: Formula | None = Field(None, description="Whether the model has it.")
    part: Part | None = Field(None, description="The part it belongs to, outside of groups.")
    offset: bool = Field(False, description="A norm that stores w for a gain of 1 + w.")
    optional: bool = Field(
        False, description="Checkpoints may lack it: engines take another tensor in its place."
    )
    unread: bool = Field(False, description="Checkpoints may hold it, but no model reads it.")
    wide: bool = Field(False, description="Libraries leave its type alone when they cast a model.")
    fused: FusedRow | None = Field(None, description="For a stack: how else checkpoints hold it.")


class Group(_Strict):
    """Rows that are there several times, with a number."""

    repeat: Formula = Field(description="How often.")
    first: Formula = Field(0, description="The first number.")
    prefix: str = Field(description="What the names begin with; `{}` stands for the number.")
    rows: str = Field(description="Which of `blocks`.")
    part: Part = Field(description="The part they belong to; the decoder's layers are `layers`.")
    when: Formula | None = Field(None, description="Whether the model has them.")
    kind: Formula | None = Field(
        None, description="What `kind` is in these rows, if they are not the decoder's."
    )

    @model_validator(mode="after")
    def _check(self) -> Group:
        if self.kind is not None and self.part is Part.LAYERS:
            raise ValueError("`kind` of the decoder's layers is that of the table")
        return self


def _which(item: Any) -> str:
    return (
        "group"
        if isinstance(item, Group) or (isinstance(item, dict) and "repeat" in item)
        else "row"
    )


Item = Annotated[Annotated[Row, Tag("row")] | Annotated[Group, Tag("group")], Discriminator(_which)]
"""Groups have `repeat`, and so what is wrong in one is told as such."""


class Text(_Strict):
    """Where the text model's config is, and what transformers calls it."""

    section: str | None = Field(None, description="Section of config.json; a flat one will do.")
    type: str | None = Field(
        None, description="Its model type in transformers, where no section of its own states one."
    )


class Smoothing(_Strict):
    """A mapping of AWQ, by module paths within a decoder layer."""

    smooth: str
    balance: list[str] = Field(
        min_length=1, description="All that reads its output; first what the library has."
    )
    when: Formula | None = None


class Bound(_Strict):
    """What an entry of a config may be: a count from 1 on, where there is what it counts."""

    entry: str = Field(description="The entry, as formulas name it.")
    most: Formula | None = Field(None, description="How much it may be.")
    divides: Formula | None = Field(None, description="What it is a divisor of.")


LENGTH = "length"
"""In the place of how many tokens a sample has."""


class PassedOn(_Strict):
    """What decoder layers are given beside hidden states."""

    argument: str = Field(description="The parameter of their `forward` in transformers.")
    shapes: list[list[Formula]] = Field(
        min_length=1, description="Sizes of each tensor of a sample, `length` of which are tokens."
    )
    when: Formula | None = Field(None, description="Which layers are given it.")
    key: Formula | None = Field(
        None,
        description="The name that it has in the argument, a mapping which layers fill; without, "
        "the argument is one tensor, made of tokens before the layers.",
    )
    made: Formula | None = Field(
        None,
        description="Which layers put one into it; a layer is given that of the nearest layer "
        "before it that puts one there under the same `key`.",
    )

    @model_validator(mode="after")
    def _check(self) -> PassedOn:
        if (self.key is None) != (self.made is None):
            raise ValueError("`key` and `made` belong together")
        if self.key is None and len(self.shapes) > 1:
            raise ValueError("`shapes` has one entry where there is no `key`")
        if any(shape.count(LENGTH) != 1 for shape in self.shapes):
            raise ValueError(f"each of `shapes` has {LENGTH!r} once")
        return self


class Kv(_Strict):
    """What the size of a KV cache follows from."""

    heads: Formula = Field(description="Heads of keys and values.")
    head_dim: Formula = Field(description="Size of a head.")
    kinds: list[str] | None = Field(None, description="Kinds of layers that have one; all if none.")
    draft_layers: Formula = Field(0, description="Layers of the MTP head that have one.")


class Table(_Strict):
    """A family: which tensors there are for a config, and what is true of them."""

    about: str = Field(description="The family in a line, and where its facts come from.")
    text: Text = Text(section=None, type=None)
    reader: Annotated[str, AfterValidator(_known(READERS))] | None = Field(
        None, description="Code that reads the config; see `own_code`."
    )
    towers: list[str] = Field(
        default_factory=list, description="Sections of config.json with other parts, as vision."
    )
    ties: dict[str, str] = Field(
        default_factory=dict, description="What is another tensor when the config ties embeddings."
    )
    tied: bool = Field(False, description="What a config means that does not say.")
    mtp_entries: list[str] = Field(
        default_factory=list,
        description="Entry of the text config that announces the MTP head, and what else it is "
        "called in some.",
    )
    defaults: dict[str, Formula] = Field(
        default_factory=dict, description="What transformers takes where a config is silent."
    )
    restated: dict[str, Formula] = Field(
        default_factory=dict,
        description="Entries that transformers goes by, of what configs state in other words; one "
        "that a config states itself stays.",
    )
    values: dict[str, Formula] = Field(
        default_factory=dict,
        description="Names for formulas, which may use each other, and `layer` and `kind` in rows.",
    )
    bounds: list[Bound] = Field(
        default_factory=list,
        description="Entries that no shape follows from, and yet must fit: experts of a token.",
    )
    kind: Formula = Field("'full'", description="The kind of decoder layer number `layer`.")
    blocks: dict[str, list[Row]] = Field(default_factory=dict)
    model: list[Item] = Field(description="What the model holds, in order.")
    inputs: list[list[str]] = Field(
        default_factory=list, description="Linears of a layer that read one input."
    )
    fusions: dict[str, list[str]] = Field(
        default_factory=dict, description="What serving engines run as one, by its name there."
    )
    smoothing: list[Smoothing] = Field(default_factory=list)
    passed: list[PassedOn] = Field(default_factory=list)
    narrow: list[str] = Field(
        default_factory=list, description="Globs of weights too small for INT4 kernels."
    )
    dimensions: list[str] = Field(
        default_factory=lambda: ["hidden_size", "vocab_size"],
        description="What checkpoints must share for tensors of one to fit into another.",
    )
    kv: Kv | None = None
    max_positions: Formula = "max_position_embeddings"
    token_bytes: dict[str, Formula] = Field(
        default_factory=dict,
        description="Most bytes of a token in a layer, by kind, at `width` bytes an activation.",
    )
    attention_heads: dict[str, Formula] = Field(
        default_factory=dict,
        description="Heads of a layer's attention, by kind; `num_attention_heads` if none.",
    )
    eager: bool = Field(
        False, description="Whether transformers has no attention for it but `eager`."
    )
    spellings: list[tuple[str, str]] = Field(
        default_factory=list,
        description="Beginnings of names in other checkpoints, and what they are called here.",
    )
    modules: dict[str, str] = Field(
        default_factory=dict,
        description="Beginnings of names here, and of the modules that transformers builds for "
        "them; the first that fits.",
    )
    drafter: Annotated[str, AfterValidator(_known(DRAFTERS))] | None = Field(
        None, description="Code of the MTP head; see `own_code`."
    )
    mlx_drafter: str | None = Field(
        None, description="Model type of the folder that mlx-vlm makes of the MTP head alone."
    )
