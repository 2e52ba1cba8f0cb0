"""Serving profiles and engines: the shape of their data files, and their reader."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, model_validator

from carnice_build.recipe.serve import FlagName, FlagValue, Scalar, Strict, VariableName
from carnice_build.serving.options import OptionFact, OptionTable, option_table

M = TypeVar("M", bound=BaseModel)

FactName = Literal[
    "quantization",
    "text_only",
    "tools",
    "tool_call_parser",
    "reasoning_parser",
    "kv_cache_dtype",
    "projector",
    "max_positions",
]
Range = float | tuple[float, float]


class Flag(Strict):
    """An option of a launch: a value, or the fact that gives it.

    It is left out when the fact is none or false, or when `only_if` is false.
    """

    value: FlagValue | None = None
    fact: FactName | None = None
    only_if: Literal["has_mtp"] | None = None
    reason: str | None = None
    load_bearing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_value(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"value": value}

    @model_validator(mode="after")
    def _one_origin(self) -> Flag:
        if (self.value is None) == (self.fact is None):
            raise ValueError("a flag has a value or a fact")
        return self


class Variable(Strict):
    """An environment variable of a launch."""

    value: str
    reason: str | None = None
    mandatory: bool = False


class Hardware(Strict):
    """Cards; `vram` in GiB each, None where it is not known."""

    name: str
    cards: int = Field(ge=1)
    vram: float | None = None
    nvlink: bool | None = None


class LaunchData(Strict):
    """One way to serve the model, which a folder has that the fact `only_if` is true of."""

    purpose: str
    engine: str
    only_if: Literal["has_mtp", "projector"] | None = None
    image: str | None = None
    port: int = 8000
    hardware: Hardware | None = None
    flags: dict[FlagName, Flag]
    env: dict[VariableName, Variable] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    claimed_kv_cache: str | None = None


class Condition(Strict):
    """A test of one setting; exactly one key is given.

    A setting that is not there fulfils `missing` and `lacks` alone.
    """

    equals: Scalar | None = Field(None, alias="is")
    one_of: tuple[Scalar, ...] | None = None
    at_least: float | None = None
    over: float | None = None
    missing: Literal[True] | None = None
    lacks: str | None = None


class Rule(Strict):
    """Settings that must not meet: refused when all conditions of `when` hold.

    Keys of `when` are options, `option.key` inside a JSON value, `env.NAME`, `hardware.*` and
    `fact.*`.
    """

    name: str
    when: dict[str, Condition] = Field(min_length=1)
    reason: str
    instead: str


class Rung(Strict):
    """A step of a ladder of contexts."""

    launch: str
    note: str


class Requirement(Strict):
    """A row of hardware, as the source card reports it."""

    setup: str
    vram: str
    context: str
    throughput: str


class Sampling(Strict):
    """A preset of sampling settings; a pair is a range."""

    name: str
    temperature: Range
    top_p: Range | None = None
    top_k: int | None = None
    repetition_penalty: Range | None = None
    note: str | None = None


class Checklist(Strict):
    """What to look at, under a heading."""

    title: str
    items: tuple[str, ...]


class Container(Strict):
    """What a container of the engine needs of its host."""

    shm_size: str | None = "16gb"
    ipc: str | None = "host"


class Support(Strict):
    """What an engine makes of a scheme.

    `runs` says on which cards and how, `since` where support came from, as far as that was found,
    and `source` where both were read.
    """

    runs: str
    since: str
    source: str


class ServingProfile(Strict):
    """Launches for folders of one format; the first launch is the recommended one.

    `schemes` are the format's schemes that they are for, none where they are for all of them;
    `cards` are the model cards that the figures come from; `parsers` are other tool-call parsers
    of the same form that the format is served with; `left_out` says why an option of those cards
    is not used.
    """

    title: str
    cards: tuple[str, ...]
    schemes: tuple[str, ...] = ()
    launches: dict[str, LaunchData] = Field(min_length=1)
    parsers: dict[str, str] = Field(default_factory=dict)
    container: Container = Field(default_factory=Container)
    left_out: dict[FlagName, str] = Field(default_factory=dict)
    ladder: tuple[Rung, ...] = ()
    requirements: tuple[Requirement, ...] = ()
    claims: tuple[str, ...] = ()
    sampling: tuple[Sampling, ...] = ()
    looping: tuple[str, ...] = ()
    checklists: tuple[Checklist, ...] = ()
    caveats: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    def fits(self, schemes: Collection[str]) -> bool:
        """Whether it is for a folder of these schemes."""
        return not self.schemes or set(schemes) <= set(self.schemes)


class Retired(Strict):
    """An option that a server no longer has: the release without it, and what to do instead."""

    since: str
    instead: str


class Words(Strict):
    """What an engine calls options that all have; None for what it does not have.

    `keys` and `values` are the types of what is cached, `name` is what clients ask for, `parallel`
    the number of cards that layers are split over, and `share` how much of their memory is used.
    """

    context: FlagName = "max-model-len"
    keys: FlagName = "kv-cache-dtype"
    values: FlagName = "kv-cache-dtype"
    drafts: FlagName = "speculative-config"
    name: FlagName = "served-model-name"
    parallel: FlagName | None = "tensor-parallel-size"
    share: FlagName | None = "gpu-memory-utilization"


class Engine(Strict):
    """A program that serves, and which of its options a recipe may set.

    `table` names the table of what its parser takes; `model_option` goes before the model, None
    where it is a bare argument; `defaults` are what rules assume of options that are left out,
    where that is not the parser's; `reserved` says why a recipe cannot set an option.
    What a fork adds to its table are `own_options`, and `own_choices` of others.
    `entrypoint` is the command in its container, where that is another; it listens to `port`, and
    where it is `local` to its own machine alone.
    It loads a file of the folder where the facts name one; the values of `files` are names of
    further ones.
    `sampling` are options by what requests call them, none where one option has all; `unsaid` is
    how it samples where nobody says.
    `provider` is what Hermes Agent calls it.
    """

    command: tuple[str, ...]
    entrypoint: tuple[str, ...] | None = None
    port: int = 8000
    local: bool = False
    provider: str = "vllm"
    words: Words = Field(default_factory=Words)
    files: tuple[FlagName, ...] = ()
    sampling: dict[str, FlagName] = Field(default_factory=dict)
    unsaid: str = "a temperature of 1"
    table: str
    model_option: str | None = None
    defaults: dict[str, Scalar | list[Scalar]]
    reserved: dict[FlagName, str]
    rules: tuple[Rule, ...]
    options: tuple[FlagName, ...]
    retired: dict[FlagName, Retired] = Field(default_factory=dict)
    own_options: dict[FlagName, OptionFact] = Field(default_factory=dict)
    own_choices: dict[FlagName, tuple[str, ...]] = Field(default_factory=dict)

    @property
    def parser(self) -> OptionTable:
        """What the engine's parser takes."""
        return option_table(self.table)

    @property
    def release(self) -> str:
        """The release whose parser it is."""
        return f"{self.parser.program} {self.parser.version}"

    def fact(self, option: str) -> OptionFact | None:
        """What the engine takes for `option`, None where it has none of that name."""
        return self.own_options.get(option) or self.parser.names.get(option)


