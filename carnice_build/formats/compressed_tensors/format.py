"""Format `compressed-tensors`: what llm-compressor writes, one scheme or several in a folder.

Weights are rounded to nearest, as they are or after AWQ has smoothed them, or by GPTQ.  Where
neither is norms stay as they are, as `model_free_ptq` leaves them; `oneshot` rounds their gains.
The section speaks llm-compressor's language, so that its recipe can be read off it and is written
beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from carnice_build.calibration.chain import Activations as Maxima
from carnice_build.calibration.plan import Calibration
from carnice_build.errors import PlanError, nearest
from carnice_build.formats.base import Conversion, Format, OutputTensor, in_stated_dtype
from carnice_build.formats.blame import about_module, refuse_unfit
from carnice_build.formats.card import Card, own_template
from carnice_build.formats.compressed_config import SCALES, Stated, arguments, ignored_modules
from carnice_build.formats.compressed_tensors.awq import Scales, search
from carnice_build.formats.compressed_tensors.calibrated import input_scales, is_stored
from carnice_build.formats.compressed_tensors.files import compressed_files
from carnice_build.formats.compressed_tensors.gptq import Quantized, quantized
from carnice_build.formats.compressed_tensors.gptq_spec import NORMS, GptqSpec, Norms
from carnice_build.formats.compressed_tensors.grouping import Grouping
from carnice_build.formats.compressed_tensors.ops import SmoothNorm, SmoothWeight
from carnice_build.formats.compressed_tensors.schemes import (
    ALIASES,
    LINEAR,
    PRESETS,
    ConfigGroup,
    Weights,
    group_in_words,
    preset,
    preset_of,
)
from carnice_build.formats.compressed_tensors.storages import known_storage, stored
from carnice_build.formats.compressed_tensors.storages.base import NOT_SMOOTHED, Smoothing
from carnice_build.formats.kv_cache import KvCache, Observer, cache_scales, check_caches
from carnice_build.formats.variant import Variant
from carnice_build.graph import TensorRef, View
from carnice_build.models.base import Architecture, Part, Role, TensorFact
from carnice_build.recipe.patterns import Patterns, expression
from carnice_build.recipe.schema import AnyPatterns, PatternList, Strict
from carnice_build.serving.profile import Serving, ServingProfiles, read_support
from carnice_build.steps.base import PlanContext

if TYPE_CHECKING:
    from carnice_build.formats.compressed_tensors.checks import CompressedChecks, CompressedReader


class AwqSpec(Strict):
    """How AWQ searches; names and defaults are the library's, but for `norms`."""

    n_grid: int = Field(20, ge=4, description="Ratios that the search tries.")
    duo_scaling: bool | Literal["both"] = Field(
        True, description="Use the weights' magnitudes beside those of activations."
    )
    norms: Norms = NORMS


class CompressedKvCache(KvCache):
    """A cache whose scales are found by an observer of llm-compressor."""

    observer: Observer = Field(
        "minmax",
        description="`minmax`, which the library takes where its recipe names none: an average of "
        "the ranges of samples that moves by a hundredth with each, so that it is nearly that of "
        "the first; or `static_minmax`, the widest of all samples.",
    )

    def stated(self) -> dict[str, Any]:
        """The entry `kv_cache_scheme` of config.json."""
        observer = None if self.observer == "minmax" else self.observer
        return arguments(
            {
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": observer,
                "strategy": "tensor",
                "symmetric": True,
                "type": "float",
                "zp_dtype": None,
            }
        )


