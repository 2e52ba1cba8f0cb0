"""What llama.cpp's converter makes of a view: names, shapes, order, values and metadata.

The order is the converter's: that of the checkpoint's files by name, and in each of its tensors by
name.  `llama-quantize` puts them into an order of its own later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from carnice_build.checkpoint.generation import generation_entries
from carnice_build.checkpoint.gguf_values import Metadata, Value
from carnice_build.checkpoint.json import json_object
from carnice_build.checkpoint.known import known_floats
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.gguf.constants import constant_numbers
from carnice_build.formats.gguf.identity import general
from carnice_build.formats.gguf.mixes import file_type
from carnice_build.formats.gguf.ops import Values
from carnice_build.formats.gguf.parameters import ConfigScope, evaluated_parameters
from carnice_build.formats.gguf.refs import (
    cut_ref,
    first_rows,
    frame_of,
    merged_stacks,
    packed_codes,
    row_of,
    source_of,
    swapped_ref,
)
from carnice_build.formats.gguf.table import (
    Projector,
    Swap,
    Table,
    common_parameters,
    table_of,
)
from carnice_build.graph import ActionGraph, TensorRef, View
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.steps.base import Codes
from carnice_build.tensors import STACK

Kind = Literal["F32", "F16", "MXFP4", "half", "matrix"]
"""The type that the converter writes: one of these always; F16 in a file of F16, and F32 in any
other; or the file's own."""

PROJECTOR = "clip"
"""The architecture of the file of a tower."""

QUANTIZATION_VERSION = 2
"""`GGML_QNT_VERSION` in ggml.h."""

_MXFP4_MOE = "MXFP4_MOE"
"""What a file is whose experts have the codes of the checkpoint."""

_FRAMES = 2

