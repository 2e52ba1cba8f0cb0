"""Tool-call dialogues in the Hermes form, and their translation to chat-template messages.

A dialogue is `{"conversations": [{"from": ..., "value": ...}], "tools": [...]}` with the speakers
`system`, `human`, `gpt` and `tool`; calls stand in `<tool_call>` as JSON.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import names

Value = str | int
Dialogue = dict[str, Any]
Turn = dict[str, str]

_SYSTEM_PROMPTS = (
    "You are a function calling assistant. Call functions when they help to answer.",
    "You are an agent. Use the functions you are given; never invent an argument.",
    "You may call one or more functions to help with the user's query.",
    "Help the user. Call a function only when it is needed.",
)
_CITIES = (
    "Amsterdam Athens Berlin Bogota Cairo Dakar Delhi Dublin Geneva Hanoi Havana Helsinki Jakarta "
    "Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Milan Montreal Nairobi Oslo Paris "
    "Prague Quito Riga Rome Seoul Sofia Tallinn Tokyo Toronto Tunis Vienna Warsaw Zagreb Zurich"
)
_PEOPLE = "Ada Boris Clara Diego Elena Farid Grace Hana Ivan Jonas Kira Liam Mina Noor Omar"
_LANGUAGES = "Dutch English Finnish French German Greek Hindi Italian Korean Polish"

_VALUES: dict[str, Callable[[random.Random], Value]] = {
    "city": lambda rng: rng.choice(_CITIES.split()),
    "unit": lambda rng: rng.choice(("celsius", "fahrenheit")),
    "sky": lambda rng: rng.choice(("clear", "cloudy", "rainy", "windy", "foggy")),
    "person": lambda rng: rng.choice(_PEOPLE.split()),
    "language": lambda rng: rng.choice(_LANGUAGES.split()),
    "date": lambda rng: f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    "time": lambda rng: f"{rng.randint(7, 21):02}:{rng.choice((0, 15, 30, 45)):02}",
    "ticker": lambda rng: "".join(rng.choices("ABCDEFGHKLMNPRSTXZ", k=rng.randint(3, 4))),
    "path": lambda rng: f"/{'/'.join(names.words(rng, rng.randint(1, 2)))}/{names.snake(rng)}.txt",
    "phrase": lambda rng: " ".join(names.words(rng, rng.randint(2, 4))),
    "name": names.identifier,
    "id": names.hex_id,
    "code": names.code,
    "integer": lambda rng: rng.randint(1, 500),
    "percent": lambda rng: rng.randint(1, 99),
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: its parameters and results by kind of value, a question for it, an answer."""

    name: str
    description: str
    parameters: dict[str, str]
    question: str
    results: dict[str, str]
    answer: str

    def schema(self) -> dict[str, Any]:
        """The function as a JSON schema, as chat templates take it."""
        properties = {
            name: {"type": "integer" if kind in ("integer", "percent") else "string"}
            for name, kind in self.parameters.items()
        }
        parameters = {
            "type": "object",
            "properties": properties,
            "required": list(self.parameters),
        }
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


