"""What was asked of a stand-in and what it did, as lines of JSON in its folder."""

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to calls.jsonl and events.jsonl; `read` gives them back."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            kind: (folder / f"{kind}.jsonl").open("a", buffering=1) for kind in ("calls", "events")
        }

    def call(
        self, began: float, transport: str, method: str, path: str, status: str, **more: Any
    ) -> None:
        """One request that was answered."""
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
        """Something the platform did by itself."""
        self._write("events", time=time.time(), event=event, **details)

    def _write(self, kind: str, **line: Any) -> None:
        self._files[kind].write(json.dumps(line) + "\n")


def read(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The complete lines of "calls" or "events", oldest first."""
    path = folder / f"{kind}.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return sorted(lines, key=lambda line: line["time"])
