"""A server asked as its users ask it: through the `openai` client."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnice_build.chat.parsers import ToolCall
from carnice_build.chat.render import Message
from carnice_build.engines.server import Patience, Server
from carnice_build.errors import EngineError
from carnice_build.extras import pip_install
from carnice_build.verification.running import Drafts

MOST_TOKENS = 256
"""Of an answer with calls."""

_COUNTER = re.compile(
    r"^(?:vllm|llamacpp):spec_decode_(num_drafts|num_accepted_tokens_per_pos)_total"
    r"(?:\{(.*)\})? (\S+)$",
    re.MULTILINE,
)
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Answer:
    """What a server makes of a model's turn; `calls` is None where arguments are no object."""

    thought: str
    content: str
    calls: tuple[ToolCall, ...] | None


def load_openai() -> Any:
    """The module `openai`; EngineError where it is not installed."""
    try:
        import openai
    except ImportError:
        raise EngineError(f"openai is not installed: {pip_install('engines')}") from None
    return openai


class Client:
    """Asks one server; EngineError for what is no answer, and when none comes."""

    def __init__(self, server: Server, patience: Patience) -> None:
        openai = load_openai()
        self._errors = openai
        self._server = server
        self._patience = patience
        # No retries: a second try would hide what the first one met.
        self._client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=patience.answer, max_retries=0
        )

    def scores(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities in nats of all tokens but the first, each after those before it."""
        with self._answering():
            answer = self._client.completions.create(
                model=self._server.model,
                prompt=list(tokens),
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": 0, "add_special_tokens": False},
            )
            # What vLLM adds to the protocol, the client's types do not know.
            choice: Any = answer.choices[0]
            pairs = zip(tokens[1:], choice.prompt_logprobs[1:], strict=True)
            return [float(item[str(token)]["logprob"]) for token, item in pairs]

    def write(self, tokens: Sequence[int], count: int) -> None:
        """Have `count` tokens written after a prompt, greedily and past any end of turn."""
        with self._answering():
            answer = self._client.completions.create(
                model=self._server.model,
                prompt=list(tokens),
                max_tokens=count,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            if not isinstance(answer.choices[0].text, str):
                raise ValueError("no text")

    def drafts(self) -> Drafts | None:
        """What became of all drafts so far; None when nothing was drafted."""
        with self._answering():
            url = f"{self._server.url}/metrics"
            with urllib.request.urlopen(url, timeout=self._patience.answer) as response:
                text = response.read().decode()
        steps, accepted = 0, dict[int, int]()
        for name, labels, value in _COUNTER.findall(text):
            position = _POSITION.search(labels)
            if position:
                accepted[int(position[1])] = int(float(value))
            elif name == "num_drafts":
                steps = int(float(value))
        if not steps:
            return None
        return Drafts(steps, [accepted[place] / steps for place in sorted(accepted)])

    def ask(
        self, messages: Sequence[Message], tools: Sequence[Any], *, thinking: bool, stream: bool
    ) -> Answer:
        """The assistant's next turn at temperature 0, whole or put together from a stream."""
        with self._answering():
            asked: dict[str, Any] = {
                "model": self._server.model,
                "messages": _as_sent(messages),
                "tools": list(tools),
                "max_tokens": MOST_TOKENS,
                "temperature": 0,
                "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}},
            }
            if stream:
                return _put_together(self._client.chat.completions.create(**asked, stream=True))
            message = self._client.chat.completions.create(**asked).choices[0].message
            calls = [
                (call.function.name, call.function.arguments) for call in message.tool_calls or ()
            ]
            return _answer(_thought(message), message.content or "", calls)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        name = self._server.name
        try:
            yield
        except (self._errors.APITimeoutError, TimeoutError):
            raise EngineError(f"{name} did not answer within {self._patience.answer:g} s") from None
        except self._errors.APIStatusError as error:
            raise EngineError(f"{name} refuses a request: {_one_line(error.message)}") from None
        except (self._errors.APIConnectionError, OSError) as error:
            with contextlib.suppress(Exception):
                self._server.process.wait(1)
            self._server.check_alive()
            raise EngineError(f"{name} broke off: {_one_line(error)}") from None
        except (
            self._errors.OpenAIError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            what = f"{type(error).__name__}: {_one_line(error)}"
            raise EngineError(f"{name} answers what no client can read: {what}") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _as_sent(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates take them, as the protocol has them: calls with ids, and as text."""
    sent: list[dict[str, Any]] = []
    calls: list[str] = []
    for message in messages:
        item = dict(message)
        if message["role"] == "tool":
            item["tool_call_id"] = calls.pop(0)
        if "tool_calls" in message:
            calls = [f"call_{len(sent)}_{index}" for index in range(len(message["tool_calls"]))]
            item["tool_calls"] = [
                {"type": "function", "id": own, "function": _as_text(call["function"])}
                for own, call in zip(calls, message["tool_calls"], strict=True)
            ]
            calls = list(calls)
        sent.append(item)
    return sent


def _as_text(function: Mapping[str, Any]) -> dict[str, str]:
    return {"name": function["name"], "arguments": json.dumps(function["arguments"])}


def _thought(message: Any) -> str:
    """The reasoning, which engines have under either name."""
    found = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
    return found or ""


def _put_together(stream: Any) -> Answer:
    thought, content = "", ""
    calls: dict[int, tuple[str, str]] = {}
    for chunk in stream:
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        thought += _thought(delta)
        content += delta.content or ""
        for call in delta.tool_calls or ():
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )
    return _answer(thought, content, [calls[index] for index in sorted(calls)])


def _answer(thought: str, content: str, calls: Sequence[tuple[str, str]]) -> Answer:
    try:
        found = tuple(ToolCall(name, _object(arguments)) for name, arguments in calls)
    except ValueError:
        return Answer(thought, content, None)
    return Answer(thought, content, found)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text or "{}")
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value
