"""Small tokenizers of every kind that a GGUF file is made of, as the files of a folder.

What llama.cpp's converter writes of each stands in `golden/gguf_tokenizers.json`, which this file
writes where the converter's source is: `python tests/vocabularies.py`.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf_converter import source

from carnice_build.checkpoint.gguf_values import Value
from carnice_build.formats.gguf.pre_tokenizer import table
from carnice_build.formats.gguf.tokenizer import tokenizer_metadata

REPOSITORY = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "gguf_tokenizers.json"
RUNNER = Path(__file__).parent / "run_llama_cpp_vocab.py"
DEMO = REPOSITORY / "demo" / "carnice-v2-27b"

_MOST_SHOWN = 40

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


@dataclass(frozen=True)
class Made:
    """A tokenizer of a model: its files, what its family is, and the pre-tokenizer it has."""

    files: Mapping[str, bytes]
    architecture: str
    model_type: str
    pre: str = "llama-bpe"
    config: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """The folder that the converter reads."""
        for name, content in {**self.files, "config.json": dumped(self.config)}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def with_file(self, name: str, content: Any) -> Made:
        """The same with another file."""
        data = content if isinstance(content, bytes) else dumped(content)
        return replace(self, files={**self.files, name: data})

    def changed(self, name: str, **entries: Any) -> Made:
        """The same with other entries in a JSON file."""
        return self.with_file(name, {**json.loads(self.files[name]), **entries})

    def metadata(self, pre: str | None = None) -> dict[str, Value]:
        """What we write of it, where the recipe says `tokenizer_pre: pre`."""
        return tokenizer_metadata(self.files, self.config, self.model_type, self.size, pre, "here")

    @property
    def size(self) -> int:
        """The vocabulary of its config.json."""
        text = self.config.get("text_config")
        table = text if isinstance(text, dict) and "vocab_size" in text else self.config
        return int(table["vocab_size"])


def dumped(value: Any) -> bytes:
    """JSON as files have it."""
    return json.dumps(value, ensure_ascii=False).encode()


def letters() -> list[str]:
    """What stands for the bytes in byte-level vocabularies, by byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(256, 512))
    return [chr(byte if byte in plain else next(other)) for byte in range(256)]


def regexes(name: str) -> list[str]:
    """Those of a pre-tokenizer of llama.cpp."""
    return next(way.regexes for way in table().ways if name in way.names)


def split_by(patterns: Iterable[str]) -> dict[str, Any]:
    """A pre-tokenizer that splits by these, then takes bytes as letters."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in patterns
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [*steps, {**last, "use_regex": False}]}


def added(*texts: str, first: int, special: bool = True, normalized: bool = False) -> list[Any]:
    """Added tokens of these texts, numbered from `first` on."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized}
    return [
        {"id": first + index, "content": text, **flags, "special": special}
        for index, text in enumerate(texts)
    ]


def byte_level(
    *texts: str, pre: str = "qwen2", post: Any = None, plain: Sequence[str] = ()
) -> dict[str, Any]:
    """A tokenizer.json with the bytes, some merges, special tokens `texts` and `plain` others."""
    vocab = {letter: number for number, letter in enumerate(letters())}
    merges = [["\u0120", "t"], ["h", "e"], ["\u0120t", "he"], ["i", "n"], ["\u0120", "\u0120"]]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokens = added(*texts, first=len(vocab))
    tokens += added(*plain, first=len(vocab) + len(texts), special=False)
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": split_by(regexes(pre)),
        "post_processor": post,
        "decoder": {**decoder, "use_regex": True},
        "model": _pairs(vocab, merges, byte_fallback=False),
    }


