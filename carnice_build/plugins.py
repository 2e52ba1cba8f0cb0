"""What other packages add to ours: found by their entry points, checked, and blamed by name."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from carnice_build.errors import CarniceError, PluginError

K = TypeVar("K", bound=BaseModel)
T = TypeVar("T")

_TERMINATED = 128 + signal.SIGTERM
"""With this the command line exits on SIGTERM, wherever it is."""


class Extensible(Mapping[str, type[K]], Generic[K]):
    """Our own entries first; installed packages are asked only for names we do not have.

    `[name]` raises PluginError where a package has the name and what it names cannot be used.
    """

    def __init__(
        self,
        builtin: Mapping[str, str],
        group: str,
        kind: type[K],
        named_by: str | None = None,
    ) -> None:
        """Add the entry points of `group` to `builtin`; each must name a subclass of `kind`.

        Ours are written as entry points are, `module:Class`, and imported when asked for.
        The setting `named_by` of each, if given, must accept its name.
        """
        self._builtin = builtin
        self._group = group
        self._kind = kind
        self._named_by = named_by

    def __getitem__(self, name: str) -> type[K]:
        if name in self._builtin:
            loaded: type[K] = EntryPoint(name, self._builtin[name], self._group).load()
            return loaded
        for entry in entry_points(group=self._group, name=name):
            return _load(entry, self._kind, self._named_by)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        names = (entry.name for entry in entry_points(group=self._group))
        yield from (name for name in dict.fromkeys(names) if name not in self._builtin)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def usable(self, problems: list[PluginError]) -> dict[str, type[K]]:
        """The entries that can be used; what is wrong with the others is added to `problems`."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except PluginError as error:
                problems.append(error)
        return found


_ORIGINS: dict[str, str] = {}
"""The distribution of each loaded class, by the name of the package that holds it."""


def _load(entry: EntryPoint, kind: type[K], named_by: str | None) -> type[K]:
    origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.group
    what = f"{kind.__name__.lower()} {entry.name!r}, {entry.value},"
    try:
        model = entry.load()
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise PluginError(f"{what} cannot be loaded: {_told(error)}", where=origin) from error
    if problem := _problem(entry.name, model, kind, named_by):
        raise PluginError(f"{what} {problem}", where=origin)
    # A package may give one of our steps another name, and is not to blame for it.
    if _package(model) != _package(kind):
        _ORIGINS[_package(model)] = origin
    loaded: type[K] = model
    return loaded


def _problem(name: str, model: Any, kind: type[BaseModel], named_by: str | None) -> str | None:
    """Why a recipe cannot use `model` under this name, None when it can."""
    if not (isinstance(model, type) and issubclass(model, kind)):
        return f"is no subclass of {kind.__module__}.{kind.__name__}"
    if missing := sorted(getattr(model, "__abstractmethods__", ())):
        return f"does not define {' and '.join(missing)}"
    if named_by and not _is_named(name, model, named_by):
        return f"has no setting `{named_by}: Literal[{name!r}]`"
    try:
        model.model_json_schema()
    except Exception as error:  # pydantic has several for what no schema can say
        return f"has a setting that no schema describes: {_told(error)}"
    return None


def _is_named(name: str, model: type[BaseModel], named_by: str) -> bool:
    field = model.model_fields.get(named_by)
    accepted: Any = field.annotation if field else None
    try:
        return bool(TypeAdapter(accepted).validate_python(name) == name)
    except ValidationError:
        return False


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _origin(part: object) -> str | None:
    return _ORIGINS.get(_package(part if isinstance(part, type) else type(part)))


@contextmanager
def failures_blamed(*parts: object) -> Iterator[None]:
    """Turn what code of another package raises inside the block into one sentence with its name.

    `parts` are what runs there: steps and formats, and what these bring, such as ops and readers.
    Errors of our own, and of our own parts, pass, and so does what the system refuses.
    """
    try:
        yield
    except (CarniceError, MemoryError, OSError):
        raise
    except (Exception, SystemExit) as error:  # a fault of the package's
        part = next(filter(_origin, parts), None)
        if part is None or (isinstance(error, SystemExit) and error.code == _TERMINATED):
            raise
        name = (part if isinstance(part, type) else type(part)).__name__
        raise PluginError(f"{name} failed: {_told(error)}", where=_origin(part)) from error


def returned(value: T, kind: type[Any] | tuple[type[Any], ...], method: str) -> T:
    """`value`, which `method` of a step or format gave; TypeError when it is no `kind`.

    To be called where `failures_blamed` holds.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{method} gave {type(value).__name__}")
    return value
