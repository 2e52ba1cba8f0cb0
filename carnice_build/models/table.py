"""A family table evaluated for one config: which tensors there are, and what is true of them.

Tables are YAML (`tables/<model_type>.yaml`, schema in `table_schema`); what they cannot say is code
that they name: how a config is read (`readers`), and what an MTP head computes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from carnice_build.errors import CheckpointError, RecipeError
from carnice_build.models.base import (
    MOST_EXPERTS,
    MOST_LAYERS,
    ConfigReader,
    FusedIn,
    Fusion,
    KvGeometry,
    Part,
    Passed,
    Role,
    SmoothingMapping,
    TensorFact,
)
from carnice_build.models.drafters import drafter
from carnice_build.models.formulas import FormulaError, evaluate, names_in
from carnice_build.models.readers import reader_of
from carnice_build.models.table_schema import LENGTH, FusedRow, Group, PassedOn, Row, Table
from carnice_build.tensors import STACK
from carnice_build.yaml_tree import Node, read_tree

_MERGED = {"blocks", "defaults", "values"}
_MOST_SIZE = 2**31 - 1
_WRONG_PREFIX = re.compile(r"^(?:model\.|language_model\.)+")
_NUMBERED = re.compile(r"^.*?\.?(?:layers|blocks)\.\d+\.")


@dataclass(frozen=True)
class TableFile:
    """A table, and where each of its entries stands."""

    name: str
    table: Table
    tree: Node

    def error(self, path: Sequence[str | int], what: str, expected: str) -> RecipeError:
        """The error for the entry at `path`."""
        return RecipeError(what, where=self.tree.find(path).where, expected=expected)

    @cached_property
    def layered(self) -> frozenset[str]:
        """The values that differ from layer to layer."""
        found = {"layer", "kind"}
        # Values may come in any order, so that one pass does not find all.
        for _ in self.table.values:
            found |= {name for name, text in self.table.values.items() if names_in(text) & found}
        return frozenset(found - {"layer", "kind"})

    def check(self) -> None:
        """Raise RecipeError for values and defaults that follow from themselves."""
        formulas = {**self.table.defaults, **self.table.values}
        asked = {name: names_in(str(text)) & formulas.keys() for name, text in formulas.items()}
        try:
            TopologicalSorter(asked).prepare()
        except CycleError as error:
            name = error.args[1][0]
            path = ("values" if name in self.table.values else "defaults", name)
            raise self.error(path, f"what {name!r} is follows from itself", "an end") from None


def load_table(path: Path) -> TableFile:
    """The table in the file `path`; RecipeError with file:line:column when it is none.

    With `extends: OTHER`, what stands at the top of the table OTHER.yaml beside it, or among
    those that ship, is taken where this one says nothing, and so is each of its `blocks`,
    `defaults` and `values`.
    """
    # A table of one's own may have been edited since.
    return _loaded(path, None if path.parent == SHIPPED else path.stat().st_mtime_ns)


@cache
def _loaded(path: Path, _: int | None) -> TableFile:
    tree = _whole(path, read_tree(path))
    try:
        found = TableFile(path.stem, Table.model_validate(tree.plain()), tree)
    except ValidationError as error:
        detail = error.errors()[0]
        # Without which of the kinds of items it is.
        entry = [part for part in detail["loc"] if part not in ("row", "group")]
        message = detail["msg"].removeprefix("Value error, ")
        shown = ".".join(map(str, entry))
        raise RecipeError(f"{shown}: {message}", where=tree.find(entry).where) from None
    found.check()
    return found


def _whole(path: Path, tree: Node, below: Sequence[Path] = ()) -> Node:
    if not isinstance(tree.value, dict) or "extends" not in tree.value:
        return tree
    other = tree.value["extends"]
    name = str(other.value)
    folders = (path.parent, SHIPPED) if re.fullmatch(r"\w{1,100}", name) else ()
    parents = (folder / f"{name}.yaml" for folder in folders)
    # A table of one's own may have the name of the one that it extends.
    parent = next((p for p in parents if p.is_file() and p not in (*below, path)), None)
    if parent is None:
        what = "extends itself" if name == path.stem else f"there is no table {name!r}"
        raise RecipeError(what, where=other.where)
    inherited = _whole(parent, read_tree(parent), (*below, path)).value
    assert isinstance(inherited, dict)
    own = {key: node for key, node in tree.value.items() if key != "extends"}
    for key in _MERGED & inherited.keys() & own.keys():
        old, new = inherited[key].value, own[key].value
        if isinstance(old, dict) and isinstance(new, dict):
            own[key] = Node({**old, **new}, own[key].where)
    return Node({**inherited, **own}, tree.where)


SHIPPED = Path(__file__).parent / "tables"


def _respelled(name: str, beginnings: Iterable[tuple[str, str]]) -> str | None:
    """`name` with what stands for the first beginning that fits, None when none does."""
    for start, instead in beginnings:
        if name.startswith(start):
            return instead + name.removeprefix(start)
    return None


def _fused(row: FusedRow, prefix: str) -> FusedIn:
    turned = None if row.turned is None else prefix + row.turned
    return FusedIn(prefix + row.name, row.part, row.of, row.turns, turned)


def _load(path: Path, config: Mapping[str, Any], where: str) -> FamilyTable:
    return FamilyTable(path, config, where)


@dataclass
class _Scope:
    """What names mean in a formula: those given, values of the table, then the config's."""

    family: FamilyTable
    given: Mapping[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return self.family.named(name, self.given)


class FamilyTable:
    """The tensors of one checkpoint of a family; see `Architecture`."""

    def __init__(self, path: Path, config: Mapping[str, Any], where: str) -> None:
        """Evaluate the table at `path` for `config`, found at `where`.

        CheckpointError for what is wrong in the config, RecipeError for what is in the table.
        """
        self._source = path, config, where
        self._file = load_table(path)
        self._table = self._file.table
        self._reader = reader_of(config, where, self._table)
        self._named: dict[tuple[str, frozenset[Any] | None], Any] = {}
        self._sizes: dict[str, int] = {}
        self.name = self._file.name
        self.dtype = self._reader.dtype
        self._layers = self._layer_group()
        self.num_layers = self._count(self._layers.repeat, ("model",), least=1)
        self._check_lists()
        self._kinds = [self._kind(layer) for layer in range(self.num_layers)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, self._source

    # --- names and formulas -------------------------------------------------------------------

    def named(self, name: str, given: Mapping[str, Any]) -> Any:
        """What a name means where some are `given`; CheckpointError when the config lacks it."""
        layered = name in self._file.layered
        key = (name, frozenset(given.items()) if layered else None)
        if key not in self._named:
            value = self._table.values[name] if layered else None
            self._named[key] = (
                self._find(name)
                if value is None
                else self._evaluate(value, ("values", name), given)
            )
        return self._named[key]

    def _find(self, name: str) -> Any:
        table, entries = self._table, self._reader.text_entries
        section, _, entry = name.partition(".")
        if entry:
            return self._section_entry(section, entry)
        if name in table.values:
            return self._evaluate(table.values[name], ("values", name))
        if name in table.towers:
            return self._reader.root.states(name)
        if entries.get(name) is not None:
            return entries[name]
        if name in table.defaults:
            return self._evaluate(table.defaults[name], ("defaults", name))
        raise self._reader.text.error(name, "one")

    def _section_entry(self, section: str, entry: str) -> Any:
        name = f"{section}.{entry}"
        reader = self._section(section)
        value = reader.entries.get(entry)
        if value is not None:
            return value
        if name in self._table.defaults:
            return self._evaluate(self._table.defaults[name], ("defaults", name))
        raise reader.error(entry, "one")

    def _evaluate(
        self, formula: str | int, path: Sequence[str | int], given: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return evaluate(str(formula), _Scope(self, given or {}))
        except FormulaError as error:
            self._blame_config(str(formula), given or {}, 0)
            raise self._file.error(
                path, f"the formula {formula!r} {error}", f"one that fits {self._reader.root.where}"
            ) from None

    def _default(self, name: str) -> str | int | None:
        """The formula that stands for an entry which the config does not state."""
        section, _, entry = name.rpartition(".")
        if not section:
            stated = self._reader.text_entries.get(entry)
        elif section == "root" or self._reader.root.states(section):
            stated = self._section(section).entries.get(entry)
        else:
            stated = None
        return self._table.defaults.get(name) if stated is None else None

    def _section(self, name: str) -> ConfigReader:
        root = self._reader.root
        return root if name == "root" else root.section(name)

    def _blame_config(
        self, formula: str, given: Container[str], least: int, seen: set[str] | None = None
    ) -> None:
        """Raise CheckpointError for an entry that is no number where one is needed.

        Of values that are built of values, those `seen` are not asked again.
        """
        seen = set() if seen is None else seen
        names = names_in(formula) - seen
        seen |= names
        for name in names:
            if name in given or name in self._table.towers:
                continue
            if name in self._table.values:
                self._blame_config(str(self._table.values[name]), given, least, seen)
            elif (default := self._default(name)) is not None and not names_in(str(default)):
                continue  # a number that the table has right, such as 0 for what is not there
            elif not isinstance(self.named(name, {}), list):
                self._check_size(name, least)

    def _count(
        self,
        formula: str | int,
        path: Sequence[str | int],
        given: Mapping[str, Any] | None = None,
        *,
        least: int = 0,
    ) -> int:
        """How often something is there."""
        found = self._evaluate(formula, path, given)
        if isinstance(found, bool) or found is None:
            found = int(bool(found))
        if type(found) is not int or not least <= found <= MOST_LAYERS:
            name = str(formula)
            if re.fullmatch(r"[\w.]+", name) and not name.isdigit():
                raise self._entry_error(name, f"a count from {least} to {MOST_LAYERS}")
            raise CheckpointError(
                f"has {found!r} of what {formula!r} counts",
                where=self._reader.root.where,
                expected=f"{least} to {MOST_LAYERS}",
            )
        return found

    def _entry_error(self, name: str, expected: str) -> CheckpointError:
        section, _, entry = name.partition(".")
        if not entry:
            return self._reader.text.error(name, expected)
        return self._section(section).error(entry, expected)

    def _check_size(self, name: str, least: int) -> None:
        value = self.named(name, {})
        if type(value) is int and least <= value <= _MOST_SIZE:
            return
        expected = f"a count from {least} to {_MOST_SIZE}"
        if (default := self._default(name)) is not None:
            self._blame_config(str(default), {}, least)
            what = f"the default {default!r} gives {value!r} for {self._reader.root.where}"
            raise self._file.error(("defaults", name), what, expected)
        raise self._entry_error(name, expected)

    def _size(self, formula: str | int, path: Sequence[str | int], given: Mapping[str, Any]) -> int:
        """A size of a tensor."""
        text = str(formula)
        if text in self._sizes:
            return self._sizes[text]
        names = names_in(text)
        for name in names:
            if name not in given and name not in self._table.values and "[" not in text:
                self._check_size(name, 1)
        found = self._evaluate(text, path, given)
        if type(found) is not int or found < 1:
            self._blame_config(text, given, 1)
            raise self._file.error(
                path,
                f"the formula {text!r} gives {found!r} for {self._reader.root.where}",
                "a size of 1 or more",
            )
        if not names & (given.keys() | self._file.layered):
            self._sizes[text] = found
        return found

    # --- tensors ------------------------------------------------------------------------------

    def _layer_group(self) -> Group:
        for item in self._table.model:
            if isinstance(item, Group) and item.part is Part.LAYERS:
                return item
        raise self._file.error(("model",), "has no decoder layers", "a group of part `layers`")

    def _check_lists(self) -> None:
        """Raise CheckpointError for a list of what each layer is that has another length."""
        for name in names_in(str(self._table.kind)) - {"layer"} - self._file.layered:
            value = self.named(name, {})
            if isinstance(value, list) and value and len(value) != self.num_layers:
                raise self._entry_error(name, f"{self.num_layers} entries")

    def _kind(self, layer: int) -> str:
        kind = self._evaluate(self._table.kind, ("kind",), {"layer": layer})
        if not isinstance(kind, str):
            raise self._file.error(("kind",), f"gives {kind!r} for layer {layer}", "a name")
        return kind.removesuffix("_attention") or kind

    @cached_property
    def tensors(self) -> Mapping[str, TensorFact]:
        """Every tensor that the config calls for, by its canonical name, in model order.

        An MTP head is listed when the config announces it, whether or not a file holds it.
        """
        return {name: fact for name, fact in self.built.items() if name not in self.ties}

    @cached_property
    def built(self) -> Mapping[str, TensorFact]:
        """See `Architecture.built`."""
        return {name: fact for name, (fact, row) in self._rows.items() if not row.unread}

    @cached_property
    def unread(self) -> Mapping[str, TensorFact]:
        """See `Architecture.unread`."""
        return {name: fact for name, (fact, row) in self._rows.items() if row.unread}

    @cached_property
    def _rows(self) -> Mapping[str, tuple[TensorFact, Row]]:
        found: dict[str, tuple[TensorFact, Row]] = {}
        fused: dict[str, list[tuple[Sequence[str | int], TensorFact]]] = {}
        for path, fact, row in self._facts():
            if fact.name in found:
                raise self._file.error(
                    path, f"names the tensor {fact.name!r} once more", "each of them once"
                )
            found[fact.name] = fact, row
            if fact.fused is not None:
                fused.setdefault(fact.fused.name, []).append((path, fact))
        for name, stacks in fused.items():
            self._check_fused(name, stacks)
        return found

    def _check_fused(
        self, name: str, stacks: Sequence[tuple[Sequence[str | int], TensorFact]]
    ) -> None:
        """Raise RecipeError unless the stacks that a tensor holds are all of it, each once."""
        for path, fact in stacks:
            if not fact.stacked:
                what = f"{fact.name!r} is no stack, so that {name!r} cannot hold it"
                raise self._file.error((*path, "fused"), what, "a `*` in its name")
        path, last = stacks[-1]
        wholes = {(fact.shape, fact.fused and replace(fact.fused, part=0)) for _, fact in stacks}
        parts = sorted(fact.fused.part for _, fact in stacks if fact.fused)
        assert last.fused is not None
        if len(wholes) > 1 or parts != list(range(last.fused.of)):
            shown = ", ".join(map(str, parts))
            raise self._file.error(
                (*path, "fused"),
                f"of {name!r} there are the parts {shown}",
                "stacks of one shape that are all of it, each once",
            )

    def _facts(self) -> Iterator[tuple[Sequence[str | int], TensorFact, Row]]:
        for index, item in enumerate(self._table.model):
            path = ("model", index)
            if isinstance(item, Group):
                yield from self._group(item, path)
            elif fact := self._fact(item, path, "", item.part or Part.BODY, None, {}):
                yield path, fact, item

    def _group(
        self, group: Group, path: Sequence[str | int]
    ) -> Iterator[tuple[Sequence[str | int], TensorFact, Row]]:
        if group.when is not None and not self._evaluate(group.when, (*path, "when")):
            return
        rows = self._table.blocks.get(group.rows)
        if rows is None:
            raise self._file.error(
                (*path, "rows"), f"there is no block {group.rows!r}", "one of `blocks`"
            )
        for number, prefix in self._members(group, path):
            layer = number if group.part is Part.LAYERS else None
            given: dict[str, Any] = {"layer": number}
            if layer is not None:
                given["kind"] = self._kinds[layer]
            for name, formula in group.given.items():
                given[name] = self._evaluate(formula, (*path, "given", name), given)
            for place, row in enumerate(rows):
                where = ("blocks", group.rows, place)
                if fact := self._fact(row, where, prefix, group.part, layer, given):
                    yield where, fact, row

    def _members(self, group: Group, path: Sequence[str | int]) -> Iterator[tuple[int, str]]:
        """The numbers of a group, and what the names of each begin with."""
        first = self._count(group.first, (*path, "first"))
        for number in range(first, first + self._count(group.repeat, (*path, "repeat"))):
            yield number, group.prefix.replace("{}", str(number))

    def _fact(
        self,
        row: Row,
        path: Sequence[str | int],
        prefix: str,
        part: Part,
        layer: int | None,
        given: Mapping[str, Any],
    ) -> TensorFact | None:
        """The tensor of a row, None when this model has it not."""
        if row.when is not None and not self._evaluate(row.when, (*path, "when"), given):
            return None
        shape = tuple(
            self._size(size, (*path, "shape", index), given) for index, size in enumerate(row.shape)
        )
        if STACK in row.name and shape[0] > MOST_EXPERTS:
            raise CheckpointError(
                f"has {shape[0]} experts in a layer by {row.shape[0]}",
                where=self._reader.root.where,
                expected=f"at most {MOST_EXPERTS}",
            )
        fused = None if row.fused is None else _fused(row.fused, prefix)
        name, own = prefix + row.name, row.part or part
        return TensorFact(name, shape, own, row.role, layer, fused, row.optional)

    @property
    def ties(self) -> Mapping[str, str]:
        """See `Architecture.ties`."""
        return self._table.ties if self._reader.tied else {}

    def optional(self, fact: TensorFact) -> bool:
        """True for tensors that a checkpoint may lack: the MTP head and the towers."""
        return fact.part in (Part.MTP, Part.VISION)

    # --- the config ---------------------------------------------------------------------------

    @property
    def text_config(self) -> Mapping[str, Any]:
        """See `Architecture.text_config`."""
        own, reader = self._table.text.type, self._reader
        if own is None or (reader.text is not reader.root and reader.text.states("model_type")):
            return reader.text_entries
        return {**reader.text_entries, "model_type": own}

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
        kinds = self._kinds if kv.kinds is None else [k for k in self._kinds if k in kv.kinds]
        return KvGeometry(
            full_attention_layers=len(kinds),
            kv_heads=self._size(kv.heads, ("kv", "heads"), {}),
            head_dim=self._size(kv.head_dim, ("kv", "head_dim"), {}),
            draft_layers=self._count(kv.draft_layers, ("kv", "draft_layers")),
        )

    @property
    def max_positions(self) -> int:
        """The longest context, in tokens."""
        return self._size(self._table.max_positions, ("max_positions",), {})

    @property
    def dimensions(self) -> Mapping[str, int]:
        """What two checkpoints must have in common for tensors of one to fit into the other."""
        return {name: self._size(name, ("dimensions",), {}) for name in self._table.dimensions}

    # --- layers -------------------------------------------------------------------------------

    def layer_kind(self, layer: int) -> str:
        """See `Architecture.layer_kind`."""
        return self._kinds[layer]

    def layer_prefix(self, layer: int) -> str:
        """What the names of the layer's tensors begin with."""
        return self._layers.prefix.replace("{}", str(layer))

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
            or self._evaluate(item.when, ("passed", index, "when"), self._of_layer(layer))
        ]

    def _passed(self, item: PassedOn, path: Sequence[str | int], layer: int) -> Passed:
        key, maker = None, None
        if item.key is not None and item.made is not None:
            key, maker = self._maker(item.key, item.made, path, layer)
        given = self._of_layer(layer if maker is None else maker)

        def size(formula: str | int, number: int, axis: int) -> int | None:
            if formula == LENGTH:
                return None
            return self._size(formula, (*path, "shapes", number, axis), given)

        shapes = tuple(
            tuple(size(formula, number, axis) for axis, formula in enumerate(formulas))
            for number, formulas in enumerate(item.shapes)
        )
        return Passed(item.argument, shapes, key, maker)

    def _maker(
        self, key: str | int, made: str | int, path: Sequence[str | int], layer: int
    ) -> tuple[str, int]:
        """Under which name layer `layer` is given something, and the last one that makes it."""
        wanted = str(self._evaluate(key, (*path, "key"), self._of_layer(layer)))
        for maker in reversed(range(layer)):
            given = self._of_layer(maker)
            if self._evaluate(made, (*path, "made"), given) and wanted == str(
                self._evaluate(key, (*path, "key"), given)
            ):
                return wanted, maker
        what = f"gives layer {layer} {wanted!r}, which no layer before it makes"
        raise self._file.error((*path, "made"), what, "a layer of that key")

    def _of_layer(self, layer: int) -> Mapping[str, Any]:
        """What names mean in a formula about a decoder layer."""
        return {"layer": layer, "kind": self._kinds[layer]}

    @cached_property
    def fusions(self) -> Sequence[Fusion]:
        """The modules that serving engines fuse, of the MTP head too."""
        fused = (
            (prefix + fused, [prefix + part for part in parts])
            for prefix in dict.fromkeys(self._layer_prefixes())
            for fused, parts in self._table.fusions.items()
        )
        # Where keys are values, the module is made of fewer.
        there = ((name, [p for p in parts if f"{p}.weight" in self.built]) for name, parts in fused)
        return tuple(Fusion(name, tuple(parts)) for name, parts in there if len(parts) > 1)

    def _layer_prefixes(self) -> Iterator[str]:
        """Of the decoder layers, and of those of an MTP head."""
        for index, item in enumerate(self._table.model):
            if not isinstance(item, Group) or item.part not in (Part.LAYERS, Part.MTP):
                continue
            if item.when is None or self._evaluate(item.when, ("model", index, "when")):
                yield from (prefix for _, prefix in self._members(item, ("model", index)))

    @cached_property
    def smoothing(self) -> Sequence[SmoothingMapping]:
        """What AWQ may smooth."""
        return tuple(
            SmoothingMapping(item.smooth, tuple(item.balance))
            for index, item in enumerate(self._table.smoothing)
            if item.when is None or self._evaluate(item.when, ("smoothing", index, "when"))
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
            return 16 * width * self._size("hidden_size", ("dimensions",), {})
        given = {"width": width}
        return int(self._evaluate(table[name], ("token_bytes", name), given))

    def attention_heads(self, kind: str) -> int:
        """See `Architecture.attention_heads`."""
        table = self._table.attention_heads
        name = kind if kind in table else "any"
        return self._count(table.get(name, "num_attention_heads"), ("attention_heads", name))

    # --- names --------------------------------------------------------------------------------

    def module_kind(self, name: str) -> str:
        """What tables call the module of tensor `name`: its path without layer numbers."""
        module = re.sub(r"\.(weight|scales|biases)$", "", name)
        kind = _NUMBERED.sub("", module)
        kind = kind.removeprefix(self._layers.prefix.partition("layers.")[0])
        kind = re.sub(r"\.(?:\d+|\*)\.", ".", kind)
        return f"mtp.{kind}" if module.startswith("mtp.layers.") else kind

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
        return name in self._rows and self._rows[name][1].offset

    def keeps_dtype(self, name: str) -> bool:
        """True for the tensors whose type libraries leave alone when they cast a model."""
        return name in self._rows and self._rows[name][1].wide

    @property
    def drafts(self) -> bool:
        """See `Architecture.drafts`."""
        return self._table.drafter is not None

    def draft_head(self, attention: str, tensors: Mapping[str, Any]) -> Any:
        """See `Architecture.draft_head`."""
        if self._table.drafter is None:
            raise NotImplementedError(f"{self.name} has no MTP head that could be run")
        return drafter(self._table.drafter, self.text_config, attention, tensors)
