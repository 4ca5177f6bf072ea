"""Drives the server: hands it requests and time, and carries out its commands at once."""

import errno
import logging
from collections.abc import Callable
from typing import Final, Protocol, assert_never

from relay.datapath.relayport import RelayPorts
from relay.datapath.routes import ReachClient, Routes
from relay.stun.const import Family
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Drop,
    InstallPermissions,
    OpenPort,
    PortFailure,
    RemovePermissions,
    SendMessage,
    UnbindChannel,
)
from relay.turn.peers import PeerPolicy
from relay.turn.records import Record
from relay.turn.server import Server
from relay.turn.tables import Allocation

logger = logging.getLogger("relay.datapath")

# EACCES is a port below 1024: they take a privilege, which is given up before any is opened.
_TRY_ANOTHER_PORT: Final = frozenset({errno.EADDRINUSE, errno.EACCES})


class Timers(Protocol):
    """The part of the reactor that knows the time."""

    clock: Callable[[], float]

    def call_at(self, deadline: float, callback: Callable[[], None], /) -> None:
        """Call *callback* at *deadline*, instead of when it was to be called before."""

    def cancel(self, callback: Callable[[], None], /) -> None:
        """Do not call *callback*."""


class Control:
    """Everything that happens to the server passes through here."""

    def __init__(
        self,
        server: Server,
        ports: RelayPorts,
        routes: Routes,
        reach_client: ReachClient,
        timers: Timers,
        unix_clock: Callable[[], float],
    ) -> None:
        """Drive *server* from here on."""
        self._server = server
        self._ports = ports
        self._routes = routes
        self._reach_client = reach_client
        self._timers = timers
        self._unix_clock = unix_clock

    def on_request(self, datagram: bytes, client: ClientAddress) -> Drop | None:
        """Have the server serve a STUN datagram; return why it was dropped, or None."""
        drop = self._server.handle_request(
            datagram, client, now=self._timers.clock(), unix_now=self._unix_clock()
        )
        if drop is None:
            self._carry_out()
        return drop

    def on_connected(self, client: ClientAddress) -> Drop | None:
        """Have a client that has opened a connection; return why it may not, or None."""
        return self._server.handle_connected(client, now=self._timers.clock())

    def on_disconnected(self, client: ClientAddress) -> None:
        """End what a client has whose connection has ended."""
        self._server.handle_disconnected(client)
        self._carry_out()

    def has_allocation(self, client: ClientAddress) -> bool:
        """Tell if a client has an allocation."""
        return self._server.has_allocation(client)

    def on_timeout(self) -> None:
        """Let the server end what is due."""
        try:
            self._server.handle_timeout(self._timers.clock())
        finally:  # whatever happened, the next deadline must be set
            self._carry_out()

    def adopt(self, record: Record, open_port: Callable[[Allocation], None]) -> Allocation:
        """Go on with an allocation of another process. Raises UnreadableState, OSError.

        ``open_port(allocation)`` has its port open before anything is relayed through it.
        """
        allocation = self._server.transfer.load(record)
        open_port(allocation)
        self._carry_out()
        return allocation

    def change_peer_policy(self, peer_policy: PeerPolicy) -> None:
        """Go on with other rules; channels that they forbid relay nothing from here on."""
        self._server.change_peer_policy(peer_policy, now=self._timers.clock())
        self._carry_out()

    def _carry_out(self) -> None:
        """Carry out the server's commands, in their order; then wait for its next deadline."""
        while (command := self._server.next_command()) is not None:
            match command:
                case SendMessage():
                    self._reach_client(command.to).answer(command.message)
                case OpenPort():
                    self._open(command.port, command.families)
                case ClosePort():
                    self._routes.close_port(command)
                case BindChannel():
                    self._routes.bind(command)
                case UnbindChannel():
                    self._routes.unbind(command)
                case InstallPermissions():
                    self._routes.install(command)
                case RemovePermissions():
                    self._routes.remove(command)
                case _:
                    assert_never(command)
        deadline = self._server.poll_timeout()
        if deadline is None:
            self._timers.cancel(self.on_timeout)
        else:
            self._timers.call_at(deadline, self.on_timeout)

    def _open(self, number: int, families: tuple[Family, ...]) -> None:
        """Open a relay port, then tell the server how it went."""
        # Unless it goes well: a bug must not leave the server waiting for its answer.
        failures = dict.fromkeys(families, PortFailure.REFUSED)
        try:
            errors = self._ports.open(number, families)
            failures = {family: _port_failure(number, error) for family, error in errors.items()}
        finally:
            self._server.handle_port_opened(number, failures, now=self._timers.clock())


def _port_failure(number: int, error: OSError) -> PortFailure:
    if error.errno != errno.EADDRINUSE:
        logger.warning("cannot open relay port %d: %s", number, error.strerror)
    return PortFailure.IN_USE if error.errno in _TRY_ANOTHER_PORT else PortFailure.REFUSED
