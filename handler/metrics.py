"""The metrics that the worker reports to Prometheus, and the thread that serves them.

Values change inside the handler's ticks. A thread answers `GET /metrics` on loopback, in the text
format of Prometheus or OpenMetrics, as the scraper asks.

TorchServe's frontend reports metrics on a Unix socket, in a form that OpenMetrics parsers reject.
The worker adds one of them to ours: how many responses the frontend sent, by class of status. They
include responses to requests that never reached the worker.

Names follow https://prometheus.io/docs/practices/naming: base units, `_total` for counters.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from typing import Any, get_args
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from handler.config import App
from handler.engine import EngineLoad, FinishReason, Progress
from handler.errors import RequestError
from handler.response import ActiveRequest
from handler.shapes import Completion

logger = logging.getLogger(__name__)

PORT_VARIABLE = "SERVING_METRICS_PORT"
"""The environment variable with the loopback port for metrics; without it, none are served."""
FRONTEND_VARIABLE = "SERVING_FRONTEND_METRICS"
"""The environment variable with TorchServe's `metrics_address`."""
FRONTEND_SECONDS = 1.0
"""How long a scrape waits for the frontend."""

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
"""Buckets of times of requests: from one token of a small model to a long queue."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Buckets of the time per output token: from a small model on a GPU to one offloaded to disk."""
TOKENS = tuple(2**n for n in range(18))
"""Buckets of tokens: powers of two up to the longest contexts."""

FINISH_REASONS = (*get_args(FinishReason), "cancelled")
"""The values of the label `finish_reason`. Those of all labels are reported from the start, with 0:
`rate` sees no increase of a series that begins with 1."""
OUTCOMES = ("completed", "timeout", "error")
"""The values of the label `outcome`; `timeout`: no token within `app.limits.seconds`."""
_REASONS = {
    400: "bad_request",
    403: "forbidden",
    404: "not_found",
    405: "method",
    413: "too_large",
    415: "content_type",
    429: "full",
    500: "internal_error",
    503: "draining",
}
"""Why requests are rejected, by status."""
REFUSALS = (*_REASONS.values(), "queue_tokens")
"""The values of the label `reason`; `full`: too many sequences, `queue_tokens`: too many tokens."""

disable_created_metrics()  # a second series for each counter, which nothing here reads


