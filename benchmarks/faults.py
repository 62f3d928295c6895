"""Faults for `benchmarks.soak`: what clients, the system and other programs do to a server.

Each is a function of a `Victim` that returns when the fault has happened. `GENTLE` faults should
leave the processes as they are. After a `FATAL` one, the worker or the server has to be replaced.
"""

import asyncio
import json
import signal
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import aiohttp
import psutil

PAUSE_SECONDS = 5.0
HOLD_SECONDS = 20.0
"""How long unread responses and unfinished requests are held."""

_LARGE = 9_900_000
_LONG_PROMPT = " ".join(f"word{n % 97}" for n in range(600))
"""About 1,850 tokens, as the words are not in the vocabulary."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Victim:
    """A server: the URL of its predictions, and a function that returns its first process."""

    url: str
    root: Callable[[], int]

    def frontend(self) -> psutil.Process:
        """Return TorchServe's Java process."""
        return self._find("serving.Frontend")

    def worker(self) -> psutil.Process:
        """Return the process that runs the handler."""
        return self._find("model_service_worker")

    def _find(self, argument: str) -> psutil.Process:
        root = psutil.Process(self.root())
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                if any(argument in part for part in process.cmdline()):
                    return process
        raise LookupError(f"the server has no process with {argument}")

    async def connect(self) -> Connection:
        """Open a connection whose small buffer fills at once if nobody reads."""
        address = urlsplit(self.url)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=raw)
        return reader, writer

    def head(self, length: int) -> bytes:
        """Return the head of a prediction's request."""
        lines = [f"POST {urlsplit(self.url).path} HTTP/1.1", "Host: localhost"]
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return "\r\n".join([*lines, "", ""]).encode()

    def request(self, instances: list[str], **parameters: object) -> bytes:
        """Return a complete request."""
        body = json.dumps({"instances": instances, "parameters": parameters}).encode()
        return self.head(len(body)) + body


Fault = Callable[[Victim], Awaitable[Counter[str] | None]]
"""May return responses to count: status, or what came instead -> how often."""


async def _send(victim: Victim, parts: list[bytes]) -> asyncio.StreamWriter | None:
    """Send the parts on a new connection and read nothing; None if the server did not take them."""
    try:
        _, writer = await asyncio.wait_for(victim.connect(), HOLD_SECONDS)
    except (OSError, TimeoutError):
        return None
    cast(asyncio.Transport, writer.transport).pause_reading()
    with suppress(OSError, TimeoutError):
        for part in parts:
            writer.write(part)
            await asyncio.wait_for(writer.drain(), HOLD_SECONDS)
    return writer


def _reset(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        with suppress(OSError):
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


async def _hold(victim: Victim, count: int, parts: list[bytes], seconds: float) -> None:
    """Send the same on many connections, hold them without reading, and reset them."""
    writers = await asyncio.gather(*(_send(victim, parts) for _ in range(count)))
    await asyncio.sleep(seconds)
    for writer in writers:
        _reset(writer)


async def reset_connections(victim: Victim) -> None:
    """Reset 100 streams in the middle."""
    stream = victim.request(["Go"], max_new_tokens=200, ignore_eos=True, stream=True)
    await _hold(victim, 100, [stream], 1)


async def leave_whole_responses(victim: Victim) -> None:
    """Leave three requests that take every place of the queue."""
    plain = victim.request(["Go"] * 32, max_new_tokens=400, ignore_eos=True)
    await _hold(victim, 3, [plain], 0.5)


async def read_nothing(victim: Victim) -> None:
    """Hold 50 streams without reading."""
    stream = victim.request(["Go"], max_new_tokens=200, ignore_eos=True, stream=True)
    await _hold(victim, 50, [stream], HOLD_SECONDS)


async def send_half(victim: Victim) -> None:
    """Hold 200 requests whose body never ends."""
    await _hold(victim, 200, [victim.head(1000), b'{"instances": ['], HOLD_SECONDS)


async def send_large_bodies(victim: Victim) -> None:
    """Send 16 bodies just under 10 MB at once, all but the last byte; then the last."""
    body = [b" " * 65_536] * (_LARGE // 65_536) + [b" " * (_LARGE % 65_536 - 1)]
    writers = await asyncio.gather(
        *(_send(victim, [victim.head(_LARGE), *body]) for _ in range(16))
    )
    await asyncio.sleep(PAUSE_SECONDS)
    for writer in writers:
        if writer is not None:
            writer.write(b" ")
    await asyncio.sleep(PAUSE_SECONDS)
    for writer in writers:
        _reset(writer)


async def send_long_prompts(victim: Victim, count: int = 64, seconds: float = 180) -> Counter[str]:
    """Send 64 prompts of about 1,850 tokens, and wait for the responses."""
    answers: Counter[str] = Counter()

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        parameters = {"max_new_tokens": 20, "ignore_eos": True}
        body = {"instances": [f"{number} {_LONG_PROMPT}"], "parameters": parameters}
        answers[f"long prompt {await post(session, victim.url, body)}"] += 1

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(one(session, number) for number in range(count)))
    return answers


async def pause_worker(victim: Victim) -> None:
    """Stop the worker for five seconds, as a system without memory does."""
    await _pause(victim.worker())


async def pause_frontend(victim: Victim) -> None:
    """Stop Java for five seconds."""
    await _pause(victim.frontend())


async def _pause(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(PAUSE_SECONDS)
    process.send_signal(signal.SIGCONT)


async def kill_worker(victim: Victim) -> None:
    """Kill the worker, as a system without memory does."""
    victim.worker().kill()


async def stop_worker(victim: Victim) -> None:
    """Stop the worker for good."""
    victim.worker().send_signal(signal.SIGSTOP)


async def kill_frontend(victim: Victim) -> None:
    """Kill Java."""
    victim.frontend().kill()


async def stop_frontend(victim: Victim) -> None:
    """Stop Java for good."""
    victim.frontend().send_signal(signal.SIGSTOP)


async def pipeline_unread(victim: Victim) -> None:
    """Send 3.5 MB of requests on four connections, and read no response."""
    some = b"GET /api-description HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
    await _hold(victim, 4, [some] * 36, HOLD_SECONDS)


GENTLE: tuple[Fault, ...] = (
    reset_connections,
    leave_whole_responses,
    read_nothing,
    send_half,
    send_large_bodies,
    send_long_prompts,
    pause_worker,
    pause_frontend,
)
FATAL: tuple[Fault, ...] = (
    kill_worker,
    stop_worker,
    pipeline_unread,
    kill_frontend,
    stop_frontend,
)


async def post(session: aiohttp.ClientSession, url: str, body: dict) -> str:
    """Send a request; return the status, `closed` without a response, or `no answer` in time."""
    try:
        async with session.post(url, json=body) as response:
            await response.read()
            return str(response.status)
    except TimeoutError:
        return "no answer"
    except aiohttp.ClientError:
        return "closed"
