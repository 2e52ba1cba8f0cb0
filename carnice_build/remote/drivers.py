"""Drivers of fsspec: which one opens a URL, and how to have it."""

from __future__ import annotations

import re
from typing import Any

from carnice_build.errors import StoreError, nearest
from carnice_build.extras import pip_install
from carnice_build.remote import calls

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "ssh": "ssh", "sftp": "ssh"}
_SCHEMES = ("file", "s3", "gs", "hf", "ssh")

_CONNECT = 10
"""Seconds in which a server has to be there."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(?!.*::)\S+")


def shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query; "" for what is no URL."""
    scheme, separator, rest = url.partition("://")
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if separator else ""


def scheme_of(url: str) -> str:
    """The scheme of a URL, for which a driver is here; StoreError for any other."""
    name = shown(url)
    match = _URL.fullmatch(url)
    if match is None:
        raise StoreError(
            "is no URL of a remote", where=name or "--remote", expected="s3://BUCKET/PATH, say"
        )
    scheme = match[1]
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError:
        raise StoreError(
            "a remote needs fsspec", where=name, expected=pip_install("remote")
        ) from None
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        extra = _EXTRAS.get(scheme)
        wanted = known_implementations.get(scheme, {}).get("err", "its driver for fsspec")
        raise StoreError(
            f"there is no driver for {scheme}:// here",
            where=name,
            expected=pip_install(extra) if extra else wanted,
        ) from None
    except ValueError:
        raise StoreError(
            f"there are no remotes of the kind {scheme}://",
            where=name,
            expected=", ".join(f"{item}://" for item in _SCHEMES),
            nearest=nearest(scheme, _SCHEMES),
        ) from None
    return scheme


def connect(url: str) -> tuple[Any, str]:
    """The driver of a URL and its root there; some connect at once, and raise what they like."""
    import fsspec

    files, root = fsspec.core.url_to_fs(url, **_settings(scheme_of(url)))
    return files, str(root)


def _settings(scheme: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in ("ssh", "sftp"):
        # Whatever else is passed goes to paramiko's own `connect`.
        return settings | dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), _CONNECT)
    settings["use_listings_cache"] = False
    if scheme in ("s3", "s3a"):
        # Attempts and waits are ours; the driver's own would multiply with them.
        settings["config_kwargs"] = {
            "connect_timeout": _CONNECT,
            "read_timeout": calls.PATIENCE,
            "retries": {"mode": "standard", "max_attempts": 2},
            "max_pool_connections": 32,
        }
    return settings
