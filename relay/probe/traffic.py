"""How well a relay carries a flow: latency, jitter, loss, and the rate at which loss begins.

A flow goes from one client by its channel to another allocation of the same server and comes out
at that one's client, or where that cannot be to a peer on this machine. So both ends are here and
share a clock: what is measured is the way to the relay, through it, and back.
"""

import select
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from relay.net.buffers import overflows_of
from relay.probe.link import Link, Peer

SLACK: Final = 0.5  # seconds that the last datagrams may take longer than all before
MOST_AT_ONCE: Final = 64  # datagrams; then there is a look at what has come back
FIRST_RATE: Final = 250  # datagrams per second
STEP_SECONDS: Final = 0.6  # at each rate
CLEAN_LOSS: Final = 0.002  # of the datagrams: below that a rate counts as carried
_FALLS_BEHIND: Final = 1.5  # times the seconds that sending should take
_NUMBER: Final = struct.Struct("!4sI")  # which run, which datagram
SHORTEST: Final = _NUMBER.size


@dataclass(slots=True)
class Flow:
    """A way through the relay."""

    source: Link
    channel: int  # of the source, bound to the sink, or to its relayed address
    sink: Link | Peer


@dataclass(slots=True)
class Sample:
    """What came of one run."""

    rate: float  # datagrams per second that were asked for
    size: int  # bytes of payload
    sent: int = 0
    received: int = 0  # each once
    duplicates: int = 0
    reordered: int = 0  # that came behind a later one
    seconds: float = 0.0  # that sending took
    fell_behind: bool = False  # this machine could not send that fast
    lost_here: int = 0  # that found the queue of our own socket full
    latencies: list[float] = field(default_factory=list)  # seconds, in the order of coming

    @property
    def loss(self) -> float:
        """The share that did not come, 0.0 to 1.0."""
        return 1 - self.received / self.sent if self.sent else 0.0

    @property
    def jitter(self) -> float:
        """The mean deviation of the spacing, in seconds, as RFC 3550 §6.4.1 smooths it."""
        smoothed, before = 0.0, None
        for latency in self.latencies:
            if before is not None:
                smoothed += (abs(latency - before) - smoothed) / 16
            before = latency
        return smoothed

    def percentile(self, percent: int) -> float:
        """Return the latency that so many per cent were not above, in seconds."""
        if len(self.latencies) < 2:
            return self.latencies[0] if self.latencies else 0.0
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True, slots=True)
class Ramp:
    """How far a flow could be raised."""

    carried: Sample | None  # the highest rate without loss
    lossy: Sample | None  # the rate above it, which had some
    limit: str | None  # why it was not raised further, if not for loss


def send(flow: Flow, rate: float, seconds: float, size: int) -> Sample:
    """Send at an even *rate* for so many *seconds*, and see what comes of it. Raises LinkError."""
    run = _Run(flow, Sample(rate, max(size, SHORTEST)), max(1, round(rate * seconds)))
    flow.sink.payloads()
    overflows = 0 if flow.sink.is_stream else overflows_of(flow.sink.socket)
    poller = select.poll()
    poller.register(flow.sink, select.POLLIN)
    while not run.is_over():
        run.send_what_is_due()
        if poller.poll(max(0.0, run.next_due() - time.monotonic()) * 1000):
            run.take()
        for end in (flow.source, flow.sink):
            if isinstance(end, Link) and end.error is not None and end.is_stream:
                raise end.error
    sample = run.sample
    sample.fell_behind = sample.seconds > _FALLS_BEHIND * (sample.sent - 1) / rate
    if not flow.sink.is_stream:
        sample.lost_here = overflows_of(flow.sink.socket) - overflows
    return sample


class _Run:
    """So many datagrams of one flow, each with its number."""

    def __init__(self, flow: Flow, sample: Sample, total: int) -> None:
        self.sample = sample
        self._flow = flow
        self._total = total
        self._name = flow.source.client.new_transaction_id()[:4]  # what comes late is of another
        self._padding = bytes(sample.size - SHORTEST)
        self._sent_at: list[float] = []
        self._is_there = bytearray(total)
        self._highest = -1  # number that has come
        self._began = self._last_news = time.monotonic()

    def send_what_is_due(self) -> None:
        rate, sent_at = self.sample.rate, self._sent_at
        due = int((time.monotonic() - self._began) * rate) + 1
        for number in range(len(sent_at), min(self._total, due, len(sent_at) + MOST_AT_ONCE)):
            sent_at.append(time.monotonic())
            payload = _NUMBER.pack(self._name, number) + self._padding
            self._flow.source.send_on(self._flow.channel, payload)
        self._flow.source.flush()
        self.sample.sent = len(sent_at)
        self.sample.seconds = sent_at[-1] - self._began
        self._last_news = max(self._last_news, sent_at[-1])

    def next_due(self) -> float:
        if self.sample.sent == self._total:
            return self._last_news + SLACK
        return self._began + self.sample.sent / self.sample.rate

    def is_over(self) -> bool:
        if self.sample.sent < self._total:
            return False
        return self.sample.received == self._total or time.monotonic() >= self._last_news + SLACK

    def take(self) -> None:
        """Read what has come, and count it."""
        now = time.monotonic()
        sink, sample = self._flow.sink, self.sample
        sink.handle_readable(now)
        for payload in sink.payloads():
            if len(payload) < SHORTEST or payload[:4] != self._name:
                continue
            number = _NUMBER.unpack_from(payload)[1]
            if number >= sample.sent:
                continue
            if self._is_there[number]:
                sample.duplicates += 1
                continue
            self._is_there[number] = 1
            sample.received += 1
            sample.latencies.append(now - self._sent_at[number])
            sample.reordered += number < self._highest
            self._highest = max(self._highest, number)
            self._last_news = now


def raise_rate(
    flow: Flow, highest: float, size: int, on_step: Callable[[float], None] = lambda _: None
) -> Ramp:
    """Double the rate until datagrams are lost, or to the *highest*. Raises LinkError."""
    carried: Sample | None = None
    rate = min(float(FIRST_RATE), highest)
    while True:
        on_step(rate)
        sample = send(flow, rate, STEP_SECONDS, size)
        if sample.lost_here:
            return Ramp(carried, None, "this machine cannot receive faster")
        if sample.loss > CLEAN_LOSS:
            return Ramp(carried, sample, None)
        carried = sample
        if sample.fell_behind:
            carried.rate = sample.sent / sample.seconds
            return Ramp(carried, None, "this machine cannot send faster")
        if rate >= highest:
            return Ramp(carried, None, "that is as far as it was tried")
        rate = min(2 * rate, highest)
