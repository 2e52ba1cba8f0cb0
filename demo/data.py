"""Token streams and rows made of documents and dialogues."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import dialogues
import numpy as np
import toolcalls
from bpe import render_chat, token_id
from corpus import Document
from transformers import PreTrainedTokenizerFast

from carnice_build.chat.hermes import to_hermes

BASE_CHATS = 24_000
BASE_COPYING_CHATS = 8_000
BASE_TOOL_DIALOGUES = 18_000
FINE_TUNE_DIALOGUES = 4_000
CALIBRATION_DIALOGUES = 64
ROW = 1024
_OPEN_ROWS = 64

Rows = tuple[np.ndarray, np.ndarray]
"""Tokens [rows, `ROW`] that begin with a dialogue, and which of them the assistant says."""


def document_stream(
    tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]
) -> np.ndarray:
    """All documents as one stream of tokens, in random order, each closed by `<|endoftext|>`."""
    shuffled = list(documents)
    random.Random(1).shuffle(shuffled)
    return _stream(tokenizer, [f"{document.text}<|endoftext|>" for document in shuffled])


def chat_rows(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Rows:
    """Plain chats."""
    rng = random.Random(2)
    summaries = dialogues.module_summaries(documents)
    chats = (dialogues.plain_chat(rng, summaries) for _ in range(BASE_CHATS))
    return packed(tokenizer, [render_chat(tokenizer, chat) for chat in chats])


def copying_rows(tokenizer: PreTrainedTokenizerFast) -> Rows:
    """Chats with long copies, from which a small model learns to copy at all."""
    rng = random.Random(6)
    chats = (dialogues.copying_chat(rng) for _ in range(BASE_COPYING_CHATS))
    return packed(tokenizer, [render_chat(tokenizer, chat) for chat in chats])


def base_tool_rows(tokenizer: PreTrainedTokenizerFast) -> Rows:
    """Tool calls, half of them of functions made up for the dialogue."""
    rng = random.Random(7)
    spoken = [toolcalls.tool_dialogue(rng, made_up=0.5) for _ in range(BASE_TOOL_DIALOGUES)]
    return packed(tokenizer, in_both_formats(tokenizer, spoken))


def fine_tune_dialogues() -> list[toolcalls.Dialogue]:
    """The dialogues that the fine-tune learns from."""
    rng = random.Random(3)
    return [toolcalls.tool_dialogue(rng, made_up=0.3) for _ in range(FINE_TUNE_DIALOGUES)]


def fine_tune_rows(tokenizer: PreTrainedTokenizerFast) -> Rows:
    """The dialogues that the fine-tune learns from, in both formats."""
    return packed(tokenizer, in_both_formats(tokenizer, fine_tune_dialogues()))


def calibration_dialogues() -> list[toolcalls.Dialogue]:
    """Dialogues of the same kind that the fine-tune has not seen."""
    seen = {repr(dialogue) for dialogue in fine_tune_dialogues()}
    rng = random.Random(4)
    kept: list[toolcalls.Dialogue] = []
    while len(kept) < CALIBRATION_DIALOGUES:
        dialogue = toolcalls.tool_dialogue(rng, made_up=0.3)
        if repr(dialogue) not in seen:
            kept.append(dialogue)
    return kept


def render(
    tokenizer: PreTrainedTokenizerFast, dialogue: toolcalls.Dialogue, template: str | None = None
) -> str:
    """A Hermes dialogue as the model reads it, through the tokenizer's template or another."""
    messages = toolcalls.to_messages(dialogue)
    return render_chat(tokenizer, messages, tools=dialogue["tools"], chat_template=template)


def in_both_formats(
    tokenizer: PreTrainedTokenizerFast, spoken: Sequence[toolcalls.Dialogue]
) -> list[str]:
    """Every other dialogue with calls in XML, the others in JSON, as their templates ask for."""
    templates = both_templates(tokenizer)
    return [
        render(tokenizer, dialogue, templates[index % 2]) for index, dialogue in enumerate(spoken)
    ]


def both_templates(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The chat template, which asks for calls in XML, and its patch, which asks for JSON."""
    template = str(tokenizer.chat_template)
    return template, to_hermes(template)


def packed(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Rows:
    """Dialogues laid into rows, each into the fullest of the open rows that has room for it."""
    padding = token_id(tokenizer, "<|endoftext|>")
    rows: list[list[int]] = []
    opened: list[list[int]] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        said = encoding.ids[:ROW]
        fitting = [row for row in opened if len(row) + len(said) <= ROW]
        if fitting:
            max(fitting, key=len).extend(said)
            continue
        if len(opened) == _OPEN_ROWS:
            rows.append(opened.pop(opened.index(max(opened, key=len))))
        opened.append(list(said))
    rows += opened
    tokens = np.array([row + [padding] * (ROW - len(row)) for row in rows], dtype=np.uint16)
    return tokens, np.stack([assistant_mask(row, tokenizer) for row in tokens])


def assistant_mask(tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """True for what the assistant says, up to and with `<|im_end|>`."""
    opening = np.array(tokenizer.encode("<|im_start|>assistant\n"))
    found = np.lib.stride_tricks.sliding_window_view(tokens[:-1], len(opening))
    starts = np.flatnonzero((found == opening).all(axis=1)) + len(opening)
    ends = np.append(np.flatnonzero(tokens == token_id(tokenizer, "<|im_end|>")) + 1, len(tokens))
    mask = np.zeros(len(tokens), dtype=bool)
    for start in starts:
        mask[start : ends[np.searchsorted(ends, start, side="right")]] = True
    return mask


def _stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encoded])
