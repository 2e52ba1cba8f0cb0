"""What running models has in common, whichever library runs them: settings, tables, limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from carnice_build.formats.library import Library
from carnice_build.store.digests import digest_bytes
from carnice_build.system import physical_memory
from carnice_build.units import format_size
from carnice_build.verification.perplexity import Perplexity
from carnice_build.verification.process import Workers

if TYPE_CHECKING:
    from carnice_build.verification.kept import Memory

SOURCE = "BF16"
"""What tables call a model before it is quantized."""

NO_TEXT = "there is no held-out text; give --text FILE"


@dataclass(frozen=True)
class RunSettings:
    """On what to run models, and how; `samples` is None for what suits the machine.

    `workers` run them, and stay for the next variant; `memory` is what was measured before.
    """

    text: Path | None
    lengths: Sequence[int]
    samples: int | None
    threads: int
    workers: Workers
    memory: Memory

    @property
    def of_text(self) -> dict[str, object]:
        """What decides figures on the text, beside the model: facts for `memory`."""
        return {
            "text": digest_bytes(self.text.read_bytes()) if self.text else "",
            "lengths": list(self.lengths),
            **self.of_run,
        }

    @property
    def of_run(self) -> dict[str, object]:
        """What decides figures that need no text, beside the model: facts for `memory`."""
        return {"samples": self.samples, "threads": self.threads}


@dataclass(frozen=True)
class PerplexityRow:
    """A line of the table: a model, and what `library` measured or why it measured nothing.

    `source` is the name of an unquantized checkpoint, empty for a variant.
    """

    name: str
    library: Library
    found: Sequence[Perplexity]
    missing: str = ""
    source: str = ""


@dataclass(frozen=True)
class Drafts:
    """What became of the drafts of `steps` steps of decoding.

    `rates[k]` is the share of steps whose first k + 1 drafts were all accepted.
    """

    steps: int
    rates: Sequence[float]

    @property
    def mean_length(self) -> float:
        """Tokens that a step yields: its accepted drafts and the one that the model adds."""
        return 1 + sum(self.rates)

    @property
    def error(self) -> float:
        """The standard error of the mean length, as if steps were independent."""
        # The sum of P(K > k) is E[K], that of (2k + 1) P(K > k) is E[K^2].
        squares = sum((2 * k + 1) * rate for k, rate in enumerate(self.rates))
        return math.sqrt(max(0.0, squares - sum(self.rates) ** 2) / self.steps)


@dataclass(frozen=True)
class AcceptanceRow:
    """What a variant's model accepts of a head's drafts, by their number in a step."""

    variant: str
    head: str
    drafts: Mapping[int, Drafts]


@dataclass
class Tables:
    """Rows of all variants, as they are measured."""

    perplexities: list[PerplexityRow] = field(default_factory=list)
    acceptances: list[AcceptanceRow] = field(default_factory=list)

    def has_source(self, library: Library, source: str) -> bool:
        """True when the unquantized model was measured already."""
        known = {(row.library, row.source) for row in self.perplexities}
        return (library, source) in known

    def ordered(self) -> list[PerplexityRow]:
        """The rows with the unquantized sources first, which are named where there are several."""
        sources = {row.source for row in self.perplexities} - {""}
        named = [
            replace(row, name=f"{row.name} {row.source}")
            if row.source and len(sources) > 1
            else row
            for row in self.perplexities
        ]
        return sorted(named, key=lambda row: not row.source)


def too_large(size: int) -> str:
    """Why a model of `size` bytes cannot be loaded here, or nothing."""
    memory = physical_memory()
    if size < memory:
        return ""
    return f"needs {format_size(size)} of memory; this machine has {format_size(memory)}"
