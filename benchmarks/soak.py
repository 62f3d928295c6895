"""Half an hour of ordinary trouble: 16 clients, mixed lengths, some leave, some send nonsense.

    python -m benchmarks.soak               # 30 minutes
    python -m benchmarks.soak --minutes 2

Every 20th request is a stream whose client hangs up after its first text; every 100th is not valid.
Wanted: no 5xx, no lost reply, memory that does not grow after the warm-up (less than 1 MB a minute)
and a 99th percentile of the time per token that stays where it was.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter

import aiohttp
import numpy as np
from tqdm import tqdm

from benchmarks.load import percentile, prompts
from benchmarks.record import write
from benchmarks.serving import memory
from benchmarks.systems import SYSTEMS
from deploy.common.cli import command
from deploy.common.paths import UserError

CLIENTS = 16
LENGTHS = (8, 16, 32, 64, 128, 256)
WARM_UP_MINUTES = 6
"""Until every block of the KV cache has been used once, also on a slow processor."""

EVERY_MINUTES = 2
LEAVE_EVERY, NONSENSE_EVERY = 20, 100


class Soak:
    """What has happened so far; `samples` is (minute, MB), `times` is (minute, seconds a token)."""

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

    async def client(self, session: aiohttp.ClientSession, number: int) -> None:
        """Ask until time is up."""
        draw, next_prompt = random.Random(number), prompts(number)
        while time.monotonic() < self.end:
            self.sent += 1
            length = draw.choice(LENGTHS)
            if self.sent % NONSENSE_EVERY == 0:
                body = {"instances": [next_prompt()], "parameters": {"temperature": "hot"}}
                self.outcomes[f"nonsense {await self.ask(session, body)}"] += 1
            elif self.sent % LEAVE_EVERY == 0:
                await self.leave(session, next_prompt())
            else:
                began = time.perf_counter()
                parameters = {"max_new_tokens": length, "ignore_eos": True}
                body = {"instances": [next_prompt()], "parameters": parameters}
                status = await self.ask(session, body)
                self.outcomes[f"good {status}"] += 1
                self.times.append((self.minute(), (time.perf_counter() - began) / length))

    async def ask(self, session: aiohttp.ClientSession, body: dict) -> str:
        """The status of the reply, or the name of what went wrong."""
        try:
            async with session.post(self.url, json=body) as reply:
                await reply.json()
                return str(reply.status)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return type(error).__name__

    async def leave(self, session: aiohttp.ClientSession, prompt: str) -> None:
        """Hang up on a stream after its first text."""
        parameters = {"max_new_tokens": max(LENGTHS), "ignore_eos": True, "stream": True}
        body = {"instances": [prompt], "parameters": parameters}
        try:
            async with session.post(self.url, json=body) as reply:
                await reply.content.readline()
                self.outcomes[f"left {reply.status}"] += 1
                reply.close()
        except aiohttp.ClientError as error:
            self.outcomes[f"left {type(error).__name__}"] += 1

    async def watch(self, progress: tqdm) -> None:
        """Take a sample of the server's memory every ten seconds."""
        while time.monotonic() < self.end:
            self.samples.append((self.minute(), memory(self.pid) / 1e6))
            progress.n = round(self.minute(), 1)
            progress.refresh()
            await asyncio.sleep(min(10, max(0, self.end - time.monotonic())))

    async def run(self, progress: tqdm) -> None:
        """All clients together, until time is up."""
        timeout = aiohttp.ClientTimeout(total=300)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            clients = (self.client(session, number) for number in range(CLIENTS))
            await asyncio.gather(self.watch(progress), *clients)

    def p99(self, begin: float, minutes: float) -> float:
        """Of the good requests that ended in these minutes: 99th percentile, seconds a token."""
        return percentile([t for m, t in self.times if begin <= m < begin + minutes], 99)

    def figures(self) -> dict:
        """What is written down. Slope in MB a minute, after the warm-up."""
        minutes = self.samples[-1][0]
        warm = min(WARM_UP_MINUTES, minutes / 3)
        after = [(m, mb) for m, mb in self.samples if m >= warm]
        slope = float(np.polyfit(*zip(*after, strict=True), 1)[0])
        third = (minutes - warm) / 3
        pieces = [warm + i * third for i in range(3)]
        slices = [EVERY_MINUTES * i for i in range(int(minutes / EVERY_MINUTES))]
        return {
            "minutes": round(minutes, 1),
            "clients": CLIENTS,
            "cores_used": len(os.sched_getaffinity(0)),  # `taskset` leaves the others to others
            "requests": dict(sorted(self.outcomes.items())),
            "memory_mb_after_warm_up": after[0][1],
            "memory_mb_at_the_end": after[-1][1],
            "memory_mb_a_minute": slope,
            "p99_seconds_a_token_by_third": [self.p99(m, third) for m in pieces],
            "p99_seconds_a_token": [(m, self.p99(m, EVERY_MINUTES)) for m in slices],
            "memory_mb": [(round(m, 2), round(mb, 1)) for m, mb in self.samples],
        }


@command
def main(arguments: list[str] | None) -> None:
    """Run, write results/soak.json, and fail if a reply was not what it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", default="soak", help="name of the result file")
    options = parser.parse_args(arguments)
    with SYSTEMS["ours int8"].start() as (target, pid):
        soak = Soak(target.url, pid, options.minutes)
        with tqdm(total=options.minutes, unit="min") as progress:
            asyncio.run(soak.run(progress))
    figures = soak.figures()
    shown = {name: value for name, value in figures.items() if name != "memory_mb"}
    print(json.dumps(shown, indent=2))
    print(write(options.output, figures, ["torchserve", "openvino", "openvino-genai"]).name)
    if unexpected := set(soak.outcomes) - {"good 200", "nonsense 400", "left 200"}:
        raise UserError(f"unexpected replies: {', '.join(sorted(unexpected))}")


if __name__ == "__main__":
    sys.exit(main())
