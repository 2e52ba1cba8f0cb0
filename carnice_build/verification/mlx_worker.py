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
from carnice_build.verification.running import SOURCE

MODEL = "model"
"""What a folder's model is called beside its source."""


@dataclass(frozen=True)
class SourceWeights:
    """An unquantized model where it lies: its config, and for each canonical name (file, name)."""

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """Load a folder or a source, measure perplexity on `text` if given, and generate if asked.

    With `source`, that is measured beside, and what the model diverges from.
    `tokenizer` is the folder whose tokenizer splits the text.
    `samples` is None for what suits this machine.
    """

    model: Path | SourceWeights
    tokenizer: Path
    text: Path | None
    lengths: Sequence[int]
    samples: int | None
    generate: bool
    source: SourceWeights | None = None


@dataclass(frozen=True)
class Answer:
    """What running the model gave; `of_source` is that of the source beside it.

    `missing` is why there is nothing of that.
    """

    generation: Generation | None
    perplexities: Sequence[Perplexity]
    of_source: Sequence[Perplexity] = ()
    missing: str = ""


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
    return answer(task, tokenizer, generation, model, _load_source, lambda model: model)


def answer(
    task: Task,
    tokenizer: Any,
    generation: Generation | None,
    model: Any,
    load_source: Callable[[SourceWeights], Any],
    scoring: Callable[[Any], Callable[[Any], Any]],
) -> Answer:
    """What the task asks for beside `generation`; `scoring` finds what makes logits of tokens."""
    if task.text is None:
        return Answer(generation, ())
    widen_on_cpu(model)
    models, missing = {MODEL: scoring(model)}, ""
    if task.source is not None:
        try:
            source = load_source(task.source)
            widen_on_cpu(source)
            models = {SOURCE: scoring(source), **models}
        except Exception as error:
            # Whatever a library finds wrong with the source says nothing of the folder.
            missing = f"{type(error).__name__}: {str(error).strip()[:300]}"
    tokens = tokenizer.encode(task.text.read_text(encoding="utf-8"))
    samples = task.samples or (SAMPLES_ON_CPU if on_cpu() else SAMPLES)
    found = [measure(models, tokens, length, samples) for length in task.lengths]
    # The source is as far from itself as nothing.
    of_source = [item[SOURCE] for item in found if SOURCE in item]
    return Answer(generation, [item[MODEL] for item in found if item], of_source, missing)


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
