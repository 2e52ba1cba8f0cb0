"""The report's page as a browser shows it, and its table."""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from reporting import HOSTILE, NAMES, UNKNOWN, sample_report

from carnice_build.report.report_page import render_page
from carnice_build.report.report_table import COLUMNS, render_markdown
from carnice_build.report.report_theme import DARK, LIGHT, Palette

BROWSER = REPOSITORY / "tests" / "browser"
MOST_BYTES = 6_000_000
READABLE = 4.5
"""The least contrast of text by WCAG 2, level AA."""
VISIBLE = 3.0
"""The least contrast of marks."""

Box = dict[str, float]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a headless browser sees of the page, in both schemes and at two widths."""
    if shutil.which("node") is None or not (BROWSER / "node_modules" / "puppeteer-core").is_dir():
        pytest.skip("there is no browser: install node, then `npm ci --prefix tests/browser`")
    page = tmp_path_factory.mktemp("page") / "index.html"
    page.write_text(render_page(sample_report()), encoding="utf-8")
    run = subprocess.run(
        ["node", BROWSER / "look.mjs", page], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")
    return json.loads(run.stdout)


def test_the_page_needs_nothing_else(seen: Any) -> None:
    """The page itself is all that is asked for, and the console stays empty."""
    assert [] == seen["complaints"]
    assert ["index.html"] == [Path(url).name for url in seen["requests"] if url[:5] != "data:"]


def test_it_fits_every_width(seen: Any) -> None:
    """Nothing sticks out to the right, and each plot has the width that there is."""
    for look in seen["looks"]:
        assert look["overflow"] <= 0
        for plot in look["plots"].values():
            assert plot["room"] == plot["width"]


def test_every_plot_has_its_marks(seen: Any) -> None:
    """Points, bars and maps are there in both schemes and at both widths."""
    verified = [name for name in NAMES if name != UNKNOWN]
    maps = {f"errors-{name}": (0, 0, 1) for name in verified}
    expected = {
        "perplexity": (12, 0, 0),
        "kl": (6, 0, 0),
        **maps,
        "drafts": (0, 18, 0),
        "fidelity": (0, 21, 0),
        "shared": (0, 0, 1),
        "disk": (0, 4, 0),
    }
    for look in seen["looks"]:
        plots = look["plots"]
        found = {name: (p["points"], p["bars"], p["maps"]) for name, p in plots.items()}
        assert expected == found
        assert {look["scheme"]} == {plot["drawn"] for plot in plots.values()}


def test_every_text_can_be_read(seen: Any) -> None:
    """All text has the contrast of WCAG AA against what is behind it, in plots too."""
    for look in seen["looks"]:
        faint = [text for text in look["texts"] if text[1] < READABLE]
        assert [] == faint
        assert "mlx-4bit" in {text for text, _ in look["texts"]}


def test_names_cover_neither_points_nor_each_other(seen: Any) -> None:
    """Points that have room around them are named; a name that finds no place is left out."""
    for look in seen["looks"]:
        for name in ("perplexity", "kl"):
            plot = look["plots"][name]
            assert len(plot["labels"]) >= (6 if name == "perplexity" else 5)
            assert not any(overlap(a, b) for a, b in combinations(plot["labels"], 2))
            assert not any(overlap(a, b) for a in plot["labels"] for b in plot["marks"])


def overlap(a: Box, b: Box) -> bool:
    """True when boxes have more in common than a rounded pixel."""
    across = min(a["right"], b["right"]) - max(a["left"], b["left"])
    down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
    return across > 1 and down > 1


def test_the_table_can_be_sorted(seen: Any) -> None:
    """A click on a heading sorts by numbers, another one the other way; no figure comes last."""
    by_bits = [*NAMES, "BF16 · Carnice-V2-27b"]

    assert by_bits == seen["sorted"]["up"]
    assert sorted(by_bits) == sorted(seen["sorted"]["down"])
    assert by_bits[-1] == seen["sorted"]["down"][0]


@pytest.mark.parametrize(("palette", "card"), [(LIGHT, "#ffffff"), (DARK, "#151b24")])
def test_marks_stand_out(palette: Palette, card: str) -> None:
    """Series stand out from the card, and text is readable on every shade of the shared tensors."""
    assert all(contrast(colour, card) >= VISIBLE for colour in palette.series)
    assert all(contrast(colour, palette.text) >= READABLE for colour in palette.soft)


def contrast(a: str, b: str) -> float:
    """Contrast of two #rrggbb by WCAG 2."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_the_page_is_one_file_of_bounded_size() -> None:
    """The same report gives the same page, mostly plotly's code, and no text of ours is markup."""
    page = render_page(sample_report())

    assert page == render_page(sample_report())
    assert len(page.encode()) < MOST_BYTES
    assert HOSTILE not in page


def test_the_markdown_table_has_a_row_a_variant() -> None:
    """Rows hold what is known; a dash stands for what is not, and the stand-ins are named."""
    lines = render_markdown(sample_report()).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}

    assert f"| {' | '.join(COLUMNS)} |" in lines
    assert [*NAMES] == [name for name in rows if name in NAMES]
    assert (
        "| w4a16-awq | 9.92 | 3.67 MB | 22.270 ± 1.050 | 0.01700 | 3.10 ± 0.20 | 40 of 48 | 12.3 s "
        "| 60, 20 shared | 25 | 3 passed |"
    ) == rows["w4a16-awq"]
    assert (
        "| qwen-nvfp4-text-mtp | 10.00 | 3.7 MB | – | – | – | – | – | – | – | not verified |"
    ) == rows[UNKNOWN]
    assert "demo stand-ins" in lines[2]
