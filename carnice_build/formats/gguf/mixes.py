"""Which type each tensor of a GGUF file gets in a mix such as Q4_K_M, as llama-quantize decides.

The decision is about names, shapes, a few hyperparameters and the order of the tensors; `mix_rules`
has the rules.  `assign` gives the tensors in the order in which llama-quantize writes them, which
is not the converter's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.checkpoint.gguf_values import Metadata, Value
from carnice_build.errors import PlanError, nearest
from carnice_build.formats.gguf.mix_rules import (
    ALIASES,
    BETTER,
    EIGHT,
    EMBEDDING,
    EMBEDDINGS,
    FALLBACKS,
    KEPT_NAMES,
    KEPT_PARTS,
    KEPT_PARTS_OF,
    LAYERED,
    MIXES,
    NEEDING_IMPORTANCE,
    NEEDING_IMPORTANCE_ANYWHERE,
    NEEDING_IMPORTANCE_IN,
    OUTPUT,
    PRECISE_PARTS_OF,
    ROLES,
    STACKS_BY_ROLE,
    Mix,
    Model,
    Place,
    decide,
)

FLOATS = ("F32", "F16", "BF16")
"""Types that are not quantized."""

CHOOSABLE = tuple(name for name in TYPES if name not in ("I8", "I16", "I32", "I64", "F64"))
"""Types that weights can be given."""

QUANTIZATION_VERSION = 2
"""`GGML_QNT_VERSION` in ggml.h."""

_LAYER = re.compile(r"blk\.(\d{1,9})")
_LONGEST_TEXT = 127


class Tensor(NamedTuple):
    """A tensor as the converter writes it; `shape` has the columns first, as GGUF does."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True, slots=True)
class Request:
    """What llama-quantize is told.

    `importance` is whether there is an importance matrix, with an entry at least.
    `named` are the types that `--tensor-type` gives, by the name of a tensor; `output` and
    `embedding` are `--output-tensor-type` and `--token-embedding-type`.
    """

    mix: str
    importance: bool = False
    named: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    embedding: str | None = None
    pure: bool = False


class Assigned(NamedTuple):
    """The type that a tensor gets, and the one that was `wanted` before its columns decided."""

    tensor: Tensor
    type: str
    wanted: str
    needs_importance: bool = False

    @property
    def notice(self) -> str | None:
        """What to tell about a tensor that does not get the type that was wanted."""
        if self.type == self.wanted:
            return None
        return (
            f"{self.tensor.name}: {self.tensor.shape[0]} columns are not whole blocks of"
            f" {TYPES[self.wanted].elements}, as {self.wanted} has them; it gets {self.type}"
        )

    @property
    def requantized(self) -> bool:
        """Whether the source is quantized already, in another type; llama-quantize refuses it."""
        return self.tensor.type not in FLOATS and self.type != self.tensor.type


def mix_of(name: str) -> str:
    """The full name of a mix, which may be given in any case; PlanError when there is none."""
    full = ALIASES.get(name.upper(), name.upper())
    if full not in MIXES:
        raise PlanError(
            f"there is no mix {name!r}", expected=", ".join(MIXES), nearest=nearest(full, MIXES)
        )
    return full


def type_of(name: str) -> str:
    """The type of a name, which may be given in any case; PlanError when weights cannot have it."""
    full = name.upper()
    if full not in CHOOSABLE:
        raise PlanError(
            f"weights cannot have the type {name!r}",
            expected=", ".join(CHOOSABLE),
            nearest=nearest(full, CHOOSABLE),
        )
    return full


def file_type(mix: str) -> int:
    """The number of a mix in `general.file_type`."""
    return MIXES[mix_of(mix)].file_type


def model_of(metadata: Metadata) -> Model:
    """The hyperparameters that count, from what a file says of its model."""
    arch = str(_value(metadata, "general.architecture").value)
    if arch == "clip":
        return Model(arch, 0)
    heads = _first(metadata.get(f"{arch}.attention.head_count"), 0)
    return Model(
        arch=arch,
        layers=_first(_value(metadata, f"{arch}.block_count")),
        heads=heads,
        kv_heads=_first(metadata.get(f"{arch}.attention.head_count_kv"), heads),
        experts=_first(metadata.get(f"{arch}.expert_count"), 0),
        nextn=_first(metadata.get(f"{arch}.nextn_predict_layers"), 0),
    )


