"""Whose records are believed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished
from remotes import Behaviour, Team

from carnice_build.remote.batches import Body, encode, name_of, open_envelope, read_body
from carnice_build.remote.signing import new_key

pytest_plugins = ["remotes"]

Carnice = Callable[..., Finished]


@pytest.fixture
def stranger(pushed: Team, monkeypatch: pytest.MonkeyPatch) -> Team:
    """A machine `two` with another key, where a remote has what `one` pushed."""
    other = pushed.project.root / "keys" / "other.pem"
    new_key(other)
    monkeypatch.setenv("CARNICE_KEY", str(other))
    return pushed


def test_records_of_unknown_keys_count_as_absent(stranger: Team) -> None:
    """The build makes everything itself, and names the key once."""
    built = stranger.build("two")

    assert built.counts[0] > 0
    assert 0 == built.result.fetched_bytes
    (notice,) = built.notices
    assert "counts as absent" in notice
    assert f"is signed by {stranger.signer.public}, which is not trusted" in notice
    assert stranger.output("one") == stranger.output("two")


def test_records_of_trusted_keys_are_believed(stranger: Team) -> None:
    """A key that `carnice.toml` lists is as good as one's own."""
    (stranger.project.root / "carnice.toml").write_text(
        f'[trust]\nkeys = ["{stranger.signer.public} our builder"]\n'
    )
    built = stranger.build("two")

    assert (0, True) == built.counts
    assert [] == built.notices


def test_a_key_that_is_no_longer_trusted_is_not_believed(stranger: Team) -> None:
    """Batches that were read before are judged anew each time."""
    config = stranger.project.root / "carnice.toml"
    config.write_text(f'[trust]\nkeys = ["{stranger.signer.public}"]\n')
    stranger.build("two")
    config.write_text("[trust]\nkeys = []\n")
    built = stranger.build("two", overrides=("quantize.bits=6",))

    assert 0 == built.result.fetched_bytes
    assert 1 == len(built.notices)


def test_a_batch_that_was_damaged_here_is_read_again(pushed: Team) -> None:
    """What the cache keeps of a remote is of its digest, or is not used."""
    pushed.build("two")
    (path,) = (pushed.project.root / "two" / "cache" / "remotes").rglob("records/*")
    path.write_bytes(b"damaged")
    built = pushed.build("two", overrides=("quantize.bits=6",))

    assert [] == built.notices
    assert pushed.objects("records")[0].read_bytes() == path.read_bytes()


def test_a_batch_that_arrived_damaged_is_asked_for_again(
    pushed: Team, behaviour: Behaviour
) -> None:
    """It counts as absent once, and not for good."""
    behaviour.changed = lambda path, content: content[::-1] if "/records/" in path else content
    damaged = pushed.build("two", remote=pushed.odd)
    behaviour.changed = lambda path, content: content
    built = pushed.build("two", "mlx-6bit", remote=pushed.odd)

    assert 0 == damaged.result.fetched_bytes
    assert "was altered" in damaged.notices[0]
    assert [] == built.notices


def body() -> Body:
    """Some body."""
    return Body(variants=["v"], actions={"a" * 64: ["b" * 64]})


def changed(content: bytes, **fields: object) -> tuple[str, bytes]:
    """A batch with other fields, under the name that fits its bytes."""
    envelope = json.loads(zlib.decompress(content)) | fields
    changed = zlib.compress(json.dumps(envelope).encode())
    return name_of(changed), changed


def test_signed_bodies_are_read(team: Team) -> None:
    """What one encodes, whoever trusts the key decodes."""
    content = encode(body(), team.signer)
    envelope = open_envelope(name_of(content), content)

    assert body() == read_body(envelope, {team.signer.public})


def test_equal_pushes_are_equal_bytes(team: Team) -> None:
    """The same contents by the same key have the same name."""
    assert encode(body(), team.signer) == encode(body(), team.signer)


def test_private_keys_are_for_their_owner_alone(team: Team) -> None:
    """The file is readable by nobody else, and is refused when it is."""
    assert 0o600 == team.key.stat().st_mode & 0o777

    team.key.chmod(0o644)
    with pytest.raises(Exception, match=r"others can read or write this key.*chmod 600"):
        team.build("one", push=True)


