"""The load generator against a real server, in every mode."""

import asyncio

import pytest
from tqdm import tqdm

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


def test_short_soak_sends_every_kind_of_request(smollm2_server, monkeypatch: pytest.MonkeyPatch):
    """In a few seconds every kind of request is sent and has the expected response."""

    monkeypatch.setattr("benchmarks.soak.INVALID_EVERY", 7)
    monkeypatch.setattr("benchmarks.soak.DISCONNECT_EVERY", 5)
    soak = Soak(smollm2_server.url, smollm2_server.process.pid, minutes=0.1)
    with tqdm(total=0.1, disable=True) as progress:
        asyncio.run(soak.run(progress))
    assert set(soak.outcomes) == {"valid 200", "invalid 400", "disconnected 200"}, soak.outcomes
    assert sum(soak.outcomes.values()) == soak.sent
    assert soak.samples and soak.times
