"""What `carnice verify` found, kept in the cache for `carnice report` and for model cards.

Checks are of the files as they lie in a folder; figures are of their content, which a build may
put together anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from stat import S_ISDIR

from pydantic import TypeAdapter, ValidationError

from carnice_build.formats.card import CARD_NAME
from carnice_build.formats.folder import BUILD_NAME
from carnice_build.formats.measured import Measured
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
    `content` is the key of what the folder held, empty where its files were not those of its
    build.json; `made_by` has for each check the command that made it.
    """

    stamp: str
    ran: bool
    text: str
    checks: Sequence[Check]
    rows: Sequence[PerplexityRow]
    content: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)


def folder_stamp(folder: Path) -> str:
    """Changes whenever a file of the folder is written, be it with the same bytes.

    No content is read: a folder that was built again is another, also where its key is the same.
    The card tells what was found and build.json names the card, so these two do not count.
    """
    told = (CARD_NAME, BUILD_NAME)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    stats = {name: path.lstat() for name, path in paths.items() if name not in told}
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
    content: str = "",
    command: str = "",
) -> None:
    """Remember the checks of the folder; what was skipped this time stays as it was found before.

    `stamp` is that of the folder before the first check: it may be built again meanwhile.
    `content` is what it holds, if all of it was found to be so; `command` makes these checks.
    Of `rows`, those of the variant and its source are kept.
    """
    model = variant.recipe.sources[variant.recipe.body].model
    own = [row for row in rows if row.source == model or _is_of(variant.name, row)]
    before = (
        load_findings(cache, variant.name, stamp)
        or findings_of(cache, variant.name, content)
        or Findings(stamp, False, "", (), ())
    )
    found, made_by = {check.name: check for check in before.checks}, dict(before.made_by)
    for check in checks:
        if check.outcome is not Outcome.SKIPPED or check.name not in found:
            found[check.name], made_by[check.name] = check, command
    measured = any(row.found for row in own)
    findings = Findings(
        stamp,
        ran or before.ran,
        text.name if measured and text else before.text,
        list(found.values()),
        own if measured else before.rows,
        content,
        made_by,
    )
    # A check is worth as much where the cache cannot be written to.
    with contextlib.suppress(OSError):
        write_findings(cache, variant.name, asdict(findings))


def _is_of(variant: str, row: PerplexityRow) -> bool:
    """True for the variant's weights, and for these with rounded activations."""
    return not row.source and (row.name == variant or row.name.startswith(f"{variant}, "))


def load_findings(cache: Path, variant: str, stamp: str) -> Findings | None:
    """What was found of the folder with this `stamp`; None when nothing readable is known of it."""
    found = _load(cache, variant)
    return found if found and found.stamp == stamp else None


def findings_of(cache: Path, variant: str, content: str) -> Findings | None:
    """What was found of a folder with this content, whenever its files were written."""
    found = _load(cache, variant) if content else None
    return found if found and found.content == content else None


def figures_for_card(cache: Path, variant: str, content: str) -> Measured | None:
    """What the card of a folder with this content tells of measurements."""
    found = findings_of(cache, variant, content)
    if found is None:
        return None
    # A build of what was never verified does without the checks themselves.
    from carnice_build.verification.measured import measured

    return measured(found.checks, found.rows, found.text, found.made_by, variant)


def _load(cache: Path, variant: str) -> Findings | None:
    value = read_findings(cache, variant)
    if value is None:
        return None
    try:
        return TypeAdapter(Findings).validate_python(value)
    except ValidationError:
        return None
