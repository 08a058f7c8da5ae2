"""Figures for Prometheus: of the server's own requests, and of the engine behind it."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# What is so much at a time; the rest only grows.
_GAUGES = {"waiting", "running", "references", "cache_bytes"}
# What each figure of the engine (:meth:`jaxlab.inference.engine.Engine.stats`) says.
HELP = {
    "waiting": "Requests that wait for a row",
    "running": "Requests that have a row: their prompt is read or their answer written",
    "requests": "Requests that were queued",
    "prompt_tokens": "Tokens of prompts that were read",
    "generated_tokens": "Tokens of answers, those after a stop string among them",
    "refreshes": "Searches for chunks that were completed while an answer was written",
    "steps": "Steps of decoding, each of one token for every row that is ready",
    "references": "References of the bank that are not deleted",
    "cache_hits": "Memories that were read from RAM",
    "cache_misses": "Memories that were read from the bank",
    "cache_bytes": "Bytes of memories that are kept in RAM",
    "seconds_embed": "Time spent on embedding what is searched for",
    "seconds_search": "Time spent on searching the index",
    "seconds_load": "Time spent on loading memories, encoding those that were cold among it",
}


class Metrics:
    """The registry of one server."""

    def __init__(self, engine: Any):
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "jaxlab_http_requests", "Requests answered", ["endpoint", "status"], **given
        )
        self.first_token = Histogram(
            "jaxlab_time_to_first_token_seconds",
            "From a request to the first token of its answer",
            buckets=_SECONDS,
            **given,
        )
        self.between_tokens = Histogram(
            "jaxlab_time_between_tokens_seconds",
            "From one token of an answer to the next",
            buckets=_SECONDS,
            **given,
        )
        self.registry.register(_OfEngine(engine))


class _OfEngine:
    def __init__(self, engine: Any):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self._engine.stats().items():
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield kind(f"jaxlab_engine_{name}", HELP[name], value=value)
