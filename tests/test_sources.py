"""Which files of a checkpoint are the model, and what is said when they do not tell."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from tiny import (
    read_json,
    tiny_config,
    tiny_tensors,
    write_json,
    write_safetensors,
    write_shards,
)

from carnice_build.checkpoint.checkpoint import INDEX_NAME, open_checkpoint
from carnice_build.checkpoint.shards import Index, model_shards
from carnice_build.errors import CheckpointError

Damage = Callable[[Path], object]

THREE = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
FIVE = tuple(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6))
ONE = "model.safetensors"


def chosen(*names: str, index: tuple[str, ...] = ()) -> list[str]:
    """The shards of a folder of these files, whose index names `index`."""
    table = {f"tensor {number}": name for number, name in enumerate(index)}
    where = f"folder/{INDEX_NAME}"
    return model_shards("folder", names, Index(INDEX_NAME, where, table) if index else None)


CLEAR: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "one file": ((ONE,), (), (ONE,)),
    "one file of another name": (("weights.safetensors",), (), ("weights.safetensors",)),
    "an index": (THREE, THREE, THREE),
    "an index of one file": ((ONE,), (ONE,), (ONE,)),
    "an index of one file and another": (
        (ONE, "model_mtp.safetensors"),
        (ONE, "model_mtp.safetensors"),
        (ONE, "model_mtp.safetensors"),
    ),
    "numbers without an index": (THREE, (), THREE),
    "numbers that begin with 0": (
        ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        (),
        ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    ),
    "parts without an index": (
        ("text.safetensors", "vision.safetensors"),
        (),
        ("text.safetensors", "vision.safetensors"),
    ),
    "a part beside the one file": (
        (ONE, "mtp.safetensors"),
        (),
        (ONE, "mtp.safetensors"),
    ),
    "consolidated beside one file": ((ONE, "consolidated.safetensors"), (), (ONE,)),
    "consolidated beside numbers": ((*THREE, "consolidated.safetensors"), (), THREE),
    "consolidated beside an index": ((*THREE, "consolidated.safetensors"), THREE, THREE),
    "consolidated in numbers": ((ONE, "consolidated-00001-of-00002.safetensors"), (), (ONE,)),
    "consolidated alone": (("consolidated.safetensors",), (), ("consolidated.safetensors",)),
    "a variant beside one file": ((ONE, "model.fp16.safetensors"), (), (ONE,)),
    "a variant beside an index": (
        (*THREE, "model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.bf16.safetensors"),
        THREE,
        THREE,
    ),
    "a variant alone": (("model.fp16.safetensors",), (), ("model.fp16.safetensors",)),
    "something else beside an index": ((*THREE, "optimizer.safetensors"), THREE, THREE),
}


@pytest.mark.parametrize("what", CLEAR)
def test_the_files_say_which_is_the_model(what: str) -> None:
    """What transformers and mlx-lm would both load is taken, and nothing beside it."""
    names, index, expected = CLEAR[what]

    assert list(expected) == chosen(*names, index=index)


UNCLEAR: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "one file beside an index": (
        (*THREE, ONE),
        THREE,
        (f"holds {ONE} beside an index of other shards ({THREE[0]} and 2 more)", INDEX_NAME),
    ),
    "an index left over beside one file": (
        (ONE,),
        THREE,
        (f"holds {ONE} beside an index of 3 other shards, of which 3 are missing", INDEX_NAME),
    ),
    "an index left over beside a file of another name": (
        ("weights.safetensors",),
        THREE,
        ("holds weights.safetensors beside an index", "3 are missing"),
    ),
    "an index left over beside other numbers": (
        FIVE,
        THREE,
        (f"holds {FIVE[0]} and 4 more beside an index of 3 other shards", "3 are missing"),
    ),
    "other numbers beside an index": (
        (*THREE, *FIVE),
        THREE,
        (f"holds {FIVE[0]} and 4 more beside an index of other shards ({THREE[0]} and 2 more)",),
    ),
    "a file that mlx-lm would load beside an index": (
        (*THREE, "model_new.safetensors"),
        THREE,
        ("holds model_new.safetensors beside an index",),
    ),
    "two sets without an index": (
        (*THREE, *FIVE),
        (),
        ("holds several sets of shards and no index", f"{THREE[0]} and 2", f"{FIVE[0]} and 4"),
    ),
    "one file and a set without an index": (
        (*THREE, ONE),
        (),
        ("holds several sets of shards and no index", f"{THREE[0]} and 2 more", ONE),
    ),
    "half a set without an index": (THREE[:2], (), ("holds only 2 of 3 shards",)),
    "a set that could not be counted": (
        ("model-00001-of-999999999.safetensors",),
        (),
        ("holds only 1 of 999999999 shards",),
    ),
    "shards that are missing": (
        THREE[:1],
        THREE,
        ("names 2 shards that are missing", THREE[1], THREE[2]),
    ),
    "a shard that is missing": (THREE[:2], THREE, (f"names the shard {THREE[2]!r}, which is",)),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_a_choice_is_left_to_the_owner(what: str) -> None:
    """Where libraries would load different weights, both are named, and what to remove."""
    names, index, parts = UNCLEAR[what]

    with pytest.raises(CheckpointError) as caught:
        chosen(*names, index=index)
    for part in parts:
        assert part in str(caught.value)


def config_of_an_adapter(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})


def weights_of_an_adapter(folder: Path) -> None:
    write_safetensors(folder / "adapter_model.safetensors", {})


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("add", [config_of_an_adapter, weights_of_an_adapter, pickled_adapter])
def test_an_adapter_beside_a_model_is_refused(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint, shards: int, add: Damage
) -> None:
    """Weights that an adapter would change are not published as if they were the whole model."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=shards)
    add(folder)

    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_.*merge_and_unload"):
        open_checkpoint(folder)


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    """An adapter's folder, which has no config.json either, is called what it is."""
    config_of_an_adapter(tmp_path)
    weights_of_an_adapter(tmp_path)

    with pytest.raises(CheckpointError, match=r"is an adapter \(.*not a model; expected the adap"):
        open_checkpoint(tmp_path)


