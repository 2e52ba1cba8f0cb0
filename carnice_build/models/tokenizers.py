"""The special tokens that the tokenizers of model families have where no file states one."""

from __future__ import annotations

from collections.abc import Mapping

_QWEN = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")

SPECIAL_TOKENS: Mapping[str, Mapping[str, str]] = {
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}
"""By `tokenizer_class`, as transformers 5.17 has them; most classes that files name have none."""
