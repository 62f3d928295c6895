"""A load generator: many clients, one server, and what each of them saw.

    python -m benchmarks.load http://127.0.0.1:7080/predictions/smollm2-135m --clients 8
    python -m benchmarks.load http://127.0.0.1:8000/v1/completions --model m --rate 2 --stream

Closed loop (`--clients`): each client sends its next request when it has the last reply. Open loop
(`--rate`): requests arrive at random moments, whether the server keeps up or not. Prompts are
distinct and the same in every run of a seed; completions have a fixed length.

Looked at first: guidellm speaks only OpenAI's API and brings `datasets` and a web server; locust
counts requests, where we need tokens and the first of them. aiohttp does the HTTP, whose parser is
compiled: here the clients share two cores with the server.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain

import aiohttp
import numpy as np

from deploy.torchserve.client import parse_event

NEW_TOKENS = 128

_WORDS = (
    "river mountain copper lantern bridge orchard winter engine paper garden village doctor singer "
    "market harbor window forest teacher pepper violin castle blanket rocket island candle mirror"
)


@dataclass(frozen=True)
class Target:
    """Where to ask. With a `model` the API is OpenAI's /v1/completions, else Vertex AI's.

    `extra` goes into every request; `keep_alive` is off for servers that lose a connection's second
    stream.
    """

    url: str
    model: str = ""
    extra: tuple[tuple[str, object], ...] = ()
    keep_alive: bool = True


@dataclass
class Outcome:
    """One request. Times are seconds since it was sent; `first_token` only of streams."""

    seconds: float = 0.0
    first_token: float | None = None
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Report:
    """What all clients saw together. Latencies in seconds, None where there was nothing."""

    requests: int
    errors: dict[str, int]
    seconds: float
    tokens_per_second: float
    latency_p50: float | None
    latency_p95: float | None
    latency_p99: float | None
    first_token_p50: float | None
    first_token_p95: float | None


def prompts(seed: int) -> Callable[[], str]:
    """A source of distinct prompts of 30 to 60 tokens; each call of what it returns gives one."""
    draw, words = random.Random(seed), _WORDS.split()
    number = 0

    def next_prompt() -> str:
        nonlocal number
        number += 1
        some = " ".join(draw.choice(words) for _ in range(draw.randint(20, 45)))
        # The number comes first, so that no two prompts share a prefix a cache could use.
        return f"{seed}.{number}: write a story that uses these words: {some}."

    return next_prompt


def report(outcomes: list[Outcome], seconds: float) -> Report:
    """Sum up. Errors count as requests, but not in the latencies."""
    good = [o for o in outcomes if not o.error]
    latency = [o.seconds for o in good]
    first = [o.first_token for o in good if o.first_token is not None]
    return Report(
        requests=len(outcomes),
        errors=dict(Counter(o.error for o in outcomes if o.error)),
        seconds=seconds,
        tokens_per_second=sum(o.tokens for o in good) / seconds,
        latency_p50=percentile(latency, 50),
        latency_p95=percentile(latency, 95),
        latency_p99=percentile(latency, 99),
        first_token_p50=percentile(first, 50),
        first_token_p95=percentile(first, 95),
    )


def percentile(values: list[float], percent: int) -> float | None:
    """As numpy's, by linear interpolation; None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def closed_loop(
    target: Target,
    *,
    clients: int,
    requests_each: int,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
    stream: bool = False,
    warm_up: int = 1,
) -> Report:
    """`clients` clients send `requests_each` requests each, one after another.

    Args:
        target: the server.
        clients: how many requests are in flight.
        requests_each: how many each client sends and measures.
        seed: another seed gives other prompts.
        new_tokens: length of every completion.
        stream: ask for a stream and time its first text.
        warm_up: requests each client sends before, unmeasured; errors in them are not counted.
    """

    async def run() -> Report:
        async with _session(target) as session:
            ask = _asker(session, target, new_tokens, stream)

            async def client(number: int, requests: int, phase: int) -> list[Outcome]:
                next_prompt = prompts((seed * 2 + phase) * 1000 + number)
                return [await ask(next_prompt()) for _ in range(requests)]

            await asyncio.gather(*(client(i, warm_up, 0) for i in range(clients)))
            began = time.perf_counter()
            each = await asyncio.gather(*(client(i, requests_each, 1) for i in range(clients)))
            return report(list(chain(*each)), time.perf_counter() - began)

    return asyncio.run(run())


