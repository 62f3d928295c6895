"""The shapes of traffic that `make bench` sends: what the clients of each send, and how many.

All requests are streamed, greedy, and have completions of a fixed length. Prompts differ between
rounds, numbers of clients, clients and requests from their first tokens on, so no cache helps. The
exception is `chat`, where a system prompt and a growing history repeat on purpose. A round's system
prompt is in the server's cache when the first conversation begins, as in a service that runs.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.load import (
    WORDS,
    Client,
    Messages,
    Report,
    Request,
    Target,
    run_arrivals,
    run_clients,
)

_NUMBER = 6
"""Digits, each one token, at the beginning of a prompt. They make it distinct."""

SYSTEM_WORDS = 350
QUESTION_WORDS = 20

MIXED_PROMPTS = (30, 60, 120, 250, 500, 1000)
MIXED_COMPLETIONS = (16, 32, 48, 96)
"""Tokens. Each occurs equally often in a measurement, in random order."""

BURSTS = (1, 1, 2, 8)
"""Requests that arrive together; each occurs equally often, in random order."""

BURSTS_PER_SECOND = 1.0
BURST_COUNT = 12


def text(draw: random.Random, tokens: int) -> str:
    """Make a prompt with this number of SmolLM2's tokens, distinct from the first tokens on."""
    number = f"{draw.randrange(10**_NUMBER):0{_NUMBER}d}"
    return " ".join([number, *draw.choices(WORDS, k=tokens - _NUMBER)])


def prompts(draw: random.Random, tokens: int, requests: int, new_tokens: int) -> Client:
    """Send distinct prompts of one length."""
    for _ in range(requests):
        yield Request(text(draw, tokens), new_tokens)


def conversation(draw: random.Random, system: str, turns: int, new_tokens: int) -> Client:
    """Hold a conversation: each request has the turns before it, completions included."""
    history: Messages = [{"role": "system", "content": system}]
    for _ in range(turns):
        question = text(draw, QUESTION_WORDS + _NUMBER)
        history.append({"role": "user", "content": question})
        completion = yield Request(list(history), new_tokens)
        # A completion can be only special tokens, and servers reject an empty message.
        history.append({"role": "assistant", "content": completion or "..."})


def system_prompt(seed: int) -> str:
    """Make the system prompt that all conversations of a round share."""
    return text(random.Random(f"system {seed}"), SYSTEM_WORDS + _NUMBER)


@dataclass(frozen=True)
class Load:
    """One measurement of a shape.

    `clients` is 0 if requests arrive at their own times. `context` is the most tokens that a
    sequence can have, for servers that reserve memory for each.
    """

    shape: str
    what: str
    clients: int
    requests: int
    send: Callable[[Target, int], Report]
    context: int = 2048

    @property
    def name(self) -> str:
        """The key of result files, such as `chat, 4 clients`."""
        return f"{self.shape}, {self.clients} clients" if self.clients else self.shape

    @property
    def slots(self) -> int:
        """How many sequences a server should hold at once, if it has to know before."""
        return self.clients or max(BURSTS)


def _draw(*key: int | str) -> random.Random:
    """Make a source of random numbers that differs for each key."""
    return random.Random(" ".join(map(str, key)))


def _prompts(shape: str, what: str, tokens: int, clients: int, each: int, new: int) -> Load:
    def send(target: Target, seed: int) -> Report:
        sources = (_draw(shape, clients, seed, index) for index in range(clients))
        return run_clients(target, [prompts(source, tokens, each, new) for source in sources])

    return Load(shape, what, clients, clients * each, send)


def _chat(clients: int, conversations: int, turns: int) -> Load:
    def client(seed: int, index: int) -> Client:
        draw = _draw("chat", clients, seed, index)
        for _ in range(conversations):
            yield from conversation(draw, system_prompt(seed), turns, 48)

    def send(target: Target, seed: int) -> Report:
        return run_clients(target, [client(seed, index) for index in range(clients)])

    what = f"chat, system prompt of {SYSTEM_WORDS} words, {turns} turns"
    return Load("chat", what, clients, clients * conversations * turns, send)


