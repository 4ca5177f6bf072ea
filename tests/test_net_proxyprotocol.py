"""What a proxy says of where a connection is from."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.net.proxyprotocol import LONGEST, SIGNATURE, Header, NoHeader, read_header

LINE = b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n"


def binary(source: str, port: int, *, command: int = 0x21, more: bytes = b"") -> bytes:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    there = "2001:db8::1" if ":" in source else "198.51.100.1"
    addresses = socket.inet_pton(family, source) + socket.inet_pton(family, there)
    body = addresses + struct.pack("!HH", port, 443) + more
    kind = 0x21 if ":" in source else 0x11
    return SIGNATURE + struct.pack("!BBH", command, kind, len(body)) + body


@pytest.mark.parametrize(
    ("header", "source"),
    [
        pytest.param(LINE, ("192.0.2.7", 50000), id="version 1, IPv4"),
        pytest.param(
            b"PROXY TCP6 2001:DB8:0::7 2001:db8::1 1 443\r\n",
            ("2001:db8::7", 1),
            id="version 1, IPv6, spelled as the kernel does",
        ),
        pytest.param(
            b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 443\r\n",
            ("192.0.2.7", 1),
            id="version 1, IPv4 as IPv6",
        ),
        pytest.param(b"PROXY UNKNOWN\r\n", None, id="version 1, unknown"),
        pytest.param(
            b"PROXY UNKNOWN ffff::1 ::1 1 2\r\n", None, id="version 1, unknown, with more"
        ),
        pytest.param(binary("192.0.2.7", 50000), ("192.0.2.7", 50000), id="version 2, IPv4"),
        pytest.param(binary("2001:db8::7", 1), ("2001:db8::7", 1), id="version 2, IPv6"),
        pytest.param(binary("::ffff:192.0.2.7", 1), ("192.0.2.7", 1), id="version 2, IPv4 as IPv6"),
        pytest.param(
            binary("192.0.2.7", 50000, more=b"\x04\x00\x03abc"),
            ("192.0.2.7", 50000),
            id="version 2, with what else a proxy knows",
        ),
        pytest.param(binary("192.0.2.7", 1, command=0x20), None, id="version 2, the proxy itself"),
        pytest.param(SIGNATURE + b"\x21\x00\x00\x00", None, id="version 2, unknown"),
    ],
)
def test_a_header_says_where_a_client_is(header: bytes, source: tuple[str, int] | None) -> None:
    assert read_header(header) == Header(len(header), source)
    assert read_header(header + b"what follows") == Header(len(header), source)
    for size in range(len(header)):
        assert read_header(header[:size]) is None


@pytest.mark.parametrize(
    "begin",
    [
        pytest.param(b"\x00\x01\x00\x00", id="STUN"),
        pytest.param(b"\x16\x03\x01", id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n", id="HTTP"),
        pytest.param(b"PROXZ", id="almost a line"),
        pytest.param(SIGNATURE[:5] + b"!", id="almost a signature"),
        pytest.param(b"PROXY TCP4 192.0.2.7 198.51.100.1 50000\r\n", id="a word is missing"),
        pytest.param(b"PROXY UDP4 192.0.2.7 198.51.100.1 1 2\r\n", id="another transport"),
        pytest.param(b"PROXY TCP4 192.0.2.777 198.51.100.1 1 2\r\n", id="no address"),
        pytest.param(b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 2\r\n", id="no port"),
        pytest.param(b"PROXY TCP4 192.0.2.7 198.51.100.1 00000999999 2\r\n", id="many zeros"),
        pytest.param(b"PROXY TCP4 2001:db8::7 2001:db8::1 1 2\r\n", id="not of that family"),
        pytest.param(b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n", id="with a scope"),
        pytest.param(
            b"PROXY TCP4 192.0.2.7 198.51.100.1 1_0 2\r\n", id="not how ports are spelled"
        ),
        pytest.param(b"PROXY TCP4 " + b"1" * 100, id="a line without an end"),
        pytest.param(binary("192.0.2.7", 1, command=0x31), id="version 3"),
        pytest.param(binary("192.0.2.7", 1, command=0x22), id="an unknown command"),
        pytest.param(SIGNATURE + b"\x21\x12\x00\x0c" + bytes(12), id="datagrams"),
        pytest.param(SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216), id="a socket of a file system"),
        pytest.param(SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11), id="too short for addresses"),
        pytest.param(SIGNATURE + b"\x21\x11" + struct.pack("!H", LONGEST), id="too long"),
    ],
)
def test_what_is_no_header_is_refused(begin: bytes) -> None:
    with pytest.raises(NoHeader):
        read_header(begin)


@given(
    st.one_of(st.binary(), st.binary().map(SIGNATURE.__add__), st.binary().map(b"PROXY ".__add__))
)
def test_any_bytes_are_a_header_or_none(received: bytes) -> None:
    try:
        header = read_header(received)
    except NoHeader:
        return
    assert header is None or header.size <= min(len(received), LONGEST)
