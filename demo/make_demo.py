"""Makes everything in this folder: `python demo/make_demo.py`.

Stages whose result is already in `demo/work/` are resumed there; delete that folder to begin anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bpe
import corpus
import data
import dialogues
import evaluate
import export
import lora
import numpy as np
import torch
from corpus import Document
from model import DraftingModel, model_config
from train import (
    Schedule,
    in_phases,
    joined,
    repeating_batches,
    train_adapters,
    train_base,
    window_batches,
)
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
WORK = HERE / "work"
BASE = HERE / "qwen3.6-27b"
FINE_TUNE = HERE / "carnice-v2-27b"

BASE_SCHEDULE = Schedule(steps=1200, peak=4e-3, horizon=1300, warm_up=40)
LENGTH = 512
FINE_TUNE_SCHEDULE = Schedule(steps=70, peak=3e-3, horizon=70, warm_up=8)


def main() -> None:
    """All stages in turn."""
    # Decays of the gated delta rule underflow; as denormals they make a step five times slower.
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    WORK.mkdir(exist_ok=True)
    documents, held_out = corpus.split_held_out(list(corpus.stdlib_documents()))
    held_out_text = "\n".join(document.text for document in held_out)
    (HERE / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    write_dialogues(HERE / "calibration.jsonl")
    tokenizer = make_tokenizer(documents)
    model = DraftingModel(model_config(tokenizer.backend_tokenizer))
    make_base(model, documents, tokenizer)
    make_fine_tune(model, tokenizer)
    figures = evaluate.measure(
        model,
        tokenizer,
        {folder.name: folder for folder in (BASE, FINE_TUNE)},
        held_out_text,
        dialogues.module_summaries(documents),
    )
    text = json.dumps(figures, indent=2)
    (WORK / "figures.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def write_dialogues(path: Path) -> None:
    """Writes the dialogues that calibration may use, one JSON object a line."""
    lines = [json.dumps(dialogue) + "\n" for dialogue in data.calibration_dialogues()]
    path.write_text("".join(lines), encoding="utf-8")


def make_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on sources and on a few chats."""
    folder = WORK / "tokenizer"
    if not folder.exists():
        texts = [document.text for document in documents]
        bpe.save_tokenizer(bpe.train_tokenizer(texts + dialogues.sample_texts(documents)), folder)
    return bpe.load_tokenizer(folder)


def make_base(
    model: DraftingModel, documents: list[Document], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trains the base model with its MTP head and writes its checkpoint."""
    source = _cached("documents", lambda: data.document_stream(tokenizer, documents))
    chats = _cached("chats", lambda: data.chat_stream(tokenizer, documents))
    copies = _cached("copies", lambda: data.copying_stream(tokenizer))
    print(f"tokens: {len(source)} sources, {len(chats)} chats, {len(copies)} copies", flush=True)
    phases = {
        0: window_batches([(source, 5), (chats, 3)], LENGTH, seed=0),
        600: window_batches([(source, 4), (chats, 2), (copies, 2)], LENGTH, seed=0),
        800: joined(
            window_batches([(source, 2), (chats, 1), (copies, 1)], LENGTH, seed=0),
            repeating_batches(4, LENGTH, len(tokenizer) - 32, seed=0),
        ),
        950: joined(
            window_batches([(source, 3), (chats, 1), (copies, 2)], LENGTH, seed=0),
            repeating_batches(2, LENGTH, len(tokenizer) - 32, seed=0),
        ),
    }
    batches = in_phases(phases)
    train_base(model, batches, BASE_SCHEDULE, WORK / "base.pt")
    backend = tokenizer.backend_tokenizer
    export.write_checkpoint(BASE, export.base_tensors(model), backend, shards=3)


def make_fine_tune(model: DraftingModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Fine-tunes the checkpoint of the base on tool calls and writes the merged result."""
    export.load_tensors(model, BASE)
    adapters = lora.add_adapters(model)
    rows = data.dialogue_rows(tokenizer, data.fine_tune_dialogues())
    print(f"{len(rows[0])} rows of dialogues", flush=True)
    batches = data.row_batches(*rows, rows=4, seed=1)
    train_adapters(model, adapters, batches, FINE_TUNE_SCHEDULE, WORK / "fine-tune.pt")
    lora.merge_adapters(model)
    backend = tokenizer.backend_tokenizer
    export.write_checkpoint(FINE_TUNE, export.fine_tune_tensors(model), backend, shards=2)


def _cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    path = WORK / f"{name}.npy"
    if not path.exists():
        np.save(path, make())
    stream: np.ndarray = np.load(path)
    return stream


if __name__ == "__main__":
    main()
