"""The requests to a stand-in and its own events, as lines of JSON in its folder."""

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to calls.jsonl and events.jsonl; `read` reads them."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            kind: (folder / f"{kind}.jsonl").open("a", buffering=1) for kind in ("calls", "events")
        }

    def call(
        self, began: float, transport: str, method: str, path: str, status: str, **more: Any
    ) -> None:
        """Write down one answered request."""
        self._write(
            "calls",
            time=began,
            transport=transport,
            method=method,
            path=path,
            status=status,
            **more,
        )

    def event(self, event: str, **details: Any) -> None:
        """Write down something the platform did without a request."""
        self._write("events", time=time.time(), event=event, **details)

    def _write(self, kind: str, **line: Any) -> None:
        self._files[kind].write(json.dumps(line) + "\n")


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the complete lines of "calls" or "events", oldest first."""
    path = folder / f"{kind}.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return sorted(lines, key=lambda line: line["time"])
