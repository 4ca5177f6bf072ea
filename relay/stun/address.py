"""Transport addresses as text, spelled exactly as the kernel spells them.

A datagram's source arrives from the kernel as text and a peer arrives in
XOR-PEER-ADDRESS as bytes; both are keys of the same tables, so one address must
have one spelling. The kernel's is that of ``inet_ntop``.
"""

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from relay.stun.const import Family

Address = tuple[str, int]
"""Host and port: ``("192.0.2.1", 3478)`` or ``("2001:db8::1", 3478)``."""


def family_of(host: str) -> Family:
    """Tell the family of a host in numeric form."""
    return Family.IPV6 if ":" in host else Family.IPV4


def pack_host(host: str) -> bytes:
    """Return the 4 or 16 bytes of a numeric host. Raises ValueError if it is none."""
    try:
        return inet_pton(AF_INET6 if ":" in host else AF_INET, host)
    except OSError as error:
        raise ValueError(f"{host!r} is not a numeric host") from error


def prefix_of(host: str, ipv4_bytes: int, ipv6_bytes: int) -> bytes:
    """Return the first bytes of a numeric host: as many as its family counts."""
    packed = pack_host(host)
    return packed[: ipv4_bytes if len(packed) == 4 else ipv6_bytes]


def unpack_host(packed: bytes) -> str:
    """Return the text of 4 or 16 bytes."""
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def format_endpoint(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around IPv6, for people and for URIs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
