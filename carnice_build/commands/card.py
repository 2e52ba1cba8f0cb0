"""The card of a built folder, renewed in place when figures of the folder were measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from carnice_build.commands.build import describe
from carnice_build.commands.findings import figures_for_card
from carnice_build.errors import StoreError
from carnice_build.formats.card import CARD_NAME
from carnice_build.formats.folder import BUILD_NAME, read_build
from carnice_build.formats.variant import Shard, Variant
from carnice_build.package.files import differs_in_card_alone, render_files
from carnice_build.package.folder import replace_card
from carnice_build.planning.planner import VariantPlan
from carnice_build.plugins import failures_blamed


def renew_card(variant: VariantPlan, folder: Path, cache: Path) -> bool:
    """Have the folder's card tell what the cache has of its content; True when it was written.

    Written are the bytes that a build would write, so that a build has nothing to do.
    A folder that the recipe would make otherwise in more than its card is left alone, and so is
    one that cannot be written to.
    """
    record = read_build(folder)
    described = _as_built(variant, record)
    if described is None:
        return False
    with failures_blamed(variant.format):
        known = partial(figures_for_card, cache, variant.name)
        rendered = render_files(described, variant.format, known)
    if not differs_in_card_alone(rendered, record):
        return False
    files = rendered.files
    try:
        return replace_card(folder, record["key"], files[CARD_NAME], files[BUILD_NAME])
    except (OSError, StoreError):
        return False


def _as_built(variant: VariantPlan, record: Mapping[str, Any]) -> Variant | None:
    """The variant with the digests of its build.json; None where that is of another form."""
    try:
        shards = [_shard(variant, index, record) for index in range(len(variant.packs))]
        return describe(variant, shards, dict(record["figures"]))
    except (KeyError, TypeError, ValueError):
        return None


def _shard(variant: VariantPlan, index: int, record: Mapping[str, Any]) -> Shard:
    layout = variant.packs[index]
    name = layout.name
    tensors = [
        (slot.tensor.name, slot.tensor.ref.spec, record["tensors"][slot.tensor.name]["digest"])
        for slot in layout.slots
    ]
    return Shard(name, record["files"][name]["pack"], Path(name), layout.size, tensors)
