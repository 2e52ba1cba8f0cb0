"""Where a model folder keeps its chat template."""

from __future__ import annotations

from collections.abc import Mapping

from carnice_build.checkpoint.assets import is_named_template
from carnice_build.checkpoint.json import json_object, to_json
from carnice_build.errors import CheckpointError

TEMPLATE_NAME = "chat_template.jinja"
_JSON_NAMES = ("chat_template.json", "tokenizer_config.json")


def template_files(files: Mapping[str, bytes]) -> dict[str, str]:
    """Every copy of the chat template by the file that holds it, first the one that counts.

    `files` are the small files of a folder.
    transformers takes chat_template.jinja before the entry `chat_template` of a JSON file; other
    programs may look at either, so both count as copies.
    CheckpointError when a copy cannot be read, or is a table of named templates.
    """
    found = {}
    if TEMPLATE_NAME in files:
        found[TEMPLATE_NAME] = _text(TEMPLATE_NAME, files[TEMPLATE_NAME])
    for name in _JSON_NAMES:
        template = json_object(name, files[name]).get("chat_template") if name in files else None
        if isinstance(template, str):
            found[name] = template
        elif template is not None:
            raise CheckpointError("has several chat templates", where=name, expected="one text")
    return found


def named_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """The templates beside the default one that can write tool calls, by their files.

    transformers takes the one named `tool_use` instead of the default one as soon as there are
    tools.  CheckpointError when one cannot be read.
    """
    found = {name: _text(name, files[name]) for name in files if is_named_template(name)}
    return {name: template for name, template in found.items() if "tool_calls" in template}


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError("is not UTF-8", where=name) from None


def with_template(name: str, content: bytes, template: str) -> bytes:
    """File `name` with `template` in place of the one it holds."""
    if name not in _JSON_NAMES:
        return template.encode()
    return to_json({**json_object(name, content), "chat_template": template})
