"""What goes wrong on the way is waited out or is an error; no wrong byte becomes a weight."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import Finished, Project
from fake_hub import (
    CARNICE,
    TOKEN,
    Answer,
    FakeHub,
    cut,
    header,
    resized,
    stall,
    status,
    whole,
)
from huggingface_hub import constants
from tiny import Tensor, write_json, write_safetensors

from carnice_build.checkpoint import http_file, patience
from carnice_build.checkpoint.http_file import RemoteFile, Repository
from carnice_build.checkpoint.hub import open_hub
from carnice_build.checkpoint.patience import Unreachable, refused
from carnice_build.errors import CheckpointError
from carnice_build.tensors import SourceTensor

pytest_plugins = ["hub_fixtures"]

MB = 1 << 20
SHARD = r"\.safetensors$"
WEIGHT = bytes(range(256)) * (3 * MB // 256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor of 3 MB and a few small ones."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", {})
    tensors = {"weight": Tensor("U8", (3 * MB // 64, 64), WEIGHT)}
    tensors |= {f"small.{index}": Tensor("U8", (64,), bytes([index]) * 64) for index in range(20)}
    write_safetensors(path / "model.safetensors", tensors)
    return path


@pytest.fixture
def opened(hub: FakeHub, folder: Path) -> Callable[..., SourceTensor]:
    """`opened(name, stream=True)`: a tensor on the hub, of which only the header was read."""
    hub.add(CARNICE, folder)
    open_hub(CARNICE, "main", stream=True)

    def tensor(name: str = "weight", stream: bool = True) -> SourceTensor:
        checkpoint, _ = open_hub(CARNICE, "main", stream=stream)
        hub.forget()
        return checkpoint.tensors[name]

    return tensor


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between attempts, without waiting."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=found.append, time=time.time)
    monkeypatch.setattr(patience, "time", clock)
    return found


def read(tensor: SourceTensor, block: int = MB) -> bytes:
    """All bytes of a tensor, read in order in blocks."""
    assert tensor.file is not None
    content = bytearray(tensor.spec.nbytes)
    with tensor.file.open_range(tensor.offset, len(content)) as fill:
        for start in range(0, len(content), block):
            fill(memoryview(content)[start : start + block])
    return bytes(content)


def test_blocks_are_one_request(opened: Callable[..., SourceTensor], hub: FakeHub) -> None:
    """A tensor that is read block by block is asked for once."""
    tensor = opened()

    assert read(tensor, 10_000) == WEIGHT
    assert [(tensor.offset, tensor.offset + len(WEIGHT) - 1)] == hub.ranges()


def test_connections_are_reused(opened: Callable[..., SourceTensor], hub: FakeHub) -> None:
    """Twenty tensors come over one connection."""
    tensors = open_hub(CARNICE, "main", stream=True)[0].tensors
    hub.forget()
    for index in range(20):
        assert read(tensors[f"small.{index}"]) == bytes([index]) * 64

    assert len(hub.ranges()) == 20
    assert hub.connections["cdn"] <= 1


def test_memory_does_not_grow_with_the_tensor(opened: Callable[..., SourceTensor]) -> None:
    """A block is held, not the tensor."""
    tensor = opened()
    assert tensor.file is not None
    block = memoryview(bytearray(1 << 16))
    tracemalloc.start()
    with tensor.file.open_range(tensor.offset, len(WEIGHT)) as fill:
        for _ in range(len(WEIGHT) // len(block)):
            fill(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2 * MB


def test_cut_body_resumes_at_the_byte(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """After each cut the rest is asked for, from about where the body broke off."""
    tensor = opened()
    for count in (300_000, 1_000_000):
        hub.fail(SHARD, cut(count))

    assert read(tensor) == WEIGHT
    starts = [first - tensor.offset for first, _ in hub.ranges()]
    assert starts[0] == 0
    assert 200_000 <= starts[1] <= 300_000
    assert 1_000_000 <= starts[2] <= 1_300_000
    assert hub.bytes_sent <= len(WEIGHT) + 300_000
    assert len(waits) == 2


def test_short_body_resumes(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """A body that is shorter than its range, though whole by its length, is completed."""
    tensor = opened()
    hub.fail(SHARD, resized(-1000))

    assert read(tensor) == WEIGHT
    assert tensor.offset + len(WEIGHT) - 1000 == hub.ranges()[1][0]


def test_stall_is_ended(
    opened: Callable[..., SourceTensor],
    hub: FakeHub,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that falls silent is left after the timeout, and the rest asked for."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    tensor = opened()
    hub.fail(SHARD, stall(1))

    assert read(tensor) == WEIGHT
    assert hub.ranges()[1][0] > tensor.offset + MB


def test_waits_as_long_as_asked(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """429 with Retry-After is waited out; with the hub's own header too."""
    tensor = opened()
    hub.fail(SHARD, status(429, Retry_After="7"))
    hub.fail(SHARD, status(429, RateLimit='"resolvers";r=0;t=55'), host="hub")

    assert read(tensor) == WEIGHT
    assert sorted(waits) == [7, 55]


