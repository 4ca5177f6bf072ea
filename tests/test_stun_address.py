"""Each address has one spelling, that of the kernel: ``inet_ntop``."""

import socket
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.stun.address import family_of, format_endpoint, pack_host, unpack_host
from relay.stun.const import Family

SPELLINGS = [
    pytest.param("c0000201", "192.0.2.1", id="IPv4"),
    pytest.param("00000000", "0.0.0.0", id="IPv4, unspecified"),
    pytest.param("ffffffff", "255.255.255.255", id="IPv4, broadcast"),
    pytest.param("00000000000000000000000000000000", "::", id="unspecified"),
    pytest.param("00000000000000000000000000000001", "::1", id="loopback"),
    pytest.param("0000000000000000000000000000ffff", "::ffff", id="only the last group"),
    pytest.param("00000000000000000000000000010000", "::0.1.0.0", id="the last two groups"),
    pytest.param("000000000000000000000000c0000201", "::192.0.2.1", id="IPv4-compatible"),
    pytest.param("00000000000000000000ffffc0000201", "::ffff:192.0.2.1", id="IPv4-mapped"),
    pytest.param("00000000000000000000ffff00000000", "::ffff:0.0.0.0", id="IPv4-mapped zero"),
    pytest.param("000000000000000000000001c0000201", "::1:c000:201", id="nearly compatible"),
    pytest.param("0000000000000000fffe0000c0000201", "::fffe:0:c000:201", id="nearly mapped"),
    pytest.param("0000000000000000ffff0000c0000201", "::ffff:0:c000:201", id="translated"),
    pytest.param("0064ff9b0000000000000000c0000201", "64:ff9b::c000:201", id="NAT64"),
    pytest.param("20010db8000000000000000000000001", "2001:db8::1", id="one run of zeros"),
    pytest.param(
        "20010db8000000000001000000000001", "2001:db8::1:0:0:1", id="the first of two equal runs"
    ),
    pytest.param(
        "20010db8000000010000000000000001", "2001:db8:0:1::1", id="the longer of two runs"
    ),
    pytest.param(
        "20010db8000000010001000100010001",
        "2001:db8:0:1:1:1:1:1",
        id="a single zero group is written",
    ),
    pytest.param("20010db8000100000000000000000000", "2001:db8:1::", id="zeros at the end"),
    pytest.param(
        "20010DB8ABCDEF010203040506070809", "2001:db8:abcd:ef01:203:405:607:809", id="full"
    ),
]


@pytest.mark.parametrize(("packed", "host"), SPELLINGS)
def test_hosts_have_one_spelling(packed: str, host: str) -> None:
    assert unpack_host(bytes.fromhex(packed)) == host
    assert pack_host(host) == bytes.fromhex(packed)


# Groups of IPv6, drawn so that runs of zeros and the prefixes that hold IPv4 are frequent.
groups = st.sampled_from([0, 0, 0, 1, 0xFFFF, 0x0DB8, 0x2001]) | st.integers(0, 0xFFFF)
ipv4 = st.binary(min_size=4, max_size=4)
ipv6 = (
    st.binary(min_size=16, max_size=16)
    | st.lists(groups, min_size=8, max_size=8).map(lambda eight: struct.pack("!8H", *eight))
    | st.builds(
        bytes.__add__,
        st.sampled_from([bytes(12), bytes(10) + b"\xff\xff", b"\x00\x64\xff\x9b" + bytes(8)]),
        ipv4,
    )
)


@settings(deadline=None)
@given(ipv4)
def test_ipv4_is_spelled_as_the_kernel_does(packed: bytes) -> None:
    host = unpack_host(packed)

    assert host == socket.inet_ntop(socket.AF_INET, packed)
    assert pack_host(host) == packed
    assert family_of(host) is Family.IPV4


@settings(deadline=None, max_examples=500)
@given(ipv6)
@example(bytes(16))
@example(bytes(15) + b"\x01")
@example(bytes(13) + b"\x01\x00\x00")
@example(bytes(12) + b"\x00\x01\x00\x00")
def test_ipv6_is_spelled_as_the_kernel_does(packed: bytes) -> None:
    host = unpack_host(packed)

    assert host == socket.inet_ntop(socket.AF_INET6, packed)
    assert pack_host(host) == packed
    assert family_of(host) is Family.IPV6


OTHER_SPELLINGS = [
    pytest.param("2001:DB8::1", "2001:db8::1", id="upper case"),
    pytest.param("2001:0db8:0000:0000:0000:0000:0000:0001", "2001:db8::1", id="written out"),
    pytest.param("::ffff:c000:201", "::ffff:192.0.2.1", id="mapped, hexadecimal"),
]


@pytest.mark.parametrize(("text", "host"), OTHER_SPELLINGS)
def test_other_spellings_are_understood(text: str, host: str) -> None:
    assert unpack_host(pack_host(text)) == host


NO_HOSTS = [
    pytest.param("", id="empty"),
    pytest.param("localhost", id="a name"),
    pytest.param("192.0.2", id="three numbers"),
    pytest.param("192.0.2.1.1", id="five numbers"),
    pytest.param("192.0.2.256", id="a number too large"),
    pytest.param("192.0.2.-1", id="a negative number"),
    pytest.param("192.0.2.", id="a number missing"),
    pytest.param("192.0.2.1:3478", id="with a port"),
    pytest.param("2001:db8::1::", id="two runs"),
    pytest.param("2001:db8::12345", id="a group too large"),
    pytest.param("[2001:db8::1]", id="in brackets"),
]


@pytest.mark.parametrize("text", NO_HOSTS)
def test_what_is_no_host_raises(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whoever finds it words it)
        pack_host(text)


ENDPOINTS = [
    pytest.param("192.0.2.1", 3478, "192.0.2.1:3478", id="IPv4"),
    pytest.param("2001:db8::1", 3478, "[2001:db8::1]:3478", id="IPv6"),
    pytest.param("::ffff:192.0.2.1", 0, "[::ffff:192.0.2.1]:0", id="IPv4-mapped"),
]


@pytest.mark.parametrize(("host", "port", "text"), ENDPOINTS)
def test_endpoints_are_bracketed_if_ipv6(host: str, port: int, text: str) -> None:
    assert format_endpoint(host, port) == text
