"""Model cards: the hub's metadata and a page that tells a reader what this is and how to run it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.generation import generation_entries, sampling
from carnice_build.formats.measured import Measured, command_line, plain
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.models.base import Part
from carnice_build.recipe.schema import DATASET_FILES, CalibrationSpec, CardSpec, count_for
from carnice_build.tensors import STACK
from carnice_build.units import format_both

if TYPE_CHECKING:
    from carnice_build.formats.base import Format


CARD_NAME = "README.md"


@dataclass(frozen=True)
class Card:
    """What a format adds to a model card.

    `template` is the text of a Jinja template, which may extend `_torch.md.j2` of this package and
    sees the format's knobs as `knobs`; `library` and `tags` are the hub's metadata, `library` what
    loads the folder, for which `with_experts` stands where experts are quantized.
    """

    template: str = '{% extends "_torch.md.j2" %}'
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    with_experts: str | None = None


def own_template(package: str, name: str = "card.md.j2") -> str:
    """The file `name` of a format's package."""
    return files(package).joinpath(name).read_text("utf-8")


def render_card(
    card: Card, knobs: Format, variant: Variant, measured: Measured | None = None
) -> bytes:
    """README.md of the variant, with what was measured of it."""
    import jinja2
    import yaml

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("carnice_build.formats"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"plain": plain, "command_line": command_line, "size": format_both}
    environment.tests["match"] = lambda text, pattern: re.match(pattern, text) is not None
    front = yaml.safe_dump(_metadata(card, variant), sort_keys=False, allow_unicode=True)
    body = environment.from_string(card.template).render(
        _facts(variant),
        knobs=knobs,
        measured=measured,
        by_position=measured and any("by position" in line.what for line in measured.lines),
    )
    return f"---\n{front}---\n\n{body}".encode()


def published_as(card: CardSpec, variant: str) -> str:
    """What commands on a page call the folder."""
    return card.repo or f"path/to/{variant}"


def _base_model(variant: Variant) -> str:
    return variant.card.base_model or variant.sources[variant.body].spec.model


def _is_known(variant: Variant) -> bool:
    """Whether the base model has a name on the hub."""
    return not variant.sources[variant.body].local or bool(variant.card.base_model)


def _link(name: str, *, known: bool = True) -> str:
    """A model as a page names it: by a link, unless it is on this machine alone."""
    return f"[`{name}`](https://huggingface.co/{name})" if known else f"`{name}`"


def _base_models(variant: Variant) -> str | list[str]:
    """What the hub is told that the folder was made from: the body first; of one, its name."""
    names = [_base_model(variant)] if _is_known(variant) else []
    others = [variant.sources[parent.source] for parent in variant.parents[1:]]
    names += [source.spec.model for source in others if not source.local]
    distinct = list(dict.fromkeys(names))
    return distinct[0] if len(distinct) == 1 else distinct


def _parents(variant: Variant) -> Iterator[dict[str, str]]:
    for parent in variant.parents:
        source = variant.sources[parent.source]
        own = parent.source == variant.body
        name = _base_model(variant) if own else source.spec.model
        known = _is_known(variant) if own else not source.local
        yield {
            "parts": plain(parent.parts[:1].upper() + parent.parts[1:]),
            "link": _link(name, known=known) if known else "a local folder",
            "revision": "" if source.local else f"`{source.revision or source.spec.revision}`",
        }


def _metadata(card: Card, variant: Variant) -> dict[str, Any]:
    bits = {scheme.bits for scheme in variant.quantized.values()}
    width = [f"{bits.pop()}-bit"] if len(bits) == 1 else []
    names = _base_models(variant)
    base = {"base_model": names, "base_model_relation": "quantized"}
    return {
        "license": variant.card.license,
        **({"language": variant.card.language} if variant.card.language else {}),
        "library_name": (_experts(variant) and card.with_experts) or card.library,
        **(base if names else {}),
        "pipeline_tag": "text-generation",
        "inference": False,
        "tags": list(dict.fromkeys([*card.tags, *variant.card.tags, *width])),
    }


def _facts(variant: Variant) -> dict[str, Any]:
    base_model = _base_model(variant)
    known = _is_known(variant)
    link = _link(base_model, known=known)
    tower = any(fact.part is Part.TOWER for fact in variant.architecture.built.values())
    size = sum(shard.size for shard in variant.shards)
    source = variant.sources[variant.body]
    return {
        "title": variant.card.title or f"{base_model.rpartition('/')[2]}: {variant.name}",
        "variant": variant,
        "card": variant.card,
        "repo": published_as(variant.card, variant.name),
        "base_model": base_model,
        "base_link": link,
        "credited": link if known else "the model that it was made of",
        "stand_in": source.profile != "full" and not source.local,
        "profile": source.profile,
        "parents": list(_parents(variant)),
        "bits_per_weight": f"{variant.bits_per_weight:.2f}",
        "size": format_both(size),
        "widths": _widths(variant),
        "has_template": any("chat_template" in name for name in variant.copied),
        "may_think": any(b"enable_thinking" in content for content in variant.copied.values()),
        "sampling": _sampling(variant),
        "packaged_sampling": _numbers(sampling(generation_entries(variant.copied))),
        "mtp_dtypes": _dtypes(variant, Part.MTP),
        "has_tower": tower,
        "left_vision": tower and not _dtypes(variant, Part.TOWER),
        "calibration": variant.calibration and _calibration(variant.calibration, source.profile),
        "experts": _experts(variant),
    }


def _experts(variant: Variant) -> bool:
    """Whether experts are among what is quantized."""
    return any(STACK in module for module in variant.quantized)


def _sampling(variant: Variant) -> dict[str, str]:
    """The numbers that the recipe states, else the source's own generation_config.json."""
    stated = variant.card.sampling
    found = sampling(generation_entries(variant.copied)) if stated is None else stated
    return _numbers(found)


def _numbers(values: Mapping[Any, float]) -> dict[str, str]:
    return {name: f"{value:g}" for name, value in values.items()}


def _calibration(spec: CalibrationSpec, profile: str | None) -> dict[str, Any]:
    return {
        "dataset": spec.dataset,
        "subset": None if spec.dataset.endswith(DATASET_FILES) else spec.subset,
        "samples": count_for(spec.samples, profile),
        "length": count_for(spec.length, profile),
    }


def _dtypes(variant: Variant, part: Part) -> list[str]:
    """The types of a part's tensors that keep their names; none when the part was left out."""
    names = {fact.name for fact in variant.architecture.tensors.values() if fact.part is part}
    return sorted(
        {spec.dtype for shard in variant.shards for name, spec, _ in shard.tensors if name in names}
    )


def _widths(variant: Variant) -> list[tuple[Scheme, int]]:
    """Each scheme and its number of modules, widest first."""
    counts = Counter(variant.quantized.values())
    return sorted(counts.items(), key=lambda item: (-item[0].bits, -(item[0].group_size or 0)))
