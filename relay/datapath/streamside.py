"""What clients send over TCP and TLS, and how they are reached there.

The messages are those that come over UDP, one after the other (:mod:`relay.turn.framing`). Where
many of ChannelData come together for one peer and are alike, as in a download, they are relayed
at once, like a train of datagrams.
"""

from typing import Final, Protocol

from relay.datapath.clientside import LARGEST_STUN, ClientSide
from relay.datapath.destination import ClientDestination, Pieces
from relay.datapath.routes import Routes
from relay.datapath.workspace import LARGEST_DATAGRAM, Workspace
from relay.net.stream import Broken, Stream, Then
from relay.turn.channeldata import HEADER, HEADER_SIZE
from relay.turn.commands import ClientAddress, Connection, Drop, transport_of
from relay.turn.framing import FIRST_CHANNEL, NotFramed, message_size
from relay.turn.indications import SEND

# Messages of one connection that are served before others have their turn, if they come in runs.
SHARE: Final = 256
RUN: Final = 64  # messages that are relayed at once, which is as many as the kernel takes
SINGLE: Final = 8  # what one that comes alone counts: as much as so many of a run
# Until a client has an allocation it has nothing longer to say.
LARGEST_OF_NEWCOMER: Final = LARGEST_STUN
# What a client that sends too many requests waits for. Over UDP it would ask again.
_LATER: Final = frozenset({Drop.CLIENT_RATE, Drop.PREFIX_RATE, Drop.TOTAL_RATE})
_unpack_from = HEADER.unpack_from


class Clients(Protocol):
    """The part of :class:`~relay.datapath.control.Control` that knows who there is."""

    def on_request(self, datagram: bytes, client: ClientAddress, /) -> Drop | None:
        """Serve a STUN message; return why it was dropped, or None."""

    def on_connected(self, client: ClientAddress, /) -> Drop | None:
        """Have a client that has opened a connection; return why it may not, or None."""

    def on_disconnected(self, client: ClientAddress, /) -> None:
        """End what a client has whose connection has ended."""

    def has_allocation(self, client: ClientAddress, /) -> bool:
        """Tell if a client has an allocation."""


class StreamSide:
    """Receives what clients send over connections."""

    def __init__(
        self, workspace: Workspace, routes: Routes, clients: Clients, by_udp: ClientSide
    ) -> None:
        """Relay by the *routes*; hand STUN to *clients*, and Send indications to *by_udp*."""
        self._workspace = workspace
        self._to_peer = routes.to_peer
        self._clients = clients
        self._relay_send = by_udp.relay_send
        self._last_channel = by_udp.last_channel
        self._streams: dict[ClientAddress, Stream] = {}
        self.next_number = 0  # of a connection; no two ever have the same

    def reach(self, client: ClientAddress) -> ClientDestination:
        """Return how to send to a client that has a connection."""
        return self._streams[client]

    def on_connected(self, stream: Stream) -> ClientAddress | None:
        """Take a connection; return its client, or None if there may not be so many."""
        connection = Connection(stream.transport, self.next_number)
        self.next_number += 1
        client = ClientAddress((stream.address, connection))
        if self._clients.on_connected(client) is not None:
            return None
        self._streams[client] = stream
        return client

    def adopt(self, client: ClientAddress, stream: Stream) -> None:
        """Go on with the connection of a client of another process."""
        self._streams[client] = stream

    def knows(self, client: ClientAddress) -> bool:
        """Tell if there is a connection of a client."""
        return client in self._streams

    def abandon(self, client: ClientAddress) -> None:
        """Know nothing any more of a client that was adopted, and has nothing here."""
        del self._streams[client]

    def on_disconnected(self, client: ClientAddress) -> None:
        """End what a client has, with its connection."""
        try:
            self._clients.on_disconnected(client)
        finally:
            del self._streams[client]

    def is_in_use(self, client: ClientAddress) -> bool:
        """Tell if a client has an allocation."""
        return self._clients.has_allocation(client)

    def on_stream(self, client: ClientAddress, view: memoryview, size: int) -> tuple[int, Then]:
        """Serve the complete messages in the first *size* bytes; return how many bytes they had.

        Raises Broken.
        """
        at, left = 0, SHARE
        while left > 0:
            try:
                length = message_size(view, at, size)
            except NotFramed as error:
                raise Broken(str(error)) from None
            if length > LARGEST_OF_NEWCOMER:
                self._require_good_size(client, length)
            if not length or at + length > size:
                return at, Then.MORE
            number = _unpack_from(view, at)[0]
            left -= SINGLE
            if number >= FIRST_CHANNEL:
                relayed, at = self._relay(client, view, at, size, length)
                left -= max(0, relayed - SINGLE)
            elif number == SEND:
                sent = self._relay_send(view[at : at + length], length, client)
                if sent >= 0:
                    self._sizes(client)[sent] += 1
                at += length
            elif self._serve(client, view[at : at + length]):
                at += length
            else:
                return at, Then.LATER
        return at, Then.AGAIN

    def _require_good_size(self, client: ClientAddress, length: int) -> None:
        """Refuse a message that is too long, however much of it has come. Raises Broken."""
        if length > LARGEST_DATAGRAM or not self._clients.has_allocation(client):
            raise Broken(f"a message of {length} bytes")

    def _sizes(self, client: ClientAddress) -> dict[int, int]:
        return self._workspace.counters.by_transport[transport_of(client)].to_peer

    def _serve(self, client: ClientAddress, message: memoryview) -> bool:
        """Serve a STUN message; return False if that has to wait."""
        if len(message) > LARGEST_STUN:
            self._workspace.drop(Drop.OVERSIZED_STUN)
            return True
        if self._streams[client].is_clogged:
            return False
        drop = self._clients.on_request(bytes(message), client)
        if drop in _LATER:
            return False
        if drop is not None:
            self._workspace.drop(drop)
        return True

    def _relay(
        self, client: ClientAddress, view: memoryview, at: int, size: int, whole: int
    ) -> tuple[int, int]:
        """Relay the ChannelData of *whole* bytes at *at*, and what follows that is alike.

        Returns how many they were, and where they end.
        """
        header = _unpack_from(view, at)
        number, length = header
        peer = self._to_peer.get((client, number))
        if peer is None:
            is_channel = number <= self._last_channel
            self._workspace.drop(Drop.UNBOUND_CHANNEL if is_channel else Drop.UNKNOWN_PROTOCOL)
            return 1, at + whole
        sizes = self._sizes(client)
        start = at + HEADER_SIZE
        payloads: Pieces = [view[start : start + length]]
        end, most = at + whole, min(size - whole, at + (RUN - 1) * whole)
        while end <= most and length and _unpack_from(view, end) == header:
            payloads.append(view[end + HEADER_SIZE : end + HEADER_SIZE + length])
            end += whole
        sent = 0
        if len(payloads) > 1:
            sent = peer.send_many(payloads, 1, length)
            self._workspace.count_many(sizes, sent, payloads, length)
        for payload in payloads[sent:]:
            if peer.send(payload):
                sizes[length] += 1
        return len(payloads), end
