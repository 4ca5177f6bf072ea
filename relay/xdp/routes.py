"""Channels as the program in the kernel knows them: two routes for each, one in each direction.

The layouts are those of ``struct flow`` and ``struct route`` in turn.bpf.c.
"""

import errno
import logging
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from relay.net.addresses import WILDCARDS, pack, source_address
from relay.stun.address import Address, family_of
from relay.stun.const import Family
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    InstallPermissions,
    PeerAddress,
    UnbindChannel,
    connection_of,
)

logger = logging.getLogger("relay.xdp")

INSIDE: Final = 1  # the peer may be another allocation of this relay
UNMARKED: Final = 2  # relay without DSCP and ECN
ONLY_INSIDE: Final = 4  # the peer is at this host: what comes in from there is forged

_FLOW: Final = struct.Struct("!16s16sHHHBB")
_HEAD: Final = struct.Struct("!IHH")  # in front of the flow
_TARGET: Final = struct.Struct("!16s16sHBBI32x")  # behind the flow; ends with room for the hop
_MAPPED: Final = bytes(10) + b"\xff\xff"  # of IPv4, in front
_FROM_PEER: Final = 0  # in the place of a channel number
_IDS: Final = 1 << 32

LAYOUT: Final = 1
"""Of the entries. Raised with each change of what they mean to the program, or to who writes."""

KNOWN_FAILURES: Final = ("map_full", "no_memory", "no_source_address", "not_permitted", "other")
"""Why a channel is not in the kernel, as it is counted."""
_REASONS: Final = {
    errno.E2BIG: "map_full",
    errno.ENOMEM: "no_memory",
    errno.EPERM: "not_permitted",
}


LostControl = Callable[[str], None]
"""Is told why an entry stays that must not: the program has to end."""


class RouteMap(Protocol):
    """The map that the program reads."""

    def update(self, key: bytes, value: bytes, /) -> None:
        """Set an entry. Raises OSError."""

    def delete_many(self, keys: bytes, count: int, /) -> None:
        """Delete *count* entries, whose keys lie end to end. Raises OSError."""


