"""What must start fast loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
from conftest import Project

from carnice_build.commands.build import build_variants

HEAVY = (
    "torch",
    "transformers",
    "mlx",
    "numba",
    "numpy",
    "networkx",
    "huggingface_hub",
    "fsspec",
    "cryptography",
)


UNUSED = ("carnice_build.formats.nvfp4", "carnice_build.formats.autoround", "carnice_build.serving")
"""What a recipe for MLX, which has no launches, needs nothing of."""


def loaded(project: Project, *arguments: str, among: Sequence[str] = HEAVY) -> list[str]:
    """The modules of `among` that a run of the command line imports."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', *[m for m in {among} if m in sys.modules]))\n"
        "from carnice_build.cli.main import run\n"
        "run()\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=project.root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return output.splitlines()[-1].split()[1:]


def test_import_loads_nothing_heavy() -> None:
    """`import carnice_build` brings none of the heavy libraries."""
    code = f"import sys, carnice_build; print([m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("list",),
        ("schema",),
        ("build", "--help"),
        ("explain", "mlx-4bit"),
        ("family", "--help"),
        ("family", "--list"),
        ("new", "--list"),
    ],
)
def test_looking_loads_nothing_heavy(project: Project, arguments: tuple[str, ...]) -> None:
    """Commands that only look load none of the heavy libraries."""
    assert loaded(project, *arguments) == []


def test_a_build_with_nothing_to_do_loads_nothing_heavy(project: Project) -> None:
    """A no-op build loads none of the heavy libraries."""
    build_variants(["mlx-4bit"], project.options())

    assert loaded(project, "build", "mlx-4bit") == []


def test_a_plan_loads_no_library_that_computes(project: Project) -> None:
    """A plan of unbuilt variants loads neither numpy nor anything above it."""
    assert loaded(project, "plan", "mlx-4bit", "--json") == []


def test_a_plan_loads_the_formats_that_it_names_and_no_other(project: Project) -> None:
    """The registries name modules, and launches are loaded for recipes that have some."""
    assert loaded(project, "plan", "mlx-4bit", "--json", among=UNUSED) == []
    assert loaded(project, "schema", among=UNUSED[:2]) == list(UNUSED[:2])
