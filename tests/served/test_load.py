"""The load generator against a real server, in every mode."""

import asyncio

import pytest
from tqdm import tqdm

from benchmarks import shapes
from benchmarks.faults import Victim, reset_connections
from benchmarks.load import Target, closed_loop, open_loop, openai_target, run_clients
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


def test_prompts_and_conversations_reach_the_server_with_their_tokens(smollm2_server):
    """The counts are the server's; a chat's second request contains its own completion."""
    target = openai_target(smollm2_server.openai_url, smollm2_server.name)
    draw = shapes._draw("served")
    made = run_clients(target, [shapes.prompts(draw, 36, 2, 6) for _ in range(2)])
    assert made.errors == {} and made.prompt_tokens == 36
    first, both = (
        run_clients(target, [shapes.conversation(shapes._draw("chat"), "Be brief.", turns, 6)])
        for turns in (1, 2)
    )
    assert first.errors == both.errors == {} and both.requests == 2
    second = 2 * both.prompt_tokens - first.prompt_tokens
    question = shapes.QUESTION_WORDS + shapes._NUMBER
    assert second > first.prompt_tokens + question, "the completion is in the history"
    assert made.first_token_p50 is not None and both.first_token_p50 is not None


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
