"""The colours of the report's plots, in two schemes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Palette:
    """The colours of one scheme; scales go from nothing to much, `soft` keeps text readable."""

    text: str
    muted: str
    grid: str
    series: tuple[str, ...]
    scale: tuple[str, ...]
    soft: tuple[str, ...]


LIGHT = Palette(
    text="#1c2330",
    muted="#596273",
    grid="#dfe3ea",
    series=("#1f5fd0", "#b4430b", "#0b7a5c", "#7a3fd1", "#a81d62", "#5f6b00"),
    scale=("#d8e5f8", "#9fc0f0", "#4f86d9", "#1f4fa8", "#0b2559"),
    soft=("#f1f4f9", "#8fb8f2"),
)
DARK = Palette(
    text="#e7ebf2",
    muted="#a3adbd",
    grid="#2c3442",
    series=("#76a9ff", "#ff9d66", "#45cba2", "#bd9bff", "#ff86b9", "#c6d24a"),
    scale=("#2b3f66", "#315a9f", "#4a82d6", "#8bb8f8", "#e3efff"),
    soft=("#1d2533", "#2a5cab"),
)


def template(palette: Palette) -> dict[str, Any]:
    """How figures of plotly look in one scheme."""
    axis = {
        "gridcolor": palette.grid,
        "linecolor": palette.grid,
        "zerolinecolor": palette.grid,
        "ticks": "",
        "tickfont": {"color": palette.muted},
        "title": {"font": {"color": palette.muted, "size": 13}, "standoff": 8},
        "automargin": True,
    }
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 13, "color": palette.text},
        "colorway": palette.series,
        "coloraxis": {"colorscale": _steps(palette.scale), "showscale": False},
        "coloraxis2": {"colorscale": _steps(palette.soft), "showscale": False},
        "xaxis": axis,
        "yaxis": axis,
        "shapedefaults": {"line": {"color": palette.muted}},
        "annotationdefaults": {"font": {"color": palette.text}, "arrowcolor": palette.muted},
        "hoverlabel": {"font": {"family": _FONT}},
    }
    data = {
        "bar": [{"error_y": {"color": palette.text}}],
        "heatmap": [{"textfont": {"color": palette.text}}],
    }
    return {"layout": layout, "data": data}


def _steps(colours: Sequence[str]) -> list[tuple[float, str]]:
    return [(index / (len(colours) - 1), colour) for index, colour in enumerate(colours)]
