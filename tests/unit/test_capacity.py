"""Replicas and cost: by hand, and what must hold for any traffic and any measured curve."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deploy.capacity import Replica, Traffic, in_flight, kv_bytes_per_token, plan
from deploy.paths import UserError

REPLICA = Replica({1: 100.0, 8: 400.0, 32: 800.0}, 2000.0, 50.0, 100.0)

rates = st.floats(1, 1e4)
tokens = st.floats(1, 1e4)
traffics = st.builds(Traffic, st.floats(0.01, 1e6), st.floats(0, 1e4), tokens)


@st.composite
def replicas(draw) -> Replica:
    """Any curve, also one that falls, with a prefill that is fast enough for it."""
    clients = draw(st.sets(st.integers(1, 256), min_size=1, max_size=5))
    curve = {c: draw(rates) for c in clients}
    prompt, completion = draw(st.floats(0, 1e4)), draw(tokens)
    least = max(curve.values()) * prompt / completion
    return Replica(curve, draw(st.floats(1.01, 100)) * (least + 1), prompt, completion)


def test_by_hand():
    """The shape of the measurement itself: 100 tokens at 800 a second are 8 requests a second."""
    made = plan(Traffic(1200, 50, 100), REPLICA, price_per_hour=3.0)
    assert made.most_requests_per_second == pytest.approx(8)
    assert made.clients == 32
    assert made.replicas == 5, "20 a second, and one replica may take 0.6 times 8"
    assert made.utilization == pytest.approx(0.5)
    assert made.in_flight == pytest.approx(8), "4 a second is 400 tokens: 8 clients"
    assert made.latency_seconds == pytest.approx(2)
    assert made.per_hour == 15
    assert made.per_million_tokens == pytest.approx(15 / (20 * 3600 * 100) * 1e6)


def test_longer_prompts_take_their_time_of_the_prefill():
    short, long = (REPLICA.requests_per_second(Traffic(1, p, 100))[32] for p in (50, 2050))
    assert 1 / long - 1 / short == pytest.approx(2000 / 2000)


def test_a_latency_that_must_be_kept_allows_fewer_clients():
    made = plan(Traffic(1200, 50, 100), REPLICA, 3.0, seconds_at_most=2.1)
    assert made.clients == 8, "8 clients wait 2 seconds, 32 wait 4"
    assert made.replicas > plan(Traffic(1200, 50, 100), REPLICA, 3.0).replicas
    with pytest.raises(UserError, match=r"seconds_at_most: a request takes 1 s at least, not 0.9"):
        plan(Traffic(1200, 50, 100), REPLICA, 3.0, seconds_at_most=0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Traffic(0, 1, 1), "requests_per_minute: should be over 0 and finite, not 0"),
        (lambda: Traffic(1, -1, 1), "prompt_tokens: should be 0 or more and finite, not -1"),
        (lambda: Traffic(1, 1, 0), "completion_tokens: should be at least 1 and finite, not 0"),
        (lambda: Traffic(math.nan, 1, 1), "requests_per_minute: .* not nan"),
        (lambda: Traffic(1, math.inf, 1), "prompt_tokens: .* not inf"),
        (lambda: Replica({}, 1, 1, 1), "curve: is empty"),
        (lambda: Replica({0: 1.0}, 1, 0, 1), "curve, clients: should be at least 1"),
        (lambda: Replica({8: 0.0}, 1, 0, 1), r"curve\[8\]: should be over 0"),
        (lambda: Replica({1: 100.0}, 50, 100, 100), "prefill_tokens_per_second: at 50 the prompts"),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, -1), "price_per_hour: should be 0 or more"),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, 1, utilization=1.1), "utilization: .* not 1.1"),
        (lambda: plan(Traffic(1, 1, 1), REPLICA, 1, seconds_at_most=0), "seconds_at_most: should"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


@given(traffics, replicas(), st.floats(0.1, 1))
def test_enough_replicas_and_not_one_more(traffic, replica, utilization):
    made = plan(traffic, replica, 1.0, utilization=utilization)
    assert 0 < made.utilization <= utilization * (1 + 1e-9)
    if made.replicas > 1:
        fewer = traffic.requests_per_minute / 60 / (made.replicas - 1)
        assert fewer > utilization * made.most_requests_per_second * (1 - 1e-9)


@given(traffics, replicas(), st.floats(1, 100))
def test_more_work_never_needs_less(traffic, replica, factor):
    base = plan(traffic, replica, 1.0)
    for field in ("requests_per_minute", "prompt_tokens", "completion_tokens"):
        more = replace(traffic, **{field: factor * getattr(traffic, field)})
        assert plan(more, replica, 1.0).replicas >= base.replicas


@given(traffics, replicas())
def test_littles_law_and_the_curve(traffic, replica):
    made = plan(traffic, replica, 1.0)
    each = traffic.requests_per_minute / 60 / made.replicas
    assert made.in_flight == pytest.approx(each * made.latency_seconds)
    assert 0 < made.in_flight <= made.clients * (1 + 1e-9)
    carried = replica.requests_per_second(traffic)
    measured = [clients / rate for clients, rate in carried.items()]
    assert min(measured) <= made.latency_seconds * (1 + 1e-9)
    assert made.latency_seconds <= max(measured) * (1 + 1e-9)


@given(replicas(), traffics)
def test_the_curve_read_backwards(replica, traffic):
    carried = replica.requests_per_second(traffic)
    assert list(carried.values()) == sorted(set(carried.values())), "it grows"
    for clients, rate in carried.items():
        assert in_flight(rate, carried) == pytest.approx(clients)


@given(traffics, replicas(), st.floats(0, 1e3), st.floats(0.5, 50))
def test_cost_follows_the_price_and_the_speed(traffic, replica, price, factor):
    made = plan(traffic, replica, price)
    assert made.per_hour == pytest.approx(made.replicas * price)
    hourly = traffic.requests_per_minute * 60 * traffic.completion_tokens
    assert made.per_million_tokens * hourly / 1e6 == pytest.approx(made.per_hour)
    assert plan(traffic, replica, price * factor).per_hour == pytest.approx(made.per_hour * factor)
    faster = Replica(
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
