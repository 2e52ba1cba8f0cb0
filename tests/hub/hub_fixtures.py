"""A hub that `huggingface_hub` takes for the real one, and a project whose models it has.

A plugin that the test modules name, because a second conftest.py would hide the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Project
from fake_hub import CARNICE, QWEN, TOKEN, FakeHub, fake_hub
from huggingface_hub import close_session, constants

from carnice_build.checkpoint import patience


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: None) -> Iterator[FakeHub]:
    """A running hub without repositories, and an empty Hugging Face cache.

    Workers are `cold`, for they read on import where the hub is.
    """
    home = tmp_path / "huggingface"
    with fake_hub() as server:
        template = server.hub_url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.hub_url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DOWNLOAD_TIMEOUT": 2,
            "HF_HUB_ETAG_TIMEOUT": 2,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
        yield server
    close_session()


@pytest.fixture
def online(project: Project, hub: FakeHub) -> Project:
    """A project whose profile `online` means the hub, which has both models."""
    with (project.recipes / "_profiles.yaml").open("a") as file:
        file.write("online: hub\n")
    hub.add(CARNICE, project.checkpoint, "c" * 40)
    hub.add(QWEN, project.base, "d" * 40)
    return project