def order(name: str) -> tuple[int, str]:
    """What llama-quantize sorts the tensors of a file by: layer, then name."""
    match = _LAYER.match(name)
    return (int(match[1]) if match else -1, name)


@lru_cache(maxsize=65_536)
def role_of(name: str) -> str | None:
    """The role of a tensor in mixes, None for one that has none."""
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    return next((role for role, part in ROLES if part in name), None)


def quantizable(tensor: Tensor, arch: str) -> bool:
    """Whether a mix may change the type of a tensor at all."""
    name = tensor.name
    return (
        any(size > 1 for size in tensor.shape[1:])
        and name.endswith("weight")
        and name not in KEPT_NAMES
        and not _kept_parts(arch).search(name)
    )


@cache
def _kept_parts(arch: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, (*KEPT_PARTS, *KEPT_PARTS_OF.get(arch, ())))))


def assign(tensors: Iterable[Tensor], model: Model, request: Request) -> tuple[Assigned, ...]:
    """The types of all tensors of a file, in the order of llama-quantize's.

    Raises PlanError for what llama-quantize would not do.
    """
    ordered = sorted(tensors, key=lambda tensor: order(tensor.name))
    mixer = _Mixer([tensor.name for tensor in ordered], model, request)
    return tuple(mixer.assigned(tensor) for tensor in ordered)


class ImportanceFile(NamedTuple):
    """What a file says of the importance matrix it was made with.

    `dataset` is the first one that the matrix names, `entries` how many tensors are in it.
    """

    file: str
    dataset: str | None
    entries: int
    chunks: int


def quantized_metadata(
    metadata: Metadata, mix: str, importance: ImportanceFile | None = None
) -> dict[str, Value]:
    """The metadata after llama-quantize: what it sets goes to the end, splits are forgotten."""
    changed = {
        "general.quantization_version": Value("u32", QUANTIZATION_VERSION),
        "general.file_type": Value("u32", file_type(mix)),
    }
    if importance is not None:
        changed["quantize.imatrix.file"] = Value("str", _cut(importance.file))
        if importance.dataset is not None:
            changed["quantize.imatrix.dataset"] = Value("str", _cut(importance.dataset))
        changed["quantize.imatrix.entries_count"] = Value("u32", importance.entries)
        if importance.chunks > 0:
            changed["quantize.imatrix.chunks_count"] = Value("u32", importance.chunks)
    gone = {*changed, "split.no", "split.count", "split.tensors.count"}
    return {key: value for key, value in metadata.items() if key not in gone} | changed


