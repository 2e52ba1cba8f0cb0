"""What `carnice verify` found, kept in the cache for `carnice report`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISDIR

from pydantic import TypeAdapter, ValidationError

from carnice_build.planning.planner import VariantPlan
from carnice_build.store.digests import digest_texts
from carnice_build.store.history import read_findings, write_findings
from carnice_build.verification.result import Check, Outcome
from carnice_build.verification.running import PerplexityRow


@dataclass(frozen=True)
class Findings:
    """The checks of one folder, and the perplexities of it and of its source.

    `stamp` is that of the folder when it was checked; `text` names the held-out text, empty when
    the model was never run on one; `ran` is False when all verifications left out running the
    model.
    """

    stamp: str
    ran: bool
    text: str
    checks: Sequence[Check]
    rows: Sequence[PerplexityRow]


def folder_stamp(folder: Path) -> str:
    """Changes whenever a file of the folder is written, be it with the same bytes.

    No content is read: a folder that was built again is another, also where its key is the same.
    """
    stats = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return digest_texts(
        f"{name!a} {stat.st_size} {stat.st_mtime_ns}"
        for name, stat in sorted(stats.items())
        if not S_ISDIR(stat.st_mode)
    )


def keep_findings(
    cache: Path,
    variant: VariantPlan,
    stamp: str,
    checks: Sequence[Check],
    rows: Sequence[PerplexityRow],
    *,
    ran: bool,
    text: Path | None,
) -> None:
    """Remember the checks of the folder; what was skipped this time stays as it was found before.

    `stamp` is that of the folder before the first check: it may be built again meanwhile.
    Of `rows`, those of the variant and its source are kept.
    """
    model = variant.recipe.sources[variant.recipe.body].model
    own = [row for row in rows if row.source == model or _is_of(variant.name, row)]
    before = load_findings(cache, variant.name, stamp) or Findings(stamp, False, "", (), ())
    found = {check.name: check for check in before.checks}
    for check in checks:
        if check.outcome is not Outcome.SKIPPED or check.name not in found:
            found[check.name] = check
    measured = any(row.found for row in own)
    findings = Findings(
        stamp,
        ran or before.ran,
        text.name if measured and text else before.text,
        list(found.values()),
        own if measured else before.rows,
    )
    # A check is worth as much where the cache cannot be written to.
    with contextlib.suppress(OSError):
        write_findings(cache, variant.name, asdict(findings))


def _is_of(variant: str, row: PerplexityRow) -> bool:
    """True for the variant's weights, and for these with rounded activations."""
    return not row.source and (row.name == variant or row.name.startswith(f"{variant}, "))


def load_findings(cache: Path, variant: str, stamp: str) -> Findings | None:
    """What was found of the folder with this `stamp`; None when nothing readable is known of it."""
    value = read_findings(cache, variant)
    try:
        found = TypeAdapter(Findings).validate_python(value)
    except ValidationError:
        return None
    return found if found.stamp == stamp else None
