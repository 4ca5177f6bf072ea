"""What the kernel knows of this host's addresses. Nothing here sends a packet."""

import errno
import socket
from contextlib import suppress
from ipaddress import ip_address
from typing import Final

from relay.net import netlink

WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - every address of this host

# Somewhere out there: documentation addresses, which only the default route leads to.
_FAR_AWAY: Final = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8::1"}
# No host has these: the dummy address of RFC 7600, and one of the discard prefix of RFC 6666.
_NOBODYS: Final = {socket.AF_INET: "192.0.0.8", socket.AF_INET6: "100::1"}

READ_SIZE: Final = 16 << 10  # bytes; the kernel makes no longer pieces for who reads so many
_IPV6_SITE_BYTES: Final = 8  # of an address: the prefix that autoconfiguration keeps


def outward_address(family: socket.AddressFamily) -> str | None:
    """Return the source address that the routing table gives to the internet, or None.

    For IPv6 it may be a temporary one (RFC 8981), which is gone after some days. Where the same
    interface has one that stays, under the same prefix, that is returned instead.
    """
    try:
        host = source_address(_FAR_AWAY[family])
    except OSError:
        return None
    if ip_address(host).is_link_local:  # which nobody beyond the link can use
        return None
    return host if family == socket.AF_INET else lasting_address(host, dump_addresses(family))


def source_address(host: str) -> str:
    """Return the source address that the routing table gives towards *host*. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # on UDP this only picks a route
        source: str = probe.getsockname()[0]
    return source


def lasting_address(host: str, entries: dict[netlink.Entry, int]) -> str:
    """Return *host*, or if it is temporary, its lasting neighbour among *entries* with flags."""
    packed = socket.inet_pton(socket.AF_INET6, host)
    places = {
        entry[0]
        for entry, flags in entries.items()
        if entry[2] == packed and flags & netlink.IFA_F_TEMPORARY
    }
    lasting = sorted(
        entry[2]
        for entry, flags in entries.items()
        if entry[0] in places
        and entry[2][:_IPV6_SITE_BYTES] == packed[:_IPV6_SITE_BYTES]
        and not flags & (netlink.IFA_F_TEMPORARY | netlink.IFA_F_UNUSABLE)
    )
    return socket.inet_ntop(socket.AF_INET6, lasting[0]) if lasting else host


def pack(host: str) -> bytes:
    """Return the 4 or 16 bytes of a numeric host."""
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def require_one_family(sock: socket.socket) -> None:
    """Raise ValueError if a socket for IPv6 takes IPv4 too, in addresses of IPv6."""
    if sock.family == socket.AF_INET6 and not sock.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    ):
        raise ValueError("an IPv6 socket that takes IPv4 too (BindIPv6Only=ipv6-only is missing)")


def can_bind(host: str) -> bool:
    """Tell if a socket could be bound to *host*; what cannot be found out counts as yes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.errno not in {errno.EADDRNOTAVAIL, errno.EINVAL, errno.EAFNOSUPPORT}
    return True


def binds_anything() -> bool:
    """Tell if sockets can be bound to any address (net.ipv4.ip_nonlocal_bind; so for IPv6)."""
    return any(can_bind(host) for host in _NOBODYS.values())


def has_local_route(host: str) -> bool:
    """Tell if *host* is this host's for want of an address by a local route (AnyIP).

    What can be bound is, unless anything can: then the answer is no.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return can_bind(host) and not can_bind(_NOBODYS[family])


def is_local(host: str) -> bool:
    """Tell if *host* is this host's, by an address or by a local route."""
    return host in local_addresses() or has_local_route(host)


def local_addresses() -> set[str]:
    """Return the addresses of all interfaces; none if the kernel does not tell (AF_NETLINK)."""
    families = {4: socket.AF_INET, 16: socket.AF_INET6}
    return {socket.inet_ntop(families[len(packed)], packed) for _, _, packed in dump_addresses()}


def open_netlink(groups: int = 0) -> socket.socket:
    """Return a socket for rtnetlink, which tells what happens in *groups*. Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, groups))
    except BaseException:
        sock.close()
        raise
    return sock


def dump_addresses(family: int = 0) -> dict[netlink.Entry, int]:
    """Return all addresses of one family or of any, with their flags; none if it fails."""
    entries: dict[netlink.Entry, int] = {}
    with suppress(OSError, ValueError), open_netlink() as sock:
        sock.send(netlink.dump_request(1, family))
        while True:
            for kind, _, _, body in netlink.messages(sock.recv(READ_SIZE)):
                if kind in {netlink.NLMSG_DONE, netlink.NLMSG_ERROR}:
                    return entries
                if kind == netlink.RTM_NEWADDR and (found := netlink.address(body)) is not None:
                    entries[found[0]] = found[1]
    return entries
