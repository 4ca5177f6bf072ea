"""Floods of every kind, from processes of their own: unauthenticated, of users, and of HTTP.

``python -m tests.flood KIND HOST PORT HTTP_PORT SECRET`` plays all floods that :data:`FLOODS` has
of a kind for each line of its input, and writes a line when the relay has read them. Few
datagrams are under way at a time, so that no queue of the kernel overflows: a test can then
require that every datagram of somebody else arrives.
"""

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from random import Random
from typing import Any, Final

import pytest

from relay.stun.attributes import Attr, Attribute
from relay.stun.const import Family, Kind, Method
from relay.stun.message import Message
from relay.turn.users import DEFAULT_REALM, mint
from tests.scenario import channel_data, request
from tests.turnclient import TIMEOUT, TurnClient, TurnError

PORTS: Final = range(62000, 62256)  # for allocations; the kernel hands out none of these by itself
# Networks of their own: only unauthenticated clients are to exceed the rate of unsigned answers.
UNAUTHENTICATED, USERS = "127.66.66.66", "127.77"
NEVER: Final = 2**64 - 1  # when a credential expires
ECHO: Final = 0x4000  # a channel that leads back to its client
TIMES: Final = 4  # that each flood comes in a round
# Bytes that a flooder may take of a queue, which has 416 KiB where nobody has set anything.
QUEUE_SHARE: Final = 96 << 10


def main(kind: str, host: str, port: str, http_port: str, secret: str) -> None:
    """Flood once per line of standard input."""
    target = Target(kind, host, int(port), int(http_port), secret)
    print("ready", flush=True)
    for _ in sys.stdin:
        for flood in FLOODS[kind] * TIMES:
            flood(target)
        target.has_read_all()
        print("done", flush=True)
    target.leaves()


class Target:
    """The relay that is flooded, and how much is under way to it."""

    def __init__(self, kind: str, host: str, port: int, http_port: int, secret: str) -> None:
        self.rng = Random(kind)
        self.hosts = (host, "::1")
        self.port, self.http_port = port, http_port
        self._secret = secret
        self._under_way = 0  # bytes
        self._anchors = [
            TurnClient((at, port), *mint(NEVER, f"{kind} at {at}", secret)) for at in self.hosts
        ]
        for anchor, family in zip(self._anchors, Family, strict=True):
            anchor.binds(ECHO, anchor.allocates(family, lifetime=3600))

    def sends(self, datagram: bytes, sock: socket.socket, *to: tuple[str, int]) -> None:
        """Send it when the relay has read enough of those before."""
        self._under_way += 1024 + 2 * len(datagram)  # as the kernel counts, or more
        if self._under_way > QUEUE_SHARE:
            self.has_read_all()
        if to:
            sock.sendto(datagram, *to)
        else:
            sock.send(datagram)

    def has_read_all(self) -> None:
        """Send oneself data in both families: when it comes back, what was before it has been read.

        Requests would not do: of these one client may have only so many served.
        """
        for anchor in self._anchors:
            anchor.sends(ECHO, b"")
            assert anchor.receives() == (ECHO, b"")
        self._under_way = 0

    def leaves(self) -> None:
        for anchor in self._anchors:
            anchor.refreshes(0)
            anchor.socket.close()

    @contextmanager
    def user(
        self, salt: str | None = None, expiry: int = NEVER, password: str | None = None
    ) -> Iterator[TurnClient]:
        """A client, with a username of its own if no *salt* is given."""
        username, right = mint(expiry, salt or self.rng.randbytes(8).hex(), self._secret)
        # So many addresses that no two users share a 5-tuple by chance, of which one would get 437.
        own = f"{USERS}.{self.rng.randrange(1, 255)}.{self.rng.randrange(1, 255)}"
        with TurnClient(("127.0.0.1", self.port), username, password or right, bind=own) as client:
            # So that it signs from its first request on.
            client.client.nonce, client.client.realm = b"none", DEFAULT_REALM
            yield client

    def signed(
        self, method: int, *attributes: tuple[Attribute[Any], Any], nonce: bytes | None = None
    ) -> bytes:
        """What a client with an allocation sends. Its nonce is no good for anybody else."""
        anchor = self._anchors[0].client
        *credentials, own = anchor.signature()
        last = own if nonce is None else (Attr.NONCE, nonce)
        return request(method, *attributes, *credentials, last).encode(anchor.key)


