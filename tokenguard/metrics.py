"""Counters of what happens to calls, and their exposition for Prometheus.

They are tallies of the node's table, so that whichever of its processes is asked, all are told of. No label comes
from a caller but the names of models, and those only once a provider has told a usage, and of 32 at most: the
number of time series is bounded. When no call is running, tokens reserved + overrun == settled + refunded.

Source: https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tokenguard._bucket import BucketTable, Tally
from tokenguard._version import __version__
from tokenguard.account import Account
from tokenguard.backends import Backend
from tokenguard.backends.workers import counted, living

_COUNTERS = {
    "tokens_reserved": "Estimated tokens of admitted calls.",
    "tokens_settled": "Tokens that calls were charged in the end.",
    "tokens_refunded": "Reserved tokens that were given back.",
    "tokens_overrun": "Tokens charged beyond what had been reserved.",
    "settlements_lost": "Reservations kept as spent because the buckets were not to be had.",
    "state_failures": "Times that the state could not be written.",
    "upstream_failures": "Calls that the provider did not answer, or whose answer broke off.",
}
_GAUGES = {
    "calls_in_flight": "Calls that are not over yet.",
    "reservations_open": "Reservations neither settled nor refunded nor kept as spent yet.",
    "provider_others_tokens_per_minute": "About what others spend of what the provider's key is granted.",
    "provider_others_requests_per_minute": "About how many requests others make with the provider's key.",
}
_LABELLED: dict[str, tuple[tuple[str, ...], str]] = {
    "requests": (("route", "status"), "Requests answered, by route and status."),
    "refusals": (
        ("scope", "meter"),
        "Calls refused, by the kind of the scope whose budget did not suffice, or provider if the limit is the "
        "provider's own, and by what it counts.",
    ),
    "upstream_answers": (("status",), "Answers of the provider to calls, by status."),
    "provider_limits": (("what",), "What happened to what the provider tells of its own limits, by what it was."),
}
_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "upstream_seconds": (
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
        "Time from a call's being forwarded to the head of the provider's answer.",
    ),
    "estimate_ratio": (
        (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 5, 10),
        "Tokens used to tokens estimated, for calls whose usage was told: below 1 too much was reserved.",
    ),
}
_ERROR = "estimate_error"
_ERRORS = (-0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 4.0)
"""Errors of estimates, as parts of what was used, that calls are counted between; none is below -1."""
_FIRST_ABOVE = _ERRORS.index(0.0) + 1
_QUANTILES = (0.5, 0.95)
_OF = ("prompt", "total")
_OTHER = "other"
MAX_MODELS = 32
"""Of how many models errors are told apart, whichever come first; the rest counts together."""
MAX_MODEL_BYTES = 64
"""A model with a longer name counts with the rest: a tally's name is bounded."""
_SEPARATOR = "\x1f"
_MILLION = 1_000_000


class Metrics:
    """Counts what happens to calls.

    Args:
        backend: Where the buckets live; its counters are shown too.
    """

    def __init__(self, backend: Backend) -> None:
        table = backend.table
        self._registry = CollectorRegistry()
        self._registry.register(NodeCollector(backend))
        counts = {name: _tally(table, name) for name in (*_COUNTERS, *_GAUGES)}
        self._in_flight = counts["calls_in_flight"]
        self._open = counts["reservations_open"]
        self._reserved = counts["tokens_reserved"]
        self._settled = counts["tokens_settled"]
        self._refunded = counts["tokens_refunded"]
        self._overrun = counts["tokens_overrun"]
        self._lost = counts["settlements_lost"]
        self._failures = counts["upstream_failures"]
        self._seconds = _Histogram(table, "upstream_seconds")
        self._ratio = _Histogram(table, "estimate_ratio")
        self._errors = _Errors(table)
        self._requests = _Labelled(table, "requests")
        self._refusals = _Labelled(table, "refusals")
        self._answers = _Labelled(table, "upstream_answers")
        self._limits = _Labelled(table, "provider_limits")

    def answered(self, route: str | None, status: int) -> None:
        """Count a request of any kind; ``route`` is None for a path that is not there."""
        self._requests.of((route or "other", status)).add()

    def began(self) -> None:
        """Count a call that has begun."""
        self._in_flight.add()

    def admitted(self, account: Account) -> None:
        """Count a reservation."""
        self._open.add()
        self._reserved.add(account.estimate)

    def settled(self, account: Account) -> None:
        """Count what became of a reservation."""
        self._open.add(-1)
        unused = account.estimate - account.charged
        self._settled.add(account.charged)
        if unused > 0:
            self._refunded.add(unused)
        elif unused < 0:
            self._overrun.add(-unused)
        if account.usage_told and account.estimate:
            self._ratio.observe(account.charged / account.estimate)
            errors = self._errors.of(account.model or _OTHER)
            errors.count(0, account.prompt_estimate, account.prompt)
            errors.count(1, account.estimate, account.charged)

    def settlement_lost(self) -> None:
        """Count a settlement that could not be carried out."""
        self._lost.add()

    def upstream_answered(self, account: Account) -> None:
        """Count the head of the provider's answer."""
        self._answers.of((account.upstream_status,)).add()
        self._seconds.observe(account.upstream_s or 0.0)

    def upstream_failed(self) -> None:
        """Count a failure of the provider."""
        self._failures.add()

    def provider_told(self, what: str) -> None:
        """Count what happened to what the provider tells of its own limits."""
        self._limits.of((what,)).add()

    def ended(self, account: Account) -> None:
        """Count a call that is over."""
        self._in_flight.add(-1)
        if (bucket := account.refused_by) is not None:
            # PERF: to ask for a member's value as usual takes a call of Python's; row "a call that is refused"
            whose = bucket.scope.kind if bucket.source is None else "provider"
            self._refusals.of((whose, bucket.meter._value_)).add()

    def exposition(self, accept: str | None) -> tuple[str, bytes]:
        """Return the content type and the text of all metrics, in the format that is asked for."""
        encode, content_type = choose_encoder(accept or "")
        return content_type, encode(self._registry)