def test_a_folder_below_is_not_looked_at(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    """The publisher's own files in `original/` and an adapter's in a folder change nothing."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    before = open_checkpoint(folder)
    for name in ("original", "checkpoint-100"):
        (folder / name).mkdir()
        write_safetensors(folder / name / "consolidated.00.safetensors", {})
        config_of_an_adapter(folder / name)
    after = open_checkpoint(folder)

    assert list(before.tensors) == list(after.tensors)
    assert set(before.assets) == set(after.assets)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 7}, {"total_size": "many"}])
def test_an_index_is_read_for_its_map_alone(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint, metadata: object
) -> None:
    """Metadata that is missing or wrong changes nothing."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=3)
    index = read_json(folder / INDEX_NAME)
    expected = set(index["weight_map"])
    write_json(folder / INDEX_NAME, {"weight_map": index["weight_map"], "metadata": metadata})

    assert expected == set(open_checkpoint(folder).tensors)


def test_new_weights_beside_old_shards_are_a_question(tmp_path: Path) -> None:
    """The old shards do not win in silence, and either set alone is the model."""
    config = tiny_config(layers=4, mtp=False)
    write_json(tmp_path / "config.json", config)
    write_shards(tmp_path, tiny_tensors(config, seed=1), 2)
    write_safetensors(tmp_path / ONE, tiny_tensors(config, seed=2))

    with pytest.raises(CheckpointError, match=f"holds {ONE} beside an index"):
        open_checkpoint(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "old")
    (tmp_path / "old" / ONE).unlink()
    for path in (tmp_path / INDEX_NAME, *tmp_path.glob("model-*")):
        path.unlink()

    assert [ONE] == [path.name for path in tmp_path.glob("model*")]
    new, old = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "old")
    assert set(new.tensors) == set(old.tensors)
    assert {str(tmp_path / ONE)} == {item.file.name for item in new.tensors.values() if item.file}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 12807982\n"


def write_pointer(path: Path) -> None:
    """What a clone without Git LFS has in a file's place."""
    path.write_text(POINTER.format("ab" * 32))


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "model-00002-of-00002.safetensors"])
def test_a_pointer_is_called_one(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint, name: str
) -> None:
    """What Git leaves where Git LFS did not run is no broken JSON and no header of 2e18 bytes."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    write_pointer(folder / name)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(folder / name) == caught.value.where
    assert "is a Git LFS pointer" in str(caught.value)
    assert "git lfs pull" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "model-00002-of-00002.safetensors"])
def test_a_link_to_nothing_is_named(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint, name: str
) -> None:
    """A link whose file is gone is not the same as no file."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "gone")

    with pytest.raises(CheckpointError, match="is a link to nothing") as caught:
        open_checkpoint(folder)
    assert str(folder / name) == caught.value.where


def test_a_link_that_nothing_needs_is_no_error(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """A lost file that would not be read may be lost."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    for name in ("consolidated.safetensors", "training_args.bin", "tokenizer.model.old"):
        (folder / name).symlink_to("gone")

    assert open_checkpoint(folder).tensors


def test_all_that_disagrees_with_an_index_is_told(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """A headline, five lines, and how many more there are."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    index = read_json(folder / INDEX_NAME)
    ghosts = {f"ghost.{number}": "model-00001-of-00002.safetensors" for number in range(7)}
    write_json(folder / INDEX_NAME, {"weight_map": {**index["weight_map"], **ghosts}})

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    headline, *lines = str(caught.value).splitlines()
    assert f"{folder / INDEX_NAME}: names 7 tensors that no shard holds" == headline
    assert [f"'ghost.{number}'" in line for number, line in enumerate(lines[:5])] == [True] * 5
    assert ["  and 2 more"] == lines[5:]


def test_every_tensor_in_a_wrong_shard_is_told(
    tmp_path: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    """Each line names the file that holds the tensor, and what the index says."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    index = read_json(folder / INDEX_NAME)
    for name in list(index["weight_map"])[:2]:
        del index["weight_map"][name]
    write_json(folder / INDEX_NAME, index)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    headline, *lines = str(caught.value).splitlines()
    assert f"{folder}: holds 2 tensors in a wrong place" == headline
    assert [True, True] == ["is here, but the index does not name it" in line for line in lines]
