"""A load generator: many clients, one server, and the latencies that each client measures.

    python -m benchmarks.load http://127.0.0.1:7080/predictions/smollm2-135m --clients 8
    python -m benchmarks.load http://127.0.0.1:8000/v1/completions --model m --rate 2 --stream

Closed loop (`--clients`): each client sends its next request when it has the last response. Open
loop (`--rate`): requests arrive at random moments, whether the server keeps up or not. Prompts are
distinct and the same in every run of a seed; completions have a fixed length.

Alternatives: guidellm speaks only OpenAI's API and depends on `datasets` and a web server; locust
counts requests, but we need tokens and the time to the first. aiohttp has a compiled HTTP parser,
which matters because the clients share two cores with the server.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer

from deploy.common import cli
from deploy.common.paths import UserError
from deploy.torchserve.client import parse_event

NEW_TOKENS = 128

_NAMES = (
    "river mountain copper lantern bridge orchard winter engine paper garden village doctor singer "
    "market harbor window forest teacher pepper violin castle blanket rocket island candle mirror"
)
WORDS = tuple(_NAMES.split())
"""Each is one token after a space, for SmolLM2's tokenizer."""


@dataclass(frozen=True)
class Target:
    """Where to send requests. With a `model` the API is OpenAI's, else Vertex AI's.

    `url` takes prompts and `chat_url` takes chats, which only OpenAI's API does here. `extra` goes
    into every body; `keep_alive` is off for servers that lose a connection's second stream.
    """

    url: str
    model: str = ""
    extra: tuple[tuple[str, object], ...] = ()
    keep_alive: bool = True
    chat_url: str = ""


def openai_target(base_url: str, model: str, *, keep_alive: bool = True) -> Target:
    """Address both routes of OpenAI's API below a base URL that ends with `/v1`."""
    url, chat_url = f"{base_url}/completions", f"{base_url}/chat/completions"
    return Target(url, model, keep_alive=keep_alive, chat_url=chat_url)


Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """A prompt or the messages of a chat, and the length of its completion."""

    content: str | Messages
    new_tokens: int


Client = Generator[Request, str, None]
"""What one client sends. It receives each completion, so the next request can contain it."""


@dataclass
class Outcome:
    """One request. Times are seconds since it was sent; `first_token` and `text` only of streams.

    `prompt_tokens` is 0 if the server does not report it.
    """

    seconds: float = 0.0
    first_token: float | None = None
    tokens: int = 0
    error: str = ""
    prompt_tokens: int = 0
    text: str = ""


@dataclass(frozen=True)
class Report:
    """Measurements of all clients together. Latencies in seconds; None without a measurement."""

    requests: int
    errors: dict[str, int]
    seconds: float
    tokens_per_second: float
    latency_p50: float | None
    latency_p95: float | None
    latency_p99: float | None
    first_token_p50: float | None
    first_token_p95: float | None
    prompt_tokens: float
    """Mean of the requests."""


def prompts(seed: int) -> Callable[[], str]:
    """Make a source of distinct prompts of 30 to 60 tokens; each call of it returns one."""
    draw = random.Random(seed)
    prompt_index = 0

    def next_prompt() -> str:
        nonlocal prompt_index
        prompt_index += 1
        some = " ".join(draw.choice(WORDS) for _ in range(draw.randint(20, 45)))
        # The index comes first, so that no two prompts share a prefix a cache could use.
        return f"{seed}.{prompt_index}: write a story that uses these words: {some}."

    return next_prompt


def report(outcomes: list[Outcome], seconds: float) -> Report:
    """Sum up outcomes. Errors count as requests, but not in the latencies."""
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
        prompt_tokens=sum(o.prompt_tokens for o in good) / len(good) if good else 0.0,
    )


def checked(result: Report, what: str = "the load") -> Report:
    """Return a report if no request failed.

    Raises:
        UserError: requests failed; the message counts the errors.
    """
    if result.errors:
        raise UserError(f"{what}: requests failed: {result.errors}; nothing was kept")
    return result


def percentile(values: list[float], percent: int) -> float | None:
    """Interpolate linearly, as numpy does; None without values."""
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
    """Let `clients` clients send `requests_each` requests each, one after another.

    Args:
        target: the server.
        clients: how many requests are in flight.
        requests_each: how many each client sends and measures.
        seed: another seed gives other prompts.
        new_tokens: length of every completion.
        stream: stream each completion and time its first text.
        warm_up: requests each client sends before, unmeasured; errors in them are not counted.
    """

    def client(index: int, requests: int, phase: int) -> Client:
        next_prompt = prompts((seed * 2 + phase) * 1000 + index)
        for _ in range(requests):
            yield Request(next_prompt(), new_tokens)

    everyone = range(clients)
    if warm_up:
        run_clients(target, [client(i, warm_up, 0) for i in everyone], stream=stream)
    return run_clients(target, [client(i, requests_each, 1) for i in everyone], stream=stream)


