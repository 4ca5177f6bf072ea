"""Wireshark's dissectors read what the relay says, and find nothing wrong with it."""

import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.stun.attributes import Attr, Attribute, Coding
from relay.stun.const import UDP_PROTOCOL, Family, Kind, Method
from relay.stun.integrity import FINGERPRINT_SIZE, fingerprint
from relay.stun.message import Message
from tests.interop.loopback import running_relay
from tests.process import RelayProcess
from tests.turnclient import TIMEOUT, TurnClient, TurnError

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed"),
]

STUN_PORT = 3478  # by which tshark knows what to expect
TCP_PROTOCOL = 6
AS_IS: Coding[bytes] = Coding(lambda value, _: value, lambda value, _: value)
CHANGE_REQUEST = Attribute(0x0003, "CHANGE-REQUEST", AS_IS)  # RFC 5780 §7.2; unknown to the relay


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    with running_relay("--software=firezone-relay") as relay:
        yield relay


def test_successes(relay: RelayProcess, capture: "Capture") -> None:
    """Each with the attributes that RFC 8656 §7.3 and its like ask for, and SOFTWARE."""
    with (
        CapturedClient(relay, capture) as alice,
        CapturedClient(relay, capture, server="::1", fingerprinted=True) as bob,
    ):
        relayed_ports = []
        for client in alice, bob:
            client.maps()
            relayed_ports.append(client.allocates()[1])
            client.refreshes(1200)
            client.request(Method.CREATE_PERMISSION, (Attr.XOR_PEER_ADDRESS, ("127.0.0.1", 9)))
            client.binds(0x4000, ("127.0.0.1", 9))

    assert capture.complaints() == []
    unsigned, signed = "0x8022", "0x8022,0x0008"
    attributes = [
        ["0x0101", f"0x0020,{unsigned}"],
        ["0x0103", f"0x0016,0x0020,0x000d,{signed}"],
        ["0x0104", f"0x000d,{signed}"],
        ["0x0108", signed],
        ["0x0109", signed],
    ]
    fingerprinted = [[kind, f"{types},0x8028"] for kind, types in attributes]
    answers = capture.read("stun.type.class == 0x10", "stun.type", "stun.attribute")
    assert answers == attributes + fingerprinted
    addresses = "stun.att.ipv4", "stun.att.ipv6", "stun.att.port"
    assert capture.read("stun.type == 0x0101", *addresses) == [
        ["127.0.0.1", "", str(alice.captured_port)],
        ["", "::1", str(bob.captured_port)],
    ]
    assert capture.read("stun.type == 0x0103", *addresses) == [
        ["127.0.0.1,127.0.0.1", "", f"{relayed_ports[0]},{alice.captured_port}"],
        ["127.0.0.1", "::1", f"{relayed_ports[1]},{bob.captured_port}"],
    ]


def test_dual_allocation(relay: RelayProcess, capture: "Capture") -> None:
    with CapturedClient(relay, capture) as alice:
        alice.allocates_both_families()
    with (
        running_relay("--public-ip4-addr=127.0.0.1", loopback=False) as ipv4_relay,
        CapturedClient(ipv4_relay, capture) as bob,
    ):
        bob.allocates_both_families()

    assert capture.complaints() == []
    answers = capture.read("stun.type == 0x0103", "stun.attribute")
    assert answers == [
        ["0x0016,0x0016,0x0020,0x000d,0x8022,0x0008"],
        ["0x0016,0x0020,0x000d,0x8001,0x0008"],
    ]


def test_errors(relay: RelayProcess, capture: "Capture") -> None:
    refused: list[tuple[int, Method, tuple[Attribute[Any], Any]]] = [
        (442, Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, TCP_PROTOCOL)),
        (400, Method.ALLOCATE, (Attr.REQUESTED_ADDRESS_FAMILY, Family.IPV4)),
        (420, Method.REFRESH, (CHANGE_REQUEST, bytes(4))),
        (437, Method.REFRESH, (Attr.LIFETIME, 600)),
    ]
    refused_with_allocation: list[tuple[int, Method, tuple[Attribute[Any], Any]]] = [
        (437, Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)),
        (443, Method.CREATE_PERMISSION, (Attr.XOR_PEER_ADDRESS, ("::1", 9))),
        (403, Method.CREATE_PERMISSION, (Attr.XOR_PEER_ADDRESS, ("10.0.0.1", 9))),
    ]
    with CapturedClient(relay, capture) as alice:
        for code, method, attribute in refused:
            alice.is_refused(code, method, attribute)
        alice.allocates()
        for code, method, attribute in refused_with_allocation:
            alice.is_refused(code, method, attribute)
        alice.forgets_its_nonce()
        alice.refreshes(0)

    assert capture.complaints() == []
    expected = [401, 442, 400, 420, 437, 437, 443, 403, 438]
    parts = capture.read("stun.type.class == 0x11", "stun.att.error.class", "stun.att.error")
    assert [int(hundreds) * 100 + int(rest) for hundreds, rest in parts] == expected
    assert capture.read("stun.att.unknown", "stun.att.unknown") == [["0x0003"]]


