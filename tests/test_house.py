"""Which part of the program may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "carnice_build"

LAYERS = (
    "cli",
    "report",
    "commands",
    "engines",
    "verification",
    "package",
    "execute",
    "planning",
    "formats",
    "steps",
    "calibration",
    "backends",
    "serving",
    "chat",
    "remote",
    "store",
    "checkpoint",
    "recipe",
    "models",
    "graph",
    "keys",
    "kernels",
    "tensor_file",
    "tensors",
    "plugins",
    "yaml_tree",
    "dtypes",
    "processor",
    "system",
    "rates",
    "units",
    "extras",
    "version",
    "errors",
)
"""From the top to the ground; each may import what stands behind it, and nothing before it."""

FACE = ("__init__", "__main__")
"""What users import and run; it is above all layers."""


def modules() -> list[Path]:
    """Every module, by its path in the package."""
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def layer_of(module: Path) -> str:
    """The folder or the file at the top level that a module is in."""
    return module.parts[0].removesuffix(".py")


def imported(module: Path) -> Iterator[str]:
    """What of the package a module imports, wherever in it, for types alone too."""
    package = ["carnice_build", *module.parts[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, node.module or ""]).rstrip(".")
            yield from (f"{start}.{name.name}" for name in node.names)


def layers_imported(module: Path) -> Iterator[str]:
    """The layers that a module imports from."""
    for name in imported(module):
        parts = name.split(".")
        if parts[0] == "carnice_build" and len(parts) > 1:
            yield parts[1] if parts[1] in LAYERS else "__init__"


def test_every_part_has_its_place() -> None:
    """Nothing lies at the top level that is not in the list, and the list names nothing else."""
    assert {*LAYERS, *FACE} == {layer_of(module) for module in modules()}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    """A module imports its own layer and those below; nobody imports the package's face."""
    below = LAYERS[LAYERS.index(layer) :]
    wrong = [
        f"{module} imports {found}"
        for module in modules()
        if layer_of(module) == layer
        for found in layers_imported(module)
        if found not in below
    ]

    assert [] == wrong
