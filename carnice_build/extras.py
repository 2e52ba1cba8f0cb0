"""The optional dependencies of this package: which are installed, and how to have the others."""

from __future__ import annotations

import json
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PACKAGE = "carnice-build"

_NAME = re.compile(r"[\w.-]+")


def pip_install(extra: str) -> str:
    """The line that installs an extra from where this package was installed from.

    What came from a folder may be on no index.
    """
    return f"pip install {_requirement(extra)}"


def has_extra(extra: str) -> bool:
    """Whether all packages of an extra are installed, in whatever version; imports none."""
    own = _distribution(PACKAGE)
    return own is not None and all(map(_is_there, _wanted(own, extra)))


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _is_there(name: str) -> bool:
    return _distribution(name) is not None


def _wanted(own: Distribution, extra: str) -> set[str]:
    """The names of an extra's packages, with those of the extras that it takes in."""
    found: set[str] = set()
    for line in own.requires or ():
        requirement, _, marker = line.partition(";")
        name = _NAME.match(requirement.strip())
        if name is None or not re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker):
            continue
        if name[0] != PACKAGE:
            found.add(name[0])
            continue
        inner = requirement.partition("[")[2].partition("]")[0]
        found |= {item for other in inner.split(",") for item in _wanted(own, other.strip())}
    return found


def _requirement(extra: str) -> str:
    own = _distribution(PACKAGE)
    text = own.read_text("direct_url.json") if own else None
    origin: dict[str, Any] = json.loads(text) if text else {}
    url, vcs = origin.get("url", ""), origin.get("vcs_info", {}).get("vcs")
    if vcs:
        return f"'{PACKAGE}[{extra}] @ {vcs}+{url}'"
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.scheme != "file" or not path.exists():
        return f"'{PACKAGE}[{extra}]'"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"{editable}'{'.' if path == Path.cwd() else path}[{extra}]'"
