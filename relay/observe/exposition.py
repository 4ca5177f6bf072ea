"""What the relay is and has done, as Prometheus metrics.

They are made from plain numbers when somebody asks. Nothing here is called per datagram,
and no label holds what a client chose: a user, an address or a port would be one time
series each.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from operator import mul
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relay.observe.counters import (
    NOT_ATTACHED,
    PACKET_SIZES,
    UDP,
    Connections,
    Counters,
    InKernel,
    Relayed,
)

STUCK_AFTER: Final = 5.0  # seconds in one iteration of the loop

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
    in_kernel: InKernel | None  # None: nothing is to be relayed there
    connections: Connections | None  # None: neither TCP nor TLS

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
        yield from self._data(status)
        yield from self._kernel(status.in_kernel)
        yield from self._streams(status.connections)

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

    def _data(self, status: Status) -> Iterator[Metric]:
        counters, in_kernel = status.counters, status.in_kernel
        # Copying a dict of numbers is one step for the other threads. Batches go first: their
        # datagrams are then among those relayed.
        batches = dict(counters.batches)
        relayed: dict[tuple[str, str], dict[str, Sequence[Relayed]]] = {}
        for transport, by_size in counters.by_transport.items():
            if transport == UDP or status.connections is not None:
                relayed["sockets", transport] = {
                    "client_to_peer": _by_class(dict(by_size.to_peer)),
                    "peer_to_client": _by_class(dict(by_size.to_client)),
                }
        sent = sum(
            each.datagrams
            for directions in relayed.values()
            for classes in directions.values()
            for each in classes
        )
        if in_kernel is not None:
            relayed["xdp", UDP] = {
                "client_to_peer": in_kernel.to_peer,
                "peer_to_client": in_kernel.to_client,
            }
        payload = CounterMetricFamily(
            "relay_relayed_bytes_total",
            "Payload relayed, in bytes, without the headers of ChannelData, UDP and IP.",
            labels=("direction", "datapath", "transport"),
        )
        datagrams = CounterMetricFamily(
            "relay_relayed_packets_total",
            "Datagrams relayed, by the transport between client and relay, and where that is done.",
            labels=("direction", "datapath", "transport"),
        )
        sizes = HistogramMetricFamily(
            "relay_packet_size_bytes",
            "Payload of the datagrams relayed in either direction, in bytes.",
            labels=("datapath", "transport"),
        )
        for where, directions in relayed.items():
            for direction, classes in directions.items():
                labels = (direction, *where)
                payload.add_metric(labels, sum(each.bytes for each in classes))
                datagrams.add_metric(labels, sum(each.datagrams for each in classes))
            both = [*zip(*directions.values(), strict=True)]
            cumulative = [*accumulate(here.datagrams + there.datagrams for here, there in both)]
            sizes.add_metric(
                where,
                buckets=_buckets(PACKET_SIZES, cumulative[:-1], cumulative[-1]),
                sum_value=sum(here.bytes + there.bytes for here, there in both),
            )
        yield payload
        yield datagrams
        yield _by(
            "reason",
            "relay_dropped_packets_total",
            "Datagrams neither relayed nor answered, by reason. send_* and receive_* "
            "are the kernel's errors, the others are what the datagram was.",
            counters.all_dropped(status.overflows),
        )
        yield sizes
        # A counter must not fall, and these numbers are not of the very same moment.
        self._sent_singly = max(self._sent_singly, sent - total(batches))
        batches[1] = self._sent_singly
        yield HistogramMetricFamily(
            "relay_train_length",
            "Datagrams handed to the kernel at a time: the longer, the less each one costs.",
            buckets=_buckets(BATCH_LENGTHS, _up_to(BATCH_LENGTHS, batches), sum(batches.values())),
            sum_value=total(batches),
        )

    def _kernel(self, in_kernel: InKernel | None) -> Iterator[Metric]:
        if in_kernel is None:
            return
        attached = GaugeMetricFamily(
            "relay_xdp_attached",
            "1 for each device at which the program in the kernel is, and how (native or generic); "
            "0 for one where it was to be. Absent without --xdp, as are the next two.",
            labels=("device", "mode"),
        )
        for device, mode in sorted(in_kernel.devices.items()):
            attached.add_metric((device, mode), mode != NOT_ATTACHED)
        yield attached
        yield GaugeMetricFamily(
            "relay_xdp_routes",
            "Routes that the kernel relays by: two for each channel.",
            value=in_kernel.routes,
        )
        yield _by(
            "reason",
            "relay_xdp_failures_total",
            "What the kernel did not take, by reason: the program, a device, or a channel. The "
            "sockets relay that.",
            in_kernel.failures,
        )

    def _streams(self, connections: Connections | None) -> Iterator[Metric]:
        if connections is None:
            return
        there_are = GaugeMetricFamily(
            "relay_connections",
            "Connections of clients over TCP and TLS, by transport. Absent without --tcp-port and "
            "--tls-port, as are the next ones.",
            labels=("transport",),
        )
        for transport, number in sorted(connections.open.items()):
            there_are.add_metric((transport,), number)
        yield there_are
        yield _by(
            "transport",
            "relay_connections_accepted_total",
            "Connections accepted, by transport; those that were refused at once are among them.",
            connections.accepted,
        )
        yield _by(
            "reason",
            "relay_connections_ended_total",
            "Connections that have ended, by reason.",
            connections.ended,
        )
        yield GaugeMetricFamily(
            "relay_connections_queued_bytes",
            "What waits for clients with a connection that read too slowly, in bytes.",
            value=connections.queued,
        )
        if connections.certificate_expires is not None:
            yield GaugeMetricFamily(
                "relay_tls_certificate_expiry_timestamp_seconds",
                "When the certificate for TLS ends, in Unix time. Absent without --tls-port.",
                value=connections.certificate_expires,
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


def _by_class(counts: Mapping[int, int]) -> list[Relayed]:
    """Return what was relayed in each of the classes of PACKET_SIZES, and beyond them."""
    classes = []
    for lowest, highest in pairwise((-1, *PACKET_SIZES)):
        sizes = range(lowest + 1, highest + 1)
        datagrams = [*map(counts.get, sizes, repeat(0))]
        classes.append(Relayed(sum(datagrams), sum(map(mul, sizes, datagrams))))
    datagrams_left = sum(counts.values()) - sum(each.datagrams for each in classes)
    bytes_left = total(counts) - sum(each.bytes for each in classes)
    return [*classes, Relayed(datagrams_left, bytes_left)]


def _up_to(bounds: Sequence[int], counts: Mapping[int, int]) -> list[int]:
    """Return for each bound how many were counted under a key up to it."""
    running = [*accumulate(map(counts.get, range(bounds[-1] + 1), repeat(0)))]
    return [running[bound] for bound in bounds]


def _buckets(
    bounds: Sequence[int], cumulative: Sequence[int], total: int
) -> list[tuple[str, float]]:
    named = zip(map(str, map(float, bounds)), cumulative, strict=True)
    return [*named, ("+Inf", total)]
