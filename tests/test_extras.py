"""What optional dependencies miss is said in a line that can be typed as it stands."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from carnice_build import extras

REQUIRES = [
    "numpy>=1",
    'torch>=2; extra == "torch"',
    "datasets>=5; extra == 'torch'",
    'carnice-build[torch]; extra == "tune"',
    'tuner[all]==1; extra == "tune"',
    'plotly>=7; extra == "report"',
]


class Installed:
    """A distribution's metadata."""

    requires = REQUIRES

    def __init__(self, origin: dict[str, Any] | None = None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        """What pip leaves of where it took the package from."""
        assert "direct_url.json" == name
        return None if self._origin is None else json.dumps(self._origin)


def install(
    monkeypatch: pytest.MonkeyPatch, *names: str, origin: dict[str, Any] | None = None
) -> None:
    """Let these packages be installed, and no other."""

    def found(name: str) -> Installed:
        if name not in names:
            raise PackageNotFoundError(name)
        return Installed(origin)

    monkeypatch.setattr(extras, "distribution", found)


@pytest.mark.parametrize(
    ("names", "extra", "there"),
    [
        (["carnice-build", "torch", "datasets"], "torch", True),
        (["carnice-build", "torch"], "torch", False),
        (["carnice-build", "torch", "datasets"], "tune", False),
        (["carnice-build", "torch", "tuner"], "tune", False),
        (["carnice-build", "torch", "datasets", "tuner"], "tune", True),
        ([], "torch", False),
    ],
)
def test_an_extra_is_there_when_all_of_its_packages_are(
    names: list[str], extra: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the extras that it takes in, too."""
    install(monkeypatch, *names)

    assert there == extras.has_extra(extra)


def test_the_line_takes_the_package_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clone may be on no index; an index knows the name."""
    clone, elsewhere = tmp_path / "my clone", tmp_path / "elsewhere"
    clone.mkdir()
    elsewhere.mkdir()
    url = clone.as_uri()
    found = []
    for origin, current in (
        (None, clone),
        ({"url": url, "dir_info": {}}, clone),
        ({"url": url, "dir_info": {"editable": True}}, elsewhere),
        ({"url": elsewhere.as_uri() + "/gone", "dir_info": {}}, clone),
        ({"url": "https://a.b/c", "vcs_info": {"vcs": "git"}}, clone),
    ):
        install(monkeypatch, "carnice-build", origin=origin)
        monkeypatch.chdir(current)
        found.append(extras.pip_install("torch"))

    assert [
        "pip install 'carnice-build[torch]'",
        "pip install '.[torch]'",
        f"pip install -e '{clone}[torch]'",
        "pip install 'carnice-build[torch]'",
        "pip install 'carnice-build[torch] @ git+https://a.b/c'",
    ] == found
