"""Clients that leave, requests that end at their deadline, and short prompts behind long ones."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from deploy.torchserve.server import Server

pytestmark = pytest.mark.served

SHORT = {"instances": ["Paris is"], "parameters": {"max_new_tokens": 2}}


def many_tokens(**parameters: object) -> dict:
    """A request that fills a third of the places for a minute."""
    shared = {"max_new_tokens": 1024, "ignore_eos": True} | parameters
    return {"instances": ["x"] * 32, "parameters": shared}


@pytest.fixture
def post(smollm2_server: Server) -> Iterator[Callable[[dict], httpx.Response]]:
    with httpx.Client(timeout=60) as client:
        yield lambda body: client.post(smollm2_server.url, json=body)


def leave(server: Server, body: dict) -> None:
    """Send a request and hang up half a second later, or after the first piece of a stream."""
    with (
        suppress(httpx.ReadTimeout),
        httpx.Client(timeout=0.5) as client,
        client.stream("POST", server.url, json=body) as response,
    ):
        assert response.status_code == 200 and body["parameters"]["stream"]


def statuses_until_accepted(post: Callable[[dict], httpx.Response], seconds: float) -> list[int]:
    """Send short requests until one is accepted; return all statuses."""
    statuses, end = [], time.monotonic() + seconds
    while not statuses or statuses[-1] != 200:
        assert time.monotonic() < end, f"{statuses} and no place after {seconds} s"
        statuses.append(post(SHORT).status_code)
        time.sleep(0.1)
    return statuses


def test_places_of_plain_requests_are_free_at_their_deadline(smollm2_server, post):
    """Three clients that fill the server and leave: others get 429 until the deadline, then 200."""
    with ThreadPoolExecutor() as pool:
        for _ in range(3):
            pool.submit(leave, smollm2_server, many_tokens(timeout=4))
    statuses = statuses_until_accepted(post, seconds=4 + 2)
    assert set(statuses[:-1]) == {429}, statuses


def test_places_of_streams_are_free_when_their_clients_left(smollm2_server, post):
    with ThreadPoolExecutor() as pool:
        for _ in range(3):
            pool.submit(leave, smollm2_server, many_tokens(stream=True))
    statuses_until_accepted(post, seconds=2)


def test_request_ends_at_its_deadline_with_what_it_has(post):
    began = time.monotonic()
    response = post(many_tokens(timeout=1.5))
    assert 1.5 <= time.monotonic() - began < 4
    assert response.status_code == 200
    assert response.headers["x-finish-reason"] == ",".join(["timeout"] * 32)
    tokens = [int(n) for n in response.headers["x-completion-tokens"].split(",")]
    assert len(response.json()["predictions"]) == 32 and 0 < max(tokens) < 1024


def test_stream_ends_at_its_deadline_with_an_event(post):
    response = post(many_tokens(timeout=1.5, stream=True))
    assert response.status_code == 200
    assert response.text.count('"finish_reason": "timeout"') == 32


def test_short_request_does_not_wait_for_long_prompts(smollm2_server, post):
    """Sixteen prompts of 1,850 words: a short request takes seconds."""
    words = ["time", "house", "water", "light", "stone"]
    prompts = [
        f"Story {i}." + "".join(f" {words[k * k * i % 5]}" for k in range(1850)) for i in range(16)
    ]
    shared = {"max_new_tokens": 150, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=60) as client:

        def long(prompt: str) -> int:
            body = {"instances": [prompt], "parameters": shared | {"timeout": 12}}
            return client.post(smollm2_server.url, json=body).status_code

        sent = [pool.submit(long, prompt) for prompt in prompts]
        time.sleep(1)
        for _ in range(3):
            began = time.monotonic()
            assert post(SHORT).status_code == 200
            assert time.monotonic() - began <= 5
            time.sleep(1)
        assert {future.result() for future in sent} <= {200, 504}
