"""The report as one HTML page that needs nothing else: no file beside it and no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

from carnice_build.commands.report import Report
from carnice_build.report import report_plots
from carnice_build.report.report_plots import Plot, Topic
from carnice_build.report.report_table import COLUMNS, notes, table, warning
from carnice_build.report.report_theme import DARK, LIGHT, Palette, template
from carnice_build.units import format_size, plural

_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Section:
    """Plots under a heading; `scale` are the ends of the colour scale that they share."""

    topic: Topic
    plots: Sequence[Plot]
    scale: tuple[str, str] | None = None


@dataclass(frozen=True)
class Tile:
    """A figure to see first."""

    title: str
    value: str
    note: str


def render_page(report: Report) -> str:
    """The page; its colours follow the reader's scheme."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    plots = list(report_plots.plots(report))
    css = environment.from_string(_asset("report.css"))
    return environment.from_string(_asset("report.html.j2")).render(
        version=report.version,
        provenance=_provenance(report),
        title=_title(report),
        models=", ".join(dict.fromkeys(variant.model for variant in report.variants)),
        warning=warning(report),
        notes=notes(report),
        tiles=_tiles(report),
        columns=COLUMNS,
        rows=table(report),
        sections=list(_sections(report, plots)),
        problems=list(_problems(report)),
        css=Markup(css.render(light_scale=_gradient(LIGHT), dark_scale=_gradient(DARK))),
        data=Markup(_data(plots)),
        plotly=Markup(get_plotlyjs()),
        js=Markup(_asset("report.js")),
    )


def _asset(name: str) -> str:
    return files("carnice_build.report").joinpath("templates", name).read_text("utf-8")


def _gradient(palette: Palette) -> str:
    return ", ".join(palette.scale)


def _data(plots: Sequence[Plot]) -> str:
    """What the page's script draws; no text in it can end the script element."""
    figures = {
        plot.name: json.loads(plot.figure.to_json()) | {"labels": plot.labels} for plot in plots
    }
    templates = {"light": template(LIGHT), "dark": template(DARK)}
    text = json.dumps({"figures": figures, "templates": templates}, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _title(report: Report) -> str:
    return f"{plural(len(report.variants), 'variant')} side by side"


def _tiles(report: Report) -> list[Tile]:
    sharing, variants = report.sharing, report.variants
    passed = sum(variant.passed for variant in variants)
    verified = sum(variant.findings is not None for variant in variants)
    return [
        Tile(
            "On disk",
            format_size(sharing.folders + sharing.cache),
            f"with the cache; the folders are {format_size(sharing.outputs)} one by one",
        ),
        Tile(
            "Different actions",
            str(sharing.distinct_actions),
            f"of {sharing.actions} behind the variants, one by one",
        ),
        Tile("Verified", f"{verified} of {len(variants)}", f"{passed} passed every check made"),
        Tile("Smallest", format_size(variants[0].size), variants[0].variant),
    ]


def _sections(report: Report, plots: Sequence[Plot]) -> Iterator[Section]:
    """The plots by what they are about."""
    errors = [item.error for variant in report.variants for item in variant.errors if item.error]
    scale = (f"{min(errors):.3f}", f"{max(errors):.3f}") if errors else None
    for topic in Topic:
        own = [plot for plot in plots if plot.topic is topic]
        if own:
            yield Section(topic, own, scale if topic is Topic.ERRORS else None)


def _provenance(report: Report) -> list[str]:
    """What variants were made from and with, those alike in one line."""
    made: dict[str, list[str]] = {}
    for variant in report.variants:
        tools = [f"{tool} {version}" for tool, version in variant.tools.items()]
        text = ", ".join([variant.model, f"profile {variant.profile}", *tools])
        made.setdefault(text, []).append(variant.variant)
    return [f"{', '.join(names)}: {text}" for text, names in made.items()]


def _problems(report: Report) -> Iterator[str]:
    for variant in report.variants:
        for check in variant.findings.checks if variant.findings else ():
            shown = check.problems[:_SHOWN_PROBLEMS]
            yield from (f"{variant.variant}, {check.name}: {problem}" for problem in shown)
            more = len(check.problems) - len(shown)
            if more:
                yield f"{variant.variant}, {check.name}: and {more} more"
