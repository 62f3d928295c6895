"""What the worker reports to Prometheus: names and units of its metrics.

TorchServe reads these from the worker's stdout and serves them on its metrics port. Its
histograms have buckets from 5 ms to 10 s, which fit all three times here.
"""

from ts.metrics.metric_type_enum import MetricTypes

from handler.context import Metric, MetricsCache
from handler.response import ActiveRequest

COUNTERS = {
    "llm_requests_total": "count",
    "llm_refused_requests_total": "count",
    "llm_prompt_tokens_total": "count",
    "llm_completion_tokens_total": "count",
}
HISTOGRAMS = {
    "llm_queue_time_seconds": "seconds",
    "llm_time_to_first_token_seconds": "seconds",
    "llm_time_per_output_token_seconds": "seconds",
}


class Metrics:
    """Records finished and rejected requests of one model.

    Args:
        cache: TorchServe's, `context.metrics`.
        model_name: the value of the label `ModelName`.
    """

    def __init__(self, cache: MetricsCache, model_name: str) -> None:
        self._model_name = model_name
        self._metrics: dict[str, Metric] = {}
        for names, kind in ((COUNTERS, MetricTypes.COUNTER), (HISTOGRAMS, MetricTypes.HISTOGRAM)):
            for name, unit in names.items():
                self._metrics[name] = cache.add_metric_to_cache(name, unit, ["ModelName"], kind)

    def record(self, active: ActiveRequest) -> None:
        """Count a request that was answered, and its tokens and times."""
        self._add("llm_requests_total", 1)
        for c in active.completions.values():
            self._add("llm_prompt_tokens_total", c.prompt_tokens)
            self._add("llm_completion_tokens_total", c.completion_tokens)
            if c.first_token_at is None or c.finished_at is None:
                continue
            self._add("llm_queue_time_seconds", c.queue_seconds)
            if not active.request.stream:  # the client does not see when the first token came
                continue
            self._add("llm_time_to_first_token_seconds", c.first_token_at - active.arrived_at)
            if c.completion_tokens > 1:
                decode = c.finished_at - c.first_token_at
                self._add("llm_time_per_output_token_seconds", decode / (c.completion_tokens - 1))

    def count_rejected(self) -> None:
        """Count a request that was answered with an error."""
        self._add("llm_refused_requests_total", 1)

    def _add(self, name: str, value: float) -> None:
        self._metrics[name].add_or_update(value, [self._model_name])
