"""The metrics of a real server, compared with what its clients sent and measured."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter

import httpx
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from deploy.archive.build import build_archive
from deploy.common.waiting import wait_until
from deploy.torchserve.client import stream
from deploy.torchserve.server import Server

pytestmark = pytest.mark.served

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
FRONTEND_SECONDS = 0.5
"""What the frontend may add to the time that the worker measures, on a busy machine."""


@pytest.fixture(scope="module", params=["tiny_server", "tiny_openvino_server"])
def server(request):
    return request.getfixturevalue(request.param)


def values(server: Server) -> Counter:
    """The value of each series, by its name and labels as text."""
    found: Counter = Counter()
    for family in text_string_to_metric_families(httpx.get(server.metrics).text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model"}
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def moved(before: Counter, after: Counter, prefix: str) -> dict[str, float]:
    """By how much the series with this prefix have increased, without those that have not."""
    names = [name for name in after if name.startswith(prefix)]
    return {name: after[name] - before[name] for name in names if after[name] != before[name]}


def numbers(header: str) -> list[int]:
    return [int(number) for number in header.split(",")]


class Sent:
    """What clients saw of the requests that they sent one after the other."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.first_event_seconds: list[float] = []
        self.prompt_tokens: list[int] = []
        self.completion_tokens: list[int] = []

    def plain(self, server: Server, instances: list[str], tokens: int) -> None:
        began = time.monotonic()
        parameters = {"max_new_tokens": tokens, "ignore_eos": True}
        body = {"instances": instances, "parameters": parameters}
        response = httpx.post(server.url, json=body, timeout=60)
        self.seconds.append(time.monotonic() - began)
        self.prompt_tokens += numbers(response.headers["x-prompt-tokens"])
        self.completion_tokens += numbers(response.headers["x-completion-tokens"])

    def streamed(self, server: Server, prompt: str, tokens: int) -> None:
        began = time.monotonic()
        parameters = {"max_new_tokens": tokens, "ignore_eos": True}
        events = stream(server.url, {"instances": [prompt], "parameters": parameters})
        received = [next(events)]
        self.first_event_seconds.append(time.monotonic() - began)
        received += events
        last = received[-1]
        self.seconds.append(time.monotonic() - began)
        self.prompt_tokens.append(last["prompt_tokens"])
        self.completion_tokens.append(last["completion_tokens"])


def test_a_known_load_is_counted_exactly_and_timed_as_clients_time_it(server):
    before, sent = values(server), Sent()
    sent.plain(server, ["Paris"], 40)
    sent.plain(server, ["one", "two words", "three words here"], 7)
    for tokens in (1, 20, 60):
        sent.streamed(server, "Paris", tokens)
    after = values(server)
    assert sent.completion_tokens == [40, 7, 7, 7, 1, 20, 60]

    assert moved(before, after, "llm_requests_total") == {"llm_requests_total completed": 5}
    assert moved(before, after, "llm_sequences_total") == {"llm_sequences_total length": 7}
    totals = {
        "llm_prompt_tokens_total": sum(sent.prompt_tokens),
        "llm_completion_tokens_total": sum(sent.completion_tokens),
        "llm_sequence_prompt_tokens_sum": sum(sent.prompt_tokens),
        "llm_sequence_completion_tokens_sum": sum(sent.completion_tokens),
        "llm_sequence_prompt_tokens_count": 7,
        "llm_sequence_completion_tokens_count": 7,
        "llm_queue_time_seconds_count": 7,
        "llm_time_to_first_token_seconds_count": 7,
        "llm_time_per_output_token_seconds_count": 6,  # one has a single token
        "llm_request_duration_seconds_count": 5,
    }
    assert {name: after[name] - before[name] for name in totals} == totals
    buckets = moved(before, after, "llm_sequence_completion_tokens_bucket")
    at_most = {bound: sum(n <= bound for n in sent.completion_tokens) for bound in (1, 8, 32, 64)}
    assert {
        bound: buckets[f"llm_sequence_completion_tokens_bucket {bound:.1f}"] for bound in at_most
    } == at_most

    def seconds(name: str) -> float:
        return after[f"{name}_sum"] - before[f"{name}_sum"]

    duration, clients = seconds("llm_request_duration_seconds"), sum(sent.seconds)
    assert clients - 5 * FRONTEND_SECONDS < duration < clients
    first_token = seconds("llm_time_to_first_token_seconds")
    assert 0 < seconds("llm_queue_time_seconds") < first_token < duration + 2 * max(sent.seconds)
    assert 0 < seconds("llm_time_per_output_token_seconds") < duration


