"""Importance matrices: what each column of a weight counts when its rows are quantized.

From a file that llama-imatrix has written (see `imatrix_file`), or from passes of our own, in which
the squares of each linear's inputs are summed.  Either way a weight's importance is the mean square
of each column's inputs, for each expert of a stack, as llama-quantize gives it to ggml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from carnice_build.calibration.chain import Activations, Squares
from carnice_build.calibration.plan import Calibration
from carnice_build.checkpoint.gguf_header import Described
from carnice_build.errors import CheckpointError, PlanError, nearest
from carnice_build.formats.gguf.imatrix_file import Entry, Imatrix, described, read_imatrix
from carnice_build.formats.gguf.imatrix_ops import ColumnOrder, Importance
from carnice_build.formats.gguf.mix_rules import EMBEDDING
from carnice_build.graph import ActionGraph, TensorRef, View
from carnice_build.recipe.schema import FileSpec
from carnice_build.steps.base import PlanContext

Own = Literal["calibration"]

OWN: Own = "calibration"
"""The importance that our own passes find, over what the recipe calibrates on."""

ImatrixSpec = Own | FileSpec
"""Where a recipe has an importance matrix from."""

_MATRIX = 2


class Order(NamedTuple):
    """How a GGUF file's columns follow one another: those of the weight, see `ColumnOrder`."""

    split: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """A tensor of a GGUF file that importance is wanted for.

    `shape` is [rows, columns] or [experts, rows, columns]; `module` is the path of the linear whose
    inputs its columns are given, None where that is no linear; `columns` how they were reordered.
    """

    name: str
    shape: tuple[int, ...]
    module: str | None = None
    columns: Order | None = None

    @property
    def importance(self) -> tuple[int, ...]:
        """The shape of its importance: [columns] or [experts, columns]."""
        return (*self.shape[:-2], self.shape[-1])

    @property
    def matrices(self) -> int:
        """How many matrices it is."""
        return 1 if len(self.shape) == _MATRIX else self.shape[0]


