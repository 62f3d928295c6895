"""What clients see when a worker is killed, an engine fails, or the server is full."""

import asyncio
import os
import signal
import time
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
    assert text.count("    def _prefill(self)") == 1
    sabotage = "        if self._waiting and len(self._waiting[0].token_ids) == 3: 1 / 0\n"
    at = text.index('"""Run waiting prompts')
    end = text.index("\n", at) + 1
    engine.write_text(text[:end] + sabotage + text[end:])
    with Server(archive, port=7200) as server:
        good = {"instances": ["ab"], "parameters": {"max_new_tokens": 2}}
        assert httpx.post(server.url, json=good).status_code == 200
        (before,) = server.workers()
        response = httpx.post(server.url, json={"instances": ["abc"]}, timeout=30)
        assert response.status_code in (500, 507), response.text
        wait_until(lambda: httpx.post(server.url, json=good, timeout=30).is_success, timeout=30)
        assert server.workers()[0]["pid"] != before["pid"]
