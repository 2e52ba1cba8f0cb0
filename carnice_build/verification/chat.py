"""Check `chat`: an agent's turns through the folder's own chat template and its parsers.

The tool-call parser is the one that reads what the template writes, and launch commands in the
folder must name it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from carnice_build.chat.files import TEMPLATE_NAME, named_templates, template_files
from carnice_build.chat.roundtrip import check_round_trips
from carnice_build.chat.special_tokens import special_tokens
from carnice_build.chat.tool_format import Syntax, ToolFormat, knows_tools, tool_format
from carnice_build.checkpoint.checkpoint import TEMPLATE_FOLDER
from carnice_build.errors import CheckpointError
from carnice_build.verification.result import Check, judged, skipped

NAME = "chat"

_READ = (
    TEMPLATE_NAME,
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""What may hold a template, or the special tokens that it sees."""

_NAMED = f"{TEMPLATE_FOLDER}/*.jinja"
_LAUNCHES = (".sh", ".yaml")
_SYNONYMS = {"qwen3_coder": "qwen3_xml"}
"""vLLM registers one parser under both names."""

_FLAG = re.compile(r"--(tool-call-parser|reasoning-parser)[\s=\"',-]+(\w+)")


def check_chat(folder: Path) -> Check:
    """Play the tasks of `chat.roundtrip` with the template that the folder holds."""
    try:
        files = chat_files(folder)
        templates, tokens = template_files(files), special_tokens(files)
        if not templates:
            return skipped(NAME, "the folder has no chat template")
        where, template = next(iter(templates.items()))
        found = tool_format(template, where, tokens)
        tasks = check_round_trips(template, where, tokens)
        others = {
            name: tool_format(named, name, tokens).syntax
            for name, named in named_templates(files).items()
        }
    except CheckpointError as error:
        return judged(NAME, [str(error)], "the chat template cannot be used")
    if not knows_tools(template, found):
        return skipped(NAME, "the chat template knows no tools")
    problems = [f"{task.name}: {task.problem}" for task in tasks if not task.ok]
    problems += [
        f"{name} holds another template than {where}"
        for name, other in templates.items()
        if other != template
    ]
    problems += [
        f"{name} writes tool calls in another form than {where}"
        for name, syntax in others.items()
        if syntax not in (found.syntax, Syntax.NONE)
    ]
    problems += _launches(folder, found)
    good = sum(task.ok for task in tasks)
    summary = f"{good} of {len(tasks)} tasks come back through {_parsers(found)}"
    details = {
        "tool_call_parser": found.tool_call_parser,
        "reasoning_parser": found.reasoning_parser,
        "tasks": {task.name: task.problem or "ok" for task in tasks},
    }
    return judged(NAME, problems, summary, details)


def chat_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that hold a template, or the special tokens that it sees."""
    beside = [str(path.relative_to(folder)) for path in sorted(folder.glob(_NAMED))]
    held = [name for name in (*_READ, *beside) if (folder / name).is_file()]
    return {name: (folder / name).read_bytes() for name in held}


def _parsers(found: ToolFormat) -> str:
    named = [parser for parser in (found.tool_call_parser, found.reasoning_parser) if parser]
    return f"vLLM's {' and '.join(named)}" if named else "no parser"


def _launches(folder: Path, found: ToolFormat) -> Iterator[str]:
    """Parsers that files of the folder name, and that cannot read the template's calls."""
    fitting = {
        "tool-call-parser": found.tool_call_parser,
        "reasoning-parser": found.reasoning_parser,
    }
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _LAUNCHES or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for flag, parser in sorted(set(_FLAG.findall(text))):
            if _SYNONYMS.get(parser, parser) != fitting[flag]:
                where = path.relative_to(folder)
                yield f"{where} says --{flag} {parser}; the template needs {fitting[flag]}"
