"""Makes everything in this folder: `python demo/make_demo.py`.

Stages whose result is already in `demo/work/` are resumed there; delete that folder to begin anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
    mixed_batches,
    repeats,
    rows_of,
    train_adapters,
    train_base,
    windows,
)
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
WORK = HERE / "work"
BASE = HERE / "qwen3.6-27b"
FINE_TUNE = HERE / "carnice-v2-27b"

ROWS = 8
BASE_SCHEDULE = Schedule(steps=1500, peak=5e-3, horizon=1500, warm_up=50)
COPYING_STEPS = 350
FINE_TUNE_SCHEDULE = Schedule(steps=300, peak=2e-3, horizon=300, warm_up=10)
UNSPOKEN = 0.2
"""How much a token that the assistant does not say counts while the base is trained."""


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DraftingModel(model_config(tokenizer.backend_tokenizer)).to(device)
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
    (stream,) = _cached("documents", lambda: [data.document_stream(tokenizer, documents)])
    chats = _cached("chats", lambda: data.chat_rows(tokenizer, documents))
    copies = _cached("copies", lambda: data.copying_rows(tokenizer))
    calls = _cached("calls", lambda: data.base_tool_rows(tokenizer))
    sizes = {"sources": stream, "chats": chats[0], "copies": copies[0], "calls": calls[0]}
    print({name: tokens.size for name, tokens in sizes.items()}, flush=True)
    source = windows(stream, data.ROW)
    chat, copy, call = (rows_of(*rows, UNSPOKEN) for rows in (chats, copies, calls))
    again = repeats(data.ROW, len(tokenizer) - 32)
    learning = [(source, 0.3), (chat, 0.1), (copy, 0.2), (call, 0.2), (again, 0.2)]
    applying = [(source, 0.25), (chat, 0.15), (copy, 0.1), (call, 0.45), (again, 0.05)]
    phases = {
        0: mixed_batches(learning, ROWS, seed=0),
        COPYING_STEPS: mixed_batches(applying, ROWS, seed=0),
    }
    train_base(model, in_phases(phases), BASE_SCHEDULE, WORK / "base.pt")
    backend = tokenizer.backend_tokenizer
    export.write_checkpoint(BASE, export.base_tensors(model), backend, shards=3)


def make_fine_tune(model: DraftingModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Fine-tunes the checkpoint of the base on tool calls and writes the merged result."""
    export.load_tensors(model, BASE)
    adapters = lora.add_adapters(model)
    rows = _cached("fine-tune", lambda: data.fine_tune_rows(tokenizer))
    print(f"{len(rows[0])} rows of dialogues", flush=True)
    batches = mixed_batches([(rows_of(*rows, unspoken=0.0), 1.0)], ROWS, seed=1)
    train_adapters(model, adapters, batches, FINE_TUNE_SCHEDULE, WORK / "fine-tune.pt")
    lora.merge_adapters(model)
    backend = tokenizer.backend_tokenizer
    export.write_checkpoint(FINE_TUNE, export.fine_tune_tensors(model), backend, shards=2)


def _cached(name: str, make: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
    path = WORK / f"{name}.npz"
    if not path.exists():
        np.savez_compressed(path, *make())
    with np.load(path) as kept:
        return list(kept.values())


if __name__ == "__main__":
    main()
