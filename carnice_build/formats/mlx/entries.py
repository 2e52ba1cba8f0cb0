"""Entries of config.json that MLX looks for under the names they had before transformers 5.

transformers 5 saves `rope_theta` and what scales it inside `rope_parameters`, where most of
mlx-lm's models do not look: some refuse such a config, and others run the model with a theta that
is not its own.  So we state them in both places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carnice_build.errors import PlanError
from carnice_build.formats.mlx.table import Table
from carnice_build.formats.mlx.target import Target

_TEXT = "text_config"


def older_entries(
    config: Mapping[str, Any], table: Table | None, target: Target = Target.MLX_LM
) -> dict[str, Any]:
    """What config.json lacks for a library, nested as it is to stand there.

    PlanError for an entry or a section that the library needs, and that is nowhere.
    """
    text = config.get(_TEXT)
    section = text if isinstance(text, dict) else config
    found = {} if table is not None and table.rope_parameters else _rope(section)
    top: dict[str, Any] = {}
    if table is not None:
        if table.windows:
            found = _rope_of_windows(section)
        top = {name: section[name] for name in table.top if name in section and name not in config}
        for name, other in table.entries.items():
            if other in section:
                found[name] = section[other]
        for name in table.needs:
            if name not in section and name not in found:
                raise PlanError(f"config.json has no entry {name}, which {target} needs")
        for name in table.sections:
            if not config.get(name):
                raise PlanError(f"config.json has no section {name}, which {target} needs")
    missing = {name: value for name, value in found.items() if name not in section}
    if section is config:
        return missing
    return {**top, _TEXT: missing} if missing else top


def _rope(section: Mapping[str, Any]) -> dict[str, Any]:
    rope = section.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "rope_theta" in section:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    found = {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found


def _rope_of_windows(section: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model with layers of two kinds, each with a theta of its own."""
    rope = section.get("rope_parameters")
    if not isinstance(rope, dict) or not {"full_attention", "sliding_attention"} <= rope.keys():
        return {}
    full = _rope({"rope_parameters": rope["full_attention"]})
    window = _rope({"rope_parameters": rope["sliding_attention"]})
    return {**full, "rope_local_base_freq": window.get("rope_theta")} if window else full


def with_entries(config: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with what `older_entries` found."""
    text = {key: {**config[key], **value} for key, value in entries.items() if key == _TEXT}
    return {**config, **entries, **text}
