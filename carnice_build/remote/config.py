"""Which remote, whose records are believed, with which key to sign: `carnice.toml` and the rest.

The file lies beside the folder of recipes:

    [remote]
    url = "s3://bucket/path"
    push = false               # whether builds push what they made
    key = "keys/mine.pem"      # the private key, from where the file lies

    [trust]
    keys = ["ed25519:... name"]

    [rates]
    gpu_forward = 2e14         # what machines do in a second, for `carnice plan --nodes`
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from carnice_build.errors import StoreError, nearest
from carnice_build.rates import Rates
from carnice_build.remote.signing import PUBLIC_KEY
from carnice_build.store.files import open_regular, write_atomically

CONFIG = "carnice.toml"
URL_VARIABLE = "CARNICE_REMOTE"
KEY_VARIABLE = "CARNICE_KEY"

_MOST = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


TrustedKey = Annotated[str, Field(pattern=rf"^{PUBLIC_KEY.pattern}( [ -~]{{1,100}})?$")]


class _RemoteSection(_Strict):
    url: str | None = None
    push: bool = False
    key: str | None = None


class _TrustSection(_Strict):
    keys: list[TrustedKey] = []


class _File(_Strict):
    remote: _RemoteSection = _RemoteSection()
    trust: _TrustSection = _TrustSection()
    rates: Rates = Rates()


class RemoteConfig(_Strict):
    """What is configured; without a `url` there is no remote.

    `trusted` maps public keys to what people call them.
    """

    url: str | None
    push: bool
    key: Path
    trusted: dict[str, str]


def read_config(recipes: Path, url: str | None) -> RemoteConfig:
    """What the file beside `recipes` and the environment say, over which goes `url`.

    An empty URL means no remote.  StoreError for a file that is not valid.
    """
    path = config_path(recipes)
    found = _read(path)
    if url is None:
        url = os.environ.get(URL_VARIABLE, found.remote.url)
    trusted = dict(item.partition(" ")[::2] for item in found.trust.keys)
    return RemoteConfig(
        url=url or None,
        push=found.remote.push,
        key=_key_path(path, found.remote.key),
        trusted=trusted,
    )


def read_rates(recipes: Path) -> Rates:
    """What the file beside `recipes` says that machines do in a second, or what was measured."""
    return _read(config_path(recipes)).rates


def config_path(recipes: Path) -> Path:
    """Where the file is that goes with a folder of recipes."""
    return recipes.parent / CONFIG


def _key_path(config: Path, named: str | None) -> Path:
    if named is not None:
        return config.parent / Path(named).expanduser()
    if os.environ.get(KEY_VARIABLE):
        return Path(os.environ[KEY_VARIABLE])
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "carnice-build" / "key.pem"


def trust(recipes: Path, key: str, name: str) -> Path:
    """Add a public key to the trusted ones in the file beside `recipes`; returns its path."""
    path = config_path(recipes)
    entry = f"{key} {name}".strip()
    if not re.fullmatch(rf"{PUBLIC_KEY.pattern}( [ -~]{{1,100}})?", entry) or '"' in entry:
        raise StoreError(
            f"{entry!r} is no public key and name",
            expected="ed25519:... as `carnice cache keys list` shows it, and a plain name",
        )
    found = _read(path)
    if any(item.partition(" ")[0] == key for item in found.trust.keys):
        return path
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    quoted = entry.replace("\\", "\\\\")
    if "[trust]" not in text:
        text += f'{chr(10) if text else ""}[trust]\nkeys = [\n  "{quoted}",\n]\n'
    else:
        text = re.sub(
            r"^(\s*keys\s*=\s*\[)", lambda m: f'{m[1]}\n  "{quoted}",', text, count=1, flags=re.M
        )
    if not any(item.partition(" ")[0] == key for item in _parse(path, text).trust.keys):
        raise StoreError(
            "cannot add the key to this file",
            where=str(path),
            expected=f'"{entry}" in keys, by hand',
        )
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise StoreError(f"cannot be written: {error.strerror}", where=str(path)) from None
    return path


def _read(path: Path) -> _File:
    if not os.path.lexists(path):
        return _File()
    try:
        with open_regular(path) as file:
            content = file.read(_MOST + 1)
    except OSError as error:
        raise StoreError(
            f"cannot be read: {error.strerror or 'no file'}", where=str(path)
        ) from None
    if len(content) > _MOST:
        raise StoreError(f"has more than {_MOST} bytes", where=str(path))
    try:
        return _parse(path, content.decode())
    except UnicodeDecodeError:
        raise StoreError("is no text", where=str(path), expected="TOML") from None


def _parse(path: Path, text: str) -> _File:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"is no TOML: {error}", where=str(path)) from None
    try:
        return _File.model_validate(table)
    except ValidationError as error:
        raise _worded(path, error) from None


_KNOWN = {
    (): ("remote", "trust", "rates"),
    ("remote",): tuple(_RemoteSection.model_fields),
    ("rates",): tuple(Rates.model_fields),
    ("trust",): tuple(_TrustSection.model_fields),
}

_EXPECTED = {
    "url": "a URL",
    "push": "true or false",
    "key": "the path of a private key",
    "keys": 'a list of "ed25519:..." and a name each',
    "remote": "a section",
    "trust": "a section",
    "rates": "a section",
    **dict.fromkeys(Rates.model_fields, "a number, 1 or more"),
}


def _worded(path: Path, error: ValidationError) -> StoreError:
    """The first thing that is wrong; what a value holds is not repeated, it may be secret."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _KNOWN.get(tuple(place[:-1]), ())
        return StoreError(
            f"has an unknown key {'.'.join(place)}",
            where=str(path),
            expected=" or ".join(known),
            nearest=nearest(place[-1], known),
        )
    named = next((part for part in reversed(place) if part in _EXPECTED), "remote")
    return StoreError(f"{'.'.join(place)} is not valid", where=str(path), expected=_EXPECTED[named])
