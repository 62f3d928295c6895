"""Watch TorchServe from outside, to find out whether it serves and when to end it.

TorchServe starts a new worker when one died or did not answer for `responseTimeout`. It does not
notice that its own threads are stuck, and it says "Healthy" while no worker can be started. So the
program that started it sends a request every few seconds that only a working server answers.

`docker/serve.py`, `docker/ready` and `server.py` use this file, which imports only the standard
library.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

PROBE = b'{"probe": true}'
"""`handler/response.py` declares the same: the worker answers it in its next tick."""

ANSWER_SECONDS = 4.0
"""Time limit for the response to a probe; a tick of a small model lasts 0.2 s."""
DESCRIBE_SECONDS = 2.0
"""Time limit for the management API, which answers without a worker."""
INTERVAL = 2.0
"""Seconds between two checks."""
START_INTERVAL = 0.3
"""Seconds between two checks until the first worker is ready."""
STEP_SECONDS = ANSWER_SECONDS + DESCRIBE_SECONDS + INTERVAL
"""The longest time between two checks. More means that this program did not run either: the
machine was suspended, or the container paused."""

PATIENCE_SECONDS = 22
"""Without a ready worker, until the server is ended: 30 s at most with the time between two checks
(`STEP_SECONDS`)."""
RELOAD_FACTOR = 1.5
"""A worker may take this many times as long to come back as the server took to start."""
OCCUPY_SECONDS = 5
"""Without a ready worker, until clients get 503."""
FROZEN_SECONDS = 15
"""Without any response from the frontend, until the server is ended."""
FAILED_SECONDS = 2
"""With a model that cannot be loaded, until the server is ended. Requests that wait get their
responses in this time."""
STUCK_SECONDS = 10
"""After `responseTimeout`, at which TorchServe should have replaced the worker."""
START_SECONDS = 1200
"""Until the first worker is ready; the same as `startupTimeout` in handler/apps/defaults.yaml."""

TICKED, FAILED = "ticked", "failed"
"""Files of the worker in the state folder; `handler/drain.py` declares the same."""
_QUEUE_FULL = b"ServiceUnavailableException"
"""In the frontend's response if it cannot pass a request to the worker."""
QUEUE_SECONDS = 1.0
"""To wait for the next tick, if the frontend rejects the probe because its queue is full."""


class State(Enum):
    """What a check found."""

    SERVING = "ready"
    FAILED = "the model cannot be loaded"
    NO_WORKER = "no worker is ready"
    STUCK = "the worker does not answer"
    FROZEN = "the frontend does not answer"


class Health(NamedTuple):
    """The result of one check."""

    state: State
    reason: str
    worker: int | None = None
    """The process id of the newest worker, if known."""


