"""Running a model in mlx-vlm, to be called in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from carnice_build.backends.mlx_trace import as_checkpoint, cast_as_stated
from carnice_build.verification.generate import TOKENS, collected, prompt
from carnice_build.verification.mlx_worker import (
    Answer,
    SourceWeights,
    Task,
    answer,
    widen_on_cpu,
)
from carnice_build.verification.running import Drafts
from carnice_build.verification.torch_worker import NEW_TOKENS


def run(task: Task) -> Answer:
    """Do the task, in a process where mlx may be loaded; raises whatever mlx-vlm does."""
    generation = None
    if isinstance(task.model, SourceWeights):
        model = _load_source(task.model)
    else:
        model = _utils().load_model(task.model)
    # After the model, whose module brings its own processor.
    tokenizer = _tokenizer(_utils().load_processor(task.tokenizer))
    if task.generate:
        found = prompt(tokenizer)[None]
        generation = collected(tokenizer, _steps(model, found, TOKENS))
    return answer(task, tokenizer, generation, model, _load_source, _scoring)


def _scoring(model: Any) -> Callable[[Any], Any]:
    return lambda rows: model.language_model(rows).logits


def drafts(
    folder: Path, drafter: Path, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
) -> tuple[dict[int, Drafts], dict[int, Drafts]]:
    """What becomes of each number of drafts a round, while the model continues the prompts.

    First as mlx-vlm runs when nobody says otherwise: it reads a prompt in pieces, of which 0.7.10
    shows the drafter the last token alone.  Then with prompts read in one piece.
    Rounds that mlx-vlm cuts short at the end of a text are left out.
    """
    import mlx.core as mx

    model: Any = _utils().load_model(folder)
    load_drafter: Any = import_module("mlx_vlm.speculative.drafters").load_drafter
    head, kind = load_drafter(str(drafter), kind="mtp")
    widen_on_cpu(model)
    widen_on_cpu(head)

    def counted(number: int, **settings: Any) -> Drafts:
        rounds: list[int] = []
        settings |= {"draft_model": head, "draft_kind": kind, "draft_block_size": number + 1}
        for tokens in prompts:
            for _ in _steps(model, mx.array([tokens]), NEW_TOKENS, **settings):
                pass
            pairs = zip(head.accept_lens, head.draft_lens, strict=True)
            rounds += [int(accepted) for accepted, drafted in pairs if drafted == number]
        if not rounds:
            raise ValueError(f"no text has room for {number} drafts")
        rates = tuple(sum(item > k for item in rounds) / len(rounds) for k in range(number))
        return Drafts(len(rounds), rates)

    by_default = {number: counted(number) for number in numbers}
    whole = {number: counted(number, prefill_step_size=None) for number in numbers}
    return by_default, whole


def _steps(model: Any, tokens: Any, length: int, **settings: Any) -> Any:
    step: Any = import_module("mlx_vlm.generate").generate_step
    return step(tokens, model, None, None, max_tokens=length, temperature=0.0, **settings)


def _utils() -> Any:
    return import_module("mlx_vlm.utils")


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _load_source(source: SourceWeights) -> Any:
    """The model as `mlx_vlm.convert` without quantization would make it, read as it is used."""
    import mlx.core as mx

    files: dict[str, Any] = {
        path: mx.load(path) for path in {path for path, _ in source.tensors.values()}
    }
    weights = {name: files[path][stored] for name, (path, stored) in source.tensors.items()}
    utils = _utils()
    load = utils.mx.load
    with tempfile.TemporaryDirectory() as name:
        folder = as_checkpoint(Path(name), source.config)
        # It looks for files, and reads them by `mx.load`, for which this stands in.
        utils.mx.load = lambda *_, **__: dict(weights)
        try:
            model = utils.load_model(folder, lazy=True)
        finally:
            utils.mx.load = load
    # `mlx_vlm.convert` reads the same of `load_config`, which adds nothing about types.
    cast_as_stated(model, source.config)
    return model
