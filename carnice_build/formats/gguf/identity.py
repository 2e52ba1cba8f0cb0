"""What a GGUF file says of itself under `general.`: its name, what it was made of, its licence.

The parts of a name are told apart as gguf-py does it (`get_model_id_components`): in
`Carnice-V2-27b-Instruct` a base name, a version, a size and what it was tuned for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.formats.gguf.parameters import typed

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(
    r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE
)
_TUNED = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_AS_IT_IS = re.compile(r"v\d+(?:\.\d+)*|\d.*")
_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class NameParts:
    """What a model's name tells."""

    full: str
    organization: str | None = None
    base: str | None = None
    tuned: str | None = None
    version: str | None = None
    size: str | None = None


def name_parts(name: str, parameters: int = 0) -> NameParts:
    """The parts of `name`, perhaps with an owner before a slash.

    A size far from the number of `parameters`, if that is not 0, is none: a context length, say.
    """
    if " " in name:
        return NameParts(name)
    owner, slash, full = name.partition("/")
    if not slash:
        owner, full = "", name
    organization = owner if owner and not owner.startswith(".") else None
    parts = [_Part(text) for text in full.split("-") if text]
    for place, part in enumerate(parts):
        part.annotate(first=place == 0, parameters=parameters)
    sizes = [part for part in parts if "size" in part.kinds]
    if any(character.isdecimal() for part in sizes for character in part.text):
        for part in sizes:
            if part.text.isalpha():
                part.kinds.discard("size")
    _find_base(parts)

    def joined(kind: str, *, without: str = "") -> str | None:
        texts = [p.text for p in parts if kind in p.kinds and without not in p.kinds]
        return "-".join(dict.fromkeys(texts) if kind == "size" else texts) or None

    size, tuned, version = joined("size"), joined("tuned"), joined("version", without="base")
    base = joined("base") if size or tuned or version else None
    return NameParts(full, organization, base, tuned, version, size)


@dataclass
class _Part:
    text: str
    kinds: set[str] = field(default_factory=set)

    def annotate(self, *, first: bool, parameters: int) -> None:
        """Say what the part may be by itself."""
        if _VERSION.fullmatch(self.text):
            self.kinds.add("version")
        elif _TYPE.fullmatch(self.text):
            self.kinds.add("type")
            self.text = self.text.upper()
        elif not first and _SIZE.fullmatch(self.text):
            self._size(parameters)
        elif not first and _TUNED.fullmatch(self.text):
            self.kinds.add("tuned")

    def _size(self, parameters: int) -> None:
        text = self.text.replace("_", ".")
        if text[-1].isdecimal():
            # As in bloom-7b1.
            text = f"{text[:-2]}.{text[-1]}{text[-2]}"
        if len(text) > 1 and text[-2].isdecimal() and text[-1] in "kmbt":
            text = text[:-1] + text[-1].upper()
        try:
            said = float(text[:-1]) * 1000 ** " KMBT".find(text[-1])
        except ValueError:
            said = parameters
        if parameters and abs(said - parameters) > 7 * parameters // 8:
            self.kinds.add("tuned")
            text = text[:-1] + text[-1].lower()
        else:
            self.kinds.add("size")
        self.text = text


def _find_base(parts: Sequence[_Part]) -> None:
    """The base name is what stands first; what nothing is known of behind it tells a tuning."""
    start = True
    for part in parts:
        if start and ((not part.kinds and part.text[0].isalpha()) or "version" in part.kinds):
            part.kinds.add("base")
            continue
        start = False
        if not part.kinds:
            part.kinds.add("tuned")
    for part in reversed(parts):
        if "base" not in part.kinds or len(part.kinds) == 1:
            break
        part.kinds.discard("base")


def title(name: str) -> str:
    """A name as a title: `qwen3-v2-8b` as `Qwen3 v2 8b`."""
    words = name.strip().replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not _AS_IT_IS.fullmatch(word) else word for word in words
    )


