"""Shutting down without dropping anybody: what worker and container's entry tell each other.

Two empty files in the folder that `SERVING_STATE` names; without that variable nothing happens.
`draining` is made by the entry (`docker/serve.py`) when the platform says stop: from then on new
requests are refused. `busy` is kept by the worker while a request is in flight: when it has gone,
the entry may stop TorchServe, which by itself would reset every connection.
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
        self.report(live=0)

    def requested(self) -> bool:
        """Whether the server is shutting down."""
        return self._folder is not None and (self._folder / DRAINING).exists()

    def report(self, live: int) -> None:
        """Keep `busy` in step with the number of live requests; touches the disk on change only."""
        if self._folder is None or self._busy == bool(live):
            return
        self._busy = bool(live)
        if live:
            (self._folder / BUSY).touch()
        else:
            (self._folder / BUSY).unlink(missing_ok=True)
