"""What constraints.txt pins, pyproject.toml allows, and what goes out says so."""

from __future__ import annotations

import re
import tomllib

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from carnice_build.formats import compressed_config as compressed
from carnice_build.formats.autoround import files as autoround
from carnice_build.formats.nvfp4 import files as modelopt

LINES = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in LINES if not line.startswith("#"))
}


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, but for our own extras."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    project = table["project"]
    lists = [
        table["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    wanted = [Requirement(text) for texts in lists for text in texts]
    return [item for item in wanted if item.name != project["name"]]


def test_a_pin_is_a_name_and_a_version() -> None:
    """No address, no build of one platform, nothing twice."""
    pins = [line for line in LINES if not line.startswith("#")]

    assert [] == [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert len(pins) == len(PINS)


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_is_asked_for_is_pinned(requirement: Requirement) -> None:
    """Each requirement has a pin, and allows it."""
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_files_state_the_versions_that_are_pinned() -> None:
    """The version in a folder's config is that of the library which the tests compare with."""
    pinned = [PINS[name] for name in ("auto-round", "compressed-tensors", "nvidia-modelopt")]

    assert pinned == [autoround.VERSION, compressed.VERSION, modelopt.PRODUCER["version"]]
