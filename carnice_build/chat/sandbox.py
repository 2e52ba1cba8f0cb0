"""The program that renders chat templates: a child process, because a template is a program.

`render` runs this file by its path, so nothing of carnice-build is imported here.
It reads lines of JSON from standard input: `{"template", "most", "seconds", "memory"}`, and what
the template sees of each conversation.
It writes `{"compiled": true}`, and then for each conversation, as soon as it is rendered,
`{"text": "..."}`; in place of whatever fails, and last, comes `{"error": "..."}`.

The environment is the one that `apply_chat_template` of transformers 5 sets up: immutable and
sandboxed, blocks trimmed, JSON without escapes, `raise_exception`, `strftime_now`, loop controls
and the `generation` tag.
The one difference is the clock: a rendering must not depend on the day it is made.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime(2026, 1, 1)


class Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote, and changes nothing of it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def main() -> None:
    """Answer one request, within its seconds of processor time and its bytes of memory.

    Without `memory`, which a system that keeps no such limit is not asked for, the parent watches.
    """
    request = json.loads(sys.stdin.readline())
    conversations = [json.loads(line) for line in sys.stdin]
    memory = request["memory"]
    if memory is not None:
        _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CPU, request["seconds"])
    _limit(resource.RLIMIT_FSIZE, 0)
    try:
        template = _environment().from_string(request["template"])
        _say(compiled=True)
        for variables in conversations:
            _say(text=_render(template, variables, request["most"]))
    except MemoryError:
        _say(error=f"takes more than {memory // 2**20} MB" if memory else "takes too much")
    except Exception as error:
        _say(error=f"{type(error).__name__}: {error}"[:1000])


def _say(**what: str | bool) -> None:
    # Whatever is said counts, even if the process is stopped in what follows.
    print(json.dumps(what), flush=True)


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (least, least))


def _render(template: Template, variables: dict[str, Any], most: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise TemplateError(f"renders more than {most} characters")
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = NOW.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