_WHOLE = frozenset({"ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "shortconv.conv"})
"""Matrices of layers that stay F32."""


class Named(NamedTuple):
    """A tensor of the file: `ref` has its values, of any float type, to be cast or quantized.

    `fact` is that of the tensor of the architecture that it is made of.
    `merged` is that of the stack whose rows follow in each expert, if there is one.
    `swapped` says that heads changed places in its columns, and which.
    Of a tensor that the checkpoint holds in MXFP4 the `codes` are ggml's bytes of it: U8 [...,
    columns / 32 * 17].
    """

    name: str
    ref: TensorRef
    fact: TensorFact
    kind: Kind
    swapped: HeadsSwapped | None = None
    codes: TensorRef | None = None
    merged: TensorFact | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As files have it: columns first."""
        return self.ref.spec.shape[::-1]


@dataclass(frozen=True)
class Description:
    """What is in a file beside the tokenizer: its tensors, and its metadata, in order.

    The tokenizer's metadata follows on the rest.
    """

    architecture: str
    tensors: Sequence[Named]
    metadata: Metadata


@dataclass(frozen=True)
class About:
    """What a file tells that its tensors do not.

    `name` is the model's, as `owner/Name-27b` or without an owner; `files` are the small ones of
    the folder; `card` the entries at the head of its card; `file_type` the number of what most
    tensors are (`general.file_type`).
    """

    name: str
    files: Mapping[str, bytes]
    card: Mapping[str, Any]
    file_type: int
    where: str


def describe(
    architecture: Architecture,
    view: View,
    graph: ActionGraph,
    about: About,
    codes: Mapping[str, Codes] | None = None,
) -> Description:
    """The model's own file: all of the view but its tower.

    `codes` are those of weights of the view that the checkpoint holds in MXFP4.
    PlanError for a family without a table, and for a tensor that the table does not name.
    """
    table = table_of(architecture.name)
    facts = architecture.tensors
    left = [Part.TOWER, Part.MTP] if table.headless else [Part.TOWER]
    kept = {name: ref for name, ref in view.items() if facts[name].part not in left}
    numbers = [b.number for name in kept if (b := _block(name, architecture, table))]
    blocks = max([architecture.num_layers, *(number + 1 for number in numbers)])
    layers = [architecture.layer_kind(layer) for layer in range(architecture.num_layers)]
    nextn = blocks - len(layers)
    kinds = [*layers, *["full"] * nextn]
    if codes:
        about = replace(about, file_type=file_type(_MXFP4_MOE))
    scope = _scope(architecture, table, about, blocks=blocks, nextn=nextn, kinds=layers)
    model = _Model(table, architecture, graph, scope, _tokens(table, about), kept)
    ordered = _ordered(kept, facts)
    coded = codes or {}
    tensors = [model.coded(name, ref, coded[name]) for name, ref in ordered if name in coded]
    tensors += model.constants()
    for name, ref in ordered:
        if name not in coded:
            tensors += model.named(name, ref)
    parameters = [*(common_parameters() if table.common else ()), *table.parameters]
    arch = next((arch for arch, when in table.arch_if.items() if scope.evaluated(when)), table.arch)
    before, own = (
        evaluated_parameters(
            [item for item in parameters if item.first is first], scope, arch, kinds
        )
        for first in (True, False)
    )
    return _described(arch, "model", tensors, own, about, before)


def describe_projector(
    architecture: Architecture, view: View, graph: ActionGraph, about: About
) -> Description:
    """The file of the tower, which llama.cpp calls `mmproj`; see `describe`.

    PlanError for a family whose towers no table names.
    """
    table = table_of(architecture.name)
    if table.projector is None:
        raise PlanError(f"GGUF has no names for the tower of {architecture.name}", at=("format",))
    facts = architecture.tensors
    kept = {name: ref for name, ref in view.items() if facts[name].part is Part.TOWER}
    scope = _scope(architecture, table, about)
    depth = scope.size(table.projector.depth)
    tower = _Tower(table.projector, architecture, graph, scope)
    tensors = [*_token_rows(table.projector, view, facts, about)]
    for name, ref in _ordered(kept, facts):
        tensors += tower.named(facts[name], ref)
    own = evaluated_parameters(table.projector.parameters, scope, PROJECTOR, [""] * depth)
    return _described(PROJECTOR, "mmproj", tensors, own, about)


def _described(
    name: str,
    kind: str,
    tensors: Sequence[Named],
    own: Mapping[str, Value],
    about: About,
    before: Mapping[str, Value] | None = None,
) -> Description:
    """With what all files say of themselves around their `own` metadata, and some `before` it."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    generation = generation_entries(about.files, about.where)
    metadata = {
        "general.architecture": Value("str", name),
        **(before or {}),
        **general(kind, about.name, shapes, generation, about.card),
        **own,
        "general.quantization_version": Value("u32", QUANTIZATION_VERSION),
    }
    return Description(name, tensors, metadata)


def _scope(architecture: Architecture, table: Table, about: About, **given: Any) -> ConfigScope:
    """What formulas of the table mean: entries of the config, its rope, and the processor's."""
    root = architecture.published_config(tuple(Part))
    text = root.get("text_config")
    text = {**root, **text} if isinstance(text, dict) else root
    vision = _section(root, "vision_config")
    rope = _section(text, "rope_parameters") or _section(text, "rope_scaling")
    full = {**_stated(text, _ROPE_ENTRIES), **(_section(rope, "full_attention") or rope)}
    if "type" in full:
        full.setdefault("rope_type", full["type"])
    sliding = _section(rope, "sliding_attention")
    if not sliding and "rope_local_base_freq" in text:
        sliding = {"rope_theta": text["rope_local_base_freq"]}
    sections = {
        "": text,
        "rope": full,
        "sliding_rope": sliding,
        "vision_config": vision,
        "processor": _processor(about),
    }
    positions, patch = vision.get("num_position_embeddings"), vision.get("patch_size")
    known: dict[str, Any] = {**given, "file_type": about.file_type}
    if type(positions) is int and type(patch) is int and positions > 0:
        known["image_size"] = isqrt(positions * patch * patch)
    length = sections["processor"].get("image_seq_length", 256)
    if type(length) is int and length > 0:
        known["side"] = isqrt(length)
    return ConfigScope(sections, known, table.values, table.defaults, f"{about.where}/config.json")


_ROPE_ENTRIES = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Of rope, though they may stand outside of its section."""


def _stated(entries: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    return {name: entries[name] for name in names if entries.get(name) is not None}


def _section(entries: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = entries.get(name)
    return found if isinstance(found, dict) else {}


def _processor(about: About) -> Mapping[str, Any]:
    """How pictures are prepared: what later files say, and sections of them, goes before."""
    found: dict[str, Any] = {}
    for name, section in (
        ("preprocessor_config.json", "media_proc_cfg"),
        ("processor_config.json", "image_processor"),
    ):
        if name in about.files:
            entries = json_object(f"{about.where}/{name}", about.files[name])
            found |= {**entries, **_section(entries, section)}
    return found


def _ordered(view: View, facts: Mapping[str, TensorFact]) -> Sequence[tuple[str, TensorRef]]:
    """The tensors in the converter's order; experts are there when the last of them is.

    Of a model without bytes only the names are known.
    """
    files = {name: _file_name(ref) for name, ref in view.items()}
    alone: set[str] = set()
    for experts in _numbered_experts(view):
        last = max(files[name] for name in experts)
        files |= dict.fromkeys(experts, last)
        alone |= set(experts)

    def place(item: tuple[str, TensorRef]) -> tuple[str, str, int]:
        name, ref = item
        fused = facts[name].fused
        if fused is None or name in alone:
            # An expert's number stands before all letters, and so does what all of them are.
            return files[name], name.replace(STACK, "9~"), 0
        held = source_of(ref).located(0)[0].name
        turned = fused.turned is not None and fused.turned.endswith(held.rpartition(".")[2])
        return files[name], fused.turned if turned and fused.turned else fused.name, fused.part

    return sorted(view.items(), key=place)


def _numbered_experts(view: View) -> Iterable[Sequence[str]]:
    """The stacks of each layer whose experts have a tensor each."""
    found: dict[str, list[str]] = {}
    for name, ref in view.items():
        if STACK in name:
            tensor, _ = source_of(ref).located(0)
            start, _, rest = name.partition(STACK)
            if tensor.name.endswith(f".0{rest}"):
                found.setdefault(start, []).append(name)
    return found.values()


def _file_name(ref: TensorRef) -> str:
    """The name of the file that a tensor lies in; of experts in several, the last name."""
    tensor, size = source_of(ref), ref.spec.size
    experts = ref.spec.shape[0] if STACK in tensor.name else 1
    places = (tensor.located(index)[0] for index in range(0, size, max(1, size // max(1, experts))))
    names = {PurePath(place.file.name).name for place in places if place.file is not None}
    return max(names, default="")


class _Block(NamedTuple):
    """A block of llama.cpp's, and what a name says behind its prefix."""

    number: int
    rest: str


def _plain(name: str) -> str:
    return name.replace("language_model.", "")


def _block(name: str, architecture: Architecture, table: Table) -> _Block | None:
    """The block that a tensor belongs to; those of the MTP head follow on the model's."""
    found = _LAYER.fullmatch(_plain(name))
    if found is None:
        return None
    head, number, rest = found.groups()
    if head == "mtp":
        return _Block(architecture.num_layers + int(number) // table.rounds, rest)
    return _Block(int(number), rest)


_LAYER = re.compile(r"(mtp|model|backbone)\.layers\.(\d{1,6})\.(.+)")


def _spelled(names: Mapping[str, str], name: str) -> str | None:
    """GGUF's name by that of the tensor, or of its module."""
    if name in names:
        return names[name]
    module, _, end = name.rpartition(".")
    return f"{names[module]}.{end}" if module in names else None


class _Model:
    """Makes the tensors of a model's own file."""

    def __init__(
        self,
        table: Table,
        architecture: Architecture,
        graph: ActionGraph,
        scope: ConfigScope,
        tokens: int | None,
        view: View,
    ) -> None:
        """Of the embedding no more rows are kept than there are `tokens`, if that is known."""
        self._table = table
        self._architecture = architecture
        self._graph = graph
        self._scope = scope
        self._tokens = tokens
        self._view = view

    def constants(self) -> Iterable[Named]:
        """What no checkpoint holds, which comes before all that it does."""
        for name, constant in self._table.constants.items():
            if self._scope.evaluated(constant.when):
                made = known_floats(name, constant_numbers(constant.how, self._scope))
                fact = TensorFact(name, made.spec.shape, Part.BODY, Role.STATE)
                yield Named(name, TensorRef(made.spec, made), fact, "F32")

    def coded(self, tensor: str, ref: TensorRef, codes: Codes) -> Named:
        """A tensor with the codes that it has; they come before all others."""
        fact = self._architecture.tensors[tensor]
        name = self._name(fact, _block(tensor, self._architecture, self._table))
        return Named(name, ref, fact, "MXFP4", codes=packed_codes(codes, self._graph))

    def named(self, tensor: str, ref: TensorRef) -> Iterable[Named]:
        """The tensors of the file that a tensor of the view becomes."""
        table, fact = self._table, self._architecture.tensors[tensor]
        block = _block(tensor, self._architecture, table)
        rest = block.rest if block else ""
        if block is not None and rest in table.cuts:
            for name, made in cut_ref(ref, table.cuts[rest], self._scope):
                yield Named(f"blk.{block.number}.{name}", made, fact, _kind(name, made.spec.shape))
        elif block is not None and rest in table.merges:
            merge = table.merges[rest]
            other = self._followed(fact, rest)
            made = merged_stacks(source_of(ref), source_of(self._view[other.name]))
            name = f"blk.{block.number}.{merge.name}"
            yield Named(name, made, fact, "matrix", merged=other)
        elif rest not in [merge.other for merge in table.merges.values()]:
            name, made = self._name(fact, block), self._made(fact, ref, rest)
            kind = _kind(name, made.spec.shape)
            if kind == "F32" and self._moved(tensor) and _by_number(name):
                kind = "matrix"
            swap = table.swaps.get(rest)
            heads = _heads(swap, self._scope) if swap is not None and swap.columns else None
            yield Named(name, made, fact, kind, heads)

    def place(self, fact: TensorFact) -> Place:
        """See `places`."""
        table, size = self._table, self._scope.size
        block = _block(fact.name, self._architecture, table)
        rest = block.rest if block else ""
        if block is not None and rest in table.cuts:
            parts = table.cuts[rest].parts
            rows = [HeadPart(size(part.start), size(part.rows), part.turned) for part in parts]
            names = [f"blk.{block.number}.{part.name}" for part in parts]
            return Place(fact, names, heads=size(table.cuts[rest].heads), parts=rows)
        if block is not None and rest in table.merges:
            name = f"blk.{block.number}.{table.merges[rest].name}"
            return Place(fact, [name], merged=self._followed(fact, rest))
        swap = table.swaps.get(rest)
        heads = _heads(swap, self._scope) if swap else None
        return Place(fact, [self._name(fact, block)], heads, self._how(fact, rest))

    def _followed(self, fact: TensorFact, rest: str) -> TensorFact:
        """The stack whose rows follow on those of `fact`, whose name ends with `rest`."""
        name = fact.name.removesuffix(rest) + self._table.merges[rest].other
        return self._architecture.tensors[name]

    def _moved(self, tensor: str) -> bool:
        """Whether the converter gives the tensor the number of a block after it knew its kind."""
        return self._table.rounds > 1 and self._architecture.tensors[tensor].part is Part.MTP

    def _name(self, fact: TensorFact, block: _Block | None) -> str:
        table, name = self._table, _plain(fact.name)
        if (found := _spelled(table.mtp, name)) is not None:
            number = self._architecture.num_layers
        elif block is not None:
            found = _spelled(table.layer, block.rest)
            number = block.number
        else:
            found, number = _spelled(table.model, name), -1
        if found is None:
            raise PlanError(f"GGUF has no name for tensor {fact.name!r}", at=("format",))
        return found if number < 0 else f"blk.{number}.{found}"

    def _made(self, fact: TensorFact, ref: TensorRef, rest: str) -> TensorRef:
        """A tensor as llama.cpp has it, still of any float type."""
        table = self._table
        if (swap := table.swaps.get(rest)) is not None:
            ref = swapped_ref(ref, swap, self._scope)
        if self._tokens is not None and fact.name.endswith(_EMBEDDING):
            ref = first_rows(ref, self._tokens)
        if (shape := table.shapes.get(rest)) is not None:
            ref = ref.reshaped(*map(self._scope.size, shape))
        if rest in table.squeezed:
            ref = ref.reshaped(*(size for size in ref.spec.shape if size != 1))
        how = self._how(fact, rest)
        return ref if how is None else self._graph.add(Values(), {"how": how}, ref)[0]

    def _how(self, fact: TensorFact, rest: str) -> str | None:
        table = self._table
        how = table.functions.get(rest)
        if how is None and table.offsets and self._architecture.offset_norm(fact.name):
            how = "add_one"
        return how


def _heads(swap: Swap, scope: ConfigScope) -> HeadsSwapped:
    size = scope.size
    counts = size(swap.first), size(swap.second), size(swap.size)
    return HeadsSwapped(*counts, size(swap.skip), swap.columns)


def _token_rows(
    table: Projector, view: View, facts: Mapping[str, TensorFact], about: About
) -> Iterable[Named]:
    """The rows of the embedding that a tower brings along."""
    for name, token in table.tokens.items():
        fact = next(facts[tensor] for tensor in view if facts[tensor].part is Part.EMBED)
        number, rows = _token_number(token, about), fact.shape[0]
        if not 0 <= number < rows:
            raise CheckpointError(f"{token} is token {number} of {rows}", where=about.where)
        yield Named(name, row_of(view[fact.name], number), fact, "F32")


def _token_number(token: str, about: About) -> int:
    """The number of an added token; CheckpointError where the tokenizer does not have it."""
    for file in (_TOKENIZER_CONFIG, _TOKENIZER):
        entries = json_object(f"{about.where}/{file}", about.files.get(file, b"{}"))
        listed = entries.get("added_tokens_decoder", entries.get("added_tokens"))
        if isinstance(listed, dict):
            items = [(key, item) for key, item in listed.items() if _NUMBER.fullmatch(key)]
            listed = [{**item, "id": int(key)} for key, item in items if isinstance(item, dict)]
        for item in listed if isinstance(listed, list) else ():
            if isinstance(item, dict) and item.get("content") == token:
                number = item.get("id")
                if type(number) is int:
                    return number
    raise CheckpointError(f"the tokenizer has no token {token}", where=about.where)


def _tokens(table: Table, about: About) -> int | None:
    """How many tokens a model has for which the converter leaves out other rows.

    With a SentencePiece vocabulary it fills that up instead.
    """
    if not table.trimmed or "tokenizer.model" in about.files or _TOKENIZER not in about.files:
        return None
    where = f"{about.where}/{_TOKENIZER}"
    entries = json_object(where, about.files[_TOKENIZER])
    model, added = entries.get("model"), entries.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise CheckpointError("has no vocabulary", where=where)
    return len(vocabulary) + len(added)


_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)

_EMBEDDING = "embed_tokens.weight"
"""How the names of the tensors end that lose rows; others have one for each token, too."""


def _kind(name: str, shape: Sequence[int]) -> Kind:
    """What the converter writes of a tensor of a model's own file."""
    module, _, end = name.rpartition(".")
    small = len(shape) <= 1 or end != "weight" or module.endswith("_norm")
    return "F32" if small or _by_number(name) else "matrix"


def _by_number(name: str) -> bool:
    """Whether it is a matrix that stays F32; the converter knows it by its block's number."""
    module, _, end = name.rpartition(".")
    return end == "weight" and module.split(".", 2)[-1] in _WHOLE


class _Tower:
    """Makes the tensors of the file of a tower."""

    def __init__(
        self,
        table: Projector,
        architecture: Architecture,
        graph: ActionGraph,
        scope: ConfigScope,
    ) -> None:
        self._table = table
        self._scope = scope
        self._architecture = architecture
        self._graph = graph

    def named(self, fact: TensorFact, ref: TensorRef) -> Sequence[Named]:
        """The tensors of the file that a tensor of the view becomes."""
        table = self._table
        if table.unread is not None and fact.name.startswith(table.unread):
            return []
        name = self._name(fact)
        _, _, rest = fact.name.removeprefix(table.prefix).partition(".")
        if fact.name.startswith(table.prefix) and (swap := table.swaps.get(rest)) is not None:
            ref = swapped_ref(ref, swap, self._scope)
        if self._architecture.offset_norm(fact.name):
            ref = self._graph.add(Values(), {"how": "add_one"}, ref)[0]
        if fact.name not in table.frames:
            small = len(ref.spec.shape) <= 1 or name == "v.position_embd.weight"
            kind: Kind = table.kinds.get(name, "F32" if small else "matrix")
            return [Named(name, ref, fact, kind)]
        if ref.spec.shape[2] != _FRAMES:
            raise PlanError(
                f"the tower looks at {ref.spec.shape[2]} frames at once",
                expected=f"{_FRAMES}, as llama.cpp does",
                at=("format",),
            )
        names = _frame_names(name, ref.spec.shape)
        return [
            Named(each, frame_of(ref, number), fact, "half") for number, each in enumerate(names)
        ]

    def place(self, fact: TensorFact) -> Place:
        """See `places`."""
        name = self._name(fact)
        frames = fact.name in self._table.frames
        how = "add_one" if self._architecture.offset_norm(fact.name) else None
        return Place(fact, _frame_names(name, fact.shape) if frames else [name], how=how)

    def _name(self, fact: TensorFact) -> str:
        table = self._table
        if fact.name.startswith(table.prefix):
            number, _, rest = fact.name.removeprefix(table.prefix).partition(".")
            if (found := _spelled(table.block, rest)) is not None:
                return f"v.blk.{number}.{found}"
        elif (found := _spelled(table.tensors, fact.name)) is not None:
            return found
        raise PlanError(f"GGUF has no name for tensor {fact.name!r}", at=("format",))


def _frame_names(name: str, shape: Sequence[int]) -> Sequence[str]:
    """By the shape of a convolution [out, in, frames, ...]."""
    return [name, *(f"{name}.{number}" for number in range(1, shape[2]))]


class HeadsSwapped(NamedTuple):
    """What changed places, as arguments of `swapped_rows`, or of `swapped_columns`."""

    first: int
    second: int
    size: int
    skip: int
    columns: bool


class HeadPart(NamedTuple):
    """Rows of each head of a matrix, which a tensor has: [heads, rows, columns].

    If it is `turned`, [heads, columns, rows].
    """

    start: int
    rows: int
    turned: bool


@dataclass(frozen=True)
class Place:
    """What the tensors of files are called that one of the architecture becomes, and how.

    There is one name, but of a convolution over frames, and of a matrix of `heads` whose `parts`
    have one each.  `how` is a function of `ops.Values`.
    Of a stack that is one tensor with another, `merged` is the one whose rows follow.
    """

    fact: TensorFact
    names: Sequence[str]
    swapped: HeadsSwapped | None = None
    how: str | None = None
    heads: int = 0
    parts: Sequence[HeadPart] = ()
    merged: TensorFact | None = None


def places(architecture: Architecture) -> Sequence[Place]:
    """Where the tensors of an architecture are in the files of its model, of those that have names.

    PlanError for a family without a table.
    """
    table = table_of(architecture.name)
    about = About("", {}, {}, 0, "config.json")
    scope = _scope(architecture, table, about, blocks=0, nextn=0)
    graph = ActionGraph()
    model = _Model(table, architecture, graph, scope, None, {})
    tower = _Tower(table.projector, architecture, graph, scope) if table.projector else None
    found = []
    for fact in architecture.tensors.values():
        with suppress(PlanError):
            if fact.part is not Part.TOWER:
                found.append(model.place(fact))
            elif tower is not None:
                found.append(tower.place(fact))
    return found
