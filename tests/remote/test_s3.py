"""A bucket as a remote: moto's S3 server, which answers as the real one does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from conftest import Finished
from remotes import Team

pytest_plugins = ["remotes"]

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

Carnice = Callable[..., Finished]
BUCKET = "bucket"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server on the loopback interface."""
    threaded = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    yield f"http://{host}:{port}"
    threaded.stop()


@pytest.fixture
def bucket(endpoint: str, team: Team, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, by its URL; credentials and endpoint are in the environment."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "theSecretOfThisTest",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    if files.exists(BUCKET):
        files.rm(BUCKET, recursive=True)
    files.mkdir(BUCKET)
    return f"s3://{BUCKET}/team/carnice"


def test_a_bucket_is_a_remote(team: Team, bucket: str) -> None:
    """What one machine pushed another fetches, with the same bytes."""
    pushed = team.build("one", remote=bucket, push=True)
    fetched = team.build("two", remote=bucket)

    assert (91, 0) == (pushed.result.actions_run, fetched.result.actions_run)
    assert [] == fetched.notices
    assert 0 < fetched.result.fetched_bytes <= pushed.result.pushed_bytes
    assert team.output("one") == team.output("two")


def test_large_objects_are_put_and_read_in_parts(
    team: Team, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is larger than a request comes in several, and is digested as a whole."""
    from carnice_build.remote import download, objects

    monkeypatch.setattr(download, "REQUEST_BYTES", 10_000)
    monkeypatch.setattr(objects, "_IN_MEMORY", 10_000)
    team.build("one", remote=bucket, push=True)
    fetched = team.build("two", remote=bucket)

    assert (0, True) == fetched.counts
    assert team.output("one") == team.output("two")


def test_pushing_again_puts_nothing(team: Team, bucket: str) -> None:
    """One listing shows what is there."""
    team.build("one", remote=bucket, push=True)

    assert 0 == team.build("one", remote=bucket, push=True).result.pushed_bytes


def test_a_bucket_is_counted_and_collected(team: Team, bucket: str, carnice: Carnice) -> None:
    """Sizes and times are those that the bucket tells."""
    team.build("one", remote=bucket, push=True)
    stats = json.loads(carnice("cache", "stats", "--remote", bucket, "--json").out)
    spared = carnice("cache", "gc", "--remote", bucket, "--older-than", "1h", "--json")

    assert (4, 1, 1) == (stats["packs"], stats["batches"], stats["believed"])
    assert 0 == json.loads(spared.out)["files"], spared.err


def test_a_bucket_that_is_not_there_is_named(team: Team, bucket: str, carnice: Carnice) -> None:
    """Reading goes on without it; pushing says that it cannot."""
    other = bucket.replace(BUCKET, "missing")

    assert 91 == team.build("one", remote=other).result.actions_run
    cache = team.project.root / "one" / "cache"
    finished = carnice("cache", "push", "mlx-4bit", "--remote", other, "--cache", cache)
    assert 1 == finished.code
    assert f"{other}: cannot push" in finished.err
    assert "theSecretOfThisTest" not in finished.err


def test_missing_credentials_are_told_and_never_shown(
    team: Team, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build goes on without the bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    built = team.build("one", remote=bucket)

    assert 91 == built.result.actions_run
    (notice,) = built.notices
    assert f"{bucket}: the remote wants credentials, and there are none here" in notice
