"""GGUF files of tiny models of several architectures, and what llama-quantize does with them.

Names and shapes are those of llama.cpp's files, widths are tiny.
`python tests/gguf_models.py PROGRAM` lets a llama-quantize write `golden/gguf_mixes.json` anew.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from carnice_build.checkpoint.gguf_types import TYPES
from carnice_build.checkpoint.gguf_values import Metadata, Value
from carnice_build.formats.gguf.mix_rules import KEPT_PARTS, MIXES
from carnice_build.formats.gguf.mixes import Request, Tensor

GOLDEN = Path(__file__).parent / "golden" / "gguf_mixes.json"

Shapes = dict[str, tuple[int, ...]]

ALIGNMENT = 32

ROWS = 32
"""Rows of matrices whose number of rows decides nothing."""


class Sample(NamedTuple):
    """A file to be quantized: its metadata, and its tensors in the converter's order."""

    metadata: Metadata
    tensors: list[Tensor]


def u32(**numbers: int) -> dict[str, Value]:
    """Metadata of numbers, `__` for a dot."""
    return {key.replace("__", "."): Value("u32", number) for key, number in numbers.items()}


def f32(**numbers: float) -> dict[str, Value]:
    """The same of floats."""
    return {key.replace("__", "."): Value("f32", number) for key, number in numbers.items()}


RMS = f32(attention__layer_norm_rms_epsilon=1e-6)
NORM = f32(attention__layer_norm_epsilon=1e-5)
SSM = u32(
    ssm__conv_kernel=4, ssm__inner_size=64, ssm__state_size=16, ssm__time_step_rank=4,
    ssm__group_count=2,
)  # fmt: skip


def sample(arch: str, layers: Sequence[Shapes], outside: Shapes, *more: dict[str, Value]) -> Sample:
    """A model of these layers; `more` are metadata of its architecture."""
    width = outside["token_embd.weight"][0]
    own = u32(block_count=len(layers), context_length=64, embedding_length=width)
    own |= {key: value for part in more for key, value in part.items()}
    shapes = dict(outside)
    for index, layer in enumerate(layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    metadata = {
        "general.architecture": Value("str", arch),
        "general.file_type": Value("u32", 1),
        **{f"{arch}.{key}": value for key, value in own.items()},
        "general.quantization_version": Value("u32", 2),
    }
    return Sample(
        metadata, [Tensor(name, shape, stored(name, shape)) for name, shape in shapes.items()]
    )


def stored(name: str, shape: tuple[int, ...]) -> str:
    """The type that the converter gives a tensor of a file of F16."""
    small = len(shape) < 2 or "ssm_conv1d" in name or "ffn_gate_inp" in name or "_norm" in name
    return "F32" if small else "F16"


def outside(width: int, *, tied: bool = False) -> Shapes:
    """What is in no layer."""
    shapes: Shapes = {"token_embd.weight": (width, 96), "output_norm.weight": (width,)}
    return shapes if tied else {**shapes, "output.weight": (width, 96)}


def attention(width: int, *, inner: int = 256) -> Shapes:
    """Attention as in Llama."""
    return {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, inner),
        "attn_k.weight": (width, ROWS),
        "attn_v.weight": (width, ROWS),
        "attn_output.weight": (inner, width),
    }


QK_NORMS: Shapes = {"attn_q_norm.weight": (32,), "attn_k_norm.weight": (32,)}


def dense(width: int, hidden: int) -> Shapes:
    """A feed-forward network as in Llama."""
    return {
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (width, hidden),
        "ffn_up.weight": (width, hidden),
        "ffn_down.weight": (hidden, width),
    }