def open_loop(
    target: Target,
    *,
    rate: float,
    requests: int,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
    stream: bool = False,
) -> Report:
    """`requests` requests arrive at random, `rate` a second on average (a Poisson process)."""

    async def run() -> Report:
        draw, next_prompt = random.Random(seed), prompts(seed)
        async with _session(target) as session:
            ask = _asker(session, target, new_tokens, stream)
            await ask(prompts(seed + 1)())
            began = due = time.perf_counter()
            tasks = []
            for _ in range(requests):
                due += draw.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(ask(next_prompt())))
            outcomes = await asyncio.gather(*tasks)
            return report(outcomes, time.perf_counter() - began)

    return asyncio.run(run())


def _session(target: Target) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=not target.keep_alive),
        timeout=aiohttp.ClientTimeout(total=1800),
    )


def _asker(session: aiohttp.ClientSession, target: Target, new_tokens: int, stream: bool):  # noqa: ANN202
    """`await ask(prompt)` -> Outcome, never an exception."""

    async def ask(prompt: str) -> Outcome:
        outcome = Outcome()
        began = time.perf_counter()
        try:
            async with session.post(
                target.url, json=_body(target, prompt, new_tokens, stream)
            ) as r:
                if r.status != 200:
                    await r.read()
                    outcome.error = f"status {r.status}"
                elif stream:
                    await _read_stream(r, outcome, began)
                else:
                    outcome.tokens = _count(await r.json(content_type=None), r.headers)
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
            outcome.error = type(error).__name__
        outcome.seconds = time.perf_counter() - began
        if not outcome.error and outcome.tokens != new_tokens:
            outcome.error = f"{outcome.tokens} tokens instead of {new_tokens}"
        return outcome

    return ask


def _body(target: Target, prompt: str, new_tokens: int, stream: bool) -> dict:
    fixed = {"temperature": 0, "ignore_eos": True, "stream": stream}
    if not target.model:
        parameters = {"max_new_tokens": new_tokens, "return_full_text": False} | fixed
        return {"instances": [prompt], "parameters": parameters} | dict(target.extra)
    body = {"model": target.model, "prompt": prompt, "max_tokens": new_tokens} | fixed
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return body | options | dict(target.extra)


def _count(body: dict, headers: dict) -> int:
    if "usage" in body:
        return body["usage"]["completion_tokens"]
    return sum(int(n) for n in headers["x-completion-tokens"].split(","))


async def _read_stream(reply: aiohttp.ClientResponse, outcome: Outcome, began: float) -> None:
    """Server-sent events, ours or OpenAI's: when the first text came, and the token count."""
    async for line in reply.content:
        event = parse_event(line)
        if event is None:
            continue
        text = event.get("text") or any(c.get("text") for c in event.get("choices") or [])
        if text and outcome.first_token is None:
            outcome.first_token = time.perf_counter() - began
        if event.get("usage"):
            outcome.tokens = event["usage"]["completion_tokens"]
        elif "completion_tokens" in event:
            outcome.tokens += event["completion_tokens"]


def main() -> None:
    """The command line; prints the report as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="load a server")
    parser.add_argument("url")
    parser.add_argument("--model", default="", help="speak OpenAI's API, and ask for this model")
    parser.add_argument("--clients", type=int, default=1, help="closed loop")
    parser.add_argument("--requests", type=int, default=4, help="of each client; of all at a rate")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    target = Target(options.url, options.model)
    common = {
        "seed": options.seed,
        "new_tokens": options.new_tokens,
        "stream": options.stream,
    }
    if options.rate:
        result = open_loop(target, rate=options.rate, requests=options.requests, **common)
    else:
        result = closed_loop(
            target, clients=options.clients, requests_each=options.requests, **common
        )
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    main()
