"""A derived family table as YAML, with comments where a person has to look."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

from carnice_build.models.base import Part, Role
from carnice_build.models.derive import Derivation, Owner, Place

_PLAIN = re.compile(r"[\w.*/+()<>=!%\- ]+")
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_FUSED = ("qkv_proj", "gate_up_proj", "w13")


@dataclass(frozen=True)
class Facts:
    """What a table needs beside what follows from samples."""

    model_type: str
    version: str
    text_section: str | None
    text_type: str | None
    towers: tuple[str, ...]
    ties: Mapping[str, str]
    modules: Mapping[str, str]
    tied: bool
    defaults: Mapping[str, str]
    unloaded: tuple[str, ...]


def table_text(derivation: Derivation, facts: Facts) -> str:
    """The table of a family."""
    return "\n".join(_Writer(derivation, facts).lines()) + "\n"


NEVER_WRITTEN = (
    "smoothing",
    "passed",
    "narrow",
    "eager",
    "mtp_entries",
    "drafter",
    "mlx_drafter",
    "reader",
    "spellings",
    "token_bytes",
    "attention_heads",
)
"""Entries of a table that transformers' models do not tell."""


class _Writer:
    def __init__(self, derivation: Derivation, facts: Facts) -> None:
        self._derivation = derivation
        self._facts = facts
        self._modules: dict[str, None] = {}

    def lines(self) -> Iterator[str]:
        facts, derivation = self._facts, self._derivation
        # What they name decides which defaults are told, so they come first.
        model, blocks = list(self._model()), list(self._blocks())
        kinds = derivation.kinds
        yield from self._header()
        yield ""
        if facts.text_section:
            yield f"text: {{section: {facts.text_section}, type: {facts.text_type}}}"
        if facts.towers:
            yield f"towers: [{', '.join(facts.towers)}]"
        if facts.ties:
            pairs = (f"{_quoted(name)}: {_quoted(other)}" for name, other in facts.ties.items())
            yield f"ties: {{{', '.join(pairs)}}}"
        if facts.tied:
            yield "tied: true"
        if facts.modules:
            modules = facts.modules.items()
            yield from ("", "modules:", *(f"  {saved}: {here}" for saved, here in modules))
        yield from self._defaults()
        if kinds is not None:
            yield from ("", f"kind: {kinds}[layer]")
        yield from ("", "model:", *model, "", "blocks:", *blocks)
        yield from self._engines()

    def _header(self) -> Iterator[str]:
        facts, derivation = self._facts, self._derivation
        yield f"# Written by `carnice family {facts.model_type}` from transformers {facts.version}."
        yield "# Look at what follows, and at what is not known:"
        for what in dict.fromkeys(derivation.unknown):
            yield f"# not known: {what}"
        if derivation.kinds is not None:
            yield f"# not known: the kinds of layers where a config has no {derivation.kinds}"
        for pattern in facts.unloaded:
            yield f"# not known: what checkpoints hold as {pattern}, perhaps an MTP head"
        yield "# not known: what follows from entries that transformers' class does not name"
        yield "# not known: how else checkpoints are spelled (`fused`, `spellings`)"
        yield "# not known: where AWQ may smooth (`smoothing`)"
        yield "# not known: what is too narrow for kernels (`narrow`)"
        yield f"about: {facts.model_type}, from transformers {facts.version}."

    def _defaults(self) -> Iterator[str]:
        used = self._derivation.used | {"max_position_embeddings"}
        found = {name: text for name, text in self._facts.defaults.items() if name in used}
        # A default may follow from an entry that nothing else names.
        for text in list(found.values()):
            for name in re.findall(r"[A-Za-z_][\w.]*", text):
                if name in self._facts.defaults:
                    found.setdefault(name, self._facts.defaults[name])
        if found:
            yield from ("", "defaults:")
            yield from (f"  {name}: {_quoted(text)}" for name, text in found.items())

    # --- the model --------------------------------------------------------------------------------

    def _model(self) -> Iterator[str]:
        """Rows and groups in the order in which a model reads them, towers last."""
        single = [place for place in self._derivation.places if not place.prefix]
        parts = {place: _part(self._owner(place)) for place in single}
        prefixes = dict.fromkeys(place.prefix for place in self._derivation.places)
        others = [prefix for prefix in prefixes if prefix not in ("", self._derivation.decoder)]
        for part in (Part.EMBED, Part.LAYERS, Part.BODY, Part.HEAD, Part.TOWER):
            if part is Part.LAYERS:
                yield self._group(self._derivation.decoder)
            for place in single:
                if parts[place] is part:
                    yield from self._row(place, "  - ", grouped=False)
        yield from map(self._group, others)

    def _group(self, prefix: str) -> str:
        part = Part.LAYERS if prefix == self._derivation.decoder else Part.TOWER
        fields = [f"repeat: {_quoted(self._derivation.count(prefix))}"]
        if part is Part.TOWER and (tower := self._tower(prefix)):
            fields.append(f"when: {tower}")
        fields += [f"prefix: '{prefix}'", f"rows: {self._block(prefix)}", f"part: {part}"]
        return f"  - {{{', '.join(fields)}}}"

    def _block(self, prefix: str) -> str:
        if prefix == self._derivation.decoder:
            return "layer"
        words = [word for word in re.split(r"\W+", prefix) if word and word != "model"]
        return "_".join(words) or "more"

    def _tower(self, name: str) -> str | None:
        towers = self._facts.towers
        named = (tower for tower in towers if tower.removesuffix("_config") in name)
        return next(named, towers[0] if towers else None)

    def _blocks(self) -> Iterator[str]:
        for prefix in dict.fromkeys(place.prefix for place in self._derivation.places):
            if not prefix:
                continue
            yield f"  {self._block(prefix)}:"
            for place in self._derivation.places:
                if place.prefix == prefix:
                    yield from self._row(place, "    - ", grouped=True)

    # --- rows -------------------------------------------------------------------------------------

    def _owner(self, place: Place) -> Owner:
        found = self._derivation.owners.get(place)
        if found is not None:
            return found
        # One that only other samples have: by its name, and by its neighbours.
        linear = place.rest.endswith(".weight")
        role = Role.BIAS if place.rest.endswith("bias") else Role.LINEAR if linear else Role.STATE
        nearest = max(self._derivation.owners, key=lambda other: _shared(other, place))
        part = self._derivation.owners[nearest].part
        return Owner("", part, Role.VISION if part is Part.TOWER and not linear else role)

    def _row(self, place: Place, start: str, *, grouped: bool) -> Iterator[str]:
        owner = self._owner(place)
        shape = next(rows[place] for rows in self._derivation.rows if place in rows)
        axes = len(next(iter(shape.values())))
        if axes == 3 and owner.role is Role.LINEAR and not place.rest.endswith(".weight"):
            yield from self._stacks(place, owner, start)
            return
        sizes = [self._derivation.size(place, axis) for axis in range(axes)]
        fields = [f"name: {_quoted(place.rest)}", *self._common(place, owner, grouped=grouped)]
        fields.append(f"shape: [{', '.join(map(_quoted, sizes))}]")
        yield f"{start}{{{', '.join(fields)}}}"
        self._note(place, owner)

    def _stacks(self, place: Place, owner: Owner, start: str) -> Iterator[str]:
        """Experts in one tensor, as the stacks that it holds."""
        holder, _, name = place.rest.rpartition(".")
        parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        for index, part in enumerate(parts):
            sizes = [
                self._derivation.size(place, axis, len(parts) if axis == 1 else 1)
                for axis in range(3)
            ]
            fields = [f"name: {holder}.*.{part}.weight", *self._common(place, owner, grouped=True)]
            fields.append(f"shape: [{', '.join(map(_quoted, sizes))}]")
            which = f", part: {index}, of: {len(parts)}" if len(parts) > 1 else ""
            fields.append(f"fused: {{name: {place.rest}{which}}}")
            yield f"{start}{{{', '.join(fields)}}}"
            self._modules[f"{holder}.*.{part}"] = None

    def _common(self, place: Place, owner: Owner, *, grouped: bool) -> Iterator[str]:
        if not grouped:
            yield f"part: {_part(owner)}"
        conditions = [self._derivation.when(place)]
        if not grouped and _part(owner) is Part.TOWER:
            conditions.insert(0, self._tower(place.rest))
        if told := " and ".join(text for text in conditions if text):
            yield f"when: {_quoted(told)}"
        yield f"role: {owner.role}"
        if owner.offset:
            yield "offset: true"
        if owner.wide:
            yield "wide: true"

    def _note(self, place: Place, owner: Owner) -> None:
        if place.prefix == self._derivation.decoder and owner.role is Role.LINEAR:
            self._modules[place.rest.removesuffix(".weight")] = None

    # --- engines ----------------------------------------------------------------------------------

    def _engines(self) -> Iterator[str]:
        groups = list(_together(self._modules))
        yield from ("", "# A guess by names:", "inputs:" if groups else "inputs: []")
        yield from (f"  - [{', '.join(modules)}]" for _, modules in groups)
        yield from ("", "# A guess by names:", "fusions:" if groups else "fusions: {}")
        yield from (f"  {fused}: [{', '.join(modules)}]" for fused, modules in groups)
        entries = self._derivation.base.entries
        if "num_key_value_heads" in entries and "head_dim" in entries:
            yield from ("", "kv: {heads: num_key_value_heads, head_dim: head_dim}")


def _shared(one: Place, two: Place) -> int:
    """How many words the names of two rows have in common, from the first on."""
    words = [f"{place.prefix}{place.rest}".split(".") for place in (one, two)]
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False))
    return sum(1 for _ in pairs)


def _part(owner: Owner) -> Part:
    """Of what is in no group."""
    if owner.part is Part.LAYERS:
        return Part.EMBED if owner.role is Role.EMBEDDING else Part.BODY
    return owner.part


def _together(modules: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = dict.fromkeys(modules)
    for module in known:
        holder, _, name = module.rpartition(".")
        start = f"{holder}." if holder else ""
        for names, fused in zip(_TOGETHER, _FUSED, strict=True):
            found = tuple(f"{start}{other}" for other in names)
            if name == names[0] and all(other in known for other in found):
                yield f"{start}{fused}", found


def _quoted(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