def run_clients(target: Target, clients: Sequence[Client], *, stream: bool = True) -> Report:
    """Let each client send its requests one after another, all clients at once."""

    async def run() -> Report:
        async with _session(target) as session:
            send = _sender(session, target, stream)

            async def run_client(client: Client) -> list[Outcome]:
                outcomes = []
                request = next(client, None)
                while request is not None:
                    outcomes.append(await send(request))
                    try:
                        request = client.send(outcomes[-1].text)
                    except StopIteration:
                        request = None
                return outcomes

            began = time.perf_counter()
            each = await asyncio.gather(*map(run_client, clients))
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
    """Send `requests` requests at random moments, `rate` a second on average (Poisson process)."""
    draw, next_prompt = random.Random(seed), prompts(seed)
    waits = [draw.expovariate(rate) for _ in range(requests)]
    run_clients(target, [_only(Request(prompts(seed + 1)(), new_tokens))], stream=stream)
    arrivals = ((due, Request(next_prompt(), new_tokens)) for due in accumulate(waits))
    return run_arrivals(target, arrivals, stream=stream)


def _only(request: Request) -> Client:
    yield request


def run_arrivals(
    target: Target, arrivals: Iterable[tuple[float, Request]], *, stream: bool = True
) -> Report:
    """Send each request at its time, in seconds from now, without waiting for responses."""

    async def run() -> Report:
        async with _session(target) as session:
            send = _sender(session, target, stream)
            began = time.perf_counter()
            tasks: list[asyncio.Task[Outcome]] = []
            for due, request in arrivals:
                await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
                tasks.append(asyncio.create_task(send(request)))
            outcomes = await asyncio.gather(*tasks)
            return report(outcomes, time.perf_counter() - began)

    return asyncio.run(run())


def _session(target: Target) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=not target.keep_alive),
        timeout=aiohttp.ClientTimeout(total=1800),
    )


def _sender(
    session: aiohttp.ClientSession, target: Target, stream: bool
) -> Callable[[Request], Coroutine[None, None, Outcome]]:
    """Make a function that sends a request and returns the outcome, without raising."""

    async def send(request: Request) -> Outcome:
        outcome = Outcome()
        url = target.url if isinstance(request.content, str) else target.chat_url
        began = time.perf_counter()
        try:
            async with session.post(url, json=_body(target, request, stream)) as r:
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
        if not outcome.error and outcome.tokens != request.new_tokens:
            outcome.error = f"{outcome.tokens} tokens instead of {request.new_tokens}"
        return outcome

    return send


def _body(target: Target, request: Request, stream: bool) -> dict:
    content, new_tokens = request.content, request.new_tokens
    fixed = {"temperature": 0, "ignore_eos": True, "stream": stream}
    if not target.model:
        parameters = {"max_new_tokens": new_tokens, "return_full_text": False} | fixed
        return {"instances": [content], "parameters": parameters} | dict(target.extra)
    kind = "prompt" if isinstance(content, str) else "messages"
    body = {"model": target.model, kind: content, "max_tokens": new_tokens} | fixed
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return body | options | dict(target.extra)


def _count(body: dict[str, Any], headers: Mapping[str, str]) -> int:
    if "usage" in body:
        return int(body["usage"]["completion_tokens"])
    return sum(int(n) for n in headers["x-completion-tokens"].split(","))


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, began: float) -> None:
    """Note when the first text came, and the token count; from our events or OpenAI's."""
    async for line in response.content:
        event = parse_event(line)
        if event is None:
            continue
        choice = next(iter(event.get("choices") or []), event)
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if text and outcome.first_token is None:
            outcome.first_token = time.perf_counter() - began
        outcome.text += text
        if usage := event.get("usage"):
            outcome.tokens = usage["completion_tokens"]
            outcome.prompt_tokens = usage.get("prompt_tokens", 0)
        elif "completion_tokens" in event:
            outcome.tokens += event["completion_tokens"]


app = cli.app(__doc__)


@app.command()
def main(
    url: str,
    model: Annotated[str, typer.Option(help="Use OpenAI's API with this model.")] = "",
    clients: Annotated[int, typer.Option(help="Closed loop: clients.")] = 1,
    requests: Annotated[int, typer.Option(help="Of each client; of all with --rate.")] = 4,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of every completion.")] = NEW_TOKENS,
    stream: Annotated[bool, typer.Option("--stream", help="Stream the completions.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed gives other prompts.")] = 0,
) -> None:
    """Load a server and print the report as JSON."""
    target = Target(url, model)
    if rate:
        result = open_loop(
            target, rate=rate, requests=requests, seed=seed, new_tokens=new_tokens, stream=stream
        )
    else:
        result = closed_loop(
            target,
            clients=clients,
            requests_each=requests,
            seed=seed,
            new_tokens=new_tokens,
            stream=stream,
        )
    print(json.dumps(asdict(result), indent=2))


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.load"))