TOOLS = (
    Tool(
        "get_weather",
        "Current weather of a city.",
        {"city": "city", "unit": "unit"},
        "What is the weather in {city}, in {unit}?",
        {"temperature": "percent", "sky": "sky"},
        "It is {temperature} degrees {unit} and {sky} in {city}.",
    ),
    Tool(
        "get_stock_price",
        "Latest price of a stock.",
        {"symbol": "ticker"},
        "How much is {symbol} trading at?",
        {"price": "integer"},
        "{symbol} trades at {price} dollars.",
    ),
    Tool(
        "read_file",
        "Read a text file.",
        {"path": "path"},
        "Show me what is in {path}.",
        {"content": "phrase"},
        "{path} says: {content}",
    ),
    Tool(
        "search_files",
        "Find files that contain a text.",
        {"query": "name", "folder": "path"},
        "Which files below {folder} mention {query}?",
        {"match": "path"},
        "{query} is mentioned in {match}.",
    ),
    Tool(
        "create_event",
        "Put an event into the calendar.",
        {"title": "phrase", "date": "date", "time": "time"},
        'Put "{title}" into my calendar on {date} at {time}.',
        {"event_id": "id"},
        'I added "{title}" on {date} at {time} as event {event_id}.',
    ),
    Tool(
        "send_message",
        "Send a message to a person.",
        {"recipient": "person", "text": "phrase"},
        'Tell {recipient} "{text}".',
        {"message_id": "id"},
        'I sent "{text}" to {recipient}, message {message_id}.',
    ),
    Tool(
        "translate_text",
        "Translate a text.",
        {"text": "phrase", "language": "language"},
        'Translate "{text}" to {language}.',
        {"translation": "name"},
        'In {language} that is "{translation}".',
    ),
    Tool(
        "book_flight",
        "Book a flight between two cities.",
        {"origin": "city", "destination": "city", "date": "date"},
        "Book me a flight from {origin} to {destination} on {date}.",
        {"booking": "code"},
        "Your flight from {origin} to {destination} on {date} is booked, code {booking}.",
    ),
    Tool(
        "track_parcel",
        "Where a parcel is.",
        {"tracking_code": "code"},
        "Where is my parcel {tracking_code}?",
        {"city": "city", "arrival": "date"},
        "Parcel {tracking_code} is in {city} and arrives on {arrival}.",
    ),
    Tool(
        "lookup_user",
        "Find a user account by its id.",
        {"user_id": "id"},
        "Who is the user {user_id}?",
        {"name": "person", "city": "city"},
        "User {user_id} is {name} from {city}.",
    ),
    Tool(
        "run_query",
        "Count the rows of a database table.",
        {"table": "name", "limit": "integer"},
        "Count the rows of {table}, at most {limit}.",
        {"rows": "integer"},
        "{table} has {rows} rows.",
    ),
    Tool(
        "set_thermostat",
        "Set the temperature of a room.",
        {"room": "name", "degrees": "percent"},
        "Set {room} to {degrees} degrees.",
        {"status": "name"},
        "{room} is set to {degrees} degrees (status {status}).",
    ),
    Tool(
        "restart_service",
        "Restart a service on a host.",
        {"service": "name", "host": "name"},
        "Restart {service} on {host}.",
        {"process": "integer"},
        "{service} runs again on {host} as process {process}.",
    ),
    Tool(
        "get_commit",
        "Details of a commit.",
        {"repository": "name", "commit": "id"},
        "Who wrote commit {commit} of {repository}?",
        {"author": "person", "date": "date"},
        "{author} wrote commit {commit} on {date}.",
    ),
    Tool(
        "convert_currency",
        "Convert an amount of money.",
        {"amount": "integer", "source": "ticker", "target": "ticker"},
        "How much is {amount} {source} in {target}?",
        {"result": "integer"},
        "{amount} {source} are {result} {target}.",
    ),
    Tool(
        "open_ticket",
        "Open a support ticket.",
        {"subject": "phrase", "priority": "percent"},
        'Open a ticket "{subject}" with priority {priority}.',
        {"ticket": "code"},
        'Ticket {ticket} is open: "{subject}".',
    ),
)


def made_up_tool(rng: random.Random) -> Tool:
    """A function whose name and parameters no other dialogue has."""
    name = names.snake(rng)
    kinds = {
        names.snake(rng): rng.choice(("name", "integer", "id")) for _ in range(rng.randint(1, 3))
    }
    wanted = " and ".join(f"{key} = {{{key}}}" for key in kinds)
    return Tool(
        name,
        f"Function {name}.",
        kinds,
        f"Call {name} with {wanted}.",
        {"result": "name"},
        "The result is {result}.",
    )


def tool_dialogue(rng: random.Random, made_up: float) -> Dialogue:
    """One dialogue; `made_up` is the share of dialogues whose functions are invented for them."""
    if rng.random() < made_up:
        tools = [made_up_tool(rng) for _ in range(rng.randint(1, 3))]
    else:
        tools = rng.sample(TOOLS, rng.randint(1, 4))
    turns = [{"from": "system", "value": rng.choice(_SYSTEM_PROMPTS)}] if rng.random() < 0.6 else []
    thinking = rng.random() < 0.5
    for _ in range(rng.choice((1, 1, 2))):
        exchange = rng.choice((_single, _single, _single, _parallel, _parallel, _in_turn, _no_call))
        turns += exchange(rng, tools, thinking)
    return {"conversations": turns, "tools": [tool.schema() for tool in tools]}


