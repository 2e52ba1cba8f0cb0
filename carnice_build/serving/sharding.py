"""What must come out even when a model is split over several cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_MOST_SUGGESTED = 64
"""The largest number of cards that an error suggests."""


@dataclass(frozen=True, slots=True)
class Split:
    """`size` of something, of which each card gets an equal part, in whole groups of `unit`.

    `repeated` says that a card may have one that others have too; `experts`, that expert
    parallelism leaves it whole; `tower`, that it is of an encoder, which may be left out or whole.
    """

    name: str
    size: int
    unit: int = 1
    repeated: bool = False
    experts: bool = False
    tower: bool = False

    def refusal(self, cards: int) -> str | None:
        """What so many cards do to it, None where they can share it."""
        if self.repeated and cards % self.size == 0:
            return None
        part, rest = divmod(self.size, cards)
        if rest:
            return f"does not divide the {self.size} {self.name}"
        if part % self.unit:
            return (
                f"leaves each card {part} of the {self.size} {self.name}, "
                f"which is no multiple of the quantization group of {self.unit}"
            )
        return None


@dataclass(frozen=True, slots=True)
class Sharding:
    """All that cards share, and the decoder layers that are dealt out to stages of a pipeline."""

    layers: int
    splits: tuple[Split, ...] = ()

    def refusal(self, cards: int, *, experts: bool, tower: bool) -> str | None:
        """Why a model cannot be split over so many `cards`, None where it can.

        `experts` and `tower` say whether these are split.
        """
        return next(self._refusals(cards, experts, tower), None)

    def possible(self, *, experts: bool, tower: bool) -> list[int]:
        """The numbers of cards that a model can be split over."""
        numbers = range(1, _MOST_SUGGESTED + 1)
        return [n for n in numbers if self.refusal(n, experts=experts, tower=tower) is None]

    def _refusals(self, cards: int, experts: bool, tower: bool) -> Iterator[str]:
        for split in self.splits:
            if (experts or not split.experts) and (tower or not split.tower):
                found = split.refusal(cards)
                if found is not None:
                    yield found
