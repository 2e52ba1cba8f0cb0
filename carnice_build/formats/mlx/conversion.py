"""What mlx-lm or mlx-vlm makes of a view: by the family's table, else by asking it.

A view has one spelling, whatever that of the checkpoint is; libraries know spellings of files.
So one is asked about a made-up checkpoint with a tensor for each expert, and if it refuses that,
about one with the tensors that some families fuse, and its answer is told in terms of the view.
Of a model without a table all that is known is the checkpoint's own spelling, which comes first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from carnice_build.dtypes import TensorSpec
from carnice_build.errors import PlanError
from carnice_build.formats.mlx.answers import answered
from carnice_build.formats.mlx.entries import older_entries, with_entries
from carnice_build.formats.mlx.table import table_of, trace_of
from carnice_build.formats.mlx.target import ANSWERERS, Target
from carnice_build.formats.mlx.trace import Refusal, Step, Trace, Traced, TracedSource
from carnice_build.graph import View
from carnice_build.models.base import Architecture, FusedIn, TensorFact
from carnice_build.steps.base import PlanContext, Question
from carnice_build.tensors import members


def mlx_trace(view: View, context: PlanContext, target: Target) -> Trace:
    """What the target's `convert` makes of the view; PlanError with its words where it refuses."""
    architecture = context.architecture
    specs = {name: view[name].spec for name in architecture.tensors if name in view}
    table = table_of(architecture.name, target)
    config = architecture.published_config({architecture.tensors[name].part for name in specs})
    entries = older_entries(config, table, target)
    if table is None:
        trace = _asked(specs, with_entries(config, entries), context, target)
    else:
        if table.every_nth and (reason := _uneven(architecture, target)):
            raise PlanError(reason, at=("format",))
        trace = trace_of(table, specs, architecture.tensors, architecture.dtype)
    return replace(trace, entries=entries)


def knows(model_type: str, target: Target) -> bool:
    """Whether the library has a model of this type, as far as its files tell without being run.

    True where it is not installed: whoever asks it then says so.
    """
    library = find_spec(target.replace("-", "_"))
    if library is None or library.origin is None:
        return True
    folder = Path(library.origin).parent
    name = _other_names(folder / "utils.py").get(model_type, model_type)
    if not re.fullmatch(r"\w{1,100}", name):
        return False
    models = folder / "models"
    return (models / f"{name}.py").exists() or (models / name / "__init__.py").exists()


def _other_names(path: Path) -> Mapping[str, str]:
    """Model types that are run as others, by what a library's module says of them."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "MODEL_REMAPPING" in names:
                found: Mapping[str, str] = ast.literal_eval(node.value)
                return found
    return {}


def _uneven(architecture: Architecture, target: Target) -> str | None:
    """Why MLX cannot run the model; it takes its masks from the first layer of each kind."""
    kinds = [architecture.layer_kind(layer) for layer in range(architecture.num_layers)]
    full = [layer for layer, kind in enumerate(kinds) if kind == "full"]
    interval = full[0] + 1 if full else 0
    if 0 < len(full) < len(kinds) and full == list(range(interval - 1, len(kinds), interval)):
        return None
    layers = ", ".join(map(str, full))
    found = f"layers {layers} have" if full else "no layer has"
    return f"{found} full attention, and {target} can only run a model of which every n-th has"


def _asked(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    context: PlanContext,
    target: Target,
) -> Trace:
    architecture = context.architecture
    facts = [architecture.tensors[name] for name in specs]
    spellings: list[Numbered | Fused] = [Numbered(specs)]
    if any(fact.fused for fact in facts):
        spellings.append(Fused(specs, facts))
    if not architecture.tabled:
        spellings.reverse()
    reasons = []
    for spelling in spellings:
        answer = ask_mlx(context, config, spelling.tensors, spelling.names, target)
        if isinstance(answer, Trace):
            return told(answer, spelling.parts, target)
        reasons.append(answer.reason)
    raise refused(reasons[0], target)


def refused(reason: str, target: Target = Target.MLX_LM) -> PlanError:
    """The error for a model that a library refuses, in its words."""
    return PlanError(f"{target} does not take this model: {reason}", at=("format",))


def ask_mlx(
    context: PlanContext,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    names: Collection[str],
    target: Target = Target.MLX_LM,
) -> Trace | Refusal:
    """A library's answer about a checkpoint of these tensors, which `names` are, some of stacks."""
    # Most plans ask nobody; of those that do, none imports the library.
    from carnice_build.backends.mlx_trace import TRACER_VERSION

    answerer = ANSWERERS[target]
    if dtype := context.architecture.dtype:
        # Of the spellings of this entry they know the one before transformers 5.
        config = {**config, "torch_dtype": dtype}
    rows = {name: [spec.dtype, list(spec.shape)] for name, spec in tensors.items()}
    return context.ask(
        Question(
            function=f"{answerer.module}:answer",
            arguments=(config, rows),
            libraries=(target.value, "mlx"),
            version=TRACER_VERSION,
            parse=partial(answered, tensors=tensors, names=names),
            extra=answerer.extra,
        )
    )