class Metrics:
    """Records what happens to the requests of one model.

    Args:
        app: the app's settings.
        model_name: the value of the label `model`.
    """

    def __init__(self, app: App, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._application = make_wsgi_app(self.registry)
        self._model = model_name
        self._most_running = app.engine.max_batch
        self._cached_tokens = 0
        self._cached_prompt_tokens: Counter | None = None
        """Missing unless the engine knows it, because 0 would mean that the cache has no effect."""

        self._requests = self._counters(
            "llm_requests_total", "Responses to accepted requests, by outcome", "outcome", OUTCOMES
        )
        self._refused = self._counters(
            "llm_refused_requests_total", "Rejected requests, by reason", "reason", REFUSALS
        )
        self._sequences = self._counters(
            "llm_sequences_total",
            "Sequences that ended, by finish reason; cancelled: the client left",
            "finish_reason",
            FINISH_REASONS,
        )
        self._prompt_tokens = self._counter(
            "llm_prompt_tokens_total", "Prompt tokens of sequences whose prefill is done"
        )
        self._completion_tokens = self._counter(
            "llm_completion_tokens_total", "Generated tokens, counted at each tick"
        )

        self._queue_time = self._histogram(
            "llm_queue_time_seconds",
            "From the submission of a sequence to its first forward pass",
            REQUEST_SECONDS,
        )
        self._first_token = self._histogram(
            "llm_time_to_first_token_seconds",
            "From the arrival of a request to the first token of each of its sequences",
            REQUEST_SECONDS,
        )
        self._output_token = self._histogram(
            "llm_time_per_output_token_seconds",
            "Mean time per token of a sequence after its first token",
            TOKEN_SECONDS,
        )
        self._duration = self._histogram(
            "llm_request_duration_seconds",
            "From the arrival of an accepted request to the end of its response",
            REQUEST_SECONDS,
        )
        self._sequence_prompt = self._histogram(
            "llm_sequence_prompt_tokens", "Prompt tokens of a sequence that ended", TOKENS
        )
        self._sequence_completion = self._histogram(
            "llm_sequence_completion_tokens", "Generated tokens of a sequence that ended", TOKENS
        )

        running = [self._gauge("llm_running_sequences", "Sequences that are being generated")]
        waiting = [self._gauge("llm_waiting_sequences", "Sequences that wait for their prefill")]
        cache = [
            self._gauge("llm_kv_cache_usage_ratio", "Fraction of the KV cache that sequences hold")
        ]
        self._waiting_tokens = self._gauge(
            "llm_waiting_prompt_tokens", "Prompt tokens of the sequences that wait"
        )
        limits = (
            ("llm_running_sequences_limit", "app.engine.max_batch", app.engine.max_batch),
            ("llm_waiting_sequences_limit", "app.engine.max_queue", app.engine.max_queue),
            (
                "llm_waiting_prompt_tokens_limit",
                "app.engine.max_queue_tokens",
                app.engine.max_queue_tokens,
            ),
        )
        for name, setting, value in limits:
            self._gauge(name, f"The setting {setting}").set(value)
        if app.metrics.vllm_names:
            running.append(self._vllm_gauge("num_requests_running", "Sequences that run"))
            waiting.append(self._vllm_gauge("num_requests_waiting", "Sequences that wait"))
            # The older name, which Vertex AI scales on, and the one that replaced it.
            for name in ("gpu_cache_usage_perc", "kv_cache_usage_perc"):
                cache.append(self._vllm_gauge(name, "KV cache in use; 1 is all of it"))
        self._running, self._waiting, self._cache = running, waiting, cache
        ProcessCollector(registry=self.registry)

    def serve(self) -> None:
        """Serve the metrics in a thread, if this worker was given a port."""
        if address := os.environ.get(FRONTEND_VARIABLE):
            self.registry.register(FrontendResponses(address))
        if port := os.environ.get(PORT_VARIABLE):
            threading.Thread(target=self._serve, args=(int(port),), daemon=True).start()

    def _serve(self, port: int) -> None:
        """Start the server; a worker that is being replaced may hold the port for a moment."""
        warned = False
        while True:
            try:
                server = make_server(
                    *("127.0.0.1", port, self._answer, ThreadingWSGIServer, _Quiet),
                )
            except OSError as error:
                if not warned:
                    logger.warning("metrics are not served yet: port %d: %s", port, error)
                warned = True
                time.sleep(1)
            else:
                server.serve_forever()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer one request, in the format that it accepts.

        In OpenMetrics' format prometheus_client 0.26 turns the colon of `vllm:` into `_` unless it
        is asked not to escape names. All names here are valid without.
        """
        accept = environ.get("HTTP_ACCEPT", "")
        environ["HTTP_ACCEPT"] = accept.replace(
            "version=1.0.0", "version=1.0.0;escaping=allow-utf-8"
        )
        return self._application(environ, start_response)

    def count_tokens(self, completion: Completion, progress: Progress) -> None:
        """Count the tokens of a sequence's progress. Call before `completion` is updated."""
        tokens = progress.completion_tokens - completion.completion_tokens
        if tokens and not completion.completion_tokens:
            self._prompt_tokens.inc(completion.prompt_tokens)
        self._completion_tokens.inc(tokens)

    def record(self, active: ActiveRequest) -> None:
        """Record a request whose response ends in this tick, and its sequences."""
        completions = active.completions.values()
        reasons = {c.finish_reason for c in completions}
        failed = "error" in reasons
        late = reasons == {"timeout"} and not any(c.completion_tokens for c in completions)
        self._requests["error" if failed else "timeout" if late else "completed"].inc()
        self._duration.observe(time.monotonic() - active.arrived_at)
        self._record_sequences(active)

    def record_cancelled(self, active: ActiveRequest) -> None:
        """Record the sequences of a request whose client left."""
        self._record_sequences(active)

    def _record_sequences(self, active: ActiveRequest) -> None:
        for c in active.completions.values():
            self._sequences[c.finish_reason or "cancelled"].inc()
            self._sequence_prompt.observe(c.prompt_tokens)
            self._sequence_completion.observe(c.completion_tokens)
            if c.first_token_at is None:
                continue
            self._queue_time.observe(c.queue_seconds)
            self._first_token.observe(c.first_token_at - active.arrived_at)
            if c.finished_at is not None and c.completion_tokens > 1:
                decode = c.finished_at - c.first_token_at
                self._output_token.observe(decode / (c.completion_tokens - 1))

    def count_refused(self, error: RequestError) -> None:
        """Count a request that was answered with an error instead of being run."""
        self._refused[error.counted_as or _REASONS.get(error.code, "bad_request")].inc()

    def set_load(self, load: EngineLoad) -> None:
        """Set the gauges; call at the end of each tick.

        OpenVINO's pipeline takes some more sequences than it runs at once. These wait there.
        """
        running = min(load.running, self._most_running)
        for gauges, value in (
            (self._running, running),
            (self._waiting, load.waiting + load.running - running),
            (self._cache, load.cache_use),
        ):
            for gauge in gauges:
                gauge.set(value)
        self._waiting_tokens.set(load.waiting_tokens)
        if load.cached_prompt_tokens is not None:
            self._cached_prompt_tokens = self._cached_prompt_tokens or self._counter(
                "llm_cached_prompt_tokens_total", "Prompt tokens found in the prefix cache"
            )
            self._cached_prompt_tokens.inc(load.cached_prompt_tokens - self._cached_tokens)
            self._cached_tokens = load.cached_prompt_tokens

    def _counters(
        self, name: str, text: str, label: str, values: tuple[str, ...]
    ) -> dict[str, Counter]:
        counter = Counter(name, text, ["model", label], registry=self.registry)
        return {value: counter.labels(self._model, value) for value in values}

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model"], registry=self.registry).labels(self._model)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ["model"], registry=self.registry, buckets=buckets)
        return histogram.labels(self._model)

    def _vllm_gauge(self, name: str, text: str) -> Gauge:
        """A gauge with vLLM's name and labels; it numbers its engines, and here is one."""
        labels = ["model_name", "engine"]
        gauge = Gauge(f"vllm:{name}", f"{text}, as in vLLM", labels, registry=self.registry)
        return gauge.labels(self._model, "0")


class _Quiet(WSGIRequestHandler):
    """Writes no line to the log for each scrape."""

    def log_message(self, format: str, *values: Any) -> None:
        pass


class FrontendResponses(Collector):
    """How many responses TorchServe's frontend sent, by class of status.

    Args:
        address: TorchServe's `metrics_address`; it begins with `unix:` if it is a socket.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def describe(self) -> list[CounterMetricFamily]:
        """Return the family with its labels, without asking the frontend."""
        return [self._family({})]

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Ask the frontend. If it does not answer, only this metric is missing."""
        try:
            counts = self._counts()
        except (OSError, HTTPException, ValueError) as error:
            logger.warning("no metrics of the frontend: %r", error)
            return
        yield self._family(counts)

    def _family(self, counts: dict[str, float]) -> CounterMetricFamily:
        text = "Responses of TorchServe's frontend, including those to probes, by class of status"
        family = CounterMetricFamily("torchserve_responses", text, labels=["status"])
        for status in ("2xx", "4xx", "5xx"):
            family.add_metric([status], counts.get(f"Requests{status.upper()}", 0.0))
        return family

    def _counts(self) -> dict[str, float]:
        connection = HTTPConnection("frontend", timeout=FRONTEND_SECONDS)
        if self._address.startswith("unix:"):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(FRONTEND_SECONDS)
            connection.sock.connect(self._address.removeprefix("unix:"))
        else:
            connection = HTTPConnection(urlsplit(self._address).netloc, timeout=FRONTEND_SECONDS)
        try:
            names = ("Requests2XX", "Requests4XX", "Requests5XX")
            # Counters of TorchServe's text format, whose names lack `_total`.
            connection.request("GET", "/metrics?" + "&".join(f"name[]={name}" for name in names))
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                counts[name] = counts.get(name, 0.0) + sample.value
        return counts
