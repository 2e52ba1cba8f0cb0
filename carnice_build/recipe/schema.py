"""The shape of a recipe; steps and formats come from a vocabulary that upper layers provide."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)
from pydantic.json_schema import models_json_schema

from carnice_build.recipe.layers import LayerSet
from carnice_build.recipe.patterns import compile_pattern
from carnice_build.recipe.serve import ServeSpecs
from carnice_build.units import parse_size


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and accepts aliases only as written in YAML.

    `retired` maps keys that it had once to what a recipe says instead, as an error expects it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    retired: ClassVar[Mapping[str, str]] = {}


def _check_pattern(text: str) -> str:
    if not text.removeprefix("re:"):
        raise ValueError(f"{text!r} is an empty pattern")
    compile_pattern(text)
    return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


AnyPatterns = Annotated[
    list[Annotated[str, AfterValidator(_check_pattern)]],
    BeforeValidator(_as_list),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}}),
]
"""One pattern or a list of patterns, which may be empty."""

PatternList = Annotated[
    list[Annotated[str, AfterValidator(_check_pattern)]],
    Field(min_length=1),
    BeforeValidator(_as_list),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}, "minItems": 1}),
]
"""One pattern or a list of patterns."""

Expectation = int | dict[str, int] | None
"""A count for every checkpoint, or counts by profile; other checkpoints' are derived."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """The name of a variant or of a part of a repository's; ValueError for what is none."""
    if not _NAME.fullmatch(name) or len(name) > 100:
        raise ValueError(f"{name!r} is not a plain name of letters, digits, '.', '_' and '-'")
    return name


PlainName = Annotated[str, AfterValidator(check_name)]


def _check_model(model: str) -> str:
    owner, _, name = model.partition("/")
    check_name(owner)
    check_name(name)
    return model


def _check_folder(text: str) -> str:
    if not text or "\0" in text or ".." in PurePosixPath(text).parts:
        raise ValueError(f"{text!r} is neither a folder below the project nor an absolute path")
    return text


class SourceSpec(Strict):
    """A checkpoint by its name on the hub; a profile says where to find it."""

    model: Annotated[str, AfterValidator(_check_model)] = Field(
        description="Repository on the hub, as owner/name; `local/name` for what is not there."
    )
    revision: str = Field("main", description="Branch, tag or commit of the repository.")
    folder: Annotated[str, AfterValidator(_check_folder)] | None = Field(
        None,
        description="Folder of the checkpoint on this machine, below the project or as an absolute "
        "path, whatever a profile says.",
    )


def _check_file(name: str) -> str:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise ValueError(f"{name!r} is no file below the project or a repository")
    return name


class FileSpec(Strict):
    """A file of the project, or of a repository on the hub, which a profile may map to a folder."""

    file: Annotated[str, AfterValidator(_check_file)] = Field(
        description="Its path below the project, or in the repository."
    )
    model: Annotated[str, AfterValidator(_check_model)] | None = Field(
        None, description="Repository on the hub, as owner/name; the project's own file if none."
    )
    revision: str = Field("main", description="Branch, tag or commit of the repository.")


ByProfile = int | dict[str, int]
"""A number, or one for each profile and a `default` for all others."""


def count_for(count: ByProfile, profile: str | None) -> int | None:
    """The number for checkpoints of `profile`; None when the recipe says nothing for these."""
    table = {"default": count} if isinstance(count, int) else count
    return table.get(profile or "default", table.get("default"))


Order = Literal["given", "longest"]
"""Samples as the dataset has them, or the longest first."""

DATASET_FILES = (".jsonl", ".parquet", ".txt")


def _check_dataset(name: str) -> str:
    if not name.endswith(DATASET_FILES):
        return _check_model(name)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise ValueError(f"{name!r} is outside the project")
    return name


_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def _check_device(name: str) -> str:
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"{name!r} is none of auto, cpu, cuda, and cuda:N")
    return name


class CalibrationSpec(Strict):
    """The forward passes behind a calibrated format: over which text, and how they compute."""

    dataset: Annotated[str, AfterValidator(_check_dataset)] = Field(
        description="Repository of a dataset on the hub, as owner/name, which a profile may map to "
        "a file; or a .jsonl, .parquet or .txt file of the project."
    )
    subset: str | None = Field(None, description="Configuration of a dataset on the hub.")
    split: str = Field("train", description="Split of a dataset on the hub.")
    revision: str = Field("main", description="Branch, tag or commit of a dataset on the hub.")
    samples: ByProfile = Field(20, description="How many rows of the dataset, the first ones.")
    length: ByProfile = Field(8192, description="Most tokens of a sample; longer ones are cut.")
    parts: ByProfile = Field(
        1,
        description="How many chains of passes the samples are cut into, which run side by side; "
        "more than one where the format needs no more than maxima or sums of squares.",
    )
    joined: bool = Field(
        False, description="Join the rows, and cut them into samples of exactly `length` tokens."
    )
    order: Order | None = Field(
        None,
        description="How the samples follow one another: as the dataset has them, or the longest "
        "first; the format's own order if none.",
    )
    roles: dict[str, str] = Field(
        default_factory=lambda: {"human": "user", "gpt": "assistant"},
        description="What the chat template calls the dataset's roles; others keep their name.",
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type to compute in.")
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention of transformers; the two round differently."
    )
    threads: Annotated[int, Field(ge=1)] = Field(
        2, description="Threads of torch; sums may round differently with another number."
    )
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "cpu",
        description="Where to compute: `cpu`, `cuda`, one GPU of several as `cuda:1`, or `auto` "
        "for a GPU where there is one.",
    )


class PackageSpec(Strict):
    """What the output folder holds beside the weights, and how they are split."""

    shard: (
        Annotated[int, BeforeValidator(parse_size), WithJsonSchema({"type": ["integer", "string"]})]
        | None
    ) = Field(
        None,
        description="Most that the modules of one shard may weigh in BF16, such as 5GB, which it "
        "is if nothing is said; of a GGUF, most that one of its files may weigh, which is one file "
        "if nothing is said.",
    )
    serve: ServeSpecs = Field(
        (),
        description="A serving profile, whose launches go into `serve/`, or changes of one; or a "
        "list of such, each of which goes into a folder of its own there.",
    )


SamplingName = Literal["temperature", "top_p", "top_k", "min_p"]
SamplingNumber = Annotated[int | float, Field(ge=0, le=10**6)]


class CardSpec(Strict):
    """Facts for the model card that no file of the checkpoint states."""

    title: str | None = Field(None, description="Heading; the model's and variant's names if none.")
    license: str = Field(
        "unknown", description="Licence identifier of the hub, as the source's own page states it."
    )
    language: list[str] = Field(
        default_factory=list, description="Language codes; none are stated if none are given."
    )
    sampling: dict[SamplingName, SamplingNumber] | None = Field(
        None, description="How text is best sampled; what generation_config.json says if not given."
    )
    tags: list[str] = Field(default_factory=list, description="Tags beside those of the format.")
    repo: str | None = Field(None, description="Where the variant will be published: owner/name.")
    base_model: str | None = Field(None, description="Repository; the body's if none is given.")
    about: str | None = Field(None, description="What the model is, in a sentence or two.")
    limitations: list[str] = Field(default_factory=list, description="Further limitations.")


class RecipeBody(Strict):
    """The keys of a recipe; `steps` and `quantize` are checked against the vocabulary."""

    variant: PlainName = Field(description="Name of the variant; the file is named so too.")
    description: str = Field(description="What the variant is, in one sentence.")
    sources: dict[str, SourceSpec] = Field(
        min_length=1, description="Checkpoints by name; the first one is the model's body."
    )
    layers: dict[str, LayerSet] = Field(
        default_factory=dict, description="Named sets of decoder layers, by position."
    )
    steps: list[dict[str, Any]] = Field(
        default_factory=list, description="What happens to the body's tensors, in order."
    )
    quantize: dict[str, Any] = Field(description="The number format, and which modules get it.")
    calibration: CalibrationSpec | None = Field(
        None, description="The forward passes that a calibrated format needs."
    )
    package: PackageSpec = Field(
        default_factory=lambda: PackageSpec.model_validate({}),
        description="How the output folder is laid out.",
    )
    card: CardSpec = Field(
        default_factory=lambda: CardSpec.model_validate({}),
        description="What the model card says of the model.",
    )


@dataclass(frozen=True)
class Vocabulary:
    """The steps and formats that recipes may name, each a pydantic model of its parameters.

    `retired` maps formats that there were once to what a recipe says instead.
    """

    steps: Mapping[str, type[BaseModel]]
    formats: Mapping[str, type[BaseModel]]
    retired: Mapping[str, str] = field(default_factory=dict)


def json_schema(vocabulary: Vocabulary) -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors.

    What a file leaves out may stand in the one it extends, and a list's key may end in `+`.
    """
    models: list[type[BaseModel]] = [
        RecipeBody,
        *vocabulary.steps.values(),
        *vocabulary.formats.values(),
    ]
    # All at once, so that pydantic tells models of one class name apart.
    named, whole = models_json_schema(
        [(model, "validation") for model in models], ref_template=_REFERENCE
    )
    references = {model: named[model, "validation"] for model in models}
    definitions = whole["$defs"]
    schema = definitions.pop(_definition(references[RecipeBody]))
    properties = schema["properties"]
    properties["extends"] = {
        "type": ["string", "array"],
        "items": {"type": "string"},
        "description": "A recipe that this one changes, or several; `preset:NAME` ships with the "
        "package.",
    }
    steps = [
        {
            "type": "object",
            "properties": {kind: references[model]},
            "required": [kind],
            "additionalProperties": False,
        }
        for kind, model in vocabulary.steps.items()
    ]
    properties["steps"]["items"] = {"oneOf": steps}
    # Without `format`, which the parent may state, a section can be of any.
    properties["quantize"] = {
        "anyOf": [references[model] for model in vocabulary.formats.values()],
        "description": properties["quantize"]["description"],
    }
    _relax(schema, definitions, set())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Recipe",
        "$defs": definitions,
    }


_REFERENCE = "#/$defs/{model}"


def _definition(node: Mapping[str, Any]) -> str:
    """The name of the definition that a schema refers to, empty when it refers to none."""
    return str(node.get("$ref", "")).removeprefix(_REFERENCE.format(model=""))


def _relax(node: dict[str, Any], definitions: dict[str, Any], seen: set[str]) -> None:
    """Allow in a mapping and those below it what inheritance allows; items of lists stay whole."""
    name = _definition(node)
    if name and name not in seen:
        seen.add(name)
        _relax(definitions[name], definitions, seen)
    for option in node.get("anyOf", ()):
        _relax(option, definitions, seen)
    if isinstance(node.get("additionalProperties"), dict):
        _relax(node["additionalProperties"], definitions, seen)
    properties = node.get("properties", {})
    for key, child in list(properties.items()):
        _relax(child, definitions, seen)
        if child.get("type") == "array":
            about = f"Appended to the inherited `{key}`."
            properties[f"{key}+"] = {**child, "description": about}
    node.pop("required", None)
