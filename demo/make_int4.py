"""Makes `qwen3.6-27b-int4-autoround/` of `qwen3.6-27b/`: `python demo/make_int4.py`.

Needs `pip install -e '.[autoround]'` and takes some minutes on one core.
Every decoder layer is tuned by AutoRound on what the layers before it make of the calibration
samples; the layer of the MTP head on the states and tokens that it drafts from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bpe
import corpus
import data
import export
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from carnice_build.backends.autoround import (
    AutoRoundSettings,
    QuantizedLinear,
    TunedLayer,
    tune_layer,
)
from carnice_build.backends.tensors import as_data
from carnice_build.calibration.driver import Arithmetic, LayerDriver
from carnice_build.kernels.autoround import pack

HERE = Path(__file__).parent
BASE = HERE / "qwen3.6-27b"
INT4 = HERE / "qwen3.6-27b-int4-autoround"

BODY = "model.language_model."
BLOCKS = (f"{BODY}layers", "mtp.layers")
DRAFTER = "mtp.layers.0"
# Too narrow for INT4 kernels, and for auto-round.
NARROW = ("linear_attn.in_proj_a", "linear_attn.in_proj_b")
WHOLE = {"bits": 16, "data_type": "fp"}

SAMPLES, LENGTH = 32, 256
SETTINGS = AutoRoundSettings(iters=100, batch_size=8)


@dataclass(frozen=True)
class States:
    """Hidden states of all samples on their way through both models."""

    given: Sequence[Tensor]
    quantized: Sequence[Tensor] | None = None


def main() -> None:
    """Tunes, packs and writes."""
    # Decays of the gated delta rule underflow; as denormals they make a step five times slower.
    torch.set_flush_denormal(True)
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    tensors = export.read_tensors(BASE)
    tokenizer = bpe.load_tokenizer(BASE)
    tokens = calibration_tokens(tokenizer)
    linears: dict[str, QuantizedLinear] = {}
    for path, tuned in tuned_layers(config["text_config"], tensors, tokens):
        linears |= {f"{path}.{name}": linear for name, linear in tuned.linears.items()}
        print_figures(path, tuned, tensors)
    packed = dict(packed_tensors(tensors, linears))
    export.write_checkpoint(INT4, packed, tokenizer.backend_tokenizer, shards=2)
    config["quantization_config"] = quantization_config(tensors)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (INT4 / "config.json").write_text(text, encoding="utf-8")


def calibration_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Samples [32, 256] of what the model learnt from: half sources, half tool-call dialogues."""
    documents, _ = corpus.split_held_out(list(corpus.stdlib_documents()))
    source = data.document_stream(tokenizer, documents)
    lines = (HERE / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    dialogues = "".join(data.render(tokenizer, json.loads(line)) for line in lines)
    spoken = np.array(tokenizer.encode(dialogues))
    half = SAMPLES // 2
    chosen = [windows(stream, half) for stream in (source, spoken)]
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64))


def windows(stream: np.ndarray, count: int) -> np.ndarray:
    """`count` pieces of `LENGTH` tokens, evenly spread over a stream."""
    starts = np.linspace(0, len(stream) - LENGTH, count, dtype=int)
    return np.stack([stream[start : start + LENGTH] for start in starts])


def tuned_layers(
    text_config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokens: Tensor
) -> Iterator[tuple[str, TunedLayer]]:
    """Every decoder layer with its path, the one of the MTP head last."""
    arithmetic = Arithmetic("bfloat16", "sdpa", threads=1)
    states = States([embedded(tensors, sample) for sample in tokens])
    narrow = replace(SETTINGS, layer_bits=dict.fromkeys(NARROW, 16))
    layer_types = text_config["layer_types"]
    for index, layer_type in enumerate(layer_types):
        path = f"{BODY}layers.{index}"
        tuned = tune_layer(
            LayerDriver(text_config, index, arithmetic),
            below(tensors, path),
            states.given,
            states.quantized,
            narrow if layer_type == "linear_attention" else SETTINGS,
        )
        states = States(tuned.outputs, tuned.quantized_outputs)
        yield path, tuned
    assert states.quantized is not None
    given, quantized = (
        [drafter_input(text_config, tensors, *pair) for pair in zip(tokens, hidden, strict=True)]
        for hidden in (states.given, states.quantized)
    )
    layer = below(tensors, DRAFTER)
    # The head's layer is as any of full attention.
    driver = LayerDriver(text_config, layer_types.index("full_attention"), arithmetic)
    yield DRAFTER, tune_layer(driver, layer, given, quantized, SETTINGS)


