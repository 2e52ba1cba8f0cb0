"""No code outside of `models` knows a family, by its name or by what its tensors are called."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

from conftest import REPOSITORY

from carnice_build.models.table_file import SHIPPED, load_table
from carnice_build.models.table_schema import Row

FAMILY_NAMES = re.compile(
    r"qwen_?3_5|\bmtp\.|linear_attn|in_proj_|self_attn|language_model\.|model\.visual|\bllama\b",
    re.IGNORECASE,
)
OUTSIDE = [
    path
    for path in sorted((REPOSITORY / "carnice_build").rglob("*.py"))
    if path.parent.name != "models"
]


PROGRAMS = re.compile(r"\bllama(?:\.cpp|[-_][a-z]+)", re.IGNORECASE)
"""llama.cpp and its programs, which have their name from a family and run all others."""

NAMED = {
    # What llama.cpp calls ways to split text, and its converter's own branches for families.
    "formats/gguf/constants.py",
    "formats/gguf/mix_rules.py",
    "formats/gguf/model_tensors.py",
    "formats/gguf/sentencepiece.py",
    "formats/gguf/table.py",
    "formats/gguf/tokenizer.py",
}
"""Modules that may name a family."""


def test_no_module_outside_models_names_a_family() -> None:
    """What is true of one family stands in its table, and nowhere else."""
    found = {
        path.relative_to(REPOSITORY / "carnice_build").as_posix(): FAMILY_NAMES.findall(
            PROGRAMS.sub("", path.read_text(encoding="utf-8"))
        )
        for path in OUTSIDE
    }

    assert set() == {name for name, names in found.items() if names} - NAMED


_COMMON = {
    "attention",
    "bias",
    "blocks",
    "conv1d",
    "embeddings",
    "encoder",
    "experts",
    "fc",
    "gate",
}
_COMMON |= {"head", "layers", "linear", "mlp", "model", "norm", "post", "proj", "router"}
_COMMON |= {"transformer", "w3", "*", "{}"}
"""Parts of names that are words of any program, and tell by themselves of no family."""

SPOKEN = {
    # What vLLM calls parsers, and a dialect of tool calls that has its name from a model.
    "chat/tool_format.py": {"qwen3"},
    "chat/hermes.py": {"Qwen3"},
    "steps/chat_template.py": {"Qwen3"},
    # transformers' own classes for experts call their weights so in every family.
    "backends/layer.py": {"gate_proj", "up_proj", "gate_up_proj"},
    "calibration/weights.py": {"gate_proj", "up_proj", "gate_up_proj", "down_proj"},
    # auto-round looks for layers where most models have them, and tunes ours there.
    "backends/autoround.py": {"model.layers"},
    # By it `carnice family` tells a state from a bias in any class.
    "backends/skeletons.py": {"dt_bias"},
    # mlx-vlm has this attribute in all its models.
    "verification/mlx_vlm_worker.py": {"model.language_model"},
    # An example in the reference of recipes.
    "formats/rules.py": {"v_proj", "lm_head"},
    # llama-quantize and llama.cpp's converter go by such words, and by families where these differ.
    "formats/gguf/mix_rules.py": {
        *("conv.", "eh_proj", "k_proj.", "llama", "patch_merger", "q_proj.", "qwen2")
    },
    "formats/gguf/mixes.py": {"mixer.", "model.layers"},
    "formats/gguf/model_tensors.py": {"embed_tokens.", "language_model."},
    "formats/gguf/pre_tokenizer.py": {"qwen2"},
    "formats/gguf/tokenizer.py": {
        *("gemma3", "gemma4", "glm4_moe", "llama", "ministral3", "mistral", "mistral3", "mixtral"),
        *("nemotron_h", "phi3", "qwen2", "qwen3"),
    },
}
"""Where code has such words, and why it may."""


def family_words() -> re.Pattern[str]:
    """What the tables that ship call models and the parts of their tensors' names."""
    words: set[str] = set()
    for file in (load_table(path) for path in SHIPPED.glob("*.yaml")):
        words.add(file.name)
        rows = [*file.table.model, *(row for rows in file.table.blocks.values() for row in rows)]
        for row in rows:
            name = row.name if isinstance(row, Row) else f"{row.prefix}weight"
            parts = name.split(".")
            words |= {part for part in parts if "_" in part}
            words |= {f"{part}." for part in parts[:-1] if part not in _COMMON}
            words |= {".".join(pair) for pair in pairwise(parts[:-1]) if not {"*", "{}"} & {*pair}}
    longest = sorted(words, key=len, reverse=True)
    return re.compile(
        rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!(?<=\w)\w)", re.IGNORECASE
    )


def without_prose(path: Path) -> str:
    """The code of a module, without comments and docstrings, whose examples are of some family."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(lines := getattr(node, field, None), list):
                said = [line for line in lines if not _is_prose(line)]
                setattr(node, field, said or [ast.Pass()] if lines else [])
    return ast.unparse(tree)


def _is_prose(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def test_code_outside_models_has_no_words_of_tables() -> None:
    """Parts of tensors' names and names of model types, but for those that libraries have too."""
    words = family_words()
    found = {
        path.relative_to(REPOSITORY / "carnice_build").as_posix(): set(
            words.findall(PROGRAMS.sub("", without_prose(path)))
        )
        for path in OUTSIDE
    }

    assert {name: said for name, said in found.items() if said} == SPOKEN
    for word in ("block_sparse_moe", "mixer.", "shared_expert", "router.proj", "minimax_m2"):
        assert words.search(f"in {word} here"), word
