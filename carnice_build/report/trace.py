"""A Chrome trace of a build: load it in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from carnice_build.execute.events import Event, Span


class TraceRecorder:
    """Collects spans; format: Trace Event Format, complete events (`ph: X`)."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def __call__(self, event: Event) -> None:
        """Keep the event when it is a span."""
        if isinstance(event, Span):
            self._spans.append(event)

    def write(self, path: Path) -> None:
        """Write all spans, times in microseconds from the first one's start."""
        origin = min((span.start for span in self._spans), default=0.0)
        threads = {thread: index for index, thread in enumerate(sorted(self._threads()))}
        events = [_complete_event(span, origin, threads[span.thread]) for span in self._spans]
        path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")

    def _threads(self) -> set[int]:
        return {span.thread for span in self._spans}


def _complete_event(span: Span, origin: float, thread: int) -> dict[str, Any]:
    return {
        "name": span.name,
        "cat": span.category,
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "ts": round(1e6 * (span.start - origin), 1),
        "dur": round(1e6 * (span.end - span.start), 1),
        "args": {"bytes": span.read_bytes},
    }
