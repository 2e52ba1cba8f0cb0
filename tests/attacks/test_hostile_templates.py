"""Hostile chat templates: nothing hangs, runs code or fills memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacking import limits

from carnice_build.chat.hermes import to_hermes
from carnice_build.chat.parsers import parse_hermes, parse_qwen3_xml, split_reasoning
from carnice_build.chat.tool_format import Syntax, tool_format
from carnice_build.errors import CheckpointError, PlanError

QWEN = (Path(__file__).parent.parent / "golden" / "qwen.jinja").read_text()
HUGE = "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}"
SECONDS = 60
"""Far more than any takes; without the limits, some would take days."""
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "too long"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 10 ** (10 ** 10) }}", "too long|too much memory|more than 512 MB"),
        (HUGE, "more than 1000000 characters"),
        ("{{ 'x' * 10**10 }}", "more than 512 MB"),
        ("{{ '%9999999999d' % 1 }}", "more than 512 MB|Overflow|too big|ValueError"),
        ("{{ 'x' | center(10**9) }}", "more than 512 MB"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{{ raise_exception('no \x1b[31m red') }}", r"no \\x1b\[31m red"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ undefined.attribute }}", "UndefinedError"),
        ("{{ " + "(" * 10**5 + " }}", "cannot be rendered|too much memory"),
        ("x" * 300_000, "has more than 262144 characters"),
    ],
)
def test_a_hostile_template_is_an_error(template: str, words: str) -> None:
    """Nothing hangs, runs code, or fills memory; the error names the file."""
    with limits(SECONDS), pytest.raises(CheckpointError, match=f"^a file: .*(?:{words})"):
        tool_format(template, "a file")


@pytest.mark.parametrize(
    "junk",
    [
        "{% raw %}" + "{{" * 10**5 + "{% endraw %}",
        "{% raw %}" + "{% macro x() %}<function=" * 7_000 + "{% endraw %}",
        "{% if false %}" + "{% macro a() %}<function={% endmacro %}" * 500 + "{% endif %}",
        "{% if false %}" + "{% for t in tools %}{% endfor %}" * 500 + "{% endif %}",
        "{% raw %}" + "{% for t in tools %}" * 10_000 + "{% endraw %}",
        " " * 200_000,
        "{% raw %}{{ '\\x' }}{{ '\\ud800</tools>' }}{% endraw %}",
    ],
)
def test_a_hostile_text_does_not_hold_up_the_patch(junk: str) -> None:
    """A template that renders but is made to be slow to search is patched, or refused."""
    try:
        with limits(SECONDS):
            patched = to_hermes(QWEN + junk)
    except (PlanError, CheckpointError):
        return

    assert Syntax.HERMES is tool_format(patched).syntax


@pytest.mark.parametrize(
    "word", ["<function=", "<parameter=", "<tool_call>", "So be it.<tool_call>"]
)
def test_a_hostile_rendering_does_not_hold_up_the_parsers(word: str) -> None:
    """Parsers take time in proportion to the text, whatever it repeats."""
    text = word * (900_000 // len(word))

    with limits(SECONDS):
        parse_hermes(text)
        parse_qwen3_xml("<function=f>" + text, [])
        split_reasoning(text)
    with limits(SECONDS), pytest.raises(CheckpointError):
        tool_format("{% if messages | length > 1 %}{{ '" + word + "' * 10**6 }}{% endif %}")
