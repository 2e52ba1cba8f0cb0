"""The package `acme-fp8`, made of the code blocks of docs/adding-a-format.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from pages import files_of, write_files

PAGE = "adding-a-format.md"
MODULE, PROFILE = "acme_fp8/__init__.py", "acme_fp8/serving/acme-fp8-vllm.yaml"


def install(site: Path, module: str | None = None) -> None:
    """Put the package of the page into the folder `site`, with another `module` if one is given."""
    for language in ("python", "yaml", "toml"):
        write_files(PAGE, language, site)
    if module is not None:
        (site / MODULE).write_text(module, encoding="utf-8")
    project = tomllib.loads((site / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def faulty(method: str) -> str:
    """The page's module in which every method of a name raises."""
    signature = re.compile(rf"(    def {method}\(.*?\) -> [^\n]*:\n)", re.DOTALL)
    raising = r"\1        raise LookupError('oh')\n"
    text, count = signature.subn(raising, files_of(PAGE, "python")[MODULE])
    assert count
    return text
