"""From traffic to replicas and cost: the arithmetic behind chapter 07's calculator.

A replica is described by what was measured on it: tokens per second at several numbers of clients
that always wait for an answer (`benchmarks.load`), and tokens per second of the prefill
(`benchmarks.roofline`). All else follows:

    seconds of one replica for one request, n of them in flight
        s(n) = prompt / prefill rate + completion * d(n)
        d(n) = 1 / curve(n) - measured prompt / measured completion / prefill rate
               + context seconds * (context - measured context)
        context = prompt + completion / 2, which is what a token looks back on, on average
    requests per second that a replica carries    r(n) = 1 / s(n), a straight line between two n
    replicas                                      ceil(all requests per second / utilization / most)
        most is the greatest r(n): a full replica
    requests per second of each                   q = all requests per second / replicas
    chance that n are in flight in it             p(n) = p(n - 1) * q / r(n)
    in flight in it                               the sum of n * p(n)
    latency, Little's law                         in flight / q

The chances are those of requests that come at random, independently of each other, and share the
replica (a processor-sharing queue whose speed depends on how many share it). Then only the means of
the lengths matter, not how they are spread. Source: Cohen, The multiple phase service network with
generalized processor sharing, 1979. Where more wait than a replica takes in, this is approximate.

Not here: bunches that are worse than chance; a slow tenth of the requests (these are means);
following the traffic up and down (`deploy/vertex/autoscaling.py`); prices: the reader gives them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from deploy.common.paths import UserError

UTILIZATION = 0.6
"""How full a replica may be on average. Source: Vertex AI's default target for autoscaling."""