def test_time_to_first_token_is_when_the_client_of_a_stream_gets_it(server):
    before, sent = values(server), Sent()
    for _ in range(5):
        sent.streamed(server, "Paris", 60)
    name = "llm_time_to_first_token_seconds_sum"
    measured = values(server)[name] - before[name]
    clients = sum(sent.first_event_seconds)
    assert clients - 5 * FRONTEND_SECONDS < measured < clients


def test_time_to_first_token_of_a_plain_request_is_not_its_duration(server):
    before, sent = values(server), Sent()
    for _ in range(3):
        sent.plain(server, ["Paris"], 200)
    after = values(server)
    first = "llm_time_to_first_token_seconds_sum"
    whole = "llm_request_duration_seconds_sum"
    assert 0 < after[first] - before[first] < (after[whole] - before[whole]) / 2


def test_rejected_requests_are_counted_by_reason_and_in_no_histogram(server):
    before = values(server)
    for wrong in ({"instances": 5}, {"instances": ["a"], "parameters": {"temperature": -1}}, {}):
        assert httpx.post(server.url, json=wrong).status_code == 400
    assert httpx.post(server.url, json={"instances": ["a" * 300_100]}).status_code == 413
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert httpx.post(server.url, content="a=b", headers=form).status_code == 415
    after = values(server)
    assert moved(before, after, "llm_") == {
        "llm_refused_requests_total bad_request": 3,
        "llm_refused_requests_total too_large": 1,
        "llm_refused_requests_total content_type": 1,
    }
    assert after["torchserve_responses_total 4xx"] - before["torchserve_responses_total 4xx"] == 5


def test_both_text_formats_are_clean(server):
    """TorchServe's own text has a comma after the last label, which OpenMetrics does not allow."""
    text = httpx.get(server.metrics).text
    assert re.search(r"^torchserve_responses_total\{", text, re.MULTILINE)
    assert ",}" not in text
    names = {family.name for family in text_string_to_metric_families(text)}
    response = httpx.get(server.metrics, headers={"accept": OPENMETRICS})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(response.text)}
    assert families.keys() == names
    labels = {
        (name, *sample.labels.items()) for name, f in families.items() for sample in f.samples
    }
    assert len(labels) < 250, "labels have few values, whatever clients send"