def routed(width: int, hidden: int, experts: int, *, shared: bool = False) -> Shapes:
    """Experts in stacks, and a shared one."""
    shapes: Shapes = {
        "ffn_norm.weight": (width,),
        "ffn_gate_inp.weight": (width, experts),
        "ffn_gate_exps.weight": (width, hidden, experts),
        "ffn_up_exps.weight": (width, hidden, experts),
        "ffn_down_exps.weight": (hidden, width, experts),
    }
    if not shared:
        return shapes
    return shapes | {
        "ffn_gate_inp_shexp.weight": (width,),
        "ffn_gate_shexp.weight": (width, hidden),
        "ffn_up_shexp.weight": (width, hidden),
        "ffn_down_shexp.weight": (hidden, width),
    }


def experts(count: int, hidden: int) -> dict[str, Value]:
    """The metadata of experts."""
    return u32(expert_count=count, expert_used_count=2, expert_feed_forward_length=hidden)


def heads(query: int, key: int, size: int = 32) -> dict[str, Value]:
    """The metadata of attention."""
    return u32(
        attention__head_count=query, attention__head_count_kv=key,
        attention__key_length=size, attention__value_length=size, rope__dimension_count=size,
    )  # fmt: skip


def linear(width: int) -> Shapes:
    """Linear attention as in Qwen 3.5."""
    return {
        "attn_norm.weight": (width,),
        "attn_qkv.weight": (width, 128),
        "attn_gate.weight": (width, 64),
        "ssm_conv1d.weight": (4, 128),
        "ssm_dt.bias": (4,),
        "ssm_a": (4,),
        "ssm_beta.weight": (width, 4),
        "ssm_alpha.weight": (width, 4),
        "ssm_norm.weight": (16,),
        "ssm_out.weight": (64, width),
    }


def predictor(width: int) -> Shapes:
    """What a layer that predicts a further token has besides."""
    return {
        "nextn.eh_proj.weight": (2 * width, width),
        "nextn.enorm.weight": (width,),
        "nextn.hnorm.weight": (width,),
        "nextn.shared_head_norm.weight": (width,),
    }


def qwen35(arch: str, width: int, feed: Shapes, layers: int, *, tied: bool = False) -> Sample:
    """Qwen 3.5: three layers of linear attention, one of full, and a predictor."""
    full = attention(width) | QK_NORMS
    blocks = [(full if index % 4 == 3 else linear(width)) | feed for index in range(layers)]
    blocks.append(full | feed | predictor(width))
    sections = {"rope.dimension_sections": Value("[i32]", [8, 8, 0, 0])}
    more = u32(nextn_predict_layers=1, full_attention_interval=4)
    moe = experts(16, 256) if "ffn_gate_exps.weight" in feed else {}
    numbers = heads(8, 2)
    return sample(arch, blocks, outside(width, tied=tied), RMS, SSM, sections, more, moe, numbers)


def llama(
    layers: int, width: int, feed: Shapes, *more: dict[str, Value], tied: bool = False
) -> Sample:
    """Llama."""
    blocks = [attention(width) | feed] * layers
    return sample("llama", blocks, outside(width, tied=tied), RMS, *more)


def gemma4() -> Sample:
    """Gemma 4: embeddings of layers, full layers without values."""
    width, layers = 256, 14
    around = {
        "attn_post_norm.weight": (width,),
        "post_ffw_norm.weight": (width,),
        "layer_output_scale.weight": (1,),
        "inp_gate.weight": (width, 64),
        "proj.weight": (64, width),
        "post_norm.weight": (width,),
    }
    blocks = [attention(width) | QK_NORMS | dense(width, 512) | around for _ in range(layers)]
    for index in range(4, layers, 5):
        del blocks[index]["attn_v.weight"]
    common = outside(width, tied=True) | {
        "per_layer_token_embd.weight": (64 * layers, 96),
        "per_layer_model_proj.weight": (width, 64 * layers),
        "per_layer_proj_norm.weight": (64,),
        "rope_freqs.weight": (16,),
    }
    window = {
        "attention.sliding_window_pattern": Value("[bool]", [i % 5 != 4 for i in range(layers)])
    }
    more = u32(
        attention__sliding_window=16, embedding_length_per_layer_input=64,
        attention__key_length_swa=32, attention__value_length_swa=32,
    )  # fmt: skip
    counts = {
        "attention.head_count_kv": Value("[i32]", [2 + 2 * (i % 5 == 4) for i in range(layers)])
    }
    return sample("gemma4", blocks, common, RMS, heads(8, 2), counts, window, more)


