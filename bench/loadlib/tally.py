"""From what was sent and what arrived to numbers. Pure.

Every payload begins with a word and the time it was sent. The word says which one it is:
8 bits for the measurement, 24 for the flow, 32 for its place within the flow.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

FLOW_SHIFT: Final = 32
RUN_SHIFT: Final = 56
_PLACE: Final = (1 << FLOW_SHIFT) - 1

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
MOST_UNDER_WAY: Final = 0.02  # seconds of datagrams
FEW: Final = 100  # datagrams that may be under way in any case: a burst or two
CALM: Final = 0.03  # part of the time that may be lost to other processes
KEPT_UP: Final = 0.97  # of the datagrams due; who sends fewer was too slow


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How many datagrams came, and how."""

    received: int  # each counts once
    reordered: int  # came after a later one of their flow
    duplicated: int  # came again


def count_arrivals(words: Iterable[int], run: int) -> Arrivals:
    """Count the *words* of one *run*, in the order in which they came."""
    expected: dict[int, int] = {}  # by run and flow
    missing: set[int] = set()
    received = reordered = duplicated = 0
    for word in words:
        if word >> RUN_SHIFT != run:
            continue
        flow = word >> FLOW_SHIFT
        next_word = expected.get(flow, flow << FLOW_SHIFT)
        if word >= next_word:
            missing.update(range(next_word, word))
            expected[flow] = word + 1
            received += 1
        elif word in missing:
            missing.remove(word)
            received += 1
            reordered += 1
        else:
            duplicated += 1
    return Arrivals(received, reordered, duplicated)


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many datagrams took so long: from *low* until below *high*, in microseconds."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Latency:
    """One way, in microseconds: percentiles by their number, and a histogram."""

    percentiles: dict[str, float]
    histogram: list[Bucket]


def latency_of(delays: Iterable[int]) -> Latency | None:
    """Sum up *delays* in nanoseconds; None if there are none."""
    ordered = sorted(delays)
    if not ordered:
        return None
    percentiles = {f"p{which:g}": percentile(ordered, which) / 1000 for which in PERCENTILES}
    percentiles["max"] = ordered[-1] / 1000
    histogram = []
    low, below = 0, 0
    while below < len(ordered):
        high = low * 2 or 1
        until = bisect_left(ordered, high * 1000)
        if until > below:
            histogram.append(Bucket(low, high, until - below))
        low, below = high, until
    return Latency(percentiles, histogram)


def percentile(ordered: Sequence[float], which: float) -> float:
    """Return the smallest value that at least *which* percent do not exceed (nearest rank)."""
    rank = -(-len(ordered) * which // 100)
    return ordered[max(int(rank), 1) - 1]


@dataclass(frozen=True, slots=True)
class Result:
    """What one measurement found. Costs are CPU time, in microseconds."""

    wanted_rate: float | None  # datagrams per second; None is as fast as it goes
    seconds: float
    sent: int
    under_way: int  # of those sent, when the last one had been
    received: int
    reordered: int
    duplicated: int
    latency: Latency | None
    server_cost: float | None  # per datagram received, if the server's pid is known
    client_cost: float | None  # the same for this load client
    client_busy: float  # 0 to 1: part of the time in which it sent or received
    client_waited: float  # part of the time in which it would have run, but its CPU did not
    server_waited: float | None  # the same for the server's threads together

    @property
    def lost(self) -> int:
        """Datagrams."""
        return self.sent - self.received

    @property
    def loss(self) -> float:
        """0 to 1."""
        return self.lost / self.sent if self.sent else 0.0

    @property
    def sent_rate(self) -> float:
        """Datagrams per second."""
        return self.sent / self.seconds

    @property
    def received_rate(self) -> float:
        """Datagrams per second."""
        return self.received / self.seconds

    @property
    def limited_by_client(self) -> bool:
        """Tell if the load client was too slow, so that the server could have done more."""
        if self.wanted_rate is None:
            return self.lost == 0
        return self.sent < KEPT_UP * self.wanted_rate * self.seconds

    def is_kept_up(self, loss: float) -> bool:
        """Tell if at most *loss* (0 to 1) was lost, and queues did not only postpone more."""
        queued = self.under_way > max(MOST_UNDER_WAY * self.sent_rate, FEW)
        return self.received > 0 and self.loss <= loss and not queued

    @property
    def is_disturbed(self) -> bool:
        """Tell if something else took so much of either CPU that the numbers are doubtful."""
        return max(self.client_waited, self.server_waited or 0.0) > CALM

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON, with what follows from the fields."""
        return {
            **asdict(self),
            "lost": self.lost,
            "sent_rate": self.sent_rate,
            "received_rate": self.received_rate,
            "limited_by_client": self.limited_by_client,
            "is_disturbed": self.is_disturbed,
        }


@dataclass(frozen=True, slots=True)
class Lossless:
    """The highest rate at which not more was lost than allowed, in datagrams per second."""

    rate: float
    limited_by_client: bool  # then the server may be capable of more


def search(
    measure: Callable[[float], Result],
    *,
    start: float,
    loss: float = 0.0,
    growth: float = 2.0,
    precision: float = 1.05,
    tries: int = 3,
) -> Lossless:
    """Look for the lossless rate with ``measure(rate)``.

    From *start* the rate grows by *growth* until more than *loss* (0 to 1) is lost, or shrinks
    until no more is; the gap is then halved until its ends differ by *precision*, as a factor.
    What still queues at the end was too much as well, see :meth:`Result.is_kept_up`. A rate fails
    if it does so *tries* times in a row: a machine that stalls now and then is neither the
    server's limit nor the load client's.
    """
    good = bad = 0.0
    rate = start
    while rate >= SLOWEST:
        results = _try(measure, rate, loss, tries)
        kept = [result for result in results if result.is_kept_up(loss)]
        if not kept:
            bad = rate
        elif kept[-1].limited_by_client:
            return Lossless(max(result.received_rate for result in kept), limited_by_client=True)
        else:
            good = rate
        if good and bad and bad <= good * precision:
            return Lossless(good, limited_by_client=False)
        if not bad:
            rate = good * growth
        elif not good:
            rate = bad / growth
        else:
            rate = (good * bad) ** 0.5
    return Lossless(0.0, limited_by_client=False)


SLOWEST: Final = 10.0  # datagrams per second; below it, nothing is worth looking for


def _try(measure: Callable[[float], Result], rate: float, loss: float, tries: int) -> list[Result]:
    """Return the results up to the first one without fault."""
    results: list[Result] = []
    while len(results) < tries:
        results.append(measure(rate))
        if results[-1].is_kept_up(loss) and not results[-1].limited_by_client:
            break
    return results
