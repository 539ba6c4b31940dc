"""Metrics in Prometheus' format: vLLM's names where it has one, ours under ``ktrt:``.

The engine's numbers are read when somebody scrapes; only what a request experiences is observed as
it happens. The registry is the server's own, so that two servers share no process-wide numbers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Metric

    from ktrt.serve.memory_limit import MemoryLimit
    from ktrt.session import Session

# Seconds. vLLM's borders, which dashboards have, and longer ones: a CPU's prefill takes minutes.
_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640,
)  # fmt: skip
_BETWEEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
)  # fmt: skip
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)

# Fields of ``SchedulerStats`` as metrics: (name, field, explanation).
_GAUGES = (
    ("vllm:num_requests_running", "running", "Answers that have a slot."),
    ("vllm:num_requests_waiting", "waiting", "Answers that wait for a slot."),
    ("ktrt:num_requests_paused", "paused", "Answers with a slot that wait for their caller."),
    ("ktrt:kv_tokens", "kv_tokens", "Tokens whose keys and values are held."),
    ("ktrt:kv_bytes", "kv_bytes", "Bytes of keys and values of running answers."),
    ("ktrt:kv_idle_bytes", "kv_idle_bytes", "Bytes of keys and values kept for prefixes."),
    ("ktrt:step_seconds_last", "last_step_seconds", "Measured time of the latest step."),
    ("ktrt:step_seconds_predicted", "predicted_step_seconds", "Predicted time of that step."),
    ("ktrt:step_tokens_last", "last_step_tokens", "Tokens of the latest step."),
    ("ktrt:distinct_experts", "distinct_experts", "Experts of a layer that the latest step read."),
    ("ktrt:read_bandwidth_bytes_per_second", "read_bandwidth", "Bandwidth of the latest steps."),
)
_COUNTERS = (
    ("vllm:prefix_cache_queries", "prefix_query_tokens", "Prompt tokens looked up in the cache."),
    ("vllm:prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens that the cache held."),
    ("vllm:prompt_tokens", "prompt_tokens", "Tokens of computed prompts."),
    ("vllm:generation_tokens", "generated_tokens", "Generated tokens."),
    ("ktrt:steps", "steps", "Steps of the model."),
    ("ktrt:failed_steps", "failed_steps", "Steps that failed."),
    ("ktrt:step_seconds", "step_seconds", "Seconds in steps."),
    ("ktrt:bytes_read", "bytes_read", "Bytes of weights, keys and values that steps read."),
    ("ktrt:requests_cancelled", "cancelled", "Answers that were ended before their end."),
    ("ktrt:requests_failed", "failed", "Answers that failed."),
)
# Fields of ``ResidentCounts``.
_RESIDENTS = (
    ("ktrt:gpu_expert_hits", "hits", "Chosen experts of decode steps that were on the GPU."),
    ("ktrt:gpu_expert_misses", "misses", "Those that were not."),
    ("ktrt:gpu_expert_uploads", "uploads", "Experts copied to the GPU."),
    ("ktrt:gpu_expert_upload_bytes", "upload_bytes", "Their bytes."),
    ("ktrt:gpu_expert_adoptions", "adopted", "Experts kept on the GPU after a streamed prompt."),
    ("ktrt:gpu_expert_evictions", "evictions", "Experts that made room for these."),
)


class Metrics:
    """All metrics of a server whose base model is called ``model``."""

    def __init__(self, session: Session, model: str, limit: MemoryLimit) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        # The answers under way.
        self.live: set[Observer] = set()
        self.registry.register(_Engine(session, model, self.live, limit))

        def histogram(name: str, text: str, borders: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=borders, registry=self.registry)
            found: Histogram = made.labels(model)
            return found

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=self.registry)

        self.first = histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token.", _FIRST
        )
        self.between = histogram(
            "vllm:inter_token_latency_seconds", "Time between two tokens.", _BETWEEN
        )
        self.queued = histogram(
            "vllm:request_queue_time_seconds", "Time until an answer got a slot.", _WHOLE
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds", "Time to the end of an answer.", _WHOLE
        )
        self._ended = counter("vllm:request_success", "Complete answers.", "finished_reason")
        self._adapters = counter("ktrt:adapter_answers", "Answers begun, by adapter.", "adapter")
        self._refused = counter("ktrt:requests_refused", "Requests that found the queue full.")
        self._refused.labels(model)  # shown from the start

    def ended(self, reason: str) -> None:
        """Counts a complete answer."""
        self._ended.labels(self._model, reason).inc()

    def refused(self) -> None:
        """Counts a request that found the queue full."""
        self._refused.labels(self._model).inc()

    def observe(self, adapter: str, summands: Iterable[str] = ()) -> Observer:
        """Returns an observer for an answer of ``adapter`` ("" is the base) that begins.

        ``summands``: a sum's adapters. Each is counted, but not the sum: labels stay for ever, and
        clients choose the weights.
        """
        for name in summands or [adapter or self._model]:
            self._adapters.labels(self._model, name).inc()
        return Observer(self, adapter)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Observer:
    """Measures one answer. The clock starts with the object."""

    def __init__(self, metrics: Metrics, adapter: str) -> None:
        self.adapter, self.has_slot = adapter, False
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last: float | None = None
        metrics.live.add(self)

    def started(self) -> None:
        """Notes that the answer has a slot."""
        if not self.has_slot:
            self.has_slot = True
            self._metrics.queued.observe(time.perf_counter() - self._began)

    def token(self) -> None:
        """Notes a token."""
        self.started()
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first.observe(now - self._began)
        else:
            self._metrics.between.observe(now - self._last)
        self._last = now

    def finished(self, reason: str) -> None:
        """Notes the answer's last token."""
        self._metrics.whole.observe(time.perf_counter() - self._began)
        self._metrics.ended(reason)

    def left(self) -> None:
        """Notes that nothing more comes, for whatever reason."""
        self._metrics.live.discard(self)


