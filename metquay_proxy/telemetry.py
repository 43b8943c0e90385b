"""What is told about exchanges: a log line each, figures for Prometheus, the last ones and the last hour for the page.

Owns the books of what happened, and what an exchange's line holds. Must not decide anything about a request, and must
cost it next to nothing: exchanges are counted many at once, and become lines only for a log or a reader that there is.

Facts: query values can hold customers' names, bodies can hold passwords (the older interface sends them there): neither
is ever logged. Prometheus wants cumulative buckets, and labels of few values: no ids, no clients.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import groupby, islice
from operator import add
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from metquay_proxy.log import LEVELS, log, output, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from metquay_proxy.exchange.exchange import Exchange
    from metquay_proxy.rules.renewal import TokenEvent

BOUNDS: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
"""Upper ends of the buckets of every histogram, in seconds."""
RECENT: Final = 100
"""Exchanges that are kept for the status page; whoever reads too slowly misses those in between."""
_LONGEST_CALLER: Final = 80
"""Characters that are told of an address, and of who asked; a User-Agent is short where it comes from."""
_IF_KNOWN: Final = ("user_agent", "address", "replayed", "error", "reason", "sent")
_PARAMETER: Final = re.compile("(?:;|%3[Bb])[^/]*+")
_REFUSALS: Final = 10_000
_FOLDED: Final = 256
"""Exchanges that are counted together at most."""
_OWN_PAGES: Final = frozenset({"", "events", "live", "metrics", "quit", "ready", "status", "test"})
_RESOURCES: Final = ("customers", "customer-instrument-details", "instrument-categories", "works")
_OUTAGE: Final = frozenset({502, 503, 504})
_TELLING: Final = ("upstream-", "token-unavailable", "credentials-rejected")
"""How the errors begin that an attempt ends in while Metquay is in trouble; the last two, if it takes no old token."""


def level(exchange: Exchange) -> str:
    """How loud the log tells of it: what somebody may have to look after is at least a warning."""
    error = exchange.error
    if exchange.quiet:
        return "debug"
    if (error is None and exchange.status < 500) or (error == "client-left" and exchange.sent != "unknown"):  # noqa: PLR2004 - RFC 9110 section 15.6
        return "info"
    return "error" if error == "credentials-rejected" else "warning"


def line(it: Exchange) -> str:
    """Return what the log and the status page tell of it, as JSON. What is not known is left out, but for who asked."""
    second = int(it.ended)
    client = (it.admission.client or it.agent or it.caller)[:_LONGEST_CALLER] or None
    told = (it.agent, it.address, it.replayed, it.error, it.reason, it.error and it.sent)
    who, more = _lasting(client, it.method, it.path, it.status, it.answered_by, told)
    return (
        f'{{"event": "request", "level": "{level(it)}", '
        f'"timestamp": "{_to_second(second)}.{int((it.ended - second) * 1e6):06d}Z", "id": "{it.id}", {who}, '
        f'"ms": {it.seconds * 1000:.1f}, "waited_ms": {it.waited * 1000:.1f}, '
        f'"upstream_ms": {it.upstream * 1000:.1f}, "attempts": {it.attempts}{more}}}'
    )


@lru_cache(maxsize=256)
def _lasting(  # noqa: PLR0913 - what is the same in many lines
    client: str | None, method: str, path: str, status: int, origin: str, more: tuple[object, ...]
) -> tuple[str, str]:
    """Return what many exchanges have in common, as two pieces of their lines; ``more`` are those of ``_IF_KNOWN``."""
    who = {"client": client, "method": method, "path": masked(path), "status": status, "answered_by": origin}
    known = {name: value for name, value in zip(_IF_KNOWN, more, strict=True) if value}
    return to_json(who)[1:-1], f", {to_json(known)[1:-1]}" if known else ""


@lru_cache(maxsize=2)
def _to_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()[:-6]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations in seconds: how many were at most each of ``BOUNDS``, how many there are, and their sum.

    It never changes, so that another thread may read it.
    """

    counts: Sequence[int] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0

    def plus(self, durations: list[float]) -> Histogram:
        """Return it with these too; less than nothing, which two clock readings can come to, is nothing."""
        durations.sort()
        more = [*[bisect_right(durations, bound) for bound in BOUNDS], len(durations)]
        return Histogram([*map(add, self.counts, more)], self.total + sum(durations[bisect_right(durations, 0.0) :]))


