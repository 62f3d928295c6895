"""Exchange signals between the worker and the program that started TorchServe.

The signals are files in the folder that `SERVING_STATE` names; without that variable nothing
happens. To shut down without dropping requests, the container's entry (`docker/serve.py`) makes
`draining`; from then on the worker rejects new requests. The worker keeps `busy` while a request is
active. When it is gone, the entry may stop TorchServe, which would otherwise reset every
connection. The worker updates the time of `ticked` at each tick. `failed` says why the model
cannot be loaded.

If the disk is full or the folder is missing, these signals are lost, but no request is.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

VARIABLE = "SERVING_STATE"
DRAINING, BUSY, TICKED, FAILED = "draining", "busy", "ticked", "failed"


def record_failure(reason: str) -> None:
    """Report to the program that started TorchServe why the model cannot be loaded."""
    if folder := os.environ.get(VARIABLE):
        with suppress(OSError):
            Path(folder, FAILED).write_text(reason)


def end_with_frontend() -> None:
    """Make the kernel kill this worker when the frontend ends, even if it is stuck (on Linux)."""
    if sys.platform == "linux" and sys.argv[0].endswith("model_service_worker.py"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Drain:
    """The worker's side."""

    def __init__(self) -> None:
        folder = os.environ.get(VARIABLE)
        self._folder = Path(folder) if folder else None
        self._busy = True  # a worker that died may have left its file
        self.report(active=0)

    def requested(self) -> bool:
        """Return whether the server is shutting down."""
        with suppress(OSError):
            return self._folder is not None and (self._folder / DRAINING).exists()
        return False

    def report(self, active: int) -> None:
        """Record a tick, and make `busy` say whether requests are active."""
        if self._folder is None:
            return
        with suppress(OSError):
            (self._folder / TICKED).touch()
            if active:
                (self._folder / BUSY).touch()
            elif self._busy:
                (self._folder / BUSY).unlink(missing_ok=True)
            self._busy = bool(active)
