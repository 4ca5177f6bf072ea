"""What rtnetlink says of addresses. The messages are as <linux/rtnetlink.h> lays them out."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.net import netlink

IPV4 = bytes([192, 0, 2, 1])
IPV6 = bytes.fromhex("20010db8000000000000000000000001")
ADDRESS, LOCAL, LABEL, FLAGS = 1, 2, 3, 8  # IFA_*


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def body(*attributes: bytes, prefix_length: int = 24, flags: int = 0, interface: int = 7) -> bytes:
    return struct.pack("=BBBBI", 2, prefix_length, flags, 0, interface) + b"".join(attributes)


def message(kind: int, content: bytes = b"", *, flags: int = 0, sequence: int = 0) -> bytes:
    header = struct.pack("=IHHII", 16 + len(content), kind, flags, sequence, 0)
    return header + content + bytes(-len(content) % 4)


def test_request_is_a_header_and_an_ifaddrmsg() -> None:
    """RTM_GETADDR with NLM_F_REQUEST and NLM_F_DUMP."""
    assert netlink.dump_request(9, family=2) == struct.pack(
        "=IHHIIBBBBI", 24, 22, 0x301, 9, *[0, 2, 0, 0, 0, 0]
    )


ADDRESSES = [
    pytest.param(body(attribute(ADDRESS, IPV4)), ((7, 24, IPV4), 0), id="IPv4"),
    pytest.param(body(attribute(ADDRESS, IPV6), prefix_length=64), ((7, 64, IPV6), 0), id="IPv6"),
    pytest.param(
        body(attribute(ADDRESS, bytes(4)), attribute(LOCAL, IPV4)),
        ((7, 24, IPV4), 0),
        id="the other end of a link is not ours",
    ),
    pytest.param(
        body(attribute(LOCAL, IPV4), attribute(ADDRESS, bytes(4))),
        ((7, 24, IPV4), 0),
        id="in any order",
    ),
    pytest.param(
        body(attribute(LABEL, b"eth0\0"), attribute(ADDRESS, IPV4)),
        ((7, 24, IPV4), 0),
        id="attributes begin at multiples of 4",
    ),
    pytest.param(
        body(attribute(ADDRESS, IPV6), flags=0x41), ((7, 24, IPV6), 0x41), id="flags of 8 bits"
    ),
    pytest.param(
        body(attribute(ADDRESS, IPV6), attribute(FLAGS, struct.pack("=I", 0x341)), flags=0x41),
        ((7, 24, IPV6), 0x341),
        id="flags of 32 bits",
    ),
    pytest.param(body(), None, id="without an address"),
    pytest.param(body(attribute(ADDRESS, bytes(6))), None, id="of another family"),
]


@pytest.mark.parametrize(("content", "found"), ADDRESSES)
def test_address(content: bytes, found: tuple[netlink.Entry, int] | None) -> None:
    assert netlink.address(memoryview(content)) == found


MALFORMED = [
    pytest.param(bytes(7), id="short ifaddrmsg"),
    pytest.param(body(struct.pack("=HH", 3, ADDRESS)), id="attribute shorter than its header"),
    pytest.param(body(struct.pack("=HH", 9, ADDRESS), bytes(4)), id="attribute past the end"),
]


@pytest.mark.parametrize("content", MALFORMED)
def test_malformed_address(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"netlink|ifaddrmsg"):
        netlink.address(memoryview(content))


def test_messages_follow_each_other() -> None:
    data = message(20, b"12345", flags=2, sequence=3) + message(3, bytes(4), sequence=9)

    assert [(*each[:3], bytes(each[3])) for each in netlink.messages(data)] == [
        (20, 2, 3, b"12345"),
        (3, 0, 9, bytes(4)),
    ]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes(15), id="short header"),
        pytest.param(struct.pack("=IHHII", 15, 20, 0, 0, 0), id="shorter than its header"),
        pytest.param(struct.pack("=IHHII", 17, 20, 0, 0, 0), id="past the end"),
    ],
)
def test_malformed_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink"):
        list(netlink.messages(data))


def test_error_is_an_errno() -> None:
    assert netlink.error(memoryview(struct.pack("=i", -16))) == 16
    with pytest.raises(ValueError, match="netlink"):
        netlink.error(memoryview(bytes(3)))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (
        lambda: [netlink.address(each[3]) for each in netlink.messages(data)],
        lambda: netlink.address(memoryview(data)),
    ):
        with suppress(ValueError):
            read()
