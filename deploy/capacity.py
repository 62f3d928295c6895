"""From traffic to replicas and cost: the arithmetic behind chapter 07's calculator.

A replica is described by what was measured on it: tokens per second at several numbers of clients
that always wait for an answer (`benchmarks.load`), and tokens per second of the prefill
(`benchmarks.roofline`). All else follows:

    seconds of one replica for one request, c of them in flight
        s(c) = prompt / prefill rate + completion * d(c)
        d(c) = 1 / curve(c) - measured prompt / measured completion / prefill rate
    requests per second that a replica carries    r(c) = 1 / s(c)
    replicas                                      ceil(requests per second / (utilization * r))
    in flight and latency, Little's law           in flight = requests per second * latency

Not here: the wait in a queue when requests come in bunches, for which the target utilization
leaves room; following the traffic up and down (`deploy/scaling.py`); prices: the reader gives them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from deploy.paths import UserError

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
    """

    curve: Mapping[int, float]
    prefill_tokens_per_second: float
    prompt_tokens: float
    completion_tokens: float

    def __post_init__(self) -> None:
        if not self.curve:
            raise UserError("curve: is empty; it needs at least one number of clients")
        for clients, rate in self.curve.items():
            _check("curve, clients", clients, least=1)
            _check(f"curve[{clients}]", rate)
        _check("prefill_tokens_per_second", self.prefill_tokens_per_second)
        _check("prompt_tokens", self.prompt_tokens, zero=True)
        _check("completion_tokens", self.completion_tokens, least=1)
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
        """Clients -> requests of this shape that the replica finishes in a second.

        Numbers of clients that carry no more than fewer do are left out: nobody would let them in.
        """
        carried: dict[int, float] = {}
        for clients in sorted(self.curve):
            decode = 1 / self.curve[clients] - 1 / self._reading_limit()
            prefill = traffic.prompt_tokens / self.prefill_tokens_per_second
            rate = 1 / (prefill + traffic.completion_tokens * decode)
            if not carried or rate > max(carried.values()):
                carried[clients] = rate
        return carried


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
        latency_seconds: from request to the last token, on average.
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
        utilization: how full a replica may be on average, over 0 and at most 1.
        seconds_at_most: a full replica must still answer a request in this time.

    Raises:
        UserError: a value is out of range, or no replica is fast enough; names the field.
    """
    _check("price_per_hour", price_per_hour, zero=True)
    _check("seconds_at_most", seconds_at_most, finite=False)
    if not 0 < utilization <= 1:
        raise UserError(f"utilization: should be over 0 and at most 1, not {utilization:g}")
    carried = replica.requests_per_second(traffic)
    quick = {c: rate for c, rate in carried.items() if c / rate <= seconds_at_most}
    if not quick:
        best = min(c / rate for c, rate in carried.items())
        raise UserError(
            f"seconds_at_most: a request takes {best:.3g} s at least, not {seconds_at_most:g}; "
            "allow more, ask for shorter completions, or take a faster replica"
        )
    clients = max(quick)
    arriving = traffic.requests_per_minute / 60
    replicas = max(1, math.ceil(arriving / (utilization * quick[clients])))
    each = arriving / replicas
    held = in_flight(each, quick)
    per_hour = replicas * price_per_hour
    tokens_per_hour = arriving * 3600 * traffic.completion_tokens
    return Plan(
        replicas=replicas,
        most_requests_per_second=quick[clients],
        clients=clients,
        utilization=each / quick[clients],
        in_flight=held,
        latency_seconds=held / each,
        per_hour=per_hour,
        per_million_tokens=per_hour / tokens_per_hour * 1e6,
    )


def in_flight(requests_per_second: float, carried: Mapping[int, float]) -> float:
    """Requests that a replica holds while it carries a load: the curve, read backwards.

    Between two measured numbers of clients the curve is a straight line; below the first one a
    request meets nobody, so its latency is that of the first.

    Args:
        requests_per_second: the load; at most the curve's end.
        carried: clients -> requests per second, growing.
    """
    first = min(carried)
    if requests_per_second <= carried[first]:
        return first * requests_per_second / carried[first]
    for low, high in pairwise(sorted(carried)):
        if requests_per_second <= carried[high]:
            share = (requests_per_second - carried[low]) / (carried[high] - carried[low])
            return low + share * (high - low)
    return float(max(carried))


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
    good = value >= 0 if zero else value >= least if least else value > 0
    if not good or math.isnan(value) or (finite and math.isinf(value)):
        raise UserError(f"{field}: should be {wanted}{' and finite' * finite}, not {value:g}")