Flood = Callable[[Target], None]


# --- Unauthenticated clients ----------------------------------------------------------------


def unauthenticated(datagrams: Callable[[Target], Iterator[bytes]]) -> Flood:
    """Send these to the listening port, in both families."""

    def flood(target: Target) -> None:
        for host, own in zip(target.hosts, (UNAUTHENTICATED, "::1"), strict=True):
            with TurnClient((host, target.port), "", "", bind=own) as client:
                for datagram in datagrams(target):
                    target.sends(datagram, client.socket)

    return flood


def garbage(target: Target) -> Iterator[bytes]:
    for size in (0, 1, 3, 4, 5, 19, 20, 21, 100, 1472, 9000, 60000):
        for first in range(0, 256, 32):
            yield (bytes((first,)) + target.rng.randbytes(size))[:size]


def truncated_stun(target: Target) -> Iterator[bytes]:
    whole = target.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 17))
    yield from (whole[:size] for size in range(len(whole)))


def mutated_stun(target: Target) -> Iterator[bytes]:
    for method in tuple(Method) * 40:
        mutated = bytearray(target.signed(method, (Attr.CHANNEL_NUMBER, 0x4000)))
        for _ in range(target.rng.randint(1, 4)):
            mutated[target.rng.randrange(len(mutated))] ^= 1 << target.rng.randrange(8)
        yield bytes(mutated)


def bindings(_: Target) -> Iterator[bytes]:
    """More than are answered for one network."""
    yield from (request(Method.BINDING).encode(fingerprinted=n % 2 == 1) for n in range(1000))


def unsigned_requests(_: Target) -> Iterator[bytes]:
    """Of methods that exist, and of others."""
    for method in (*tuple(Method) * 10, *range(0x00A, 0xFFF, 37)):
        yield request(method, (Attr.REQUESTED_TRANSPORT, 17), (Attr.LIFETIME, 0)).encode()


def malformed_usernames(_: Target) -> Iterator[bytes]:
    for username in ("", ":", "x:y", "-1:y", f"{10**20}:y", "9" * 500 + ":y", "٣:y", "1:" * 200):
        yield request(Method.ALLOCATE, (Attr.USERNAME, username)).encode(b"some key")


def foreign_and_invented_nonces(target: Target) -> Iterator[bytes]:
    """Among them a copied Refresh that would end the allocation of its sender."""
    for nonce in (None, b"", b"invented", bytes(700), *(target.rng.randbytes(36),) * 20):
        yield target.signed(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, 17), nonce=nonce)
        yield target.signed(Method.REFRESH, (Attr.LIFETIME, 0), nonce=nonce)


def indications_and_responses(target: Target) -> Iterator[bytes]:
    for kind in (Kind.INDICATION, Kind.SUCCESS, Kind.ERROR):
        for method in tuple(Method) * 5:
            message = Message(kind, method, target.rng.randbytes(12))
            message.attributes += [(Attr.XOR_PEER_ADDRESS, ("127.0.0.1", 9)), (Attr.DATA, b"data")]
            yield message.encode()


def odd_attributes(target: Target) -> Iterator[bytes]:
    """Unknown ones by the hundred, and known ones that hold nonsense."""
    binding = request(Method.BINDING).encode()
    unknown = b"".join(struct.pack("!HH", 0x7000 + number, 0) for number in range(500))
    odd = [struct.pack("!HHI", 0x000C, 4, number << 16) for number in (0, 0x3FFF, 0x5000, 0xFFFF)]
    odd += [struct.pack("!HH", known, size) for known in range(0x30) for size in (0, 4, 0xFFFC)]
    for attributes in (unknown, *odd, target.rng.randbytes(400)):
        yield binding[:2] + struct.pack("!H", len(attributes)) + binding[4:] + attributes


