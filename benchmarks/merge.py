"""Measure the ways to INT4 on the demo: both delta-merges, rounding to nearest, and AutoRound.

    python -m benchmarks.merge [--cache FOLDER] [--length 512] [--samples 48]

The weights are those of the built folders, dequantized; all arithmetic is float32. The texts are
`demo/heldout.txt`, which nothing was trained or tuned on, and the dialogues of
`demo/calibration.jsonl` behind those that AutoRound calibrates on. "changed" and "left alone" are
the modules that the fine-tune changed and those it did not: quality is measured once more with
only these quantized.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.run import ROOT, WORK
from carnice_build.backends.tensors import as_tensor
from carnice_build.calibration.driver import Arithmetic
from carnice_build.calibration.text_model import ModelSource
from carnice_build.calibration.tokenizing import tokenize
from carnice_build.checkpoint.source import LocalFile
from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.formats.autoround.ops import SUFFIXES
from carnice_build.graph import TensorData
from carnice_build.kernels.autoround import dequantize_rows, unpack_rows
from carnice_build.tensor_file import TensorFile
from carnice_build.tensors import SourceTensor
from carnice_build.verification.perplexity import cut
from carnice_build.verification.quality import Quality, measure
from carnice_build.verification.sources import source_tensors

DEMO = ROOT / "demo"
GRID = DEMO / "qwen3.6-27b-int4-autoround"
MERGE = "int4-bf16-mtp"
ROWS = {
    "merge, delta": (MERGE, ("quantize.grid.rounding=delta",)),
    "merge, nearest": (MERGE, ("quantize.grid.rounding=nearest",)),
    "round to nearest": ("int4-rtn", ()),
    "AutoRound": ("int4-autoround", ()),
}
SOURCE, BASE = "BF16", "the base, BF16"
PLACE = WORK / "merge"
CALIBRATED = 32 * 256
"""Tokens of the dialogues that the recipe calibrates on in profile `demo`, the first ones."""
COLUMNS = ("held-out ppl", "KL, mnat", "dialogues ppl", "KL, mnat")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Folder:
    """A built variant."""

    path: Path

    @cached_property
    def tensors(self) -> Tensors:
        """What its shards hold."""
        shards = sorted(self.path.glob("*.safetensors"))
        return {name: item for shard in shards for name, item in load_file(shard).items()}

    @cached_property
    def modules(self) -> list[str]:
        """The packed modules, by path."""
        return [name.removesuffix(".qweight") for name in self.tensors if name.endswith(".qweight")]

    def clipped(self, modules: Sequence[str]) -> int:
        """Clipped codes by build.json, which a merge alone counts."""
        figures = json.loads((self.path / "build.json").read_text(encoding="utf-8"))["figures"]
        return sum(figures[f"clipped codes of {module}"][0] for module in modules)

    def codes(self, module: str) -> NDArray[np.uint8]:
        """The codes of a module, U8 [out, in]."""
        qweight = self._parts(module)[0]
        codes = np.empty((qweight.shape[1], 8 * qweight.shape[0]), np.uint8)
        unpack_rows(qweight, 0, codes)
        return codes

    def weight(self, module: str) -> Tensor:
        """A module's dequantized weight, F32 [out, in]."""
        qweight, qzeros, scales = self._parts(module)
        values = np.empty((qweight.shape[1], 8 * qweight.shape[0]), np.float32)
        dequantize_rows(qweight, qzeros, scales, 0, values)
        return torch.from_numpy(values)

    def _parts(self, module: str) -> list[Any]:
        return [self.tensors[f"{module}.{part}"].numpy() for part in SUFFIXES]


class Bench:
    """The variants, built, and the checkpoint that they were made from."""

    def __init__(self, cache: Path) -> None:
        self._options = Options(recipes=ROOT / "recipes", cache=cache)
        self.folders = {name: self._build(name, *of) for name, of in ROWS.items()}
        (variant,) = plan_variants([MERGE], self._options).variants
        self.architecture = variant.architecture
        self._sources = source_tensors(variant)
        self._base = {name: t for p in _shards("qwen3.6-27b") for name, t in load_file(p).items()}
        self.grid = Folder(GRID)
        modules = self.folders["AutoRound"].modules
        self.changed = [
            module
            for module in modules
            if not torch.equal(self.source(f"{module}.weight"), self._base[f"{module}.weight"])
        ]
        self.alone = [module for module in modules if module not in self.changed]

    def _build(self, name: str, variant: str, overrides: tuple[str, ...]) -> Folder:
        out = PLACE / name.replace(", ", "-").replace(" ", "-")
        places = {"out": out, "overrides": overrides}
        build_variants([variant], Options(**{**vars(self._options), **places}))
        return Folder(out / variant)

    def source(self, name: str) -> Tensor:
        """A tensor of the fine-tune by its canonical name."""
        return _read(self._sources[name])

    def model(self, folder: Folder | None, quantized: Collection[str]) -> ModelSource:
        """The fine-tune with the `quantized` modules as they are in the folder."""

        def tensor(name: str) -> Tensor:
            module = name.removesuffix(".weight")
            if folder is not None and module in quantized:
                return folder.weight(module)
            return self.source(name)

        return ModelSource(self.architecture, tensor)

    def base_model(self) -> ModelSource:
        """What the fine-tune was made from: what is left if a merge loses it."""
        return ModelSource(self.architecture, self._base.__getitem__)

    def weight_error(self, folder: Folder, modules: Sequence[str]) -> float:
        """The mean over the modules of |quantized - weight| / |weight|, in Frobenius norms."""
        errors: list[float] = []
        for module in modules:
            weight = self.source(f"{module}.weight").float()
            errors.append(float((folder.weight(module) - weight).norm() / weight.norm()))
        return sum(errors) / len(errors)

    def moved(self, folder: Folder, modules: Sequence[str]) -> float:
        """The share of codes that are not those of the base's grid."""
        differ = sum(int((folder.codes(m) != self.grid.codes(m)).sum()) for m in modules)
        return differ / sum(self.source(f"{m}.weight").numel() for m in modules)

    def steps(self) -> Tensor:
        """How far the fine-tune moved each weight of the changed modules, in steps of the grid."""
        found = []
        for module in self.changed:
            name = f"{module}.weight"
            delta = (self.source(name).float() - self._base[name].float()).abs()
            scales = self.grid.tensors[f"{module}.scales"].T.float().abs()
            found.append((delta / scales.repeat_interleave(128, dim=1)).flatten())
        return torch.cat(found)


