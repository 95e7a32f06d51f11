"""Figures for Prometheus, under the names that dashboards for vLLM know.

docs/serving.md lists them. They are in a registry of their own, so that several servers may live in
one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from qwen_jax.engine.settings import Generator

if TYPE_CHECKING:
    from qwen_jax.serve.jobs import Job

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_LABELS = ("model_name",)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_FIRST = (*_FIRST, 40, 80, 160)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
_EACH = (*_EACH, 2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))
_COUNTS = (1, 2, 5, 10, 20, 50, 100)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("from arrival to the first token", _FIRST),
    "inter_token_latency_seconds": ("between two tokens of a sequence", _EACH),
    "request_time_per_output_token_seconds": ("mean time between tokens of a sequence", _EACH),
    "e2e_request_latency_seconds": ("from arrival to the end", _WHOLE),
    "request_queue_time_seconds": ("from arrival to a row", _WHOLE),
    "request_prefill_time_seconds": ("from a row to the first token", _WHOLE),
    "request_decode_time_seconds": ("from the first token to the last", _WHOLE),
    "request_prompt_tokens": ("tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("new tokens of a sequence", _TOKENS),
    "request_params_n": ("n of a request", _COUNTS),
    "request_params_max_tokens": ("most new tokens of a sequence", _TOKENS),
}


class Metrics:
    """The figures of a server.

    name: the label model_name, of all figures.
    """

    def __init__(self, generator: Generator, name: str):
        self._registry, self._name = prometheus_client.CollectorRegistry(), name
        self._histograms = {
            key: prometheus_client.Histogram(
                f"vllm:{key}", text, _LABELS, registry=self._registry, buckets=buckets
            ).labels(name)
            for key, (text, buckets) in _HISTOGRAMS.items()
        }
        self._success = prometheus_client.Counter(
            "vllm:request_success",
            "sequences that have ended",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(name, reason)  # shown from the start, as 0
        self._registry.register(_Engine(generator, name))

    def token(self, job: "Job", at: float) -> None:
        """Count a new token of a sequence, at a time in seconds."""
        if job.first:
            self._histograms["inter_token_latency_seconds"].observe(at - job.last)
        else:
            self._histograms["time_to_first_token_seconds"].observe(at - job.arrived)

    def request(self, n: int) -> None:
        """Count a request of so many sequences for each prompt."""
        self._histograms["request_params_n"].observe(n)

    def ended(self, job: "Job", reason: str, at: float) -> None:
        """Count a sequence that has ended: "stop", "length", or for another reason."""
        known = {"stop": "stop", "length": "length", "failed": "error"}
        self._success.labels(self._name, known.get(reason, "abort")).inc()
        figures: dict[str, float] = {
            "e2e_request_latency_seconds": at - job.arrived,
            "request_prompt_tokens": len(job.prompt),
            "request_generation_tokens": job.tokens,
            "request_params_max_tokens": job.settings.max_new_tokens,
        }
        if job.started:
            figures["request_queue_time_seconds"] = job.started - job.arrived
        if job.first:
            figures["request_prefill_time_seconds"] = job.first - (job.started or job.arrived)
            figures["request_decode_time_seconds"] = job.last - job.first
        if job.tokens > 1:
            mean = (job.last - job.first) / (job.tokens - 1)
            figures["request_time_per_output_token_seconds"] = mean
        for key, figure in figures.items():
            self._histograms[key].observe(figure)

    def text(self) -> bytes:
        """Return all figures in the format of Prometheus."""
        return prometheus_client.generate_latest(self._registry)


class _Engine(Collector):
    """Reads the figures of the engine when they are asked for."""

    def __init__(self, generator: Generator, name: str):
        self._generator, self._name = generator, name

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's gauges, counters and histogram."""
        load = self._generator.load()
        for key, text, value in (
            ("num_requests_running", "sequences in rows", load.running),
            ("num_requests_waiting", "sequences without a row", load.waiting),
            ("kv_cache_usage_perc", "share of the pages in use", load.used / max(load.pages, 1)),
        ):
            gauge = GaugeMetricFamily(f"vllm:{key}", text, labels=_LABELS)
            gauge.add_metric((self._name,), value)
            yield gauge
        for key, text, value in (
            ("prefix_cache_queries", "prompt tokens looked up in the cache", load.queried),
            ("prefix_cache_hits", "prompt tokens found in the cache", load.hits),
            ("num_preemptions", "sequences that had to give up their pages", load.preemptions),
            ("prompt_tokens", "prompt tokens computed, without cache hits", load.prompt_tokens),
            ("generation_tokens", "new tokens", load.new_tokens),
            ("engine_steps", "steps of the devices", load.steps),
        ):
            counter = CounterMetricFamily(f"vllm:{key}", text, labels=_LABELS)
            counter.add_metric((self._name,), value)
            yield counter
        tokens = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "tokens of a step of the devices", labels=_LABELS
        )
        total = sum(size * steps for size, steps in load.step_tokens.items())
        tokens.add_metric((self._name,), _buckets(load.step_tokens, bounds=_STEP), sum_value=total)
        yield tokens


def _buckets(found: Mapping[int, int], *, bounds: Sequence[int]) -> list[tuple[str, float]]:
    """Return how many values are at most each bound, and then all.

    found: the number of times of each value.
    """
    below = [(bound, sum(n for x, n in found.items() if x <= bound)) for bound in bounds]
    return [*((f"{bound}.0", n) for bound, n in below), ("+Inf", sum(found.values()))]