@dataclass(frozen=True)
class Importances:
    """Importance by tensor, F32 [columns] or [experts, columns], and which tensors have none.

    `datasets`, `entries` and `chunks` are what llama-quantize writes down of an imatrix.
    """

    refs: Mapping[str, TensorRef]
    missing: tuple[str, ...]
    datasets: tuple[str, ...]
    entries: int
    chunks: int

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person may want to know: how many tensors are quantized without importance."""
        if not self.missing:
            return ()
        first = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
        whole = len(self.refs) + len(self.missing)
        without = f"{len(self.missing)} of {whole} tensors are quantized without importance"
        return (f"imatrix: {without}: {first}",)


@dataclass(frozen=True)
class Passes:
    """Our own passes: what linears are given in as many `layers`, over which text.

    `chunks` is the number of samples, `chunk_size` that of the tokens of the longest.
    """

    activations: Activations
    layers: int
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    _squares: dict[str, Squares] = field(default_factory=dict, init=False, repr=False)

    def squares(self, module: str) -> Squares | None:
        """The sums of squares of what `module` is given; None for what is in no decoder layer."""
        if not self._squares:
            for layer in range(self.layers):
                self._squares.update(self.activations.squares(layer))
        return self._squares.get(module)


def imatrix_source(spec: ImatrixSpec, view: View, context: PlanContext) -> Imatrix | Passes:
    """What a recipe names: a file, found and read but for its sums, or passes of our own.

    PlanError for passes in a recipe that does not say over which text, and for a file that is none.
    """
    if spec != OWN:
        return _read(spec, context)
    source = context.calibrated()
    calibration = Calibration(view, source)
    tokens = [part.tokens.spec for part in calibration.parts]
    return Passes(
        Activations(calibration),
        context.architecture.num_layers,
        (source.dataset.name,),
        sum(samples for samples, _ in (spec.shape for spec in tokens)),
        tokens[0].shape[1],
    )


def _read(spec: FileSpec, context: PlanContext) -> Imatrix:
    try:
        return read_imatrix(context.find(spec))
    except CheckpointError as error:
        raise error.of_entry("imatrix") from None


def importance_refs(
    graph: ActionGraph, source: Imatrix | Passes, wanted: Sequence[Wanted]
) -> Importances:
    """The importance of the tensors that `source` knows.

    PlanError, which says how many fit, for a file that is of another model.
    """
    if isinstance(source, Imatrix):
        return _of_file(graph, source, wanted)
    found = dict(_summed(graph, source, wanted))
    refs = {
        item.name: graph.add(Importance(), {"calls": None}, *found[item.name])[0]
        for item in wanted
        if item.name in found
    }
    missing = tuple(item.name for item in wanted if item.name not in refs)
    return Importances(refs, missing, source.datasets, len(refs), source.chunks)


def imatrix_tensors(
    graph: ActionGraph, source: Passes, wanted: Sequence[Wanted]
) -> list[tuple[Described, TensorRef]]:
    """The tensors of a file that others can use, in their order; see `imatrix_metadata`."""
    found = dict(_summed(graph, source, wanted))
    by_name = {item.name: item for item in wanted}
    tensors: list[tuple[Described, TensorRef]] = []
    for name in sorted(found, key=str.encode):
        items = described(name, by_name[name].matrices, by_name[name].shape[-1])
        refs = (ref.reshaped(*item.shape) for ref, item in zip(found[name], items, strict=True))
        tensors += zip(items, refs, strict=True)
    return tensors


def _summed(
    graph: ActionGraph, source: Passes, wanted: Sequence[Wanted]
) -> Iterator[tuple[str, Squares]]:
    """By name the sums of squares and counts of tensors, their columns as the file has them."""
    for item in wanted:
        found = source.squares(item.module) if item.module is not None else None
        if found is None:
            continue
        sums, counts = found
        if sums.spec.shape != item.importance:
            raise PlanError(
                f"{item.name} has importance {list(item.importance)}, and {item.module} is given "
                f"{list(sums.spec.shape)}"
            )
        if item.columns is not None:
            split, order = map(list, item.columns)
            (sums,) = graph.add(ColumnOrder(), {"split": split, "order": order}, sums)
        yield item.name, Squares(sums, counts)


def _of_file(graph: ActionGraph, source: Imatrix, wanted: Sequence[Wanted]) -> Importances:
    refs: dict[str, TensorRef] = {}
    others: list[tuple[Wanted, int]] = []
    for item in wanted:
        entry = source.entries.get(item.name)
        if entry is None:
            continue
        if entry.sums.spec.size == item.matrices * item.shape[-1]:
            refs[item.name] = _of_entry(graph, entry).reshaped(*item.importance)
        elif item.name != EMBEDDING:
            # Nobody multiplies by it but where it is tied, so that it may have any size.
            others.append((item, entry.sums.spec.size))
    if others or (wanted and not refs):
        raise _of_another_model(source, wanted, others, len(refs))
    missing = tuple(item.name for item in wanted if item.name not in refs)
    return Importances(refs, missing, source.datasets, len(source.entries), source.chunks)


def _of_entry(graph: ActionGraph, entry: Entry) -> TensorRef:
    inputs = [entry.sums] if entry.counts is None else [entry.sums, entry.counts]
    refs = (TensorRef(tensor.spec, tensor) for tensor in inputs)
    return graph.add(Importance(), {"calls": entry.calls}, *refs)[0]


def _of_another_model(
    source: Imatrix, wanted: Sequence[Wanted], others: Sequence[tuple[Wanted, int]], fit: int
) -> PlanError:
    expected = "an importance matrix of this model"
    counted = f"{fit} of {len(wanted)} tensors fit"
    if not others:
        first = wanted[0].name
        return CheckpointError(
            f"is of another model: {counted}, for it has no {first}",
            where=source.name,
            expected=expected,
            nearest=nearest(first, source.entries),
        ).of_entry("imatrix")
    item, values = others[0]
    needed = item.matrices * item.shape[-1]
    return CheckpointError(
        f"is of another model: {counted}; {item.name} has {values} values there and needs {needed}",
        where=source.name,
        expected=expected,
    ).of_entry("imatrix")
