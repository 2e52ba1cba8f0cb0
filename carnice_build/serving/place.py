"""Where the files of one serving profile lie in a published folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A folder below `serve/`, or that one itself, as a path in the published folder."""

    folder: str

    @property
    def hermes(self) -> str:
        """Hermes Agent's configuration; a published folder is at most two folders deep."""
        return "hermes-cli-config.yaml" if "/" in self.folder else "hermes/cli-config.yaml"

    @property
    def model_folder(self) -> str:
        """The published folder, seen from this one."""
        return "/".join(".." for _ in self.folder.split("/"))


ALONE = Place("serve")
"""Where the files are when there is one profile."""
