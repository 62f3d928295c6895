"""What clients see when a worker is killed, an engine fails, or the server is full."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

import handler.config
from deploy.archive.build import build_archive
from deploy.common.waiting import wait_until
from deploy.torchserve.server import Server

TORCH = {"engine": {"name": "transformers"}}
pytestmark = pytest.mark.served

LONG = {"instances": ["Once upon a time"], "parameters": {"max_new_tokens": 400}}
SHORT = {"instances": ["Paris"], "parameters": {"max_new_tokens": 2}}


def test_killed_worker_is_replaced(smollm2_server):
    """SIGKILL during 8 requests: each client has an error within 15 s; a new worker within 30 s."""
    url = smollm2_server.url

    async def scenario():
        async with httpx.AsyncClient(timeout=60) as client:
            requests = [asyncio.create_task(client.post(url, json=LONG)) for _ in range(8)]
            await asyncio.sleep(2.0)
            assert not any(request.done() for request in requests)
            (worker,) = smollm2_server.workers()
            os.kill(worker["pid"], signal.SIGKILL)
            killed = time.monotonic()
            responses = await asyncio.gather(*requests)
            heard = time.monotonic() - killed
            while (await client.post(url, json=SHORT)).status_code != 200:
                assert time.monotonic() - killed < 30, "no answer 30 s after the worker was killed"
                await asyncio.sleep(0.25)
            return worker["pid"], responses, heard

    pid, responses, heard = asyncio.run(scenario())
    assert heard < 15, f"the last client heard after {heard:.1f} s"
    for response in responses:
        assert response.status_code in (500, 503, 507), response.text
        assert "Worker died" in response.json()["message"]
    assert smollm2_server.workers()[0]["pid"] != pid


@pytest.fixture
def small_server(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server with room for 4 running and 4 waiting sequences."""
    apps = tmp_path / "apps"
    apps.mkdir()
    app = {
        "app": {"title": "small", "engine": {"max_batch": 4, "max_queue": 4, "max_context": 256}}
    }
    (apps / "small.yaml").write_text(yaml.safe_dump(app))
    monkeypatch.setattr(handler.config, "APPS", apps)
    archive = build_archive("small", tiny_llama, **TORCH, store=tmp_path / "store")
    with Server(archive, port=7200) as server:
        yield server


def test_overloaded_server_rejects_with_429(small_server):
    """4 times as many requests as fit: the others are rejected within 1 s, none is lost."""
    body = {"instances": ["a"], "parameters": {"max_new_tokens": 200, "temperature": 1, "seed": 1}}

    async def one(client: httpx.AsyncClient) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        response = await client.post(small_server.url, json=body)
        return response, time.monotonic() - began

    async def scenario():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            return await asyncio.gather(*(one(client) for _ in range(32)))

    results = asyncio.run(scenario())
    accepted = [response for response, _ in results if response.status_code == 200]
    rejected = [(response, seconds) for response, seconds in results if response.status_code != 200]
    assert len(accepted) >= 8
    assert len(rejected) >= 16
    assert len({response.text for response in accepted}) == 1
    for response, seconds in rejected:
        assert response.status_code == 429 and seconds < 1.0, (response.text, seconds)
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert httpx.post(small_server.url, json=body, timeout=60).text == accepted[0].text


def test_one_failed_instance_fails_its_request_alone(tiny_llama: Path, tmp_path: Path):
    """The engine fails on one of three instances: a 500 for that request, others succeed."""
    archive = build_archive("broken", tiny_llama, **TORCH, store=tmp_path)
    sampling = archive / "handler" / "engine" / "sampling.py"
    text = sampling.read_text()
    line = "        ids, scores = torch.tensor("
    assert text.count(line) == 1
    sabotage = "        logits = logits * float('nan') if len(token_ids) == 9 else logits\n"
    sampling.write_text(text.replace(line, sabotage + line))
    sampled = {"temperature": 1.0, "seed": 1, "max_new_tokens": 20}
    good = {"instances": ["0123456789abc"] * 3, "parameters": sampled}
    bad = {"instances": ["0123456789abc", "0123456", "0123456789abc"], "parameters": sampled}

    async def scenario(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=30) as client:
            tasks = [client.post(url, json=body) for body in [good, bad] * 8]
            return await asyncio.gather(*tasks)

    with Server(archive, port=7200) as server:
        (before,) = server.workers()
        expected = httpx.post(server.url, json=good, timeout=30).text
        responses = asyncio.run(scenario(server.url))
        assert [response.status_code for response in responses] == [200, 500] * 8
        assert all(response.text == expected for response in responses[0::2])
        assert "generation failed" in responses[1].json()["error"]["message"]
        assert server.workers()[0]["pid"] == before["pid"]