def wrong_fingerprints(_: Target) -> Iterator[bytes]:
    sound = request(Method.BINDING).encode(fingerprinted=True)
    yield from (sound[:-1] + bytes((sound[-1] ^ number,)) for number in range(1, 100))


def oversized_stun(target: Target) -> Iterator[bytes]:
    for size in (2048, 2049, 4096, 30000):
        yield request(Method.BINDING).encode() + target.rng.randbytes(size - 20)


def channel_data_of_nobody(target: Target) -> Iterator[bytes]:
    """On channels that are not bound, with padding, and with lengths that are not true."""
    for number in range(0x4000, 0x8000, 0x40):
        frame = channel_data(number, target.rng.randbytes(50))
        yield from (frame, frame + bytes(7), frame[:-1], frame[:3])


def unbound_peers(target: Target) -> None:
    """Write to every port for allocations, whoever has it."""
    for host, family in zip(target.hosts, (socket.AF_INET, socket.AF_INET6), strict=True):
        with socket.socket(family, socket.SOCK_DGRAM) as mallory:
            for port in tuple(PORTS) * 4:
                target.sends(b"unasked for", mallory, (host, port))


def source_port_0(target: Target) -> None:
    """Only a raw socket can send it, and only root may have one."""
    if os.geteuid() == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
            for _ in range(50):
                binding = request(Method.BINDING).encode()
                header = struct.pack("!HHHH", 0, target.port, 8 + len(binding), 0)
                target.sends(header + binding, raw, ("127.0.0.1", 0))


# --- Users ----------------------------------------------------------------------------------


def wrong_passwords(target: Target) -> None:
    for _ in range(10):
        with target.user(password="guessed") as client:
            is_refused(401, client.allocates)


def expired_and_huge_expiries(target: Target) -> None:
    for expiry in (0, 1, 1_000_000_000):
        with target.user(expiry=expiry) as client:
            for _ in range(30):  # a line for the log each
                is_refused(401, client.allocates)
    with target.user(expiry=10**20) as client:
        is_refused(401, client.allocates)
    for expiry in (2**31, 2**63, 2**64 - 1, 10**20 - 1):
        with target.user(expiry=expiry) as client:
            client.allocates()
            client.refreshes(0)


def short_lives(target: Target) -> None:
    """They leave without deleting their allocations."""
    for number in range(40):
        with target.user() as client:
            client.allocates(lifetime=1 + number % 2)
            client.binds(0x4000, ("127.0.0.1", 9))


def churn(target: Target) -> None:
    """One client comes and goes, with channels that are bound, in use, and bound wrongly."""
    with target.user() as client:
        for peer in (("127.0.0.1", 9), ("::1", 9)) * 20:
            is_refused(437, client.refreshes, 0)
            client.allocates(Family.IPV6 if ":" in peer[0] else Family.IPV4)
            is_refused(437, client.allocates)
            client.binds(0x4000, peer)
            client.binds(0x4000, peer)
            client.sends(0x4000, b"to a port where nobody is: ICMP comes back")
            is_refused(400, client.binds, 0x4000, (peer[0], 10))
            is_refused(400, client.binds, 0x4001, peer)
            client.refreshes(0)


def takeovers(target: Target) -> None:
    """One username from one socket after another, each of which takes what the last had."""
    with ExitStack() as stack:
        for _ in range(40):
            client = stack.enter_context(target.user(salt="roaming"))
            client.allocates()
            client.binds(0x4000, ("127.0.0.1", 9))
        client.refreshes(0)


def every_port(target: Target) -> None:
    """Allocate until no port is left, though others hold some; then give all of them back."""
    with ExitStack() as stack:
        served: list[TurnClient] = []
        with suppress(TurnError):
            while True:
                client = stack.enter_context(target.user())
                client.allocates()
                served.append(client)
        for client in served:
            client.refreshes(0)


