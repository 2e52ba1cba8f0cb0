"""What of a build travels to the nodes of a cluster: recipes and what to do, never weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from carnice_build.commands.node import GPUS, PROCESSOR, RECIPES, Errand, facts_of
from carnice_build.commands.options import Options
from carnice_build.commands.plan import Plan
from carnice_build.commands.remote import RemoteAccess
from carnice_build.errors import RecipeError
from carnice_build.extras import PACKAGE
from carnice_build.remote.config import CONFIG

_MOST_OF_A_FILE = 16 << 20
_MOST_OF_ALL = 64 << 20
"""Bytes of recipes that travel."""


def pack_project(folder: Path, options: Options, access: RemoteAccess) -> None:
    """Put into `folder` what nodes need of this project: its recipes, and whom to believe.

    RecipeError when there is more in the folder of recipes than recipes.
    """
    left = _MOST_OF_ALL

    def copy(source: str, target: str) -> None:
        nonlocal left
        size = Path(source).stat().st_size
        left -= size
        if size > _MOST_OF_A_FILE or left < 0:
            raise RecipeError(
                "is too large to travel to nodes", where=source, expected="recipes alone here"
            )
        shutil.copyfile(source, target)

    # Ray would heed these; git's say what is not published, which a build may well be of.
    ignored = shutil.ignore_patterns(".gitignore", ".rayignore")
    shutil.copytree(options.recipes, folder / RECIPES, ignore=ignored, copy_function=copy)
    trusted = (f"{key} {name}".strip() for key, name in access.trusted().items())
    keys = "".join(f"  {json.dumps(item)},\n" for item in trusted)
    (folder / CONFIG).write_text(f"[trust]\nkeys = [\n{keys}]\n", encoding="utf-8")


def make_errand(names: Sequence[str], plan: Plan, count: int, options: Options, url: str) -> Errand:
    """What nodes are told of a build in `count` parts that meet at `url`."""
    root = options.recipes.parent
    sources = {name: path.absolute() for name, path in options.sources.items()}
    return Errand(
        variants=tuple(names),
        parts=count,
        options=replace(options, sources=sources, remote=url, push=True),
        facts=facts_of(_facts_in_keys(plan)),
        root=root.absolute(),
        local=tuple(sorted(_local_names(plan, root))),
    )


def _facts_in_keys(plan: Plan) -> set[str]:
    found = {PACKAGE}
    for action in plan.graph:
        found |= set(action.op.libraries)
        found |= {PROCESSOR} if "processor" in action.params else set()
        found |= {GPUS} if "gpus" in action.params else set()
    return found


def _local_names(plan: Plan, root: Path) -> Iterator[str]:
    """What in the project's folder the variants are made from."""
    for variant in plan.variants:
        paths = [
            source.checkpoint.where
            for source in variant.sources.values()
            if source.revision is None and (source.profile is not None or source.local)
        ]
        if variant.dataset is not None and variant.dataset.file is not None:
            paths.append(variant.dataset.file.name)
        for path in paths:
            with suppress(ValueError):
                yield from Path(path).relative_to(root).parts[:1]
