"""The report's files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from carnice_build.commands.report import Report
from carnice_build.errors import BackendError, StoreError
from carnice_build.extras import pip_install
from carnice_build.report.report_table import render_markdown
from carnice_build.store.files import write_atomically


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `index.html` and `report.md` into `folder`.

    Raises BackendError when plotly is missing, StoreError when the folder cannot be written to.
    """
    if find_spec("plotly") is None:
        raise BackendError(f"plotly is not installed: {pip_install('report')}")
    from carnice_build.report.report_page import render_page

    contents = {"index.html": render_page(report), "report.md": render_markdown(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise StoreError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    return [folder / name for name in contents]