class CompressedFormat(Format):
    """Weights in schemes of compressed-tensors."""

    format: Literal["compressed-tensors"]
    scheme: str | Annotated[dict[str, PatternList], Field(min_length=1)] | None = Field(
        None,
        description="A preset of llm-compressor by name, such as `FP8_DYNAMIC`, for all of "
        "`targets`; or names of presets and the modules that each is for.",
    )
    config_groups: Annotated[dict[str, ConfigGroup], Field(min_length=1)] | None = Field(
        None, description="Groups of modules and their schemes, in place of `scheme`."
    )
    targets: PatternList = Field(
        default_factory=lambda: [LINEAR], description="What a single `scheme` is for."
    )
    ignore: AnyPatterns = Field(default_factory=list, description="Modules that stay as they are.")
    algorithm: Literal["awq", "gptq", "nearest"] = Field(
        "nearest",
        description="What happens before the rounding to nearest: AWQ's smoothing, or nothing; or "
        "GPTQ in its place.  For AWQ and GPTQ the recipe needs a calibration.",
    )
    awq: AwqSpec | None = Field(None, description="For algorithm `awq`.")
    gptq: GptqSpec | None = Field(None, description="For algorithm `gptq`.")
    nvfp4: Literal["library", "modelopt"] | None = Field(
        None, description="For a `scheme` of NVFP4: what `arithmetic` of its weights is."
    )
    kv_cache: CompressedKvCache | None = Field(
        None,
        description="Store scales for a cache of FP8, for which the recipe needs a calibration.",
    )

    retired: ClassVar[Mapping[str, str]] = {
        "n_grid": "`awq: {n_grid: ...}`",
        "duo_scaling": "`awq: {duo_scaling: ...}`",
        "norms": "`awq: {norms: ...}`",
        "mappings": "nothing in its place: the model's family says what is smoothed",
        "sequential_targets": "nothing in its place: decoder layers are calibrated one at a time",
        "moe_calibrate_all_experts": "nothing in its place: every expert reads every token",
    }

    @field_validator("scheme")
    @classmethod
    def _is_known(cls, value: str | dict[str, list[str]] | None) -> Any:
        known = [*PRESETS, *ALIASES]
        for name in [value] if isinstance(value, str) else value or ():
            if name not in known:
                near = nearest(name, known)
                hint = f"; did you mean {near!r}?" if near else ""
                raise ValueError(f"{name!r} is no scheme that is made here{hint}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> CompressedFormat:
        if (self.scheme is None) == (self.config_groups is None):
            raise ValueError("needs either `scheme` or `config_groups`")
        for name, given in (("awq", self.awq), ("gptq", self.gptq)):
            if self.algorithm != name and given is not None:
                raise ValueError(f"algorithm {self.algorithm} has no use for `{name}`")
        if self.algorithm != "nearest" and self.kv_cache is not None:
            raise ValueError(f"kv_cache is not made here beside algorithm {self.algorithm}")
        for path, group in self.groups.items():
            where = ".".join(map(str, path))
            storage = stored(group)
            if storage is None:
                raise ValueError(f"{where}: weights of this scheme are not made here")
            if self.algorithm != "nearest" and not storage.smooths:
                kind = self.algorithm.upper()
                raise ValueError(f"{where}: {kind} is for integers in groups without inputs")
        if sum(LINEAR in group.targets for group in self.groups.values()) > 1:
            raise ValueError(f"two groups are for {LINEAR}")
        return self

    @model_validator(mode="after")
    def _has_use_for_all(self) -> CompressedFormat:
        if isinstance(self.scheme, dict) and "targets" in self.model_fields_set:
            raise ValueError("`targets` is for a single scheme; several have their own")
        made = {group.weights.arithmetic for group in self.groups.values()}
        if self.nvfp4 is not None and (self.scheme is None or self.nvfp4 not in made):
            raise ValueError("`nvfp4` is for a `scheme` of NVFP4")
        return self

    @cached_property
    def groups(self) -> Mapping[tuple[str, ...], ConfigGroup]:
        """The groups of modules, by where the recipe has them."""
        if isinstance(self.scheme, str):
            return {("scheme",): self._preset(self.scheme, self.targets)}
        if self.scheme is not None:
            found = self.scheme.items()
            return {("scheme", name): self._preset(name, targets) for name, targets in found}
        return {
            ("config_groups", name): group for name, group in (self.config_groups or {}).items()
        }

    def _preset(self, name: str, targets: list[str]) -> ConfigGroup:
        group = preset(name, targets)
        if self.nvfp4 is None or group.weights.strategy != "tensor_group":
            return group
        weights = group.weights.model_copy(update={"arithmetic": self.nvfp4})
        return group.model_copy(update={"weights": weights})

    @property
    def smoothing(self) -> AwqSpec | None:
        """How AWQ searches, with the defaults where the recipe says nothing; None without AWQ."""
        if self.algorithm != "awq":
            return None
        return self.awq or AwqSpec.model_validate({})

    @property
    def title(self) -> str:
        """The schemes in a word, as a card calls them."""
        return " and ".join(
            dict.fromkeys(_tags(group)[0].upper() for group in self.groups.values())
        )

    @property
    def described(self) -> list[tuple[str, str]]:
        """For a card: the targets of each group, and what becomes of them."""
        return [(", ".join(group.targets), group_in_words(group)) for group in self.groups.values()]

    @property
    def observers(self) -> str:
        """For a card: the observers of weights."""
        found = dict.fromkeys(group.weights.observer for group in self.groups.values())
        return " and ".join(f"`{name}`" for name in found)

    @property
    def asymmetric(self) -> bool:
        """Whether there are zero points."""
        return any(not group.weights.symmetric for group in self.groups.values())

    @property
    def needs_fp8(self) -> bool:
        """Whether inputs are to be multiplied in FP8."""
        inputs = (group.input_activations for group in self.groups.values())
        return any(item and (item.type, item.num_bits) == ("float", 8) for item in inputs)

    @property
    def compensating(self) -> GptqSpec | None:
        """How GPTQ works, with the defaults where the recipe says nothing; None without GPTQ."""
        if self.algorithm != "gptq":
            return None
        return self.gptq or GptqSpec.model_validate({})

    @property
    def norms(self) -> Norms | None:
        """How gains 1 + w are held; None where neither AWQ nor GPTQ calibrates."""
        spec = self.smoothing or self.compensating
        return spec.norms if spec else None

    def stated(self, group: ConfigGroup) -> Stated:
        """What config.json says of a group, but for its targets."""
        weights, inputs = group.weights.stated(), group.input_activations
        if self.compensating:
            weights["actorder"] = self.compensating.actorder
        return Stated(known_storage(group).name, weights, inputs.stated() if inputs else None)

    def files(self, variant: Variant) -> Mapping[str, bytes]:
        """As llm-compressor saves them."""
        return compressed_files(self, variant)

    def schemes(self) -> tuple[str, ...]:
        """The presets that its groups are of, or are nearest to."""
        return tuple(dict.fromkeys(preset_of(group) for group in self.groups.values()))

    def takes_untabled(self, model_type: str) -> bool:
        """See `Format.takes_untabled`."""
        return self.algorithm == "nearest" and not self.calibrates

    def card(self) -> Card:
        """See `Format.card`."""
        algorithm = () if self.algorithm == "nearest" else (self.algorithm,)
        kinds = dict.fromkeys(tag for group in self.groups.values() for tag in _tags(group))
        tags = ("compressed-tensors", *algorithm, *kinds, "vllm")
        # transformers leaves the zero points of experts aside, and then cannot do without them.
        experts = "vllm" if self.asymmetric else None
        return Card(own_template(__package__), "transformers", tags, with_experts=experts)

    def checks(self) -> CompressedChecks:
        """See `Format.checks`."""
        from carnice_build.formats.compressed_tensors.checks import CompressedChecks

        groups = [(group, self.stated(group)) for group in self.groups.values()]
        return CompressedChecks(groups, self.kv_cache_scheme)

    @classmethod
    def reader(cls) -> type[CompressedReader]:
        """See `Format.reader`."""
        from carnice_build.formats.compressed_tensors.checks import CompressedReader

        return CompressedReader

    @property
    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """What config.json states of the cache."""
        return self.kv_cache.stated() if self.kv_cache else None

    @property
    def calibrates(self) -> bool:
        """Whether scales of inputs, or of keys and values, are stored."""
        return self.kv_cache is not None or self._stores_inputs

    @property
    def _stores_inputs(self) -> bool:
        return any(is_stored(group.input_activations) for group in self.groups.values())

    def extras(self) -> tuple[str, ...]:
        """AWQ's search and GPTQ are llm-compressor's; a calibration alone runs in torch."""
        if self.algorithm != "nearest":
            return ("llmcompressor",)
        return ("torch",) if self.calibrates else ()

    def leaving(self, modules: Sequence[str], architecture: Architecture) -> Mapping[str, Any]:
        """Expressions under `ignore`, as llm-compressor reads them."""
        return {"ignore+": [expression(glob) for glob in modules]}

    @classmethod
    def serving(cls) -> Serving:
        """As vLLM's `--quantization` has it."""
        support = read_support(__package__, "engines.yaml")
        return Serving("compressed-tensors", ServingProfiles(__package__), support)

    def prepare(self, view: View, context: PlanContext) -> View:
        """In the type that the library loads the model in."""
        return in_stated_dtype(view, context)

    def convert(self, view: View, context: PlanContext) -> Conversion:
        """Every tensor of the view, smoothed by AWQ's scales if any, and the linears quantized.

        What is in no decoder layer stays as it is.
        """
        architecture = context.architecture
        facts = [fact for name, fact in architecture.tensors.items() if name in view]
        grouping = Grouping(self.groups, list(self._candidates(facts)))
        grouping.check_fusions(view, architecture)
        for path, modules in grouping.by_path().items():
            storage = grouping.storage(path)
            unfit = {fact.module: storage.unfit(view[fact.name].spec) for fact in modules}
            refuse_unfit(unfit, "a pattern for it under `ignore`", path)
        scales = self._scales(grouping.facts, view, context)
        key = None if self._stores_inputs else "kv_cache"
        passes = cache(lambda: Maxima(Calibration(view, context.calibrated(key))))
        inputs = input_scales(grouping, view, context, passes)
        compensated = self._compensated(grouping, view, context)
        published = _Published(self, grouping, scales, inputs, compensated, view, context)
        cached = self._cache_scales(view, context, passes)
        tensors = [
            item for fact in facts for item in (*published.of(fact), *cached.get(fact.name, ()))
        ]
        return Conversion(
            tensors=tensors,
            parameters=sum(view[fact.name].spec.size for fact in facts),
            quantized={module: grouping.group(module).weights.scheme for module in grouping.facts},
            causes=self._causes(facts, grouping),
            ignored=ignored_modules(architecture, grouping.facts),
            stated={"groups": grouping.stated(self.stated, architecture)},
            figures=compensated.figures,
            notices=compensated.notices,
            kv_cache=self.kv_cache.dtype if self.kv_cache else None,
        )

    def _candidates(self, facts: Sequence[TensorFact]) -> Iterator[TensorFact]:
        """The linears that groups may be about."""
        patterns = Patterns(self.ignore)
        for fact in facts:
            inside = fact.part in (Part.LAYERS, Part.BODY)
            if inside and fact.role is Role.LINEAR and not patterns.matches(fact.module):
                yield fact

    def _causes(
        self, facts: Sequence[TensorFact], grouping: Grouping
    ) -> dict[str, Mapping[str, tuple[str, ...]]]:
        found: dict[str, Mapping[str, tuple[str, ...]]] = {}
        for fact in facts:
            if grouping.facts.get(fact.module) is fact:
                path = grouping.path(fact.module)
                storage = grouping.storage(path)
                named = path[0] == "scheme"  # a preset has no knobs to point at
                ends = {
                    name: path if named else (*path, "weights", knob)
                    for name, knob in storage.knobs.items()
                }
                if self.compensating:
                    own = ("block_size", "dampening_frac", "actorder")
                    ends |= {name: ("gptq", name) for name in own}
                found[f"{fact.module}.{storage.suffixes[0]}"] = ends
            elif fact.role is Role.NORM and self.norms:
                found[fact.name] = {"exact": (self.algorithm, "norms")}
        return found

    def _cache_scales(
        self, view: View, context: PlanContext, passes: Callable[[], Maxima]
    ) -> dict[str, list[OutputTensor]]:
        """The scales of caches, by the names of the facts that they come after."""
        if self.kv_cache is None:
            return {}
        check_caches(context.architecture)
        return cache_scales(
            context, view, passes(), SCALES, observer=self.kv_cache.observer, shape=(1,)
        )

    def _scales(self, quantized: Container[str], view: View, context: PlanContext) -> Scales:
        """What AWQ finds; nothing without it."""
        if self.smoothing is None:
            return Scales()
        (weights, *others) = {group.weights for group in self.groups.values()}
        if others:
            raise PlanError("AWQ searches for one scheme", at=("config_groups",))
        scheme = {
            "num_bits": weights.num_bits,
            "group_size": weights.group_size,
            "symmetric": weights.symmetric,
        }
        settings = {"scheme": scheme, **self.smoothing.model_dump()}
        calibration = Calibration(view, context.calibrated(), "longest")
        return search(calibration, context.architecture, quantized, settings)

    def _compensated(self, grouping: Grouping, view: View, context: PlanContext) -> Quantized:
        """What GPTQ makes of the weights; nothing without it."""
        if self.compensating is None:
            return Quantized()
        schemes = {module: _scheme(grouping.group(module).weights) for module in grouping.facts}
        calibration = Calibration(view, context.calibrated(), "longest")
        return quantized(calibration, context.architecture, schemes, self.compensating)


def _scheme(weights: Weights) -> dict[str, Any]:
    """A scheme as GPTQ is told it."""
    known = {"num_bits", "symmetric", "strategy", "group_size", "observer"}
    return weights.model_dump(include=known)


def _tags(group: ConfigGroup) -> tuple[str, ...]:
    """What the hub calls a scheme."""
    weights, inputs = group.weights, group.input_activations
    kind = f"{'fp' if weights.type == 'float' else 'int'}{weights.num_bits}"
    return (f"w{weights.num_bits}a{inputs.num_bits if inputs else 16}", kind)


class _Published:
    """What is published of each tensor of a model."""

    def __init__(
        self,
        knobs: CompressedFormat,
        grouping: Grouping,
        scales: Scales,
        inputs: Mapping[str, tuple[str, TensorRef]],
        compensated: Quantized,
        view: View,
        context: PlanContext,
    ) -> None:
        self._knobs = knobs
        self._grouping = grouping
        self._scales = scales
        self._inputs = inputs
        self._view = view
        self._graph = context.graph
        self._architecture = context.architecture
        self._made: dict[str, Sequence[TensorRef]] = dict(compensated.parts)

    def of(self, fact: TensorFact) -> list[OutputTensor]:
        """What is published of a source tensor."""
        module, ref = fact.module, self._view[fact.name]
        rows = self._scales.rows.get(module)
        if fact.role is Role.NORM and self._architecture.offset_norm(fact.name):
            return [OutputTensor(fact.name, self._norm(fact, ref, rows), fact)]
        if self._grouping.facts.get(module) is fact:
            return self._quantized(fact)
        smoothing = self._smoothing(fact)
        if smoothing.vectors and fact.name.endswith((".weight", ".bias")):
            op = smoothing.of_each(SmoothWeight())
            (ref,) = self._graph.add(op, smoothing.used, ref, *smoothing.vectors)
        return [OutputTensor(fact.name, ref, fact)]

    def _smoothing(self, fact: TensorFact) -> Smoothing:
        module = fact.module
        # A bias is part of what the module gives out, and has nothing to do with what it reads.
        own = fact.name == f"{module}.weight"
        columns = self._scales.columns.get(module) if own else None
        return Smoothing(columns, self._scales.rows.get(module), fact.stacked)

    def _norm(self, fact: TensorFact, ref: TensorRef, scales: TensorRef | None) -> TensorRef:
        if self._knobs.norms is None or fact.part is Part.MTP:
            return ref
        exact = self._knobs.norms == "exact"
        if exact and scales is None:
            return ref
        vectors = () if scales is None else (scales,)
        (norm,) = self._graph.add(SmoothNorm(), {"exact": exact}, ref, *vectors)
        return norm

    def _quantized(self, fact: TensorFact) -> list[OutputTensor]:
        path = self._grouping.path(fact.module)
        storage = self._grouping.storage(path)
        if fact.module not in self._made:
            sharing = self._grouping.sharing(fact, self._architecture)
            refs = [self._view[item.name] for item in sharing]
            smoothing = self._smoothing(fact) if storage.smooths else NOT_SMOOTHED
            with about_module(", ".join(item.module for item in sharing), path):
                made = storage.add(self._graph, refs, smoothing)
            self._made |= {
                item.module: outputs for item, outputs in zip(sharing, made, strict=True)
            }
        parts = [*zip(storage.suffixes, self._made[fact.module], strict=True)]
        if fact.module in self._inputs:
            parts.append(self._inputs[fact.module])
        return [OutputTensor(f"{fact.module}.{suffix}", output, fact) for suffix, output in parts]
