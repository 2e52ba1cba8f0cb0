"""Which format a chat template makes a model write tool calls in, and who reads it.

Decided by what the template renders, so that serving flags can follow from the template that was
packaged: a template can be rewritten, named anything, or hold text that it never renders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from os.path import commonprefix

from carnice_build.chat.parsers import ToolCall, parse_hermes, parse_qwen3_xml
from carnice_build.chat.render import NO_TOKENS, Chat, Message, SpecialTokens, render
from carnice_build.errors import CheckpointError


class Syntax(StrEnum):
    """How tool calls are written, by the name of vLLM's parser for it."""

    QWEN3_XML = "qwen3_xml"
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`."""
    HERMES = "hermes"
    """A JSON object with `name` and `arguments` between `<tool_call>` tags."""
    NONE = "none"
    """The template renders no calls, or renders them as neither of the others."""


@dataclass(frozen=True)
class ToolFormat:
    """What a template makes a model write beside plain answers."""

    syntax: Syntax
    reasoning: bool
    """Thoughts stand between `<think>` tags."""

    @property
    def tool_call_parser(self) -> str | None:
        """vLLM's `--tool-call-parser`."""
        return None if self.syntax is Syntax.NONE else self.syntax.value

    @property
    def reasoning_parser(self) -> str | None:
        """vLLM's `--reasoning-parser`."""
        return "qwen3" if self.reasoning else None

    def serving_flags(self) -> tuple[str, ...]:
        """The options of `vllm serve` that fit the template."""
        flags: list[str] = []
        if self.tool_call_parser:
            flags += ["--enable-auto-tool-choice", "--tool-call-parser", self.tool_call_parser]
        if self.reasoning_parser:
            flags += ["--reasoning-parser", self.reasoning_parser]
        return tuple(flags)


_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}, "limit": {"type": "integer"}},
            "required": ["word"],
        },
    },
}
_CALL = ToolCall("look_up", {"word": "yarrow", "limit": 3})
_USER: Message = {"role": "user", "content": "What is yarrow?"}
_CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": _CALL.name, "arguments": dict(_CALL.arguments)}}
    ],
}
_THINKING: Message = {"role": "assistant", "content": "A plant.", "reasoning_content": "I know."}
_EXAMPLE = re.compile(r"<tool_call>\s*(<function=|\{)")


def knows_tools(template: str, found: ToolFormat) -> bool:
    """Whether a template, which asks for calls in the form that was found, speaks of tools."""
    return found.syntax is not Syntax.NONE or "tool" in template


def tool_format(
    template: str,
    where: str = "chat_template.jinja",
    special_tokens: SpecialTokens = NO_TOKENS,
) -> ToolFormat:
    """The format of `template`, beside a tokenizer with these special tokens.

    CheckpointError naming `where` when it cannot be rendered, or when its instructions ask for
    another format than its own rendering of a call has.
    """
    asked, called, thought, prompt = render(
        template,
        [
            Chat([_USER], [_TOOL]),
            Chat([_USER, _CALLING], [_TOOL]),
            Chat([_USER, _THINKING]),
            Chat([_USER], prompt=True),
        ],
        where,
        special_tokens,
    )
    turn = called[len(commonprefix([asked, called])) :]  # noqa: RUF071 (texts, not paths)
    syntax = _syntax_of(turn)
    example = _EXAMPLE.search(asked)
    stated = (Syntax.HERMES if example[1] == "{" else Syntax.QWEN3_XML) if example else syntax
    if stated is not syntax:
        raise CheckpointError(
            f"asks the model for tool calls as {stated}, and renders them as {syntax}", where=where
        )
    return ToolFormat(syntax, "<think>" in thought or "<think>" in prompt)


def _syntax_of(turn: str) -> Syntax:
    if parse_hermes(turn)[1] == [_CALL]:
        return Syntax.HERMES
    if parse_qwen3_xml(turn, [_TOOL])[1] == [_CALL]:
        return Syntax.QWEN3_XML
    return Syntax.NONE
