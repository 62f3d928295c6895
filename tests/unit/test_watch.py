"""When the watcher ends a server: with a fake clock, and with a small HTTP server as TorchServe."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.torchserve import watch
from deploy.torchserve.watch import STEP_SECONDS, Frontend, Health, State, Watcher
from handler import drain, response


def test_watcher_and_handler_declare_the_same_names():
    assert watch.PROBE == response.PROBE
    assert (watch.TICKED, watch.FAILED) == (drain.TICKED, drain.FAILED)


class FakeFrontend:
    """Reports what a test sets."""

    response_timeout = 15

    def __init__(self) -> None:
        self.health = Health(State.SERVING, "ready")
        self.occupied = 0

    def check(self) -> Health:
        return self.health

    def occupy(self) -> list[SimpleNamespace]:
        self.occupied += 1
        return [SimpleNamespace(close=self.close)]

    def close(self) -> None:
        self.occupied -= 1

    def set(self, state: State, worker: int | None = None) -> None:
        self.health = Health(state, state.value, worker)


class World:
    """A watcher, its server and the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        self.frontend = FakeFrontend()
        self.watcher = Watcher(self.frontend)

    def serve(self, after: float = 3.0) -> "World":
        self.now += after
        self.frontend.set(State.SERVING)
        assert not self.watcher.look()
        return self

    def seconds_until_verdict(self, state: State, most: int = 2000) -> int:
        self.frontend.set(state)
        began = self.now
        while not self.watcher.look():
            self.now += 1.0
            assert self.now - began < most, "no verdict"
        return round(self.now - began)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.mark.parametrize(
    ("state", "seconds"),
    [(State.NO_WORKER, 22), (State.FROZEN, 15), (State.STUCK, 25), (State.FAILED, 2)],
)
def test_server_that_does_not_serve_is_ended(world: World, state: State, seconds: int):
    assert world.serve().seconds_until_verdict(state) == seconds
    assert world.watcher.verdict == f"{state.value}; waited {seconds} s"


def test_large_model_may_take_longer_to_come_back_than_to_start(world: World):
    assert world.serve(after=100).seconds_until_verdict(State.NO_WORKER) == 150


def test_first_load_may_take_twenty_minutes(world: World):
    assert world.seconds_until_verdict(State.NO_WORKER) == 1200


def test_worker_that_dies_again_and_again_while_it_starts_ends_the_server(world: World):
    for worker in (11, 11, 12):
        world.frontend.set(State.NO_WORKER, worker)
        assert not world.watcher.look()
    world.frontend.set(State.NO_WORKER, 13)
    assert world.watcher.look().startswith("no worker is ready")


def test_replaced_worker_ends_the_wait(world: World):
    world.serve()
    for _ in range(5):
        world.frontend.set(State.NO_WORKER)
        for _ in range(20):
            world.now += 1.0
            assert not world.watcher.look()
        world.serve()


def test_server_that_changes_between_failures_is_ended(world: World):
    """No check finds it serving, but no failure lasts."""
    world.serve()
    began = world.now
    states = [State.STUCK, State.NO_WORKER, State.FROZEN]
    while not world.watcher.look():
        states.append(states.pop(0))
        world.frontend.set(states[0])
        world.now += 3.0
        assert world.now - began < 60
    assert world.now - began > 30


def test_clients_are_rejected_while_the_worker_stays_away(world: World):
    """The queue is filled after five seconds, and emptied when there is a worker."""
    world.serve().frontend.set(State.NO_WORKER)
    for second in range(10):
        world.watcher.look()
        assert bool(world.frontend.occupied) == (second > 5)
        world.now += 1.0
    world.serve()
    assert world.frontend.occupied == 0


def test_time_in_which_the_watcher_did_not_run_does_not_count(world: World):
    """A laptop that was closed, a container that was paused."""
    world.serve().frontend.set(State.FROZEN)
    assert not world.watcher.look()
    world.now += 3600
    assert not world.watcher.look()
    assert world.watcher._seconds[State.FROZEN] == STEP_SECONDS


class TorchServe(BaseHTTPRequestHandler):
    """Responds to probes with what the test sets; 0 means not at all."""

    status, body = 200, b"{}"

    def do_POST(self) -> None:
        if not self.status:
            time.sleep(0.5)
            return
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), TorchServe) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_port
        server.shutdown()


READY, LOADING = [{"status": "READY", "pid": 1}], [{"status": "UNLOADING", "pid": 1}]
OURS = b'{"error": {"code": 503}}'
FRONTENDS = b'{"code": 503, "type": "ServiceUnavailableException"}'


@pytest.mark.parametrize(
    ("status", "body", "ticked", "workers", "state"),
    [
        (200, b"{}", False, READY, State.SERVING),
        (503, FRONTENDS, True, READY, State.SERVING),  # the queue is full
        (503, FRONTENDS, False, READY, State.STUCK),
        (503, OURS, True, READY, State.FAILED),
        (0, b"", True, READY, State.SERVING),  # it waits behind many requests
        (0, b"", False, READY, State.STUCK),
        (0, b"", True, LOADING, State.NO_WORKER),
        (0, b"", False, LOADING, State.NO_WORKER),
        (503, FRONTENDS, False, [], State.NO_WORKER),
        (507, b"Worker died", False, LOADING, State.NO_WORKER),
        (0, b"", False, None, State.FROZEN),
    ],
)
def test_check_finds_what_is_wrong(
    monkeypatch, tmp_path: Path, port, status, body, ticked, workers, state
):
    def get(path: str, timeout: float) -> list[dict]:
        assert path == "/models/tiny"
        if workers is None:
            raise TimeoutError
        return [{"responseTimeout": 15, "workers": workers}]

    monkeypatch.setattr(TorchServe, "status", status)
    monkeypatch.setattr(TorchServe, "body", body)
    monkeypatch.setattr(watch, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(watch, "QUEUE_SECONDS", 0.2)
    (tmp_path / "ticked").touch()
    (tmp_path / "failed").write_text("a file\nis missing")
    frontend = Frontend(port, "tiny", get, tmp_path)
    if ticked:
        frontend._last_tick = 1.0
    health = frontend.check()
    assert health.state is state, health
    if state is State.FAILED:
        assert health.reason == "the model cannot be loaded: a file is missing"
    if ticked and health.state is State.SERVING:
        assert frontend.check().state is State.STUCK, "there was no tick since the last check"


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (503, b'{"code": 503, "type": "InternalServerException"}', State.SERVING),
        (500, b"what is a probe?", State.SERVING),
        (503, FRONTENDS, State.STUCK),
        (0, b"", State.STUCK),
    ],
)
def test_handler_that_knows_no_probe_is_not_stuck_if_it_responds(
    monkeypatch, tmp_path: Path, port, status, body, state
):
    monkeypatch.setattr(TorchServe, "status", status)
    monkeypatch.setattr(TorchServe, "body", body)
    monkeypatch.setattr(watch, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(watch, "QUEUE_SECONDS", 0.2)
    paths = []

    def get(path: str, timeout: float) -> list[dict]:
        paths.append(path)
        return [{"responseTimeout": 15, "workers": READY}]

    assert Frontend(port, "mein größtes Modell", get, tmp_path).check().state is state
    assert paths == ["/models/mein%20gr%C3%B6%C3%9Ftes%20Modell"]