class Numbered:
    """A made-up checkpoint with a tensor for each expert; nothing in it has `parts`."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.parts: dict[str, Parts] = {}
        self.names: Collection[str] = specs.keys()
        self.tensors = dict(
            member for name, spec in specs.items() for member in members(name, spec)
        )


@dataclass(frozen=True)
class Parts:
    """The stacks of a fused tensor, in its order; their rows may take turns."""

    stacks: Sequence[TracedSource]
    turns: bool

    def spans(self) -> Iterator[tuple[tuple[int, ...], ...]]:
        """Where each lies: starts, stops and strides along every axis."""
        experts, rows, *rest = self.stacks[0].spec.shape
        of = len(self.stacks)
        for part in range(of):
            first, stop, step = FusedIn("", part, of, self.turns).rows(rows)
            ones = [1] * len(rest)
            yield (0, first, *[0] * len(rest)), (experts, stop, *rest), (1, step, *ones)


class Fused:
    """A made-up checkpoint in which stacks are parts of what `TensorFact.fused` names."""

    def __init__(self, specs: Mapping[str, TensorSpec], facts: Iterable[TensorFact]) -> None:
        self.tensors: dict[str, TensorSpec] = {}
        self.parts: dict[str, Parts] = {}
        found: dict[str, dict[int, TracedSource]] = {}
        turns: set[str] = set()
        for fact in facts:
            spec = specs[fact.name]
            if fact.fused is None:
                self.tensors.update(members(fact.name, spec))
                continue
            name, of = fact.fused.name, fact.fused.of
            experts, rows, *rest = spec.shape
            self.tensors[name] = TensorSpec(spec.dtype, (experts, of * rows, *rest))
            found.setdefault(name, {})[fact.fused.part] = TracedSource(fact.name, spec)
            turns |= {name} if fact.fused.turns else set()
        for name, parts in found.items():
            self.parts[name] = Parts([parts[index] for index in sorted(parts)], name in turns)
        self.names: Collection[str] = {*specs, *self.parts}


def told(trace: Trace, parts: Mapping[str, Parts], target: Target = Target.MLX_LM) -> Trace:
    """A library's trace with the stacks of the view in the place of fused tensors."""
    return replace(trace, tensors=tuple(_told(item, parts, target) for item in trace.tensors))


def _told(item: Traced, parts: Mapping[str, Parts], target: Target) -> Traced:
    if not any(source.name in parts for source in item.sources):
        return item
    return _Retelling(item, parts, target).result()


class _Retelling:
    """Writes a program anew, on other sources."""

    def __init__(self, item: Traced, parts: Mapping[str, Parts], target: Target) -> None:
        self._item = item
        self._parts = parts
        self._target = target
        self._sources: dict[TracedSource, int] = {}
        self._steps: list[Step] = []
        self._values: list[_Value] = []

    def result(self) -> Traced:
        """The tensor by the new program."""
        self._values = [_Value(source=source) for source in self._item.sources]
        for step in self._item.steps:
            part = self._part(step)
            if part is not None:
                self._values.append(_Value(source=part))
            else:
                operands = tuple(self._place(index) for index in step.operands)
                self._values.append(self._add(replace(step, operands=operands)))
        last = self._place(len(self._values) - 1)
        steps = tuple(self._shifted(step) for step in self._steps)
        assert not steps or last == ~(len(steps) - 1)
        return replace(self._item, sources=tuple(self._sources), steps=steps)

    def _part(self, step: Step) -> TracedSource | None:
        """The stack that a slice of a fused tensor is."""
        if step.op != "slice":
            return None
        source = self._values[step.operands[0]].source
        parts = self._parts.get(source.name) if source else None
        if parts is None:
            return None
        pairs = zip(parts.stacks, parts.spans(), strict=True)
        return next((stack for stack, span in pairs if step.arguments == span), None)

    def _place(self, index: int) -> int:
        """The number of a value in the new program: of a source, or ~ that of a step."""
        value = self._values[index]
        if value.source is None:
            return value.step
        parts = self._parts.get(value.source.name, Parts([value.source], turns=False))
        places = [self._sources.setdefault(stack, len(self._sources)) for stack in parts.stacks]
        if len(places) == 1:
            return places[0]
        if parts.turns:
            what = f"{self._target} does not take {value.source.name} apart"
            raise PlanError(what, at=("format",))
        whole = self._add(Step("concatenate", tuple(places), (1,)))
        self._values[index] = whole
        return whole.step

    def _add(self, step: Step) -> _Value:
        self._steps.append(step)
        return _Value(step=~(len(self._steps) - 1))

    def _shifted(self, step: Step) -> Step:
        count = len(self._sources)
        return replace(
            step,
            operands=tuple(place if place >= 0 else count + ~place for place in step.operands),
        )


class _Value:
    """A value of a program: a source, or the step that makes it, as ~ its number."""

    def __init__(self, source: TracedSource | None = None, step: int = 0) -> None:
        self.source = source
        self.step = step
