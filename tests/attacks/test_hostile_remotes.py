"""Hostile remotes: they cost time, never a byte, and what they say of themselves is never done."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacking import Attack, check_named, differing
from conftest import Finished
from remotes import Answered, Behaviour, Team, refusing, slow

from carnice_build.remote import calls, objects
from carnice_build.remote.batches import Body, PackEntry, encode, name_of
from carnice_build.remote.signing import new_key
from carnice_build.store.digests import digest_bytes, digest_texts

pytest_plugins = ["attacking", "remotes"]

Damage = Callable[[Team], object]


@pytest.fixture(autouse=True)
def honest(pushed: Team) -> dict[str, bytes]:
    """What an honest build leaves; the machine that pushed it is gone."""
    made = pushed.output("one")
    shutil.rmtree(pushed.project.root / "one")
    return {name.removeprefix("mlx-4bit/"): content for name, content in made.items()}


def check_harmless(finished: Finished, team: Team, honest: dict[str, bytes]) -> None:
    """The build went through, with the bytes of an honest one, and nothing of it is unprintable."""
    assert 0 == finished.code, finished.err
    assert [] == differing(honest, team.project.built("mlx-4bit"))
    assert finished.err.replace("\n", "").isprintable()


def every(folder: str, change: Callable[[bytes], bytes]) -> Damage:
    """Change all objects in a folder of the remote."""

    def damage(team: Team) -> None:
        for path in team.objects(folder):
            content = path.read_bytes()
            path.chmod(0o644)
            path.write_bytes(change(content))

    return damage


def one_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def longer_header(content: bytes) -> bytes:
    """A pack whose header says that everything lies 64 bytes further on."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * 64
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def huge_header(content: bytes) -> bytes:
    return (2**63).to_bytes(8, "little") + content[8:]


def rotated(team: Team) -> None:
    """Every pack has the bytes of another one."""
    paths = team.objects("packs")
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, [*contents[1:], contents[0]], strict=True):
        path.chmod(0o644)
        path.write_bytes(content)