class _Labelled:
    """The tallies of one name, by the values of its labels: not many, for none comes from a caller."""

    def __init__(self, table: BucketTable, name: str) -> None:
        self._table = table
        self._name = name
        self._tallies: dict[tuple[object, ...], Tally] = {}

    def of(self, labels: tuple[object, ...]) -> Tally:
        """Return what counts under some values."""
        tally = self._tallies.get(labels)
        if tally is None:
            tally = self._tallies[labels] = _tally(self._table, self._name, *map(str, labels))
        return tally


class _Histogram:
    """Counts how often a value was within each of some bounds, and adds the values up in millionths."""

    def __init__(self, table: BucketTable, name: str) -> None:
        self._bounds, _ = _HISTOGRAMS[name]
        self._tallies = [_tally(table, name, bound) for bound in _bounds_of(self._bounds)]
        self._sum = _tally(table, name, "sum")

    def observe(self, value: float) -> None:
        """Count a value, which is at least 0."""
        within = 0
        for bound in self._bounds:
            if value <= bound:
                break
            within += 1
        tally = self._tallies[within]
        tally.add()
        self._sum.add(int(value * _MILLION + 0.5))


class _ModelErrors:
    """Counts how far estimates for one model were off."""

    def __init__(self, table: BucketTable, model: str) -> None:
        self._table = table
        self._model = model
        self._tallies: list[Tally | None] = [None] * (len(_OF) * len(_bounds_of(_ERRORS)))

    def count(self, of: int, estimated: int, used: int) -> None:
        """Count an estimate of what stands in ``_OF`` at ``of``; what used nothing has no error."""
        if used <= 0:
            return
        error = estimated / used - 1
        within = 0
        for bound in _ERRORS:
            if error <= bound:
                break
            within += 1
        number = of * (len(_ERRORS) + 1) + within
        tally = self._tallies[number]
        if tally is None:
            tally = self._tallies[number] = self.tally(of, within)
        tally.add()

    def tally(self, of: int, within: int) -> Tally:
        """Return what counts errors within a bound."""
        return _tally(self._table, _ERROR, self._model, _OF[of], _bounds_of(_ERRORS)[within])


class _Errors:
    """The errors of estimates by model.

    Whichever process is the first to meet a model takes a tally for it; which models are among the first is told
    by the order in which all processes took theirs.
    """

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._models: dict[str, _ModelErrors] = {}
        self._other = _ModelErrors(table, _OTHER)
        self._full = False

    def of(self, model: str) -> _ModelErrors:
        """Return what counts for a model of which a usage was told."""
        errors = self._models.get(model)
        if errors is None and not self._full:
            self._meet(model)
            errors = self._models.get(model)
        return self._other if errors is None else errors

    def _meet(self, model: str) -> None:
        """Have a model counted apart if there is room, with those that other processes met."""
        if model == _OTHER or len(model.encode()) > MAX_MODEL_BYTES:
            return
        known = _models_of(self._table)
        if model not in known and len(known) < MAX_MODELS:
            _ModelErrors(self._table, model).tally(0, len(_ERRORS))
            known = _models_of(self._table)
        for name in known:
            if name not in self._models:
                self._models[name] = _ModelErrors(self._table, name)
        self._full = len(known) == MAX_MODELS


def _models_of(table: BucketTable) -> list[str]:
    """Return the models that are told apart."""
    names = [tuple(name.decode().split(_SEPARATOR)) for name in table.tallies()]
    models = dict.fromkeys(name[1] for name in names if name[0] == _ERROR and name[1] != _OTHER)
    return list(models)[:MAX_MODELS]