def deepseek2(*, split: bool) -> Sample:
    """DeepSeek V2 and V3: latent attention, whose up-projection is `split` in newer files."""
    width, layers = 256, 12
    latent: Shapes = {
        "attn_norm.weight": (width,),
        "attn_q_a.weight": (width, 96),
        "attn_q_a_norm.weight": (96,),
        "attn_q_b.weight": (96, 192),
        "attn_kv_a_mqa.weight": (width, 80),
        "attn_kv_a_norm.weight": (64,),
        "attn_output.weight": (128, width),
    }
    if split:
        latent |= {"attn_k_b.weight": (32, 64, 4), "attn_v_b.weight": (64, 32, 4)}
    else:
        latent |= {"attn_kv_b.weight": (64, 256)}
    moe = routed(width, 64, 16, shared=True) | {"exp_probs_b.bias": (16,)}
    del moe["ffn_gate_inp_shexp.weight"]
    blocks = [latent | (dense(width, 512) if index < 3 else moe) for index in range(layers)]
    more = u32(
        leading_dense_block_count=3, attention__q_lora_rank=96, attention__kv_lora_rank=64,
        expert_shared_count=1,
    )  # fmt: skip
    scale = f32(expert_weights_scale=2.5)
    return sample(
        "deepseek2", blocks, outside(width), RMS, heads(4, 1), experts(16, 64), more, scale
    )


def glm4moe() -> Sample:
    """GLM 4.5: a dense layer, then experts, and a predictor."""
    width = 256
    moe = routed(width, 256, 16, shared=True) | {"exp_probs_b.bias": (16,)}
    del moe["ffn_gate_inp_shexp.weight"]
    feeds = [dense(width, 512), *[moe] * 16]
    blocks = [attention(width) | QK_NORMS | feed for feed in feeds]
    blocks[-1] |= predictor(width) | {"nextn.shared_head_head.weight": (width, 96)}
    more = u32(expert_shared_count=1, leading_dense_block_count=1, nextn_predict_layers=1)
    return sample("glm4moe", blocks, outside(width), RMS, heads(8, 2), experts(16, 256), more)


def gpt_oss(experts_type: str) -> Sample:
    """gpt-oss: widths that 256 does not divide, biases of two dimensions, experts of MXFP4."""
    width = 288
    moe = routed(width, 288, 16) | {
        "attn_sinks.weight": (8,),
        "attn_q.bias": (256,),
        "ffn_gate_inp.bias": (16,),
        "ffn_gate_exps.bias": (288, 16),
        "ffn_up_exps.bias": (288, 16),
        "ffn_down_exps.bias": (width, 16),
    }
    blocks = [attention(width) | moe] * 12
    window = u32(attention__sliding_window=16)
    made = sample("gpt-oss", blocks, outside(width), RMS, heads(8, 2), experts(16, 288), window)
    tensors = [
        item._replace(type=experts_type) if item.name.endswith("exps.weight") else item
        for item in made.tensors
    ]
    return Sample(made.metadata, tensors)


