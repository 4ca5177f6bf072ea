"""Everything that the server can ask for, and the addresses it speaks of.

Whoever drives the server takes commands with ``Server.next_command`` after each input
and carries them out in that order. Nobody changes one; they are not frozen because that
makes each of them four times as dear (0.9 instead of 0.2 µs on CPython 3.11).
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, NewType

from relay.stun.address import Address
from relay.stun.const import Family

UDP: Final = "udp"


class Connection(NamedTuple):
    """A client's connection. No two ever have the same number.

    Only between a client and the relay there are any: towards peers there is UDP. RFC 8656 §3.1.
    """

    transport: str  # "tcp" or "tls"
    number: int


ClientAddress = NewType("ClientAddress", tuple[tuple[Any, ...], bytes | Connection])
"""A client's side of its 5-tuple, and ours: ``(socket address, local address)``.

The socket address is what the kernel reports and takes, beginning with host and port.
The local address is the one of ours that the client wrote to, packed, or empty where
the listening socket has just one; or it is the client's connection, if it has one.
Compared and handed back whole.
"""


def connection_of(client: ClientAddress) -> Connection | None:
    """Return the connection that a client has, or None if it speaks UDP."""
    ours = client[1]
    return ours if isinstance(ours, Connection) else None


def transport_of(client: ClientAddress) -> str:
    """Return how a client reaches the relay: "udp", "tcp" or "tls"."""
    ours = client[1]
    return ours.transport if isinstance(ours, Connection) else UDP


PeerAddress = NewType("PeerAddress", Address)
"""A peer: host and port, without flow label or scope."""


@dataclass(slots=True)
class SendMessage:
    """Send a STUN message to a client."""

    to: ClientAddress
    message: bytes


@dataclass(slots=True)
class OpenPort:
    """Bind a relay port in each family that it can be bound in.

    Answer with ``Server.handle_port_opened``, before any other input.
    """

    port: int
    families: tuple[Family, ...]


@dataclass(slots=True)
class ClosePort:
    """Give up a relay port in some families, with every permission for hosts of these."""

    client: ClientAddress
    port: int
    families: tuple[Family, ...]
    channels: list[tuple[int, PeerAddress]]  # number and peer of those that end with it


@dataclass(slots=True)
class BindChannel:
    """Relay between *client* on channel *number* and *peer* through *port*, both ways."""

    client: ClientAddress
    number: int
    port: int
    peer: PeerAddress
    # False if the peer may be reached only as an allocation of this very relay.
    reaches_outside: bool


@dataclass(slots=True)
class UnbindChannel:
    """Stop relaying what the same BindChannel started, while the port stays open."""

    client: ClientAddress
    number: int
    port: int
    peer: PeerAddress


@dataclass(slots=True)
class InstallPermissions:
    """Relay between *client* and every port of *hosts* by Send and Data indications.

    Also where that is done already: then what is known of the ways to them has changed.
    """

    client: ClientAddress
    port: int
    hosts: list[str]
    reports_errors: bool  # from here on the client is to hear of ICMP errors


@dataclass(slots=True)
class RemovePermissions:
    """Stop relaying what InstallPermissions started for *hosts*, while the port stays open."""

    client: ClientAddress
    port: int
    hosts: list[str]


Command = (
    SendMessage
    | OpenPort
    | ClosePort
    | BindChannel
    | UnbindChannel
    | InstallPermissions
    | RemovePermissions
)


class PortFailure(Enum):
    """Why a port was not opened."""

    IN_USE = "in use by another process, or reserved"  # another one may do
    # Out of descriptors or memory, or the address is gone: no other port will do.
    REFUSED = "refused by the system"


class Drop(Enum):
    """Why a datagram was not served. The value is the name under which it is counted."""

    NOT_SERVING = "not_serving"  # the portal has not said that we may
    NO_SOURCE_PORT = "source_port_zero"
    UNKNOWN_PROTOCOL = "unknown_protocol"  # the first byte is neither STUN nor ChannelData
    OVERSIZED_STUN = "oversized_stun"
    FROM_ITSELF = "from_itself"  # a request that came through one of our own relay ports
    MALFORMED_STUN = "malformed_stun"
    WRONG_FINGERPRINT = "wrong_fingerprint"
    NOT_A_REQUEST = "not_a_request"
    SEND_INDICATIONS_OFF = "send_indications_off"
    NO_PERMISSION = "no_permission"  # a Send indication to a host without one
    FORBIDDEN_PEER = "forbidden_peer"  # or to a port of a permitted host that may not be reached
    CLIENT_RATE = "client_rate"  # more requests than one client may have served
    PREFIX_RATE = "unauthenticated_rate_per_prefix"  # more work than its network may ask for
    TOTAL_RATE = "unauthenticated_rate"  # more than all without an allocation may ask for together
    MALFORMED_CHANNEL_DATA = "malformed_channel_data"
    UNBOUND_CHANNEL = "unbound_channel"
    UNBOUND_PEER = "unbound_peer"
    PEER_IS_GONE = "peer_is_gone"  # it was an allocation of this relay, and nothing else is allowed