class Frontend:
    """A TorchServe that serves one model.

    Args:
        port: the inference port.
        model: the model's name; empty if it is not known.
        get: reads a path of the management API, as `management.get` does; raises OSError,
            ValueError.
        folder: the worker's state folder (`handler/drain.py`).
    """

    def __init__(self, port: int, model: str, get: Callable[..., Any], folder: Path) -> None:
        self.port, self.model, self.get, self.folder = port, model, get, folder
        self._path = f"/predictions/{quote(model)}?probe" if model else "/invocations?probe"
        self.response_timeout = 0
        self._last_tick = 0.0

    def check(self) -> Health:
        """Send a probe through the frontend to the worker; if that fails, find out why."""
        before = self._last_tick or self._tick_time()
        status, body = self.probe()
        if status in (200, 400, 429):  # 400: from a handler that knows no probe
            self._last_tick = self._tick_time()
            return Health(State.SERVING, "ready")
        if status == 503 and b'"error"' in body:  # the handler's; the frontend's has another form
            return Health(State.FAILED, self._why_failed())
        # Behind many requests, a probe may be rejected or wait for long. Then ticks show progress.
        ticked = self._ticked(before, QUEUE_SECONDS if status == 503 else 0.0)
        if status == 503 and ticked:
            return Health(State.SERVING, "ready; the queue is full")
        try:
            description = self.describe()
        except (OSError, ValueError, LookupError, TypeError):
            return Health(State.FROZEN, State.FROZEN.value)
        self.response_timeout = description.get("responseTimeout", 0)
        workers = description.get("workers", [])
        worker = workers[-1].get("pid") if workers else None
        if not any(worker["status"] == "READY" for worker in workers):
            return Health(State.NO_WORKER, State.NO_WORKER.value, worker)
        if ticked:
            return Health(State.SERVING, "ready; busy")
        if status and _QUEUE_FULL not in body and not self.probed:
            return Health(State.SERVING, "ready")  # another handler, which fails on the probe
        return Health(State.STUCK, State.STUCK.value, worker)

    def probe(self) -> tuple[int, bytes]:
        """Return the status and body of the response to a probe; the status is 0 without one."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("POST", self._path, PROBE)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException):
            return 0, b""
        finally:
            connection.close()

    @property
    def probed(self) -> bool:
        """Whether the handler is ours, which knows the probe."""
        return any((self.folder / f).exists() for f in (TICKED, FAILED))

    def describe(self) -> dict[str, Any]:
        """Return what the management API says about the model.

        Raises:
            OSError, ValueError, LookupError: it does not answer as it should.
        """
        return self.get(f"/models/{quote(self.model)}", timeout=DESCRIBE_SECONDS)[0]

    def occupy(self) -> list[socket.socket]:
        """Fill the frontend's queue with probes, so that it rejects requests with 503 at once.

        Without a worker, it would hold requests until there is one again, or until it is ended.
        """
        held = []
        head = f"POST {self._path} HTTP/1.1\r\nHost: localhost\r\n"
        request = f"{head}Content-Length: {len(PROBE)}\r\n\r\n".encode() + PROBE
        with suppress(OSError, ValueError, LookupError, TypeError):
            for _ in range(self.describe()["jobQueueStatus"]["remainingCapacity"]):
                held.append(socket.create_connection(("127.0.0.1", self.port), DESCRIBE_SECONDS))
                held[-1].sendall(request)
        return held

    def _tick_time(self) -> float:
        """Return when the last tick was; 0 if that is unknown."""
        with suppress(OSError):
            return (self.folder / TICKED).stat().st_mtime
        return 0.0

    def _ticked(self, before: float, seconds: float) -> bool:
        """Whether there was a tick after `before`; wait for one for some seconds."""
        deadline = time.monotonic() + seconds
        while (last := self._tick_time()) == before and time.monotonic() < deadline:
            time.sleep(0.1)
        self._last_tick = last
        return last != before

    def _why_failed(self) -> str:
        with suppress(OSError):
            reason = " ".join((self.folder / FAILED).read_text(errors="replace").split())
            return f"{State.FAILED.value}: {reason}"
        return State.FAILED.value


class Watcher:
    """Decides when a server should be ended. Call `look` every few seconds, or `start` a thread.

    Args:
        frontend: the server.
        patience: seconds without a ready worker; half of them if the worker was stuck before. More
            if the first start took long: `RELOAD_FACTOR` times as long.
        frozen: seconds without any response from the frontend.
        start: seconds until the first worker is ready.
        occupy_after: seconds without a worker until clients get 503 instead of waiting for one.
        started_in: seconds that the start took, if it is over.
    """

    def __init__(
        self,
        frontend: Frontend,
        *,
        patience: float = PATIENCE_SECONDS,
        frozen: float = FROZEN_SECONDS,
        start: float = START_SECONDS,
        occupy_after: float = OCCUPY_SECONDS,
        started_in: float | None = None,
    ) -> None:
        self.frontend = frontend
        self.patience, self.frozen, self.start_seconds = patience, frozen, start
        self.occupy_after = occupy_after
        self.verdict = ""
        """Why the server should be ended; empty as long as it should not."""
        self._began = self._last = time.monotonic()
        self._first_start = started_in
        """Seconds until the first worker was ready."""
        self._state: State | None = None
        self._seconds = dict.fromkeys(State, 0.0)
        """Seconds in each state since the server last served."""
        self._workers: set[int] = set()
        """Process ids of the workers that did not become ready."""
        self._held: list[socket.socket] = []

    def start(self) -> "Watcher":
        """Look in a thread, until there is a verdict."""
        threading.Thread(target=self._run, name="watcher", daemon=True).start()
        return self

    def _run(self) -> None:
        while not self.look():
            time.sleep(START_INTERVAL if self._first_start is None else INTERVAL)

    def look(self) -> str:
        """Check once; return the verdict."""
        began = time.monotonic()
        health = self.frontend.check()
        now = time.monotonic()
        served = self._state in (None, State.SERVING)
        since = began if served else self._last  # between two failures nothing served, either
        step = min(now - since, STEP_SECONDS)
        self._last, self._state = now, health.state
        if health.state is State.SERVING:
            if self._first_start is None:
                self._first_start = now - self._began
            self._seconds = dict.fromkeys(State, 0.0)
            self._workers.clear()
            self._release()
            return ""
        self._seconds[health.state] += step
        if health.worker and health.worker > 0:
            self._workers.add(health.worker)
        waited, limit = self._seconds[health.state], self._limit(health.state)
        if waited >= limit:
            self.verdict = f"{health.reason}; waited {sum(self._seconds.values()):.0f} s"
        elif health.state is State.NO_WORKER and self._first_start and waited > self.occupy_after:
            self._held += self.frontend.occupy()
        return self.verdict

    def _limit(self, state: State) -> float:
        """Seconds that a state may last."""
        if state is State.FAILED:
            return FAILED_SECONDS
        if self._first_start is None:
            # A worker that died twice while it loaded the model dies a third time.
            return 0.0 if len(self._workers) > 2 else self.start_seconds
        if state is State.FROZEN:
            return self.frozen
        if state is State.STUCK:  # TorchServe replaces the worker; we end a server that does not
            return self.frontend.response_timeout + STUCK_SECONDS
        other = sum(self._seconds.values()) - self._seconds[State.NO_WORKER]
        return max(self.patience - other, self.patience / 2, RELOAD_FACTOR * self._first_start)

    def _release(self) -> None:
        for connection in self._held:
            connection.close()
        self._held.clear()