class _Engine(Collector):
    """Reads the scheduler's numbers when somebody asks for metrics."""

    def __init__(
        self, session: Session, model: str, live: set[Observer], limit: MemoryLimit
    ) -> None:
        self._session, self._model = session, model
        self._live, self._limit = live, limit

    def describe(self) -> Iterable[Metric]:
        """Returns nothing: the registry would collect to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the numbers of this moment."""
        if not self._session.alive:
            yield self._gauge("ktrt:engine_alive", "Whether the engine answers.", 0)
            return
        stats = self._session.stats()
        yield self._gauge("ktrt:engine_alive", "Whether the engine answers.", 1)
        for name, of, text in _GAUGES:
            if (value := getattr(stats, of)) is not None:
                yield self._gauge(name, text, value)
        yield from self._counters(_COUNTERS, stats)
        if stats.residents is not None:
            yield from self._counters(_RESIDENTS, stats.residents)
        budget = stats.kv_budget_bytes
        if budget:
            usage = min(1.0, stats.kv_bytes / budget)
            yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV memory in use.", usage)
        share = self._limit.share(stats.read_bandwidth)
        if share is not None:
            yield self._gauge("ktrt:bandwidth_share", "Share of the machine's bandwidth.", share)
        yield self._loras()

    def _counters(
        self, wanted: Iterable[tuple[str, str, str]], numbers: object
    ) -> Iterator[Metric]:
        for name, of, text in wanted:
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], getattr(numbers, of))
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _loras(self) -> Metric:
        live = list(self._live)
        running = sorted({each.adapter for each in live if each.adapter and each.has_slot})
        waiting = sorted({each.adapter for each in live if each.adapter and not each.has_slot})
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of answers under way; the value is a time.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )  # fmt: skip
        most = str(len(self._session.adapters.names))
        family.add_metric([most, ",".join(waiting), ",".join(running)], time.time())
        return family
