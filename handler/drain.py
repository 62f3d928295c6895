"""Shut down without dropping requests: signals between the worker and the entry of the container.

They use two empty files in the folder that `SERVING_STATE` names; without that variable nothing
happens. The entry (`docker/serve.py`) makes `draining` when the platform says stop; from then on
the worker rejects new requests. The worker keeps `busy` while a request is active. When it is gone,
the entry may stop TorchServe, which would otherwise reset every connection.
"""

import os
from pathlib import Path

VARIABLE = "SERVING_STATE"
DRAINING, BUSY = "draining", "busy"


class Drain:
    """The worker's side."""

    def __init__(self) -> None:
        folder = os.environ.get(VARIABLE)
        self._folder = Path(folder) if folder else None
        self._busy = True  # a worker that died may have left its file
        self.report(active=0)

    def requested(self) -> bool:
        """Return whether the server is shutting down."""
        return self._folder is not None and (self._folder / DRAINING).exists()

    def report(self, active: int) -> None:
        """Make `busy` say whether requests are active; touches the disk only on a change."""
        if self._folder is None or self._busy == bool(active):
            return
        self._busy = bool(active)
        if active:
            (self._folder / BUSY).touch()
        else:
            (self._folder / BUSY).unlink(missing_ok=True)
