"""Token streams and rows made of documents and dialogues."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import dialogues
import numpy as np
import toolcalls
import torch
from bpe import render_chat, token_id
from corpus import Document
from torch import Tensor
from train import Batches
from transformers import PreTrainedTokenizerFast

BASE_CHATS = 24_000
BASE_TOOL_CHATS = 1_500
BASE_COPYING_CHATS = 6_000
FINE_TUNE_DIALOGUES = 1_500
CALIBRATION_DIALOGUES = 64
ROW = 1024


def document_stream(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]
) -> np.ndarray:
    """All documents as one stream of tokens, in random order, each closed by `<|endoftext|>`."""
    shuffled = list(documents)
    random.Random(1).shuffle(shuffled)
    return _stream(tokenizer, [f"{document.text}<|endoftext|>" for document in shuffled])


def chat_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> np.ndarray:
    """Plain chats, and a few calls of made-up functions so that every added token is learnt."""
    rng = random.Random(2)
    summaries = dialogues.module_summaries(documents)
    texts = [
        render_chat(tokenizer, dialogues.plain_chat(rng, summaries)) for _ in range(BASE_CHATS)
    ]
    texts += [
        render(tokenizer, toolcalls.tool_dialogue(rng, made_up=1.0)) for _ in range(BASE_TOOL_CHATS)
    ]
    rng.shuffle(texts)
    return _stream(tokenizer, texts)


def copying_stream(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Chats with long copies, from which a small model learns to copy at all."""
    rng = random.Random(6)
    chats = (dialogues.copying_chat(rng) for _ in range(BASE_COPYING_CHATS))
    return _stream(tokenizer, [render_chat(tokenizer, chat) for chat in chats])


def fine_tune_dialogues() -> list[toolcalls.Dialogue]:
    """The dialogues that the fine-tune learns from."""
    rng = random.Random(3)
    return [toolcalls.tool_dialogue(rng, made_up=0.2) for _ in range(FINE_TUNE_DIALOGUES)]


def calibration_dialogues() -> list[toolcalls.Dialogue]:
    """Dialogues of the same kind that the fine-tune has not seen."""
    seen = {repr(dialogue) for dialogue in fine_tune_dialogues()}
    rng = random.Random(4)
    kept: list[toolcalls.Dialogue] = []
    while len(kept) < CALIBRATION_DIALOGUES:
        dialogue = toolcalls.tool_dialogue(rng, made_up=0.2)
        if repr(dialogue) not in seen:
            kept.append(dialogue)
    return kept


def render(tokenizer: PreTrainedTokenizerFast, dialogue: toolcalls.Dialogue) -> str:
    """A Hermes dialogue as the model reads it."""
    return render_chat(tokenizer, toolcalls.to_messages(dialogue), tools=dialogue["tools"])


def assistant_mask(tokens: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """True for what the assistant says, up to and with `<|im_end|>`."""
    end = token_id(tokenizer, "<|im_end|>")
    opening = tokenizer.encode("<|im_start|>assistant\n")
    mask = [False] * len(tokens)
    speaking = False
    for index, token in enumerate(tokens):
        mask[index] = speaking
        if token == end:
            speaking = False
        elif list(tokens[index + 1 - len(opening) : index + 1]) == opening:
            speaking = True
    return mask


def dialogue_rows(
    tokenizer: PreTrainedTokenizerFast, spoken: list[toolcalls.Dialogue]
) -> tuple[Tensor, Tensor]:
    """Rows of `ROW` tokens that begin with a dialogue, and which tokens the assistant says."""
    rows: list[list[int]] = [[]]
    for dialogue in spoken:
        said = tokenizer.encode(render(tokenizer, dialogue))[:ROW]
        if len(rows[-1]) + len(said) > ROW:
            rows.append([])
        rows[-1] += said
    padding = token_id(tokenizer, "<|endoftext|>")
    padded = [row + [padding] * (ROW - len(row)) for row in rows]
    mask = [assistant_mask(row, tokenizer) for row in padded]
    return torch.tensor(padded), torch.tensor(mask)


def row_batches(tokens: Tensor, mask: Tensor, rows: int, seed: int) -> Batches:
    """Random choices of `rows` rows."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step))
        chosen = torch.from_numpy(rng.choice(len(tokens), rows, replace=False))
        return tokens[chosen], mask[chosen]

    return batch


def _stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encoded])
