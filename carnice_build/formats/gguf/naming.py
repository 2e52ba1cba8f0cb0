"""What llama.cpp's converter makes of a view: names, shapes, order, values and metadata.

The order is the converter's: that of the checkpoint's files by name, and in each of its tensors by
name.  `llama-quantize` puts them into an order of its own later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import PurePath
from typing import Any

from carnice_build.checkpoint.generation import generation_entries
from carnice_build.checkpoint.gguf_values import Metadata, Value
from carnice_build.checkpoint.json import json_object
from carnice_build.errors import CheckpointError, PlanError
from carnice_build.formats.gguf.identity import general
from carnice_build.formats.gguf.mixes import QUANTIZATION_VERSION, file_type
from carnice_build.formats.gguf.model_tensors import ModelTensors, block_of
from carnice_build.formats.gguf.named import Named, Place
from carnice_build.formats.gguf.parameters import ConfigScope, evaluated_parameters
from carnice_build.formats.gguf.refs import (
    source_of,
)
from carnice_build.formats.gguf.table import (
    Table,
    common_parameters,
    table_of,
)
from carnice_build.formats.gguf.tokenizer_file import NAME as TOKENIZER
from carnice_build.formats.gguf.tower_tensors import TowerTensors, token_rows
from carnice_build.graph import ActionGraph, TensorRef, View
from carnice_build.models.base import Architecture, Part, TensorFact
from carnice_build.steps.base import Codes
from carnice_build.tensors import STACK

PROJECTOR = "clip"
"""The architecture of the file of a tower."""

_MXFP4_MOE = "MXFP4_MOE"
"""What a file is whose experts have the codes of the checkpoint."""


@dataclass(frozen=True)
class Description:
    """What is in a file beside the tokenizer: its tensors, and its metadata, in order.

    The tokenizer's metadata follows on the rest.
    `notices` say what of the config is not.
    """

    architecture: str
    tensors: Sequence[Named]
    metadata: Metadata
    notices: Sequence[str] = ()


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
    numbers = [b.number for name in kept if (b := block_of(name, architecture, table))]
    blocks = max([architecture.num_layers, *(number + 1 for number in numbers)])
    layers = [architecture.layer_kind(layer) for layer in range(architecture.num_layers)]
    nextn = blocks - len(layers)
    kinds = [*layers, *["full"] * nextn]
    if codes:
        about = replace(about, file_type=file_type(_MXFP4_MOE))
    scope = _scope(architecture, table, about, blocks=blocks, nextn=nextn, kinds=layers)
    model = ModelTensors(table, architecture, graph, scope, _tokens(table, about), kept)
    ordered = _ordered(kept, facts)
    coded = codes or {}
    tensors = [model.coded(name, ref, coded[name]) for name, ref in ordered if name in coded]
    factors = list(model.constants())
    tensors += factors
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
    description = _described(arch, "model", tensors, own, about, before)
    unsaid = None if factors else _unsaid_rope(scope, description.metadata)
    return replace(description, notices=(unsaid,)) if unsaid else description


def _unsaid_rope(scope: ConfigScope, metadata: Metadata) -> str | None:
    """What to tell of positions that are scaled in a way that neither metadata nor factors say."""
    kind = scope.value("rope.rope_type")
    if kind in _UNSCALED or any(key.endswith(_SCALING) for key in metadata):
        return None
    return (
        f"config.json: rope of type {str(kind)[:40]!r} is left out, as llama.cpp's converter leaves"
        " it out: a GGUF of this family has no word for it, or the config no factor"
    )


_UNSCALED = (None, "default", "mrope")
"""Types of rope whose positions are those of the tokens."""

_SCALING = ".rope.scaling.type"


def describe_projector(
    architecture: Architecture, view: View, graph: ActionGraph, about: About
) -> Description:
    """The file of the towers, which llama.cpp calls `mmproj`; see `describe`.

    PlanError for a family whose towers no table names.
    """
    table = table_of(architecture.name)
    if table.projector is None:
        raise PlanError(f"GGUF has no names for the tower of {architecture.name}", at=("format",))
    facts = architecture.tensors
    kept = {name: ref for name, ref in view.items() if facts[name].part is Part.TOWER}
    scope = _scope(architecture, table, about)
    depth = scope.size(table.projector.depth)
    tower = TowerTensors(table.projector, architecture, graph, scope)
    tensors = [*token_rows(table.projector, view, facts, about.files, about.where)]
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
        "audio_config": _section(root, "audio_config"),
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


def _tokens(table: Table, about: About) -> int | None:
    """How many tokens a model has for which the converter leaves out other rows.

    With a SentencePiece vocabulary it fills that up instead.  Tokens that are both added and the
    model's own count once, unlike there, where llama.cpp would find more rows than tokens.
    """
    if not table.trimmed or "tokenizer.model" in about.files or TOKENIZER not in about.files:
        return None
    where = f"{about.where}/{TOKENIZER}"
    entries = json_object(where, about.files[TOKENIZER])
    model, added = entries.get("model"), entries.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise CheckpointError("has no vocabulary", where=where)
    if isinstance(vocabulary, list):
        # A model that is not written as GGUF, which is told where its tokens are read.
        return None
    texts = (token.get("content") for token in added if isinstance(token, dict))
    return len(vocabulary.keys() | {text for text in texts if isinstance(text, str)})


def places(architecture: Architecture) -> Sequence[Place]:
    """Where the tensors of an architecture are in the files of its model, of those that have names.

    PlanError for a family without a table.
    """
    table = table_of(architecture.name)
    about = About("", {}, {}, 0, "config.json")
    scope = _scope(architecture, table, about, blocks=0, nextn=0)
    graph = ActionGraph()
    model = ModelTensors(table, architecture, graph, scope, None, {})
    tower = TowerTensors(table.projector, architecture, graph, scope) if table.projector else None
    found = []
    for fact in architecture.tensors.values():
        with suppress(PlanError):
            if fact.part is not Part.TOWER:
                found.append(model.place(fact))
            elif tower is not None:
                found.append(tower.place(fact))
    return found
