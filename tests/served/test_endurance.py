"""What wears a server out: thousands of requests, kills in a row, a disk that is full."""

import asyncio
import os
import resource
import signal
import sys

import httpx
import psutil
import pytest

from deploy.common.waiting import wait_until
from deploy.torchserve.server import Server
from tests.bad_input import OK

pytestmark = pytest.mark.served

GREEDY = {"instances": ["good"] * 2, "parameters": {"max_new_tokens": 8}}
STREAM = {"instances": ["good"], "parameters": {"max_new_tokens": 8, "stream": True}}
SEEDED = {"instances": ["good"], "parameters": {"max_new_tokens": 8, "temperature": 1, "seed": 1}}
WRONG = {"instances": ["good"], "parameters": {"nonsense": 1}}
KINDS = [(GREEDY, 200), (STREAM, 200), (SEEDED, 200), (WRONG, 400)]


async def send(url: str, number: int) -> None:
    """Send requests of all kinds, 32 at a time; each has the expected status."""
    numbers = iter(range(number))

    async def client_loop() -> None:
        # One client each: a pool of connections takes longer to find one than a request takes.
        async with httpx.AsyncClient(timeout=60) as client:
            for i in numbers:
                body, expected = KINDS[i % len(KINDS)]
                response = await client.post(url, json=body)
                assert response.status_code == expected, response.text

    await asyncio.gather(*(client_loop() for _ in range(32)))


BYTES_A_REQUEST = 48_000
"""Each sequence takes a block of the KV cache that was not in memory before, 8 kB with this model,
until all of the cache is. That was 11 to 32 kB for a request of these kinds."""


def test_thousands_of_requests_leave_nothing_behind(tiny_openvino_server: Server):
    """Files and threads of Java and worker, and the worker's memory, after the first and the last.

    Java's memory is not compared: its heap grows to its limit before Java collects garbage.
    tests/unit/test_handler_memory.py measures the handler's own memory exactly.
    """
    server = tiny_openvino_server
    (worker,) = server.workers()
    processes = [psutil.Process(server.process.pid), psutil.Process(worker["pid"])]
    asyncio.run(send(server.url, 600))
    before = [(p.memory_info().rss, p.num_threads(), p.num_fds()) for p in processes]
    asyncio.run(send(server.url, 1400))
    assert processes[1].memory_info().rss - before[1][0] < 1400 * BYTES_A_REQUEST
    for process, (_, threads, files) in zip(processes, before, strict=True):
        assert process.num_threads() <= threads + 8, process
        wait_until(lambda p=process, most=files + 8: p.num_fds() <= most, timeout=10)


def test_each_kill_in_a_row_is_followed_by_a_new_worker(tiny_openvino_server: Server):
    """TorchServe waits longer after each start that failed, but not after a kill.

    KILLS=10 takes 45 s.
    """
    server = tiny_openvino_server
    kills = int(os.environ.get("KILLS", "3"))
    killed = set()
    for _ in range(kills):
        (worker,) = server.workers()
        killed.add(worker["pid"])
        os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: responds(server), timeout=20)
    assert len(killed) == kills


def responds(server: Server) -> bool:
    """Whether a request succeeds. In one run, one sent to a dying worker got no response."""
    try:
        return httpx.post(server.url, json=OK, timeout=5).is_success
    except httpx.TimeoutException:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit")
def test_serves_while_the_disk_of_the_log_is_full(tiny_openvino_server: Server):
    server = tiny_openvino_server
    pids = [server.process.pid, server.workers()[0]["pid"]]
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    try:
        for pid, (_, hard) in limits.items():  # every write to a file fails
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        size = server.log.stat().st_size
        asyncio.run(send(server.url, 40))
        httpx.get(f"http://127.0.0.1:{server.port}/nothing")
        assert server.log.stat().st_size == size
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    httpx.get(f"http://127.0.0.1:{server.port}/nothing")
    wait_until(lambda: server.log.stat().st_size > size, timeout=10)
