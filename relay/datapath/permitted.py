"""What one allocation relays without channels: by Send and Data indications. RFC 8656 §11."""

from collections.abc import Callable, Iterable
from typing import Final

from relay.datapath.destination import Destination, PeerDestination, Pieces
from relay.datapath.workspace import PAYLOAD_AT, Workspace
from relay.stun.address import Address, family_of
from relay.stun.const import Family
from relay.turn.commands import Drop, PeerAddress
from relay.turn.framing import PADDING
from relay.turn.indications import DataHeader, Icmp, Peer, data_header, icmp_error
from relay.turn.ratelimit import ErrorBudget

# Peers of one allocation to which the way is remembered. A client may name 65,535 for each host.
MOST_REACHED: Final = 256


class Permitted:
    """The hosts that an allocation has permissions for, and the ways to their ports."""

    __slots__ = (
        "_buffer",
        "_client",
        "_clock",
        "_errors",
        "_headers",
        "_hosts",
        "_sizes",
        "_workspace",
        "port",
        "reached",
    )

    def __init__(
        self,
        port: int,
        workspace: Workspace,
        client: Destination,
        sizes: dict[int, int],
        clock: Callable[[], float],
    ) -> None:
        """Begin with nobody. What is relayed to *client* counts in *sizes*.

        *clock* tells monotonic seconds.
        """
        self.port = port
        self._workspace = workspace
        self._buffer = workspace.buffer
        self._sizes = sizes
        self._client = client
        self._clock = clock
        self._hosts: set[str] = set()
        self._headers: dict[str, DataHeader] = {}  # of the hosts that something came from
        self._errors = ErrorBudget()
        self.reached: dict[Peer, PeerDestination] = {}  # peers that something was sent to

    def __contains__(self, host: str) -> bool:
        return host in self._hosts

    def permit(self, hosts: Iterable[str]) -> None:
        """Relay what comes from any port of *hosts*. What was known of ways is forgotten."""
        self._hosts.update(hosts)
        self.reached.clear()

    def revoke(self, hosts: Iterable[str]) -> None:
        """Relay nothing more of *hosts*, and to them, but in channels."""
        for host in hosts:
            self._hosts.remove(host)
            self._headers.pop(host, None)
        self.reached.clear()

    def close_in(self, families: Iterable[Family]) -> None:
        """Forget everything of some families."""
        ended = {*families}
        self.revoke([host for host in self._hosts if family_of(host) in ended])

    def remember(self, peer: Peer, way: PeerDestination) -> None:
        """Keep the way to a peer for the next datagrams."""
        if len(self.reached) >= MOST_REACHED:
            self.reached.clear()
        self.reached[peer] = way

    def indicate(self, size: int, peer: PeerAddress, tos: int) -> bool:
        """Relay a datagram whose *size* bytes lie in the buffer; return whether it was relayed."""
        header = self._headers.get(peer[0]) or self._header_of(peer[0])
        if header is None:
            self._workspace.drop(Drop.UNBOUND_PEER)
            return False
        workspace, start = self._workspace, header.size
        header.pack_into(self._buffer, PAYLOAD_AT - start, peer[1], size, workspace.transaction_ids)
        end = start + size
        if size % 4:
            padding = PADDING[size % 4]
            self._buffer[PAYLOAD_AT + size : PAYLOAD_AT + size + len(padding)] = padding
            end += len(padding)
        if self._client.send(workspace.indicated[start][end], tos):
            self._sizes[size] += 1
            return True
        return False

    def indicate_many(self, payloads: Pieces, size: int, peer: PeerAddress, tos: int) -> int:
        """Relay payloads of *size* bytes at once; the last may be shorter, none is empty.

        Returns how many were relayed, from the first on.
        """
        header = self._headers.get(peer[0]) or self._header_of(peer[0])
        if header is None:
            return 0
        pieces: Pieces = []
        for payload in payloads:
            length = len(payload)
            head = header.pack(peer[1], length, self._workspace.transaction_ids)
            pieces += (head, payload, PADDING[length % 4])
        sent = self._client.send_many(pieces, 3, header.size + size + -size % 4, tos)
        self._workspace.count_many(self._sizes, sent, payloads, size)
        return sent

    def on_error(self, peer: Address, icmp: Icmp) -> None:
        """Tell the client of an ICMP error about a permitted host, now and then. RFC 8656 §11.5."""
        now = self._clock()
        if peer[0] in self._hosts and not self._errors.is_spent(now):
            self._errors.spend(now)
            self._client.send(icmp_error(peer, icmp, self._workspace.transaction_ids))

    def _header_of(self, host: str) -> DataHeader | None:
        """Return what writes headers for a host; None if there is no permission for it."""
        if host not in self._hosts:
            return None
        header = self._headers[host] = data_header(host)
        return header
