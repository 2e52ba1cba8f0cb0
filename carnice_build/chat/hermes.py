"""Make a chat template of the Qwen3 family write tool calls as Hermes JSON instead of XML.

Two blocks of the template's text are replaced: what the system prompt says on how to call a
tool, and the body of the loop over an assistant's `tool_calls`.
Everything else stays as it is, byte for byte, and renders what it rendered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from carnice_build.chat.render import NO_TOKENS, Chat, Message, SpecialTokens, render
from carnice_build.chat.roundtrip import check_round_trips
from carnice_build.chat.tags import Tag, end_of, quoted, tags_of
from carnice_build.chat.tool_format import Syntax, tool_format
from carnice_build.errors import CheckpointError, PlanError

_INSTRUCTIONS = (
    "To call a function, write a JSON object with its name and its arguments between tool_call"
    " tags:\n"
    "<tool_call>\n"
    '{"name": <function-name>, "arguments": <arguments-as-json-object>}\n'
    "</tool_call>\n"
    "Several calls may follow one another. Give every required argument, and write nothing after"
    " the last call."
)

# `tool_call.name` is spelled so because mlx-lm looks for these words in a template's source when
# it chooses a parser.
_CALL = """
{{%- set tool_call = {call}.function if {call}.function is defined else {call} -%}}
{{%- set arguments = tool_call.arguments | default('{{}}', true) -%}}
{{{{- {between} if not loop.first else ({after} if content | trim else '') -}}}}
{{{{- '<tool_call>\\n{{"name": ' ~ tool_call.name | tojson ~ ', "arguments": ' -}}}}
{{{{- arguments if arguments is string else arguments | tojson -}}}}
{{{{- '}}\\n</tool_call>' -}}}}
"""

Edit = tuple[int, int, str]
"""Start and end of a part of the template, and what takes its place."""


def to_hermes(
    template: str,
    where: str = "chat_template.jinja",
    special_tokens: SpecialTokens = NO_TOKENS,
) -> str:
    """`template` with tool calls in Hermes JSON, which `--tool-call-parser hermes` reads.

    PlanError naming `where` when it writes Hermes JSON already, when it lacks a block to replace,
    or when the result would not render as it should; CheckpointError when it cannot be rendered.
    """
    syntax = tool_format(template, where, special_tokens).syntax
    if syntax is Syntax.HERMES:
        raise PlanError("is patched already: it writes tool calls as Hermes JSON", where=where)
    if syntax is Syntax.NONE:
        raise _missing(where, "tool calls in Qwen3 XML")
    tags = tags_of(template)
    edits = [
        _instructions(template, tags, where),
        _calls(template, tags, where, special_tokens),
    ]
    patched = _replaced(template, edits)
    patched = _replaced(patched, list(_unused_macros(patched, tags_of(patched))))
    _prove(template, patched, where, special_tokens)
    return patched


def _missing(where: str, what: str) -> PlanError:
    return PlanError("has no block to patch", where=where, expected=what)


def _instructions(template: str, tags: Sequence[Tag], where: str) -> Edit:
    """The literal outputs after the list of tools, up to the first that is computed."""
    for index, tag in enumerate(tags):
        if tag.keyword != "for" or not re.match(r"for\s+\w+\s+in\s+tools\b", tag.code):
            continue
        run = _literals(template, tags[end_of(tags, index) + 1 :])
        text = "".join(tag.literal or "" for tag in run)
        listed, closing, asked = text.partition("</tools>")
        if not closing or "<function=" not in asked:
            continue
        stripped = asked.strip()
        start, _, end = asked.partition(stripped)
        literal = quoted(listed + closing + start + _INSTRUCTIONS + end)
        opening = "{{-" if template.startswith("{{-", run[0].start) else "{{"
        ending = "-}}" if template.endswith("-}}", 0, run[-1].end) else "}}"
        return run[0].start, run[-1].end, f"{opening} {literal} {ending}"
    raise _missing(where, "the instructions for tool calls after the list of tools")


def _literals(template: str, tags: Sequence[Tag]) -> list[Tag]:
    run: list[Tag] = []
    for tag in tags:
        between = template[run[-1].end : tag.start] if run else ""
        if tag.literal is None or between.strip():
            break
        run.append(tag)
    return run


def _calls(template: str, tags: Sequence[Tag], where: str, special_tokens: SpecialTokens) -> Edit:
    """The body of the loop over `tool_calls`."""
    loops = [
        (index, match[1])
        for index, tag in enumerate(tags)
        if (match := re.match(r"for\s+(\w+)\s+in\s.*\btool_calls\b", tag.code, re.DOTALL))
        and tag.keyword == "for"
    ]
    if len(loops) != 1:
        raise _missing(where, f"one loop over tool_calls, not {len(loops)}")
    index, call = loops[0]
    start, end = tags[index], tags[end_of(tags, index)]
    after, between = _separators(template, where, special_tokens)
    line = template[: start.start].rpartition("\n")[2]
    margin = "\n" + ("" if line.strip() else line)
    body = _CALL.format(call=call, after=quoted(after), between=quoted(between))
    lines = [margin + "    " + text for text in body.strip().splitlines()]
    return start.end, end.start, "".join(lines) + margin


def _separators(template: str, where: str, special_tokens: SpecialTokens) -> tuple[str, str]:
    """What the template puts between an answer and a call, and between two calls."""
    call = {"type": "function", "function": {"name": "wait", "arguments": {}}}
    turn: Message = {"role": "assistant", "content": "So be it.", "tool_calls": [call, call]}
    chat = Chat([{"role": "user", "content": "Wait."}, turn])
    text = render(template, [chat], where, special_tokens)[0]
    after, first, rest = text.rpartition("So be it.")[2].partition("<tool_call>")
    between, second, _ = rest.partition("</tool_call>")[2].partition("<tool_call>")
    if not (first and second) or (after + between).strip():
        raise _missing(where, "calls that follow the answer and one another")
    return after, between


def _unused_macros(template: str, tags: Sequence[Tag]) -> Iterator[Edit]:
    """Macros that wrote XML and are called no more: mlx-lm would take the template for XML.

    The comment in their place trims white space as their tags did.
    """
    used = Counter(name for tag in tags for name in re.findall(r"(\w+)\s*\(", tag.code))
    for index, tag in enumerate(tags):
        match = re.match(r"macro\s+(\w+)", tag.code)
        if match is None or tag.kind != "statement" or used[match[1]] > 1:
            continue
        last = tags[end_of(tags, index)]
        inside = template[tag.start : last.end]
        if "<function=" in inside:
            opening = "{#-" if inside.startswith("{%-") else "{#"
            ending = "-#}" if inside.endswith("-%}") else "#}"
            yield tag.start, last.end, f"{opening} Tool calls are Hermes JSON. {ending}"


def _replaced(template: str, edits: Sequence[Edit]) -> str:
    for start, end, text in sorted(edits, reverse=True):
        template = template[:start] + text + template[end:]
    return template


_QUESTION: Message = {"role": "user", "content": "What is yarrow?"}
_PLAIN = [
    Chat([*system, *turns], prompt=prompt, options=options)
    for system in ([], [{"role": "system", "content": "Answer in one word."}])
    for turns, prompt in (
        ([_QUESTION], True),
        (
            [_QUESTION, {"role": "assistant", "content": "A plant.", "reasoning_content": "Mm."}],
            False,
        ),
    )
    for options in ({}, {"enable_thinking": False})
]


def _prove(template: str, patched: str, where: str, special_tokens: SpecialTokens) -> None:
    """PlanError unless `patched` renders calls that a server reads, and all else as before."""
    problem = ""
    try:
        results = check_round_trips(patched, where, special_tokens)
        before, after = (
            render(text, _PLAIN, where, special_tokens) for text in (template, patched)
        )
        if before != after:
            problem = "a chat without tools would change"
    except CheckpointError as error:
        problem = error.what
    else:
        problem = problem or next((item.problem for item in results if not item.ok), "")
    if not problem and "<function=" in patched:
        problem = "XML calls would stay in another place"
    if problem:
        raise PlanError(
            f"is not built as the templates that this patch knows: {problem}", where=where
        )
