"""generation_config.json: how text is generated where nobody says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carnice_build.checkpoint.json import parse_json, to_json
from carnice_build.errors import CheckpointError

NAME = "generation_config.json"
_ENDS = "eos_token_id"


def generation_entries(files: Mapping[str, bytes], where: str = "") -> dict[str, Any]:
    """The entries of the file among the small `files`, none when it is not there.

    CheckpointError, which names the folder `where`, when it is not a JSON object.
    """
    content = files.get(NAME)
    if content is None:
        return {}
    try:
        value = parse_json(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=f"{where}/{NAME}" if where else NAME)
    return value


def with_generation(files: Mapping[str, bytes], where: str) -> Mapping[str, bytes]:
    """`files` with a generation_config.json that can be read and states no null end of a text.

    A null would hide from its readers the end that config.json states.
    """
    entries = generation_entries(files, where)
    if _ENDS not in entries or entries[_ENDS] is not None:
        return files
    del entries[_ENDS]
    return {**files, NAME: to_json(entries)}