def nemotron_h() -> Sample:
    """Nemotron H: each layer is a mixer, attention or a feed-forward network."""
    width = 256
    mamba: Shapes = {
        "attn_norm.weight": (width,),
        "ssm_in.weight": (width, 164),
        "ssm_conv1d.weight": (4, 96),
        "ssm_conv1d.bias": (96,),
        "ssm_dt.bias": (4,),
        "ssm_a": (1, 4),
        "ssm_d": (1, 4),
        "ssm_norm.weight": (32, 2),
        "ssm_out.weight": (64, width),
    }
    relu = {
        "attn_norm.weight": (width,),
        "ffn_up.weight": (width, 512),
        "ffn_down.weight": (512, width),
    }
    kinds = [mamba, relu, mamba, attention(width), relu] * 4
    counts = {
        "attention.head_count": Value("[i32]", [8 * ("attn_q.weight" in kind) for kind in kinds]),
        "attention.head_count_kv": Value(
            "[i32]", [2 * ("attn_q.weight" in kind) for kind in kinds]
        ),
        "feed_forward_length": Value("[i32]", [512 * ("ffn_up.weight" in kind) for kind in kinds]),
    }
    return sample("nemotron_h", kinds, outside(width), RMS, NORM, SSM, counts)


def falcon() -> Sample:
    """Falcon: fused projections, no gates, rules of its own."""
    width = 256
    block: Shapes = {
        "attn_norm.weight": (width,),
        "attn_qkv.weight": (width, 320),
        "attn_output.weight": (256, width),
        "ffn_up.weight": (width, 512),
        "ffn_down.weight": (512, width),
    }
    return sample("falcon", [block] * 20, outside(width), NORM, u32(attention__head_count=8))


def gpt2() -> Sample:
    """GPT-2: positions as embeddings."""
    made = outside(256) | {"position_embd.weight": (256, 64)}
    block: Shapes = {
        "attn_norm.weight": (256,),
        "attn_qkv.weight": (256, 768),
        "attn_output.weight": (256, 256),
        "ffn_up.weight": (256, 512),
        "ffn_down.weight": (512, 256),
    }
    return sample("gpt2", [block] * 9, made, NORM, u32(attention__head_count=8))


def vision() -> Sample:
    """A vision tower, as `mmproj` files hold it."""
    names = ("attn_qkv", "attn_out", "ffn_up")
    shapes: Shapes = {
        "v.patch_embd.weight": (16, 16, 3, 256),
        "v.position_embd.weight": (256, 16),
        "mm.0.weight": (256, 256),
        "mm.0.bias": (256,),
    }
    for index in range(9):
        shapes |= {f"v.blk.{index}.{name}.weight": (256, ROWS) for name in names}
        shapes |= {
            f"v.blk.{index}.ffn_down.weight": (288, ROWS),
            f"v.blk.{index}.ln1.weight": (256,),
        }
    metadata = {"general.architecture": Value("str", "clip"), "general.file_type": Value("u32", 1)}
    return Sample(
        metadata, [Tensor(name, shape, stored(name, shape)) for name, shape in shapes.items()]
    )


VALUES: Shapes = {"attn_v.weight": (256, ROWS), "attn_output.weight": (256, 256)}
"""All that differs in models of 70B parameters, and what does not."""


def glm5_next() -> Sample:
    """GLM 5.3: much is kept or given Q8_0."""
    names = (
        "hc_attn_fn", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "ssm_f_a", "ssm_f_b",
        "indexer_compressor_gate", "indexer_compressor_ape", "ssm_g_a", "ssm_g_b", "ssm_beta",
        "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_q_a", "attn_q_b", "attn_output",
    )  # fmt: skip
    block = {f"{name}.weight": (256, ROWS) for name in names} | routed(256, 64, 16)
    latent = u32(
        attention__q_lora_rank=96, attention__kv_lora_rank=64, attention__key_length_mla=64,
        attention__value_length_mla=64, kda__head_dim=32, ssm__conv_kernel=4, expert_shared_count=1,
    )  # fmt: skip
    indexer = u32(
        attention__indexer__head_count=4, attention__indexer__key_length=32,
        attention__indexer__top_k=8, attention__indexer__kpool=4,
        hyper_connection__count=4, hyper_connection__sinkhorn_iterations=2,
    )  # fmt: skip
    epsilon = f32(hyper_connection__epsilon=1e-6)
    more = (RMS, heads(8, 8), experts(16, 64), latent, indexer, epsilon)
    blocks = [block] * 3 + [block | {"nextn.eh_proj.weight": (512, 256)}]
    return sample("glm5-next", blocks, outside(256), *more)


