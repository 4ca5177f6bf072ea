"""What the relay is and has done, as Prometheus metrics.

They are made from plain numbers when somebody asks. Nothing here is called per datagram,
and no label holds what a client chose: a user, an address or a port would be one time
series each.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import mul
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relay.observe.counters import QUEUE_FULL, Counters

STUCK_AFTER: Final = 5.0  # seconds in one iteration of the loop

PACKET_SIZES: Final = (64, 128, 256, 512, 1024, 1280, 1500)  # upper bounds, in bytes
BATCH_LENGTHS: Final = (1, 2, 4, 8, 16, 32, 64)  # upper bounds, in datagrams


@dataclass(frozen=True, slots=True)
class Status:
    """What the relay is at one moment."""

    not_ready: str | None  # why nobody should be sent to it
    stuck_for: float  # seconds in the present iteration of the loop; 0.0 while it waits
    loop_lag: float  # seconds: the longest iteration of the loop lately
    slow_iterations: int
    allocations: int
    channels: int
    permissions: int
    portal_connected: bool | None  # None without a portal
    portal_reconnects: int
    responses: Mapping[tuple[str, str], int]  # by method and code, or "success"
    auth_failures: Mapping[str, int]  # by reason, the known ones from 0 on
    refused_peers: Mapping[str, int]  # by rule, likewise
    overflows: int  # datagrams that found the queue of a socket full
    counters: Counters  # the reactor writes them meanwhile: read copies

    @property
    def stuck(self) -> str | None:
        """What to say of a loop that is stuck in one iteration, or None."""
        if self.stuck_for <= STUCK_AFTER:
            return None
        return f"the loop has been busy with one iteration for {self.stuck_for:.1f} s"

    @property
    def unready(self) -> str | None:
        """Why nobody should be sent to this relay, or None."""
        return self.stuck or self.not_ready


class RelayCollector(Collector):
    """Makes the metrics of one relay, each time that they are asked for."""

    def __init__(
        self,
        status: Callable[[], Status],
        *,
        version: str,
    ) -> None:
        """Take where to look."""
        self._status = status
        self._version = version
        self._sent_singly = 0

    def collect(self) -> Iterator[Metric]:
        """Make them all."""
        status = self._status()
        yield from self._state(status)
        yield from self._portal(status)
        yield from self._requests(status)
        yield from self._data(status.counters, status.overflows)

    def _state(self, status: Status) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "relay_build_info",
            "Always 1. The version that runs, and its Python.",
            labels=("version", "python"),
        )
        build.add_metric((self._version, platform.python_version()), 1)
        yield build
        yield GaugeMetricFamily(
            "relay_ready",
            "1 if clients may be sent here, else 0; GET /readyz says why not.",
            value=status.unready is None,
        )
        yield GaugeMetricFamily(
            "relay_loop_lag_seconds",
            "Longest iteration of the event loop lately, the present one included: "
            "for so long a datagram may have waited.",
            value=max(status.loop_lag, status.stuck_for),
        )
        yield CounterMetricFamily(
            "relay_loop_slow_turns_total",
            "Iterations of the event loop that took longer than 0.1 s.",
            value=status.slow_iterations,
        )
        yield GaugeMetricFamily(
            "relay_allocations", "Live allocations: clients served now.", value=status.allocations
        )
        yield GaugeMetricFamily(
            "relay_channels",
            "Channels bound now.",
            value=status.channels,
        )
        yield GaugeMetricFamily(
            "relay_permissions",
            "Hosts that allocations have a permission for: data flows without a channel, too.",
            value=status.permissions,
        )
        yield CounterMetricFamily(
            "relay_bugs_total",
            "Exceptions that nothing was prepared for; the log has a traceback of each.",
            value=status.counters.bugs,
        )

    def _portal(self, status: Status) -> Iterator[Metric]:
        if status.portal_connected is None:
            return
        yield GaugeMetricFamily(
            "relay_portal_connected",
            "1 while joined to the portal, else 0. Relaying goes on meanwhile, "
            "but the portal sends nobody new. Absent without a portal.",
            value=status.portal_connected,
        )
        yield CounterMetricFamily(
            "relay_portal_reconnects_total",
            "How often the connection to the portal was made anew. Absent without a portal.",
            value=status.portal_reconnects,
        )

    def _requests(self, status: Status) -> Iterator[Metric]:
        responses = CounterMetricFamily(
            "relay_responses_total",
            "Answers to STUN and TURN requests, by method and error code or success. "
            "One 401 before each success is normal: it hands out the nonce.",
            labels=("method", "code"),
        )
        for (method, code), count in sorted(status.responses.items()):
            responses.add_metric((method, code), count)
        yield responses
        yield _by(
            "reason",
            "relay_auth_failures_total",
            "Requests refused for their credentials or their nonce, by reason.",
            status.auth_failures,
        )
        yield _by(
            "rule",
            "relay_refused_peers_total",
            "Peers that clients asked for and may not reach, by the rule that forbids them. ICE "
            "offers private addresses in every session, so some are normal.",
            status.refused_peers,
        )

    def _data(self, counters: Counters, overflows: int) -> Iterator[Metric]:
        # Copying a dict of numbers is one step for the other threads. Batches go first: their
        # datagrams are then among those relayed.
        batches = dict(counters.batches)
        to_peer, to_client = dict(counters.to_peer), dict(counters.to_client)
        datagrams = {
            "client_to_peer": sum(to_peer.values()),
            "peer_to_client": sum(to_client.values()),
        }
        payload = {"client_to_peer": total(to_peer), "peer_to_client": total(to_client)}
        relayed = sum(datagrams.values())
        yield _by(
            "direction",
            "relay_relayed_bytes_total",
            "Payload relayed, in bytes, without the headers of ChannelData, UDP and IP.",
            payload,
        )
        yield _by("direction", "relay_relayed_packets_total", "Datagrams relayed.", datagrams)
        yield _by(
            "reason",
            "relay_dropped_packets_total",
            "Datagrams neither relayed nor answered, by reason. send_* and receive_* "
            "are the kernel's errors, the others are what the datagram was.",
            {**dict(counters.dropped), QUEUE_FULL: overflows},
        )
        sizes = [
            here + there
            for here, there in zip(
                _up_to(PACKET_SIZES, to_peer), _up_to(PACKET_SIZES, to_client), strict=True
            )
        ]
        yield HistogramMetricFamily(
            "relay_packet_size_bytes",
            "Payload of the datagrams relayed in either direction, in bytes.",
            buckets=_buckets(PACKET_SIZES, sizes, relayed),
            sum_value=sum(payload.values()),
        )
        # A counter must not fall, and these numbers are not of the very same moment.
        self._sent_singly = max(self._sent_singly, relayed - total(batches))
        batches[1] = self._sent_singly
        yield HistogramMetricFamily(
            "relay_train_length",
            "Datagrams handed to the kernel at a time: the longer, the less each one costs.",
            buckets=_buckets(BATCH_LENGTHS, _up_to(BATCH_LENGTHS, batches), sum(batches.values())),
            sum_value=total(batches),
        )


def _by(label: str, name: str, documentation: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count)
    return family


# Clients choose the sizes, so there can be 65,536 of them: what follows is done in C.


def total(counts: Mapping[int, int]) -> int:
    """Return the sum of the sizes, or lengths, of which these are the counts."""
    return sum(map(mul, counts.keys(), counts.values()))


def _up_to(bounds: Sequence[int], counts: Mapping[int, int]) -> list[int]:
    """Return for each bound how many were counted under a key up to it."""
    running = [*accumulate(map(counts.get, range(bounds[-1] + 1), repeat(0)))]
    return [running[bound] for bound in bounds]


def _buckets(
    bounds: Sequence[int], cumulative: Sequence[int], total: int
) -> list[tuple[str, float]]:
    named = zip(map(str, map(float, bounds)), cumulative, strict=True)
    return [*named, ("+Inf", total)]
