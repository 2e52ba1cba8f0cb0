"""Remotes that cannot be opened: one sentence says why, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable

import fsspec
import pytest
from conftest import Finished
from remotes import Team

from carnice_build.remote.drivers import shown

pytest_plugins = ["remotes"]

Carnice = Callable[..., Finished]

REFUSED = {
    "bucket/path": "is no URL of a remote; expected s3://BUCKET/PATH",
    "s3:/bucket": "is no URL of a remote",
    "s3://bucket/a path": "is no URL of a remote",
    "simplecache::s3://bucket/path": "is no URL of a remote",
    "file:///tmp::memory://x": "is no URL of a remote",
    "s4://bucket/path": "there are no remotes of the kind s4://; expected file://, s3://",
}


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.parametrize("command", ["plan", "build"])
def test_what_is_no_remote_is_refused(team: Team, carnice: Carnice, command: str, url: str) -> None:
    """With exit code 2, before anything is built."""
    finished = carnice(command, "mlx-4bit", "--remote", url)

    assert 2 == finished.code
    assert REFUSED[url] in finished.err
    assert not team.project.out.exists()


def missing(protocol: str) -> None:
    """What fsspec does where a driver is not installed."""
    raise ImportError(f"Install a driver for {protocol}")


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("sftp", "ssh")])
def test_a_missing_driver_is_named_with_its_extra(
    team: Team, carnice: Carnice, monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str
) -> None:
    """The sentence has the line that installs it."""
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    finished = carnice("plan", "mlx-4bit", "--remote", f"{scheme}://bucket/path")

    assert 2 == finished.code
    assert f"there is no driver for {scheme}:// here; expected pip install" in finished.err
    assert f"[{extra}]'" in finished.err


def test_missing_signatures_are_named_with_their_extra(
    pushed: Team, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package that checks them, nothing is believed and nothing is built."""
    monkeypatch.setitem(sys.modules, "cryptography", None)
    finished = carnice("build", "mlx-4bit", "--remote", pushed.url)

    assert 2 == finished.code
    assert "signatures need cryptography; expected pip install" in finished.err


@pytest.mark.parametrize(
    "command", [("build", "mlx-4bit", "--push"), ("cache", "pull", "mlx-4bit")]
)
def test_without_a_remote_there_is_nowhere_to_push(
    team: Team, carnice: Carnice, command: tuple[str, ...]
) -> None:
    """What needs one says how to name it."""
    finished = carnice(*command)

    assert 2 == finished.code
    assert "there is no remote; expected --remote URL" in finished.err


def test_an_empty_remote_has_nothing(team: Team, carnice: Carnice) -> None:
    """A place where nobody pushed yet is no error: builds build, and pulls bring nothing."""
    built = team.build("one")
    pulled = carnice("cache", "pull", "mlx-4bit", "--remote", team.url)

    assert 0 < built.result.actions_run
    assert [] == built.notices
    assert "fetched 0 tensors, 0 B" in pulled.out


SHOWN = {
    "s3://bucket/path": "s3://bucket/path",
    "s3://key:secret@bucket/path?token=x": "s3://bucket/path",
    "ssh://me:pass@host/srv/carnice": "ssh://host/srv/carnice",
    "file:///srv/carnice": "file:///srv/carnice",
    "secret": "",
}


@pytest.mark.parametrize("url", SHOWN)
def test_secrets_of_urls_are_not_shown(url: str) -> None:
    """Neither users nor passwords nor what follows a question mark."""
    assert SHOWN[url] == shown(url)