def bailingmoe3() -> Sample:
    """Ling 3: stacks of attention beside those of experts."""
    stacks: Shapes = {"attn_k_b.weight": (32, 64, 4), "attn_v_b.weight": (64, 32, 4)}
    latent = u32(
        attention__kv_lora_rank=64, attention__key_length_mla=64, attention__value_length_mla=64,
        kda__head_dim=32, ssm__conv_kernel=4, expert_shared_count=1,
        leading_dense_block_count=0, expert_gating_func=2,
    )  # fmt: skip
    more = (RMS, heads(8, 8), experts(16, 64), latent, f32(kda__gate_lower_bound=-5.0))
    return sample("bailingmoe3", [stacks | routed(256, 64, 16)] * 3, outside(256), *more)


def kept() -> Sample:
    """Names that have what keeps tensors from being quantized in them, each in a matrix."""
    parts = {part.strip(".").removesuffix(".weight") for part in KEPT_PARTS}
    shapes = {f"blk.0.x.{part}.x.weight": (256, ROWS) for part in sorted(parts)}
    shapes |= {f"blk.0.x.{part}.weight": (256, ROWS) for part in sorted(parts)}
    shapes |= {"blk.0.one.weight": (256, ROWS, 1), "blk.0.row.weight": (256, 1, 1)}
    shapes |= {"blk.0.rows.weight": (256, 1, 2)}
    return sample("llama", [{}], outside(256) | shapes, RMS, heads(8, 2))


def samples() -> dict[str, Sample]:
    """All models, by name."""
    wide = dense(256, 512)
    plain = [attention(256) | QK_NORMS | wide] * 20
    window = u32(attention__sliding_window=16)
    moe = [attention(256) | QK_NORMS | routed(256, 256, 16)] * 20
    two = [VALUES if index % 3 else routed(256, 256, 2) for index in range(16)]
    return {
        "qwen35": qwen35("qwen35", 256, wide, 20),
        "qwen35-narrow": qwen35("qwen35", 288, dense(288, 352), 8, tied=True),
        "qwen35moe": qwen35("qwen35moe", 256, routed(256, 256, 16, shared=True), 16),
        "llama": llama(20, 256, wide, heads(8, 2)),
        "llama-odd": llama(9, 100, dense(100, 512), u32(attention__head_count=10), tied=True),
        "llama-8-experts": llama(16, 256, routed(256, 256, 8), heads(8, 2), experts(8, 256)),
        "llama-70b": sample("llama", [VALUES] * 80, outside(256), RMS, heads(8, 1)),
        "llama-65b": sample("llama", [VALUES] * 80, outside(256), RMS, heads(8, 8)),
        "qwen2-70b": sample("qwen2", [VALUES] * 80, outside(256), RMS, heads(8, 4)),
        "jais2-70b": sample("jais2", [VALUES] * 68, outside(256), NORM, heads(8, 4)),
        "deci-70b": sample("deci", [VALUES] * 80, outside(256), RMS, heads(8, 4)),
        "olmo-70b": sample("olmo", [VALUES] * 80, outside(256), NORM, heads(8, 4)),
        "llama-embed-70b": sample("llama-embed", [VALUES] * 80, outside(256), RMS, heads(8, 4)),
        "qwen2-predicting": sample(
            "qwen2", [VALUES] * 81, outside(256), RMS, heads(8, 4), u32(nextn_predict_layers=1)
        ),
        "llama-2-experts": sample("llama", two, outside(256), RMS, heads(8, 2), experts(2, 64)),
        "qwen3": sample("qwen3", plain, outside(256, tied=True), RMS, heads(8, 4)),
        "qwen3moe": sample("qwen3moe", moe, outside(256), RMS, heads(8, 4), experts(16, 256)),
        "gemma3": sample("gemma3", plain, outside(256, tied=True), RMS, heads(8, 4), window),
        "gemma4": gemma4(),
        "glm4moe": glm4moe(),
        "deepseek2": deepseek2(split=True),
        "deepseek2-fused": deepseek2(split=False),
        "gpt-oss": gpt_oss("F16"),
        "gpt-oss-mxfp4": gpt_oss("MXFP4"),
        "nemotron_h": nemotron_h(),
        "falcon": falcon(),
        "gpt2": gpt2(),
        "clip": vision(),
        "glm5-next": glm5_next(),
        "bailingmoe3": bailingmoe3(),
        "kept": kept(),
    }