def test_channel_data(relay: RelayProcess, capture: "Capture") -> None:
    payloads = [bytes(size) for size in (0, 1, 2, 3, 4, 1200)]
    with (
        CapturedClient(relay, capture) as alice,
        CapturedClient(relay, capture, server="::1") as bob,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        peer.bind(("127.0.0.1", 0))
        for client, number in (alice, 0x4000), (bob, 0x4FFF):
            relayed = client.allocates()
            client.binds(number, peer.getsockname())
            for payload in payloads:
                peer.sendto(payload, relayed)
                assert client.receives() == (number, payload)

    assert capture.complaints() == []
    assert capture.read("stun.channel", "stun.channel", "stun.length") == [
        [number, str(len(payload))] for number in ("0x4000", "0x4fff") for payload in payloads
    ]


ANSWER = Message(
    Kind.SUCCESS, Method.BINDING, bytes(12), [(Attr.XOR_MAPPED_ADDRESS, ("192.0.2.1", 50000))]
).encode(fingerprinted=True)


@pytest.mark.parametrize(
    "datagram",
    [
        pytest.param(ANSWER[:-4] + bytes(4), id="wrong fingerprint"),
        pytest.param(ANSWER[:-4], id="shorter than it says"),
        pytest.param(b"\x40\x00\x00\x06short", id="ChannelData shorter than it says"),
        pytest.param(b"\x50\x00", id="neither"),
    ],
)
def test_faults_are_found(capture: "Capture", datagram: bytes) -> None:
    """What the tests above rely on."""
    capture.add(datagram, STUN_PORT, 50000)
    assert len(capture.complaints()) == 1


class Capture:
    """A pcap file. Whatever its real addresses, in it all goes to and from port 3478 by IPv4."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # https://www.tcpdump.org/manpages/pcap-savefile.5.txt; packets begin with the IP header
        linktype_raw = 101
        header = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, linktype_raw)
        path.write_bytes(header)

    def add(self, datagram: bytes, source: int, destination: int) -> None:
        udp = struct.pack("!HHHH", source, destination, 8 + len(datagram), 0) + datagram
        host = socket.inet_aton("192.0.2.1")
        ip = struct.pack("!BxHxxxxBBH4s4s", 0x45, 20 + len(udp), 64, UDP_PROTOCOL, 0, host, host)
        size = len(ip + udp)
        with self._path.open("ab") as file:
            file.write(struct.pack("=IIII", 0, 0, size, size) + ip + udp)

    def complaints(self) -> list[list[str]]:
        """Return what is not STUN, not whole or not right."""
        return self.read(
            "!stun || _ws.malformed || _ws.expert", "frame.number", "_ws.expert.message"
        )

    def read(self, which: str, *fields: str) -> list[list[str]]:
        """Return the fields of the packets that the display filter *which* lets through."""
        options = [option for field in fields for option in ("-e", field)]
        printed = subprocess.run(
            ["tshark", "-n", "-r", self._path, "-Y", which, "-T", "fields", *options],
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        )
        return [line.split("\t") for line in printed.stdout.splitlines()]


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    return Capture(tmp_path / "relay.pcap")


class CapturedClient(TurnClient):
    """A client all of whose datagrams are captured."""

    def __init__(
        self,
        relay: RelayProcess,
        capture: Capture,
        *,
        server: str = "127.0.0.1",
        fingerprinted: bool = False,
    ) -> None:
        super().__init__((server, relay.port), relay.username, relay.password)
        self.captured_port = self.address[1]
        self.socket = TappedSocket(self.socket, capture, fingerprinted=fingerprinted)
        self.socket.settimeout(TIMEOUT)

    def allocates_both_families(self) -> None:
        self.request(
            Method.ALLOCATE,
            (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL),
            (Attr.ADDITIONAL_ADDRESS_FAMILY, Family.IPV6),
        )

    def is_refused(self, code: int, method: Method, attribute: tuple[Attribute[Any], Any]) -> None:
        with pytest.raises(TurnError) as refused:
            self.request(method, attribute)
        assert refused.value.code == code

    def forgets_its_nonce(self) -> None:
        self.client.nonce = b"of another relay"


class TappedSocket(socket.socket):
    """A connected socket whose datagrams are captured. It can add FINGERPRINT to requests."""

    def __init__(self, tapped: socket.socket, capture: Capture, *, fingerprinted: bool) -> None:
        port = tapped.getsockname()[1]
        super().__init__(tapped.family, tapped.type, fileno=tapped.detach())
        self._port = port
        self._capture = capture
        self._fingerprinted = fingerprinted

    def send(self, datagram: Any, flags: int = 0) -> int:
        if self._fingerprinted and datagram[0] <= 0x03:
            size = struct.pack("!H", int.from_bytes(datagram[2:4], "big") + FINGERPRINT_SIZE)
            covered = datagram[:2] + size + datagram[4:]
            datagram = covered + struct.pack("!HHI", Attr.FINGERPRINT.type, 4, fingerprint(covered))
        self._capture.add(datagram, self._port, STUN_PORT)
        return super().send(datagram, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        datagram = super().recv(size, flags)
        self._capture.add(datagram, STUN_PORT, self._port)
        return datagram
