"""What the relay says of itself: to probes and Prometheus, to systemd, and to the log."""

import time
from collections.abc import Collection, Mapping
from typing import Final

from relay.net.reactor import Reactor
from relay.net.udp import QUEUE_FULL, USUAL_LOSSES, ListeningSocket
from relay.observe.counters import Counters
from relay.observe.exposition import Status, total
from relay.turn.auth import AuthFailure
from relay.turn.commands import Drop
from relay.turn.server import Server

# What is worth a 0 before it is counted.
DROP_REASONS: Final = (*(reason.value for reason in Drop), *USUAL_LOSSES, QUEUE_FULL)
AUTH_FAILURE_REASONS: Final = tuple(reason.value for reason in AuthFailure)


class Monitor:
    """Puts together what others count. :meth:`status` may be called from any thread."""

    def __init__(
        self,
        server: Server,
        counters: Counters,
        reactor: Reactor,
        listeners: Collection[ListeningSocket],
    ) -> None:
        """Watch these from here on."""
        self.not_ready: str | None = "starting"
        self.portal_connected: bool | None = None  # None: there is no portal
        self.portal_reconnects = 0
        self._server = server
        self._counters = counters
        self._reactor = reactor
        self._listeners = listeners
        self._started = time.monotonic()
        self._last_line = (self._started, 0)  # when, and how many bytes were relayed until then

    def portal_joined(self) -> None:
        """Note that the portal has said init."""
        if self.portal_connected is False and self.not_ready is None:
            self.portal_reconnects += 1
        self.portal_connected = True

    def status(self) -> Status:
        """Return what the relay is at this moment."""
        self._count()
        awake_since = self._reactor.awake_since
        return Status(
            not_ready=self.not_ready,
            stuck_for=0.0 if awake_since is None else time.monotonic() - awake_since,
            loop_lag=self._reactor.longest_turn(),
            allocations=self._server.allocations,
            channels=self._server.channels,
            portal_connected=self.portal_connected,
            portal_reconnects=self.portal_reconnects,
            responses=self._server.responses.copy(),
            auth_failures=self._auth_failures(),
            counters=self._counters,
        )

    def line(self) -> str:
        """Say in one line how it goes, with the traffic since the line before."""
        now = time.monotonic()
        relayed = total(self._counters.to_peer) + total(self._counters.to_client)
        then, relayed_then = self._last_line
        self._last_line = (now, relayed)
        megabits = (relayed - relayed_then) * 8 / 1e6 / max(now - then, 1e-3)
        return f"{self._state()}, {megabits:.1f} Mbit/s"

    def summary(self) -> str:
        """Say everything there is to say."""
        self._count()
        parts = [f"{self._state()}, up for {time.monotonic() - self._started:.0f} s"]
        for name, sizes in (
            ("client to peer", self._counters.to_peer),
            ("peer to client", self._counters.to_client),
        ):
            parts.append(f"{name}: {sum(sizes.values())} datagrams, {total(sizes)} bytes")
        responses = {" ".join(key): count for key, count in self._server.responses.items()}
        parts.append(f"responses: {_listed(responses)}")
        parts.append(f"authentication failures: {_listed(self._auth_failures())}")
        parts.append(f"datagrams dropped: {_listed(self._counters.dropped)}")
        if self.portal_connected is not None:
            parts.append(f"reconnects to the portal: {self.portal_reconnects}")
        parts.append(f"bugs: {self._counters.bugs}")
        return "; ".join(parts)

    def _state(self) -> str:
        parts = [
            self.not_ready or "relaying",
            f"{self._server.allocations} allocations",
            f"{self._server.channels} channels",
        ]
        if self.portal_connected is not None:
            parts.append("portal connected" if self.portal_connected else "portal away")
        return ", ".join(parts)

    def _count(self) -> None:
        """Fetch what is counted elsewhere: by the loop, and by the kernel."""
        self._counters.slow_turns = self._reactor.slow_turns
        sockets = [sock for listener in self._listeners for sock in listener.sockets]
        overflows = sum(sock.overflows() for sock in sockets)
        if overflows:
            self._counters.dropped[QUEUE_FULL] = overflows

    def _auth_failures(self) -> dict[str, int]:
        return {why.value: count for why, count in self._server.auth_failures.copy().items()}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"