def test_inference_port_serves_the_same_metrics(server):
    """Platforms look for /metrics on the port that they know. The text is kept for a second."""
    base = server.url.split("/predictions")[0]
    names = {name for name in values(server) if not name.startswith("process_")}

    def served() -> bool:
        response = httpx.get(f"{base}/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(response.text)
        found = {sample.name for family in families for sample in family.samples}
        return {name.split()[0] for name in names} <= found

    wait_until(served, timeout=5)
    for method in ("POST", "PUT", "DELETE"):
        assert httpx.request(method, f"{base}/metrics").status_code == 405
    for path in ("/metrics/../models", "/models", "/models/tiny"):
        assert httpx.get(base + path).status_code in (404, 405)


@pytest.mark.skipif(
    not shutil.which("promtool"),
    reason="promtool is not installed (Debian: apt-get install prometheus)",
)
def test_promtool_finds_nothing_to_improve(server):
    text = httpx.get(server.metrics).content
    run = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


@pytest.fixture(scope="module")
def small(tiny_llama, tmp_path_factory):
    """A server with two places and a queue of two, which also reports vLLM's names."""
    engine = {"name": "transformers", "max_batch": 2, "max_queue": 2}
    archive = build_archive("tiny", tiny_llama, engine=engine, store=tmp_path_factory.mktemp("s"))
    path = archive / "model-config.yaml"
    config = yaml.safe_load(path.read_text())
    config["app"]["metrics"] = {"vllm_names": True}
    path.write_text(yaml.safe_dump(config))
    with Server(archive, port=7206) as server:
        yield server


def test_waiting_gauge_rises_before_the_first_429(small):
    """A program that scales by the gauge acts before requests are rejected."""
    seen: list[tuple[float, float]] = []
    first_429: list[float] = []
    done = threading.Event()

    def poll() -> None:
        while not done.wait(0.02):
            value = values(small)["llm_waiting_sequences"]
            seen.append((time.monotonic(), value))

    def client() -> None:
        body = {"instances": ["a"], "parameters": {"max_new_tokens": 250, "ignore_eos": True}}
        while not done.is_set():
            if httpx.post(small.url, json=body, timeout=60).status_code == 429 and not first_429:
                first_429.append(time.monotonic())
                done.set()

    threads = [threading.Thread(target=poll)]
    threads[0].start()
    while len(threads) < 9 and not done.wait(0.5):  # one more client at a time
        threads.append(threading.Thread(target=client))
        threads[-1].start()
    assert done.wait(30), "nothing was rejected"
    for thread in threads:
        thread.join()
    assert len(threads) - 1 >= 5, "two run and two wait"
    assert values(small)["llm_waiting_sequences_limit"] == 2
    rose = min(moment for moment, value in seen if value > 0)
    assert rose < first_429[0], (seen, first_429)


def test_vllm_names_have_the_same_values_in_both_formats(small):
    for accept in ("*/*", OPENMETRICS):
        text = httpx.get(small.metrics, headers={"accept": accept}).text
        found = dict(re.findall(r'^(vllm:\w+)\{engine="0",model_name="tiny"\} (\S+)', text, re.M))
        assert found == {
            "vllm:num_requests_running": "0.0",
            "vllm:num_requests_waiting": "0.0",
            "vllm:gpu_cache_usage_perc": "0.0",
            "vllm:kv_cache_usage_perc": "0.0",
        }


def test_gauges_return_to_zero_after_all_clients_left(small):
    """No request comes then. A probe, which the watcher sends every two seconds, makes a tick."""
    parameters = {"max_new_tokens": 250, "ignore_eos": True, "stream": True}
    body = {"instances": ["a"], "parameters": parameters}
    before = values(small)
    with httpx.stream("POST", small.url, json=body, timeout=60) as response:
        next(response.iter_bytes())
    wait_until(lambda: small.ready() and not values(small)["llm_running_sequences"], timeout=10)
    ended = moved(before, values(small), "llm_sequences_total")
    assert sum(ended.values()) == 1, ended


def test_inference_port_says_when_no_worker_serves_metrics(small):
    base = small.url.split("/predictions")[0]
    (worker,) = small.workers()
    os.kill(worker["pid"], signal.SIGSTOP)
    try:
        time.sleep(1.1)  # what is kept
        assert httpx.get(f"{base}/metrics", timeout=10).status_code == 503
        assert httpx.get(f"{base}/ping", timeout=5).status_code == 200, "uses the same threads"
    finally:
        os.kill(worker["pid"], signal.SIGCONT)
    wait_until(lambda: httpx.get(f"{base}/metrics").status_code == 200, timeout=10)


def test_metrics_come_back_with_a_new_worker(small):
    """Its counters begin with 0, which `rate` expects; the frontend's go on."""
    before = values(small)
    (worker,) = small.workers()
    os.kill(worker["pid"], signal.SIGKILL)

    def returned() -> bool:
        try:
            return (
                values(small)["process_start_time_seconds"] != before["process_start_time_seconds"]
            )
        except httpx.TransportError:
            return False

    wait_until(returned, timeout=60, interval=0.2)
    after = values(small)
    assert before["llm_requests_total completed"] > 0 == after["llm_requests_total completed"]
    assert after["torchserve_responses_total 2xx"] >= before["torchserve_responses_total 2xx"]