ALTERED: dict[str, Damage] = {
    "a flipped bit": every("packs", one_bit),
    "other bytes": every("packs", lambda content: os.urandom(len(content))),
    "no bytes": every("packs", lambda content: b""),
    "half of the bytes": every("packs", lambda content: content[: len(content) // 2]),
    "more bytes": every("packs", lambda content: content * 3),
    "a header that lies about places": every("packs", longer_header),
    "a header that lies about its length": every("packs", huge_header),
    "packs under the names of others": rotated,
    "packs that are gone": lambda team: [path.unlink() for path in team.objects("packs")],
}


@pytest.mark.parametrize("what", ALTERED)
def test_altered_bytes_are_not_taken(
    pushed: Team, honest: dict[str, bytes], attack: Attack, what: str
) -> None:
    """What is not of its digest is made here instead."""
    ALTERED[what](pushed)

    check_harmless(attack("build", "mlx-4bit", "--remote", pushed.url), pushed, honest)


def test_altered_bytes_are_named(pushed: Team, attack: Attack) -> None:
    """A line says which object it was, and which tensor of it, and where."""
    every("packs", one_bit)(pushed)
    finished = attack("build", "mlx-4bit", "--remote", pushed.url)
    line = r"was altered \(1 tensor not fetched: '[\w.]+' of packs/\w+\.safetensors\)"

    assert re.search(re.escape(pushed.url) + r": packs/\w+\.safetensors " + line, finished.err)


# --- records --------------------------------------------------------------------------------------


def batch(team: Team) -> tuple[Path, dict[str, Any]]:
    """The only batch of a remote, and its envelope."""
    (path,) = team.objects("records")
    return path, json.loads(zlib.decompress(path.read_bytes()))


def put_batch(team: Team, content: bytes) -> None:
    """Put a batch under the name that fits."""
    (team.folder / "records" / name_of(content)).write_bytes(content)


def rewritten(team: Team, **fields: Any) -> None:
    """The batch with other fields in its envelope."""
    path, envelope = batch(team)
    path.unlink()
    put_batch(team, zlib.compress(json.dumps(envelope | fields).encode()))


def stranger(team: Team) -> Any:
    """A key that nobody trusts."""
    return new_key(team.project.root / "keys" / "stranger.pem")


def another_content(team: Team) -> str:
    """The body, in which each action has the outputs of another."""
    body = json.loads(batch(team)[1]["body"])
    keys, outputs = list(body["actions"]), list(body["actions"].values())
    body["actions"] = dict(zip(keys, [*outputs[1:], outputs[0]], strict=True))
    return json.dumps(body)


def signed_by_stranger(team: Team, key: str | None = None) -> None:
    """Another's content under each key, signed by a stranger, who may claim to be someone else."""
    signer, body = stranger(team), another_content(team)
    content = json.loads(zlib.decompress(encode(Body.model_validate_json(body), signer)))
    rewritten(team, **(content | ({"key": key} if key else {})))


def swapped(team: Team) -> None:
    """Two batches that have each other's names."""
    content = encode(Body(variants=["other"]), team.signer)
    put_batch(team, content)
    one, two = team.objects("records")
    contents = one.read_bytes(), two.read_bytes()
    two.write_bytes(contents[0])
    one.write_bytes(contents[1])


def bomb(size: int) -> bytes:
    return zlib.compress(b" " * size, 9)


def nested(team: Team) -> None:
    put_batch(team, zlib.compress(b'{"body":' * 100_000))


RECORDS: dict[str, Damage] = {
    "a flipped bit": every("records", one_bit),
    "garbage": every("records", lambda content: b"garbage"),
    "no bytes": every("records", lambda content: b""),
    "an end that is missing": every("records", lambda content: content[:-20]),
    "another body under the signature": lambda team: rewritten(team, body=another_content(team)),
    "a signature of nothing": lambda team: rewritten(team, signature=""),
    "a signature that is no base64": lambda team: rewritten(team, signature="\x1b[2J"),
    "a key of zeros": lambda team: rewritten(team, key=f"ed25519:{'A' * 43}="),
    "a key with escapes": lambda team: rewritten(team, key="\x1b[2J"),
    "another format": lambda team: rewritten(team, format=2),
    "a field that nobody knows": lambda team: rewritten(team, extra=1),
    "another's content signed by a stranger": signed_by_stranger,
    "a stranger who says to be trusted": lambda team: signed_by_stranger(team, team.signer.public),
    "batches that have each other's names": swapped,
    "a bomb": lambda team: put_batch(team, bomb(1_000_000_000)),
    "nesting": nested,
}


@pytest.mark.parametrize("what", RECORDS)
def test_hostile_records_count_as_absent(
    pushed: Team, honest: dict[str, bytes], attack: Attack, what: str
) -> None:
    """They are named, and the build makes what they spoke of."""
    RECORDS[what](pushed)
    finished = attack("build", "mlx-4bit", "--remote", pushed.url)

    check_harmless(finished, pushed, honest)
    assert "absent" in finished.err


FORMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name that leaves the folder": lambda body: body["packs"].update({"../../x": pack()}),
    "a blob that leaves the folder": lambda body: body["blobs"].update({"../" * 21 + "x": 1}),
    "a key that is no digest": lambda body: body["actions"].update({"x": []}),
    "an output that is no digest": lambda body: body["actions"].update({"a" * 64: ["/etc"]}),
    "a pack with another's digest": lambda body: body["packs"].update({"a" * 64: pack()}),
    "negative bytes": lambda body: body["blobs"].update({"a" * 64: -1}),
    "a number that is none": lambda body: body["figures"].update({"a" * 64: ["x"]}),
    "sizes that do not fit": lambda body: body["packs"].update({"a" * 64: pack(sizes=[1])}),
    "a table that nobody knows": lambda body: body.update(run="rm"),
}


def pack(**changes: Any) -> dict[str, Any]:
    """An entry for a pack."""
    entry = {"size": 100, "header": "a" * 64, "digests": [], "sizes": []}
    return entry | changes


@pytest.mark.parametrize("what", FORMS)
def test_bodies_of_another_form_count_as_absent(
    pushed: Team, honest: dict[str, bytes], attack: Attack, what: str
) -> None:
    """Even a trusted key can say nothing but digests, counts and numbers."""
    path, envelope = batch(pushed)
    path.unlink()
    body = json.loads(envelope["body"])
    FORMS[what](body)
    text = json.dumps(body)
    signature = pushed.signer.sign(b"carnice-remote 1\n" + text.encode())
    envelope |= {"body": text, "signature": signature}
    put_batch(pushed, zlib.compress(json.dumps(envelope).encode()))
    finished = attack("build", "mlx-4bit", "--remote", pushed.url)

    check_harmless(finished, pushed, honest)
    assert "is not of the form that batches have" in finished.err


def test_packs_that_lie_about_their_sizes_are_not_taken(
    pushed: Team, honest: dict[str, bytes], attack: Attack
) -> None:
    """A trusted batch with wrong places leads to other bytes, which are not of their digests."""
    path, envelope = batch(pushed)
    path.unlink()
    body = Body.model_validate_json(envelope["body"])
    lying = {
        name: PackEntry(
            size=entry.size + 64,
            header=entry.header,
            digests=entry.digests,
            sizes=entry.sizes,
        )
        for name, entry in body.packs.items()
    }
    put_batch(pushed, encode(body.model_copy(update={"packs": lying}), pushed.signer))

    check_harmless(attack("build", "mlx-4bit", "--remote", pushed.url), pushed, honest)


def test_replayed_records_are_true_or_without_bytes(
    pushed: Team, honest: dict[str, bytes], attack: Attack
) -> None:
    """A batch that was collected and is put back says what was always so; its objects are gone."""
    (path,) = pushed.objects("records")
    old = path.read_bytes()
    path.unlink()
    for item in pushed.objects("packs"):
        item.unlink()
    put_batch(pushed, old)

    check_harmless(attack("build", "mlx-4bit", "--remote", pushed.url), pushed, honest)


def test_many_batches_are_read_up_to_a_limit(
    pushed: Team, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest ones are looked at, and one line says that there are more."""
    from carnice_build.remote import remote

    monkeypatch.setattr(remote, "MOST_BATCHES", 10)
    for index in range(50):
        put_batch(pushed, encode(Body(variants=[str(index)]), pushed.signer))
    finished = attack("plan", "mlx-4bit", "--remote", pushed.url, "--json")

    assert 0 == finished.code
    (notice,) = json.loads(finished.out)["remote"]["notices"]
    assert "is older than the 10 that are looked at" in notice


# --- answers --------------------------------------------------------------------------------------


def answering(status: int) -> Callable[[Behaviour], None]:
    """Every request is answered with a status."""

    def change(behaviour: Behaviour) -> None:
        behaviour.hooks.append(refusing("read", lambda: Answered(status)))

    return change


def failing(kind: type[Exception], part: str = "") -> Callable[[Behaviour], None]:
    return lambda behaviour: behaviour.hooks.append(
        refusing("read", lambda: kind("SECRET \x1b[2J"), part)
    )


def reading(change: Callable[[str, bytes], bytes]) -> Callable[[Behaviour], None]:
    return lambda behaviour: setattr(behaviour, "changed", change)


def endless(path: str, content: bytes) -> bytes:
    return content + bytes(100_000_000)


ANSWERS: dict[str, Callable[[Behaviour], None]] = {
    "403 for all": answering(403),
    "503 for all": answering(503),
    "401 for all": answering(401),
    "403 for packs": lambda it: it.hooks.append(refusing("read", lambda: Answered(403), "/packs/")),
    "503 for packs": lambda it: it.hooks.append(refusing("read", lambda: Answered(503), "/packs/")),
    "503 for listings": lambda it: it.hooks.append(refusing("list", lambda: Answered(503))),
    "connections that are refused": lambda it: it.hooks.append(
        refusing("connect", ConnectionRefusedError)
    ),
    "connections that break": failing(ConnectionError),
    "errors that nobody knows": failing(RuntimeError),
    "errors for packs": failing(OSError, "/packs/"),
    "objects without end": reading(endless),
    "answers that are empty": reading(lambda path, content: b""),
    "other answers for packs": reading(
        lambda path, content: content[::-1] if "/packs/" in path else content
    ),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_hostile_answers_cost_time_alone(
    pushed: Team, honest: dict[str, bytes], behaviour: Behaviour, attack: Attack, what: str
) -> None:
    """The build goes on without the remote, or without what it does not give."""
    ANSWERS[what](behaviour)
    finished = attack("build", "mlx-4bit", "--remote", pushed.odd)
    if "format" in finished.err:
        check_named(finished, "the remote is of the format")
        return

    check_harmless(finished, pushed, honest)
    assert "odd://" in finished.err
    assert "SECRET" not in finished.err


def test_a_storm_is_given_up_after_few_requests(pushed: Team, behaviour: Behaviour) -> None:
    """503 for each of hundreds of requests is not waited out one by one."""
    behaviour.hooks.append(refusing("read", lambda: Answered(503)))
    remote = objects.Objects(pushed.odd)
    ranges = (objects.Range("FORMAT", 0, 1) for _ in range(1_000))
    with pytest.raises(calls.GivenUp, match="answered 503, again and again"):
        list(remote.read_ranges(ranges))

    assert behaviour.calls["read"] <= calls.ATTEMPTS * (objects.MOST_FAILURES + objects.WIDTH)


def test_what_is_forbidden_is_asked_once(pushed: Team, behaviour: Behaviour) -> None:
    """403 does not pass, so nobody asks again."""
    behaviour.hooks.append(refusing("read", lambda: Answered(403)))
    built = pushed.build("two", remote=pushed.odd)

    assert 1 == behaviour.calls["read"]
    assert [f"{pushed.odd}: the remote forbids it: going on without it"] == built.notices


@pytest.mark.parametrize("part", ["", "FORMAT", "/records/", "/packs/"])
def test_a_slow_drip_is_left(
    pushed: Team,
    honest: dict[str, bytes],
    behaviour: Behaviour,
    attack: Attack,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    """An answer that does not come in time is not waited for, nor are those behind it."""
    monkeypatch.setattr(calls, "PATIENCE", 0.2)
    monkeypatch.setattr(calls, "LEAST_RATE", 10_000_000)
    behaviour.hooks.append(slow("read" if part else "connect", 60, part))
    finished = attack("build", "mlx-4bit", "--remote", pushed.odd)

    check_harmless(finished, pushed, honest)
    assert "too slowly" in finished.err or "does not answer" in finished.err


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("folder", ["packs", "records", ""])
@pytest.mark.parametrize("change", [as_pipe, as_device, as_folder])
def test_objects_that_are_no_files_do_no_harm(
    pushed: Team,
    honest: dict[str, bytes],
    attack: Attack,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    change: Callable[[Path], None],
) -> None:
    """In a folder that is a remote, a pipe does not block, and a device is not read to its end."""
    monkeypatch.setattr(calls, "PATIENCE", 0.2)
    monkeypatch.setattr(calls, "FIRST_WAIT", 0.001)
    for path in pushed.objects(folder) if folder else [pushed.folder / "FORMAT"]:
        change(path)
    finished = attack("build", "mlx-4bit", "--remote", pushed.url)
    if finished.code:
        check_named(finished, "the remote is of the format")
    else:
        check_harmless(finished, pushed, honest)


def test_secrets_in_a_url_are_never_shown(pushed: Team, attack: Attack) -> None:
    """User, password and query are left out of whatever is said."""
    url = "s3://AKIA:PASSWORD@bucket/path?token=TOKEN"
    for command in ("plan", "build"):
        finished = attack(command, "mlx-4bit", "--remote", url)

        assert not any(word in finished.err + finished.out for word in ("AKIA", "PASSW", "TOKEN"))


FORMATS = [b"carnice-remote 2\n", b"\x1b[2J\x07", bytes(range(256)), b"", b"x" * 10_000_000]


@pytest.mark.parametrize("content", FORMATS, ids=lambda content: repr(content[:9]))
def test_a_remote_of_another_version_is_refused(
    pushed: Team, attack: Attack, content: bytes
) -> None:
    """One line says which, with code 2, and nothing is read or put there."""
    (pushed.folder / "FORMAT").write_bytes(content)
    for command in ("build", "plan"):
        finished = attack(command, "mlx-4bit", "--remote", pushed.url)

        check_named(finished, "the remote is of the format", "carnice-remote 1")


def test_names_of_packs_are_their_digests() -> None:
    """An entry names itself by header and contents, as a store does."""
    header = digest_bytes(b"header")
    entry = PackEntry(size=20, header=header, digests=["a" * 64], sizes=[10])

    assert digest_texts([header, "a" * 64]) == entry.identity


CONFIGS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "no text": lambda path: path.write_bytes(bytes(range(256))),
    "nesting": lambda path: path.write_text("x = " + "[" * 100_000),
    "escapes": lambda path: path.write_text('"\\u001b[2J" = 1'),
    "a key with escapes": lambda path: path.write_text('[trust]\nkeys = ["\\u001b[2J"]'),
    "a great length": lambda path: path.write_text("# " * 10_000_000 + "\nx = 1"),
    "numbers without end": lambda path: path.write_text(f"x = {'9' * 900_000}"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_hostile_configuration_is_named(pushed: Team, attack: Attack, what: str) -> None:
    """It is refused in a line with the file's name, or says nothing."""
    CONFIGS[what](pushed.project.root / "carnice.toml")
    finished = attack("plan", "mlx-4bit", "--remote", "")

    if finished.code:
        check_named(finished, "carnice.toml")
