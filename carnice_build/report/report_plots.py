"""The report's plots, as figures of plotly; needs the `report` extra.

A figure says nothing of colours: these come from the templates of `report_theme`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import plotly.graph_objects as go

from carnice_build.commands.report import ModuleError, Report, VariantSummary
from carnice_build.report.report_table import (
    at_length,
    copies,
    drafts,
    main_length,
    served,
    short_model,
    sources,
)
from carnice_build.units import format_size
from carnice_build.verification.running import SOURCE

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "x")
_OUTSIDE = "–"
"""The column of modules that are in no decoder layer."""
_ROW = 24


class Topic(StrEnum):
    """The headings that plots stand under."""

    QUALITY = "Quality against size"
    ERRORS = "Error by layer and module"
    BEHAVIOUR = "What the models do"
    SHARING = "What the variants share"

    @property
    def text(self) -> str:
        """What all plots of the topic have in common."""
        return _TOPIC_TEXTS.get(self, "")


_TOPIC_TEXTS = {
    Topic.ERRORS: "Relative error of each quantized module, ||dequantized - source|| / ||source||, "
    "on one logarithmic scale for all variants. Modules without a colour are not quantized, or "
    "cannot be compared because their source was changed before.",
}


@dataclass(frozen=True)
class Plot:
    """A figure with its place and the text above it.

    With `labels`, the page writes names beside the points; below `least_width` pixels it scrolls.
    """

    name: str
    topic: Topic
    title: str
    caption: str
    figure: go.Figure
    wide: bool = False
    labels: bool = False
    least_width: int = 0


def plots(report: Report) -> Iterator[Plot]:
    """All plots for which there is something to show."""
    yield from _quality(report)
    yield from _errors(report)
    yield from _drafts(report)
    yield from _fidelity(report)
    yield from _shared(report)
    yield from _disk(report)


def _figure(traces: Sequence[Any], height: int, **layout: Any) -> go.Figure:
    margin = {"l": 8, "r": 12, "t": 8, "b": 8}
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"}
    frame = {"height": height, "autosize": True, "margin": margin, "legend": legend}
    return go.Figure(traces, frame | layout)


@dataclass(frozen=True)
class _Point:
    variant: VariantSummary
    value: float
    error: float | None


def _quality(report: Report) -> Iterator[Plot]:
    length = main_length(report)
    found = [(variant, at_length(served(variant), length)) for variant in report.variants]
    perplexities = [
        _Point(variant, item.mean, item.error) for variant, item in found if item and item.mean
    ]
    if perplexities:
        figure = _scatter(report, perplexities, "perplexity", "%{y:.3f}")
        _add_sources(figure, report, length)
        yield Plot(
            "perplexity",
            Topic.QUALITY,
            "Perplexity against size",
            f"On sequences of {length} tokens. Bars are standard errors, which are mostly the "
            f"text's own variation and common to all variants; dashed lines are {SOURCE}.",
            figure,
            labels=True,
        )
    divergences = [
        _Point(variant, item.kl, None) for variant, item in found if item and item.kl is not None
    ]
    if divergences:
        figure = _scatter(report, divergences, "KL to BF16 (nats)", "%{y:.5f}")
        figure.update_yaxes(rangemode="tozero")
        yield Plot(
            "kl",
            Topic.QUALITY,
            "Divergence against size",
            f"How far predictions are from those of {SOURCE} at the same positions: 0 is "
            "no change. Only where source and variant ran together.",
            figure,
            labels=True,
        )


def _scatter(report: Report, points: Sequence[_Point], what: str, shown: str) -> go.Figure:
    figure = _figure([], 380, yaxis={"title": {"text": what}})
    figure.update_xaxes(title={"text": "bits per weight"})
    formats = sorted({variant.format for variant in report.variants})
    for index, name in enumerate(formats):
        own = [point for point in points if point.variant.format == name]
        errors = [point.error or 0.0 for point in own]
        figure.add_scatter(
            x=[point.variant.bits_per_weight for point in own],
            y=[point.value for point in own],
            error_y={"array": errors, "thickness": 1.2, "width": 3, "visible": any(errors)},
            customdata=[[format_size(point.variant.size)] for point in own],
            text=[point.variant.variant for point in own],
            name=name,
            mode="markers",
            marker={"size": 11, "symbol": _SYMBOLS[index % len(_SYMBOLS)]},
            hovertemplate=f"<b>%{{text}}</b><br>{what} {shown}<br>%{{x:.2f}} bits per weight, "
            "%{customdata[0]}<extra></extra>",
            showlegend=bool(own),
        )
    return figure


def _add_sources(figure: go.Figure, report: Report, length: int | None) -> None:
    """A line at the perplexity of each unquantized model."""
    for row in sources(report):
        found = at_length(row, length)
        if found is None or found.mean is None:
            continue
        text = f"{SOURCE} {short_model(row.source)} {found.mean:.3f}"
        figure.add_hline(
            y=found.mean,
            line={"dash": "dash", "width": 1.2},
            name=text,
            showlegend=True,
        )


def _errors(report: Report) -> Iterator[Plot]:
    """A map for each variant, all with the same axes and colours."""
    variants = [variant for variant in report.variants if variant.errors]
    errors = [item for variant in variants for item in variant.errors]
    finite = [item.error for item in errors if item.error]
    if not finite:
        return
    # The variant with the most kinds of modules has them in the order of the model.
    fullest = sorted(variants, key=lambda variant: -len({item.kind for item in variant.errors}))
    kinds = list(dict.fromkeys(item.kind for variant in fullest for item in variant.errors))
    layers = sorted({item.layer for item in errors if item.layer is not None})
    outside = [_OUTSIDE] if any(item.layer is None for item in errors) else []
    columns = [*outside, *map(str, layers)]
    for variant in variants:
        figure = _error_map(variant.errors, kinds, columns)
        figure.update_coloraxes(cmin=_log(min(finite)), cmax=_log(max(finite)))
        yield Plot(f"errors-{variant.variant}", Topic.ERRORS, variant.variant, "", figure)


def _error_map(
    errors: Sequence[ModuleError], kinds: Sequence[str], columns: Sequence[str]
) -> go.Figure:
    found = {(item.kind, _column(item)): item.error for item in errors}
    rows = [[found.get((kind, column)) for column in columns] for kind in kinds]
    figure = _figure(
        [
            go.Heatmap(
                x=columns,
                y=kinds,
                z=[[_log(error) for error in row] for row in rows],
                customdata=rows,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hoverongaps=False,
                hovertemplate="%{y}, layer %{x}<br>relative error %{customdata:.4f}<extra></extra>",
            )
        ],
        70 + _ROW * len(kinds),
    )
    figure.update_xaxes(type="category", title={"text": "layer"}, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix=" ")
    return figure


def _log(error: float | None) -> float | None:
    return math.log10(error) if error else None


def _column(item: ModuleError) -> str:
    return _OUTSIDE if item.layer is None else str(item.layer)


def _shared(report: Report) -> Iterator[Plot]:
    names = [variant.variant for variant in report.variants]
    table = report.sharing.tensor_bytes
    if len(names) < 2:
        return
    shares = [[count / (row[i] or 1) for count in row] for i, row in enumerate(table)]
    figure = _figure(
        [
            go.Heatmap(
                x=names,
                y=names,
                z=shares,
                customdata=[[format_size(count) for count in row] for row in table],
                coloraxis="coloraxis2",
                xgap=1,
                ygap=1,
                texttemplate="%{z:.0%}",
                hovertemplate="%{customdata} (%{z:.1%}) of <b>%{y}</b><br>"
                "are in <b>%{x}</b> too<extra></extra>",
            )
        ],
        150 + 30 * len(names),
        coloraxis2={"cmin": 0, "cmax": 1},
    )
    figure.update_xaxes(tickangle=-45, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix=" ")
    yield Plot(
        "shared",
        Topic.SHARING,
        "Tensors in common",
        "The part of each row's bytes that the column's variant has as well, in tensors of equal "
        "content.",
        figure,
        wide=True,
        least_width=180 + 36 * len(names),
    )


def _disk(report: Report) -> Iterator[Plot]:
    sharing = report.sharing
    bars = ["on disk", "one by one"]
    parts = {
        "folders": [sharing.folders, sharing.outputs],
        "in the cache alone": [sharing.cache, 0],
    }
    traces = [
        go.Bar(
            x=sizes,
            y=bars,
            name=name,
            orientation="h",
            customdata=[format_size(size) for size in sizes],
            hovertemplate="%{customdata} %{fullData.name}<extra></extra>",
        )
        for name, sizes in parts.items()
    ]
    figure = _figure(traces, 190, barmode="stack", bargap=0.35)
    figure.update_xaxes(tickformat="~s", ticksuffix="B", rangemode="tozero")
    figure.update_yaxes(showgrid=False, ticksuffix=" ")
    yield Plot(
        "disk",
        Topic.SHARING,
        "Disk",
        "All folders as if each stood alone, against what is on disk: a shard that folders and "
        "cache share is one file and counts once.",
        figure,
        wide=True,
    )


def _drafts(report: Report) -> Iterator[Plot]:
    found = {variant.variant: drafts(variant) for variant in report.variants}
    names = [name for name, heads in found.items() if heads]
    heads = list(dict.fromkeys(head for heads in found.values() for head in heads))
    if not names:
        return
    number = max(item.number for name in names for item in found[name].values())
    traces = [
        go.Bar(
            x=names,
            y=[found[name][head].mean_length for name in names],
            error_y={"array": [found[name][head].error for name in names], "thickness": 1.2},
            name=head,
            hovertemplate="<b>%{x}</b>, %{fullData.name}<br>%{y:.2f} tokens a step<extra></extra>",
        )
        for head in heads
        if all(head in found[name] for name in names)
    ]
    figure = _figure(traces, 340, barmode="group", bargap=0.3)
    figure.update_yaxes(title={"text": "tokens a step"}, rangemode="tozero")
    figure.update_xaxes(showgrid=False)
    yield Plot(
        "drafts",
        Topic.BEHAVIOUR,
        "Speculative decoding",
        f"Tokens that a step yields with {number} drafts of the MTP head: those accepted and the "
        "one that the model adds. Without a head it is one.",
        figure,
    )


def _fidelity(report: Report) -> Iterator[Plot]:
    counted = {
        SOURCE if model == SOURCE else variant.variant: item
        for variant in report.variants
        for model, item in copies(variant).items()
    }
    if not counted:
        return
    names = sorted(counted, key=lambda name: name != SOURCE)
    parts = {
        "copied": [counted[name].exact for name in names],
        "with typos": [counted[name].typos for name in names],
        "not copied": [counted[name].misses for name in names],
    }
    traces = [
        go.Bar(
            x=counts,
            y=names,
            name=part,
            orientation="h",
            hovertemplate="<b>%{y}</b><br>%{x} names %{fullData.name}<extra></extra>",
        )
        for part, counts in parts.items()
    ]
    figure = _figure(traces, 110 + 34 * len(names), barmode="stack", bargap=0.3)
    figure.update_xaxes(title={"text": "names"})
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix=" ")
    yield Plot(
        "fidelity",
        Topic.BEHAVIOUR,
        "Rare names copied",
        "Names that stand nowhere but in the prompt, written at temperature 0.",
        figure,
    )
