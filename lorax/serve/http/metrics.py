"""`/metrics` in Prometheus's text format: the engine's counters, and histograms of what requests waited for.

    lorax_time_to_first_token_seconds    from submit to the first token
    lorax_time_per_token_seconds         (end - first token) / (tokens - 1), a mean for each request
    lorax_tokens_per_second              written in the last ten seconds, all requests together

A key without administration sees the rows of the adapters that it may use, and nobody else's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorax.serve.http.keys import Key

WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
WINDOW = 10.0

# name -> (help, field of the engine's statistics)
GAUGES = {
    "queue_requests": ("Requests that wait for the engine", "waiting"),
    "running_requests": ("Requests that are being answered", "running"),
    "batch_size": ("Rows of the last step", "batch"),
}
COUNTERS = {
    "steps": ("Steps of the model", "steps"),
    "step_seconds": ("Seconds in the model", "step_seconds"),
    "host_seconds": ("Seconds of scheduling, paging and text", "host_seconds"),
    "prompt_tokens": ("Tokens of prompts", "prompt_tokens"),
    "cached_prompt_tokens": ("Tokens of prompts that the prefix cache had", "cached_tokens"),
    "generated_tokens": ("Tokens written", "generated_tokens"),
    "prefix_cache_hits": ("Pages of prompts found in the prefix cache", "prefix_hits"),
    "prefix_cache_lookups": ("Pages of prompts looked for in the prefix cache", "prefix_lookups"),
    "preemptions": ("Requests put back to be computed again", "preemptions"),
    "compilations": ("Programs compiled after the start", "compilations"),
    "refused_requests": ("Requests that a full queue refused", "refused"),
}
# name -> (help, label, {value of the label: field})
LABELLED = {
    "adapter_loads": ("Adapters read", "source", {"disk": "loads_disk", "host": "loads_device"}),
    "adapter_evictions": ("Adapters put out", "tier", {"device": "evictions_device", "host": "evictions_host"}),
}
PAGES = {"kv": "pages_kv", "cached": "pages_cached", "adapters": "pages_adapters", "free": "pages_free"}
ADAPTERS = {
    "adapter_requests": ("Requests of an adapter", "requests"),
    "adapter_prompt_tokens": ("Tokens of prompts of an adapter", "prompt_tokens"),
    "adapter_generated_tokens": ("Tokens written by an adapter", "generated_tokens"),
    "adapter_reads": ("Times an adapter was put into the pool", "loads"),
}


class Metrics:
    """A server's figures.

    Args:
        engine: gives `stats()`.
    """

    def __init__(self, engine: Any):
        self._engine = engine
        self._samples: deque[tuple[float, int]] = deque()
        self.registry = CollectorRegistry()
        self.registry.register(self)  # pyright: ignore[reportArgumentType] - a collector is what has collect()
        more: Any = {"registry": self.registry}
        self._first = Histogram("lorax_time_to_first_token_seconds", "Submit to first token", buckets=WAITS, **more)
        self._each = Histogram("lorax_time_per_token_seconds", "Between tokens of a request", buckets=STEPS, **more)
        self._queued = Histogram("lorax_queue_seconds", "Submit to first scheduled", buckets=WAITS, **more)
        self._http = Counter("lorax_http_requests", "HTTP requests", ("path", "status"), **more)
        self._paths: frozenset[str] = frozenset()

    def know(self, paths: frozenset[str]) -> None:
        """The paths that have rows of their own; others share one, so that strangers cannot make up rows."""
        self._paths = paths

    def count(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        self._http.labels(path if path in self._paths else "other", str(status)).inc()

    def observe(self, usage: Any) -> None:
        """A request of the engine ended."""
        self._queued.observe(usage.queued)
        if usage.first_token is None:
            return
        self._first.observe(usage.first_token)
        if usage.completion_tokens > 1:
            self._each.observe((usage.total - usage.first_token) / (usage.completion_tokens - 1))

    def sample(self) -> float:
        """Tokens a second over the last ten seconds. Called now and then, it also keeps what it needs for that."""
        now, written = time.monotonic(), self._engine.stats().generated_tokens
        self._samples.append((now, written))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()
        begin, before = self._samples[0]
        return (written - before) / (now - begin) if now > begin else 0.0

    def text(self, key: Key) -> bytes:
        """Everything that a key may see."""
        if key.admin or "*" in key.adapters:
            return generate_latest(self.registry)
        return generate_latest(_Seen(self.registry, key))  # pyright: ignore[reportArgumentType]

    def collect(self) -> Iterator[Metric]:
        """The engine's figures, read at this moment."""
        stats = self._engine.stats()
        for name, (about, field) in GAUGES.items():
            yield GaugeMetricFamily(f"lorax_{name}", about, value=getattr(stats, field))
        yield GaugeMetricFamily("lorax_tokens_per_second", "Tokens written a second", value=self.sample())
        for name, (about, field) in COUNTERS.items():
            yield CounterMetricFamily(f"lorax_{name}", about, value=getattr(stats, field))
        for name, (about, label, fields) in LABELLED.items():
            family = CounterMetricFamily(f"lorax_{name}", about, labels=[label])
            for value, field in fields.items():
                family.add_metric([value], getattr(stats, field))
            yield family
        pages = GaugeMetricFamily("lorax_pages", "Pages of the pool, by what they hold", labels=["holds"])
        for value, field in PAGES.items():
            pages.add_metric([value], getattr(stats, field))
        yield pages
        ends = CounterMetricFamily("lorax_finished_requests", "Requests that ended", labels=["reason"])
        for reason, count in sorted(stats.finished.items()):
            ends.add_metric([reason], count)
        yield ends
        for name, (about, field) in ADAPTERS.items():
            family = CounterMetricFamily(f"lorax_{name}", about, labels=["adapter"])
            for adapter, row in sorted(stats.adapters.items()):
                family.add_metric([adapter or "(base)"], getattr(row, field))
            yield family


class _Seen:
    """A registry without the rows of adapters that a key may not use."""

    def __init__(self, registry: CollectorRegistry, key: Key):
        self._registry, self._key = registry, key

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            rows = [s for s in metric.samples if "adapter" not in s.labels or self._may(s.labels["adapter"])]
            seen = Metric(metric.name, metric.documentation, metric.type)
            seen.samples = rows
            yield seen

    def _may(self, adapter: str) -> bool:
        return adapter == "(base)" or self._key.may_use(adapter)