def test_pushing_needs_a_key(team: Team, carnice: Carnice) -> None:
    """Without one, the build ends before it begins, and says how to make one."""
    team.key.unlink()
    finished = carnice("build", "mlx-4bit", "--remote", team.url, "--push")

    assert 2 == finished.code
    assert "there is no key to sign with; expected `carnice cache keys new`" in finished.err
    assert not team.project.out.exists()


def test_keys_are_never_shown(pushed: Team, carnice: Carnice) -> None:
    """No output holds a line of the private key."""
    lines = [line for line in pushed.key.read_text().splitlines() if "-" not in line]
    for command in (("keys", "list"), ("stats", "--remote", pushed.url)):
        finished = carnice("cache", *command)

        assert 0 == finished.code
        assert not any(line in finished.out + finished.err for line in lines)


def test_keys_are_made_listed_and_trusted(
    team: Team, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`new` prints the public key, `trust` writes it to carnice.toml, `list` shows both."""
    path = team.project.root / "keys" / "new.pem"
    monkeypatch.setenv("CARNICE_KEY", str(path))
    made = carnice("cache", "keys", "new")
    public = made.out.split()[0]
    again = carnice("cache", "keys", "new")
    trusted = carnice("cache", "keys", "trust", team.signer.public, "the builder")
    listed = carnice("cache", "keys", "list")

    assert (0, 2, 0, 0) == (made.code, again.code, trusted.code, listed.code)
    assert "there is something already" in again.err
    assert public in listed.out
    assert f"{team.signer.public}  the builder" in listed.out
    assert 0o600 == path.stat().st_mode & 0o777


def test_trusting_keeps_what_the_file_says(team: Team, carnice: Carnice) -> None:
    """Comments and other sections stay; a key that is there is not added again."""
    config = team.project.root / "carnice.toml"
    text = '# ours\n[remote]\nurl = "file:///nowhere"\n\n[trust]\nkeys = []  # none yet\n'
    config.write_text(text)
    for _ in range(2):
        assert 0 == carnice("cache", "keys", "trust", team.signer.public).code
    after = config.read_text()

    assert 1 == after.count(team.signer.public)
    assert all(line in after for line in ("# ours", 'url = "file:///nowhere"', "# none yet"))


@pytest.mark.parametrize("key", ["", "ed25519:short", "rsa:abc", 'ed25519:"'])
def test_what_is_no_key_is_not_trusted(team: Team, carnice: Carnice, key: str) -> None:
    """It is refused, and nothing is written."""
    finished = carnice("cache", "keys", "trust", key)

    assert 2 == finished.code
    assert not (team.project.root / "carnice.toml").exists()


CONFIGS = {
    '[remote]\nurll = "x"\n': "unknown key remote.urll",
    "[remotes]\n": "did you mean 'remote'?",
    "[remote]\npush = 1\n": "remote.push is not valid; expected true or false",
    '[trust]\nkeys = ["abc"]\n': "trust.keys.0 is not valid",
    "not toml": "is no TOML",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_wrong_file_is_named(team: Team, carnice: Carnice, text: str) -> None:
    """A key that nobody knows, or a value of another type, ends with the file's name and code 2."""
    (team.project.root / "carnice.toml").write_text(text)
    finished = carnice("build", "mlx-4bit")

    assert 2 == finished.code
    assert "carnice.toml" in finished.err
    assert CONFIGS[text] in finished.err


def test_what_is_configured_is_used(pushed: Team, carnice: Carnice) -> None:
    """The file names the remote; the environment goes over it, and --remote over both."""
    (pushed.project.root / "carnice.toml").write_text(f'[remote]\nurl = "{pushed.url}"\n')
    finished = carnice("build", "mlx-4bit", "--json")

    assert 0 == finished.code, finished.err
    assert 0 == json.loads(finished.out)["actions_run"]


def test_the_environment_goes_over_the_file(
    pushed: Team, carnice: Carnice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CARNICE_REMOTE names another remote, and an empty one none."""
    (pushed.project.root / "carnice.toml").write_text('[remote]\nurl = "s4://nowhere"\n')
    monkeypatch.setenv("CARNICE_REMOTE", "")
    alone = json.loads(carnice("build", "mlx-4bit", "--json").out)
    monkeypatch.setenv("CARNICE_REMOTE", pushed.url)
    fetched = json.loads(carnice("build", "mlx-4bit", "--cache", Path("other"), "--json").out)

    assert alone["actions_run"] > 0 == fetched["actions_run"]
