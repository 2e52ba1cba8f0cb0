"""What `carnice verify` prints of checks, whatever files made them say."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from carnice_build.commands.verify import VariantResult, VerifyResult
from carnice_build.report.verify_table import check_lines, verify_tables
from carnice_build.verification.result import judged

BAD = "[/x]\x1b[31m\n"
"""No tag that was opened, a colour, and another line."""

SHOWN = "[/x]\\x1b[31m\\n"


def test_nothing_in_a_check_drives_a_terminal() -> None:
    """Names of tensors come from checkpoints, and what was measured from caches."""
    kinds = [{"kind": BAD, "modules": 1, "error": 0.1, "largest": 0.1}]
    worst = [{"module": BAD, "bits": 4, "error": 0.1, "bound": 0.2, "outside": 0}]
    check = judged("round trip", [BAD], BAD, {"kinds": kinds, "worst": worst})
    result = VerifyResult([VariantResult("four", Path("four"), [check])], [], [])
    output = io.StringIO()
    console = Console(file=output, width=200)
    console.print(check_lines("four", check))
    for table in verify_tables(result):
        console.print(table)

    assert "\x1b" not in output.getvalue()
    assert 4 == output.getvalue().count(SHOWN)


def test_what_a_cache_has_in_the_place_of_modules_is_not_told() -> None:
    """Its records may be anybody's."""
    check = judged("round trip", [], "fine", {"kinds": [{}], "worst": [{"module": 3}]})
    result = VerifyResult([VariantResult("four", Path("four"), [check])], [], [])

    assert [] == list(verify_tables(result))
