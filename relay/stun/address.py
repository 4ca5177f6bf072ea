"""Transport addresses as text, spelled exactly as the kernel spells them.

A datagram's source arrives from the kernel as text and a peer arrives in
XOR-PEER-ADDRESS as bytes; both are keys of the same tables, so one address must
have one spelling. The kernel's is that of ``inet_ntop``.
"""

from ipaddress import IPv4Address, IPv6Address

from relay.stun.const import Family

Address = tuple[str, int]
"""Host and port: ``("192.0.2.1", 3478)`` or ``("2001:db8::1", 3478)``."""

_IPV4_MAPPED = bytes(10) + b"\xff\xff"


def family_of(host: str) -> Family:
    """Tell the family of a host in numeric form."""
    return Family.IPV6 if ":" in host else Family.IPV4


def pack_host(host: str) -> bytes:
    """Return the 4 or 16 bytes of a numeric host. Raises ValueError if it is none."""
    return IPv6Address(host).packed if ":" in host else IPv4Address(host).packed


def prefix_of(host: str, ipv4_bytes: int, ipv6_bytes: int) -> bytes:
    """Return the first bytes of a numeric host: as many as its family counts."""
    packed = pack_host(host)
    return packed[: ipv4_bytes if len(packed) == 4 else ipv6_bytes]


def unpack_host(packed: bytes) -> str:
    """Return the text of 4 or 16 bytes, spelled as ``inet_ntop`` does."""
    if len(packed) == 4:
        return _dotted(packed)
    if packed.startswith(_IPV4_MAPPED):
        return "::ffff:" + _dotted(packed[12:])
    if not any(packed[:12]) and any(packed[12:14]):  # IPv4-compatible
        return "::" + _dotted(packed[12:])
    return IPv6Address(packed).compressed


def format_endpoint(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around IPv6, for people and for URIs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _dotted(packed: bytes) -> str:
    return ".".join(map(str, packed))
