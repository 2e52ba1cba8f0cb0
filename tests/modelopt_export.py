"""The demo's text model quantized and exported by modelopt itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

SAMPLES, LENGTH = 3, 96
"""The first dialogues of the demo's, and how many tokens of each."""

BASE = REPOSITORY / "demo" / "qwen3.6-27b"


def export(
    folder: Path,
    keep: list[str] | None,
    base: Path = BASE,
    device: str = "cpu",
    preset: str = "NVFP4_DEFAULT_CFG",
    others: Mapping[str, str] | None = None,
    kv_cache: bool = False,
) -> None:
    """Quantize the text model of `base` on `device` and write it to `folder`.

    `keep` are patterns of what stays as it is, the library's own if None; `preset` is the name of
    the library's settings, and `others` those of modules by patterns; with `kv_cache` keys and
    values are quantized to FP8.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

    config = AutoConfig.from_pretrained(base).text_config
    config.architectures = ["Qwen3_5ForCausalLM"]
    model = Qwen3_5ForCausalLM.from_pretrained(
        base,
        config=config,
        key_mapping={r"^model\.language_model\.": "model."},
        dtype=torch.bfloat16,
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = (REPOSITORY / "demo" / "calibration.jsonl").read_text().splitlines()[:SAMPLES]

    def loop(model: Any) -> None:
        for line in lines:
            row = json.loads(line)
            roles = {"human": "user", "gpt": "assistant"}
            turns = [
                {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
                for turn in row["conversations"]
            ]
            ids = tokenizer.apply_chat_template(turns, tools=row["tools"], return_dict=False)
            model(torch.tensor([ids[:LENGTH]], device=device))

    settings = with_others(getattr(mtq, preset), others or {})
    if keep is not None:
        enabled = [
            entry
            for entry in settings["quant_cfg"]
            if entry.get("enable", True) or entry["quantizer_name"] == "*"
        ]
        disabled = [{"quantizer_name": name, "enable": False} for name in keep]
        embedding = {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False}
        settings = {**settings, "quant_cfg": [*enabled, *disabled, embedding]}
    if kv_cache:
        settings = {**settings, "quant_cfg": [*settings["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}
    mtq.quantize(model, settings, loop)
    export_hf_checkpoint(model, export_dir=folder)


def with_others(settings: dict[str, Any], others: Mapping[str, str]) -> dict[str, Any]:
    """The library's `settings`, but other ones of its own for modules that match patterns."""
    import modelopt.torch.quantization as mtq

    kinds = ("weight_quantizer", "input_quantizer")
    entries: list[dict[str, Any]] = []
    for pattern, preset in others.items():
        quantizers = {
            entry["quantizer_name"].removeprefix("*"): entry["cfg"]
            for entry in getattr(mtq, preset)["quant_cfg"]
            if "cfg" in entry
        }
        for kind in kinds:
            wanted = {"cfg": quantizers[kind]} if kind in quantizers else {"enable": False}
            entries.append({"quantizer_name": f"{pattern}{kind}", **wanted})
    first, *rest = settings["quant_cfg"]
    enabled = [entry for entry in rest if "cfg" in entry]
    disabled = [entry for entry in rest if "cfg" not in entry]
    return {**settings, "quant_cfg": [first, *enabled, *entries, *disabled]}
