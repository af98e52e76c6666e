"""What this gateway measures, in vLLM's names and units.

All observations are made on the event loop, so plain lists do: an observation costs a bisect, a
tenth of what prometheus_client's locked counters cost. They are turned into its families when read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway.census import Census
from gateway.hub import Hub
from gateway.models import Models
from shared import messages

LABELS = ("model_name", "priority")
MOST_SERIES = 512
"""Pairs of model and priority that are told apart; further ones are counted together."""
WINDOW_S = 60.0
MOST_IN_WINDOW = 8192
_PARTS = ("queue", "prefill", "decode")

_TOKEN_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)
_REQUEST_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)


class Distribution:
    """A histogram: how many observations fell into each bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """The cumulative counts by upper bound, as Prometheus has them."""
        found, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(below)))
        return found


@dataclass(slots=True)
class Series:
    """Everything measured for one model and priority."""

    first_token: Distribution = field(default_factory=lambda: Distribution(_REQUEST_BOUNDS))
    inter_token: Distribution = field(default_factory=lambda: Distribution(_TOKEN_BOUNDS))
    end_to_end: Distribution = field(default_factory=lambda: Distribution(_REQUEST_BOUNDS))
    queue_time: Distribution = field(default_factory=lambda: Distribution(_REQUEST_BOUNDS))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    limited: int = 0
    ended: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request in the sliding window."""

    at: float
    total_s: float
    tokens: int
    failed: bool


class Meter:
    """Measures one stream. Times are the event loop's.

    Args:
        series: where it counts. window: the model's finished requests. started: when it came in.
        prompt_tokens: counted with the first token.
        resumed: its beginning was measured elsewhere; only its end is of interest.
    """

    __slots__ = (
        "_prompt_tokens",
        "_resumed",
        "_series",
        "_started",
        "_window",
        "first_at",
        "last_at",
        "tokens",
    )

    def __init__(
        self,
        series: Series,
        window: deque[Finished],
        started: float,
        prompt_tokens: int,
        *,
        resumed: bool = False,
    ) -> None:
        self._series = series
        self._window = window
        self._started = started
        self._prompt_tokens = prompt_tokens
        self._resumed = resumed
        self.first_at = 0.0
        self.last_at = 0.0
        self.tokens = 0

    def count(self, now: float, tokens: int) -> None:
        """Some tokens arrived together."""
        if self._resumed:
            return
        series = self._series
        if self.tokens:
            series.inter_token.observe((now - self.last_at) / tokens)
        else:
            self.first_at = now
            series.first_token.observe(now - self._started)
            series.prompt_tokens += self._prompt_tokens
        self.last_at = now
        self.tokens += tokens
        series.generated_tokens += tokens

    def end(self, now: float, end: messages.End, tokens: int) -> None:
        """The request ended, with so many tokens in all."""
        series = self._series
        series.ended[end.reason] = series.ended.get(end.reason, 0) + 1
        total_s = now - self._started
        if self._resumed and end.timings:
            total_s = sum(end.timings.get(part, 0.0) for part in _PARTS) / 1000
        series.end_to_end.observe(total_s)
        if "queue" in end.timings:
            series.queue_time.observe(end.timings["queue"] / 1000)
        failed = end.reason not in ("stop", "length", "cancelled", "abandoned")
        self._window.append(Finished(now, total_s, tokens, failed))


class Metrics(Collector):
    """All series of this gateway, and the families made from them.

    Attributes:
        resumes: streams that went on here. connections, streams: ask how many there are now.
    """

    def __init__(self, models: Models, census: Census, hub: Hub) -> None:
        self._models = models
        self._census = census
        self._hub = hub
        self._series: dict[tuple[str, str], Series] = {}
        self._windows: dict[str, deque[Finished]] = {}
        self.resumes = 0
        self.connections: Callable[[], int] = lambda: 0
        self.streams: Callable[[], int] = lambda: 0

    def meter(
        self, model: str, cls: str, started: float, prompt_tokens: int, *, resumed: bool = False
    ) -> Meter:
        """A meter for a new request, or for the end of one that goes on here."""
        name, series = self._find(model, cls)
        window = self._windows.setdefault(name, deque(maxlen=MOST_IN_WINDOW))
        return Meter(series, window, started, prompt_tokens, resumed=resumed)

    def count_limited(self, model: str, cls: str) -> None:
        """A request was refused for its caller's limits."""
        self._find(model, cls)[1].limited += 1

    def summary(self, now: float) -> dict[str, dict[str, float]]:
        """Each model's last minute: percentiles of ms to the end, tokens/s, requests/s, errors."""
        found = {}
        for model, window in self._windows.items():
            while window and now - window[0].at > WINDOW_S:
                window.popleft()
            # A full window is shorter than a minute.
            is_full = len(window) == window.maxlen
            span = max(1.0, now - window[0].at) if is_full else WINDOW_S
            times = sorted(item.total_s * 1000 for item in window if not item.failed)
            failed = sum(item.failed for item in window)
            found[model] = {
                "p50": _percentile(times, 0.50),
                "p95": _percentile(times, 0.95),
                "p99": _percentile(times, 0.99),
                "throughput": round(sum(item.tokens for item in window) / span, 3),
                "requests_per_s": round(len(window) / span, 3),
                "error_rate": round(failed / len(window), 4) if window else 0.0,
            }
        return found

    def collect(self) -> Iterable[Metric]:
        """The families, as prometheus_client wants them."""
        yield from self._histograms()
        yield from self._counters()
        yield from self._gauges()

    def _find(self, model: str, cls: str) -> tuple[str, Series]:
        """The series, and the model's name in it."""
        if (model, cls) not in self._series and len(self._series) >= MOST_SERIES:
            model = "other"
        return model, self._series.setdefault((model, cls), Series())

    def _histograms(self) -> Iterable[Metric]:
        for name, text, attribute in (
            ("time_to_first_token", "From the request to its first token.", "first_token"),
            ("inter_token_latency", "Between a token and the one before.", "inter_token"),
            ("e2e_request_latency", "From the request to its end.", "end_to_end"),
            ("request_queue_time", "Waiting in the queue.", "queue_time"),
        ):
            family = HistogramMetricFamily(f"rts_{name}_seconds", text, labels=LABELS)
            for key, series in self._series.items():
                found: Distribution = getattr(series, attribute)
                family.add_metric(key, found.buckets(), found.total)
            yield family

    def _counters(self) -> Iterable[Metric]:
        prompt = CounterMetricFamily("rts_prompt_tokens", "Tokens of prompts.", labels=LABELS)
        generated = CounterMetricFamily(
            "rts_generation_tokens", "Tokens relayed to clients.", labels=LABELS
        )
        success = CounterMetricFamily(
            "rts_request_success", "Ended requests.", labels=(*LABELS, "finished_reason")
        )
        limited = CounterMetricFamily(
            "rts_rate_limited", "Requests refused for their caller's limits.", labels=LABELS
        )
        for key, series in self._series.items():
            limited.add_metric(key, series.limited)
            prompt.add_metric(key, series.prompt_tokens)
            generated.add_metric(key, series.generated_tokens)
            for reason, count in series.ended.items():
                success.add_metric((*key, reason), count)
        yield from (prompt, generated, success, limited)
        yield from self._engine_counters()
        yield from self._queue_counters()
        yield CounterMetricFamily(
            "rts_stream_gaps", "Messages that were lost and read from a log.", value=self._hub.gaps
        )
        yield CounterMetricFamily(
            "rts_stream_recoveries",
            "Requests that Redis had lost and that were queued again.",
            value=self._hub.recoveries,
        )
        yield CounterMetricFamily("rts_stream_resumes", "Streams resumed.", value=self.resumes)

    def _engine_counters(self) -> Iterable[Metric]:
        for name, text, counter in (
            ("prefix_cache_queries", "Tokens looked for in prefix caches.", "prefix_queries"),
            ("prefix_cache_hits", "Tokens found in prefix caches.", "prefix_hits"),
            (
                "num_preemptions",
                "Sequences that gave up their place to be computed.",
                "preemptions",
            ),
            ("fenced_emits", "Sequences dropped since another engine owned them.", "fenced"),
        ):
            family = CounterMetricFamily(f"rts_{name}", text, labels=("model_name",))
            for model in self._models.served()[:MOST_SERIES]:
                family.add_metric((model.name,), self._census.of(model.mv).totals[counter])
            yield family

    def _queue_counters(self) -> Iterable[Metric]:
        again = CounterMetricFamily(
            "rts_request_redeliveries", "Requests taken over from an engine.", labels=LABELS
        )
        dead = CounterMetricFamily(
            "rts_dead_letters", "Requests given up: their engines died of them.", labels=LABELS
        )
        for model in self._models.served()[:MOST_SERIES]:
            for cls, count in self._census.of(model.mv).queues.items():
                again.add_metric((model.name, cls), count.redelivered)
                dead.add_metric((model.name, cls), count.dead_letters)
        yield from (again, dead)

    def _gauges(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("rts_num_requests_running", "Being generated.", labels=LABELS)
        waiting = GaugeMetricFamily("rts_num_requests_waiting", "In the queue.", labels=LABELS)
        depth = GaugeMetricFamily("rts_queue_depth", "In the queue.", labels=LABELS)
        oldest = GaugeMetricFamily(
            "rts_queue_oldest_seconds", "Age of the queue's first request.", labels=LABELS
        )
        workers = GaugeMetricFamily("rts_workers", "Live engines.", labels=("model_name",))
        cache = GaugeMetricFamily(
            "rts_kv_cache_usage_perc", "Share of the KV cache in use, 0..1.", labels=("model_name",)
        )
        for model in self._models.served()[:MOST_SERIES]:
            version = self._census.of(model.mv)
            for cls, count in version.queues.items():
                key = (model.name, cls)
                running.add_metric(key, count.running)
                waiting.add_metric(key, count.waiting)
                depth.add_metric(key, count.waiting)
                oldest.add_metric(key, count.oldest_s)
            workers.add_metric((model.name,), len(version.engines))
            cache.add_metric((model.name,), version.kv_usage)
        yield from (running, waiting, depth, oldest, workers, cache)
        yield GaugeMetricFamily(
            "rts_connections", "Open connections of clients.", value=self.connections()
        )
        yield GaugeMetricFamily("rts_streams", "Streams relayed now.", value=self.streams())


def _percentile(ordered: list[float], share: float) -> float:
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
