"""Running a model whose weights are dequantized, in torch; called in a process of its own.

Everything is computed in float32.  A quantized weight is a code times its scales, which float32
holds and BF16 would round again, and BF16's own rounding of hidden states would drown the small
divergences that are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from carnice_build.errors import BackendError
from carnice_build.formats.checks import Rounding, TorchChecks
from carnice_build.formats.exclusions import modules_of
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import matrix, read_rows
from carnice_build.graph import TensorData
from carnice_build.models.base import Architecture, Part, Role
from carnice_build.store.digests import digest_bytes
from carnice_build.tensors import STACK, SourceTensor, numbered
from carnice_build.verification import fidelity
from carnice_build.verification.calls import Asked
from carnice_build.verification.fidelity import Fidelity
from carnice_build.verification.generate import Generation
from carnice_build.verification.kept import NOT_KEPT, KeptSource
from carnice_build.verification.perplexity import SAMPLES_ON_CPU, Perplexity, cut, tokens_of
from carnice_build.verification.running import Drafts

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "numba", "jinja2")
"""Those whose versions decide figures."""

PROMPTS = 16
PROMPT_LENGTH = 96
NEW_TOKENS = 64
DRAFTS = (1, 3)


@dataclass(frozen=True)
class StoredModel:
    """A text model where it lies: tensors by canonical names.

    `checks` reads the modules of `quantized`, by path their schemes.
    With `activations`, the inputs of these modules are rounded as the format's engines do.
    """

    architecture: Architecture
    tensors: Mapping[str, SourceTensor]
    checks: TorchChecks | None = None
    quantized: Mapping[str, Scheme] | None = None
    activations: bool = False

    def tensor(self, name: str) -> Any:
        """A torch tensor: dequantized to float32, or in its own type; a stack as one.

        Rows that the folder leaves out, as GGUF does those of an embedding that have no tokens, are
        zeros.
        """
        import torch

        if STACK not in name or name in self.tensors:
            found = self._one(name, name.rpartition(".")[0])
            fact = self.architecture.tensors.get(name)
            left_out = fact.shape[0] - len(found) if fact and fact.shape and found.ndim else 0
            if left_out <= 0:
                return found
            return torch.cat([found, found.new_zeros(left_out, *found.shape[1:])])
        fact = self.architecture.tensors[name]
        experts = numbered(name, fact.shape[0])
        return torch.stack([self._one(expert, fact.module) for expert in experts])

    def _one(self, name: str, module: str) -> Any:
        """A tensor of the folder; `module` is what the plan calls the one that owns it."""
        import torch

        from carnice_build.backends.tensors import as_tensor

        owner, _, part = name.rpartition(".")
        if self.checks and self.quantized and module in self.quantized and part == "weight":
            values = self.checks.values(self.tensors, owner, self.quantized[module])
            return torch.from_numpy(values.rows(0, values.shape[0]))
        if name not in self.tensors:
            raise BackendError(f"tensor {name} is missing")
        spec = self.tensors[name].spec
        data = read_rows(self.tensors[name], spec, 0, matrix(spec)[0])
        return as_tensor(TensorData(spec.dtype, data.array.reshape(spec.shape)))

    def source(self, changed: Mapping[str, Any] | None = None) -> Any:
        """What `quality.measure` and `OpenModel` take, with other tensors in place of some."""
        from carnice_build.calibration.text_model import ModelSource

        replaced = changed or {}
        transforms = {}
        if self.activations and self.checks:
            modules = {fact.module: modules_of(fact) for fact in self.architecture.tensors.values()}
            for module in (one for name in self.quantized or () for one in modules[name]):
                rounding = self.checks.input_rounding(self.tensors, module)
                if rounding:
                    transforms[module] = _transform(rounding)
        return ModelSource(
            self.architecture,
            lambda name: replaced[name] if name in replaced else self.tensor(name),
            transforms,
        )


def _transform(rounding: Rounding) -> Any:
    def transform(inputs: Any) -> Any:
        import torch

        rows = inputs.detach().reshape(-1, inputs.shape[-1]).contiguous().numpy()
        return torch.from_numpy(rounding(rows)).view(inputs.shape)

    return transform


def measure_perplexities(
    models: Mapping[str, StoredModel],
    tokenizer: Path,
    text: Path,
    lengths: Sequence[int],
    samples: int | None,
    threads: int,
    kept: KeptSource,
) -> dict[str, list[Perplexity]]:
    """Perplexity of each model, and KL against the first, at each length that the text has."""
    import torch

    from carnice_build.verification.quality import measure

    tokens = tokens_of(tokenizer, text)
    sources = {name: model.source() for name, model in models.items()}
    arithmetic = _arithmetic(next(iter(models.values())).architecture, threads)
    found: dict[str, list[Perplexity]] = {name: [] for name in models}
    for length in lengths:
        sequences = cut(tokens, length, samples or SAMPLES_ON_CPU)
        if not sequences:
            continue
        rows = [torch.tensor(row) for row in sequences]
        for name, item in measure(sources, rows, arithmetic, kept).items():
            found[name].append(Perplexity(length, len(rows), item.perplexity, item.error, item.kl))
    return found


def measure_halves(
    model: StoredModel,
    tokenizer: Path,
    text: Path,
    length: int,
    samples: int,
    threads: int,
    start: int | None = None,
) -> Perplexity | None:
    """Perplexity over the second half of each sequence alone, as `llama-perplexity` has it.

    The token `start`, if there is one, is before the text, and in the place of the first one of
    each sequence.
    """
    import torch

    from carnice_build.verification.quality import measure

    tokens = tokens_of(tokenizer, text)
    if start is not None and tokens[:1] != [start]:
        tokens = [start, *tokens]
    rows = [torch.tensor(row) for row in cut(tokens, length, samples)]
    if start is not None:
        for row in rows:
            row[0] = start
    if not rows:
        return None
    arithmetic = _arithmetic(model.architecture, threads)
    (found,) = measure({"": model.source()}, rows, arithmetic, first=length // 2).values()
    return Perplexity(length, len(rows), found.perplexity, found.error)


def generate(model: StoredModel, tokenizer: Path, threads: int) -> Generation:
    """The model's answer to the chat prompt."""
    from transformers import AutoTokenizer

    from carnice_build.verification import quality

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    return quality.generate(model.source(), loaded, _arithmetic(model.architecture, threads))


