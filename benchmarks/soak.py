"""Half an hour of load: 16 clients, mixed lengths, some disconnect, some send invalid requests.

    python -m benchmarks.soak               # 30 minutes
    python -m benchmarks.soak --minutes 2

Every 20th request is a stream whose client disconnects after the first text; every 100th is not
valid. We aim at no 5xx, no lost response, memory that does not grow after the warm-up (less than
1 MB a minute) and a 99th percentile of the time per token that does not change.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
from tqdm import tqdm

from benchmarks.load import percentile, prompts
from benchmarks.record import write
from benchmarks.serving import memory
from benchmarks.systems import OURS_INT8
from deploy.common import cli
from deploy.common.paths import UserError

CLIENTS = 16
LENGTHS = (8, 16, 32, 64, 128, 256)
WARM_UP_MINUTES = 6
"""Until every block of the KV cache has been used once, also on a slow processor."""

EVERY_MINUTES = 2
DISCONNECT_EVERY, INVALID_EVERY = 20, 100


class Soak:
    """The run so far; `samples` are (minute, MB), `times` are (minute, seconds a token)."""

    def __init__(self, url: str, pid: int, minutes: float) -> None:
        self.url, self.pid = url, pid
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        self.sent = 0
        self.outcomes: Counter[str] = Counter()
        self.samples: list[tuple[float, float]] = []
        self.times: list[tuple[float, float]] = []

    def minute(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.began) / 60

    async def client(self, session: aiohttp.ClientSession, client_index: int) -> None:
        """Send requests until time is up."""
        draw, next_prompt = random.Random(client_index), prompts(client_index)
        while time.monotonic() < self.end:
            self.sent += 1
            length = draw.choice(LENGTHS)
            if self.sent % INVALID_EVERY == 0:
                body = {"instances": [next_prompt()], "parameters": {"temperature": "hot"}}
                self.outcomes[f"invalid {await self.send(session, body)}"] += 1
            elif self.sent % DISCONNECT_EVERY == 0:
                await self.disconnect(session, next_prompt())
            else:
                began = time.perf_counter()
                parameters = {"max_new_tokens": length, "ignore_eos": True}
                body = {"instances": [next_prompt()], "parameters": parameters}
                status = await self.send(session, body)
                self.outcomes[f"valid {status}"] += 1
                self.times.append((self.minute(), (time.perf_counter() - began) / length))

    async def send(self, session: aiohttp.ClientSession, body: dict) -> str:
        """Send a request and return the response's status, or the name of the error."""
        try:
            async with session.post(self.url, json=body) as response:
                await response.json()
                return str(response.status)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return type(error).__name__

    async def disconnect(self, session: aiohttp.ClientSession, prompt: str) -> None:
        """Disconnect from a stream after its first text."""
        parameters = {"max_new_tokens": max(LENGTHS), "ignore_eos": True, "stream": True}
        body = {"instances": [prompt], "parameters": parameters}
        try:
            async with session.post(self.url, json=body) as response:
                await response.content.readline()
                self.outcomes[f"disconnected {response.status}"] += 1
                response.close()
        except aiohttp.ClientError as error:
            self.outcomes[f"disconnected {type(error).__name__}"] += 1

    async def watch(self, progress: tqdm) -> None:
        """Sample the server's memory every ten seconds."""
        while time.monotonic() < self.end:
            self.samples.append((self.minute(), memory(self.pid) / 1e6))
            progress.n = round(self.minute(), 1)
            progress.refresh()
            await asyncio.sleep(min(10, max(0, self.end - time.monotonic())))

    async def run(self, progress: tqdm) -> None:
        """Run all clients together, until time is up."""
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            clients = (self.client(session, i) for i in range(CLIENTS))
            await asyncio.gather(self.watch(progress), *clients)

    def p99(self, begin: float, minutes: float) -> float | None:
        """99th percentile, in seconds a token, of valid requests that ended in these minutes."""
        return percentile([t for m, t in self.times if begin <= m < begin + minutes], 99)

    def measurements(self) -> dict[str, Any]:
        """Sum up the run. The memory's slope is in MB a minute, after the warm-up."""
        minutes = self.samples[-1][0]
        warm = min(WARM_UP_MINUTES, minutes / 3)
        after = [(m, mb) for m, mb in self.samples if m >= warm]
        minute, held = np.array(after).T
        slope = float(np.polyfit(minute, held, 1)[0])
        third = (minutes - warm) / 3
        pieces = [warm + i * third for i in range(3)]
        slices = [EVERY_MINUTES * i for i in range(int(minutes / EVERY_MINUTES))]
        return {
            "minutes": round(minutes, 1),
            "clients": CLIENTS,
            "cores_used": len(os.sched_getaffinity(0)),  # fewer under `taskset`
            "requests": dict(sorted(self.outcomes.items())),
            "memory_mb_after_warm_up": after[0][1],
            "memory_mb_at_the_end": after[-1][1],
            "memory_mb_a_minute": slope,
            "p99_seconds_a_token_by_third": [self.p99(m, third) for m in pieces],
            "p99_seconds_a_token": [(m, self.p99(m, EVERY_MINUTES)) for m in slices],
            "memory_mb": [(round(m, 2), round(mb, 1)) for m, mb in self.samples],
        }


app = cli.app(__doc__)


@app.command()
def main(
    minutes: float = 30,
    output: Annotated[str, typer.Option(help="Name of the result file.")] = "soak",
) -> None:
    """Run, write results/soak.json, and fail after an unexpected response."""
    with OURS_INT8() as (target, pid):
        soak = Soak(target.url, pid, minutes)
        with tqdm(total=minutes, unit="min") as progress:
            asyncio.run(soak.run(progress))
    measured = soak.measurements()
    shown = {name: value for name, value in measured.items() if name != "memory_mb"}
    print(json.dumps(shown, indent=2))
    print(write(output, measured, ["torchserve", "openvino", "openvino-genai"]).name)
    if unexpected := set(soak.outcomes) - {"valid 200", "invalid 400", "disconnected 200"}:
        raise UserError(f"unexpected responses: {', '.join(sorted(unexpected))}")


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.soak"))