def test_worker_with_a_failed_engine_is_replaced(tiny_llama: Path, tmp_path: Path):
    """Weights that load but cannot compute: a 500 for each request, then a new worker."""
    archive = build_archive("broken", tiny_llama, **TORCH, store=tmp_path)
    engine = archive / "handler" / "engine" / "transformers_engine.py"
    text = engine.read_text()
    line = "        longest = max(sequence.prompt_tokens for sequence in group)\n"
    assert text.count(line) == 1
    sabotage = "        if group[0].prompt_tokens == 3: 1 / 0\n"
    engine.write_text(text.replace(line, sabotage + line))
    with Server(archive, port=7200) as server:
        good = {"instances": ["ab"], "parameters": {"max_new_tokens": 2}}
        assert httpx.post(server.url, json=good).status_code == 200
        (before,) = server.workers()
        response = httpx.post(server.url, json={"instances": ["abc"]}, timeout=30)
        assert response.status_code in (500, 507), response.text
        wait_until(lambda: httpx.post(server.url, json=good, timeout=30).is_success, timeout=30)
        assert server.workers()[0]["pid"] != before["pid"]


TICK_SECONDS = 3
"""`responseTimeout` in the tests below; 15 s or more otherwise."""

PATIENCE = {"patience": 60.0, "frozen": 3.0, "occupy_after": 1.0}


@pytest.fixture
def watched(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path):
    """A server, and the verdict of its watcher in the future."""
    archive = build_archive("watched", tiny_llama, **TORCH, store=tmp_path / "store")
    config = yaml.safe_load((archive / "model-config.yaml").read_text())
    config["responseTimeout"] = TICK_SECONDS
    (archive / "model-config.yaml").write_text(yaml.safe_dump(config))
    with Server(archive, port=7200) as server, ThreadPoolExecutor() as pool:
        verdict = pool.submit(server.watch, **PATIENCE | getattr(request, "param", {}))
        yield server, verdict
        if not verdict.done():
            os.kill(server.process.pid, signal.SIGKILL)


def statuses_until(ended: Callable[[], bool], url: str) -> list[int]:
    """Send a request every quarter of a second; return all statuses, 0 for a closed connection."""

    def one() -> int:
        try:
            return httpx.post(url, json=SHORT, timeout=30).status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(200) as pool:
        requests = []
        deadline = time.monotonic() + 40
        while not ended():
            assert time.monotonic() < deadline
            requests.append(pool.submit(one))
            time.sleep(0.25)
        return [request.result() for request in requests]


def test_stopped_worker_is_not_ready_and_is_replaced(watched):
    """SIGSTOP during a request: it gets a 500, later ones wait for the new worker."""
    server, verdict = watched
    (worker,) = server.workers()
    with ThreadPoolExecutor() as pool:
        active = pool.submit(httpx.post, server.url, json=LONG, timeout=60)
        time.sleep(0.1)
        os.kill(worker["pid"], signal.SIGSTOP)
        assert not server.ready()
        later = pool.submit(httpx.post, server.url, json=SHORT, timeout=60)
        assert active.result().status_code in (200, 500)
        assert later.result().status_code in (200, 500, 503)
    wait_until(server.ready, timeout=60)
    assert server.workers()[0]["pid"] != worker["pid"] and not verdict.done()
    log = server.log.read_text()
    assert "POST /predictions/watched HTTP/1.1" in log
    assert "?probe" not in log and "GET /models" not in log


@pytest.mark.parametrize("watched", [{"patience": 8.0, "started_in": 1.0}], indirect=True)
def test_server_whose_worker_cannot_come_back_ends(watched):
    """Clients wait a moment for a new worker, then they get 503, then the server has ended."""
    server, verdict = watched
    shutil.rmtree(server.archive)
    os.kill(server.workers()[0]["pid"], signal.SIGKILL)
    statuses = statuses_until(verdict.done, server.url)
    assert verdict.result().startswith("no worker is ready; waited ")
    assert statuses.count(503) >= 8 and set(statuses) <= {0, 500, 503, 507}, statuses
    assert server.process.wait(5) == -signal.SIGKILL


def test_server_whose_model_cannot_be_loaded_again_says_so_and_ends(watched):
    """Requests that wait for the new worker get 503."""
    server, verdict = watched
    shutil.rmtree(server.archive / "weights")
    os.kill(server.workers()[0]["pid"], signal.SIGKILL)
    statuses = statuses_until(verdict.done, server.url)
    assert verdict.result().startswith("the model cannot be loaded: ")
    assert statuses.count(503) >= 8 and set(statuses) <= {0, 500, 503, 507}, statuses


def test_server_with_a_frozen_frontend_ends(watched):
    server, verdict = watched
    os.kill(server.process.pid, signal.SIGSTOP)
    assert not server.ready()
    statuses = statuses_until(verdict.done, server.url)
    assert verdict.result().startswith("the frontend does not answer; waited ")
    assert set(statuses) == {0}, "every connection was closed"