def test_waits_not_for_ever(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """A server that wants us to come back tomorrow is an error."""
    tensor = opened()
    hub.fail(SHARD, status(429, Retry_After="86400"))

    with pytest.raises(Unreachable, match="86400"):
        read(tensor)
    assert not waits


def test_server_errors_are_retried_with_growing_waits(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """Three answers of 500 and then the bytes."""
    tensor = opened()
    hub.fail(SHARD, status(500), times=3)

    assert read(tensor) == WEIGHT
    assert waits == [0.01, 0.02, 0.04]


def test_endless_errors_end(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """A server that never recovers is given up, with the file and the number of attempts."""
    tensor = opened()
    hub.fail(SHARD, status(503), times=99)

    with pytest.raises(Unreachable, match=r"ccccccc/model\.safetensors.*503.*6 attempts"):
        read(tensor)
    assert len(hub.ranges()) == 6


def test_endless_cuts_end(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """A server that gives a few bytes each time is given up too."""
    tensor = opened()
    hub.fail(SHARD, cut(1000), times=99)

    with pytest.raises(Unreachable):
        read(tensor)
    assert len(hub.ranges()) == 6


def test_expired_address_is_renewed(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """An address that was signed long ago is asked for again, without a wait."""
    checkpoint, _ = open_hub(CARNICE, "main", stream=True)
    read(checkpoint.tensors["small.1"])
    hub.fail(SHARD, status(403))

    assert read(checkpoint.tensors["weight"]) == WEIGHT
    assert waits == [0]


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (401, "GatedRepo", r"gated.*HF_TOKEN.*has access at http"),
        (403, "GatedRepo", r"gated.*HF_TOKEN.*has access at http"),
        (403, "", r"forbids.*HF_TOKEN"),
        (401, "RepoNotFound", r"401.*no such repository.*HF_TOKEN"),
        (404, "RevisionNotFound", r"no revision 'c{40}'"),
        (404, "EntryNotFound", r"no such file"),
        (416, "", r"shorter than when it was planned"),
    ],
)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "download"])
def test_refusals_say_what_to_do(
    opened: Callable[..., SourceTensor],
    hub: FakeHub,
    waits: list[float],
    code: int,
    error: str,
    message: str,
    stream: bool,
) -> None:
    """Nothing is retried; the error names the repository and the file, and not the token."""
    tensor = opened(stream=stream)
    headers = {"X_Error_Message": f"you sent {TOKEN}"} | ({"X_Error_Code": error} if error else {})
    hub.fail(SHARD, status(code, **headers), times=99, host="hub")

    with pytest.raises(CheckpointError, match=message) as caught:
        read(tensor)
    assert f"{CARNICE}@ccccccc/model.safetensors" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert len(hub.requests) == 1
    assert not waits


def test_no_refusal_repeats_the_password_of_an_endpoint() -> None:
    """As HF_ENDPOINT may have one for a hub of one's own."""
    response = httpx.Response(403, headers={"X-Error-Code": "GatedRepo"})
    error = refused(response, "model", "https://me:s3cr@t@hub.example", CARNICE, "main")

    assert f"has access at https://hub.example/{CARNICE}" in str(error)
    assert "s3cr" not in str(error)


def test_range_past_the_end_is_an_error(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """416 from the CDN: the file there is not the planned one."""
    tensor = opened()
    hub.fail(SHARD, status(416), times=99)

    with pytest.raises(CheckpointError, match="shorter than when it was planned"):
        read(tensor)
    assert len(hub.ranges()) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (whole, "answered 200 to a request for a range"),
        (header("Content-Range", "bytes 0-99/100"), r"not the file.*'bytes 0-99/100'"),
        (header("Content-Encoding", "gzip"), "encoded"),
        (resized(1), "more than asked"),
    ],
    ids=["whole", "range", "encoding", "longer"],
)
def test_wrong_answers_are_errors(
    opened: Callable[..., SourceTensor],
    hub: FakeHub,
    waits: list[float],
    fault: Callable[[Answer], None],
    message: str,
) -> None:
    """A body that is not the range that was asked for is not read."""
    tensor = opened("small.19")
    hub.fail(SHARD, fault, times=99)
    assert tensor.file is not None
    buffer = bytearray(64)

    with pytest.raises(CheckpointError, match=message):
        tensor.file.read_into(8, memoryview(buffer))
    assert not waits