def measure_acceptance(
    model: StoredModel,
    tokenizer: Path,
    text: Path,
    samples: int | None,
    threads: int,
) -> tuple[dict[int, Drafts], dict[int, Drafts]]:
    """What is accepted of the head as it is, and of the head quantized as the body is.

    The model continues `samples` prompts from all over the text, the same for both heads.
    """
    heads = [model.source(), model.source(_rounded_head(model))]
    prompts = prompts_of(tokenizer, text, samples or PROMPTS)
    packaged, quantized = count_drafts(heads, prompts, DRAFTS, threads)
    return packaged, quantized


def count_drafts(
    sources: Sequence[Any], prompts: Sequence[Sequence[int]], numbers: Sequence[int], threads: int
) -> list[dict[int, Drafts]]:
    """What is accepted of each head's drafts, by their number in a step.

    `sources` are one model with different heads, which continues the prompts.
    """
    import torch

    from carnice_build.calibration.decoding import Prompt
    from carnice_build.calibration.text_model import OpenModel, ResidentModel
    from carnice_build.verification.drafting import acceptance

    arithmetic = _arithmetic(sources[0].architecture, threads)
    # First, for a head that nobody has code for is refused.
    drafters = [OpenModel(source, arithmetic).draft_head() for source in sources]
    target = ResidentModel(OpenModel(sources[0], arithmetic))
    texts = target.continue_all([Prompt(torch.tensor(row), NEW_TOKENS) for row in prompts])
    return [
        {number: acceptance(drafter, target, texts, number) for number in numbers}
        for drafter in drafters
    ]