def _errors_of(told: dict[tuple[str, ...], int]) -> Iterator[tuple[tuple[str, str], list[int]]]:
    """Yield how many errors were within each bound, by model and what was estimated, where there were any."""
    found: dict[tuple[str, str], list[int]] = {}
    shown = _bounds_of(_ERRORS)
    for name, number in told.items():
        if name[0] == _ERROR:
            counts = found.setdefault((name[1], name[2]), [0] * len(shown))
            counts[shown.index(name[3])] = number
    for labels, counts in sorted(found.items()):
        if any(counts):
            yield labels, counts


def _quantile(counts: list[int], quantile: float) -> float:
    """Return what part of the errors, whichever way they go, is not above, by interpolation within bounds.

    Errors above the last bound are taken for it.
    """
    above = counts[_FIRST_ABOVE:]
    below = counts[:_FIRST_ABOVE][::-1] + [0] * len(above)
    rank, least = quantile * sum(counts), 0.0
    for bound, more, less in zip(_ERRORS[_FIRST_ABOVE:], above, below, strict=False):
        if 0 < rank <= more + less:
            return least + (bound - least) * rank / (more + less)
        rank -= more + less
        least = bound
    return least


def _bounds_of(bounds: tuple[float, ...]) -> list[str]:
    return [str(floatToGoString(bound)) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]


def _tally(table: BucketTable, name: str, *labels: str) -> Tally:
    return table.tally(_SEPARATOR.join((name, *labels)).encode())


class NodeCollector(Collector):
    """Shows what all processes of the node counted.

    Args:
        backend: Where the buckets live.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterable[Metric]:
        """Yield it as it is now."""
        table = self._backend.table
        stats = self._backend.stats()
        told = {tuple(name.decode().split(_SEPARATOR)): number for name, number in counted(table).items()}
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"tokenguard_{name}", what, told[name,])
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"tokenguard_{name}", what, told[name,])
        for name, (labels, what) in _LABELLED.items():
            family = CounterMetricFamily(f"tokenguard_{name}", what, labels=labels)
            for (of, *values), number in told.items():
                if of == name:
                    family.add_metric(values, number)
            yield family
        for name, (bounds, what) in _HISTOGRAMS.items():
            shown = _bounds_of(bounds)
            counts = accumulate(told[name, bound] for bound in shown)
            yield HistogramMetricFamily(
                f"tokenguard_{name}",
                what,
                buckets=list(zip(shown, counts, strict=True)),
                sum_value=told[name, "sum"] / _MILLION,
            )
        yield from _estimate_errors(told)
        for kind, metrics in _BACKEND_METRICS.items():
            for name, shown_as, what in metrics:
                if name in stats:
                    yield kind(f"tokenguard_{shown_as}", what, stats[name])
        workers = living(table)
        yield GaugeMetricFamily("tokenguard_workers", "Processes that share the buckets.", len(workers) or 1)
        info = GaugeMetricFamily("tokenguard_info", "What runs.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        yield from _processes(list(workers.values()) or [os.getpid()])


def _estimate_errors(told: dict[tuple[str, ...], int]) -> Iterator[Metric]:
    """Yield how far estimates were off, by model: its quantiles, and the counts behind them."""
    error = Metric(
        "tokenguard_estimate_error",
        "How far estimates were off whichever way, as a part of what was used, by model.",
        "summary",
    )
    deviation = HistogramMetricFamily(
        "tokenguard_estimate_deviation",
        "Tokens estimated beyond what was used, as a part of it, by model: below 0 too little was reserved.",
        labels=("model", "of"),
    )
    for (model, of), counts in _errors_of(told):
        labels = {"model": model, "of": of}
        for quantile in _QUANTILES:
            error.add_sample(error.name, {**labels, "quantile": str(quantile)}, _quantile(counts, quantile))
        error.add_sample(f"{error.name}_count", labels, sum(counts))
        buckets = list(zip(_bounds_of(_ERRORS), accumulate(counts), strict=True))
        deviation.add_metric((model, of), buckets, sum_value=None)
    yield error
    yield deviation


def _processes(pids: list[int]) -> Iterator[Metric]:
    """Yield what the processes of the node take in all, when the first began, and what is each one's most."""
    found: dict[str, Metric] = {}
    for pid in pids:
        for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
            if metric.name not in found:
                found[metric.name] = metric
                continue
            sample = found[metric.name].samples[0]
            pair = (sample.value, metric.samples[0].value)
            together = min(pair) if metric.name in _LEAST else sum(pair)
            found[metric.name].samples[0] = sample._replace(value=together)
    yield from found.values()


_LEAST = ("process_start_time_seconds", "process_max_fds")

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
        ("repaired", "table_repairs", "Times that a process died while it changed buckets, and was undone."),
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
