"""Make the shape files: what full-size checkpoints hold, without their weights.

    python -m benchmarks.make_shapes

A shape file is JSON with one tensor a line: name -> [dtype, shape], beside the checkpoint's
config.json.
In a file of format 2, `[0-2,5]` in a name stands for the numbers 0, 1, 2 and 5.
The planner reads it as it would read the headers of the real shards.

Known:

- Names and shapes are those of transformers' own classes on the meta device (see `architecture`).
- Qwen3.6-27B is BF16 throughout, `A_log` and `linear_attn.norm` included: its 1,199 tensors in BF16
  are 55,562,855,904 bytes, to the byte the `total_size` that a published full fine-tune of it
  states in its index. Qwen3.5-27B ships these two in F32 (vLLM pull request 51836 tells the two
  series apart the same way).
- Carnice-V2-27b has the prefix `language_model.` three times on every key, has its vision tower,
  lost its MTP head in the merge, and is about 54.7 GB of BF16 (model cards).
- The INT4 base packs seven projections of its MTP layer beside 8 BF16 tensors, 29 in all (model
  card), in groups of 128, symmetric, as `auto_round:auto_gptq`.
- The 40B has 96 layers, 72 of them linear attention, head_dim 256 and 4 KV heads (model card), and
  keeps the 27B's hidden size, since a 27B vision projector and MTP head fit it (model cards).

Assumed:

- Carnice's third level: `lm_head.weight`, which stood outside `model.`, gets the three prefixes in
  front; the others get them after `model.`, instead of the one they had or, for vision, none.
- Carnice's config.json is the base model's, so that it still announces the MTP head it lacks.
- The 40B's intermediate size, vocabulary and dtypes are the 27B's, and it carries an MTP head.
- The 40B's hub name is that of its GGUF release without the suffix.
- The INT4 base packs all linears of its decoder layers but the narrow `in_proj_a` and `in_proj_b`,
  and has the vision tower.
- `transformers_version` and the order of config.json's keys; nothing reads either.

The large models of `full_size`, known:

- Bytes of all tensors are, to the byte, the `total_size` that the indexes of Qwen3-235B-A22B
  (36,945 tensors), gpt-oss-120b and Kimi-K2-Instruct (139,644 tensors) state.
- Elements are, to the last one, those that the hub counts in Qwen3.6-35B-A3B and Gemma 4 31B (all
  BF16), GLM-4.6, and, by type, DeepSeek-V3 (BF16 3,918,786,560, F8_E4M3 680,571,043,840, F32
  41,555,600).
- Names, and shapes by the config, are those of transformers' classes, but for what the hub has
  otherwise: fused experts (Qwen3.6), blocks and scales (gpt-oss), `weight_scale_inv` (DeepSeek,
  Kimi), and MTP layers behind the last layer (DeepSeek, GLM), which vLLM's loaders name.
- GLM-4.6's MTP layer has no embedding and no head of its own (vLLM's error without them).

Assumed:

- That the rotary buffers, by which Kimi-K2-Instruct has 61 tensors of 112 bytes more than its
  architecture, are called `self_attn.rotary_emb.inv_freq`.
- That GLM-4.6's `e_score_correction_bias` is F32, as DeepSeek's is.
- Entries of configs that no tensor's shape follows from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import full_size
from benchmarks.architecture import (
    Config,
    Dimensions,
    Tensors,
    byte_count,
    model_config,
    tensor_table,
)
from carnice_build.checkpoint.checkpoint import open_checkpoint

SHAPES = Path(__file__).parent / "shapes"
TRIPLE = "language_model." * 3
BLOCKS = ("model.language_model.layers", "mtp.layers")
NARROW = (".in_proj_a.weight", ".in_proj_b.weight")
INT4: Config = {
    "bits": 4,
    "block_name_to_quantize": ",".join(BLOCKS),
    "data_type": "int",
    "group_size": 128,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}


@dataclass(frozen=True, slots=True)
class ShapeFile:
    """One model: its hub name, its config, and how its checkpoint spells and selects tensors."""

    file: str
    model: str
    size: Dimensions
    rename: Callable[[str], str] = str
    mtp_tensors: bool = True
    int4: bool = False


def triple_prefix(name: str) -> str:
    """A name as Carnice-V2-27b spells it."""
    if name.startswith("model."):
        return "model." + TRIPLE + name.removeprefix("model.").removeprefix("language_model.")

    return TRIPLE + name


MODELS = (
    ShapeFile("qwen3.6-27b.json", "Qwen/Qwen3.6-27B", Dimensions()),
    ShapeFile(
        "carnice-v2-27b.json",
        "kai-os/Carnice-V2-27b",
        Dimensions(),
        rename=triple_prefix,
        mtp_tensors=False,
    ),
    ShapeFile(
        "qwen3.6-27b-int4-autoround.json",
        "noonghunna/Qwen3.6-27B-int4-AutoRound",
        Dimensions(),
        int4=True,
    ),
    ShapeFile(
        "qwen3.6-40b-deckard.json",
        "DavidAU/Qwen3.6-40B-Claude-4.6-Opus-Deckard-Heretic-Uncensored-Thinking",
        Dimensions(layers=96),
    ),
)


@dataclass(frozen=True, slots=True)
class LargeModel:
    """A model that is told by ranges of numbers in names."""

    file: str
    model: str
    make: Callable[[], tuple[Config, full_size.Rows]]


LARGE = (
    LargeModel("qwen3.6-35b-a3b.json", "Qwen/Qwen3.6-35B-A3B", full_size.qwen35_moe),
    LargeModel("qwen3-235b-a22b.json", "Qwen/Qwen3-235B-A22B", full_size.qwen3_moe),
    LargeModel("gpt-oss-120b.json", "openai/gpt-oss-120b", full_size.gpt_oss),
    LargeModel("deepseek-v3.json", "deepseek-ai/DeepSeek-V3", full_size.deepseek_v3),
    LargeModel("kimi-k2.json", "moonshotai/Kimi-K2-Instruct", full_size.kimi_k2),
    LargeModel("glm-4.6.json", "zai-org/GLM-4.6", full_size.glm4_moe),
    LargeModel("gemma-4-31b.json", "google/gemma-4-31B-it", full_size.gemma4),
)


def describe(entry: ShapeFile) -> tuple[Config, Tensors]:
    """The config and the tensors of one model, names as its checkpoint spells them."""
    config = model_config(entry.size)
    tensors = {
        entry.rename(name): tensor
        for name, tensor in tensor_table(config).items()
        if entry.mtp_tensors or not name.startswith("mtp.")
    }
    if entry.int4:
        config |= {"quantization_config": INT4}
        tensors = dict(pair for item in tensors.items() for pair in packed(*item))

    return config, dict(sorted(tensors.items()))


def packed(name: str, tensor: tuple[str, list[int]]) -> list[tuple[str, tuple[str, list[int]]]]:
    """The three tensors of a linear that is packed to INT4, or the tensor as it is."""
    shape = tensor[1]
    if len(shape) != 2 or not name.startswith(BLOCKS) or name.endswith(NARROW):
        return [(name, tensor)]
    rows, columns = shape
    module, groups = name.removesuffix(".weight"), columns // INT4["group_size"]

    return [
        (f"{module}.qweight", ("I32", [columns // 8, rows])),
        (f"{module}.qzeros", ("I32", [groups, rows // 8])),
        (f"{module}.scales", ("F16", [groups, rows])),
    ]


def render(model: str, config: Config, tensors: Tensors, version: int = 1) -> str:
    """The text of a shape file: JSON, one setting and one tensor a line."""
    settings = json.dumps(config, indent=1).replace("\n", "\n ")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(t)}" for name, t in tensors.items())

    return (
        f'{{"format": "carnice-shapes-{version}",\n "model": {json.dumps(model)},\n'
        f' "config": {settings},\n "tensors": {{\n{lines}\n }}}}\n'
    )


def summary(entry: ShapeFile, tensors: Tensors) -> str:
    """One line a reader can hold against a model card."""
    vision = {name: tensor for name, tensor in tensors.items() if "visual." in name}
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    every, vision_bytes, mtp_bytes = (byte_count(part) for part in (tensors, vision, mtp))

    return (
        f"{entry.file}: {len(tensors)} tensors, {every:,} bytes; "
        f"text {every - vision_bytes - mtp_bytes:,}, "
        f"vision {vision_bytes:,} ({len(vision)}), mtp {mtp_bytes:,} ({len(mtp)})"
    )


def main() -> None:
    """Write every shape file and print its totals."""
    SHAPES.mkdir(exist_ok=True)
    for entry in MODELS:
        config, tensors = describe(entry)
        (SHAPES / entry.file).write_text(render(entry.model, config, tensors), encoding="utf-8")
        print(summary(entry, tensors))
    for large in LARGE:
        config, rows = large.make()
        path = SHAPES / large.file
        path.write_text(render(large.model, config, rows, version=2), encoding="utf-8")
        found = [tensor.spec for tensor in open_checkpoint(path).tensors.values()]
        total = sum(spec.nbytes for spec in found)
        print(f"{large.file}: {len(found)} tensors, {total:,} bytes")


if __name__ == "__main__":
    main()
