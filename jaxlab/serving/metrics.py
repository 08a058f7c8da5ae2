"""Figures for Prometheus: of the server's own requests, and of the engine behind it."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# What is so much at a time; the rest only grows.
_GAUGES = {"waiting", "running", "cache_bytes"}


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
            help_text = f"Of the engine: {name.replace('_', ' ')}"
            yield kind(f"jaxlab_engine_{name}", help_text, value=value)
