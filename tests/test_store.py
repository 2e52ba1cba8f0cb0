"""The store keeps bytes under their digests, whatever happens to its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from carnice_build.checkpoint.header import encode_header
from carnice_build.dtypes import TensorSpec
from carnice_build.errors import StoreError
from carnice_build.store.answers import read_answer, write_answer
from carnice_build.store.digests import digest_bytes, digest_texts
from carnice_build.store.history import write_measured
from carnice_build.store.packs import PartialPack, digest_range
from carnice_build.store.store import Store
from carnice_build.store.upkeep import Collected, Damage, collect, find_damage, stats

Contents = dict[str, bytes]

contents = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0*"), min_size=1, max_size=8),
    st.binary(min_size=1, max_size=200),
    min_size=1,
    max_size=5,
).filter(lambda items: "__metadata__" not in items)
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def nobody_waits() -> None:
    raise AssertionError("the lock was taken")


class Writing:
    """A pack on its way into a store."""

    def __init__(self, store: Store, items: Contents, name: str = "") -> None:
        self.store = store
        self.items = items
        specs = [(key, TensorSpec("U8", (len(value),))) for key, value in items.items()]
        header = encode_header(specs, {"format": "test"})
        lengths = map(len, items.values())
        self.offsets = list(accumulate(lengths, initial=len(header)))[:-1]
        size = len(header) + sum(map(len, items.values()))
        self.layout = digest_texts([name, header.hex()])
        self.pack: PartialPack = store.partial(self.layout, header, size)

    def begin(self) -> None:
        assert self.pack.acquire(waiting=nobody_waits)
        self.pack.prepare()

    def write(self, count: int | None = None) -> list[str]:
        digests = []
        for value, offset in list(zip(self.items.values(), self.offsets, strict=True))[:count]:
            self.pack.write(offset, memoryview(value))
            digests.append(digest_bytes(value))
            self.store.records.set_place(digests[-1], self.layout, offset)
        return digests

    def whole(self) -> str:
        self.begin()
        digests = self.write()
        return self.store.finish(self.pack, digests, [1] * len(digests))


@given(items=contents)
@same_folder
def test_a_finished_pack_is_a_shard_that_safetensors_reads(tmp_path: Path, items: Contents) -> None:
    """The safetensors library finds every tensor of a pack, with its bytes."""
    with Store(tmp_path / "cache") as store:
        path = store.pack_path(Writing(store, items).whole())
    with safe_open(path, framework="numpy") as shard:
        found = {name: shard.get_tensor(name).tobytes() for name in shard.keys()}  # noqa: SIM118

    assert items == found


@given(items=contents)
@same_folder
def test_bytes_are_found_by_their_digest(tmp_path: Path, items: Contents) -> None:
    """Every tensor of a finished pack can be located, and its bytes have the digest asked for."""
    with Store(tmp_path / "cache") as store:
        Writing(store, items).whole()
        for value in items.values():
            location = store.locate(digest_bytes(value), len(value))

            assert location is not None
            assert digest_bytes(value) == digest_range(location.path, location.offset, len(value))


@given(items=contents, first=st.text(max_size=3), second=st.text(max_size=3))
@same_folder
def test_the_same_content_is_one_pack(
    tmp_path: Path, items: Contents, first: str, second: str
) -> None:
    """Two layouts that end up with the same bytes become one file."""
    with Store(tmp_path / "cache") as store:
        packs = {Writing(store, items, name).whole() for name in {first, second}}

    assert len(packs) == 1


def test_an_unfinished_pack_is_trusted_as_far_as_its_bytes_go(tmp_path: Path) -> None:
    """After a crash, what the records promise is digested: whole tensors are found, others not."""
    store = Store(tmp_path / "cache")
    writing = Writing(store, {"a": b"first", "b": b"second"})
    writing.begin()
    digests = writing.write()
    writing.pack.write(writing.offsets[1], memoryview(b"broken"))
    writing.pack.close()

    assert store.locate(digests[0], 5) is not None
    assert store.locate(digests[1], 6) is None


def test_a_pack_that_was_touched_is_named_and_not_used(tmp_path: Path) -> None:
    """A changed size or time takes a pack out; its whole tensors are still found, by digest."""
    with Store(tmp_path / "cache") as store:
        writing = Writing(store, {"a": b"first", "b": b"second"})
        path = store.pack_path(writing.whole())
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    os.utime(path, ns=(1, 1))
    store = Store(tmp_path / "cache")

    assert store.finished_pack(writing.layout) is None
    assert [str(path)] == store.damaged
    assert store.locate(digest_bytes(b"first"), 5) is not None
    assert store.locate(digest_bytes(b"second"), 6) is None


def test_rot_is_found_by_digesting_again(tmp_path: Path) -> None:
    """A flipped bit under an unchanged size and time is found, and the tensor named."""
    store = Store(tmp_path / "cache")
    path = store.pack_path(Writing(store, {"a": b"first", "b": b"second"}).whole())
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (damage,) = find_damage(store, lambda count: None)

    assert damage.tensors == ("b",)
    assert find_damage(store, lambda count: None) == []


def test_gc_removes_the_oldest_first_down_to_a_size(tmp_path: Path) -> None:
    """A size limit keeps the newest packs; a linked pack is never removed."""
    store = Store(tmp_path / "cache")
    paths = [
        store.pack_path(Writing(store, {"a": bytes([index]) * 50_000}).whole())
        for index in range(4)
    ]
    for index, path in enumerate(paths):
        os.utime(path, ns=(index, index))
    (tmp_path / "linked").hardlink_to(paths[0])
    used = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    collect(store, max_bytes=used - 60_000)

    assert [path.exists() for path in paths] == [True, False, False, True]


DAY = 86_400


def test_answers_are_counted_and_go_when_nobody_asks_for_them(tmp_path: Path) -> None:
    """Only with an age, for what no folder links to is asked for all the same."""
    store = Store(tmp_path / "cache")
    keys = [digest_texts([name]) for name in ("old", "asked again")]
    for key in keys:
        write_answer(store.root, key, "an answer")
        os.utime(store.root / "answers" / key, (0, 0))
    read_answer(store.root, keys[1])
    size = sum(path.stat().st_size for path in (store.root / "answers").iterdir())
    counted = stats(store)
    kept = collect(store), collect(store, max_bytes=0)
    removed = collect(store, max_age=DAY)

    assert (2, size) == (counted.answers, counted.answer_bytes)
    assert (Collected(0, 0), Collected(0, 0)) == kept
    assert Collected(1, size // 2) == removed
    assert [None, "an answer"] == [read_answer(store.root, key) for key in keys]


def test_figures_stay_and_states_behind_them_go(tmp_path: Path) -> None:
    """A figure is small and cost minutes; what a source's model computed takes megabytes."""
    store = Store(tmp_path / "cache")
    figure, states = (store.root / "measured" / digest_texts([name]) for name in ("one", "two"))
    write_measured(store.root, figure.name, {"figure": 1})
    states.write_bytes(bytes(2 << 20))
    counted = stats(store)
    removed = collect(store)
    kept = figure.exists()
    os.utime(figure, (0, 0))
    aged = collect(store, max_age=DAY)

    assert (2, (2 << 20) + aged.bytes) == (counted.figures, counted.figure_bytes)
    assert Collected(1, 2 << 20) == removed
    assert kept
    assert 1 == aged.files
    assert not figure.exists()


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ],
    ids=["empty", "cut off", "without its end", "changed"],
)
def test_a_damaged_answer_is_named_and_taken_out(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    """And asked for again, as any that is not there."""
    store = Store(tmp_path / "cache")
    keys = [digest_texts([name]) for name in ("whole", "damaged")]
    for key in keys:
        write_answer(store.root, key, "an answer")
    path = store.root / "answers" / keys[1]
    path.write_bytes(damaged(path.read_bytes()))
    read = read_answer(store.root, keys[1])
    (damage,) = find_damage(store, lambda count: None)

    assert read is None
    assert Damage(f"answers/{keys[1]}", ()) == damage
    assert not path.exists()
    assert "an answer" == read_answer(store.root, keys[0])
    assert [] == find_damage(store, lambda count: None)


def test_gc_waits_for_no_build(tmp_path: Path) -> None:
    """While a build uses the cache, gc refuses to remove anything."""
    store = Store(tmp_path / "cache")
    Writing(store, {"a": b"first"}).whole()
    with store.in_use(), pytest.raises(StoreError, match="a build is using the cache"):
        collect(store)

    assert stats(store).packs == 1


def test_blobs_are_kept_under_their_digest(tmp_path: Path) -> None:
    """A blob is found by digest; one whose bytes changed is not."""
    store = Store(tmp_path / "cache")
    digest = store.put_blob(memoryview(b"small"))
    location = store.locate(digest, 5)
    assert location is not None
    location.path.write_bytes(b"other")

    assert store.locate(digest, 5) is None


def test_what_an_action_made_is_known_when_its_bytes_are_gone(tmp_path: Path) -> None:
    """A key gives the content of every output; where the bytes are is asked for one by one."""
    specs = [TensorSpec("U8", (5,)), TensorSpec("U8", (6,))]
    store = Store(tmp_path / "cache")
    digests = [store.put_blob(memoryview(value)) for value in (b"first", b"second")]
    store.records.set_outputs("key", digests)
    outputs = store.lookup("key", specs)
    assert outputs is not None
    assert outputs.locate(1) == store.locate(digests[1], 6)
    store.drop_blob(digests[1])

    assert tuple(digests) == outputs.digests
    assert store.locate(digests[0], 5) == outputs.locate(0)
    assert outputs.locate(1) is None


def test_an_action_that_never_ran_has_no_outputs(tmp_path: Path) -> None:
    """An unknown key gives nothing, and so does one that made another number of outputs."""
    store = Store(tmp_path / "cache")
    store.records.set_outputs("key", [store.put_blob(memoryview(b"first"))])

    assert store.lookup("other", [TensorSpec("U8", (5,))]) is None
    assert store.lookup("key", [TensorSpec("U8", (5,))] * 2) is None


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
@same_folder
def test_nonsense_in_the_records_is_nothing(tmp_path: Path, value: object) -> None:
    """Whatever JSON stands where a fact should be, it reads as no fact or as one in right form."""
    with Store(tmp_path / "cache") as store:
        records = store.records
        for kind in ("source", "sample", "action", "place", "layout", "pack"):
            records._set(kind, "x", value)

        assert records.outputs("x", 2) is None
        assert records.place("x") is None
        assert records.pack("x") is None
        assert records.pack_of_layout("x") is None
        assert records.sampled_digest("x") is None


def test_bytes_whose_memory_was_given_back_are_on_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    writing = Writing(store, {"a": b"first", "b": b"second"})
    writing.begin()
    digests = writing.write()
    writing.pack.flush(forget=True)
    pack = store.finish(writing.pack, digests, [1] * len(digests))
    assert store.pack_path(pack).read_bytes().endswith(b"firstsecond")


def test_a_file_system_may_keep_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is no worse for it."""

    def refuse(*_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    store = Store(tmp_path / "cache")
    writing = Writing(store, {"a": b"first"})
    writing.begin()
    digests = writing.write()
    writing.pack.flush(forget=True)
    pack = store.finish(writing.pack, digests, [1] * len(digests))
    assert store.pack_path(pack).read_bytes().endswith(b"first")


def test_a_write_that_fails_late_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that an early flush meets stops the pack from being sealed."""
    store = Store(tmp_path / "cache")
    writing = Writing(store, {"a": b"first"})
    writing.begin()
    digests = writing.write()

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        writing.pack.flush(forget=False)

    with pytest.raises(OSError, match="Input/output error"):
        store.finish(writing.pack, digests, [1] * len(digests))