class Standing(NamedTuple):
    """How requests fare; times by the wall clock, in seconds."""

    trouble: Exchange | None
    """The last exchange with Metquay, if it failed on the way or Metquay was out of order."""
    turned: float
    """When such trouble last began or ended."""
    login_turned: float
    """When logins last began to go well, to fail, or to be refused."""
    success: float | None
    """When Metquay last answered a request with a status below 400."""
    refused: int
    """How many requests the quota refused in the last minute."""


class Telemetry:
    """Takes each exchange at its end; one place for the log line and the figures."""

    def __init__(self, prefix: str = "/api/v1") -> None:
        """Start with empty books; ``prefix`` is what comes before the resources in a path."""
        self.active = 0
        self._pending: list[Exchange] = []
        """What has ended and is in no book yet."""
        self._trouble: Exchange | None = None
        self._success: float | None = None
        self._turned = self._login_turned = time.time()
        self._login: str | None = None
        """What is told of a login that fails as the last one did; empty where it went well."""
        self._known = re.compile(rf"{re.escape(prefix)}/({'|'.join(_RESOURCES)})(/[^/?]*+)?(?:\?|\Z)")
        self._requests: Counter[tuple[str, str, int, str]] = Counter()
        self._retries = 0
        self._upstream, self._own, self._waited = Histogram(), Histogram(), Histogram()
        self._recent: deque[Exchange] = deque(maxlen=RECENT)
        self._remembered = 0
        self._refusals: deque[float] = deque(maxlen=_REFUSALS)
        self._minutes: deque[list[float]] = deque([[float("-inf"), 0, 0, 0, 0, 0, 0]], maxlen=60)

    def opened(self) -> None:
        """Count an exchange that begins."""
        self.active += 1

    def closed(self, exchange: Exchange) -> None:
        """Log the exchange and keep it to be counted with others."""
        exchange.seconds = time.perf_counter() - exchange.began
        exchange.ended = time.time()
        self.active -= 1
        if LEVELS[level(exchange)] >= output.threshold:
            output.tell(line(exchange))
        self._pending.append(exchange)
        if len(self._pending) >= _FOLDED:
            self._fold()

    def _fold(self) -> None:
        """Enter what is pending into the books, as is done before they are read; in the event loop's thread alone.

        Exchanges of the proxy's own pages, which are never forwarded, are counted as requests only.
        """
        pending, self._pending = self._pending, []
        kinds = Counter([(each.method, each.path, each.status, each.answered_by) for each in pending])
        for (method, path, status, origin), number in kinds.items():
            self._requests[method, self._route(path), status, origin] += number
        forwarded = [each for each in pending if each.attempts]
        self._retries += (sent := sum([each.attempts for each in forwarded])) - len(forwarded)
        self._waited = self._waited.plus([each.waited for each in forwarded])
        self._upstream = self._upstream.plus([each.upstream for each in forwarded])
        own = [(it.head_at - it.began if it.head_at else it.seconds) - it.waited - it.upstream for it in forwarded]
        self._own = self._own.plus(own)
        told = [each for each in pending if each.attempts or not (each.quiet or each.path.startswith("/-/"))]
        if not told:
            return
        erring = [each for each in told if each.error]
        self._refusals.extend([each.ended for each in erring if each.error == "quota-exceeded"])
        good = (it.ended for it in reversed(told) if it.answered_by == "metquay" and it.status < 400 and not it.error)  # noqa: PLR2004 - RFC 9110 section 15
        self._success = next(good, self._success)
        outage = not _OUTAGE.isdisjoint([status for _, _, status, _ in kinds])
        if self._trouble is not None or outage or erring:
            for each in told:
                self._judge(each)
        if len({each.ended // 60 for each in told}) == 1:
            self._enter(told, sent)
        else:
            for _, group in groupby(told, key=lambda each: each.ended // 60):
                self._enter(part := list(group), sum([each.attempts for each in part]))
        self._recent.extend(told)
        self._remembered += len(told)

    def _judge(self, each: Exchange) -> None:
        """Note what an exchange says of Metquay."""
        answered = each.answered_by == "metquay"
        broken = each.attempts > 0 and (each.error or "").startswith(_TELLING)
        failed = broken or (answered and each.status in _OUTAGE)
        if failed or answered:
            if failed == (self._trouble is None):
                self._turned = each.ended
            self._trouble = each if failed else None

    def _enter(self, told: list[Exchange], sent: int) -> None:
        """Enter exchanges of one minute, which took ``sent`` attempts, into its row."""
        row, minute, seconds = self._minutes[-1], int(told[0].ended // 60), [each.seconds for each in told]
        if row[0] != minute:
            row = [minute, 0, 0, 0, 0, 0, 0]
            self._minutes.append(row)
        for status, number in Counter([each.status for each in told]).items():
            row[1 if 0 < status < 400 else 2 if 0 < status < 500 else 3] += number  # noqa: PLR2004 - classes of status
        row[4] += sum(seconds) * 1000
        row[5] = max(row[5], max(seconds) * 1000)
        row[6] += sent

    @property
    def finished(self) -> int:
        """How many exchanges have ended."""
        self._fold()
        return self._requests.total()

    def standing(self) -> Standing:
        """Return how requests fare now."""
        self._fold()
        refused = sum(ended > time.time() - 60 for ended in self._refusals)
        return Standing(self._trouble, self._turned, self._login_turned, self._success, refused)

    def _route(self, path: str) -> str:
        """Return the template of a path; of these there are few, whatever is asked for."""
        known = self._known.match(path)
        if known is None:
            return path if path.startswith("/-/") and path[3:] in _OWN_PAGES else "other"
        return f"/{known[1]}/{{id}}" if known[2] else f"/{known[1]}"

    def since(self, number: int, most: int = RECENT) -> tuple[list[str], int, int]:
        """Return (exchanges after the ``number``-th, as JSON; how many before them are lost; the last one's number)."""
        self._fold()
        gone = self._remembered - len(self._recent)
        first = max(number, gone)
        exchanges = islice(self._recent, first - gone, first - gone + most)
        lines = [line(each) for each in exchanges]
        return lines, first - number, first + len(lines)

    def hour(self) -> list[list[float]]:
        """Return a row for each minute, of numbers.

        They are the minute since 1970, how many exchanges were good, refused (4xx) and failed, the average of their
        times and the longest one in milliseconds, and the attempts, those included that reached nobody. Minutes without
        exchanges are left out, and so is what is older than an hour.
        """
        self._fold()
        rows = [row for row in self._minutes if row[0] > time.time() // 60 - 60]
        return [[*row[:4], round(row[4] / sum(row[1:4]), 1), round(row[5], 1), row[6]] for row in rows]

    def token_event(self, event: TokenEvent) -> None:
        """Log what became of a login."""
        failure = {"failed": "login failed", "rejected": "key pair refused"}.get(event.kind, "")
        if failure != self._login:
            self._login, self._login_turned = failure, time.time()
        if failure:
            tell = log.error if event.kind == "rejected" else log.warning
            tell(failure, reason=event.text, next_attempt_s=round(event.wait, 1))
        else:
            self._fold()
            if self._trouble is not None:
                self._trouble, self._turned = None, time.time()
            log.info(f"token {event.kind}", lifetime_s=event.lifetime, renewal_in_s=round(event.wait, 1))

    def exposition(self, status: Mapping[str, Any]) -> Callable[[], bytes]:
        """Return what returns the figures, and those of ``/-/status``, as Prometheus reads them.

        That is to be called in a thread: it loads a library and reads files below /proc.
        """
        self._fold()
        return partial(self._exposition, status)

    def _exposition(self, status: Mapping[str, Any]) -> bytes:
        """Return them; each book is copied in one operation, since the loop goes on with it."""
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest  # noqa: PLC0415 - most never ask
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily  # noqa: PLC0415

        families: list[Any] = []
        version, states = (
            {(status["version"],): 1},
            {(state,): number for state, number in status["connections"].items()},
        )
        labels = ("method", "route", "status", "origin")
        for kind, name, text, names, numbers in (
            (CounterMetricFamily, "requests", "Answered requests.", labels, dict(self._requests)),
            (GaugeMetricFamily, "connections", "Connections to Metquay.", ("state",), states),
            (GaugeMetricFamily, "build_info", "Always 1: which version this is.", ("version",), version),
        ):
            families.append(kind(f"metquay_proxy_{name}", text, labels=names))
            for values, number in numbers.items():
                families[-1].add_metric([str(value) for value in values], number)
        for name, text, histogram in (
            ("upstream", "from sending a request to Metquay's answer", self._upstream),
            ("own", "of the proxy's own work", self._own),
            ("waited", "of waiting for token and quota", self._waited),
        ):
            ends = zip([*(f"{bound:g}" for bound in BOUNDS), "+Inf"], histogram.counts, strict=True)
            told = (f"metquay_proxy_{name}_seconds", f"Seconds {text}, for each forwarded request.")
            families.append(HistogramMetricFamily(*told, buckets=list(ends), sum_value=histogram.total))
        token, quota, redis, audit = (status.get(part) or {} for part in ("token", "quota", "redis", "audit"))
        for kind, name, text, value in (
            (CounterMetricFamily, "retries", "Attempts after the first.", self._retries),
            (CounterMetricFamily, "token_renewals", "Logins that brought a token.", token["renewals"]),
            (CounterMetricFamily, "token_failures", "Logins that failed.", token["failures"]),
            (GaugeMetricFamily, "token_rejected", "1 while Metquay refuses the keys.", token["rejected"]),
            (GaugeMetricFamily, "token_age_seconds", "Since the last login.", token["last_renewal_age"]),
            (GaugeMetricFamily, "token_left_seconds", "Until the token ends; 0 without one.", token["seconds_left"]),
            (GaugeMetricFamily, "ready", "1 while a request would find a token.", status["ready"]),
            (GaugeMetricFamily, "requests_active", "Requests in flight.", status["requests"]["active"]),
            (GaugeMetricFamily, "quota_limit", "Requests that a window allows.", quota.get("limit")),
            (GaugeMetricFamily, "quota_used", "Requests of the window that are used.", quota.get("used")),
            (GaugeMetricFamily, "quota_waiting", "Requests that wait for their turn.", quota.get("waiting")),
            (GaugeMetricFamily, "quota_closed_seconds", "Until Metquay's own refusal ends.", quota.get("closed_for")),
            (GaugeMetricFamily, "redis_shared", "1 while the quota is shared through Redis.", redis.get("shared")),
            (GaugeMetricFamily, "redis_replicas", "Replicas that share, as last heard.", redis.get("replicas")),
            (CounterMetricFamily, "redis_failures", "Calls that Redis did not carry out.", redis.get("failures")),
            (GaugeMetricFamily, "audit_waiting", "Lines of the audit log yet to be written.", audit.get("waiting")),
            (CounterMetricFamily, "audit_lost", "Lines that the audit log lacks.", audit.get("lost")),
            (CounterMetricFamily, "log_lost", "Lines that standard error did not take.", output.writer.lost),
        ):
            if value is not None:
                families.append(kind(f"metquay_proxy_{name}", text, value=float(value)))
        registry = CollectorRegistry()
        registry.register(type("Books", (), {"collect": lambda _: families})())
        ProcessCollector(registry=registry)
        return generate_latest(registry)


def masked(target: str) -> str:
    """Return a target without the values of its query (what has no equals sign is all value) and of path parameters.

    The latter, as in ``;jsessionid=...``, let some servers know who asks (RFC 3986 section 3.3).
    """
    path, mark, query = target.partition("?")
    path = _PARAMETER.sub(";*", path) if ";" in path or "%3" in path else path
    if not mark:
        return path
    parts = query.split("&")
    return f"{path}?" + "&".join([f"{part.partition('=')[0]}=*" if "=" in part else part and "*" for part in parts])
