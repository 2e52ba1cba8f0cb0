"""Write the tables of docs/recipes.md from the recipe schema; the text above them stays.

python docs/make_reference.py
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from carnice_build.formats.registry import FORMATS
from carnice_build.recipe.layers import LayerSpan
from carnice_build.recipe.schema import (
    CalibrationSpec,
    CardSpec,
    PackageSpec,
    RecipeBody,
    SourceSpec,
)
from carnice_build.steps.registry import STEPS

PAGE = Path(__file__).parent / "recipes.md"
MARK = "<!-- What follows is written by docs/make_reference.py. -->\n"

_SECTIONS = {
    "sources": SourceSpec,
    "layers": LayerSpan,
    "calibration": CalibrationSpec,
    "package": PackageSpec,
    "card": CardSpec,
}
_LINKED = {name: name for name in (*_SECTIONS, "steps")} | {"quantize": "formats"}
_TABLE = "| Key | Value | Default | Meaning |\n|---|---|---|---|\n"
_EXTENDS = (
    "| `extends` | text or list |  | A recipe that this one changes, or several; "
    "`preset:NAME` ships with the package. |\n"
)
_NAMES = {
    "string": "text",
    "integer": "number",
    "number": "number",
    "boolean": "`true` or `false`",
    "array": "list",
    "object": "section",
}


def render(page: str) -> str:
    """`page` with everything below the mark made anew."""
    head, mark, _ = page.partition(MARK)
    if not mark:
        raise ValueError(f"the page lacks the line {MARK!r}")
    return "".join([head, mark, "\n", *_reference()]).rstrip() + "\n"


def _reference() -> Iterator[str]:
    yield "## Keys of a recipe\n\n" + _TABLE + _EXTENDS
    schema = RecipeBody.model_json_schema()["properties"]
    for name, field in RecipeBody.model_fields.items():
        value = _value(schema[name])
        if name in _LINKED:
            value = f"[{value}](#{_LINKED[name]})"
        yield _row(name, value, field)
    for name, model in _SECTIONS.items():
        yield f"\n### {name}\n\n"
        yield from _model(model)
    yield "\n## Steps\n\nEach item of `steps` has one key, the kind of step.\n"
    for kind, step in STEPS.items():
        yield from _part(f"Step {kind}", step)
    yield "\n## Formats\n\n`quantize.format` names one; the other keys are the format's own.\n"
    for kind, number_format in FORMATS.items():
        yield from _part(f"Format {kind}", number_format)


def _part(title: str, model: type[BaseModel]) -> Iterator[str]:
    """A step or format, and the sections below it."""
    yield f"\n### {title}\n\n"
    yield from _model(model)
    for path, nested in _sections(model):
        yield f"\n#### {title}: {path}\n\n"
        yield from _model(nested)


def _sections(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The models below a model, however deep, by the path of their keys."""
    for name, field in model.model_fields.items():
        path = above + (field.alias or name)
        for nested in _models_in(field.annotation):
            yield path, nested
            yield from _sections(nested, f"{path}.")


def _model(model: type[BaseModel]) -> Iterator[str]:
    for paragraph in (inspect.getdoc(model) or "").split("\n\n"):
        # One sentence a line.
        yield re.sub(r"(?<=\.) +(?=[A-Z`])", "\n", paragraph.replace("\n", " ")) + "\n\n"
    yield _TABLE
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = field.alias or name
        yield _row(key, _value(schema[key]), field)


def _row(key: str, value: str, field: FieldInfo) -> str:
    return f"| `{key}` | {value} | {_default(field)} | {field.description or ''} |\n"


def _value(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_value(item) for item in schema["anyOf"] if item.get("type") != "null")
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        return ", ".join(map(_code, schema["enum"]))
    kinds = schema.get("type", "object")
    return " or ".join(_NAMES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ([], {}) or isinstance(value, BaseModel):
        return ""
    return _code(value)


def _code(value: Any) -> str:
    """A value as a recipe spells it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
