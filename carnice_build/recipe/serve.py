"""The recipe section `package.serve`: a serving profile, and what a recipe changes of it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema

_MOST_TEXT = 500
_FLAG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_text(text: str) -> str:
    if not text.isprintable() or len(text) > _MOST_TEXT:
        raise ValueError(f"not one printable line of at most {_MOST_TEXT} characters")
    return text


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(text: str) -> str:
        if len(text) > _MOST_TEXT or not pattern.fullmatch(text):
            raise ValueError(f"{text!r} is not {what}")
        return text

    return AfterValidator(check)


Text = Annotated[StrictStr, AfterValidator(_check_text)]
"""One line that cannot drive a terminal, nor leave a comment or a string."""

Scalar = StrictBool | StrictInt | StrictFloat | Text
FlagName = Annotated[str, _matching(_FLAG, "an option such as max-model-len")]


def _check_scalar(value: Any) -> Any:
    """One sentence for what a union of types would answer with one for each type."""
    if isinstance(value, str):
        return _check_text(value)
    if not isinstance(value, bool | int | float):
        raise ValueError("not a text, a number, true or false")
    return value


def _check_value(value: Any) -> Any:
    if not isinstance(value, dict):
        return _check_scalar(value)
    for key, item in value.items():
        for scalar in (key, *(item if isinstance(item, list) else [item])):
            _check_scalar(scalar)
    return value


FlagValue = Annotated[
    Scalar | dict[StrictStr, Scalar | list[Scalar]], BeforeValidator(_check_value)
]
"""`true` is an option without a value; a mapping is written as JSON."""

VariableValue = Annotated[Scalar, BeforeValidator(_check_scalar)]
VariableName = Annotated[str, _matching(_VARIABLE, "the name of an environment variable")]
ImageName = Annotated[str, _matching(_IMAGE, "a container image")]


def is_model_name(text: str) -> bool:
    """True for what a command can take for a model and for nothing else: no option, no space."""
    return len(text) <= _MOST_TEXT and bool(_NAME.fullmatch(text))


ServedName = Annotated[str, _matching(_NAME, "a plain name")]


class HardwareChange(Strict):
    """The cards that a launch is for."""

    cards: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = Field(
        None, description="Number of cards."
    )
    vram: Annotated[float, Field(gt=0, le=100_000)] | None = Field(
        None, description="Memory of each card in GiB."
    )
    nvlink: StrictBool | None = Field(None, description="Whether NVLink joins the cards.")


class LaunchChange(Strict):
    """What a recipe changes of one launch of the profile."""

    flags: dict[FlagName, FlagValue] = Field(
        default_factory=dict,
        description="Options of the engine by name, without dashes: a value, `true` for an option "
        "that takes none, `false` to leave one out.",
    )
    env: dict[VariableName, VariableValue] = Field(
        default_factory=dict,
        description="Environment variables: a value, or `false` to leave one out.",
    )
    hardware: HardwareChange = Field(
        default_factory=lambda: HardwareChange.model_validate({}),
        description="The cards, where they are others than the profile's.",
    )
    image: ImageName | None = Field(None, description="Container image of the engine.")
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] | None = Field(
        None, description="Port that clients talk to."
    )


class ServeSpec(Strict):
    """How the folder is served; the name of a profile alone means the profile as it is."""

    profile: Text = Field(description="Serving profile, such as nvfp4-vllm.")
    served_name: ServedName | None = Field(
        None, description="Name that clients ask for; the repository's if none."
    )
    launches: dict[Text, LaunchChange] = Field(
        default_factory=dict, description="Changes of the profile's launches, by their names."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"profile": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}


def _as_sections(value: Any, check_all: ValidatorFunctionWrapHandler) -> Any:
    # A section that is in no list is checked by itself, so that no error names it by a position.
    return check_all(value) if isinstance(value, list) else (ServeSpec.model_validate(value),)


class _OneOrSeveral:
    """What an editor is told of a list whose only item may stand for it."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        several = handler(core_schema)
        return {"anyOf": [several["items"], several]}


ServeSpecs = Annotated[tuple[ServeSpec, ...], WrapValidator(_as_sections), _OneOrSeveral]
"""One section or a list of sections, one for each profile that the folder is served with."""
