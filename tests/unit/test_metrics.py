"""What the worker reports to Prometheus."""

import shutil
import socket
import subprocess
import threading
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

import handler.metrics
import handler.response
from deploy.common.waiting import wait_until
from handler.config import app_yaml, load_app, merge, parse_app
from handler.engine import EngineLoad, Progress, SequenceKey
from handler.metrics import Metrics
from handler.request import default_parameters, parse_body
from handler.response import ActiveRequest

APP = load_app("my-own-model", local=True)
A, B = SequenceKey("request", 0), SequenceKey("request", 1)

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
"""The header `Accept` of Prometheus 2."""

TORCHSERVE_TEXT = """\
# HELP Requests2XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests2XX counter
Requests2XX{Level="Host",Hostname="a",} 7.0
# HELP Requests5XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests5XX counter
Requests5XX{Level="Host",Hostname="a",} 2.0
"""
"""As TorchServe 0.12.0 writes it, with a comma after the last label."""


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model": "m"} | labels)


def run_request(metrics: Metrics, monkeypatch: pytest.MonkeyPatch, *, stream: bool) -> None:
    """Record a request of two instances: 5 and 7 prompt tokens, 11 and 3 completion tokens."""
    clock = [100.0]
    monkeypatch.setattr(handler.response.time, "monotonic", lambda: clock[0])
    body = {"instances": ["a", "b"], "parameters": {"stream": stream}}
    active = ActiveRequest(parse_body(body, APP, default_parameters(APP)))
    active.arrived_at = 100.0
    active.add(A, 5, "")
    active.add(B, 7, "")
    for now, progress in (
        (100.5, Progress(B, "x", 1, queue_seconds=0.25, first_token_at=100.375)),
        (100.75, Progress(A, "x", 1, queue_seconds=0.5, first_token_at=100.75)),
        (102.75, Progress(A, "y", 11, "length", queue_seconds=0.5)),
        (103.0, Progress(B, "y", 3, "stop", queue_seconds=0.25)),
    ):
        clock[0] = now
        metrics.count_tokens(active.completions[progress.key], progress)
        active.update(progress)
    clock[0] = 103.5
    metrics.record(active)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_counts_and_times_one_request(monkeypatch, stream):
    run_request(metrics := Metrics(APP, "m"), monkeypatch, stream=stream)
    assert value(metrics, "llm_requests_total", outcome="completed") == 1
    assert value(metrics, "llm_sequences_total", finish_reason="length") == 1
    assert value(metrics, "llm_sequences_total", finish_reason="stop") == 1
    assert value(metrics, "llm_prompt_tokens_total") == 12
    assert value(metrics, "llm_completion_tokens_total") == 14
    sums = {
        "llm_sequence_prompt_tokens": (2, 5 + 7),
        "llm_sequence_completion_tokens": (2, 11 + 3),
        "llm_queue_time_seconds": (2, 0.5 + 0.25),
        "llm_time_to_first_token_seconds": (2, 0.75 + 0.375),  # the engine's clock, not the tick's
        # 10 tokens in 2 s, 2 tokens in 2.625 s: the first of each is not counted
        "llm_time_per_output_token_seconds": (2, 0.2 + 1.3125),
        "llm_request_duration_seconds": (1, 3.5),
    }
    for name, (count, total) in sums.items():
        assert value(metrics, f"{name}_count") == count, name
        assert value(metrics, f"{name}_sum") == pytest.approx(total), name


def test_completion_tokens_are_counted_while_a_sequence_runs(monkeypatch):
    metrics = Metrics(APP, "m")
    monkeypatch.setattr(metrics, "record", lambda active: None)
    run_request(metrics, monkeypatch, stream=False)
    assert value(metrics, "llm_completion_tokens_total") == 14
    assert value(metrics, "llm_sequence_completion_tokens_count") == 0


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ([("", 0, "timeout"), ("", 0, "timeout")], "timeout"),
        ([("x", 2, "timeout"), ("", 0, "timeout")], "completed"),
        ([("x", 2, "stop"), ("", 1, "error")], "error"),
    ],
)
def test_outcome_of_a_request(ends, outcome):
    metrics = Metrics(APP, "m")
    body = {"instances": ["a", "b"]}
    active = ActiveRequest(parse_body(body, APP, {}))
    for key, (text, tokens, reason) in zip((A, B), ends, strict=True):
        active.add(key, 5, "")
        active.update(Progress(key, text, tokens, reason))
    metrics.record(active)
    assert value(metrics, "llm_requests_total", outcome=outcome) == 1


def test_load_sets_gauges_and_adds_new_prefix_cache_hits():
    metrics = Metrics(APP, "m")
    metrics.set_load(EngineLoad(3, 2, 40, 0.25, 100))
    metrics.set_load(EngineLoad(4, 1, 30, 0.5, 130))
    assert value(metrics, "llm_running_sequences") == 4
    assert value(metrics, "llm_waiting_sequences") == 1
    assert value(metrics, "llm_waiting_prompt_tokens") == 30
    assert value(metrics, "llm_kv_cache_usage_ratio") == 0.5
    assert value(metrics, "llm_cached_prompt_tokens_total") == 130


def test_sequences_over_max_batch_count_as_waiting_wherever_they_wait():
    metrics, most = Metrics(APP, "m"), APP.engine.max_batch
    metrics.set_load(EngineLoad(most + 7, 2, 40))
    assert value(metrics, "llm_running_sequences") == most
    assert value(metrics, "llm_waiting_sequences") == 9