@dataclass(frozen=True)
class Replica:
    """What was measured on one replica.

    Args:
        curve: clients that always wait for an answer -> completion tokens per second of them all.
        prefill_tokens_per_second: how fast it reads prompts.
        prompt_tokens: mean prompt of the curve's requests. 0 leaves the prefill in the curve: then
            plan for traffic with prompts of 0 tokens and mean the measured ones.
        completion_tokens: mean completion of the curve's requests.
        context_seconds: what one more token of context adds to the time of a token that is written:
            `kv_bytes_per_token` / bytes per second of the memory. 0 leaves it out.
        cache_tokens: tokens of all requests together that the KV cache holds.
    """

    curve: Mapping[int, float]
    prefill_tokens_per_second: float
    prompt_tokens: float
    completion_tokens: float
    context_seconds: float = 0.0
    cache_tokens: float = math.inf

    def __post_init__(self) -> None:
        if not isinstance(self.curve, Mapping) or not self.curve:
            raise UserError(
                f"curve: should be clients -> tokens per second, at least one, not {self.curve!r}"
            )
        for clients, rate in self.curve.items():
            _check("curve, clients", clients, least=1)
            _check(f"curve[{clients}]", rate)
        _check("prefill_tokens_per_second", self.prefill_tokens_per_second)
        _check("prompt_tokens", self.prompt_tokens, zero=True)
        _check("completion_tokens", self.completion_tokens, least=1)
        _check("context_seconds", self.context_seconds, zero=True)
        _check("cache_tokens", self.cache_tokens, least=1, finite=False)
        if (fastest := max(self.curve.values())) >= self._reading_limit():
            raise UserError(
                f"prefill_tokens_per_second: at {self.prefill_tokens_per_second:g} the prompts "
                f"alone allow {self._reading_limit():g} completion tokens per second, and the "
                f"curve has {fastest:g}; they cannot be from the same machine"
            )

    def _reading_limit(self) -> float:
        """Completion tokens per second if only prompts took time."""
        if not self.prompt_tokens:
            return math.inf
        return self.prefill_tokens_per_second * self.completion_tokens / self.prompt_tokens

    def requests_per_second(self, traffic: "Traffic") -> dict[int, float]:
        """Requests in flight -> requests of this shape that the replica finishes in a second.

        From 1 to as many as it is worth to let in: until the measured curve no longer grows, or
        the cache is full. Below the first measured number a request is as slow as there.

        Raises:
            UserError: not one request fits into the cache.
        """
        measured: dict[int, float] = {}
        for clients in sorted(self.curve):
            rate = 1 / self._seconds(clients, traffic)
            if not measured or rate > max(measured.values()):
                measured[clients] = rate
        each = traffic.prompt_tokens + traffic.completion_tokens
        if each > self.cache_tokens:
            raise UserError(
                f"prompt_tokens, completion_tokens: {each:g} together, and the cache holds "
                f"{self.cache_tokens:g}; ask for less, or raise cache_gb"
            )
        most = int(min(max(measured), self.cache_tokens // each))
        first = min(measured)
        carried = {n: n * measured[first] / first for n in range(1, first + 1)}
        for low, high in pairwise(measured):
            step = (measured[high] - measured[low]) / (high - low)
            carried |= {n: measured[low] + (n - low) * step for n in range(low + 1, high + 1)}
        return {n: carried[n] for n in range(1, most + 1)}

    def _seconds(self, clients: int, traffic: "Traffic") -> float:
        """Of the replica's time, for one request beside others."""
        decode = 1 / self.curve[clients] - 1 / self._reading_limit()
        context = traffic.prompt_tokens + traffic.completion_tokens / 2
        measured = self.prompt_tokens + self.completion_tokens / 2
        longer = max(self.context_seconds * (context - measured), -decode / 2)
        prefill = traffic.prompt_tokens / self.prefill_tokens_per_second
        return prefill + traffic.completion_tokens * (decode + longer)


@dataclass(frozen=True)
class Traffic:
    """What comes in: requests a minute, and their mean lengths in tokens."""

    requests_per_minute: float
    prompt_tokens: float
    completion_tokens: float

    def __post_init__(self) -> None:
        _check("requests_per_minute", self.requests_per_minute)
        _check("prompt_tokens", self.prompt_tokens, zero=True)
        _check("completion_tokens", self.completion_tokens, least=1)


@dataclass(frozen=True)
class Plan:
    """What it takes.

    Args:
        replicas: how many.
        most_requests_per_second: what one replica carries at the most, with `clients` in flight.
        clients: that number.
        utilization: share of it that is used on average.
        in_flight: requests that one replica holds at a time, on average.
        latency_seconds: from request to the last token, on average, waiting included.
        per_hour: price of all replicas.
        per_million_tokens: price of a million completion tokens, idle time included.
    """

    replicas: int
    most_requests_per_second: float
    clients: int
    utilization: float
    in_flight: float
    latency_seconds: float
    per_hour: float
    per_million_tokens: float


def plan(
    traffic: Traffic,
    replica: Replica,
    price_per_hour: float,
    *,
    utilization: float = UTILIZATION,
    seconds_at_most: float = math.inf,
) -> Plan:
    """How many replicas some traffic needs, and what they cost.

    Args:
        traffic: what comes in.
        replica: what one replica can do.
        price_per_hour: of one replica, in any currency; costs are in the same.
        utilization: how full a replica may be on average, over 0 and under 1.
        seconds_at_most: the mean latency must not be above this.

    Raises:
        UserError: a value is out of range, or no replica is fast enough; names the field.
    """
    _check("price_per_hour", price_per_hour, zero=True)
    _check("seconds_at_most", seconds_at_most, finite=False)
    _check("utilization", utilization)
    if utilization >= 1:
        raise UserError(
            f"utilization: should be under 1, not {utilization:g}: where a replica is always busy, "
            "the queue grows for ever"
        )
    carried = replica.requests_per_second(traffic)
    if 1 / carried[1] >= seconds_at_most:
        raise UserError(
            f"seconds_at_most: a request takes {1 / carried[1]:.3g} s if it is alone, not "
            f"{seconds_at_most:g}; allow more, ask for less text, or take a faster replica"
        )
    arriving = traffic.requests_per_minute / 60

    def too_few(replicas: int) -> bool:
        load = arriving / replicas
        return in_flight(load, carried) / load > seconds_at_most

    clients = max(carried)
    replicas = max(1, math.ceil(arriving / (utilization * carried[clients])))
    fewest = replicas
    while too_few(replicas):
        fewest, replicas = replicas + 1, 2 * replicas
    while fewest < replicas:
        middle = (fewest + replicas) // 2
        fewest, replicas = (middle + 1, replicas) if too_few(middle) else (fewest, middle)
    each = arriving / replicas
    held = in_flight(each, carried)
    per_hour = replicas * price_per_hour
    tokens_per_hour = arriving * 3600 * traffic.completion_tokens
    return Plan(
        replicas=replicas,
        most_requests_per_second=carried[clients],
        clients=clients,
        utilization=each / carried[clients],
        in_flight=held,
        latency_seconds=held / each,
        per_hour=per_hour,
        per_million_tokens=per_hour / tokens_per_hour * 1e6,
    )


def in_flight(requests_per_second: float, carried: Mapping[int, float]) -> float:
    """Requests that a replica holds on average; see the module's docstring.

    Args:
        requests_per_second: what comes in; under the last of `carried`.
        carried: requests in flight, from 1 on -> requests that are finished in a second. What is
            beyond the last waits.
    """
    most = max(carried)
    full = requests_per_second / carried[most]
    logs = [0.0]  # of chances, up to a common factor: they may be too large for a float
    for n in range(1, most + 1):
        logs.append(logs[-1] + math.log(requests_per_second / carried[n]))
    chances = [math.exp(log - max(logs)) for log in logs]
    waiting = chances[-1] * full / (1 - full)  # the sum of a geometric series, as below
    held = sum(n * chance for n, chance in enumerate(chances))
    held += waiting * (most + 1 / (1 - full))
    return held / (sum(chances) + waiting)


def kv_bytes_per_token(config: object, bytes_per_number: float = 2) -> float:
    """Bytes that the keys and values of one token take in the KV cache.

        2 (key, value) * layers * heads that have keys of their own * head size * bytes per number

    Args:
        config: a transformers config.
        bytes_per_number: 2 in 16 bits, 1 in 8.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * shared * size * bytes_per_number


def _check(
    field: str, value: float, *, zero: bool = False, least: float = 0, finite: bool = True
) -> None:
    """A number in its range, or an error that names it."""
    wanted = "0 or more" if zero else f"at least {least:g}" if least else "over 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{field}: should be a number, {wanted}, not {value!r}")
    good = value >= 0 if zero else value >= least if least else value > 0
    if not good or math.isnan(value) or (finite and math.isinf(value)):
        raise UserError(f"{field}: should be {wanted}{' and finite' * finite}, not {value:g}")
