"""Half an hour of load with faults: 16 clients, mixed lengths, some leave, some send nonsense.

    python -m benchmarks.soak                              # 30 minutes, a fault each minute
    python -m benchmarks.soak --minutes 60 --faults gentle
    python -m benchmarks.soak --minutes 3 --every 12       # every fault in three minutes
    python -m benchmarks.soak --faults none

Every 10th client leaves: one a stream after its first text, the next a plain request. Every 100th
request is not valid. `make serve` runs as on a platform: when it ends, it is started again.

Faults that replace a process happen once each, at the end; with `--faults gentle` they do not.
The memory's slope and the thirds are of the time before them, when all processes were the same.

We aim at an answer for each request, at most 30 s until the server answers again after a fault, and
memory that does not grow after the warm-up. An answer is a response; while a fault lasts, a closed
connection is one too and is counted separately. The run fails after any other outcome.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, groupby, islice
from typing import Annotated, Any, NamedTuple

import aiohttp
import click
import numpy as np
import psutil
import typer
from tqdm import tqdm

from benchmarks.faults import FATAL, GENTLE, Fault, Victim, post
from benchmarks.load import percentile, prompts
from benchmarks.record import memory, write
from deploy.common import cli
from deploy.common.paths import BUILD, ROOT, UserError, shown

APP = "smollm2-135m"
PORT = 7300
CLIENTS = 16
LENGTHS = (8, 16, 32, 64, 128, 256)
EVERY_MINUTES = 2
LEAVE_EVERY, INVALID_EVERY = 10, 100
ANSWER_SECONDS = 180
"""Later than the server's own deadline (`limits.seconds`): then there is no answer."""

PROBE_SECONDS = 10
GIVE_UP_SECONDS = 300
"""From a fault to an end of the run without a server that answers."""

SETTLE_SECONDS = 5
"""After the server answers again: connections of before may still be found closed."""

FAULTS = {fault.__name__.replace("_", "-"): fault for fault in (*GENTLE, *FATAL)}
KINDS: dict[str, tuple[Fault, ...]] = {"all": (*GENTLE, *FATAL), "gentle": GENTLE, "none": ()}

PARTS = ("worker", "frontend", "others")
"""Of the server's memory. The others are `make serve` and the guard that ends Java with it."""

EXPECTED = re.compile(
    r"valid (200|429)|invalid (400|429)|left plain|left stream 200|long prompt (200|429|504)"
    r"|(valid|invalid|left stream|long prompt) (\d+|closed) in a fault"
)


class Platform:
    """`make serve`, started again when it ends, as a platform does with a container."""

    def __init__(self, app: str = APP, port: int = PORT) -> None:
        self._command = [sys.executable, "-m", "deploy.torchserve", "serve", app]
        self._command += ["--port", str(port)]
        self.url = f"http://127.0.0.1:{port}/predictions/{app}"
        self.log = BUILD / f"soak-{port}.log"
        self.codes: list[int] = []
        self._process = self._start()

    def pid(self) -> int:
        """Return the process that runs now."""
        return self._process.pid

    def replace_if_ended(self) -> None:
        """Start the server again if it has ended; note the code."""
        code = self._process.poll()
        if code is not None:
            self.codes.append(code)
            self._process = self._start()

    def stop(self) -> None:
        """Stop the server."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _start(self) -> subprocess.Popen:
        BUILD.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)


def plan(faults: Sequence[Fault], count: int) -> list[Fault]:
    """Return `count` faults: those that keep the processes in turn, then the others once each."""
    gentle = [fault for fault in faults if fault in GENTLE]
    fatal = [fault for fault in faults if fault not in GENTLE]
    if not gentle or not fatal:
        return list(islice(cycle(faults), count))
    return [*islice(cycle(gentle), max(0, count - len(fatal))), *fatal[:count]]


class Sample(NamedTuple):
    """The server's memory at a moment."""

    minute: float
    megabytes: tuple[float, ...]
    """Of each of `PARTS`."""
    processes: tuple[int, ...]
    """Frontend and worker: another worker begins with other memory."""