def test_prefix_cache_hits_are_missing_if_the_engine_does_not_know_them():
    metrics = Metrics(APP, "m")
    metrics.set_load(EngineLoad(3, 2, 40, 0.25, None))
    assert value(metrics, "llm_cached_prompt_tokens_total") is None


def with_vllm_names() -> Metrics:
    config = merge(app_yaml("my-own-model", local=True), {"app": {"metrics": {"vllm_names": True}}})
    return Metrics(parse_app(config, "test"), "m")


def test_vllm_names_are_a_switch_and_have_the_same_values():
    load = EngineLoad(3, 2, 40, 0.25)
    Metrics(APP, "m").set_load(load)
    assert b"vllm:" not in generate_latest(Metrics(APP, "m").registry)
    (metrics := with_vllm_names()).set_load(load)
    labels = {"model_name": "m", "engine": "0"}
    found = {
        name: metrics.registry.get_sample_value(f"vllm:{name}", labels)
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "gpu_cache_usage_perc",
            "kv_cache_usage_perc",
        )
    }
    assert list(found.values()) == [3, 2, 0.25, 0.25]


def test_every_time_and_token_count_has_buckets_up_to_the_largest_allowed(monkeypatch):
    run_request(metrics := Metrics(APP, "m"), monkeypatch, stream=False)
    buckets: dict[str, list[float]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                buckets.setdefault(family.name, []).append(float(sample.labels["le"]))
    for name, bounds in buckets.items():
        finite = bounds[:-1]
        assert bounds[-1] == float("inf") and finite == sorted(finite)
        if "per_output_token" not in name:
            least = 131_072 if name.endswith("_tokens") else 2 * APP.limits.seconds
            assert finite[-1] >= least, name


@pytest.mark.parametrize("make", [lambda: Metrics(APP, "m"), with_vllm_names], ids=["ours", "vllm"])
def test_both_text_formats_can_be_parsed(make, monkeypatch):
    run_request(metrics := make(), monkeypatch, stream=True)
    names = {family.name for family in metrics.registry.collect()}
    text = generate_latest(metrics.registry).decode()
    assert {f.name for f in text_string_to_metric_families(text)} == names
    response = serve(metrics, monkeypatch, "unix:/nowhere", accept=OPENMETRICS)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert {f.name for f in parse_openmetrics(response.text)} == names


@pytest.mark.skipif(
    not shutil.which("promtool"),
    reason="promtool is not installed (Debian's package prometheus); it checks names and units",
)
def test_names_and_units_follow_prometheus_rules(monkeypatch):
    run_request(metrics := Metrics(APP, "m"), monkeypatch, stream=True)
    text = generate_latest(metrics.registry)
    run = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


class Frontend:
    """Answers one request on a Unix socket with `TORCHSERVE_TEXT`."""

    def __init__(self, path: str) -> None:
        self.requests: list[bytes] = []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(path)
        self.socket.listen()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        connection, _ = self.socket.accept()
        self.requests.append(connection.recv(10_000))
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(TORCHSERVE_TEXT)}\r\n\r\n"
        connection.sendall((head + TORCHSERVE_TEXT).encode())
        connection.close()


def serve(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch, frontend: str, accept: str = "*/*"
) -> httpx.Response:
    """Serve metrics on a free port and return what is scraped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("SERVING_METRICS_PORT", str(port))
    monkeypatch.setenv("SERVING_FRONTEND_METRICS", frontend)
    metrics.serve()
    return scrape(port, accept)


def scrape(port: int, accept: str = "*/*") -> httpx.Response:
    """Scrape as soon as the metrics are served."""

    def served() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(served, timeout=10, interval=0.05)
    return httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"accept": accept})


def test_responses_of_the_frontend_are_reported_by_status(monkeypatch, tmp_path):
    frontend = Frontend(str(tmp_path / "s"))
    text = serve(Metrics(APP, "m"), monkeypatch, f"unix:{tmp_path / 's'}").text
    for line in ('{status="2xx"} 7.0', '{status="4xx"} 0.0', '{status="5xx"} 2.0'):
        assert f"\ntorchserve_responses_total{line}\n" in text
    assert frontend.requests[0].startswith(b"GET /metrics?name[]=Requests2XX&")


def test_other_metrics_are_reported_while_the_frontend_does_not_answer(monkeypatch, tmp_path):
    response = serve(Metrics(APP, "m"), monkeypatch, f"unix:{tmp_path / 'missing'}")
    assert response.status_code == 200 and "\nllm_running_sequences{" in response.text
    assert "torchserve_" not in response.text


def test_metrics_are_served_as_soon_as_the_port_is_free(monkeypatch):
    """TorchServe may start the next worker while the last one still holds the port."""
    waits: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]

        def wait(seconds: float) -> None:
            waits.append(seconds)
            holder.close()

        monkeypatch.setattr(handler.metrics, "time", SimpleNamespace(sleep=wait))
        monkeypatch.setenv("SERVING_METRICS_PORT", str(port))
        Metrics(APP, "m").serve()
        assert scrape(port).status_code == 200
    assert waits == [1]


def test_without_a_port_no_thread_is_started(monkeypatch):
    monkeypatch.delenv("SERVING_METRICS_PORT", raising=False)
    monkeypatch.delenv("SERVING_FRONTEND_METRICS", raising=False)
    before = threading.active_count()
    Metrics(APP, "m").serve()
    assert threading.active_count() == before