class _Mixer:
    """A mix at work: it counts the tensors of each role that it has decided about."""

    def __init__(self, names: Sequence[str], model: Model, request: Request) -> None:
        self.model = model
        self.request = request
        self.mix_name = mix_of(request.mix)
        self.mix: Mix = MIXES[self.mix_name]
        self.tied = OUTPUT not in names
        self.values = sum(role_of(name) == "attn_v" for name in names)
        self.seen: Counter[str] = Counter()
        self.output = type_of(request.output) if request.output is not None else None
        self.embedding = type_of(request.embedding) if request.embedding is not None else None

    def assigned(self, tensor: Tensor) -> Assigned:
        """The type of the next tensor of the file."""
        if not quantizable(tensor, self.model.arch):
            return Assigned(tensor, tensor.type, tensor.type)
        wanted = self._stated(tensor)
        if wanted is not None:
            kind = wanted
        elif self.mix.default in FLOATS:
            kind = wanted = self.mix.default
        else:
            wanted = self.request.named.get(tensor.name) or self._mixed(tensor)
            kind = fitting(wanted, tensor.shape[0])
        return Assigned(tensor, kind, wanted, self._needs_importance(tensor.name, kind))

    def _needs_importance(self, name: str, kind: str) -> bool:
        if name == OUTPUT or name in EMBEDDINGS:
            return kind in NEEDING_IMPORTANCE_ANYWHERE
        further = NEEDING_IMPORTANCE_IN.get(self.mix_name, frozenset())
        return kind in NEEDING_IMPORTANCE or kind in further

    def _stated(self, tensor: Tensor) -> str | None:
        """The type that was asked for the output layer or for embeddings, whatever the mix."""
        role = role_of(tensor.name)
        if role == "output":
            kind = self.output
        elif role == "embedding" and not self._named(tensor.name):
            kind = self.embedding
        else:
            return None
        if kind is not None and tensor.shape[0] % TYPES[kind].elements:
            raise PlanError(
                f"{tensor.name} cannot have the type {kind}: its {tensor.shape[0]} columns are not"
                f" whole blocks of {TYPES[kind].elements}"
            )
        return kind

    def _named(self, name: str) -> bool:
        """Whether the type that a name was given counts: of embeddings, for those of layers."""
        return name != EMBEDDING and name in self.request.named

    def _mixed(self, tensor: Tensor) -> str:
        """The type that the mix has for a tensor, whatever its columns."""
        if self.request.pure:
            return self.mix.default
        name, role = tensor.name, role_of(tensor.name)
        if any(part in name for part in PRECISE_PARTS_OF.get(self.model.arch, ())):
            return "Q8_0"
        if role == "output" or (role == "embedding" and self.tied):
            return self._last(tensor)
        if self.mix.stacks:
            return self.mix.default if self._is_stack(tensor, role) else "Q8_0"
        if role == "embedding":
            return self.mix.embedding or self.mix.default
        return self._by_role(name, role) if role is not None else self.mix.default

    def _last(self, tensor: Tensor) -> str:
        """The type of the output layer, which tied embeddings are."""
        if self.output is not None:
            return self.output
        whole = tensor.shape[0] % TYPES[self.mix.default].elements == 0
        return self.mix.output if whole and self.model.arch != "falcon" else "Q8_0"

    def _is_stack(self, tensor: Tensor, role: str | None) -> bool:
        if self.model.arch in STACKS_BY_ROLE and role not in LAYERED:
            return False
        return len(tensor.shape) > 2 and tensor.shape[2] > 1

    def _by_role(self, name: str, role: str) -> str:
        place = self._place(name, role)
        self.seen[role] += 1
        eight = self.model.experts == 8 and not self.mix.few_bits
        if eight and role in EIGHT:
            return EIGHT[role]
        kind = decide(self.mix.rules.get(role, ()), place) or self.mix.default
        if role == "attn_v" and self.model.of_70b and not self.mix.few_bits:
            return BETTER.get(kind, kind)
        return kind

    def _place(self, name: str, role: str) -> Place:
        index, count = self.seen[role], self.model.layers if role in LAYERED else self.values
        if role in LAYERED and self.model.experts > 1 and not self.mix.few_bits:
            # Stacks and dense layers mix, so that a count would not be a layer.
            index = order(name)[0]
            if not 0 <= index < count:
                raise PlanError(
                    f"{name} is in none of the {count} layers of the model",
                    expected=f"a name that begins with blk.0. to blk.{count - 1}.",
                )
        return Place(self.model, index, count, self.request.importance)


def fitting(kind: str, columns: int) -> str:
    """`kind`, or the one in its place where the columns are not whole blocks of it."""
    if columns % TYPES[kind].elements == 0:
        return kind
    smaller = FALLBACKS.get(kind, kind)
    return smaller if columns % TYPES[smaller].elements == 0 else "F16"


def _value(metadata: Metadata, key: str) -> Value:
    if key not in metadata:
        raise PlanError(f"the metadata have no {key}")
    return metadata[key]


def _first(value: Value | None, default: int = 0) -> int:
    """A number, or of a list that has one for each layer the first."""
    if value is None:
        return default
    return int(value.value[0] if value.kind.startswith("[") else value.value)


def _cut(text: str) -> str:
    """As much of a text as llama-quantize has room for, without half a character."""
    return text.encode()[:_LONGEST_TEXT].decode(errors="ignore")
