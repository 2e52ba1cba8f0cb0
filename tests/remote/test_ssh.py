"""A folder of another machine as a remote, by SFTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from remotes import Behaviour, Team

pytest.importorskip("paramiko")

from sftp_server import PASSWORD, sftp_server

pytest_plugins = ["remotes"]


@pytest.fixture
def url(team: Team) -> Iterator[str]:
    """A remote on a server."""
    team.folder.mkdir()
    with sftp_server(team.folder) as address:
        yield f"{address}/shared/carnice"


def test_a_folder_of_another_machine_is_a_remote(team: Team, url: str) -> None:
    """What one machine pushed another fetches, with the same bytes."""
    pushed = team.build("one", remote=url, push=True)
    fetched = team.build("two", remote=url)

    assert 0 < pushed.result.actions_run
    assert (0, True) == fetched.counts
    assert [] == pushed.notices + fetched.notices
    assert team.output("one") == team.output("two")


def test_pushing_again_puts_nothing(team: Team, url: str) -> None:
    """Listings tell sizes."""
    team.build("one", remote=url, push=True)

    assert 0 == team.build("one", remote=url, push=True).result.pushed_bytes


@pytest.mark.parametrize("wrong", [("thePass", "another"), ("127.0.0.1", "127.0.0.2")])
def test_a_server_that_lets_nobody_in_is_done_without(
    team: Team, url: str, behaviour: Behaviour, wrong: tuple[str, str]
) -> None:
    """A wrong password, or nobody there: one notice, which does not show the password."""
    built = team.build("one", remote=url.replace(*wrong))

    assert 0 < built.result.actions_run
    (notice,) = built.notices
    assert "going on without it" in notice
    assert PASSWORD not in notice
