"""What the relay says of itself: to probes and Prometheus, to systemd, and to the log."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from relay.observe.counters import (
    UDP,
    Connections,
    Counters,
    InKernel,
    Relayed,
)
from relay.observe.exposition import Status, total


class Served(Protocol):
    """The numbers of the server."""

    @property
    def allocations(self) -> int:
        """How many there are."""

    @property
    def channels(self) -> int:
        """How many are bound."""

    @property
    def permissions(self) -> int:
        """How many there are, over all allocations."""

    @property
    def responses(self) -> Counter[tuple[str, str]]:
        """How many answers were sent, by method, and error code or "success"."""

    @property
    def auth_failures(self) -> Counter[Any]:
        """How many signed requests were not believed, by an enumeration of reasons."""

    @property
    def refused_peers(self) -> Counter[str]:
        """How often a peer was refused, by the rule that forbids it."""


class Loop(Protocol):
    """The numbers of the event loop."""

    awake_since: float | None  # monotonic seconds; None while it waits
    slow_iterations: int

    def longest_iteration(self) -> float:
        """Return how long the longest one lately took, in seconds."""


class Queue(Protocol):
    """The queue of a socket, or those of many."""

    def overflows(self) -> int:
        """Return how many datagrams found it full. Safe in any thread."""


class Monitor:
    """Puts together what others count. :meth:`status` may be called from any thread.

    So it changes nothing, here or elsewhere.
    """

    def __init__(
        self,
        served: Served,
        counters: Counters,
        loop: Loop,
        queues: Iterable[Queue],
        known_auth_failures: Iterable[str] = (),
        known_peer_rules: Iterable[str] = (),
        in_kernel: Callable[[], InKernel] | None = None,
        connections: Callable[[], Connections] | None = None,
    ) -> None:
        """Watch these from here on; report the known reasons before they are counted.

        ``in_kernel()`` tells of the data path in the kernel, and ``connections()`` of those over
        TCP and TLS, if there are to be any; both from any thread.
        """
        self.not_ready: str | None = "starting"
        self.portal_connected: bool | None = None  # None: there is no portal
        self.portal_reconnects = 0
        self._served = served
        self._counters = counters
        self._loop = loop
        self._queues = tuple(queues)
        self._in_kernel = in_kernel
        self._connections = connections
        self._no_auth_failures = dict.fromkeys(known_auth_failures, 0)
        self._no_refused_peers = dict.fromkeys(known_peer_rules, 0)
        self._started = time.monotonic()
        self._last_line = (self._started, 0)  # when, and how many bytes were relayed until then

    def portal_joined(self) -> None:
        """Note that the portal has said init."""
        if self.portal_connected is False and self.not_ready is None:
            self.portal_reconnects += 1
        self.portal_connected = True

    def status(self) -> Status:
        """Return what the relay is at this moment."""
        awake_since = self._loop.awake_since
        return Status(
            not_ready=self.not_ready,
            stuck_for=0.0 if awake_since is None else time.monotonic() - awake_since,
            loop_lag=self._loop.longest_iteration(),
            slow_iterations=self._loop.slow_iterations,
            allocations=self._served.allocations,
            channels=self._served.channels,
            permissions=self._served.permissions,
            portal_connected=self.portal_connected,
            portal_reconnects=self.portal_reconnects,
            responses=self._served.responses.copy(),
            auth_failures=self._auth_failures(),
            refused_peers={**self._no_refused_peers, **self._served.refused_peers.copy()},
            overflows=self._overflows(),
            counters=self._counters,
            in_kernel=self._in_kernel and self._in_kernel(),
            connections=self._connections and self._connections(),
        )

    def dropped(self) -> dict[str, int]:
        """Return how many datagrams were neither relayed nor answered, by reason."""
        return self._counters.all_dropped(self._overflows())

    def line(self) -> str:
        """Say in one line how it goes, with the traffic since the line before."""
        now = time.monotonic()
        in_kernel = self._in_kernel and self._in_kernel()
        relayed = sum(
            total(dict(sizes.to_peer)) + total(dict(sizes.to_client))
            for sizes in self._counters.by_transport.values()
        )
        if in_kernel is not None:
            relayed += sum(each.bytes for each in (*in_kernel.to_peer, *in_kernel.to_client))
        then, relayed_then = self._last_line
        self._last_line = (now, relayed)
        megabits = (relayed - relayed_then) * 8 / 1e6 / max(now - then, 1e-3)
        parts = [self._state()]
        if in_kernel is not None:
            where = "in the kernel" if in_kernel.is_attached else "not in the kernel"
            parts.append(where)
        parts.append(f"{megabits:.1f} Mbit/s")
        return ", ".join(parts)

    def summary(self) -> str:
        """Say everything there is to say."""
        parts = [f"{self._state()}, up for {time.monotonic() - self._started:.0f} s"]
        for transport, both in self._counters.by_transport.items():
            if transport == UDP or self._connections is not None:
                by = "" if transport == UDP else f" by {transport.upper()}"
                parts.append(f"client to peer{by}: {_counted(both.to_peer)}")
                parts.append(f"peer to client{by}: {_counted(both.to_client)}")
        if self._connections is not None:
            parts += _connections_summary(self._connections())
        if self._in_kernel is not None:
            parts += _kernel_summary(self._in_kernel())
        responses = {" ".join(key): count for key, count in self._served.responses.items()}
        parts.append(f"responses: {listed(responses)}")
        parts.append(f"authentication failures: {listed(self._auth_failures())}")
        parts.append(f"peers refused: {listed(self._served.refused_peers)}")
        parts.append(f"datagrams dropped: {listed(self.dropped())}")
        if self.portal_connected is not None:
            parts.append(f"reconnects to the portal: {self.portal_reconnects}")
        parts.append(f"bugs: {self._counters.bugs}")
        return "; ".join(parts)

    def _state(self) -> str:
        parts = [
            self.not_ready or "relaying",
            f"{self._served.allocations} allocations",
            f"{self._served.channels} channels",
        ]
        if self._served.permissions:
            parts.append(f"{self._served.permissions} permissions")
        if self._connections is not None:
            parts.append(f"{sum(self._connections().open.values())} connections")
        if self.portal_connected is not None:
            parts.append("portal connected" if self.portal_connected else "portal away")
        return ", ".join(parts)

    def _overflows(self) -> int:
        return sum(queue.overflows() for queue in self._queues)

    def _auth_failures(self) -> dict[str, int]:
        counted = {why.value: count for why, count in self._served.auth_failures.copy().items()}
        return {**self._no_auth_failures, **counted}


def _counted(sizes: Mapping[int, int]) -> str:
    return f"{sum(sizes.values())} datagrams, {total(sizes)} bytes"


def _connections_summary(connections: Connections) -> list[str]:
    return [
        f"connections: {listed(connections.open)}",
        f"connections accepted: {listed(connections.accepted)}",
        f"connections ended: {listed(connections.ended)}",
    ]


def _kernel_summary(in_kernel: InKernel) -> list[str]:
    devices = ", ".join(f"{device} ({mode})" for device, mode in in_kernel.devices.items())
    return [
        f"in the kernel at {devices or 'no device'}: {in_kernel.routes} routes",
        f"client to peer in the kernel: {_relayed(in_kernel.to_peer)}",
        f"peer to client in the kernel: {_relayed(in_kernel.to_client)}",
        f"left to the sockets: {listed(in_kernel.failures)}",
    ]


def _relayed(classes: Iterable[Relayed]) -> str:
    both = [(each.datagrams, each.bytes) for each in classes]
    return f"{sum(one for one, _ in both)} datagrams, {sum(size for _, size in both)} bytes"


def listed(counts: Mapping[str, int]) -> str:
    """Return what was counted in words, without what did not occur."""
    counted = [f"{count} {what}" for what, count in sorted(counts.items()) if count]
    return ", ".join(counted) or "none"