class KernelRoutes:
    """Has the program relay each channel that is bound; a watcher of the routes.

    What it wrote for a channel it remembers, and that it deletes: by then addresses may be others.
    A channel that it cannot write is relayed by the sockets, like what the program hands up.
    """

    def __init__(
        self,
        routes: RouteMap,
        *,
        client_side: Callable[[ClientAddress], Address],
        port_host: Callable[[int, Family], str],
        public_hosts: Mapping[Family, str],
        relay_ports: range,
        is_own_host: Callable[[str], bool],
        copies_tos: bool,
        on_lost_control: LostControl,
    ) -> None:
        """Write to *routes*.

        ``client_side(client)`` returns the address of ours that a client writes to, and
        ``port_host(port, family)`` the one that a relay port is bound to; it may be a wildcard.
        *public_hosts* and *relay_ports* tell what may be another allocation of this relay, and
        ``is_own_host(host)`` whether this host has an address.
        """
        self._routes = routes
        self._client_side = client_side
        self._port_host = port_host
        self._public_hosts = public_hosts
        self._relay_ports = relay_ports
        self._is_own_host = is_own_host
        self._flags = 0 if copies_tos else UNMARKED
        self._on_lost_control = on_lost_control
        # By client and channel both keys, end to end. One table of all would stop the loop for tens
        # of milliseconds whenever it grows.
        self._written: dict[ClientAddress, dict[int, bytes]] = {}
        self._count = 0  # of channels
        self.next_id = 0  # of an entry; no two ever have the same
        self._is_stopped = False
        # What is to be written once the process before writes no more; None: that is so.
        self._held_back: dict[ClientAddress, dict[int, BindChannel]] | None = None
        self.failures: Counter[str] = Counter(dict.fromkeys(KNOWN_FAILURES, 0))

    def __len__(self) -> int:
        """How many there are in the kernel."""
        return 2 * self._count

    def bound(self, bind: BindChannel) -> None:
        """Have the kernel relay a channel from here on, both ways."""
        if self._is_stopped or connection_of(bind.client) is not None:
            return
        if bind.number in self._written.get(bind.client, ()):
            return  # inherited
        if self._held_back is not None:
            self._held_back.setdefault(bind.client, {})[bind.number] = bind
            return
        address = bind.client[0]
        if len(address) > 2 and address[3]:
            return  # link-local: its address is somebody else's at another device
        try:
            client_side = self._client_side(bind.client)
            relayed = self._source(bind.port, bind.peer)
        except OSError as error:
            self._failed("no_source_address", error)
            return
        client = (address[0], address[1])
        to_peer = _flow(client, client_side, bind.number)
        to_client = _flow(bind.peer, relayed, _FROM_PEER)
        to_client_flags = ONLY_INSIDE if self._is_own_host(bind.peer[0]) else 0
        if self._may_be_inside(bind.peer):
            # Where it would arrive: relay ports of one family are bound alike.
            inside = (relayed[0], bind.peer[1])
            seen_from = (self._public_hosts[family_of(bind.peer[0])], bind.port)
            route_to_peer = self._route(to_peer, inside, seen_from, _FROM_PEER, INSIDE)
        else:
            route_to_peer = self._route(to_peer, bind.peer, relayed, _FROM_PEER)
        route_to_client = self._route(to_client, client, client_side, bind.number, to_client_flags)
        try:
            self._routes.update(to_client, route_to_client)
            try:
                self._routes.update(to_peer, route_to_peer)
            except OSError:
                self._delete(to_client)
                raise
        except OSError as error:
            self._failed(_REASONS.get(error.errno or 0, "other"), error)
        else:
            self._written.setdefault(bind.client, {})[bind.number] = to_peer + to_client
            self._count += 1

    def unbinding(self, unbind: UnbindChannel) -> None:
        """Have the kernel relay a channel no more."""
        self._forget(unbind.client, [unbind.number])

    def closing(self, close: ClosePort) -> None:
        """Have the kernel relay no more of many channels at once."""
        self._forget(close.client, [number for number, _ in close.channels])

    def dump(self, client: ClientAddress) -> dict[str, str]:
        """Return what is in the kernel for a client: both keys in hexadecimal, by channel."""
        written = self._written.get(client, {})
        return {str(number): keys.hex() for number, keys in written.items()}

    def inherit(self, client: ClientAddress, written: Mapping[str, str]) -> None:
        """Know what another process has written for a client, in the form of :meth:`dump`."""
        if written and not self._is_stopped:
            keys = {int(number): bytes.fromhex(both) for number, both in written.items()}
            self._written[client] = keys
            self._count += len(keys)

    def disown(self, client: ClientAddress) -> None:
        """Know nothing of a client any more; what is in the kernel is for another process."""
        self._count -= len(self._written.pop(client, ()))
        if self._held_back is not None:
            self._held_back.pop(client, None)

    def hold_back(self) -> None:
        """Write nothing until :meth:`release`: another process does, for as long."""
        self._held_back = {}

    def release(self) -> None:
        """Write what was held back, and from here on at once."""
        held_back, self._held_back = self._held_back or {}, None
        for binds in held_back.values():
            for bind in binds.values():
                self.bound(bind)

    def stop(self) -> None:
        """Write nothing more: the program is at no device any more."""
        self._is_stopped = True
        self._written.clear()
        self._count = 0

    def permitted(self, install: InstallPermissions) -> None:
        """Leave indications to the sockets."""

    def _source(self, port: int, peer: PeerAddress) -> Address:
        """Return the address from which a relay port sends to a peer. Raises OSError."""
        host = self._port_host(port, family_of(peer[0]))
        return (source_address(peer[0]) if host in WILDCARDS else host, port)

    def _may_be_inside(self, peer: PeerAddress) -> bool:
        host, port = peer
        return host == self._public_hosts.get(family_of(host)) and port in self._relay_ports

    def _route(
        self, flow: bytes, to: Address, source: Address, channel: int, flags: int = 0
    ) -> bytes:
        number, self.next_id = self.next_id % _IDS, self.next_id + 1
        head = _HEAD.pack(number, to[1], source[1])
        hosts = (_mapped(to[0]), _mapped(source[0]))
        flags |= self._flags
        return head + flow + _TARGET.pack(*hosts, channel, _number(to[0]), flags, number)

    def _forget(self, client: ClientAddress, numbers: list[int]) -> None:
        """Delete the routes of a client's channels, as far as they have any."""
        written = self._written.get(client)
        if written is None:
            return
        keys = [written.pop(number) for number in numbers if number in written]
        self._count -= len(keys)
        if not written:
            del self._written[client]
        if keys:
            self._delete(b"".join(keys))

    def _delete(self, keys: bytes) -> None:
        """Delete entries, whose keys lie end to end."""
        try:
            self._routes.delete_many(keys, len(keys) // _FLOW.size)
        except OSError as error:
            self.failures["other"] += 1
            self._on_lost_control(f"a route cannot be deleted: {error.strerror}")

    def _failed(self, reason: str, error: OSError) -> None:
        if not self.failures[reason]:
            logger.warning(
                "a channel is relayed by the sockets, for the kernel does not take it: %s (%s); "
                "more such are only counted",
                error.strerror,
                reason,
            )
        self.failures[reason] += 1


def _flow(remote: Address, local: Address, channel: int) -> bytes:
    return _FLOW.pack(
        *(_mapped(remote[0]), _mapped(local[0]), remote[1], local[1], channel),
        *(_number(remote[0]), 0),
    )


def _mapped(host: str) -> bytes:
    packed = pack(host)
    return packed if len(packed) == 16 else _MAPPED + packed


def _number(host: str) -> int:
    """Return the version of IP."""
    return 6 if ":" in host else 4