def sample(victim: Victim, minute: float) -> Sample:
    """Read the server's memory (PSS).

    Raises:
        psutil.Error, LookupError: a process has ended.
    """
    frontend, worker = victim.frontend().pid, victim.worker().pid
    own = psutil.Process(worker).memory_full_info().pss
    java = psutil.Process(frontend).memory_full_info().pss
    others = memory(victim.root()) - own - java
    return Sample(minute, (own / 1e6, java / 1e6, others / 1e6), (frontend, worker))


def slope(minutes: Sequence[float], megabytes: Sequence[float]) -> float | None:
    """Return the slope of a straight line through the memory, in MB a minute."""
    return float(np.polyfit(minutes, megabytes, 1)[0]) if len(minutes) > 1 else None


def longest_gap(moments: list[float]) -> float:
    """Return the longest time between two moments that follow each other."""
    return round(float(max(np.diff(moments))), 1)


class Soak:
    """The run so far.

    Args:
        victim: the server.
        minutes: the length of the run.
        faults: what happens to it, in this order, as often as there is time.
        every: seconds between two faults.
        platform: replaces the server when it ends; None if nobody does.
    """

    def __init__(
        self,
        victim: Victim,
        minutes: float,
        *,
        faults: Sequence[Fault] = (),
        every: float = 60,
        platform: Platform | None = None,
    ) -> None:
        self.victim, self.faults, self.every, self.platform = victim, faults, every, platform
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        self.sent = 0
        self.disturbed = False
        self.outcomes: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.times: list[tuple[float, float]] = []
        """Minute, and seconds a token."""
        self.happened: list[dict[str, Any]] = []
        self._answered: list[tuple[float, float, int]] = []  # probes: sent, received, status

    def minute(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.began) / 60

    def count(self, outcome: str) -> None:
        """Count a request; what ends in a fault is counted separately."""
        self.outcomes[f"{outcome} in a fault" if self.disturbed else outcome] += 1

    async def client(self, session: aiohttp.ClientSession, client_index: int) -> None:
        """Send requests until time is up."""
        draw, next_prompt = random.Random(client_index), prompts(client_index)
        while time.monotonic() < self.end:
            self.sent += 1
            number, length = self.sent, draw.choice(LENGTHS)
            parameters: dict[str, Any] = {"max_new_tokens": length, "ignore_eos": True}
            body = {"instances": [next_prompt()], "parameters": parameters}
            if number % INVALID_EVERY == 0:
                parameters["temperature"] = "hot"
                status = await post(session, self.victim.url, body)
                self.settle(f"invalid {status}", {"400"}, status)
            elif number % LEAVE_EVERY == 0:
                parameters["max_new_tokens"] = max(LENGTHS)
                if number // LEAVE_EVERY % 2:
                    status = await self.leave_stream(session, body)
                else:
                    await self.leave_plain(session, body, draw.uniform(0.1, 2))
                    status = "left"
            else:
                began, undisturbed = time.perf_counter(), not self.disturbed
                status = await post(session, self.victim.url, body)
                self.settle(f"valid {status}", {"200"}, status)
                if status == "200" and undisturbed and not self.disturbed:
                    self.times.append((self.minute(), (time.perf_counter() - began) / length))
            if not status.startswith(("2", "left")):
                await asyncio.sleep(0.5)

    def settle(self, outcome: str, usual: set[str], status: str) -> None:
        """Count a response: the usual one needs no excuse."""
        if status in usual or status == "no answer":
            self.outcomes[outcome] += 1
        else:
            self.count(outcome)

    async def leave_stream(self, session: aiohttp.ClientSession, body: dict) -> str:
        """Leave a stream after its first text."""
        body["parameters"]["stream"] = True
        status = "closed"
        try:
            async with session.post(self.victim.url, json=body) as response:
                status = str(response.status)
                await response.content.readline()
                response.close()
        except TimeoutError:
            status = "no answer"
        except aiohttp.ClientError:
            status = "closed"
        self.settle(f"left stream {status}", {"200"}, status)
        return status

    async def leave_plain(self, session: aiohttp.ClientSession, body: dict, seconds: float) -> None:
        """Leave a plain request after some seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(post(session, self.victim.url, body), seconds)
        self.outcomes["left plain"] += 1

    async def probe(self, session: aiohttp.ClientSession) -> None:
        """Ask for two tokens twice a second, and note when they come."""
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        body = {"instances": ["Paris is"], "parameters": {"max_new_tokens": 2}}
        while True:
            sent = time.monotonic()
            with suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(self.victim.url, json=body, timeout=timeout) as response:
                    await response.read()
                    self._answered.append((sent, time.monotonic(), response.status))
            await asyncio.sleep(0.5)

    async def answering(self, since: float) -> None:
        """Wait until a probe that was sent after a moment has its two tokens.

        Raises:
            UserError: there is none for a long time.
        """
        while not any(s > since and status == 200 for s, _, status in self._answered[-5:]):
            if time.monotonic() - since > GIVE_UP_SECONDS:
                raise UserError(f"the server did not answer within {GIVE_UP_SECONDS} s")
            await asyncio.sleep(0.1)

    async def inject(self) -> None:
        """Let one fault happen after another, and note how long nobody was answered."""
        count = int((self.end - self.began) / self.every)
        for number, fault in enumerate(plan(self.faults, count)):
            due = self.began + (number + 0.5) * self.every
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if time.monotonic() < self.end:
                await self.happen(fault)

    async def happen(self, fault: Fault) -> None:
        """Let a fault happen, and wait until the server answers again."""
        began, minute = time.monotonic(), self.minute()
        codes = len(self.platform.codes) if self.platform else 0
        self.disturbed = True
        try:
            self.outcomes.update(await fault(self.victim) or {})
            await self.answering(time.monotonic())
            answered = [(end, status) for _, end, status in self._answered if end > began]
            await asyncio.sleep(SETTLE_SECONDS)
        finally:
            self.disturbed = False
        name = next(name for name, known in FAULTS.items() if known is fault)
        ended = self.platform.codes[codes:] if self.platform else []
        good = [end for end, status in answered if status == 200]
        self.happened.append(
            {
                "fault": name,
                "minute": round(minute, 1),
                "seconds_without_a_response": longest_gap([began, *(end for end, _ in answered)]),
                "seconds_without_200": longest_gap([began, *good]),
                "ended": ended,
            }
        )

    async def watch(self, progress: tqdm) -> None:
        """Sample the server's memory every ten seconds, and replace the server when it ends."""
        due = 0.0
        while time.monotonic() < self.end or self.disturbed:
            if self.platform:
                self.platform.replace_if_ended()
            if time.monotonic() >= due:
                due = time.monotonic() + 10
                with suppress(psutil.Error, LookupError):
                    self.samples.append(sample(self.victim, self.minute()))
                progress.n = round(self.minute(), 1)
                progress.refresh()
            await asyncio.sleep(0.2)

    async def run(self, progress: tqdm) -> None:
        """Run all clients together, until time is up."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            probe = asyncio.create_task(self.probe(session))
            try:
                await self.answering(time.monotonic())
                self.end += time.monotonic() - self.began
                self.began = time.monotonic()
                clients = (self.client(session, i) for i in range(CLIENTS))
                await asyncio.gather(self.watch(progress), self.inject(), *clients)
            finally:
                probe.cancel()

    def unexpected(self) -> list[str]:
        """Return the outcomes that are neither an answer nor excused by a fault."""
        return sorted(outcome for outcome in self.outcomes if not EXPECTED.fullmatch(outcome))

    def p99(self, begin: float, minutes: float) -> float | None:
        """99th percentile, in seconds a token, of undisturbed requests that ended then."""
        return percentile([t for m, t in self.times if begin <= m < begin + minutes], 99)

    def measurements(self) -> dict[str, Any]:
        """Sum up the run.

        Memory and thirds are of the longest time with the same processes. The memory's slope, in MB
        a minute, is that of its second half; the first half is the warm-up.
        """
        runs = [list(run) for _, run in groupby(self.samples, key=lambda found: found.processes)]
        longest = max(runs, key=len)
        first, last = longest[0].minute, longest[-1].minute
        after = [found for found in longest if found.minute >= (first + last) / 2]
        minutes = [found.minute for found in after]
        parts = dict(
            zip(PARTS, zip(*(found.megabytes for found in after), strict=True), strict=True)
        )
        third = (last - first) / 3
        slices = [EVERY_MINUTES * i for i in range(int(self.samples[-1].minute / EVERY_MINUTES))]
        times = [(m, p99) for m in slices if (p99 := self.p99(m, EVERY_MINUTES)) is not None]
        return {
            "minutes": round(self.samples[-1].minute, 1),
            "clients": CLIENTS,
            "cores_used": len(os.sched_getaffinity(0)),  # fewer under `taskset`
            "requests": dict(sorted(self.outcomes.items())),
            "faults": self.happened,
            "memory_mb_after_warm_up": sum(after[0].megabytes),
            "memory_mb_at_the_end": sum(after[-1].megabytes),
            "memory_minutes": round(minutes[-1] - minutes[0], 1),
            "memory_mb_a_minute": slope(minutes, [sum(found.megabytes) for found in after]),
            "memory_mb_a_minute_by_part": {
                part: slope(minutes, megabytes) for part, megabytes in parts.items()
            },
            "p99_seconds_a_token_by_third": [self.p99(first + i * third, third) for i in range(3)],
            "p99_seconds_a_token": times,
            "memory_mb": [(round(m, 2), round(sum(mb), 1)) for m, mb, _ in self.samples],
            "memory_mb_by_part": {
                part: [(round(m, 2), round(mb[i], 1)) for m, mb, _ in self.samples]
                for i, part in enumerate(PARTS)
            },
        }


app = cli.app(__doc__)


@app.command()
def main(
    minutes: float = 30,
    every: Annotated[float, typer.Option(help="Seconds between two faults.")] = 60,
    faults: Annotated[
        str,
        typer.Option(click_type=click.Choice(list(KINDS)), help="gentle: all processes stay."),
    ] = "all",
    fault: Annotated[
        list[str] | None,
        typer.Option(click_type=click.Choice(list(FAULTS)), help="Only this one; repeat it."),
    ] = None,
    port: cli.Port = PORT,
    output: Annotated[str, typer.Option(help="Name of the result file.")] = "soak",
) -> None:
    """Run, write results/soak.json, and fail after an unexpected outcome."""
    platform = Platform(port=port)
    try:
        happens = [FAULTS[name] for name in fault] if fault else KINDS[faults]
        victim = Victim(platform.url, platform.pid)
        soak = Soak(victim, minutes, faults=happens, every=every, platform=platform)
        with tqdm(total=minutes, unit="min") as progress:
            asyncio.run(soak.run(progress))
    finally:
        platform.stop()
    measured = soak.measurements()
    series = ("memory_mb", "memory_mb_by_part")
    print(json.dumps({k: v for k, v in measured.items() if k not in series}, indent=2))
    print(write(output, measured, ["torchserve", "openvino", "openvino-genai"]).name)
    if unexpected := soak.unexpected():
        raise UserError(
            f"unexpected outcomes: {', '.join(unexpected)}; the log is {shown(platform.log)}"
        )


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.soak"))
