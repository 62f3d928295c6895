"""Compute replicas and cost from traffic: the arithmetic behind chapter 07's calculator.

Two measurements describe a replica: tokens per second for several numbers of clients that always
wait for a response (`benchmarks.load`), and tokens per second of the prefill
(`benchmarks.roofline`). The rest follows:

    seconds of one replica for one request, n of them in flight
        s(n) = prompt / prefill rate + completion * d(n)
        d(n) = 1 / curve(n) - measured prompt / measured completion / prefill rate
               + context seconds * (context - measured context)
        context = prompt + completion / 2, the tokens before a token, on average
    requests per second that a replica serves     r(n) = 1 / s(n), a straight line between two n
    replicas                                      ceil(all requests per second / utilization / most)
        most is the largest r(n): a full replica
    requests per second of each                   q = all requests per second / replicas
    chance that n are in flight in it             p(n) = p(n - 1) * q / r(n)
    in flight in it                               the sum of n * p(n)
    latency, Little's law                         in flight / q

The requests arrive at random, independently of each other, and share the replica: a processor-
sharing queue whose speed depends on how many share it. Then only the means of the lengths matter,
not their distribution. Source: Cohen, The multiple phase service network with generalized processor
sharing, 1979. If more requests wait than a replica admits, the result is approximate.

Not covered: bursts that are worse than random; the slowest tenth of the requests (these are means);
scaling with the traffic (`deploy/vertex/autoscaling.py`); prices, which you provide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Protocol

from deploy.common.paths import UserError

UTILIZATION = 0.6
"""The average load of a replica. Source: Vertex AI's default target for autoscaling."""


@dataclass(frozen=True)
class ReplicaCapacity:
    """The measurements of one replica.

    Args:
        curve: clients that always wait for a response -> completion tokens per second of them all.
        prefill_tokens_per_second: the throughput of the prefill.
        prompt_tokens: mean prompt of the curve's requests. 0 leaves the prefill in the curve: then
            plan for traffic with prompts of 0 tokens, which stand for the measured ones.
        completion_tokens: mean completion of the curve's requests.
        context_seconds: what one more token of context adds to the time of each generated token:
            `kv_bytes_per_token` / bytes per second of the memory. 0 ignores it.
        cache_tokens: tokens of all requests together that fit into the KV cache.
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
        """Completion tokens per second if only the prefill took time."""
        if not self.prompt_tokens:
            return math.inf
        return self.prefill_tokens_per_second * self.completion_tokens / self.prompt_tokens

    def requests_per_second(self, traffic: "Traffic") -> dict[int, float]:
        """Requests in flight -> requests of this shape that the replica finishes per second.

        From 1 up to the number at which the measured curve no longer grows or the cache is full.
        Below the first measured number, a request is as slow as there.

        Raises:
            UserError: one request does not fit into the cache.
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
                f"{self.cache_tokens:g}; use shorter ones, or raise cache_gb"
            )
        most = int(min(max(measured), self.cache_tokens // each))
        first = min(measured)
        carried = {n: n * measured[first] / first for n in range(1, first + 1)}
        for low, high in pairwise(measured):
            step = (measured[high] - measured[low]) / (high - low)
            carried |= {n: measured[low] + (n - low) * step for n in range(low + 1, high + 1)}
        return {n: carried[n] for n in range(1, most + 1)}

    def _seconds(self, clients: int, traffic: "Traffic") -> float:
        """The replica's time for one request beside others."""
        decode = 1 / self.curve[clients] - 1 / self._reading_limit()
        context = traffic.prompt_tokens + traffic.completion_tokens / 2
        measured = self.prompt_tokens + self.completion_tokens / 2
        longer = max(self.context_seconds * (context - measured), -decode / 2)
        prefill = traffic.prompt_tokens / self.prefill_tokens_per_second
        return prefill + traffic.completion_tokens * (decode + longer)


@dataclass(frozen=True)
class Traffic:
    """Requests per minute, and their mean lengths in tokens."""

    requests_per_minute: float
    prompt_tokens: float
    completion_tokens: float

    def __post_init__(self) -> None:
        _check("requests_per_minute", self.requests_per_minute)
        _check("prompt_tokens", self.prompt_tokens, zero=True)
        _check("completion_tokens", self.completion_tokens, least=1)


@dataclass(frozen=True)
class CapacityPlan:
    """The replicas that some traffic needs, and their cost.

    Args:
        replicas: their number.
        most_requests_per_second: the most that one replica serves, with `clients` in flight.
        clients: that number.
        utilization: the share of it that is used on average.
        in_flight: requests in flight in one replica, on average.
        latency_seconds: from the request to the last token, on average, with the queue.
        per_hour: price of all replicas.
        per_million_tokens: price of a million completion tokens, with idle time.
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
    replica: ReplicaCapacity,
    price_per_hour: float,
    *,
    utilization: float = UTILIZATION,
    seconds_at_most: float = math.inf,
) -> CapacityPlan:
    """Compute how many replicas some traffic needs, and what they cost.

    Args:
        traffic: the requests.
        replica: the measurements of one replica.
        price_per_hour: of one replica, in any currency; costs are in the same.
        utilization: the highest average load of a replica, over 0 and under 1.
        seconds_at_most: the highest mean latency.

    Raises:
        UserError: a value is out of range, or no replica is fast enough; names the field.
    """
    _check("price_per_hour", price_per_hour, zero=True)
    _check("seconds_at_most", seconds_at_most, finite=False)
    _check("utilization", utilization)
    if utilization >= 1:
        raise UserError(
            f"utilization: should be under 1, not {utilization:g}: if a replica is always busy, "
            "its queue never stops growing"
        )
    carried = replica.requests_per_second(traffic)
    if 1 / carried[1] >= seconds_at_most:
        raise UserError(
            f"seconds_at_most: a single request takes {1 / carried[1]:.3g} s, not "
            f"{seconds_at_most:g}; allow more, use shorter completions, or a faster replica"
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
    return CapacityPlan(
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
    """Average number of requests in flight in a replica; see the module's docstring.

    Args:
        requests_per_second: arriving requests; below the last value of `carried`.
        carried: requests in flight, from 1 on -> requests finished per second. Requests beyond the
            last key wait.
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


class AttentionConfig(Protocol):
    """What a transformers config says about the keys and values of a model."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int


def kv_bytes_per_token(config: AttentionConfig, bytes_per_number: float = 2) -> float:
    """Bytes that the keys and values of one token need in the KV cache.

        2 (key, value) * layers * heads with their own keys * head size * bytes per number

    Args:
        config: a transformers config.
        bytes_per_number: 2 in 16 bits, 1 in 8.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * shared * size * bytes_per_number


def _check(
    field: str, value: object, *, zero: bool = False, least: float = 0, finite: bool = True
) -> None:
    """Make sure that a value is a number in its range."""
    wanted = "0 or more" if zero else f"at least {least:g}" if least else "over 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{field}: should be a number, {wanted}, not {value!r}")
    number = float(value)
    good = number >= 0 if zero else number >= least if least else number > 0
    if not good or math.isnan(number) or (finite and math.isinf(number)):
        raise UserError(f"{field}: should be {wanted}{' and finite' * finite}, not {number:g}")
