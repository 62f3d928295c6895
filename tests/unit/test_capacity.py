"""Replicas and cost: worked by hand, and for any traffic and any measured curve."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deploy.common.paths import UserError
from deploy.vertex.capacity import ReplicaCapacity, Traffic, in_flight, kv_bytes_per_token, plan

REPLICA = ReplicaCapacity({1: 100.0, 8: 400.0, 32: 800.0}, 2000.0, 50.0, 100.0)

rates = st.floats(1, 1e4)
tokens = st.floats(1, 1e4)
traffics = st.builds(Traffic, st.floats(0.01, 1e6), st.floats(0, 1e4), tokens)


@st.composite
def replicas(draw) -> ReplicaCapacity:
    """Any curve, also one that falls, with a prefill that is fast enough for it."""
    clients = draw(st.sets(st.integers(1, 256), min_size=1, max_size=5))
    curve = {c: draw(rates) for c in clients}
    prompt, completion = draw(st.floats(0, 1e4)), draw(tokens)
    least = max(curve.values()) * prompt / completion
    return ReplicaCapacity(curve, draw(st.floats(1.01, 100)) * (least + 1), prompt, completion)


def test_matches_a_calculation_by_hand():
    """The shape of the measurement itself: 100 tokens at 800 a second are 8 requests a second."""
    made = plan(Traffic(1200, 50, 100), REPLICA, price_per_hour=3.0)
    assert made.most_requests_per_second == pytest.approx(8)
    assert made.clients == 32
    assert made.replicas == 5, "20 a second, and one replica may take 0.6 times 8"
    assert made.utilization == pytest.approx(0.5)
    assert 1 < made.latency_seconds < 4, "between that of one and that of 32 clients"
    assert made.per_hour == 15
    assert made.per_million_tokens == pytest.approx(15 / (20 * 3600 * 100) * 1e6)


def test_one_request_at_a_time_is_an_mm1_queue():
    """M/M/1: load / (1 - load) requests, 1 / (rate - load) seconds."""
    one = ReplicaCapacity({1: 100.0}, 1e9, 0, 100)
    made = plan(Traffic(30, 0, 100), one, 1.0)
    assert made.replicas == 1 and made.in_flight == pytest.approx(0.5 / 0.5)
    assert made.latency_seconds == pytest.approx(1 / (1 - 0.5))


def test_independent_places_are_erlangs_queue():
    """Where speed grows with the number in flight, up to three, that is M/M/3."""
    load, places = 2.0, 3  # requests per second; each place finishes one a second
    terms = [load**n / math.factorial(n) for n in range(places)]
    last = load**places / math.factorial(places) / (1 - load / places)
    waiting = last / (sum(terms) + last) * load / (places - load)
    assert in_flight(load, {1: 1.0, 2: 2.0, 3: 3.0}) == pytest.approx(load + waiting)


@pytest.mark.parametrize("sizes", ["equal", "exponential"])
def test_mean_matches_a_simulation_for_any_distribution_of_lengths(sizes):
    """Requests that come at random and share a replica, 30,000 of them."""
    places, load = 8, 1.3
    carried = {n: 2.4 * (1 - 0.6**n) for n in range(1, places + 1)}
    draw = random.Random(1)
    now, held, area, come = 0.0, [], 0.0, draw.expovariate(load)
    for _ in range(30_000):
        while True:  # until the next one comes, some may end
            served = held[:places]
            speed = carried[len(served)] / len(served) if served else 0
            end = min(served) / speed if served else math.inf
            step = min(end, come - now)
            area += step * len(held)
            now += step
            held = [left - step * speed if i < places else left for i, left in enumerate(held)]
            held = [left for left in held if left > 1e-9]
            if now >= come:
                break
        held.append(1.0 if sizes == "equal" else draw.expovariate(1))
        come = now + draw.expovariate(load)
    assert area / now == pytest.approx(in_flight(load, carried), rel=0.06)


def test_longer_prompts_cost_their_prefill_time():
    short, long = (REPLICA.requests_per_second(Traffic(1, p, 100))[32] for p in (50, 2050))
    assert 1 / long - 1 / short == pytest.approx(2000 / 2000)


def test_latency_limit_needs_more_replicas():
    free = plan(Traffic(1200, 50, 100), REPLICA, 3.0)
    made = plan(Traffic(1200, 50, 100), REPLICA, 3.0, seconds_at_most=1.5)
    assert made.latency_seconds <= 1.5 < free.latency_seconds
    assert made.replicas > free.replicas
    each = 20 / (made.replicas - 1)
    carried = REPLICA.requests_per_second(Traffic(1200, 50, 100))
    assert in_flight(each, carried) / each > 1.5, "one fewer would not do"
    with pytest.raises(UserError, match=r"seconds_at_most: a single request takes 1 s, not 0.9"):
        plan(Traffic(1200, 50, 100), REPLICA, 3.0, seconds_at_most=0.9)


def test_longer_context_adds_its_reading_time():
    slower = replace(REPLICA, context_seconds=1e-5)
    near, far = (slower.requests_per_second(Traffic(1, p, 100))[32] for p in (50, 1050))
    assert near == pytest.approx(8), "the measured shape itself"
    assert 1 / far - 1 / near == pytest.approx(1000 / 2000 + 100 * 1000 * 1e-5)


def test_cache_limits_the_requests_in_flight():
    small = replace(REPLICA, cache_tokens=1600)
    assert max(small.requests_per_second(Traffic(1, 100, 100))) == 8
    made = plan(Traffic(600, 100, 100), small, 1.0)
    assert made.clients == 8
    with pytest.raises(UserError, match="2000 together, and the cache holds 1600"):
        plan(Traffic(1, 1000, 1000), small, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Traffic(0, 1, 1), "requests_per_minute: should be over 0 and finite, not 0"),
        (lambda: Traffic(1, -1, 1), "prompt_tokens: should be 0 or more and finite, not -1"),
        (lambda: Traffic(1, 1, 0), "completion_tokens: should be at least 1 and finite, not 0"),
        (lambda: Traffic(math.nan, 1, 1), "requests_per_minute: .* not nan"),
        (lambda: Traffic(1, math.inf, 1), "prompt_tokens: .* not inf"),
        (lambda: ReplicaCapacity({}, 1, 1, 1), r"curve: should be clients -> tokens .* not \{\}"),
        (
            lambda: ReplicaCapacity([100], 1, 1, 1),
            r"curve: should be clients -> tokens .* not \[100\]",
        ),
        (lambda: Traffic("600", 1, 1), "requests_per_minute: should be a number, .* not '600'"),
        (lambda: Traffic(1, None, 1), "prompt_tokens: should be a number, .* not None"),
        (lambda: Traffic(True, 1, 1), "requests_per_minute: should be a number, .* not True"),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, 1, utilization=1), "utilization: .* never stops"),
        (lambda: ReplicaCapacity({0: 1.0}, 1, 0, 1), "curve, clients: should be at least 1"),
        (lambda: ReplicaCapacity({8: 0.0}, 1, 0, 1), r"curve\[8\]: should be over 0"),
        (
            lambda: ReplicaCapacity({1: 100.0}, 50, 100, 100),
            "prefill_tokens_per_second: at 50 the prompts",
        ),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, -1), "price_per_hour: should be 0 or more"),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, 1, utilization=1.1), "utilization: .* not 1.1"),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, 1, seconds_at_most=0), "seconds_at_most: should"),
    ],
)
def test_rejects_wrong_values_with_the_field_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


@given(traffics, replicas(), st.floats(0.1, 0.99))
def test_plans_enough_replicas_and_no_more(traffic, replica, utilization):
    made = plan(traffic, replica, 1.0, utilization=utilization)
    assert 0 < made.utilization <= utilization * (1 + 1e-9)
    if made.replicas > 1:
        fewer = traffic.requests_per_minute / 60 / (made.replicas - 1)
        assert fewer > utilization * made.most_requests_per_second * (1 - 1e-9)


@given(traffics, replicas(), st.floats(1, 100))
def test_more_work_never_needs_fewer_replicas(traffic, replica, factor):
    base = plan(traffic, replica, 1.0)
    for field in ("requests_per_minute", "prompt_tokens", "completion_tokens"):
        more = replace(traffic, **{field: factor * getattr(traffic, field)})
        assert plan(more, replica, 1.0).replicas >= base.replicas


@given(traffics, replicas())
def test_follows_littles_law_and_the_curve(traffic, replica):
    made = plan(traffic, replica, 1.0)
    each = traffic.requests_per_minute / 60 / made.replicas
    assert made.in_flight == pytest.approx(each * made.latency_seconds)
    carried = replica.requests_per_second(traffic)
    quickest = min(n / rate for n, rate in carried.items())
    assert made.latency_seconds >= quickest * (1 - 1e-9)


@given(traffics, replicas())
def test_throughput_grows_up_to_the_measured_maximum(traffic, replica):
    carried = replica.requests_per_second(traffic)
    assert list(carried) == list(range(1, max(carried) + 1))
    assert list(carried.values()) == sorted(carried.values())
    measured = {n: 1 / replica._seconds(n, traffic) for n in replica.curve}
    assert carried[max(carried)] == pytest.approx(max(measured.values()))


@pytest.mark.slow
@given(traffics, replicas(), st.floats(1.01, 20))
def test_latency_limit_is_kept_with_as_few_replicas_as_possible(traffic, replica, factor):
    carried = replica.requests_per_second(traffic)
    assume(all(b / n <= a / m for (m, a), (n, b) in pairwise(carried.items())))  # sharing slows
    limit = factor / carried[1]
    made = plan(traffic, replica, 1.0, seconds_at_most=limit)
    assert made.latency_seconds <= limit
    free = plan(traffic, replica, 1.0)
    assert made.replicas >= free.replicas
    if made.replicas > free.replicas:
        each = traffic.requests_per_minute / 60 / (made.replicas - 1)
        assert in_flight(each, carried) / each > limit


@given(traffics, replicas(), st.floats(0, 1e3), st.floats(0.5, 50))
def test_cost_follows_the_price_and_the_speed(traffic, replica, price, factor):
    made = plan(traffic, replica, price)
    assert made.per_hour == pytest.approx(made.replicas * price)
    hourly = traffic.requests_per_minute * 60 * traffic.completion_tokens
    assert made.per_million_tokens * hourly / 1e6 == pytest.approx(made.per_hour)
    assert plan(traffic, replica, price * factor).per_hour == pytest.approx(made.per_hour * factor)
    faster = ReplicaCapacity(
        {c: rate * factor for c, rate in replica.curve.items()},
        replica.prefill_tokens_per_second * factor,
        replica.prompt_tokens,
        replica.completion_tokens,
    )
    more = replace(traffic, requests_per_minute=factor * traffic.requests_per_minute)
    exact = traffic.requests_per_minute / 60 / (0.6 * made.most_requests_per_second)
    assume(abs(exact - round(exact)) > 1e-6)  # at a whole number rounding may go either way
    again = plan(more, faster, price)
    assert again.replicas == made.replicas, "twice the speed carries twice the traffic"
    assert again.latency_seconds == pytest.approx(made.latency_seconds / factor)


@pytest.mark.slow
def test_kv_bytes_of_known_models():
    from transformers import AutoConfig

    shapes = {"num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": 576}
    llama = AutoConfig.for_model("llama", num_key_value_heads=3, **shapes)
    assert kv_bytes_per_token(llama) == 2 * 30 * 3 * 64 * 2
    assert kv_bytes_per_token(AutoConfig.for_model("gpt2"), 1) == 2 * 12 * 768
    neox = AutoConfig.for_model(
        "gpt_neox", num_hidden_layers=32, num_attention_heads=32, hidden_size=2560
    )
    assert kv_bytes_per_token(neox) == 2 * 32 * 2560 * 2