def many_channels(target: Target) -> None:
    with target.user() as client:
        client.allocates()
        for number in range(300):
            client.binds(0x4000 + number, ("127.0.0.1", 1000 + number))
        client.refreshes(0)


def forbidden_and_unreachable_peers(target: Target) -> None:
    with target.user() as client:
        client.allocates()
        own = (("127.0.0.1", target.port), ("127.0.0.1", target.http_port))
        for peer in (*own, ("10.0.0.1", 9), ("224.0.0.1", 9), ("127.0.0.1", 0)):
            is_refused(403, client.binds, 0x4000, peer)
        is_refused(443, client.binds, 0x4000, ("::1", 9))
        client.binds(0x4000, ("8.8.8.8", 53))  # which cannot be reached from 127.0.0.1
        for _ in range(100):
            target.sends(channel_data(0x4000, b"lost"), client.socket)
        client.refreshes(0)


def own_relayed_address(target: Target) -> None:
    """What a client sends to itself comes back; what it sends to one who is gone does not."""
    with target.user() as alice, target.user() as bob:
        alice.binds(0x4000, alice.allocates())
        alice.binds(0x4001, bob.allocates())
        for size in (0, 4, 100, 1472, 9000):
            alice.sends(0x4001, bytes(size))  # bob has no channel for it
            alice.sends(0x4000, bytes(size))
            assert alice.receives() == (0x4000, bytes(size))
        bob.refreshes(0)
        alice.sends(0x4001, b"too late")
        alice.refreshes(0)


def is_refused(code: int, ask: Callable[..., object], *arguments: object) -> None:
    """Ask, and see that the answer is this error."""
    with pytest.raises(TurnError) as refusal:
        ask(*arguments)
    assert refusal.value.code == code


# --- HTTP -----------------------------------------------------------------------------------


def idle_connections(target: Target) -> None:
    """More than are kept."""
    connect(target, [b""] * 80)


def slow_and_endless_requests(target: Target) -> None:
    connect(target, [b"GET /met", b"GET / HTTP/1.1\r\nHost: ", b"POST / HTTP/1.1\r\n" * 400] * 5)


def http_garbage(target: Target) -> None:
    connect(target, [target.rng.randbytes(size) + b"\r\n\r\n" for size in range(0, 2000, 100)])


def many_requests(target: Target) -> None:
    for path in (b"/metrics", b"/healthz", b"/readyz", b"/nowhere") * 5:
        gets(target, path)


def connect(target: Target, openings: list[bytes]) -> None:
    """Open as many connections and hold them all, until somebody else was answered."""
    with ExitStack() as stack:
        for opening in openings:
            sock = socket.create_connection(("127.0.0.1", target.http_port), TIMEOUT)
            stack.enter_context(sock)
            with suppress(ConnectionError):
                sock.sendall(opening)
        gets(target, b"/healthz")


def gets(target: Target, path: bytes) -> None:
    with socket.create_connection(("127.0.0.1", target.http_port), TIMEOUT) as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: relay\r\n\r\n" % path)
        assert sock.recv(9) == b"HTTP/1.1 "


# --- All of them ----------------------------------------------------------------------------

FLOODS: Final[dict[str, tuple[Flood, ...]]] = {
    "unauthenticated": (
        unauthenticated(garbage),
        unauthenticated(truncated_stun),
        unauthenticated(mutated_stun),
        unauthenticated(bindings),
        unauthenticated(unsigned_requests),
        unauthenticated(malformed_usernames),
        unauthenticated(foreign_and_invented_nonces),
        unauthenticated(indications_and_responses),
        unauthenticated(odd_attributes),
        unauthenticated(wrong_fingerprints),
        unauthenticated(oversized_stun),
        unauthenticated(channel_data_of_nobody),
        unbound_peers,
        source_port_0,
    ),
    "users": (
        wrong_passwords,
        expired_and_huge_expiries,
        short_lives,
        churn,
        takeovers,
        every_port,
        many_channels,
        forbidden_and_unreachable_peers,
        own_relayed_address,
    ),
    "http": (idle_connections, slow_and_endless_requests, http_garbage, many_requests),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
