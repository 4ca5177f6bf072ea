"""Where TURN meets the sockets. Read this first.

Every datagram comes through here. STUN goes to the :class:`~relay.turn.server.Server`,
which leaves commands that are carried out at once. Relayed data never gets that far: it
is one look into a table of routes, and out again.

===========================  ============================================================
client to peer               :meth:`Forwarder.on_client_datagram` strips the four bytes of
                             ChannelData; the route is found by (client, channel number)
peer to client               :meth:`Forwarder.on_peer_datagram` puts them in front; the
                             route is found by the peer's address, per relay port
trains, in either direction  :meth:`Forwarder.on_client_train` and
                             :meth:`Forwarder.on_peer_train` do the same to many datagrams
                             at once; what is not alike is served one by one
===========================  ============================================================

The routes are written by two commands only, ``BindChannel`` and ``UnbindChannel``, so
whatever is not bound right now is not relayed. All sockets read into one buffer. A payload
always lies at offset 4 of it, behind room for the header, and is never copied; only where
a train is taken apart its datagrams are moved to the front of the buffer, one after another.
"""

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol, assert_never

from relay.observe.counters import Counters
from relay.stun.address import Address, family_of
from relay.stun.const import Family
from relay.turn.channeldata import HEADER, HEADER_SIZE, parse
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Drop,
    OpenPort,
    PeerAddress,
    PortFailure,
    SendMessage,
    UnbindChannel,
)
from relay.turn.peers import PeerPolicy
from relay.turn.server import Server

logger = logging.getLogger("relay.datapath")

LARGEST_DATAGRAM: Final = 65535
# STUN over UDP stays below the MTU (RFC 8489 §6.1); longer messages only cost time to read.
LARGEST_STUN: Final = 2048
# Ports below 1024 take a privilege, which is given up before any is opened.
_ANOTHER_MAY_DO: Final = frozenset({errno.EADDRINUSE, errno.EACCES})
_NEITHER: Final = 0xFF  # a first byte that is neither STUN nor ChannelData
_pack, _pack_into, _unpack_from = HEADER.pack, HEADER.pack_into, HEADER.unpack_from

Pieces = list[memoryview | bytes]
"""What a train is made of, in order."""


class Listener(Protocol):
    """The socket that clients of one family talk to."""

    def send(self, datagram: memoryview | bytes, to: ClientAddress) -> bool:
        """Send one datagram, or count it as lost; return whether it was sent."""

    def send_train(self, pieces: Pieces, each: int, size: int, to: ClientAddress) -> int:
        """Send datagrams of *size* bytes, each of them *each* pieces; the last may be shorter.

        Returns how many were sent, from the first on. The others are not lost yet.
        """


class PeerSender(Protocol):
    """What reaches a peer."""

    def send(self, datagram: memoryview, to: PeerAddress) -> bool:
        """Send one datagram, or count it as lost; return whether it was sent."""

    def send_train(self, pieces: Pieces, each: int, size: int, to: PeerAddress) -> int:
        """Send datagrams as :meth:`Listener.send_train` does."""


class RelaySocket(PeerSender, Protocol):
    """The socket of a relay port in one family."""

    def close(self) -> None:
        """Give up the port."""


ToPeer = tuple[PeerSender, PeerAddress]
"""How to reach a peer."""

ToClient = tuple[int, Listener, ClientAddress]
"""How to reach a client: the channel number for the header, the socket, and where to."""


class OpenPortIn(Protocol):
    """Binds a port, and calls back with what arrives there."""

    def __call__(
        self,
        family: Family,
        number: int,
        on_datagram: Callable[[int, PeerAddress], None],
        on_train: Callable[[int, int, PeerAddress], int],
        /,
    ) -> RelaySocket:
        """Raise OSError if the port cannot be bound."""


class Timers(Protocol):
    """The part of the reactor that knows the time."""

    clock: Callable[[], float]

    def call_at(self, deadline: float, callback: Callable[[], None]) -> None:
        """Call *callback* at *deadline*, instead of when it was to be called before."""

    def cancel(self, callback: Callable[[], None]) -> None:
        """Do not call *callback*."""


