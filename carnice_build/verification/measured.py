"""What a verification measured, as model cards tell it: the source beside the folder.

Figures come from the cache, where anybody may have written: one of another form is not told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from carnice_build.formats.measured import Line, Measured, plain
from carnice_build.verification import acceptance, calls, fidelity, perplexity
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.result import Check, Outcome, count_error
from carnice_build.verification.running import SOURCE, PerplexityRow

_MOST = 10**9

T = TypeVar("T")
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Number = Annotated[float, Field(allow_inf_nan=False, ge=0, le=_MOST)]
_Rate = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]


class _Figures(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Drafts(_Figures):
    rates: list[_Rate] = Field(min_length=1, max_length=64)
    mean_length: _Number
    error: _Number


class _Copies(_Figures):
    answered: Annotated[int, Field(ge=1, le=_MOST)]
    exact: _Count
    typos: _Count


class _Share(_Figures):
    count: _Count
    of: _Count
    error: _Number


_DRAFTS = TypeAdapter(dict[str, dict[str, _Drafts]])
_COPIES = TypeAdapter(dict[str, _Copies])
_CALLS = TypeAdapter(dict[str, dict[str, Any]])
_SHARE = TypeAdapter(_Share)
_NUMBERS = TypeAdapter(_Number)


def measured(
    checks: Sequence[Check],
    rows: Sequence[PerplexityRow],
    text: str,
    made_by: Mapping[str, str],
    variant: str,
) -> Measured | None:
    """What a card tells of the `variant`; None when nothing of it was measured.

    `text` names the held-out text, `made_by` the command behind each check.
    """
    details = {
        check.name: check.details for check in checks if check.outcome is not Outcome.SKIPPED
    }
    found = {
        perplexity.NAME: list(_perplexities(rows, variant)),
        acceptance.NAME: list(_drafts(details.get(acceptance.NAME))),
        calls.NAME: list(_called(details.get(calls.NAME))),
        fidelity.NAME: list(_copied(details.get(fidelity.NAME))),
    }
    told = [name for name, lines in found.items() if lines]
    if not told:
        return None
    commands = dict.fromkeys(made_by[name] for name in told if name in made_by)
    on_text = any(found[name] for name in (perplexity.NAME, acceptance.NAME))
    lines = [line for group in found.values() for line in group]
    return Measured(lines, text if on_text else "", list(commands))


def _perplexities(rows: Sequence[PerplexityRow], variant: str) -> Iterator[Line]:
    """A line for each length, and one for the divergence there; rounded activations apart."""
    sources = {row.library: row for row in rows if row.source}
    for row in rows:
        if row.source:
            continue
        how = f" ({plain(activations)})" if (activations := _behind(row.name, variant)) else ""
        source = sources.get(row.library)
        for item in row.found:
            of = f"{item.length} tokens, {item.samples} sequences{how}"
            other = next((one for one in _found(source) if one.length == item.length), None)
            if (value := _perplexity(item)) is not None:
                yield Line(f"Perplexity, {of}", _perplexity(other) or "", value)
            if (divergence := _valid(_NUMBERS, item.kl)) is not None:
                yield Line(f"KL to the source, {of}", "", f"{divergence:.4f} nats a token")


def _behind(name: str, variant: str) -> str:
    """What a row's name has behind that of the variant: how the engine rounds activations."""
    return name.removeprefix(variant).removeprefix(", ")


def _found(row: PerplexityRow | None) -> Sequence[Perplexity]:
    return row.found if row else ()


def _perplexity(item: Perplexity | None) -> str | None:
    mean = item and _valid(_NUMBERS, item.mean)
    error = item and _valid(_NUMBERS, item.error)
    return None if mean is None or error is None else f"{mean:.3f} ± {error:.3f}"


def _drafts(details: Any) -> Iterator[Line]:
    heads = _valid(_DRAFTS, details) or {}
    for number, item in sorted(
        heads.get(acceptance.PACKAGED, {}).items(), key=lambda pair: len(pair[1].rates)
    ):
        if number != str(len(item.rates)):
            continue
        drafts = f"MTP head, {number} draft{'s' if number != '1' else ''} a step"
        yield Line(f"{drafts}: tokens a step", "", f"{item.mean_length:.2f} ± {item.error:.2f}")
        shares = " / ".join(f"{rate:.0%}" for rate in item.rates)
        yield Line(f"{drafts}: accepted, by position", "", shares)


def _called(details: Any) -> Iterator[Line]:
    models = _valid(_CALLS, details) or {}
    source, ours = _pair(models)
    for name, words in _CALLED.items():
        there, here = (_valid(_SHARE, (model or {}).get(name)) for model in (source, ours))
        if here is not None and here.of:
            yield Line(f"Tool calls: {words}", _share(there) if there else "", _share(here))


_CALLED = {
    "parsed": "answers that the parser finds a call in",
    "named": "the right function",
    "keyed": "the right function and arguments of the right names",
    "exact": "the whole call as it must be",
    "parallel": "several at once, of the right functions",
    "continued": "the right way on behind a tool's result",
    "closed": "thoughts that end",
}
"""Figures of check `calls` by name."""


def _share(item: _Share) -> str:
    return f"{item.count} of {item.of} ± {item.error:.1f}" if item.of else ""


def _copied(details: Any) -> Iterator[Line]:
    models = _valid(_COPIES, details) or {}
    source, ours = _pair(models)
    if ours is None:
        return
    for words, name in {"copied exactly": "exact", "with typos": "typos"}.items():
        shares = [_copies(model, name) if model else "" for model in (source, ours)]
        yield Line(f"Rare names {words}", *shares)


def _copies(model: _Copies, name: str) -> str:
    count, of = getattr(model, name), model.answered
    # A count that is none has no error.
    return _share(_Share(count=count, of=of, error=count_error(count, of) if count <= of else 0.0))


def _pair(models: Mapping[str, T]) -> tuple[T | None, T | None]:
    """What was found of the source, and of the folder as it is served; each is the last one."""
    source = [item for name, item in models.items() if name.partition(", ")[0] == SOURCE]
    ours = [item for name, item in models.items() if name.partition(", ")[0] != SOURCE]
    return source[-1] if source else None, ours[-1] if ours else None


def _valid(adapter: TypeAdapter[T], value: Any) -> T | None:
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return None