OPTIONS: Mapping[str, Request] = {
    "output and embedding": Request("Q4_K_M", output="Q8_0", embedding="Q4_0"),
    "output": Request("Q4_K_M", output="Q8_0"),
    "output and embedding of F16": Request("F16", output="Q8_0", embedding="BF16"),
    "embedding and its override": Request("Q4_K_S", embedding="Q8_0"),
    "pure": Request("Q4_K_M", pure=True),
    "pure IQ4_XS": Request("IQ4_XS", pure=True, importance=True),
    "overrides": Request("Q4_K_M"),
    "overrides of few bits": Request("IQ2_S", importance=True),
}
"""What is tried with all models besides the mixes."""

NAMED: Mapping[str, Mapping[str, str]] = {
    "embedding and its override": {"token_embd": "Q5_1"},
    "overrides": {
        "attn_v": "Q8_0",
        r"blk\.[0-3]\.ffn_down": "BF16",
        "ffn_(down|up)": "IQ4_NL",
    },
    "overrides of few bits": {r"^blk\.(1|2)\.attn_.*": "Q6_K"},
}
"""Which tensors are given a type by their names, where an option does that: the first that fits."""

WITH_IMPORTANCE = " with importance"


def requests(name: str, made: Sample) -> dict[str, Request]:
    """The cases of a model by name: mixes with and without an importance matrix, and options."""
    cases = {mix: Request(mix) for mix in MIXES}
    cases |= {mix + WITH_IMPORTANCE: Request(mix, importance=True) for mix in MIXES}
    cases |= {
        case: replace(request, named=named(NAMED.get(case, {}), made))
        for case, request in OPTIONS.items()
        if name != "llama-odd" or (request.output is None and request.embedding is None)
    }
    if name == "clip":
        # llama-quantize asks how many heads share one, of no layers, and ends.
        cases = {
            case: request for case, request in cases.items() if not re.match("IQ|Q2", request.mix)
        }
    return cases


def named(types: Mapping[str, str], made: Sample) -> dict[str, str]:
    """The types of tensors by their names, of types by expressions."""
    found = {}
    for item in made.tensors:
        fitting = [kind for pattern, kind in types.items() if re.search(pattern, item.name)]
        if fitting:
            found[item.name] = fitting[0]
    return found


LETTERS: Mapping[str, str] = {
    "F32": "f",
    "F16": "h",
    "BF16": "b",
    "Q8_0": "8",
    "Q6_K": "6",
    "Q5_K": "5",
    "Q4_K": "4",
    "Q3_K": "3",
    "Q2_K": "2",
    "Q5_1": "D",
    "Q5_0": "C",
    "Q4_1": "B",
    "Q4_0": "A",
    "IQ4_NL": "N",
    "IQ4_XS": "X",
    "IQ3_S": "S",
    "IQ3_XXS": "T",
    "IQ2_S": "U",
    "IQ2_XS": "V",
    "IQ2_XXS": "W",
    "IQ1_M": "M",
    "IQ1_S": "L",
    "MXFP4": "m",
}
"""A letter for each type, for goldens."""