def test_a_redirect_to_plain_http_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is on the way, where the hub itself is asked over TLS."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.scheme == "https":
            return httpx.Response(302, headers={"Location": "http://cdn.example/there"})
        headers = {"Content-Range": "bytes 0-63/64"}
        return httpx.Response(206, headers=headers, content=bytes(64))

    hub = Repository("https://hub.example", CARNICE, "c" * 40)
    file = RemoteFile(hub, "model.safetensors", 64, "content")
    monkeypatch.setattr(file, "locate", lambda: ("https://cdn.example/here", True))
    asking = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(http_file, "client", lambda: asking)

    with pytest.raises(CheckpointError, match="no safe address"):
        file.read_into(0, memoryview(bytearray(64)))


def test_changed_file_on_the_cdn_is_an_error(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """The rest of a tensor must come from the file that the beginning came from."""
    tensor = opened()

    hub.fail(SHARD, cut(1_000_000))
    hub.fail(SHARD, header("ETag", '"another"'))

    with pytest.raises(CheckpointError, match=r"not the file that was planned.*'another'"):
        read(tensor)


def test_changed_file_on_the_hub_is_an_error(
    opened: Callable[..., SourceTensor], hub: FakeHub, waits: list[float]
) -> None:
    """The hub must name the content that was planned whenever it is asked."""
    tensor = opened()
    hub.fail(SHARD, cut(1_000_000))

    def change_after_cut(request: object, answer: Answer) -> Answer:
        if answer.cut:
            hub.repos[CARNICE].changed.add("model.safetensors")
        return answer

    hub.faults.append(change_after_cut)

    with pytest.raises(CheckpointError, match="not the file that was planned: its ETag"):
        read(tensor)


def test_another_commit_is_an_error(opened: Callable[..., SourceTensor], hub: FakeHub) -> None:
    """The hub must answer for the commit that was asked for."""
    tensor = opened()
    hub.fail(SHARD, header("X-Repo-Commit", "e" * 40), host="hub")

    with pytest.raises(CheckpointError, match="another commit"):
        read(tensor)


def test_redirect_to_a_file_is_not_followed(
    opened: Callable[..., SourceTensor], hub: FakeHub
) -> None:
    """An address of another kind is refused."""
    tensor = opened()
    hub.fail(SHARD, header("Location", "file:///etc/passwd"), host="hub")

    with pytest.raises(CheckpointError, match="no safe address"):
        read(tensor)


def test_download_survives_a_cut(opened: Callable[..., SourceTensor], hub: FakeHub) -> None:
    """A download that breaks off goes on where it was."""
    tensor = opened(stream=False)
    hub.fail(SHARD, cut(1_000_000))

    assert read(tensor) == WEIGHT
    assert hub.bytes_sent < 1.5 * len(WEIGHT)


def test_wrong_download_is_an_error_and_not_kept(
    opened: Callable[..., SourceTensor], hub: FakeHub, folder: Path
) -> None:
    """What has another hash than the list says is removed from the Hugging Face cache."""
    tensor = opened(stream=False)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"model\.safetensors.*another hash"):
        read(tensor)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.mark.parametrize("mode", [(), ("--stream",)], ids=["download", "stream"])
def test_change_between_plan_and_read_stops_the_build(
    online: Project, hub: FakeHub, carnice: Callable[..., Finished], mode: tuple[str, ...]
) -> None:
    """Exit code 2, the file's name, and no output."""
    carnice("plan", "mlx-4bit", "--profile", "online")
    for path in online.checkpoint.glob("*.safetensors"):
        content = path.read_bytes()
        hub.repos[CARNICE].content_id(path.name)
        path.write_bytes(content[:-1] + b"!")
    hub.fail(SHARD, header("X-Linked-Etag", f'"{"f" * 64}"'), times=99, host="hub")
    finished = carnice("build", "mlx-4bit", "--profile", "online", *mode)

    assert finished.code == 2
    assert ".safetensors" in finished.err
    assert not (online.out / "mlx-4bit").exists()


def test_long_header_takes_two_requests(hub: FakeHub, tmp_path: Path) -> None:
    """A header beyond the first piece is fetched whole, and remembered."""
    path = tmp_path / "long"
    path.mkdir()
    write_json(path / "config.json", {})
    names = [f"{'x' * 200}.{index}" for index in range(1000)]
    write_safetensors(path / "model.safetensors", {n: Tensor("U8", (1,), b"1") for n in names})
    hub.add(CARNICE, path)

    first, _ = open_hub(CARNICE, "main", stream=True)
    second, _ = open_hub(CARNICE, "main", stream=True)

    assert list(first.tensors) == list(second.tensors) == names
    assert len(hub.ranges()) == 2


def test_damaged_notes_are_asked_for_again(
    opened: Callable[..., SourceTensor], hub: FakeHub
) -> None:
    """A header on disk that rotted is fetched anew."""
    for note in Path(constants.HF_ASSETS_CACHE).rglob("header-*"):
        note.write_bytes(note.read_bytes()[:-1] + b"~")
    hub.forget()

    assert "weight" in open_hub(CARNICE, "main", stream=True)[0].tensors
    assert len(hub.ranges()) == 1
