"""Ethernet frames with UDP in them: made, and taken apart with every length and checksum held."""

import socket
import struct
from dataclasses import dataclass, replace
from typing import Final, Self

from relay.net.addresses import pack
from relay.stun.address import Address

HERE, THERE = bytes.fromhex("020000000002"), bytes.fromhex("020000000001")
IPV4, IPV6, VLAN, ARP = 0x0800, 0x86DD, 0x8100, 0x0806
ETHERNET_SIZE: Final = 14
MORE_FRAGMENTS, DO_NOT_FRAGMENT = 0x2000, 0x4000
_UDP: Final = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Datagram:
    """A UDP datagram in an Ethernet frame, as somebody sends it, or has received it."""

    source: Address
    to: Address
    payload: bytes
    ttl: int = 64
    tos: int = 0
    has_checksum: bool = True

    def frame(
        self,
        *,
        partial_checksum: bool = False,
        fragment: int = 0,
        options: bytes = b"",
        udp_length: int | None = None,
        header_checksum: int | None = None,
        vlan: bytes = b"",
        destination: bytes = HERE,
        flow_label: int = 0x12345,
        behind: bytes = b"",
    ) -> bytes:
        """Return the frame.

        A partial checksum covers the pseudo-header only, and hardware is to finish it. *fragment*
        has flags and offset, *options* are those of IPv4, *vlan* is a whole tag, and *behind*
        follows the datagram in the frame.
        """
        length = 8 + len(self.payload) if udp_length is None else udp_length
        addresses = pack(self.source[0]) + pack(self.to[0])
        pseudo = addresses + struct.pack("!IHBB", length, 0, 0, _UDP)
        udp = struct.pack("!HHHH", self.source[1], self.to[1], length, 0) + self.payload
        if not self.has_checksum:
            check = 0
        elif partial_checksum:
            check = ~checksum(pseudo) & 0xFFFF
        else:
            check = checksum(pseudo + udp) or 0xFFFF
        udp = udp[:6] + struct.pack("!H", check) + udp[8:]
        if ":" in self.source[0]:
            first = 6 << 28 | self.tos << 20 | flow_label
            ip = struct.pack("!IHBB", first, len(udp), _UDP, self.ttl) + addresses
            kind = IPV6
        else:
            size = 20 + len(options)
            ip = struct.pack(
                "!BBHHHBBH4s4s",
                *(0x40 | size // 4, self.tos, size + len(udp), 7, fragment, self.ttl, _UDP, 0),
                *(pack(self.source[0]), pack(self.to[0])),
            )
            ip += options
            sum_of_header = checksum(ip) if header_checksum is None else header_checksum
            ip = ip[:10] + struct.pack("!H", sum_of_header) + ip[12:]
            kind = IPV4
        return destination + THERE + vlan + struct.pack("!H", kind) + ip + udp + behind

    @classmethod
    def of(cls, frame: bytes) -> Self:
        """Take a frame apart. Fails if a length or a checksum in it is wrong."""
        kind = int.from_bytes(frame[12:14])
        if kind == IPV4:
            ip, addresses = frame[14:34], frame[26:34]
            assert ip[0] == 0x45
            assert checksum(ip) == 0, "checksum of the IP header"
            assert int.from_bytes(ip[6:8]) == 0, "DF, or a fragment"
            udp = frame[34 : 14 + int.from_bytes(ip[2:4])]
            assert len(udp) == int.from_bytes(ip[2:4]) - 20
            family, tos, ttl = socket.AF_INET, ip[1], ip[8]
        else:
            assert kind == IPV6
            ip, addresses = frame[14:54], frame[22:54]
            (first,) = struct.unpack_from("!I", ip)
            assert first >> 28 == 6
            assert first & 0xFFFFF == 0, "a flow label"
            udp = frame[54 : 54 + int.from_bytes(ip[4:6])]
            assert len(udp) == int.from_bytes(ip[4:6])
            family, tos, ttl = socket.AF_INET6, first >> 20 & 0xFF, ip[7]
        source_port, port, length, check = struct.unpack_from("!HHHH", udp)
        assert length == len(udp)
        if check:
            pseudo = addresses + struct.pack("!IHBB", length, 0, 0, _UDP)
            assert checksum(pseudo + udp) == 0, "checksum of UDP"
        else:
            assert kind == IPV4, "IPv6 without a checksum"
        half = len(addresses) // 2
        return cls(
            source=(socket.inet_ntop(family, addresses[:half]), source_port),
            to=(socket.inet_ntop(family, addresses[half:]), port),
            payload=udp[8:],
            ttl=ttl,
            tos=tos,
            has_checksum=bool(check),
        )

    def but(self, **changes: object) -> Self:
        """Return one that differs in these fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


def checksum(data: bytes) -> int:
    """Return the Internet checksum. RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