def spelt(kinds: Iterable[str]) -> str:
    """Types as a word."""
    return "".join(LETTERS[kind] for kind in kinds)


def write(path: Path, made: Sample) -> Path:
    """The file of a sample, whose weights are zeros that take no room."""
    import gguf
    import numpy as np

    kinds = {"u16": "UINT16", "u32": "UINT32", "f32": "FLOAT32", "str": "STRING"}
    writer = gguf.GGUFWriter(path, made.metadata["general.architecture"].value)
    for key, (kind, value) in made.metadata.items():
        if kind.startswith("["):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[kind]])
    padded = 0
    for name, shape, kind in made.tensors:
        block = gguf.GGMLQuantizationType[kind]
        nbytes = TYPES[kind].row_bytes(shape[0]) * math.prod(shape[1:])
        in_bytes = gguf.quant_shape_to_byte_shape(shape[::-1], block)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), nbytes, raw_dtype=block)
        padded += -(-nbytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-path.stat().st_size // ALIGNMENT) * ALIGNMENT
    os.truncate(path, header + padded)
    return path


def write_importance(path: Path, tensors: Iterable[Tensor], datasets: Sequence[str]) -> Path:
    """An importance matrix of ones for these tensors, over 3 chunks."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape, _ in tensors:
        stack = shape[2] if len(shape) > 2 else 1
        writer.add_tensor(f"{name}.in_sum2", np.ones((stack, shape[0]), np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((stack, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Answer(NamedTuple):
    """What llama-quantize said: types by name in its order, and which are not as wanted."""

    types: dict[str, str]
    unfit: set[str]
    needs_importance: bool


def arguments(request: Request, importance: Path | None) -> list[str]:
    """The options of llama-quantize for a request."""
    given: list[str] = []
    if request.importance:
        given += ["--imatrix", str(importance)]
    for name, kind in request.named.items():
        given += ["--tensor-type", f"^{re.escape(name)}$={kind}"]
    if request.output is not None:
        given += ["--output-tensor-type", request.output]
    if request.embedding is not None:
        given += ["--token-embedding-type", request.embedding]
    return [*given, *["--pure"] * request.pure]


def run(program: str, *given: str) -> subprocess.CompletedProcess[str]:
    """A run of llama-quantize to its end."""
    return subprocess.run(
        [program, *given], capture_output=True, text=True, errors="replace", timeout=60
    )


def asked(program: str, path: Path, request: Request, importance: Path) -> Answer:
    """What a dry run of llama-quantize says of a file."""
    result = run(program, *arguments(request, importance), "--dry-run", str(path), request.mix)
    said = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(said[-2000:])
    types = {}
    line = r"^\[ *\d+/ *\d+\] (\S+) .*type = +(\S+), size =(.*)$"
    for name, kind, size in re.findall(line, said, re.MULTILINE):
        changed = re.search(r"\((\S+)\)$", size)
        types[name] = (changed[1] if changed else kind).upper()
    unfit = set(re.findall(r"^warning: (\S+) .*not divisible by", said, re.MULTILINE))
    return Answer(types, unfit, "will require an imatrix" in said)


def distinct(said: Mapping[str, str]) -> dict[str, str]:
    """What goldens say of a model: an importance matrix is left out where it changes nothing."""
    return {
        case: word
        for case, word in said.items()
        if not case.endswith(WITH_IMPORTANCE) or word != said[case.removesuffix(WITH_IMPORTANCE)]
    }


def renew(program: str) -> None:
    """Write the goldens anew."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, made in samples().items():
            path = write(Path(folder) / f"{name}.gguf", made)
            importance = write_importance(Path(folder) / "imatrix.gguf", made.tensors[:1], ["some"])
            said = {
                case: spelt(asked(program, path, request, importance).types.values())
                for case, request in requests(name, made).items()
            }
            found[name] = distinct(said)
    GOLDEN.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    renew(sys.argv[1])
