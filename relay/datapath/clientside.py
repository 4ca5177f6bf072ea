"""What clients send: ChannelData and Send indications go to their peer, STUN to the server."""

from collections.abc import Callable
from typing import Final

from relay.datapath.destination import PeerDestination, Pieces
from relay.datapath.permitted import Permitted
from relay.datapath.relayport import RelayPorts
from relay.datapath.routes import Routes
from relay.datapath.workspace import FRAME_AT, PAYLOAD_AT, Prefixes, Workspace
from relay.turn.channeldata import HEADER, HEADER_SIZE, parse
from relay.turn.commands import ClientAddress, Drop
from relay.turn.indications import SEND, USUAL_START, Peer, parse_send

# STUN over UDP stays below the MTU (RFC 8489 §6.1); longer messages only cost time to read.
LARGEST_STUN: Final = 2048
LAST_STUN_BYTE: Final = 0x03  # a first byte up to this one is STUN. RFC 8656 §12
FIRST_CHANNEL_BYTE: Final = 0x40
_NEITHER: Final = 0xFF  # a first byte that is neither STUN nor ChannelData
_unpack_from = HEADER.unpack_from

OnRequest = Callable[[bytes, ClientAddress], Drop | None]
"""Serves a STUN datagram; returns why it was dropped, or None."""


