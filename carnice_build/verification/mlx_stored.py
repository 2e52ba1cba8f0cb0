"""A folder of MLX, and its drafter, as the one model that they are, under canonical names.

So that torch runs what mlx does: drafts are counted again by somebody else, and calls asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carnice_build.errors import BackendError
from carnice_build.formats.folder import open_folder
from carnice_build.formats.mlx.checks import MlxChecks
from carnice_build.formats.mlx.names import published, published_drafter
from carnice_build.formats.mlx.target import Target
from carnice_build.formats.mlx.trace import Kind, Traced
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.values import matrix, read_rows
from carnice_build.graph import TensorData
from carnice_build.models.base import Architecture
from carnice_build.planning.planner import VariantPlan
from carnice_build.tensors import SourceTensor
from carnice_build.verification.running import Drafts


@dataclass(frozen=True)
class _Piece:
    """One folder: what it holds under its own names, and what these stand for."""

    names: Mapping[str, Traced]
    tensors: Mapping[str, SourceTensor]
    quantized: Mapping[str, Scheme]


@dataclass(frozen=True)
class MlxStored:
    """A text model where it lies, with a drafter or without."""

    architecture: Architecture
    pieces: Sequence[_Piece]

    def tensor(self, name: str) -> Any:
        """A torch tensor in float32, as checkpoints have it: without the 1 of norms."""
        import torch

        from carnice_build.backends.tensors import as_tensor

        for piece in self.pieces:
            item = piece.names.get(name)
            if item is None or item.name not in piece.tensors:
                continue
            module, shape = item.name.rpartition(".")[0], item.sources[0].spec.shape
            if module in piece.quantized:
                checks = MlxChecks(zero=False)
                values = checks.values(piece.tensors, module, piece.quantized[module])
                return torch.from_numpy(values.rows(0, values.shape[0])).reshape(shape)
            stored = piece.tensors[item.name]
            data = read_rows(stored, stored.spec, 0, matrix(stored.spec)[0])
            found = as_tensor(TensorData(stored.spec.dtype, data.array)).float().reshape(shape)
            return found - 1 if item.kind is Kind.SHIFT else found
        raise BackendError(f"tensor {name} is missing")

    def source(self) -> Any:
        """What `OpenModel` takes."""
        from carnice_build.calibration.text_model import ModelSource

        return ModelSource(self.architecture, self.tensor)


def stored(
    variant: VariantPlan, folder: Path, target: Target, drafter: VariantPlan | None = None
) -> MlxStored:
    """The model at `folder`, which is for `target`; with a drafter, that which is beside it."""
    names = published(variant.architecture, target)
    pieces = [_Piece(names, open_folder(folder).tensors, variant.conversion.quantized)]
    if drafter is not None:
        head = open_folder(folder.parent / drafter.name).tensors
        heads = published_drafter(variant.architecture)
        pieces.append(_Piece(heads, head, drafter.conversion.quantized))
    return MlxStored(variant.architecture, pieces)


def count(
    model: MlxStored, prompts: Sequence[Sequence[int]], numbers: Sequence[int], threads: int
) -> dict[int, Drafts]:
    """Our own count of what is accepted, in torch; to be called in a process of its own.

    Nothing for a head that we have no code for.
    """
    from carnice_build.verification.torch_worker import count_drafts

    try:
        (found,) = count_drafts([model.source()], prompts, numbers, threads)
    except NotImplementedError:
        return {}
    return found
