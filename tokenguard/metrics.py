"""Counters of what happens to calls, and their exposition for Prometheus.

No label comes from a caller: ids and models never do, so the number of time series is bounded.
When no call is running, tokens reserved + overrun == settled + refunded.

Source: https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenguard._version import __version__
from tokenguard.account import Account
from tokenguard.backends import Backend

_UPSTREAM_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 5, 10)


class Metrics:
    """Counts what happens to calls.

    Args:
        backend: Where the buckets live; its counters are shown too.
    """

    def __init__(self, backend: Backend) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "tokenguard_requests", "Requests answered, by route and status.", ("route", "status"),
            registry=registry,
        )  # fmt: skip
        self._in_flight = _gauge(registry, "calls_in_flight", "Calls that are not over yet.")
        self._open = _gauge(
            registry, "reservations_open", "Reservations neither settled nor refunded nor kept as spent yet."
        )
        self._reserved = _counter(registry, "tokens_reserved", "Estimated tokens of admitted calls.")
        self._settled = _counter(registry, "tokens_settled", "Tokens that calls were charged in the end.")
        self._refunded = _counter(registry, "tokens_refunded", "Reserved tokens that were given back.")
        self._overrun = _counter(registry, "tokens_overrun", "Tokens charged beyond what had been reserved.")
        self._refusals = Counter(
            "tokenguard_refusals",
            "Calls refused, by the kind of the scope whose budget did not suffice, and by what it counts.",
            ("scope", "meter"),
            registry=registry,
        )
        self._lost = _counter(
            registry, "settlements_lost", "Reservations kept as spent because the buckets were not to be had."
        )
        self._upstream = Counter(
            "tokenguard_upstream_answers", "Answers of the provider to calls, by status.", ("status",),
            registry=registry,
        )  # fmt: skip
        self._upstream_failures = _counter(
            registry, "upstream_failures", "Calls that the provider did not answer, or whose answer broke off."
        )
        self._upstream_s = Histogram(
            "tokenguard_upstream_seconds",
            "Time from a call's being forwarded to the head of the provider's answer.",
            buckets=_UPSTREAM_S,
            registry=registry,
        )
        self._ratio = Histogram(
            "tokenguard_estimate_ratio",
            "Tokens used to tokens estimated, for calls whose usage was told: below 1 too much was reserved.",
            buckets=_RATIOS,
            registry=registry,
        )
        registry.register(BackendCollector(backend))
        ProcessCollector(registry=registry)

    def answered(self, route: str | None, status: int) -> None:
        """Count a request of any kind; ``route`` is None for a path that is not there."""
        self._requests.labels(route or "other", str(status)).inc()

    def began(self) -> None:
        """Count a call that has begun."""
        self._in_flight.inc()

    def admitted(self, account: Account) -> None:
        """Count a reservation."""
        self._open.inc()
        self._reserved.inc(account.estimate)

    def settled(self, account: Account) -> None:
        """Count what became of a reservation."""
        self._open.dec()
        unused = account.estimate - account.charged
        self._settled.inc(account.charged)
        if unused > 0:
            self._refunded.inc(unused)
        elif unused < 0:
            self._overrun.inc(-unused)
        if account.usage_told and account.estimate:
            self._ratio.observe(account.charged / account.estimate)

    def settlement_lost(self) -> None:
        """Count a settlement that could not be carried out."""
        self._lost.inc()

    def upstream_answered(self, account: Account) -> None:
        """Count the head of the provider's answer."""
        self._upstream.labels(str(account.upstream_status)).inc()
        self._upstream_s.observe(account.upstream_s or 0.0)

    def upstream_failed(self) -> None:
        """Count a failure of the provider."""
        self._upstream_failures.inc()

    def ended(self, account: Account) -> None:
        """Count a call that is over."""
        self._in_flight.dec()
        if (bucket := account.refused_by) is not None:
            self._refusals.labels(bucket.scope.kind, bucket.meter.value).inc()

    def exposition(self, accept: str | None) -> tuple[str, bytes]:
        """Return the content type and the text of all metrics, in the format that is asked for."""
        encode, content_type = choose_encoder(accept or "")
        return content_type, encode(self._registry)


class BackendCollector(Collector):
    """Shows a backend's own counters."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterable[Metric]:
        """Yield them as they are now."""
        stats = self._backend.stats()
        for kind, metrics in _BACKEND_METRICS.items():
            for name, shown, what in metrics:
                if name in stats:
                    yield kind(f"tokenguard_{shown}", what, stats[name])
        info = GaugeMetricFamily("tokenguard_info", "What runs.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info


_BACKEND_METRICS: dict[Callable[[str, str, int], Metric], tuple[tuple[str, str, str], ...]] = {
    GaugeMetricFamily: (
        ("buckets", "buckets", "Buckets that there is room for."),
        ("used", "buckets_used", "Buckets in use."),
        ("up", "redis_up", "Whether budgets are shared: 0 while Redis is not to be had."),
        ("owed", "redis_owed_buckets", "Buckets of which Redis has to be told something when it is back."),
    ),
    CounterMetricFamily: (
        ("reclaimed", "buckets_reclaimed", "Full buckets that made room for others."),
        ("refused_full", "buckets_refused", "Calls refused because no bucket was free."),
        ("clock_steps", "clock_steps", "Times that the clock went back by more than a second."),
        (
            "forgiven",
            "tokens_forgiven",
            "Tokens that fell below the floor of a bucket's debt, summed over buckets.",
        ),
        ("batches", "redis_batches", "Scripts that Redis ran for calls."),
        ("batched", "redis_batched", "Calls that it evaluated in them."),
        ("unanswered", "redis_unanswered", "Batches whose answer did not come: what they reserved stays taken."),
        ("outages", "redis_outages", "Times that Redis was lost."),
        ("own", "redis_own", "Calls that were admitted without Redis, as the policy says."),
        ("dropped", "redis_dropped_tokens", "Tokens of settlements forgotten for want of room."),
    ),
}
"""For each counter of a backend, as what it is shown; no backend has all."""


def _counter(registry: CollectorRegistry, name: str, what: str) -> Counter:
    return Counter(f"tokenguard_{name}", what, registry=registry)


def _gauge(registry: CollectorRegistry, name: str, what: str) -> Gauge:
    return Gauge(f"tokenguard_{name}", what, registry=registry)