class ClientSide:
    """Receives what clients send. Their datagrams lie at the start of the buffer."""

    def __init__(
        self,
        workspace: Workspace,
        routes: Routes,
        ports: RelayPorts,
        on_request: OnRequest,
        refuse_send: Callable[[], Drop],
        channel_numbers: range,
    ) -> None:
        """Relay by the *routes*; hand STUN to *on_request*.

        ``refuse_send()`` says why a client without any permission has its Send indications dropped.
        """
        self._workspace = workspace
        self._buffer = workspace.buffer
        self._view = workspace.for_clients
        self._payloads = workspace.payloads
        self._sent_payloads = Prefixes(self._view[USUAL_START:])
        self._sizes = workspace.counters.to_peer
        self._to_peer = routes.to_peer
        self._permitted = routes.permitted
        self._reach_permitted = routes.reach_permitted
        self._ports = ports
        self._on_request = on_request
        self._refuse_send = refuse_send
        self.last_channel = channel_numbers[-1]
        self._last_channel_byte = self.last_channel >> 8

    def on_datagram(self, size: int, client: ClientAddress, tos: int = 0) -> None:
        """Serve a datagram of *size* bytes."""
        if size >= HEADER_SIZE:
            number, length = _unpack_from(self._buffer, FRAME_AT)
            peer = self._to_peer.get((client, number))
            if peer is not None and length + HEADER_SIZE <= size:
                if peer.send(self._payloads[length], tos):
                    self._sizes[length] += 1
                return
            if number == SEND:
                length = self.relay_send(self._view, size, client, tos)
                if length >= 0:
                    self._sizes[length] += 1
                return
        self._on_other(size, client)

    def on_segments(self, size: int, segment: int, client: ClientAddress, tos: int = 0) -> int:
        """Serve datagrams that lie end to end, *size* bytes in all.

        Each is of *segment* bytes; the last may be shorter. Returns how many of them had to be
        handled singly.
        """
        if self._view[0]:
            relayed = self._relay_many(size, segment, client, tos)
        else:
            relayed = self._send_many(size, segment, client, tos)
        left = range(relayed * segment, size, segment)
        for start in left:
            datagram = self._view[start : min(start + segment, size)]
            self._view[: len(datagram)] = datagram
            self.on_datagram(len(datagram), client, tos)
        return len(left)

    def _relay_many(self, size: int, segment: int, client: ClientAddress, tos: int) -> int:
        """Relay segments that are alike; return how many of them were, from the first on.

        They are alike if each is ChannelData of one channel and length.
        """
        buffer, view = self._buffer, self._view
        count = size // segment
        whole = count * segment
        for start in range(FRAME_AT, PAYLOAD_AT):
            if buffer[start : FRAME_AT + whole : segment].count(buffer[start]) != count:
                return 0
        frame = parse(view, segment) if count else None
        if frame is None or not frame[1]:  # nothing in it that UDP_SEGMENT could cut
            return 0
        number, length = frame
        peer = self._to_peer.get((client, number))
        if peer is None:
            return 0
        payloads: Pieces = [view[at : at + length] for at in range(HEADER_SIZE, whole, segment)]
        last = parse(view[whole:], size - whole)
        if last is not None and last[0] == number and 0 < last[1] <= length:
            payloads.append(view[whole + HEADER_SIZE : whole + HEADER_SIZE + last[1]])
        sent = peer.send_many(payloads, 1, length, tos)
        self._workspace.count_many(self._sizes, sent, payloads, length)
        return sent

    def relay_send(self, view: memoryview, size: int, client: ClientAddress, tos: int = 0) -> int:
        """Relay the Send indication in the first *size* bytes. RFC 8656 §11.2.

        Returns how many bytes of payload were relayed, or -1.
        """
        permitted = self._permitted.get(client)
        if permitted is None:
            self._workspace.drop(self._refuse_send())
            return -1
        send = parse_send(view, size)
        if send is None:
            self._workspace.drop(Drop.MALFORMED_STUN)
            return -1
        peer, start, length, dont_fragment = send
        way = permitted.reached.get(peer) or self._reach(permitted, peer)
        if way is None:
            return -1
        if start == USUAL_START and view is self._view:
            payload = self._sent_payloads[length]
        else:
            payload = view[start : start + length]
        is_sent = way.send_whole(payload, tos) if dont_fragment else way.send(payload, tos)
        return length if is_sent else -1

    def _send_many(self, size: int, segment: int, client: ClientAddress, tos: int) -> int:
        """Relay Send indications that are alike; return how many of them were, from the first on.

        They are alike if all are for one peer, and none but the last of them has another length.
        """
        permitted, view = self._permitted.get(client), self._view
        first = parse_send(view, segment) if permitted is not None else None
        if permitted is None or first is None:
            return 0
        peer, start, length, dont_fragment = first
        way = permitted.reached.get(peer)
        if way is None or dont_fragment:
            return 0
        payloads: Pieces = []
        for at in range(0, size, segment):
            send = parse_send(view[at:], min(segment, size - at))
            if send is None or send[:2] != (peer, start) or send[3] or not 0 < send[2] <= length:
                break
            payloads.append(view[at + start : at + start + send[2]])
            if send[2] < length:  # of what UDP_SEGMENT cuts only the last one may be shorter
                break
        if not payloads:
            return 0
        sent = way.send_many(payloads, 1, length, tos)
        self._workspace.count_many(self._sizes, sent, payloads, length)
        return sent

    def _reach(self, permitted: Permitted, peer: Peer) -> PeerDestination | None:
        """Find the way to a peer, or count why there is none."""
        way = self._reach_permitted(permitted, peer)
        if isinstance(way, Drop):
            self._workspace.drop(way)
            return None
        return way

    def _on_other(self, size: int, client: ClientAddress) -> None:
        """Serve STUN; drop whatever else it is that cannot be relayed."""
        drop: Drop | None
        first = self._view[0] if size else _NEITHER
        if FIRST_CHANNEL_BYTE <= first <= self._last_channel_byte:
            is_malformed = parse(self._view, size) is None
            drop = Drop.MALFORMED_CHANNEL_DATA if is_malformed else Drop.UNBOUND_CHANNEL
        elif first <= LAST_STUN_BYTE:
            drop = self._on_stun(size, client)
        else:
            drop = Drop.UNKNOWN_PROTOCOL
        if drop is not None:
            self._workspace.drop(drop)

    def _on_stun(self, size: int, client: ClientAddress) -> Drop | None:
        host, port = client[0][:2]
        if port == 0:  # no answer could reach it
            return Drop.NO_SOURCE_PORT
        if size > LARGEST_STUN:
            return Drop.OVERSIZED_STUN
        if self._ports.is_source((host, port)):
            # Or a client could stack allocations into a loop. RFC 8656 §21.1.7
            return Drop.FROM_ITSELF
        return self._on_request(bytes(self._view[:size]), client)


class NotServing:
    """Receives what clients send before anybody may be served: all of it is dropped."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def on_datagram(self, _size: int, _client: ClientAddress, _tos: int = 0) -> None:
        """Drop a datagram."""
        self._workspace.drop(Drop.NOT_SERVING)

    def on_segments(self, size: int, segment: int, _client: ClientAddress, _tos: int = 0) -> int:
        """Drop datagrams of *segment* bytes, *size* bytes in all."""
        self._workspace.counters.dropped[Drop.NOT_SERVING.value] += -(-size // segment)
        return 0