def embedded(tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Rows of the embedding, [1, length, hidden]."""
    return tensors[f"{BODY}embed_tokens.weight"][tokens].unsqueeze(0)


def below(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors under a module's path, by the rest of their names."""
    prefix = f"{path}."
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


@torch.no_grad()
def drafter_input(
    text_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokens: Tensor,
    hidden: Tensor,
) -> Tensor:
    """What the layer of the MTP head is given at each position but the last.

    It is made of the state there, after the final norm, and of the token that follows.
    """

    def norm(name: str, states: Tensor) -> Tensor:
        module = Qwen3_5RMSNorm(states.shape[-1], eps=text_config["rms_norm_eps"])
        module.weight.data = tensors[f"{name}.weight"]
        normed: Tensor = module(states)
        return normed

    states = norm(f"{BODY}norm", hidden)[:, :-1]
    both = [
        norm("mtp.pre_fc_norm_embedding", embedded(tensors, tokens[1:])),
        norm("mtp.pre_fc_norm_hidden", states),
    ]
    return functional.linear(torch.cat(both, dim=-1), tensors["mtp.fc.weight"])


def packed_tensors(
    tensors: Mapping[str, Tensor], linears: Mapping[str, QuantizedLinear]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors on disk in the order of the source, three in place of each tuned weight."""
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if path in linears:
            for part, values in packed_linear(linears[path]).items():
                yield f"{path}.{part}", values
        else:
            yield name, tensor


def packed_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The three tensors of `auto_round:auto_gptq`; see `carnice_build.kernels.autoround`."""
    rows, columns = linear.weight.shape
    groups = linear.scale.shape[1]
    qweight = np.empty((columns // 8, rows), np.int32)
    qzeros = np.empty((groups, rows // 8), np.int32)
    scales = np.empty((groups, rows), np.float16)
    weight = as_data(linear.weight)
    bad = pack(weight.array, weight.dtype, linear.scale.numpy(), 0, qweight, qzeros, scales)
    assert bad < 0, "a tuned weight is not on its grid"
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return {part: torch.from_numpy(values) for part, values in parts.items()}


def quantization_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What config.json says to auto-round's and vLLM's loaders, under the tensors' own names."""
    paths = [name.removesuffix(".weight") for name in tensors]
    whole = [path for path in paths if path.endswith(NARROW) or path == "mtp.fc"]
    return {
        "autoround_version": version("auto-round"),
        "batch_size": SETTINGS.batch_size,
        "bits": SETTINGS.bits,
        "block_name_to_quantize": ",".join(BLOCKS),
        "data_type": "int",
        "extra_config": dict.fromkeys(whole, WHOLE),
        "group_size": SETTINGS.group_size,
        "iters": SETTINGS.iters,
        "nsamples": SAMPLES,
        "packing_format": "auto_round:auto_gptq",
        "quant_method": "auto-round",
        "seqlen": LENGTH,
        "sym": SETTINGS.sym,
    }


def print_figures(path: str, tuned: TunedLayer, tensors: Mapping[str, Tensor]) -> None:
    """The layer's errors, and the share of codes that are not the nearest on their scale."""
    moved = total = 0
    for name, linear in tuned.linears.items():
        scale = linear.scale.float().repeat_interleave(SETTINGS.group_size, dim=1)
        codes = (linear.weight / scale).round()
        nearest = (tensors[f"{path}.{name}.weight"] / scale).round().clamp(-8, 7)
        moved += int((codes != nearest).sum())
        total += codes.numel()
    print(
        f"{path}: mean squared error {tuned.nearest_loss:.6f} to nearest, {tuned.loss:.6f} tuned "
        f"({tuned.loss / tuned.nearest_loss:.0%}), {moved / total:.1%} of codes moved, "
        f"{time.process_time():.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