def _pairs(vocab: Any, merges: Any, **options: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    defaults = {"unk_token": None, "fuse_unk": False, "ignore_merges": False}
    model = {"type": "BPE", **empty, **defaults, **options}
    return {**model, "vocab": vocab, "merges": merges}


def around(first: str | None, last: str | None, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A post-processor that puts special tokens around every text."""
    numbers = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    def text(name: str, kind: int) -> list[Any]:
        ends = [
            [{"SpecialToken": {"id": end, "type_id": kind}}] if end else [] for end in (first, last)
        ]
        return [*ends[0], {"Sequence": {"id": name, "type_id": kind}}, *ends[1]]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {
            end: {"id": end, "ids": [numbers[end]], "tokens": [end]} for end in (first, last) if end
        },
    }


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["\u2581", "t", "h", "e", "\u2581t", "he", "\u2581the", "\n", "\u2581\u2581"]
WORD_MERGES = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["\u2581", "\u2581"]]


def sentencepiece_json(
    *texts: str, plain: Sequence[str] = (), gemma: bool = False
) -> dict[str, Any]:
    """A tokenizer.json that was made of a SentencePiece model."""
    names = [*(("<pad>", "<eos>", "<bos>", "<unk>") if gemma else PIECES[:3]), *PIECES[3:], *WORDS]
    vocab = {piece: number for number, piece in enumerate(names)}
    special = [name for name in names[:4] if not name.startswith("<0x")]
    tokens = added(*special, first=0)
    if gemma:
        tokens += added("\u2581\u2581", first=vocab["\u2581\u2581"], special=False)
    tokens += added(*texts, first=len(vocab))
    tokens += added(*plain, first=len(vocab) + len(texts), special=False, normalized=True)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    to_space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    before = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, to_mark],
    }
    strip = [] if gemma else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    steps = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": to_mark if gemma else before,
        "pre_tokenizer": {**split, "invert": False} if gemma else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _pairs(vocab, WORD_MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
    }


def sentencepiece_model(pieces: Sequence[tuple[str, float, int]]) -> bytes:
    """A tokenizer.model: pairs, with what stands for bytes."""
    content = b"".join(_field(1, _piece(*piece)) for piece in pieces)
    # Of the trainer's words: pairs, the size, bytes, and the numbers of special pieces.
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)
    trainer += _number(40, 0) + _number(41, 1) + _number(42, 2)
    return content + _field(2, trainer) + _field(3, _field(1, b"identity"))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def model_pieces() -> list[tuple[str, float, int]]:
    """Pieces of every kind."""
    kinds = [2, 3, 3, *[6] * 256]
    found = [(piece, 0.0, kind) for piece, kind in zip(PIECES, kinds, strict=True)]
    found += [(word, -0.1 * index, 1) for index, word in enumerate(WORDS)]
    return [*found, ("<image>", 0.0, 4), ("<nothing>", 0.0, 5)]


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def made(
    tokenizer: Mapping[str, Any],
    architecture: str,
    model_type: str,
    size: int,
    pre: str = "qwen2",
    **config: Any,
) -> Made:
    """A folder with a tokenizer.json and a tokenizer_config.json that says `config`."""
    files = {
        "tokenizer.json": dumped(tokenizer),
        "tokenizer_config.json": dumped({**FAST, **config}),
    }
    return Made(files, architecture, model_type, pre, {"vocab_size": size})


def demo() -> Made:
    """The demo's."""
    files = {name: (DEMO / name).read_bytes() for name in SMALL_FILES}
    config = json.loads(files.pop("config.json"))
    return Made(files, config["architectures"][0], "qwen3_5", "qwen2", config)


def cases() -> dict[str, Made]:
    """Every tokenizer of the golden file, by what is special of it."""
    return {"demo": demo(), **byte_level_cases(), **template_cases(), **scored_cases()}


def byte_level_cases() -> dict[str, Made]:
    """Tokenizers of bytes, by family."""
    qwen = byte_level("<|endoftext|>", "<|im_end|>", plain=["<think>", "<|fim|>", "a\u2581b"])
    odd = byte_level("<\u00e9>", "\u0120x", "caf\u00c3\u00a9", plain=["\u4e2d", "  "])
    llama = byte_level("<|begin_of_text|>", "<|eot_id|>", pre="llama-bpe")
    llama["model"]["ignore_merges"] = True
    llama["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": False,
                "use_regex": True,
            },
            around("<|begin_of_text|>", None, llama),
        ],
    }
    ends = byte_level("<s>", "</s>", "<turn>", pre="tekken")
    ends["post_processor"] = around("<s>", "<turn>", ends)
    glm = ("<|endoftext|>", "[MASK]", "[gMASK]", "<|user|>", "<|observation|>")
    deepseek = byte_level(
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\uff5c>", pre="deepseek-v3"
    )
    roberta = byte_level("<s>", "</s>", pre="gpt-2")
    numbers = {token["content"]: token["id"] for token in roberta["added_tokens"]}
    roberta["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["</s>", numbers["</s>"]],
        "cls": ["<s>", numbers["<s>"]],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    old = byte_level("<|endoftext|>", pre="gpt-4o")
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    text = "Qwen2ForCausalLM", "qwen2"
    return {
        "qwen2": made(qwen, *text, 280, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        "a pad token of its own": made(qwen, *text, 280, pad_token="<pad>", bos_token=None),
        "texts that bytes spell": made(
            odd, *text, 280, eos_token={"content": "<\u00e9>", "__type": "AddedToken"}
        ),
        "extra special tokens": made(
            qwen, *text, 280, additional_special_tokens=["<a>", "<|im_end|>"], add_bos_token=False
        ),
        "an old config": made(qwen, *text, 280, eos_token="<|im_end|>")
        .with_file("special_tokens_map.json", {"unk_token": "<u>"})
        .with_file("added_tokens.json", {"<think>": 263, "<late>": 266}),
        "added_tokens_decoder": made(
            qwen,
            *text,
            280,
            added_tokens_decoder={
                str(token["id"]): {key: token[key] for key in token if key != "id"}
                for token in [*qwen["added_tokens"], *added("<new>", first=300)]
            },
            eos_token="<new>",
        ),
        "llama 3": made(
            llama,
            "LlamaForCausalLM",
            "llama",
            264,
            "llama-bpe",
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            chat_template=TEMPLATE,
        ),
        "another end": made(
            ends,
            "MistralForCausalLM",
            "mistral",
            270,
            "tekken",
            bos_token="<s>",
            eos_token="</s>",
            add_eos_token=False,
            add_prefix_space=False,
        ),
        "glm4": made(byte_level(*glm, pre="glm4"), "Glm4ForCausalLM", "glm4", 272, "glm4"),
        "glm4_moe": made(
            byte_level(*glm, pre="glm4"),
            "Glm4MoeForCausalLM",
            "glm4_moe",
            272,
            "glm4",
            eos_token="<|endoftext|>",
        ),
        "deepseek": made(
            deepseek,
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            263,
            "deepseek-v3",
            bos_token={
                "content": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
                "__type": "AddedToken",
            },
        ),
        "gpt-oss": made(
            old, "GptOssForCausalLM", "gpt_oss", 264, "gpt-4o", eos_token="<|endoftext|>"
        ),
        "nemotron_h": made(
            ends, "NemotronHForCausalLM", "nemotron_h", 265, "tekken", bos_token="<s>"
        ),
        "roberta": made(roberta, "Qwen3MoeForCausalLM", "qwen3_moe", 264, "gpt-2", bos_token="<s>"),
    }


def template_cases() -> dict[str, Made]:
    """Where a chat template may stand."""
    base = made(
        byte_level("<e>", pre="qwen35"), "Qwen3ForCausalLM", "qwen3", 262, "qwen35", eos_token="<e>"
    )
    several = [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool use", "template": "tools " + TEMPLATE},
    ]
    beside = base.with_file("chat_template.jinja", (TEMPLATE + "\r\n\r").encode())
    whole = replace(base, config={"vocab_size": 262, "bos_token_id": 3, "eos_token_id": [1, 2]})
    text = {"vocab_size": 262, "pad_token_id": 5, "bos_token_id": None}
    nested = replace(base, config={"text_config": text, "eos_token_id": 7})
    bare = {"tokenizer.json": base.files["tokenizer.json"]}
    return {
        "a template beside": beside,
        "a template in both": beside.changed("tokenizer_config.json", chat_template="inside"),
        "a template beside in JSON": base.with_file(
            "chat_template.json", {"chat_template": "json"}
        ),
        "templates by name": base.changed("tokenizer_config.json", chat_template=several),
        "templates in a folder": beside.with_file("additional_chat_templates/rag.jinja", b"rag"),
        "an empty template": base.changed("tokenizer_config.json", chat_template=""),
        "ids in config.json": whole,
        "ids in text_config": nested,
        "no tokenizer_config": replace(base, files=bare),
        "lower case": base.changed("tokenizer.json", normalizer={"type": "Lowercase"}),
    }


def scored_cases() -> dict[str, Made]:
    """Tokenizers that come from SentencePiece."""
    model = sentencepiece_model(model_pieces())
    plain = sentencepiece_json("<|im_end|>", plain=["<think>"])
    plain["post_processor"] = around("<s>", None, plain)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    text = "LlamaForCausalLM", "llama"
    scored = made(plain, *text, 280, "default", **names, add_prefix_space=True)
    described = {
        "270": {"content": "<|x|>"},
        "269": {"content": "\u2581y"},
        "900": {"content": "z"},
    }
    described |= {"271": {"content": "<s2>", "special": True}}
    pieces = scored.with_file("tokenizer.model", model)
    replaced = pieces.changed("tokenizer_config.json", added_tokens_decoder=described).with_file(
        "added_tokens.json", {"<image>": 268, "late": 275, "no": 4000}
    )
    gemma = sentencepiece_json("<start>", "<|tool_call>", '<|"|>', plain=["<unused0>"], gemma=True)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    gemma4 = made(
        gemma, "Gemma4ForCausalLM", "gemma4", 280, "gemma4", **names, image_token="<start>",
        escape_token='<|"|>', chat_template=TEMPLATE,
    )  # fmt: skip
    gemma3 = replace(gemma4, architecture="Gemma3ForCausalLM", model_type="gemma3_text")
    config = {"vocab_size": 280, "text_config": {"vocab_size": 280}}
    pieced = {"vocab_size": 280}
    return {
        "llama 2 in JSON": scored,
        "a class of its own": scored.changed(
            "tokenizer_config.json", tokenizer_class="LlamaTokenizer"
        ),
        "tokenizer.model": pieces,
        "tokenizer.model and what replaces it": replaced,
        "tokenizer.model that is longer": replace(pieces, config={"vocab_size": 200}),
        "mistral3": replace(
            pieces, architecture="Mistral3ForConditionalGeneration", model_type="mistral3"
        ),
        "qwen with tokenizer.model": replace(
            pieces, architecture="Qwen2ForCausalLM", model_type="qwen2"
        ),
        "gemma": replace(
            pieces, architecture="GemmaForCausalLM", model_type="gemma", config=pieced
        ),
        "gemma2": replace(pieces, architecture="Gemma2ForCausalLM", model_type="gemma2"),
        "gemma3": replace(
            pieces,
            architecture="Gemma3ForConditionalGeneration",
            model_type="gemma3",
            config=config,
        ),
        "gemma3 in JSON": gemma3,
        "gemma4": gemma4,
    }


def converted(tokenizers: Iterable[Made]) -> list[list[Any]]:
    """Keys, kinds and values that the converter writes of each."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for index, tokenizer in enumerate(tokenizers):
            folder = Path(scratch) / str(index)
            tokenizer.write(folder)
            about = {"architecture": tokenizer.architecture, "pre": tokenizer.pre}
            jobs.append({"folder": str(folder), **about})
        command = [sys.executable, str(RUNNER), str(source())]
        run = subprocess.run(
            command, input=json.dumps(jobs), capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        return [[_short(*item) for item in found] for found in json.loads(run.stdout)]


def written(metadata: Mapping[str, Value]) -> list[Any]:
    """The same of ours."""
    return [_short(key, *value) for key, value in metadata.items()]


def _short(key: str, kind: str, value: Any) -> list[Any]:
    """A value as the golden file has it: long lists as a count and a digest."""
    if "f32" in kind:
        value = [struct.unpack("<f", struct.pack("<f", number))[0] for number in value]
    if kind.startswith("[") and len(value) > _MOST_SHOWN:
        # What is after the bytes tells more than they do.
        return [
            key,
            kind,
            len(value),
            hashlib.sha256(dumped(value)).hexdigest()[:16],
            value[256:290],
        ]
    return [key, kind, value]


if __name__ == "__main__":
    known = cases()
    found = dict(zip(known, converted(known.values()), strict=True))
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