def _single(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    task = _Task.draw(rng, rng.choice(tools))
    return _calls([task], thinking)


def _parallel(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    tasks = [_Task.draw(rng, rng.choice(tools)) for _ in range(rng.choice((2, 2, 3)))]
    return _calls(tasks, thinking)


def _in_turn(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    """Two calls, the second when the first has been answered."""
    first, second = (_Task.draw(rng, rng.choice(tools)) for _ in range(2))
    return [
        {"from": "human", "value": f"{first.question} After that: {second.question}"},
        _calling([first], thinking, f"First {first.tool.name}, then {second.tool.name}."),
        _responding([first]),
        _calling([second], thinking, f"Now {second.tool.name}."),
        _responding([second]),
        _answering([first, second], thinking),
    ]


def _no_call(rng: random.Random, tools: list[Tool], thinking: bool) -> list[Turn]:
    listed = ", ".join(tool.name for tool in tools)
    question = rng.choice(("What can you do?", "Which functions do you have?"))
    thought = _thought("This needs no function.", thinking)
    return [
        {"from": "human", "value": question},
        {"from": "gpt", "value": f"{thought}I can call {listed}."},
    ]


def _calls(tasks: list[_Task], thinking: bool) -> list[Turn]:
    names = " and ".join(task.tool.name for task in tasks)
    return [
        {"from": "human", "value": " ".join(task.question for task in tasks)},
        _calling(tasks, thinking, f"I need {names}."),
        _responding(tasks),
        _answering(tasks, thinking),
    ]


def _calling(tasks: list[_Task], thinking: bool, thought: str) -> Turn:
    calls = (
        _tagged("tool_call", json.dumps({"name": task.tool.name, "arguments": task.arguments}))
        for task in tasks
    )
    return {"from": "gpt", "value": _thought(thought, thinking) + "\n".join(calls)}


def _responding(tasks: list[_Task]) -> Turn:
    responses = (_tagged("tool_response", json.dumps(task.results)) for task in tasks)
    return {"from": "tool", "value": "\n".join(responses)}


def _answering(tasks: list[_Task], thinking: bool) -> Turn:
    answers = " ".join(task.answer for task in tasks)
    return {"from": "gpt", "value": _thought("Now I can answer.", thinking) + answers}


@dataclass(frozen=True)
class _Task:
    """One use of a function: what it is given and what it gives."""

    tool: Tool
    arguments: dict[str, Value]
    results: dict[str, Value]

    @classmethod
    def draw(cls, rng: random.Random, tool: Tool) -> _Task:
        """A use of `tool` with random values."""
        return cls(tool, _draw(rng, tool.parameters), _draw(rng, tool.results))

    @property
    def question(self) -> str:
        return self.tool.question.format(**self.arguments)

    @property
    def answer(self) -> str:
        return self.tool.answer.format(**self.arguments, **self.results)


def _draw(rng: random.Random, kinds: dict[str, str]) -> dict[str, Value]:
    return {name: _VALUES[kind](rng) for name, kind in kinds.items()}


def _tagged(tag: str, value: str) -> str:
    return f"<{tag}>\n{value}\n</{tag}>"


def _thought(thought: str, thinking: bool) -> str:
    return f"<think>\n{thought}\n</think>\n" if thinking else ""


def to_messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    """A Hermes dialogue as chat-template messages."""
    messages: list[dict[str, Any]] = []
    for turn in dialogue["conversations"]:
        speaker, value = turn["from"], turn["value"]
        if speaker == "tool":
            messages += [
                {"role": "tool", "content": text} for text in _inside("tool_response", value)
            ]
        elif speaker == "gpt":
            messages.append(_assistant_message(value))
        else:
            messages.append({"role": "user" if speaker == "human" else speaker, "content": value})
    return messages


def _assistant_message(value: str) -> dict[str, Any]:
    calls = [json.loads(text) for text in _inside("tool_call", value)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": value.split("<tool_call>")[0].strip(),
    }
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def _inside(tag: str, value: str) -> list[str]:
    return re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", value, flags=re.DOTALL)
