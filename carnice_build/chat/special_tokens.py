"""The special tokens of a tokenizer, as a chat template sees them.

The rules are those of `special_tokens_map` in transformers 5.17, which `apply_chat_template` hands
to the template, for a folder with a tokenizer.json:

- tokenizer_config.json states the tokens of `NAMES` and, under any other name that ends in
  `_token` or in a table `extra_special_tokens`, those of one model alone;
- special_tokens_map.json is read after it, and only beside a config without
  `added_tokens_decoder`;
- a token is a string or an object with its `content`; null means that there is none, and a name
  that stands nowhere has the default of the tokenizer's class.

Lists, as `additional_special_tokens` mostly is, have no names and are not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carnice_build.checkpoint.json import json_object
from carnice_build.errors import CheckpointError
from carnice_build.models.tokenizers import SPECIAL_TOKENS

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""What every tokenizer may have."""

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_EXTRA = "extra_special_tokens"


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Each token that is defined, by the name that a template calls it.

    `files` are the small files of a folder.
    CheckpointError when one of them cannot be read, or says of a token what is none.
    """
    config = _read(files, _CONFIG)
    later = {} if "added_tokens_decoder" in config else _read(files, _MAP)
    named = {**_class_defaults(config), **config, **later}
    found = {name: value for name, value in named.items() if name in NAMES or _is_own(name, value)}
    found |= _own_tokens(config) | _table(later, _EXTRA)
    tokens = {name: _content(name, value) for name, value in found.items()}
    return {name: token for name, token in tokens.items() if token is not None}


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return json_object(name, files[name]) if name in files else {}


def _class_defaults(config: Mapping[str, Any]) -> Mapping[str, str]:
    return SPECIAL_TOKENS.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {})


def _own_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of one model alone that the config names; what saving them left is a copy."""
    single = {name: text for name, text in config.items() if _is_own(name, text, str)}
    extra = _EXTRA if _EXTRA in config else "additional_special_tokens"
    return single | _table(config, extra) or _table(config, "model_specific_special_tokens")


def _is_own(name: str, value: object, kind: type = object) -> bool:
    token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    return token and isinstance(value, kind) and name.endswith("_token") and name not in NAMES


def _table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return config[key] if isinstance(config.get(key), dict) else {}


def _content(name: str, value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if value is None or isinstance(content, str):
        return content
    raise CheckpointError(
        f"says of {name} what is no token", where=_CONFIG, expected="a string, or its `content`"
    )
