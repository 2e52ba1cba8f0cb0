"""Model cards: the hub's metadata and a page that tells a reader what this is and how to run it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from carnice_build.checkpoint.generation import generation_entries, sampling
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.variant import Variant
from carnice_build.models.base import Part
from carnice_build.recipe.schema import CalibrationSpec, count_for
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


def render_card(card: Card, knobs: Format, variant: Variant) -> bytes:
    """README.md of the variant."""
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
    front = yaml.safe_dump(_metadata(card, variant), sort_keys=False, allow_unicode=True)
    body = environment.from_string(card.template).render(_facts(variant), knobs=knobs)
    return f"---\n{front}---\n\n{body}".encode()


def _base_model(variant: Variant) -> str:
    return variant.card.base_model or variant.sources[variant.body].spec.model


def _is_known(variant: Variant) -> bool:
    """Whether the base model has a name on the hub."""
    return not variant.sources[variant.body].local or bool(variant.card.base_model)


def _link(variant: Variant) -> str:
    """The base model as a page names it: by a link, unless it is on this machine alone."""
    name = _base_model(variant)
    if not _is_known(variant):
        return f"`{name}`"
    return f"[`{name}`](https://huggingface.co/{name})"


def _metadata(card: Card, variant: Variant) -> dict[str, Any]:
    bits = {scheme.bits for scheme in variant.quantized.values()}
    width = [f"{bits.pop()}-bit"] if len(bits) == 1 else []
    base = {"base_model": _base_model(variant), "base_model_relation": "quantized"}
    return {
        "license": variant.card.license,
        **({"language": variant.card.language} if variant.card.language else {}),
        "library_name": (_experts(variant) and card.with_experts) or card.library,
        **(base if _is_known(variant) else {}),
        "pipeline_tag": "text-generation",
        "inference": False,
        "tags": list(dict.fromkeys([*card.tags, *variant.card.tags, *width])),
    }


def _facts(variant: Variant) -> dict[str, Any]:
    base_model = _base_model(variant)
    link, known = _link(variant), _is_known(variant)
    tower = any(fact.part is Part.TOWER for fact in variant.architecture.built.values())
    size = sum(shard.size for shard in variant.shards)
    source = variant.sources[variant.body]
    return {
        "title": variant.card.title or f"{base_model.rpartition('/')[2]}: {variant.name}",
        "variant": variant,
        "card": variant.card,
        "repo": variant.card.repo or f"path/to/{variant.name}",
        "base_model": base_model,
        "base_link": link,
        "credited": link if known else "the model that it was made of",
        "stand_in": source.profile != "full" and not source.local,
        "profile": source.profile,
        "origin": "a local folder"
        if source.local
        else f"{link}, revision `{source.revision or source.spec.revision}`",
        "bits_per_weight": f"{variant.bits_per_weight:.2f}",
        "size": format_both(size),
        "widths": _widths(variant),
        "has_template": any("chat_template" in name for name in variant.copied),
        "may_think": any(b"enable_thinking" in content for content in variant.copied.values()),
        "sampling": _sampling(variant),
        "mtp_dtypes": _dtypes(variant, Part.MTP),
        "has_tower": tower,
        "left_vision": tower and not _dtypes(variant, Part.TOWER),
        "grafts": [item for item in variant.sources.items() if item[0] != variant.body],
        "calibration": variant.calibration and _calibration(variant.calibration, source.profile),
        "serves": bool(variant.serve),
        "experts": _experts(variant),
    }


def _experts(variant: Variant) -> bool:
    """Whether experts are among what is quantized."""
    return any(STACK in module for module in variant.quantized)


def _sampling(variant: Variant) -> dict[str, str]:
    """The numbers that the recipe states, else the source's own generation_config.json."""
    stated = variant.card.sampling
    found = sampling(generation_entries(variant.copied)) if stated is None else stated
    return {name: f"{value:g}" for name, value in found.items()}


def _calibration(spec: CalibrationSpec, profile: str | None) -> dict[str, Any]:
    return {
        "dataset": spec.dataset,
        "subset": spec.subset,
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
