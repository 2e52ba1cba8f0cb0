"""What was done for each variant, and what was measured: no build depends on it.

cache/history/<variant>    the fields of its actions' keys when it was last built
cache/builds/<variant>     what its builds did (`BuildRecord`)
cache/verified/<variant>   what `carnice verify` found
cache/measured/<key>       a figure, by a digest of all that decides it
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carnice_build.store.files import open_regular, write_atomically

Facts = dict[str, str]
"""The fields of an action's key, by name, as `keys.write_key` walks them."""

MAX_BYTES = 200_000_000


@dataclass(frozen=True)
class BuildRecord:
    """The last build that did something for a variant, and all such builds together.

    `key` is that of the folder it left.
    Of the variant's `actions`, `run` were run, `shared` of these for another variant of the same
    build too; `seconds` is the time that workers spent on them.
    The whole build took `elapsed` seconds for `variants` variants.
    `total_run` and `total_seconds` count over all `builds` of this cache.
    """

    key: str
    actions: int
    run: int
    shared: int
    seconds: float
    elapsed: float
    variants: int
    builds: int = 0
    total_run: int = 0
    total_seconds: float = 0.0

    @property
    def reused(self) -> int:
        """Actions whose results were there."""
        return self.actions - self.run


def write_history(root: Path, variant: str, actions: Mapping[str, Facts]) -> None:
    """Remember `actions`, by what they make, as the last build of `variant` in the cache `root`."""
    _write(root / "history" / variant, actions)


def read_history(root: Path, variant: str) -> dict[str, Facts] | None:
    """The actions of the variant's last build; None when there was none or it is unreadable."""
    value = _read(root / "history" / variant)
    if value is None or not all(isinstance(item, dict) for item in value.values()):
        return None
    return value


def add_build(root: Path, variant: str, record: BuildRecord) -> None:
    """Remember `record`, whose totals are those of this build alone, as the variant's last one."""
    before = read_build_record(root, variant)
    totals = {
        "builds": 1 + (before.builds if before else 0),
        "total_run": record.run + (before.total_run if before else 0),
        "total_seconds": record.seconds + (before.total_seconds if before else 0.0),
    }
    _write(root / "builds" / variant, asdict(record) | totals)


def read_build_record(root: Path, variant: str) -> BuildRecord | None:
    """What the variant's builds did; None when there was none or it is unreadable."""
    value = _read(root / "builds" / variant)
    if value is None or value.keys() != BuildRecord.__dataclass_fields__.keys():
        return None
    key, *numbers = value.values()
    fine = isinstance(key, str) and all(type(item) in (int, float) for item in numbers)
    return BuildRecord(**value) if fine else None


def write_findings(root: Path, variant: str, findings: Mapping[str, Any]) -> None:
    """Remember what a verification of `variant` found, JSON-ready."""
    _write(root / "verified" / variant, findings)


def read_findings(root: Path, variant: str) -> dict[str, Any] | None:
    """What was found; None when it was never verified or the file is unreadable."""
    return _read(root / "verified" / variant)


def measured_path(root: Path, key: str) -> Path:
    """Where what was measured under `key`, a digest, is kept."""
    return root / "measured" / key


def write_measured(root: Path, key: str, value: Mapping[str, Any]) -> None:
    """Remember what was measured under `key`, JSON-ready."""
    _write(measured_path(root, key), value)


def read_measured(root: Path, key: str) -> dict[str, Any] | None:
    """What was measured under `key`; None when nothing was or the file is unreadable."""
    return _read(measured_path(root, key))


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(value, separators=(",", ":")).encode()
    write_atomically(path, zlib.compress(content, 1))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open_regular(path) as file:
            packed = file.read(MAX_BYTES)
        value = json.loads(zlib.decompressobj().decompress(packed, MAX_BYTES))
    except (OSError, ValueError, zlib.error, RecursionError):
        return None
    return value if isinstance(value, dict) else None
