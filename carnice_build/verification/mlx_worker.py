"""Running a model in mlx-lm, to be called in a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnice_build.backends.mlx_trace import cast_as_stated
from carnice_build.verification.generate import Generation, generate
from carnice_build.verification.perplexity import SAMPLES, SAMPLES_ON_CPU, Perplexity, measure


@dataclass(frozen=True)
class SourceWeights:
    """An unquantized model where it lies: its config, and for each canonical name (file, name)."""

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """Load a folder or a source, measure perplexity on `text` if given, and generate if asked.

    `tokenizer` is the folder whose tokenizer splits the text.
    `samples` is None for what suits this machine.
    """

    model: Path | SourceWeights
    tokenizer: Path
    text: Path | None
    lengths: Sequence[int]
    samples: int | None
    generate: bool


@dataclass(frozen=True)
class Answer:
    """What running the model gave."""

    generation: Generation | None
    perplexities: Sequence[Perplexity]


def run(task: Task) -> Answer:
    """Do the task, in a process where mlx may be loaded; raises whatever mlx-lm does."""
    from mlx_lm.utils import load_model, load_tokenizer

    tokenizer: Any = load_tokenizer(task.tokenizer)  # type: ignore[no-untyped-call]
    model: Any
    if isinstance(task.model, SourceWeights):
        model = _load_source(task.model)
    else:
        model, _ = load_model(task.model)
    generation = generate(model, tokenizer) if task.generate else None
    widen_on_cpu(model)
    return Answer(generation, perplexities(task, tokenizer, model))


def perplexities(task: Task, tokenizer: Any, logits: Callable[[Any], Any]) -> list[Perplexity]:
    """What the task asks for, of a model as what makes logits of tokens [rows, length]."""
    if task.text is None:
        return []
    tokens = tokenizer.encode(task.text.read_text(encoding="utf-8"))
    samples = task.samples or (SAMPLES_ON_CPU if on_cpu() else SAMPLES)
    found = (measure(logits, tokens, length, samples) for length in task.lengths)
    return [item for item in found if item is not None]


def widen_on_cpu(model: Any) -> None:
    """Compute in float32 where there is no GPU: mlx's CPU kernels are several times slower in BF16.

    The weights keep their values, packed ones their bits.
    """
    import mlx.core as mx

    if on_cpu():
        model.set_dtype(mx.float32)


def on_cpu() -> bool:
    """Whether mlx has nothing else here."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def _load_source(source: SourceWeights) -> Any:
    """The model as `mlx_lm.convert` without quantization would make it, read as it is used."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model: Any
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        model, config = load_model(Path(empty), lazy=True, strict=False)
    files: dict[str, Any] = {
        path: mx.load(path) for path in {path for path, _ in source.tensors.values()}
    }
    weights = {name: files[path][stored] for name, (path, stored) in source.tensors.items()}
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()), strict=True)
    cast_as_stated(model, config)
    return model
