"""docs/scaling.md: its commands print its figures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from conftest import REPOSITORY, Finished, Project
from pages import files_of, shown, write_files

from carnice_build.rates import Rates

Carnice = Callable[..., Finished]
PAGE = "scaling.md"


@dataclass(frozen=True)
class Command:
    """A command of the page, with its number among those of its section, and what it prints."""

    section: str
    number: int
    text: str
    prints: str

    def __str__(self) -> str:
        return f"{self.section} {self.number}"


def commands() -> Iterator[Command]:
    """Those whose output is shown."""
    for section in shown(PAGE).split("\n## ")[1:]:
        title = section.partition("\n")[0]
        found = re.findall(r"^```console\n\$ ([^\n]*)\n\.\.\.\n(.*?)\n```$", section, re.M | re.S)
        for number, (text, prints) in enumerate(found):
            yield Command(title, number, text, prints)


def rows() -> Iterator[tuple[Command, str, list[str]]]:
    """Of tables of options: the command that they belong to, the options, and the other cells."""
    firsts = {command.section: command for command in commands() if command.number == 0}
    for section in shown(PAGE).split("\n## ")[1:]:
        found = re.findall(r"^\| `(--nodes \d[^`]*)` \| (.*) \|$", section, re.M)
        for options, cells in found:
            yield firsts[section.partition("\n")[0]], options, cells.split(" | ")


@pytest.fixture
def page_project(project: Project) -> Project:
    """The project with the page's recipes, and the shape files."""
    write_files(PAGE, "yaml", project.root)
    profiles = (REPOSITORY / "recipes" / "_profiles.yaml").read_text(encoding="utf-8")
    (project.recipes / "_profiles.yaml").write_text(profiles, encoding="utf-8")
    (project.root / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    dataset = project.root / "demo" / "calibration.jsonl"
    dataset.symlink_to(REPOSITORY / "demo" / "calibration.jsonl")
    return project


def printed(carnice: Carnice, command: str) -> str:
    """What is printed of the estimate, as pages show it."""
    finished = carnice(*shlex.split(command)[1:])
    assert 0 == finished.code, finished.err
    lines = finished.out[finished.out.index("Estimate") :].splitlines()
    return "\n".join(line.rstrip() for line in lines).rstrip()


@pytest.mark.parametrize("command", list(commands()), ids=str)
def test_a_command_prints_what_is_shown(
    page_project: Project, carnice: Carnice, command: Command
) -> None:
    """With the page's rates for the second one of a section."""
    if command.number:
        write_files(PAGE, "toml", page_project.root)

    assert command.prints == printed(carnice, command.text)


@pytest.mark.parametrize(
    ("command", "options", "cells"), list(rows()), ids=[f"{item[0]} {item[1]}" for item in rows()]
)
def test_a_row_says_what_its_options_do(
    page_project: Project, carnice: Carnice, command: Command, options: str, cells: list[str]
) -> None:
    """In the place of the number of nodes that the section's command has."""
    del page_project
    text = re.sub(r" --nodes \d+", "", command.text)
    found = dict(
        re.split(r"  +", line, maxsplit=1)
        for line in printed(carnice, f"{text} {options}").splitlines()[-3:]
    )

    assert cells == [found["in all"], found["bottleneck"], found["cost"].split()[0]]


def test_all_three_models_are_there() -> None:
    """Each with a command, and some with options beside."""
    assert ["Qwen3.6-27B", "Qwen3-235B-A22B", "Kimi-K2-Instruct"] == [
        command.section.split()[0] for command in commands() if command.number == 0
    ]
    assert {"carnice.toml"} == set(files_of(PAGE, "toml"))
    assert list(rows())


def test_every_rate_is_told() -> None:
    """With its value, in the order of `Rates`."""
    told = re.findall(r"^\| `(\w+)` \| ([\d.e]+) \|", shown(PAGE), re.M)

    assert dict(Rates()) == {name: float(value) for name, value in told}
    assert list(Rates.model_fields) == [name for name, _ in told]


def test_the_memory_of_a_pass_through_the_largest(page_project: Project, carnice: Carnice) -> None:
    """Is what the plan says."""
    del page_project
    finished = carnice("plan", "kimi-k2-nvfp4", "--profile", "shapes", "--json")

    assert f"{json.loads(finished.out)['peak_memory_estimate'] / 1e9:.0f} GB of memory" in shown(
        PAGE
    )


def test_the_build_that_was_measured(page_project: Project, carnice: Carnice) -> None:
    """Is estimated at what the page says beside it, for one core."""
    del page_project
    arguments = ("--profile", "shapes", "--jobs", 1, "--bandwidth", "100GB/s", "--json")
    finished = carnice("plan", "mlx-4bit", *arguments)
    found = json.loads(finished.out)["estimate"]

    assert "kernels" == found["bottleneck"]
    assert f"the estimate has {found['seconds']:.0f} s." in shown(PAGE)
