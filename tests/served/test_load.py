"""The load generator against a real server, in every mode."""

import asyncio

import pytest
from tqdm import tqdm

from benchmarks.faults import Victim, reset_connections
from benchmarks.load import Target, closed_loop, open_loop
from benchmarks.soak import Soak

pytestmark = pytest.mark.served

COMMON = {"new_tokens": 6}


@pytest.mark.parametrize("stream", [False, True])
def test_closed_loop_measures_throughput(smollm2_server, stream: bool):
    target = Target(smollm2_server.url)
    made = closed_loop(target, clients=3, requests_each=2, stream=stream, **COMMON)
    assert made.errors == {} and made.requests == 6
    assert made.tokens_per_second == pytest.approx(36 / made.seconds)
    assert (made.first_token_p50 is not None) == stream


def test_open_loop_sends_every_request(smollm2_server):
    made = open_loop(Target(smollm2_server.url), rate=50, requests=10, **COMMON)
    assert made.errors == {} and made.requests == 10


def test_rejected_requests_are_counted(smollm2_server):
    target = Target(smollm2_server.url, extra=(("instances", [1]),))
    made = closed_loop(target, clients=1, requests_each=2, warm_up=0, **COMMON)
    assert made.errors == {"status 400": 2}


def test_short_soak_counts_an_answer_for_each_request(
    smollm2_server, monkeypatch: pytest.MonkeyPatch
):
    """In a few seconds every kind of request is sent, one fault happens, and nobody is left out."""
    monkeypatch.setattr("benchmarks.soak.INVALID_EVERY", 7)
    monkeypatch.setattr("benchmarks.soak.LEAVE_EVERY", 5)
    monkeypatch.setattr("benchmarks.soak.SETTLE_SECONDS", 1)
    victim = Victim(smollm2_server.url, lambda: smollm2_server.process.pid)
    soak = Soak(victim, minutes=0.15, faults=[reset_connections], every=4)
    with tqdm(total=0.15, disable=True) as progress:
        asyncio.run(soak.run(progress))
    assert soak.unexpected() == []
    assert {"valid 200", "invalid 400", "left plain", "left stream 200"} <= set(soak.outcomes)
    assert sum(soak.outcomes.values()) == soak.sent
    assert soak.samples and soak.times
    assert {record["fault"] for record in soak.happened} == {"reset-connections"}
    assert all(record["seconds_without_200"] < 30 for record in soak.happened)
    assert soak.measurements()["faults"] == soak.happened
