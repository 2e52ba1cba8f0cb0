"""Make bench checkpoints: random weights in layers of true Qwen3.6-27B shape.

    python -m benchmarks.checkpoints --layers 4
    python -m benchmarks.checkpoints --layers 8 --mtp --vision

One layer in four has full attention; the vocabulary is 32768, so that 4 layers are 3.7 GB of BF16.
Shards of about 2 GB are written tensor by tensor, a few megabytes at a time.
`--tiny` makes the same thing 128 wide, for a look at what a tool does with such a checkpoint.
A checkpoint that is there already is left alone; a half-written one never gets its final name.

The tokenizer, chat template and generation config come from the demo checkpoint, because
`mlx_lm.convert` loads a tokenizer before it converts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.architecture import (
    ITEM_BYTES,
    Config,
    Dimensions,
    Tensors,
    byte_count,
    model_config,
    tensor_table,
)

ROOT = Path(__file__).parent.parent
WORK = ROOT / "benchmarks" / "work"
DEMO = ROOT / "demo" / "qwen3.6-27b"
INDEX = "model.safetensors.index.json"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 2_000_000_000
BLOCK = 1 << 22
SIGN_AND_LOW_BITS = 0x8007

TRUE_LAYERS = Dimensions(vocabulary=32768)
TINY_LAYERS = Dimensions(
    vocabulary=2048,
    hidden=128,
    intermediate=384,
    heads=4,
    kv_heads=2,
    head_dim=64,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_head_dim=64,
    vision_depth=2,
    vision_hidden=64,
    vision_intermediate=128,
    vision_heads=4,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the bytes of a bench checkpoint depend on, its demo files apart."""

    size: Dimensions
    vision: bool = False
    mtp: bool = False
    float32_state: bool = False
    shard_bytes: int = SHARD_BYTES


class Noise:
    """Normal values in BF16, made once and varied from tensor to tensor.

    Every stretch is the block from a place of its own, with the signs and the lowest bits flipped
    by a random mask from another place: as fast as memory, and no two tensors alike.
    """

    def __init__(self) -> None:
        """Make the block and the mask."""
        rng = np.random.default_rng(0)
        normal = rng.standard_normal(BLOCK, dtype=np.float32)
        mask = rng.integers(0, 1 << 16, BLOCK, dtype=np.uint16) & np.uint16(SIGN_AND_LOW_BITS)
        self._normal = np.tile(to_bf16(normal * np.float32(0.02)), 2)
        self._mask = np.tile(mask, 2)

    def stretches(self, name: str, count: int) -> Iterator[NDArray[np.uint16]]:
        """`count` values of the tensor `name`, as BF16 bits, a few megabytes at a time."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        while count:
            part = min(count, BLOCK)
            start, shift = (int(place) for place in rng.integers(0, BLOCK, 2))
            yield self._normal[start : start + part] ^ self._mask[shift : shift + part]
            count -= part


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of float32 values rounded to BF16, ties to even."""
    bits = values.view(np.uint32)

    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_checkpoint(
    path: Path | None = None,
    layers: int = 4,
    *,
    size: Dimensions = TRUE_LAYERS,
    vision: bool = False,
    mtp: bool = False,
    float32_state: bool = False,
    shard_bytes: int = SHARD_BYTES,
    demo: Path = DEMO,
) -> Path:
    """Write a checkpoint folder, unless it is there already, and return its path."""
    recipe = Recipe(replace(size, layers=layers), vision, mtp, float32_state, shard_bytes)
    path = path or WORK / default_name(recipe)
    if is_complete(path, recipe):
        return path
    if path.exists():
        raise FileExistsError(f"{path} holds something else; remove it or choose another place")
    if not (demo / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{demo} has no tokenizer.json: make the demo checkpoints first")

    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_files(partial, recipe, demo)
    partial.rename(path)

    return path


def default_name(recipe: Recipe) -> str:
    """A folder name that tells the options apart."""
    size = replace(recipe.size, layers=TRUE_LAYERS.layers)
    kind = {TRUE_LAYERS: "27b", TINY_LAYERS: "tiny"}.get(size, f"h{size.hidden}-v{size.vocabulary}")
    options = {"mtp": recipe.mtp, "vision": recipe.vision, "f32state": recipe.float32_state}
    chosen = [name for name, wanted in options.items() if wanted]

    return "-".join([kind, f"{recipe.size.layers}l", *chosen])


def is_complete(path: Path, recipe: Recipe) -> bool:
    """Whether the folder holds every shard of exactly this recipe."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        sizes = index["metadata"]["shard_sizes"]
        whole = all((path / shard).stat().st_size == size for shard, size in sizes.items())
    except (OSError, ValueError, LookupError):
        return False

    return whole and index["metadata"]["recipe"] == asdict(recipe)


def _write_files(folder: Path, recipe: Recipe, demo: Path) -> None:
    config = model_config(recipe.size, vision=recipe.vision, mtp=recipe.mtp)
    config = with_token_ids(config, demo)
    tensors = tensor_table(config, float32_state=recipe.float32_state)
    shards = split(tensors, recipe.shard_bytes)
    noise = Noise()
    sizes = {
        shard: write_shard(folder / shard, {name: tensors[name] for name in names}, noise)
        for shard, names in shards.items()
    }
    for name in TEXT_FILES:
        if (demo / name).is_file():
            shutil.copyfile(demo / name, folder / name)
    write_json(folder / "config.json", config)
    write_json(folder / INDEX, _index(tensors, shards, sizes, recipe))


def split(tensors: Tensors, shard_bytes: int) -> dict[str, list[str]]:
    """Shard file -> its tensors, filled in the order of names up to `shard_bytes`."""
    groups: list[list[str]] = []
    room = 0
    for name, (dtype, shape) in tensors.items():
        need = byte_count({name: (dtype, shape)})
        if not groups or need > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= need

    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def write_shard(path: Path, tensors: Tensors, noise: Noise) -> int:
    """Write one safetensors file, wider dtypes first as the format's own writer does; its size."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0])))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for name, (dtype, shape) in ordered.items():
            _write_tensor(file, name, dtype, prod(shape), noise)

        return file.tell()


def _header(tensors: Tensors) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + byte_count({name: (dtype, shape)})
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, name: str, dtype: str, count: int, noise: Noise) -> None:
    center = _center(name)
    for bits in noise.stretches(name, count):
        if center or dtype == "F32":
            values = (bits.astype(np.uint32) << 16).view(np.float32) + np.float32(center)
            file.write((values if dtype == "F32" else to_bf16(values)).data)
        else:
            file.write(bits.data)