def mixed_requests(seed: int, clients: int, each: int) -> list[list[Request]]:
    """Deal prompts and completions of mixed lengths to the clients."""
    draw, count = _draw("mixed", clients, seed), clients * each

    def deal(lengths: tuple[int, ...]) -> list[int]:
        deck = [lengths[i % len(lengths)] for i in range(count)]
        draw.shuffle(deck)
        return deck

    dealt = zip(deal(MIXED_PROMPTS), deal(MIXED_COMPLETIONS), strict=True)
    requests = [Request(text(draw, prompt), new_tokens) for prompt, new_tokens in dealt]
    return [requests[i * each : (i + 1) * each] for i in range(clients)]


def _mixed(clients: int, each: int) -> Load:
    def client(requests: list[Request]) -> Client:
        # `yield from` a list would not accept the completions.
        for request in requests:  # noqa: UP028
            yield request

    def send(target: Target, seed: int) -> Report:
        return run_clients(target, [client(r) for r in mixed_requests(seed, clients, each)])

    what = (
        f"prompts of {min(MIXED_PROMPTS)} to {max(MIXED_PROMPTS):,} tokens, "
        f"completions of {min(MIXED_COMPLETIONS)} to {max(MIXED_COMPLETIONS)}"
    )
    return Load("mixed", what, clients, clients * each, send)


def arrivals(seed: int) -> Iterator[tuple[float, Request]]:
    """Draw bursts of requests at random moments (Poisson process), with their times in seconds."""
    draw = _draw("burst", seed)
    sizes = [BURSTS[i % len(BURSTS)] for i in range(BURST_COUNT)]
    draw.shuffle(sizes)
    times = accumulate(draw.expovariate(BURSTS_PER_SECOND) for _ in sizes)
    for due, size in zip(times, sizes, strict=True):
        for _ in range(size):
            yield due, Request(text(draw, 30 + _NUMBER), 48)


def _burst() -> Load:
    mean = sum(BURSTS) / len(BURSTS)
    what = (
        f"open loop, {BURSTS_PER_SECOND * mean:g} requests of 30 words a second on average, "
        f"in bursts of up to {max(BURSTS)}"
    )

    def send(target: Target, seed: int) -> Report:
        return run_arrivals(target, arrivals(seed))

    return Load("burst", what, 0, round(BURST_COUNT * mean), send)


def warm_up(target: Target, seed: int, clients: int) -> Report:
    """Send short and long prompts, and a chat with the round's system prompt."""
    draw = _draw("warm-up", clients, seed)
    sources = [prompts(draw, 30 + 200 * (i % 4), 1, 16) for i in range(clients)]
    return run_clients(target, [*sources, conversation(draw, system_prompt(seed), 1, 16)])


LOADS = {
    load.name: load
    for load in (
        _prompts("short", "prompts of 30 words", 30 + _NUMBER, 1, 10, 64),
        _prompts("short", "prompts of 30 words", 30 + _NUMBER, 8, 6, 64),
        _prompts("short", "prompts of 30 words", 30 + _NUMBER, 32, 2, 64),
        _chat(1, conversations=2, turns=5),
        _chat(4, conversations=1, turns=5),
        _chat(16, conversations=1, turns=5),
        _prompts("long 300", "prompts of 300 tokens", 300, 1, 8, 48),
        _prompts("long 300", "prompts of 300 tokens", 300, 8, 3, 48),
        _prompts("long 900", "prompts of 900 tokens", 900, 1, 5, 48),
        _prompts("long 900", "prompts of 900 tokens", 900, 8, 2, 48),
        _prompts("long 1800", "prompts of 1,800 tokens", 1800, 1, 4, 48),
        _prompts("long 1800", "prompts of 1,800 tokens", 1800, 8, 2, 48),
        _mixed(8, each=3),
        _burst(),
    )
}
"""Name of a measurement -> the measurement, in the order of the tables.

The numbers of requests make each one last 5 to 15 seconds on two cores, longer for a slow server.
"""