def _shards(folder: str) -> list[Path]:
    return sorted((DEMO / folder).glob("*.safetensors"))


def _read(tensor: SourceTensor) -> Tensor:
    assert isinstance(tensor.file, LocalFile)
    file = TensorFile(tensor.spec, tensor.file.name, tensor.offset, tensor.name)
    return as_tensor(TensorData(tensor.spec.dtype, file.read()))


def texts(length: int, samples: int, template: Path) -> dict[str, list[Tensor]]:
    """Sequences of held-out sources, and of dialogues behind what AutoRound calibrates on."""
    content = (DEMO / "carnice-v2-27b" / "tokenizer.json").read_bytes()
    held_out = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    sources = cut(Tokenizer.from_str(content.decode()).encode(held_out).ids, length, samples)
    calibrated = -(-CALIBRATED // length)
    params = {
        "samples": calibrated + samples,
        "length": length,
        "rows": "jsonl",
        "joined": True,
        "roles": {"human": "user", "gpt": "assistant"},
        "template": template.read_text(encoding="utf-8"),
        "special_tokens": {},
    }
    rows = tokenize(params, np.frombuffer(content, np.uint8), str(DEMO / "calibration.jsonl"))
    both: dict[str, Sequence[Sequence[int]]] = {
        "held-out": sources,
        "dialogues": rows[calibrated:],
    }
    return {name: [torch.tensor(row) for row in found] for name, found in both.items()}


def compare(bench: Bench, sequences: Mapping[str, Sequence[Tensor]]) -> Table:
    """A row for each way and each choice of quantized modules."""
    splits = {"": bench.changed + bench.alone, "changed": bench.changed, "left alone": bench.alone}
    models = {(SOURCE, ""): bench.model(None, ()), (BASE, ""): bench.base_model()} | {
        (name, split): bench.model(folder, modules)
        for name, folder in bench.folders.items()
        for split, modules in splits.items()
    }
    keyed = {" ".join(key): model for key, model in models.items()}
    arithmetic = Arithmetic("float32", "sdpa", threads=torch.get_num_threads())
    found = {name: measure(keyed, rows, arithmetic) for name, rows in sequences.items()}
    table = Table("way", "modules", "weight error", "changed codes", "clipped", *COLUMNS)
    for name, split in models:
        figures = [quality_cells(item[f"{name} {split}"]) for item in found.values()]
        folder, modules = bench.folders.get(name), splits[split]
        own = ["", "", ""] if folder is None else weight_cells(bench, folder, modules)
        table.add_row(name, split or "all", *own, *(cell for cells in figures for cell in cells))
    return table


def weight_cells(bench: Bench, folder: Folder, modules: Sequence[str]) -> list[str]:
    """Error of the weights, and what a merge did to the codes."""
    error = f"{bench.weight_error(folder, modules):.4f}"
    if MERGE not in str(folder.path):
        return [error, "", ""]
    return [error, f"{bench.moved(folder, modules):.2%}", str(folder.clipped(modules))]


def quality_cells(item: Quality) -> list[str]:
    """Perplexity with its standard error, and KL against BF16 in thousandths of a nat."""
    assert item.perplexity is not None
    assert item.kl is not None
    return [f"{item.perplexity:.4f} ± {item.error:.4f}", f"{1000 * item.kl:.3f}"]


def main() -> None:
    """Build, measure, print; the folders stay for a look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=PLACE / "cache")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=48)
    options = parser.parse_args()
    bench = Bench(options.cache)
    template = bench.folders["AutoRound"].path / "chat_template.jinja"
    console = Console(width=150)
    steps = bench.steps()
    console.print(
        f"{len(bench.changed)} modules changed, {len(bench.alone)} left alone; the fine-tune moved "
        f"the weights of the former by {steps.mean():.3f} steps on average, "
        f"{(steps > 0.5).float().mean():.2%} of them by more than half a step"
    )
    console.print(compare(bench, texts(options.length, options.samples, template)))


if __name__ == "__main__":
    main()