def prompts_of(tokenizer: Path, text: Path, count: int) -> list[list[int]]:
    """As many prompts, from all over the text."""
    tokens = tokens_of(tokenizer, text)
    stride = max(PROMPT_LENGTH, len(tokens) // count)
    starts = range(0, len(tokens), stride)
    return [tokens[start : start + PROMPT_LENGTH] for start in starts][:count]


def measure_fidelity(
    models: Mapping[str, StoredModel],
    tokenizer: Path,
    samples: int | None,
    threads: int,
    kept: KeptSource,
) -> dict[str, Fidelity]:
    """How each model copies rare names, against the first.

    There are as many names, in proportion to the usual, as there are `samples`.
    """
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    sources = {name: model.source() for name, model in models.items()}
    share = (samples or SAMPLES_ON_CPU) / SAMPLES_ON_CPU
    return fidelity.measure(
        sources,
        loaded,
        _arithmetic(next(iter(models.values())).architecture, threads),
        answered=max(2, round(share * fidelity.ANSWERED)),
        read=max(2, round(share * fidelity.READ)),
        kept=kept,
    )


@dataclass(frozen=True)
class Said:
    """What a model said after each of some prompts."""

    texts: list[str]


def answer(
    name: str,
    model: Any,
    asked: Sequence[Asked],
    tokenizer: Path,
    threads: int,
    kept: KeptSource = NOT_KEPT,
) -> Said:
    """What a model says after each prompt, up to the end of its turn, special tokens and all.

    `model`, called `name`, is a `StoredModel` or an `MlxStored`; `kept` is what is known of the
    source.
    """
    facts = {
        "asked": [asdict(item) for item in asked],
        "tokenizer": digest_bytes((tokenizer / "tokenizer.json").read_bytes()),
        "threads": threads,
    }
    return kept.measured(name, facts, Said, lambda: _said(model, asked, tokenizer, threads))


def _said(model: Any, asked: Sequence[Asked], tokenizer: Path, threads: int) -> Said:
    import torch
    from transformers import AutoTokenizer

    from carnice_build.calibration.decoding import Prompt
    from carnice_build.calibration.text_model import OpenModel, ResidentModel

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    specials = set(loaded.all_special_ids)
    prompts = []
    for item in asked:
        prompt, right = (
            loaded(text, add_special_tokens=False)["input_ids"]
            for text in (item.prompt, item.right)
        )
        # What ends a turn is special, or is the tokenizer's own end.
        last = [token for token in right if token in specials][-1:]
        ends = frozenset({*last, loaded.eos_token_id})
        prompts.append(Prompt(torch.tensor(prompt), len(right) + item.more, ends))
    resident = ResidentModel(OpenModel(model.source(), _arithmetic(model.architecture, threads)))
    texts = []
    for task, said in zip(prompts, resident.continue_all(prompts), strict=True):
        new = said.tokens[said.prompt :].tolist()
        texts.append(loaded.decode(new[:-1] if new[-1] in task.ends else new))
    return Said(texts)


def _rounded_head(model: StoredModel) -> dict[str, Any]:
    """The linears of the MTP head as the format's rule would leave them."""
    import torch

    assert model.checks is not None
    architecture = model.architecture
    linears = {
        fact.module: fact.name
        for fact in architecture.tensors.values()
        if fact.part is Part.MTP and fact.role is Role.LINEAR
    }
    fused = [fusion.parts for fusion in architecture.fusions if fusion.parts[0] in linears]
    alone = [(module,) for module in linears if module not in set(chain(*fused))]
    found: dict[str, Any] = {}
    for group in (*fused, *alone):
        names = [linears[module] for module in group]
        weights = [np.ascontiguousarray(model.tensor(name).float().numpy()) for name in names]
        rounded = model.checks.rounded(weights)
        found |= dict(zip(names, map(torch.from_numpy, rounded), strict=True))
    return found


def _arithmetic(architecture: Architecture, threads: int) -> Any:
    """As models run here, each with the attention that transformers has for it."""
    from carnice_build.calibration.driver import Arithmetic, usual_attention

    return Arithmetic("float32", usual_attention(architecture.text_config), threads)
