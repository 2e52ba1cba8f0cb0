"""The report's files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from carnice_build.commands.report import Report
from carnice_build.errors import BackendError
from carnice_build.report.report_table import render_markdown
from carnice_build.store.files import io_errors_named, write_atomically

MISSING = "plotly is not installed: pip install 'carnice-build[report]'"


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `index.html` and `report.md` into `folder`; BackendError when plotly is missing."""
    if find_spec("plotly") is None:
        raise BackendError(MISSING)
    from carnice_build.report.report_page import render_page

    contents = {"index.html": render_page(report), "report.md": render_markdown(report)}
    with io_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    return [folder / name for name in contents]
