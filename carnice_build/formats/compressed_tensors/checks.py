"""Format `compressed-tensors`: what config.json must state, and the numbers of each storage.

The bound of a weight is derived beside the storage that has it, in `storages`.
What AWQ smoothed is not compared: the folder does not tell by what its weights were multiplied.
Nor is what GPTQ quantized: it moves a weight by what its error costs those after it, however far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from carnice_build.dtypes import WIDE_FLOATS
from carnice_build.formats.base import OutputTensor
from carnice_build.formats.checks import (
    FolderReader,
    QuantizedValues,
    Rounding,
    Tensors,
    TorchChecks,
)
from carnice_build.formats.compressed_config import METHOD, Stated, grouped_problems
from carnice_build.formats.compressed_tensors.gptq_ops import GptqQuantize
from carnice_build.formats.compressed_tensors.inputs import rounding, rounds
from carnice_build.formats.compressed_tensors.schemes import SCALE_TYPES, ConfigGroup, Weights
from carnice_build.formats.compressed_tensors.storages import (
    INPUT_SUFFIXES,
    all_suffixes,
    known_storage,
    storage_of,
)
from carnice_build.formats.compressed_tensors.storages.base import Storage
from carnice_build.formats.compressed_tensors.targets import Targets
from carnice_build.formats.exclusions import engine_names, modules_of
from carnice_build.formats.folder import ModelFolder, section
from carnice_build.formats.scheme import Scheme
from carnice_build.formats.statements import as_scheme, names
from carnice_build.formats.values import Floats, Incomparable, Values, read_scale
from carnice_build.graph import ActionOutput
from carnice_build.models.base import Architecture, Role


class CompressedReader(FolderReader):
    """Folders of compressed-tensors, whose groups say how each module is stored."""

    suffixes = (*all_suffixes(), *INPUT_SUFFIXES.values(), "weight_g_idx")

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Folders that name compressed-tensors as their method."""
        return section(config, "quantization_config").get("quant_method") == METHOD

    def scheme(self, module: str) -> Scheme | None:
        """That of its group."""
        return as_scheme(section(self._group(module), "weights"))

    def values(self, tensors: Tensors, module: str) -> Values:
        """See `FolderReader.values`."""
        storage = _stored(self._group(module))
        if storage is None:
            raise Incomparable(f"{module} is stored in a way not known")
        return storage.values(tensors, module)

    def _group(self, module: str) -> Mapping[str, Any]:
        groups = section(section(self.config, "quantization_config"), "config_groups")
        found = [section(groups, name) for name in groups]
        try:
            targets = Targets([names(group.get("targets")) for group in found])
        except ValueError:  # of what is no pattern
            return {}
        fitting = targets.named(module) or targets.classes
        # Of several the engine takes one, which is not guessed.
        return found[fitting[0]] if len(fitting) == 1 else {}


def _stored(group: Mapping[str, Any]) -> Storage | None:
    """How a folder stores what a group is about; None for what is not known here."""
    stated = section(group, "weights")
    # Which observer found the scales is not seen in them.
    known = Weights.model_fields.keys() & stated.keys() - {"observer", "dynamic"}
    given = {name: stated[name] for name in known}
    if given.get("strategy") is None:
        given["strategy"] = "group" if given.get("group_size") else "tensor"
    if given.get("scale_dtype") not in SCALE_TYPES:
        given["scale_dtype"] = None  # a float, which the tensor itself says
    try:
        weights = Weights.model_validate(given)
    except ValidationError:
        return None
    has_inputs = bool(section(group, "input_activations"))
    return storage_of(weights, quantized_inputs=has_inputs)


class CompressedChecks(TorchChecks):
    """Folders of compressed-tensors that a recipe describes."""

    def __init__(
        self,
        groups: Sequence[tuple[ConfigGroup, Stated]],
        kv_cache: Mapping[str, Any] | None = None,
    ) -> None:
        """The groups of a recipe, and what config.json is to say of each, its targets apart.

        `kv_cache` is what it is to say of the cache.
        """
        self._groups = [group for group, _ in groups]
        self._stated = [stated for _, stated in groups]
        self._kv_cache = kv_cache
        self._targets = Targets([group.targets for group in self._groups])

    @property
    def activations(self) -> str:  # type: ignore[override]
        """See `TorchChecks.activations`."""
        return rounds([group.input_activations for group in self._groups])

    def config_problems(self, folder: ModelFolder, architecture: Architecture) -> Iterator[str]:
        """Each scheme is that of the tensors, and every plain linear is ignored."""
        found = self._grouped(folder, architecture)
        stated = [self._stated[index] for index in found]
        yield from grouped_problems(folder, architecture, stated, self._kv_cache)
        groups = section(section(folder.config, "quantization_config"), "config_groups")
        try:
            targets = Targets([names(section(groups, name).get("targets")) for name in groups])
        except ValueError as error:
            yield f"config.json has a target that is no pattern: {error}"
            return
        for number, modules in enumerate(found.values()):
            for name in engine_names(architecture, modules):
                if targets.group(name) != number:
                    yield f"config.json does not give {name} to group_{number}, whose scheme it has"

    def _grouped(self, folder: ModelFolder, architecture: Architecture) -> dict[int, list[str]]:
        """The quantized modules of a folder by the numbers of the recipe's groups.

        They are in the order of the model, in which config.json has the groups.
        """
        found: dict[int, list[str]] = {}
        for fact in architecture.built.values():
            index = self._targets.group(fact.module) if fact.role is Role.LINEAR else None
            if index is None:
                continue
            modules = [one for one in modules_of(fact) if is_quantized(folder.tensors, one)]
            if modules:
                found.setdefault(index, []).extend(modules)
        return found

    def compared(self, tensors: Sequence[OutputTensor]) -> None:
        """Raise Incomparable for what AWQ smoothed, and what makes up for others' errors."""
        origin = tensors[0].ref.origin
        if isinstance(origin, ActionOutput) and isinstance(origin.action.op, GptqQuantize):
            raise Incomparable(f"{tensors[0].name} was quantized by GPTQ")
        if isinstance(origin, ActionOutput) and any(
            isinstance(ref.origin, ActionOutput) and ref.spec.dtype == "F64"
            for ref in origin.action.inputs[1:]
        ):
            raise Incomparable(f"{tensors[0].name} was smoothed")

    def values(self, tensors: Tensors, module: str, scheme: Scheme) -> QuantizedValues:
        """See `FormatChecks.values`."""
        return known_storage(self._group(module)).values(tensors, module)

    def input_rounding(self, tensors: Tensors, module: str) -> Rounding | None:
        """See `TorchChecks.input_rounding`."""
        inputs = self._group(module).input_activations
        scale = None
        if inputs and inputs.dynamic == "local":
            scale = 1 / read_scale(tensors, f"{module}.{INPUT_SUFFIXES[inputs.num_bits]}")
        return rounding(inputs, scale)

    def rounded(self, weights: Sequence[Floats]) -> list[Floats]:
        """See `TorchChecks.rounded`: by the group that is about most."""
        main = self._targets.classes or [0]
        return known_storage(self._groups[main[0]]).rounded(weights)

    def _group(self, module: str) -> ConfigGroup:
        index = self._targets.group(module)
        assert index is not None, "a quantized module is in a group"
        return self._groups[index]


def is_quantized(tensors: Tensors, module: str) -> bool:
    """Whether a folder holds a module's weight as something else than floats."""
    weight = tensors.get(f"{module}.weight")
    if weight is not None:
        return weight.spec.dtype not in WIDE_FLOATS
    return f"{module}.weight_packed" in tensors
