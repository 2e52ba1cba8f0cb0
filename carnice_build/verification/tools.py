"""Functions that agents are offered, questions for them, and random values for their parameters.

The demo checkpoints are trained on the same functions with other values.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from carnice_build.verification import names

Value = str | int

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


@dataclass(frozen=True)
class Use:
    """One use of a function: what it is given and what it gives."""

    tool: Tool
    arguments: dict[str, Value]
    results: dict[str, Value]

    @classmethod
    def draw(cls, rng: random.Random, tool: Tool) -> Use:
        """A use of `tool` with random values."""
        return cls(tool, _draw(rng, tool.parameters), _draw(rng, tool.results))

    @property
    def question(self) -> str:
        """What a user says who wants it."""
        return self.tool.question.format(**self.arguments)

    @property
    def answer(self) -> str:
        """What a user is told of the results."""
        return self.tool.answer.format(**self.arguments, **self.results)


def _draw(rng: random.Random, kinds: dict[str, str]) -> dict[str, Value]:
    return {name: _VALUES[kind](rng) for name, kind in kinds.items()}
