"""A folder of mlx-vlm and its drafter as the one model that they are, under canonical names.

So that what mlx-vlm says of drafts can be counted again by somebody else.
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
    """A text model with a drafter where they lie."""

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


def stored(variant: VariantPlan, drafter: VariantPlan, folder: Path) -> MlxStored:
    """The model at `folder`, with its drafter beside it."""
    head = folder.parent / drafter.name
    names = published(variant.architecture, Target.MLX_VLM)
    heads = published_drafter(variant.architecture)
    return MlxStored(
        variant.architecture,
        [
            _Piece(names, open_folder(folder).tensors, variant.conversion.quantized),
            _Piece(heads, open_folder(head).tensors, drafter.conversion.quantized),
        ],
    )


def count(
    model: MlxStored, prompts: Sequence[Sequence[int]], numbers: Sequence[int], threads: int
) -> dict[int, Drafts]:
    """Our own count of what is accepted, in torch; to be called in a process of its own.

    Nothing for a head that we have no code for.
    """
    from carnice_build.calibration.text_model import ModelSource
    from carnice_build.verification.torch_worker import count_drafts

    source = ModelSource(model.architecture, model.tensor)
    try:
        (found,) = count_drafts([source], prompts, numbers, threads)
    except NotImplementedError:
        return {}
    return found
