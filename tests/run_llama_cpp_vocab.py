"""Runs what llama.cpp's converter does of a tokenizer, for many folders in one process.

    python tests/run_llama_cpp_vocab.py SOURCE < jobs.json > values.json

A job is a folder with small files, an architecture of transformers and the name of the
pre-tokenizer: the converter knows tokenizers by a hash of what they do to a text, and none that
was made for a test.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """See the module."""
    (source,) = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    logging.disable(logging.CRITICAL)
    print(json.dumps([values(**job) for job in json.load(sys.stdin)]))


def values(folder: str, architecture: str, pre: str) -> list[Any]:
    """Key, kind and value of everything that `set_vocab` writes, in order."""
    import gguf
    from conversion import get_model_class
    from conversion.base import ModelBase

    cls = get_model_class(architecture)
    if architecture.startswith("Mistral3"):
        cls = cls.Ministral3Model
    model = object.__new__(cls)
    model.dir_model = Path(folder)
    config = ModelBase.load_hparams(model.dir_model, False)
    model.hparams = {**config, **config.get("text_config", {})}
    model.is_mistral_format = False
    model.origin_hf_arch = architecture
    model.get_vocab_base_pre = lambda tokenizer: pre
    model.gguf_writer = gguf.GGUFWriter(None, "llama")
    model.set_vocab()
    (written,) = model.gguf_writer.kv_data
    return [[key, *shown(value)] for key, value in written.items() if key.startswith("tokenizer.")]


def shown(value: Any) -> tuple[str, Any]:
    """A value of the writer as `Value` has it."""
    import gguf

    names = {
        gguf.GGUFValueType.UINT32: "u32",
        gguf.GGUFValueType.INT32: "i32",
        gguf.GGUFValueType.FLOAT32: "f32",
        gguf.GGUFValueType.BOOL: "bool",
        gguf.GGUFValueType.STRING: "str",
    }
    if value.type != gguf.GGUFValueType.ARRAY:
        return names[value.type], value.value
    (kind,) = {names[gguf.GGUFValueType.get_type(item)] for item in value.value}
    items = [item.decode() if isinstance(item, bytes) else item for item in value.value]
    return f"[{kind}]", items


if __name__ == "__main__":
    main()