class ServingProfiles(Mapping[str, ServingProfile]):
    """The profiles of one format by name: the YAML files in the folder `serving` of its package.

    And those that fit any format, which are with the engines, unless it is a format of `its_own`
    engines.
    """

    def __init__(self, package: str, *, its_own: bool = False) -> None:
        self._package = package
        self._shared = () if its_own else _shared_profiles()

    def __getitem__(self, name: str) -> ServingProfile:
        if name not in self._names:
            raise KeyError(name)
        if name in self._shared:
            return _read_serving_profile(__package__, f"data/profiles/{name}.yaml")
        return _read_serving_profile(self._package, f"serving/{name}.yaml")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return (*_yaml_names(files(self._package).joinpath("serving")), *self._shared)


@dataclass(frozen=True)
class Serving:
    """How folders of one format are served: what engines call it, and its profiles.

    `support` is what is known of its schemes, by engine and scheme.
    """

    quantization: str
    profiles: Mapping[str, ServingProfile]
    support: Mapping[str, Mapping[str, Support]] = field(default_factory=dict)


@cache
def read_support(package: str, name: str) -> Mapping[str, Mapping[str, Support]]:
    """A file of a format's package: what engines make of its schemes."""
    return {
        engine: {scheme: Support.model_validate(item) for scheme, item in schemes.items()}
        for engine, schemes in _read(package, name).items()
    }


def load_engine(name: str) -> Engine:
    """The engine `name`, which a profile names."""
    return _read_engines()[name]


_ENGINES = "engines.yaml"


@cache
def _shared_profiles() -> tuple[str, ...]:
    return _yaml_names(files(__package__).joinpath("data", "profiles"))


def _yaml_names(folder: Traversable) -> tuple[str, ...]:
    names = [item.name for item in folder.iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


@cache
def _read_serving_profile(package: str, path: str) -> ServingProfile:
    return ServingProfile.model_validate(_read(package, path))


@cache
def _read_engines() -> dict[str, Engine]:
    return {
        name: Engine.model_validate(item)
        for name, item in _read(__package__, f"data/{_ENGINES}").items()
    }


def _read(package: str, path: str) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(files(package).joinpath(*path.split("/")).read_text("utf-8"))
    assert isinstance(content, dict)
    return content
