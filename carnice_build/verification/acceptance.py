"""Check `mtp`: how many drafts of the MTP head the model accepts, as it is and quantized too.

The model writes its own text greedily, and decoding with drafts is a walk over it.
A step of n drafts calls the head's one layer n times, as vLLM does.
Without a head a step yields one token, which is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from carnice_build.verification.result import Check, judged
from carnice_build.verification.running import AcceptanceRow, Drafts

NAME = "mtp"
PACKAGED = "head as packaged"
"""What a row is called whose head is as it lies in the folder."""


def make_rows(
    variant: str, packaged: Mapping[int, Drafts], quantized: Mapping[int, Drafts]
) -> list[AcceptanceRow]:
    """What was measured, and beside it what is true without a head: nothing is drafted."""
    nothing = {number: Drafts(item.steps, [0.0] * number) for number, item in packaged.items()}
    return [
        AcceptanceRow(variant, PACKAGED, packaged),
        AcceptanceRow(variant, "head quantized too", quantized),
        AcceptanceRow(variant, "no head", nothing),
    ]


def compared_rows(
    variant: str,
    by_default: Mapping[int, Drafts],
    whole: Mapping[int, Drafts],
    ours: Mapping[int, Drafts],
) -> list[AcceptanceRow]:
    """What mlx-vlm reports, as it runs by default and with `whole` prompts, beside our own count.

    Our count may be empty, and then has no row.
    """
    nothing = {number: Drafts(item.steps, [0.0] * number) for number, item in by_default.items()}
    rows = [
        AcceptanceRow(variant, PACKAGED, by_default),
        AcceptanceRow(variant, "prompt in one piece", whole),
        AcceptanceRow(variant, "our own count", ours),
        AcceptanceRow(variant, "no head", nothing),
    ]
    return [row for row in rows if row.drafts]


def judge_acceptance(rows: Sequence[AcceptanceRow]) -> Check:
    """The check's result; the first row is the head as packaged, which must be of some use."""
    problems = [
        f"no draft of the packaged head is accepted at n={number}"
        for number, drafts in rows[0].drafts.items()
        if not drafts.rates[0] > 0
    ]
    summary = "tokens a step: " + "; ".join(f"{row.head} {_lengths(row)}" for row in rows)
    details = {row.head: drafts_json(row.drafts) for row in rows}
    return judged(NAME, problems, summary, details)


def drafts_json(found: Mapping[int, Drafts]) -> dict[str, dict[str, object]]:
    """Figures by the number of drafts, JSON-ready."""
    return {
        str(number): {
            "steps": drafts.steps,
            "rates": list(drafts.rates),
            "mean_length": drafts.mean_length,
            "error": drafts.error,
        }
        for number, drafts in found.items()
    }


def _lengths(row: AcceptanceRow) -> str:
    return ", ".join(f"{item.mean_length:.2f} at n={number}" for number, item in row.drafts.items())
