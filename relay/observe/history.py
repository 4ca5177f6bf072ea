"""What the relay has done in the last hour: a sample of its counters every ten seconds.

The memory is bounded, and the thread for HTTP takes the samples: the loop never hears of it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from relay.observe.counters import Relayed, Sizes
from relay.observe.exposition import Status, total

PERIOD: Final = 10.0  # seconds
SAMPLES: Final = 361  # an hour, with both of its ends


class Traffic(NamedTuple):
    """What was relayed in one direction, wherever that was done."""

    datagrams: int
    bytes: int  # of payload


class Sample(NamedTuple):
    """The counters at one moment, since the start. The page knows them by these names."""

    t: float  # monotonic seconds: nobody sets that clock
    allocations: int  # at that moment
    cpu: float  # seconds of the whole process
    upDatagrams: int  # noqa: N815  # to peers
    upBytes: int  # noqa: N815
    downDatagrams: int  # noqa: N815
    downBytes: int  # noqa: N815
    dropped: int
    responses: int


class History:
    """The samples of the last hour, the oldest first."""

    def __init__(self, status: Callable[[], Status], cpu_time: Callable[[], float]) -> None:
        """Take samples of ``status()`` and ``cpu_time()``, which is in seconds."""
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._status = status
        self._cpu_time = cpu_time
        self._next = 0.0  # monotonic seconds

    def seconds_left(self, now: float) -> float:
        """Return how long it is until the next sample, from *now* by the monotonic clock."""
        return max(0.0, self._next - now)

    def sample_if_due(self, now: float) -> None:
        """Take a sample, if it is time."""
        if now >= self._next:
            self._next = now + PERIOD
            self.samples.append(sample(self._status(), self._cpu_time()))


def sample(status: Status, cpu: float) -> Sample:
    """Return the counters of *status*, with the time of now."""
    up, down = to_peer(status), to_client(status)
    return Sample(
        round(time.monotonic(), 3),
        status.allocations,
        round(cpu, 3),
        *(*up, *down),
        sum(status.counters.all_dropped(status.overflows).values()),
        sum(status.responses.values()),
    )


def to_peer(status: Status) -> Traffic:
    """Return what was relayed to peers."""
    sizes = [each.to_peer for each in _by_transport(status)]
    return _traffic(sizes, () if status.in_kernel is None else status.in_kernel.to_peer)


def to_client(status: Status) -> Traffic:
    """Return what was relayed to clients."""
    sizes = [each.to_client for each in _by_transport(status)]
    return _traffic(sizes, () if status.in_kernel is None else status.in_kernel.to_client)


def _by_transport(status: Status) -> Iterable[Sizes]:
    return status.counters.by_transport.values()


def _traffic(sizes: Iterable[dict[int, int]], in_kernel: Iterable[Relayed]) -> Traffic:
    counted = [dict(each) for each in sizes]  # one step for the loop, which goes on counting
    classes = [*in_kernel]
    return Traffic(
        sum(sum(each.values()) for each in counted) + sum(each.datagrams for each in classes),
        sum(total(each) for each in counted) + sum(each.bytes for each in classes),
    )
