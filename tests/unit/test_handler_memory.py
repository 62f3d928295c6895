"""Thousands of requests of all kinds leave nothing in the handler's memory."""

import gc
import tracemalloc

from handler.engine import Progress, SequenceKey
from tests.unit.test_llm_handler import Worker, body, end, worker  # noqa: F401  a fixture


def send(worker: Worker, numbers: range) -> None:  # noqa: F811
    """Send requests that succeed, fail, are rejected, and whose clients leave."""
    for i in numbers:
        good, failed, wrong, left = (f"{kind}{i}" for kind in ("good", "failed", "wrong", "left"))
        answered = worker.tick(
            **{good: body("a"), failed: body("a", "b"), wrong: {"nonsense": i}, left: body("c")}
        )
        assert set(answered) == {wrong}
        del worker.bodies[left]
        worker.engine.next_progress = [
            end(SequenceKey(good, 0), "x" * 100),
            Progress(SequenceKey(failed, 0), "", 1, "error"),
        ]
        assert {key: status for key, (status, _) in worker.tick().items()} == {
            good: 200,
            failed: 500,
        }
        worker.engine.keys.clear()  # the fake engine's records of what it was told
        worker.engine.seconds.clear()


def test_thousands_of_requests_leave_nothing_in_memory(worker: Worker):  # noqa: F811
    """Allocations are counted after the first requests, which fill caches, and after 2,000 more."""
    send(worker, range(100))
    tracemalloc.start()
    try:
        send(worker, range(100, 110))
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        send(worker, range(110, 610))
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert worker.handler.active == {}
    assert after - before < 2000, f"{after - before} bytes are left, although all requests ended"
