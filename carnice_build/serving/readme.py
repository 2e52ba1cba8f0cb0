"""serve/README.md: the launches, why each option is as it is, what they need, and their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import OVERRIDE, Launch
from carnice_build.serving.memory import GIB, Memory, caches_by_type, estimate
from carnice_build.serving.place import Place
from carnice_build.serving.profile import Range
from carnice_build.serving.sampling import launch_sampling


def readme(launches: Sequence[Launch], facts: ServingFacts, place: Place) -> str:
    """The page for these launches of a folder, to lie at `place`."""
    support = facts.support.get(launches[0].data.engine, {})
    return _render(
        "serve.md.j2",
        launches=launches,
        by_name={launch.name: launch for launch in launches},
        profile=launches[0].profile,
        release=launches[0].engine.release,
        known={name: support[name] for name in facts.schemes if name in support},
        facts=facts,
        place=place,
        engine=launches[0].engine,
        drafts=any(launch.engine.words.drafts in launch.flags for launch in launches),
        caches=list(caches_by_type(launches[0], facts)) if facts.model_file else [],
        memory={launch.name: estimate(launch, facts) for launch in launches},
        sampling={launch.name: _sampling(launch_sampling(launch, facts)) for launch in launches},
        source="card" if len(launches[0].profile.cards) == 1 else "cards",
        overridden=any(OVERRIDE in launch.flags for launch in launches),
    )


def contents_page(profiles: Sequence[str], facts: ServingFacts) -> str:
    """The page above the folders of several profiles."""
    return _render(
        "several.md.j2",
        profiles={name: facts.profiles[name] for name in profiles},
        facts=facts,
    )


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"cell": _cell, "code": _code, "range": _range, "sizes": _sizes}
    environment.filters["gib"] = lambda count: f"{count / GIB:.1f} GiB"
    text = files(__package__).joinpath("templates", template).read_text("utf-8")
    return environment.from_string(text).render(values)


def _cell(text: object) -> str:
    """`text` inside a table."""
    return str(text).replace("|", "\\|")


def _code(text: object) -> str:
    """`text` as code inside a table."""
    return f"`{_cell(text)}`"


def _sampling(numbers: Mapping[str, int | float]) -> str:
    return ", ".join(f"{name} {number:g}" for name, number in numbers.items())


def _range(value: Range | None) -> str:
    if value is None:
        return ""
    return " to ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else [value]))


def _sizes(memory: Memory) -> list[str]:
    """KV cache, weights, their sum and the budget, as people compare them."""
    cache = f"{memory.kv_cache / GIB:.1f} GiB ({memory.kv_cache / 1e9:.1f} GB)"
    plain = [f"{count / GIB:.1f} GiB" for count in (memory.weights, memory.needed)]
    budget = "not known" if memory.budget is None else f"{memory.budget / GIB:.1f} GiB"
    return [cache, *plain, budget]
