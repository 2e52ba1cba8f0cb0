"""generation_config.json: how text is generated where nobody says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carnice_build.checkpoint.json import json_object, to_json

NAME = "generation_config.json"
_ENDS = "eos_token_id"
MOST = 10**6
"""No number that says how to sample is larger; a vocabulary may have as many tokens."""


def generation_entries(files: Mapping[str, bytes], where: str = "") -> dict[str, Any]:
    """The entries of the file among the small `files`, none when it is not there.

    CheckpointError, which names the folder `where`, when it is not a JSON object.
    """
    if NAME not in files:
        return {}
    return json_object(f"{where}/{NAME}" if where else NAME, files[NAME])


def sampling(entries: Mapping[str, Any]) -> dict[str, float]:
    """How the `entries` of the file sample; empty where they choose the likeliest token."""
    if entries.get("do_sample") is False:
        return {}
    return {
        name: entries[name]
        for name in ("temperature", "top_p", "top_k", "min_p")
        if type(entries.get(name)) in (int, float) and 0 <= entries[name] <= MOST
    }


def with_generation(files: Mapping[str, bytes], where: str) -> Mapping[str, bytes]:
    """`files` with a generation_config.json that can be read and states no null end of a text.

    A null would hide from its readers the end that config.json states.
    """
    entries = generation_entries(files, where)
    if _ENDS not in entries or entries[_ENDS] is not None:
        return files
    del entries[_ENDS]
    return {**files, NAME: to_json(entries)}