class Forwarder:
    """Feeds datagrams to the server and carries out its commands; relays data itself."""

    def __init__(
        self,
        server: Server,
        *,
        buffer: bytearray,
        listeners: dict[Family, Listener],
        open_port: OpenPortIn,
        public_hosts: dict[Family, str],
        relay_ports: range,
        channel_numbers: range,
        timers: Timers,
        unix_clock: Callable[[], float],
        is_relay_host: Callable[[str], bool],
        counters: Counters,
    ) -> None:
        """Connect *server* with what sends and receives.

        Clients' datagrams are read to the start of *buffer*, peers' to
        :data:`~relay.turn.channeldata.HEADER_SIZE` bytes after it. ``is_relay_host(host)``
        tells if relay ports send from *host*.
        """
        self._server = server
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._listeners = listeners
        self._open_port = open_port
        self._public_hosts = public_hosts
        self._relay_ports = relay_ports
        self._last_channel_byte = channel_numbers[-1] >> 8
        self._timers = timers
        self._unix_clock = unix_clock
        self._is_relay_host = is_relay_host
        self._counters = counters
        self._sizes_to_peer = counters.to_peer
        self._sizes_to_client = counters.to_client
        self._ports: dict[int, _Port] = {}
        self._to_peer: dict[tuple[ClientAddress, int], ToPeer] = {}
        self.on_last_port_closed: Callable[[], None] | None = None

    def on_client_datagram(self, size: int, client: ClientAddress) -> None:
        """Serve a datagram of *size* bytes from *client*, which lies at the buffer's start."""
        if size >= HEADER_SIZE:
            number, length = _unpack_from(self._buffer)
            route = self._to_peer.get((client, number))
            if route is not None and length + HEADER_SIZE <= size:
                sender, peer = route
                if sender.send(self._view[HEADER_SIZE : HEADER_SIZE + length], peer):
                    self._sizes_to_peer[length] += 1
                return
        self._on_anything_else(size, client)

    def on_peer_datagram(
        self, routes: dict[PeerAddress, ToClient], size: int, peer: PeerAddress
    ) -> None:
        """Relay a datagram whose *size* bytes lie in the buffer, behind room for the header.

        *routes* are those of the relay port at which it arrived.
        """
        route = routes.get(peer)
        if route is None:
            self._drop(Drop.UNBOUND_PEER)
            return
        number, listener, client = route
        _pack_into(self._buffer, 0, number, size)
        if listener.send(self._view[: HEADER_SIZE + size], client):
            self._sizes_to_client[size] += 1

    def on_client_train(self, size: int, segment: int, client: ClientAddress) -> int:
        """Serve datagrams from *client* that lie in the buffer, *size* bytes from its start on.

        Each is of *segment* bytes; the last may be shorter. Returns how many of them had to be
        served one by one.
        """
        served = self._relay_to_peer(size, segment, client)
        left = range(served * segment, size, segment)
        for start in left:
            datagram = self._view[start : min(start + segment, size)]
            self._view[: len(datagram)] = datagram
            self.on_client_datagram(len(datagram), client)
        return len(left)

    def on_peer_train(
        self, routes: dict[PeerAddress, ToClient], size: int, segment: int, peer: PeerAddress
    ) -> int:
        """Relay datagrams whose *size* bytes lie in the buffer, behind room for one header.

        Each is of *segment* bytes; the last may be shorter. Returns how many of them had to be
        served one by one.
        """
        train = self._view[HEADER_SIZE : HEADER_SIZE + size]
        payloads: Pieces = [train[at : at + segment] for at in range(0, size, segment)]
        served = self._relay_to_client(routes, payloads, segment, peer)
        for payload in payloads[served:]:
            self._view[HEADER_SIZE : HEADER_SIZE + len(payload)] = payload
            self.on_peer_datagram(routes, len(payload), peer)
        return len(payloads) - served

    def on_timeout(self) -> None:
        """Let the server end what is due."""
        try:
            self._server.handle_timeout(self._timers.clock())
        finally:  # whatever happened, the next deadline must be set
            self._run_commands()

    def change_peer_policy(self, peer_policy: PeerPolicy) -> None:
        """Go on with other rules; channels that they forbid relay nothing from here on."""
        self._server.change_peer_policy(peer_policy, now=self._timers.clock())
        self._run_commands()

    def close(self) -> None:
        """Close every relay port."""
        for port in self._ports.values():
            port.close()
        self._ports.clear()
        self._to_peer.clear()

    def _on_anything_else(self, size: int, client: ClientAddress) -> None:
        """Serve what is not ChannelData; drop what is, as it cannot be relayed."""
        first = self._buffer[0] if size else _NEITHER
        if 0x40 <= first <= self._last_channel_byte:
            is_malformed = parse(self._buffer, size) is None
            self._drop(Drop.MALFORMED_CHANNEL_DATA if is_malformed else Drop.UNBOUND_CHANNEL)
        elif first <= 0x03:
            self._on_stun(size, client)
        else:
            self._drop(Drop.UNKNOWN_PROTOCOL)

    def _relay_to_peer(self, size: int, segment: int, client: ClientAddress) -> int:
        """Relay a train that is alike; return how many of its datagrams were, from the first on.

        It is alike if each datagram is ChannelData of one channel and length.
        """
        buffer, view = self._buffer, self._view
        count = size // segment
        whole = count * segment
        for start in range(HEADER_SIZE):
            if buffer[start:whole:segment].count(buffer[start]) != count:
                return 0
        frame = parse(buffer, segment) if count else None
        if frame is None or not frame[1]:  # nothing in it that UDP_SEGMENT could cut
            return 0
        number, length = frame
        route = self._to_peer.get((client, number))
        if route is None:
            return 0
        sender, peer = route
        pieces: Pieces = [view[at : at + length] for at in range(HEADER_SIZE, whole, segment)]
        last = parse(view[whole:], size - whole)
        if last is not None and last[0] == number and 0 < last[1] <= length:
            pieces.append(view[whole + HEADER_SIZE : whole + HEADER_SIZE + last[1]])
        sent = sender.send_train(pieces, 1, length, peer)
        self._count(self._sizes_to_peer, sent, pieces, length)
        return sent

    def _relay_to_client(
        self, routes: dict[PeerAddress, ToClient], payloads: Pieces, size: int, peer: PeerAddress
    ) -> int:
        """Relay payloads of *size* bytes, the last perhaps shorter, none empty.

        Returns how many were relayed, from the first on.
        """
        route = routes.get(peer)
        if route is None:
            return 0
        number, listener, client = route
        pieces: Pieces = [_pack(number, size)] * (2 * len(payloads))
        pieces[1::2] = payloads
        pieces[-2] = _pack(number, len(payloads[-1]))
        sent = listener.send_train(pieces, 2, HEADER_SIZE + size, client)
        self._count(self._sizes_to_client, sent, payloads, size)
        return sent

    def _count(self, sizes: dict[int, int], sent: int, payloads: Pieces, size: int) -> None:
        """Count the first *sent* of a train's payloads; all are of *size* but perhaps the last."""
        if sent:
            sizes[len(payloads[sent - 1])] += 1
        if sent > 1:
            sizes[size] += sent - 1
            self._counters.trains[sent] += 1

    def _on_stun(self, size: int, client: ClientAddress) -> None:
        host, port = client[0][:2]
        if port == 0:  # no answer could reach it
            self._drop(Drop.NO_SOURCE_PORT)
            return
        if size > LARGEST_STUN:
            self._drop(Drop.OVERSIZED_STUN)
            return
        if self._is_relayed_here(host, port):
            # Or a client could stack allocations into a loop. RFC 8656 §21.1.7
            self._drop(Drop.FROM_ITSELF)
            return
        drop = self._server.handle_request(
            bytes(self._view[:size]),
            client,
            now=self._timers.clock(),
            unix_now=self._unix_clock(),
        )
        if drop is not None:
            self._drop(drop)
            return
        self._run_commands()

    def _is_relayed_here(self, host: str, port: int) -> bool:
        """Tell if one of our own relay ports is the source of a datagram."""
        return self._port_at((host, port)) is not None and self._is_relay_host(host)

    def _run_commands(self) -> None:
        while (command := self._server.next_command()) is not None:
            match command:
                case SendMessage(to, message):
                    self._listener(to).send(message, to)
                case OpenPort(port, families):
                    self._open(port, families)
                case ClosePort(port):
                    self._close(port)
                case BindChannel():
                    self._bind(command)
                case UnbindChannel():
                    self._unbind(command)
                case _:
                    assert_never(command)
        deadline = self._server.poll_timeout()
        if deadline is None:
            self._timers.cancel(self.on_timeout)
        else:
            self._timers.call_at(deadline, self.on_timeout)

    def _open(self, number: int, families: tuple[Family, ...]) -> None:
        """Bind the port in each family, then tell the server how it went."""
        port = _Port()
        try:
            for family in families:
                port.sockets[family] = self._open_port(
                    family,
                    number,
                    partial(self.on_peer_datagram, port.routes),
                    partial(self.on_peer_train, port.routes),
                )
        except OSError as error:
            port.close()
            another_may_do = error.errno in _ANOTHER_MAY_DO
            failure = PortFailure.IN_USE if another_may_do else PortFailure.REFUSED
            if error.errno != errno.EADDRINUSE:
                logger.warning("cannot open relay port %d: %s", number, error.strerror)
            self._server.handle_port_failed(number, failure)
        else:
            self._ports[number] = port
            self._server.handle_port_opened(number, now=self._timers.clock())

    def _close(self, number: int) -> None:
        self._ports.pop(number).close()
        if not self._ports and self.on_last_port_closed is not None:
            self.on_last_port_closed()

    def _bind(self, bind: BindChannel) -> None:
        port = self._ports[bind.port]
        port.routes[bind.peer] = (bind.number, self._listener(bind.client), bind.client)
        family = family_of(bind.peer[0])
        peer_socket = port.sockets[family]
        sender: PeerSender = peer_socket
        public_host = self._public_hosts.get(family)
        if bind.peer[0] == public_host and bind.peer[1] in self._relay_ports:
            # Perhaps one of our own relayed addresses: that may change at any time.
            relayed_address = PeerAddress((public_host, bind.port))
            outside = peer_socket if bind.reaches_outside else None
            sender = _Sender(
                partial(self._send_perhaps_inside, relayed_address, outside),
                partial(self._send_train_perhaps_inside, relayed_address, outside),
            )
        self._to_peer[bind.client, bind.number] = (sender, bind.peer)

    def _unbind(self, unbind: UnbindChannel) -> None:
        del self._to_peer[unbind.client, unbind.number]
        del self._ports[unbind.port].routes[unbind.peer]

    def _send_perhaps_inside(
        self,
        relayed_address: PeerAddress,
        outside: RelaySocket | None,
        payload: memoryview,
        peer: PeerAddress,
    ) -> bool:
        """Send from *relayed_address* to a port of our own host: inside, if it is an allocation.

        No kernel, NAT or hairpin is needed for that. Otherwise the datagram goes *outside*,
        unless the peer was allowed as an allocation of ours only and is gone.
        """
        port = self._port_at(peer)
        if port is not None:
            self.on_peer_datagram(port.routes, len(payload), relayed_address)
            return True
        if outside is not None:
            return outside.send(payload, peer)
        self._drop(Drop.PEER_IS_GONE)
        return False

    def _send_train_perhaps_inside(
        self,
        relayed_address: PeerAddress,
        outside: RelaySocket | None,
        payloads: Pieces,
        each: int,
        size: int,
        peer: PeerAddress,
    ) -> int:
        """Send a train on the same ways. What is dropped of it is left to be sent one by one."""
        port = self._port_at(peer)
        if port is not None:
            return self._relay_to_client(port.routes, payloads, size, relayed_address)
        return 0 if outside is None else outside.send_train(payloads, each, size, peer)

    def _port_at(self, address: Address) -> "_Port | None":
        """Return the relay port of this number, if it is open in the family of *address*."""
        port = self._ports.get(address[1])
        return port if port is not None and family_of(address[0]) in port.sockets else None

    def _listener(self, client: ClientAddress) -> Listener:
        return self._listeners[family_of(client[0][0])]

    def _drop(self, reason: Drop) -> None:
        self._counters.dropped[reason.value] += 1


class _Port:
    """An open relay port: its socket in each family, and the routes to the client."""

    __slots__ = ("routes", "sockets")

    def __init__(self) -> None:
        self.sockets: dict[Family, RelaySocket] = {}
        self.routes: dict[PeerAddress, ToClient] = {}

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()


class _Sender(NamedTuple):
    """What reaches a peer, put together of two functions."""

    send: Callable[[memoryview, PeerAddress], bool]
    send_train: Callable[[Pieces, int, int, PeerAddress], int]
