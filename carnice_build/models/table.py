"""A family table evaluated for one config: which tensors there are, and what is true of them.

Tables are YAML (`tables/<model_type>.yaml`, schema in `table_schema`); what they cannot say is code
that they name (`own_code`): how a config is read, and what an MTP head computes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from carnice_build.models.base import (
    Architecture,
    Fusion,
    KvGeometry,
    Part,
    Passed,
    Role,
    SmoothingMapping,
    TensorFact,
)
from carnice_build.models.own_code import DRAFTERS, READERS, loaded
from carnice_build.models.readers import PlainReader, Reader
from carnice_build.models.table_file import load_table
from carnice_build.models.table_rows import TableRows
from carnice_build.models.table_schema import LENGTH, PassedOn
from carnice_build.models.table_values import TableValues

_WRONG_PREFIX = re.compile(r"^(?:model\.|language_model\.)+")
_NUMBERED = re.compile(r"^.*?\.?(?:layers|blocks)\.\d+\.")


def _respelled(name: str, beginnings: Iterable[tuple[str, str]]) -> str | None:
    """`name` with what stands for the first beginning that fits, None when none does."""
    for start, instead in beginnings:
        if name.startswith(start):
            return instead + name.removeprefix(start)
    return None


def _load(path: Path, config: Mapping[str, Any], where: str) -> FamilyTable:
    return FamilyTable(path, config, where)


class FamilyTable(Architecture):
    """The tensors of one checkpoint of a family; see `Architecture`."""

    def __init__(self, path: Path, config: Mapping[str, Any], where: str) -> None:
        """Evaluate the table at `path` for `config`, found at `where`.

        CheckpointError for what is wrong in the config, RecipeError for what is in the table.
        """
        self._source = path, config, where
        self._file = load_table(path)
        self._table = self._file.table
        reader = self._table.reader
        kind = PlainReader if reader is None else loaded(READERS[reader])
        self._reader: Reader = kind(config, where, self._table)
        self._values = TableValues(self._file, self._reader)
        self._rows = TableRows(self._file, self._values, self._reader.root.where)
        self.name = self._file.name
        self.dtype = self._reader.dtype
        self.num_layers = self._rows.num_layers

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, self._source

    # --- tensors ------------------------------------------------------------------------------

    @cached_property
    def tensors(self) -> Mapping[str, TensorFact]:
        """Every tensor that the config calls for, by its canonical name, in model order.

        An MTP head is listed when the config announces it, whether or not a file holds it.
        """
        return {name: fact for name, fact in self.built.items() if name not in self.ties}

    @cached_property
    def built(self) -> Mapping[str, TensorFact]:
        """See `Architecture.built`."""
        return {name: fact for name, (fact, row) in self._rows.facts.items() if not row.unread}

    @cached_property
    def unread(self) -> Mapping[str, TensorFact]:
        """See `Architecture.unread`."""
        return {name: fact for name, (fact, row) in self._rows.facts.items() if row.unread}

    @property
    def ties(self) -> Mapping[str, str]:
        """See `Architecture.ties`."""
        return self._table.ties if self._reader.tied else {}

    # --- the config ---------------------------------------------------------------------------

    @property
    def text_config(self) -> Mapping[str, Any]:
        """See `Architecture.text_config`."""
        own, reader = self._table.text.type, self._reader
        entries = {**reader.text_entries}
        entries |= {key: value for key, value in self._restated.items() if entries.get(key) is None}
        if own is None or (reader.text is not reader.root and reader.text.states("model_type")):
            return entries
        return {**entries, "model_type": own}

    @cached_property
    def _restated(self) -> Mapping[str, Any]:
        """What transformers is told of the config in its own words."""
        formulas = self._table.restated.items()
        return {name: self._values.evaluate(how, ("restated", name)) for name, how in formulas}

    @property
    def layer_config(self) -> Mapping[str, Any]:
        """See `Architecture.layer_config`."""
        left_out = self._table.mtp_entries
        return {key: value for key, value in self.text_config.items() if key not in left_out}

    def published_config(self, parts: Container[Part]) -> dict[str, Any]:
        """See `Architecture.published_config`."""
        return self._reader.published(parts)

    @property
    def kv_geometry(self) -> KvGeometry:
        """What the size of a KV cache follows from; other layers have a state of fixed size."""
        kv = self._table.kv
        if kv is None:
            return KvGeometry(0, 1, 1)
        kinds = self._rows.kinds
        if kv.kinds is not None:
            kinds = [kind for kind in kinds if kind in kv.kinds]
        return KvGeometry(
            full_attention_layers=len(kinds),
            kv_heads=self._values.size(kv.heads, ("kv", "heads"), {}),
            head_dim=self._values.size(kv.head_dim, ("kv", "head_dim"), {}),
            draft_layers=self._values.count(kv.draft_layers, ("kv", "draft_layers")),
        )

    @property
    def max_positions(self) -> int:
        """The longest context, in tokens."""
        return self._values.size(self._table.max_positions, ("max_positions",), {})

    @property
    def dimensions(self) -> Mapping[str, int]:
        """What two checkpoints must have in common for tensors of one to fit into the other."""
        return {
            name: self._values.size(name, ("dimensions",), {}) for name in self._table.dimensions
        }

    # --- layers -------------------------------------------------------------------------------

    def layer_kind(self, layer: int) -> str:
        """See `Architecture.layer_kind`."""
        return self._rows.kinds[layer]

    def layer_prefix(self, layer: int) -> str:
        """What the names of the layer's tensors begin with."""
        return self._rows.layers.prefix.replace("{}", str(layer))

    @cached_property
    def _linears(self) -> Mapping[int | None, Mapping[str, None]]:
        """The linear modules of each layer, in the order of the model."""
        found: dict[int | None, dict[str, None]] = {}
        for fact in self.tensors.values():
            if fact.role is Role.LINEAR and fact.name.endswith(".weight"):
                found.setdefault(fact.layer, {})[fact.module] = None
        return found

    def shared_inputs(self, layer: int) -> Sequence[Sequence[str]]:
        """The linears of a decoder layer, by module path; those of one group read one input."""
        prefix = self.layer_prefix(layer)
        left = dict(self._linears.get(layer, {}))
        groups = [
            [prefix + name for name in group if prefix + name in left]
            for group in self._table.inputs
        ]
        for module in (module for group in groups for module in group):
            left.pop(module, None)
        return [*(group for group in groups if group), *([module] for module in left)]

    def passed(self, layer: int) -> Sequence[Passed]:
        """See `Architecture.passed`."""
        return [
            self._passed(item, ("passed", index), layer)
            for index, item in enumerate(self._table.passed)
            if item.when is None
            or self._values.evaluate(
                item.when, ("passed", index, "when"), self._rows.of_layer(layer)
            )
        ]

    def _passed(self, item: PassedOn, path: Sequence[str | int], layer: int) -> Passed:
        key, maker = None, None
        if item.key is not None and item.made is not None:
            key, maker = self._maker(item.key, item.made, path, layer)
        given = self._rows.of_layer(layer if maker is None else maker)

        def size(formula: str | int, number: int, axis: int) -> int | None:
            if formula == LENGTH:
                return None
            return self._values.size(formula, (*path, "shapes", number, axis), given)

        shapes = tuple(
            tuple(size(formula, number, axis) for axis, formula in enumerate(formulas))
            for number, formulas in enumerate(item.shapes)
        )
        return Passed(item.argument, shapes, key, maker)

    def _maker(
        self, key: str | int, made: str | int, path: Sequence[str | int], layer: int
    ) -> tuple[str, int]:
        """Under which name layer `layer` is given something, and the last one that makes it."""
        wanted = str(self._values.evaluate(key, (*path, "key"), self._rows.of_layer(layer)))
        for maker in reversed(range(layer)):
            given = self._rows.of_layer(maker)
            if self._values.evaluate(made, (*path, "made"), given) and wanted == str(
                self._values.evaluate(key, (*path, "key"), given)
            ):
                return wanted, maker
        what = f"gives layer {layer} {wanted!r}, which no layer before it makes"
        raise self._file.error((*path, "made"), what, "a layer of that key")

    @cached_property
    def fusions(self) -> Sequence[Fusion]:
        """The modules that serving engines fuse, of the MTP head too."""
        fused = (
            (prefix + fused, [prefix + part for part in parts])
            for prefix in dict.fromkeys(self._rows.prefixes(Part.LAYERS, Part.MTP))
            for fused, parts in self._table.fusions.items()
        )
        # Where keys are values, the module is made of fewer.
        there = ((name, [p for p in parts if f"{p}.weight" in self.built]) for name, parts in fused)
        return tuple(Fusion(name, tuple(parts)) for name, parts in there if len(parts) > 1)

    @cached_property
    def smoothing(self) -> Sequence[SmoothingMapping]:
        """What AWQ may smooth."""
        found: list[SmoothingMapping] = []
        for index, item in enumerate(self._table.smoothing):
            path = ("smoothing", index)
            if item.when is None or self._values.evaluate(item.when, (*path, "when")):
                found.append(SmoothingMapping(item.smooth, tuple(item.balance)))
                self._check_sizes(found[-1], path)
        return tuple(found)

    def _check_sizes(self, mapping: SmoothingMapping, path: Sequence[str | int]) -> None:
        """Raise RecipeError unless scales of the weights' columns fit what they divide.

        That is a norm's gain, or the rows of a linear, of several in one the last.
        """
        for layer in range(self.num_layers):
            prefix = self.layer_prefix(layer)
            names = [f"{prefix}{module}.weight" for module in (mapping.smooth, *mapping.balance)]
            if not all(name in self.tensors for name in names):
                continue
            divided, *multiplied = (self.tensors[name].shape for name in names)
            experts = divided[:-2]
            for name, shape in zip(names[1:], multiplied, strict=True):
                rows = divided[-2] if len(divided) > 1 else divided[0]
                whole = rows == shape[-1] or (len(divided) > 1 and rows % shape[-1] == 0)
                if not whole or experts not in ((), shape[:-2]) or shape[-1] != multiplied[0][-1]:
                    raise self._file.error(
                        path,
                        f"{names[0]!r} is {list(divided)}, which scales of {name!r}, "
                        f"{list(shape)}, do not fit",
                        "as many rows as columns, or of several in one the last",
                    )

    @property
    def narrow_linears(self) -> Sequence[str]:
        """Globs of weights that engines do not take in INT4, for they are too small."""
        return self._table.narrow

    def token_bytes(self, kind: str, width: int) -> int:
        """See `Architecture.token_bytes`."""
        table = self._table.token_bytes
        name = kind if kind in table else "any"
        if name not in table:
            # The widest of what stands side by side in any block known: four times both sizes.
            return 16 * width * self._values.size("hidden_size", ("dimensions",), {})
        given = {"width": width}
        return int(self._values.evaluate(table[name], ("token_bytes", name), given))

    def attention_heads(self, kind: str) -> int:
        """See `Architecture.attention_heads`."""
        table = self._table.attention_heads
        name = kind if kind in table else "any"
        return self._values.count(table.get(name, "num_attention_heads"), ("attention_heads", name))

    @property
    def eager(self) -> bool:
        """See `Architecture.eager`."""
        return self._table.eager

    # --- names --------------------------------------------------------------------------------

    def module_kind(self, name: str) -> str:
        """What tables call the module of tensor `name`: its path without layer numbers."""
        module = re.sub(r"\.(weight|scales|biases)$", "", name)
        kind = _NUMBERED.sub("", module)
        kind = kind.removeprefix(self._rows.layers.prefix.partition("layers.")[0])
        kind = re.sub(r"\.(?:\d+|\*)\.", ".", kind)
        # Layers of a head may have the numbers that follow those of the decoder's.
        return f"mtp.{kind}" if module.startswith(self._draft_prefixes) else kind

    @cached_property
    def _draft_prefixes(self) -> tuple[str, ...]:
        return tuple(self._rows.prefixes(Part.MTP))

    @cached_property
    def _by_bare_name(self) -> Mapping[str, str]:
        return {_WRONG_PREFIX.sub("", name): name for name in self.built}

    def engine_names(self, module: str) -> Sequence[str]:
        """See `Architecture.engine_names`."""
        for start, instead in self._table.modules.items():
            if module.startswith(start):
                return instead + module.removeprefix(start), module
        return (module,)

    def canonical_name(self, name: str) -> str | None:
        """The name that a misprefixed `name` should have, or None when nothing fits."""
        if (known := _respelled(name, self._table.spellings)) in self.built:
            return known
        return self._by_bare_name.get(_WRONG_PREFIX.sub("", name))

    def offset_norm(self, name: str) -> bool:
        """True for the norms that store w with a gain of 1 + w."""
        return name in self._rows.facts and self._rows.facts[name][1].offset

    def keeps_dtype(self, name: str) -> bool:
        """True for the tensors whose type libraries leave alone when they cast a model."""
        return name in self._rows.facts and self._rows.facts[name][1].wide

    @property
    def drafts(self) -> bool:
        """See `Architecture.drafts`."""
        return self._table.drafter is not None

    def draft_head(self, attention: str, tensors: Mapping[str, Any]) -> Any:
        """See `Architecture.draft_head`."""
        if self._table.drafter is None:
            return super().draft_head(attention, tensors)
        return loaded(DRAFTERS[self._table.drafter])(self.text_config, attention, tensors)

    @property
    def mlx_drafter(self) -> str | None:
        """See `Architecture.mlx_drafter`."""
        return self._table.mlx_drafter