def _center(name: str) -> float:
    """Where a trained tensor's values lie: scales that are not stored as 1 + w lie around 1."""
    vision_norm = ".visual." in name and ".norm" in name and name.endswith(".weight")
    around_one = vision_norm or name.endswith((".linear_attn.norm.weight", ".A_log", ".dt_bias"))

    return 1.0 if around_one else 0.0


def with_token_ids(config: Config, demo: Path) -> Config:
    """The config with the special token ids of the tokenizer that goes with it."""
    known = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    text = known.get("text_config", {})
    ids = {key: text[key] for key in TOKEN_IDS if key in text}
    outer = {key: known[key] for key in config if key.endswith("_token_id") and key in known}

    return {**config, **outer, "text_config": {**config["text_config"], **ids}}


def _index(
    tensors: Tensors, shards: dict[str, list[str]], sizes: dict[str, int], recipe: Recipe
) -> dict[str, Any]:
    places = {name: shard for shard, names in shards.items() for name in names}

    return {
        "metadata": {
            "total_size": byte_count(tensors),
            "recipe": asdict(recipe),
            "shard_sizes": sizes,
        },
        "weight_map": dict(sorted(places.items())),
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make one checkpoint from the command line."""
    parser = argparse.ArgumentParser(description="Make a bench checkpoint of random weights.")
    parser.add_argument("--layers", type=int, default=4, help="one in four has full attention")
    parser.add_argument("--vocabulary", type=int, help="rows of embedding and lm_head")
    parser.add_argument("--tiny", action="store_true", help="128 wide instead of 5120")
    parser.add_argument("--mtp", action="store_true", help="add the 15 tensors of the MTP head")
    parser.add_argument("--vision", action="store_true", help="add the vision tower")
    parser.add_argument("--float32-state", action="store_true", help="A_log and its norm in F32")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--demo", type=Path, default=DEMO, help="where the tokenizer comes from")
    parser.add_argument("--out", type=Path, help="folder to write (default: benchmarks/work/...)")
    options = parser.parse_args()
    size = TINY_LAYERS if options.tiny else TRUE_LAYERS
    start = time.perf_counter()
    try:
        path = make_checkpoint(
            options.out,
            options.layers,
            size=replace(size, vocabulary=options.vocabulary or size.vocabulary),
            vision=options.vision,
            mtp=options.mtp,
            float32_state=options.float32_state,
            shard_bytes=options.shard_bytes,
            demo=options.demo,
        )
    except (FileExistsError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    size_on_disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{os.path.relpath(path)}: {size_on_disk:,} bytes, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