def size_label(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """How large a model of such tensors is, as in `27B` or `256x2.3B`; shapes as files have them.

    Of experts, with how many there are of a tensor, one counts.
    """
    shared = each = counted = stacks = 0
    for name, shape in shapes.items():
        if "_exps." in name and len(shape) >= 3:
            experts = shape[1 if ".bias" in name else 2]
            each += prod(shape) // experts
            counted, stacks = counted + experts, stacks + 1
        else:
            shared += prod(shape)
    if not shared + each:
        return None
    experts = counted // stacks if stacks else 0
    return f"{experts}x{_rounded(shared + each)}" if experts else _rounded(shared)


def parameter_count(shapes: Mapping[str, Sequence[int]]) -> int:
    """Numbers that the tensors hold."""
    return sum(prod(shape) for shape in shapes.values())


def _rounded(count: int) -> str:
    scale, suffix = next(
        (found for found in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M")) if count * found[0] > 1),
        (1e-3, "K"),
    )
    scaled = count * scale
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{suffix}"


_SAMPLING = (
    ("sequence", ("sequence",), "str"),
    ("top_k", ("top_k",), "i32"),
    ("top_p", ("top_p",), "f32"),
    ("min_p", ("min_p",), "f32"),
    ("xtc_probability", ("xtc_probability",), "f32"),
    ("xtc_threshold", ("xtc_threshold",), "f32"),
    ("temp", ("temperature",), "f32"),
    ("penalty_last_n", ("penalty_last_n",), "i32"),
    ("penalty_repeat", ("penalty_repeat", "repetition_penalty"), "f32"),
    ("mirostat", ("mirostat",), "i32"),
    ("mirostat_tau", ("mirostat_tau",), "f32"),
    ("mirostat_eta", ("mirostat_eta",), "f32"),
)
"""Keys behind `general.sampling.`, the entries of generation_config.json, and their kinds."""

_LICENCES = (
    ("general.license", "license"),
    ("general.license.name", "license_name"),
    ("general.license.link", "license_link"),
)


def general(
    kind: str,
    name: str,
    shapes: Mapping[str, Sequence[int]],
    generation: Mapping[str, Any],
    card: Mapping[str, Any],
) -> dict[str, Value]:
    """What stands under `general.` before the parameters, but for the architecture.

    `kind` is `model` or `mmproj`; `generation` are the entries of generation_config.json, `card`
    those at the head of a model card; `shapes` are those of the tensors of the file.
    CheckpointError for an entry that is of another kind.
    """
    parts = name_parts(name, parameter_count(shapes))
    found = {"general.type": Value("str", kind)}
    for key, entries, of in _SAMPLING:
        value = next((generation[entry] for entry in entries if entry in generation), None)
        if value is not None:
            where = f"generation_config.json: {entries[0]}"
            found[f"general.sampling.{key}"] = Value(of, typed(value, of, where))
    texts = {
        "general.name": title(parts.full),
        "general.version": parts.version,
        "general.organization": parts.organization and title(parts.organization),
        "general.finetune": parts.tuned,
        "general.basename": parts.base,
        "general.size_label": parts.size or size_label(shapes),
    }
    for key, entry in _LICENCES:
        said = card.get(entry)
        text = ",".join(map(str, said)) if isinstance(said, list) else said
        if text is not None:
            texts[key] = typed(text, "str", f"README.md: {entry}")
    found |= {key: Value("str", text) for key, text in texts.items() if text is not None}
    return {**found, **_made_of(card)}


def _made_of(card: Mapping[str, Any]) -> dict[str, Value]:
    """Base models and datasets, tags and languages."""
    found: dict[str, Value] = {}
    for key, entry in (("base_model", "base_model"), ("dataset", "datasets")):
        if (names := _texts(card.get(entry))) is None:
            continue
        found[f"general.{key}.count"] = Value("u32", len(names))
        for number, name in enumerate(names):
            for part, text in _hub_entry(name).items():
                found[f"general.{key}.{number}.{part}"] = Value("str", text)
    for key, entries in (
        ("tags", ("tags", "pipeline_tag")),
        ("languages", ("languages", "language")),
    ):
        lists = [texts for entry in entries if (texts := _texts(card.get(entry))) is not None]
        if lists:
            found[f"general.{key}"] = Value("[str]", [text for texts in lists for text in texts])
    return found


def _texts(value: Any) -> list[str] | None:
    """One or several texts as a list, None for nothing."""
    if value is None:
        return None
    items: Iterable[Any] = value if isinstance(value, list) else [value]
    return [str(item) for item in items]


def _hub_entry(name: str) -> Mapping[str, str]:
    """What a name on the hub, or an address, tells of a model or a dataset."""
    address = name.startswith(("http://", "https://", "ssh://"))
    if address:
        on_hub = re.fullmatch(r"https?://huggingface.co/([^/]+/[^/]+)", name)
        if on_hub is None:
            return {"repo_url": name}
    parts = name_parts(on_hub[1] if address and on_hub else name)
    found = {"name": title(parts.full)}
    if parts.version:
        found["version"] = parts.version
    if parts.organization:
        found["organization"] = title(parts.organization)
        found["repo_url"] = name if address else f"{_HUB}{parts.organization}/{parts.full}"
    return found
