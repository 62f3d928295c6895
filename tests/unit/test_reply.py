"""What a request's completions turn into: headers, and figures for Prometheus."""

import json

import pytest

import handler.reply
from handler.config import load_app
from handler.engine import Progress
from handler.metrics import COUNTERS, HISTOGRAMS, Metrics
from handler.reply import LiveRequest
from handler.request import default_parameters, parse_request

APP = load_app("my-own-model", local=True)


class Recorder(dict):
    """Stands where TorchServe's metric cache does; keeps the values of each metric."""

    def add_metric_to_cache(self, name, unit, dimensions, kind):
        values = self[name] = []

        class Metric:
            def add_or_update(self, value, labels):
                assert labels == ["model"]
                values.append(value)

        return Metric()


@pytest.fixture
def live(request, monkeypatch):
    """Two instances: 5 and 7 prompt tokens, 11 and 3 completion tokens, at known times."""
    clock = iter([100.0, 100.5, 100.75, 102.75, 103.0])
    monkeypatch.setattr(handler.reply.time, "monotonic", lambda: next(clock))
    body = {"instances": ["a", "b"], "parameters": {"stream": request.param}}
    live = LiveRequest(
        parse_request({"body": json.dumps(body)}, APP.limits, default_parameters(APP)),
        random_weights=False,
    )
    for prompt_tokens in (5, 7):
        live.add(prompt_tokens, "")
    live.update(1, Progress("b", "x", 1, queue_seconds=0.25))
    live.update(0, Progress("a", "x", 1, queue_seconds=0.5))
    live.update(0, Progress("a", "y", 11, "length", queue_seconds=0.5))
    live.update(1, Progress("b", "y", 3, "stop", queue_seconds=0.25))
    return live


@pytest.mark.parametrize("live", [False], indirect=True)
def test_headers_are_in_the_order_of_the_instances(live):
    headers = live.take_reply().headers
    assert headers["x-prompt-tokens"] == "5,7"
    assert headers["x-completion-tokens"] == "11,3"
    assert headers["x-finish-reason"] == "length,stop"


@pytest.mark.parametrize("live", [False, True], indirect=True, ids=["whole", "stream"])
def test_what_is_counted(live):
    metrics = Metrics(recorder := Recorder(), "model")
    metrics.record(live)
    assert recorder.keys() == COUNTERS.keys() | HISTOGRAMS.keys()
    assert recorder["llm_requests_total"] == [1]
    assert recorder["llm_refused_requests_total"] == []
    assert recorder["llm_prompt_tokens_total"] == [5, 7]
    assert recorder["llm_completion_tokens_total"] == [11, 3]
    assert recorder["llm_queue_time_seconds"] == [0.5, 0.25]
    streamed = live.request.stream
    assert recorder["llm_time_to_first_token_seconds"] == ([0.75, 0.5] if streamed else [])
    # 10 tokens in 2 s, 2 tokens in 2.5 s: the first of each is not counted
    assert recorder["llm_time_per_output_token_seconds"] == ([0.2, 1.25] if streamed else [])
    metrics.refused()
    assert recorder["llm_refused_requests_total"] == [1] and recorder["llm_requests_total"] == [1]
