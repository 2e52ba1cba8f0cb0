"""What every command needs to know before it can plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FAMILIES = "_families"
"""The folder, beside a project's recipes, of its tables of model families."""

DEFAULT_MEMORY = 2 * 10**9


@dataclass(frozen=True)
class Options:
    """Where things are and how much of the machine to use; none of it is in any key.

    Without a `profile`, each recipe gets the first one that has all of its sources.
    Without a `remote`, it is the one that `carnice.toml` or the environment names, if any does; ""
    is none.  `push` goes over what the file says.
    """

    recipes: Path = Path("recipes")
    profile: str | None = None
    stream: bool = False
    sources: Mapping[str, Path] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    out: Path = Path("build")
    cache: Path = Path("cache")
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    memory: int = DEFAULT_MEMORY
    devices: tuple[int, ...] | None = None
    """Which GPUs compute, by their numbers, where a recipe has GPUs compute; None is all."""
    remote: str | None = None
    push: bool = False

    def __post_init__(self) -> None:
        """From here on, the tables of model families in the project count."""
        # What reads tables takes longer to load than `carnice --help` may take.
        from carnice_build.models import use_tables

        use_tables(self.recipes / FAMILIES)
