"""Connections, on real sockets: one iteration of the loop at a time."""

import os
import resource
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from relay.net.reactor import Reactor
from relay.net.stream import (
    ANSWERS,
    QUEUED,
    SENT_AT_ONCE,
    Broken,
    End,
    Stream,
    Then,
)
from relay.net.streams import (
    ACCEPTS_AT_ONCE,
    LATER,
    PATIENCE,
    Limits,
    Streams,
    listen_tcp,
)
from relay.net.tls import RECORDS_AT_ONCE, Identity, read_chain
from tests.certificates import Authority
from tests.keyupdates import KeyUpdater

CLIENT = ("127.0.0.1", 0)
HEADER = b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n"

AUTHORITY = Authority()
SERVER = AUTHORITY.issue("relay.test")
IDENTITY = Identity(read_chain(SERVER.pem), SERVER.key)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Receiver:
    """Takes messages of four bytes, and does what the test says."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.taken: list[bytes] = []
        self.ended: list[int] = []
        self.in_use: set[int] = set()
        self.refuses = self.fails = False
        self.fails_to_forget: set[int] = set()
        self.then = Then.MORE
        self.at_once = 1 << 30  # bytes

    def on_connected(self, stream: Stream) -> Any:
        if self.refuses:
            return None
        self.streams.append(stream)
        return len(self.streams) - 1

    def on_stream(self, client: int, view: memoryview, size: int) -> tuple[int, Then]:
        assert client not in self.ended
        if self.fails:
            raise RuntimeError("a bug")
        if bytes(view[:4]) == b"bad!":
            raise Broken("as the test wants it")
        served = min(size - size % 4, self.at_once)
        if served:
            self.taken.append(bytes(view[:served]))
        then = self.then
        if then is Then.MORE and served < size - size % 4:
            then = Then.AGAIN
        return served, then

    def on_disconnected(self, client: int) -> None:
        if client in self.fails_to_forget:
            raise RuntimeError("a bug")
        self.ended.append(client)

    def is_in_use(self, client: int) -> bool:
        return client in self.in_use


class World:
    """A reactor with connections, and clients of it."""

    def __init__(self, limits: Limits, transport: str) -> None:
        self.clock = Clock()
        self.bugs: list[Exception] = []
        self.reactor = Reactor(self.clock, self.bugs.append)
        self.losses: list[str] = []
        self.streams = Streams(self.reactor, limits, self.losses.append, IDENTITY)
        self.transport = transport
        listener = listen_tcp("127.0.0.1", 0)
        self.address = listener.getsockname()
        self.streams.add(listener, transport)
        self.receiver = Receiver()
        self.streams.start(self.receiver)
        self.stack = ExitStack()

    def close(self) -> None:
        self.streams.close()
        self.reactor.close()
        self.stack.close()

    def connects(self, first: bytes = b"") -> socket.socket:
        """Return a client's socket, when its connection has been accepted."""
        client = self.stack.enter_context(socket.socket())
        client.connect(self.address)
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if first:
            client.send(first)
        self.turns()
        return client

    def shakes_hands(
        self, client: socket.socket, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ) -> ssl.SSLSocket:
        """Speak TLS over a connection from here on."""
        context = ssl.create_default_context(cadata=AUTHORITY.pem)
        context.maximum_version = version
        tls = self.stack.enter_context(
            context.wrap_socket(client, server_hostname="relay.test", do_handshake_on_connect=False)
        )
        for _ in range(5):
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            self.turns()
        with suppress(ssl.SSLWantReadError):  # or its tickets would stay unread: RST at the end
            tls.recv(1)
        return tls

    def turns(self, count: int = 3) -> None:
        """Let the loop turn, without waiting for anything."""
        for _ in range(count):
            self.reactor.call_at(self.clock.now, self._nothing)
            self.reactor.iterate()

    def passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.turns()

    def ended(self) -> dict[str, int]:
        return {why.value: count for why, count in self.streams.ended.items()}

    def _nothing(self) -> None:
        pass


@pytest.fixture
def limits() -> Limits:
    return Limits(connections=100, per_address=None)


@pytest.fixture(params=["tcp", "tls"])
def world(request: pytest.FixtureRequest, limits: Limits) -> Iterator[World]:
    world = World(limits, request.param)
    yield world
    world.close()
    assert world.bugs == []


@pytest.fixture
def tcp(limits: Limits) -> Iterator[World]:
    world = World(limits, "tcp")
    yield world
    world.close()


def opens(world: World) -> socket.socket:
    """Return a client's connection that speaks what is spoken there."""
    client = world.connects()
    return client if world.transport == "tcp" else world.shakes_hands(client)


def received(world: World, client: socket.socket) -> bytes:
    """Return all that there is for a client to read, to the end if the relay has closed."""
    found = b""
    for _ in range(20_000):
        world.turns(1)
        try:
            part = client.recv(1 << 20)
        except (BlockingIOError, ssl.SSLWantReadError):
            if not world.streams.queued:
                break
        else:
            if not part:
                break
            found += part
    return found


# --- Reading ---------------------------------------------------------------------------------


def test_what_a_client_sends_is_taken(world: World) -> None:
    client = opens(world)
    client.send(b"onetwo")
    world.turns()
    assert world.receiver.taken == [b"onet"]
    client.send(b"xx")
    world.turns()
    assert world.receiver.taken == [b"onet", b"woxx"]


def test_a_client_is_known_by_its_address(world: World) -> None:
    client = opens(world)
    assert world.receiver.streams[0].address == client.getsockname()
    assert world.receiver.streams[0].transport == world.transport


def test_what_is_left_has_its_turn_after_the_others(world: World) -> None:
    alice, bob = opens(world), opens(world)
    world.receiver.at_once = 4
    alice.send(b"AAAA" * 3)
    bob.send(b"BBBB" * 3)
    world.turns(1)
    assert sorted(world.receiver.taken) == [b"AAAA", b"BBBB"]
    world.turns(2)
    assert sorted(world.receiver.taken) == [b"AAAA"] * 3 + [b"BBBB"] * 3
    assert sorted(world.receiver.taken[2:4]) == [b"AAAA", b"BBBB"]


def test_what_has_to_wait_is_served_later(world: World) -> None:
    client = opens(world)
    world.receiver.at_once, world.receiver.then = 0, Then.LATER
    client.send(b"wait")
    world.turns()
    client.send(b"more")
    world.turns()
    world.receiver.at_once, world.receiver.then = 1 << 30, Then.MORE
    world.turns()
    assert world.receiver.taken == []
    world.passes(LATER)
    assert b"".join(world.receiver.taken) == b"waitmore"


def test_much_is_read_in_portions(world: World) -> None:
    client = opens(world)
    world.receiver.in_use = {0}
    client.send(b"used")  # from now on it is read in large ones
    world.turns()
    world.receiver.taken.clear()
    data = os.urandom(1 << 20)
    sent = 0
    while sent < len(data):
        with suppress(BlockingIOError, ssl.SSLWantWriteError):
            sent += client.send(data[sent : sent + 50_000])
        world.turns(1)
    world.turns(200)
    assert b"".join(world.receiver.taken) == data
    assert max(map(len, world.receiver.taken)) <= 160 << 10


# --- Writing ---------------------------------------------------------------------------------


def test_what_is_sent_is_padded_to_four_bytes(world: World) -> None:
    client = opens(world)
    (stream,) = world.receiver.streams
    for message in (b"", b"a", b"ab", b"abc", b"abcd", memoryview(b"abcde")):
        assert stream.send(message)
    assert stream.send_many([b"head", b"xxx", b"head", memoryview(b"yyy")], 2, 7) == 2
    assert stream.send_many([b"head", memoryview(b"zzzz"), b"head", b"z"], 2, 8) == 2
    expected = b"a\0\0\0ab\0\0abc\0abcdabcde\0\0\0headxxx\0headyyy\0headzzzzheadz\0\0\0"
    assert received(world, client) == expected


def test_what_one_iteration_sends_leaves_in_one_piece(world: World) -> None:
    client = opens(world)
    (stream,) = world.receiver.streams
    for _ in range(100):
        stream.send(b"four")
        stream.answer(b"answer..")
    world.turns(1)
    found = b""
    with suppress(BlockingIOError, ssl.SSLWantReadError):
        while True:  # of TLS, one record at a time
            found += client.recv(1 << 16)
    assert found == b"answer.." * 100 + b"four" * 100


def messages(count: int, size: int = 1000) -> list[bytes]:
    return [struct.pack("!I", number) + bytes(size - 4) for number in range(count)]


def test_a_client_that_does_not_read_loses_the_oldest_datagrams(world: World) -> None:
    client = opens(world)
    (stream,) = world.receiver.streams
    count = 12_000
    for message in messages(count):
        assert stream.send(message)
        world.turns(1)
    assert world.streams.queued <= QUEUED + 2 * SENT_AT_ONCE  # with what has begun to be sent
    assert set(world.losses) == {"stream_full"}

    stream.answer(b"answered")
    found = received(world, client)
    at = found.index(b"answered")
    before, after = found[:at], found[at + 8 :]
    numbers = [
        int.from_bytes(part[at : at + 4], "big")
        for part in (before, after)
        for at in range(0, len(part), 1000)
    ]
    assert len(before) % 1000 == len(after) % 1000 == 0  # no message was cut
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (0, count - 1)
    assert len(numbers) == count - len(world.losses)
    assert len(after) <= QUEUED + 1000
    assert world.streams.queued == 0


def test_a_client_that_reads_again_loses_nothing_more(world: World) -> None:
    client = opens(world)
    (stream,) = world.receiver.streams
    for message in messages(12_000):
        stream.send(message)
    received(world, client)
    world.losses.clear()
    for message in messages(1000):
        stream.send(message)
        received(world, client)
    assert world.losses == []


def test_much_in_one_iteration_is_lost_only_if_it_cannot_leave(world: World) -> None:
    """64 KiB leave before its end, or a burst of some ports would not fit into the queue."""
    client = opens(world)
    (stream,) = world.receiver.streams
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    stream.send_many(list(messages(256, 1000)), 1, 1000)
    assert world.losses == []
    assert len(received(world, client)) == 256_000


def test_all_clients_together_have_a_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.net.streams.QUEUED_IN_ALL", 1 << 20)
    clients = [opens(world) for _ in range(20)]
    for message in messages(12_000):
        for stream in world.receiver.streams:
            stream.send(message)
    assert len(clients) == 20
    assert world.streams.queued <= 1 << 20
    for client in clients:  # who reads again is served again
        received(world, client)
    world.losses.clear()
    for stream in world.receiver.streams:
        stream.send(b"four")
    assert [received(world, client)[-4:] for client in clients] == [b"four"] * 20
    assert world.losses == []


def test_the_slowest_make_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a client that is slow for a moment is not dropped for one that has stopped."""
    monkeypatch.setattr("relay.net.streams.QUEUED_IN_ALL", 250 << 10)
    clients = [opens(world) for _ in range(3)]
    slow = world.receiver.streams
    for stream in slow:  # until the kernel takes nothing more
        while not stream._is_blocked:
            stream.send(bytes(1000))
            world.turns(1)
    for stream in slow:
        for _ in range(100):
            stream.send(bytes(1000))
    assert set(world.losses) <= {"stream_full"}
    assert len(slow[2]._queue) >= 100
    assert len(slow[0]._queue) < 100
    assert all(received(world, client) for client in clients)


def test_answers_are_not_dropped_and_clog(world: World) -> None:
    client = opens(world)
    (stream,) = world.receiver.streams
    for message in messages(12_000):
        stream.send(message)
    for _ in range(ANSWERS // 8 + 1):
        stream.answer(b"answered")
    assert stream.is_clogged
    found = received(world, client)
    assert found.count(b"answered") == ANSWERS // 8 + 1
    assert stream.is_clogged is False


# --- Its end ---------------------------------------------------------------------------------


def test_a_client_closes(world: World) -> None:
    client = opens(world)
    client.close()
    world.turns()
    assert world.receiver.ended == [0]
    assert world.ended() == {"client": 1}
    assert len(world.streams) == 0


def test_what_came_before_the_end_is_served_though_it_has_to_wait(world: World) -> None:
    """And what is answered is sent."""
    client = opens(world)
    world.receiver.at_once = 4
    client.send(b"AAAABBBBCCCC")
    if isinstance(client, ssl.SSLSocket):
        with suppress(ssl.SSLWantReadError):
            client.unwrap()
    else:
        client.shutdown(socket.SHUT_WR)
    world.turns(1)
    world.receiver.streams[0].answer(b"answered")
    world.turns(8)
    assert world.receiver.taken == [b"AAAA", b"BBBB", b"CCCC"]
    assert world.ended() == {"client": 1}
    heard = client.recv(100) if world.transport == "tcp" else b"answered"
    assert heard == b"answered"


def test_what_came_before_the_end_is_served(world: World) -> None:
    client = opens(world)
    client.send(b"last")
    client.close()
    world.turns()
    assert world.receiver.taken == [b"last"]


def test_a_client_is_gone_while_the_relay_reads(world: World) -> None:
    client = opens(world)
    resets(client)
    world.turns()
    assert world.ended() == {"reset": 1}


def test_a_client_is_gone_while_the_relay_writes(world: World) -> None:
    client = opens(world)
    (stream,) = world.receiver.streams
    for message in messages(12_000):
        stream.send(message)
    resets(client)
    for message in messages(300):
        stream.send(message)
    assert world.receiver.ended == []  # not in the middle of something
    world.turns()
    assert world.receiver.ended == [0]
    assert world.ended() == {"reset": 1}
    assert world.streams.queued == 0


def test_a_client_is_gone_while_it_has_to_wait(world: World) -> None:
    """The kernel says so again and again; the loop must not turn for nothing."""
    client = opens(world)
    world.receiver.then = Then.LATER
    client.send(b"wait")
    world.turns()
    resets(client)
    world.turns(1)
    assert world.ended() == {"reset": 1}


def test_a_client_sends_what_cannot_be_read(world: World) -> None:
    client = opens(world)
    client.send(b"bad!")
    world.turns()
    assert world.ended() == {"malformed": 1}
    assert received(world, client) == b""
    assert world.receiver.ended == [0]


def test_a_bug_ends_the_connection_it_came_up_on(tcp: World) -> None:
    client, other = opens(tcp), opens(tcp)
    tcp.receiver.fails = True
    client.send(b"data")
    tcp.turns()
    assert [str(bug) for bug in tcp.bugs] == ["a bug"]
    assert tcp.ended() == {"bug": 1}
    tcp.receiver.fails = False
    other.send(b"data")
    tcp.turns()
    assert tcp.receiver.taken == [b"data"]


def test_what_cannot_be_sealed_ends_the_connection(
    tls: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise ssl.SSLError(1, "as the test wants it")

    opens(tls)
    monkeypatch.setattr("relay.net.tls.TlsSession.seal", fails)
    tls.receiver.streams[0].send(b"four")
    tls.turns(1)
    assert tls.ended() == {"reset": 1}
    assert tls.streams.queued == 0


def test_a_bug_at_one_connection_silences_no_other(tcp: World) -> None:
    clients = [opens(tcp) for _ in range(3)]
    streams = tcp.receiver.streams
    tcp.receiver.fails_to_forget = {0}
    for stream in streams:
        stream.send(b"four")
    streams[0]._failure = End.RESET
    tcp.turns(1)
    assert [str(bug) for bug in tcp.bugs] == ["a bug"]
    assert [received(tcp, client) for client in clients[1:]] == [b"four"] * 2


def test_at_the_end_clients_are_told(world: World) -> None:
    """By close_notify, if they speak TLS, and by FIN."""
    client = opens(world)
    world.streams.close()
    assert world.receiver.ended == [0]
    client.setblocking(True)
    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        world.connects()


@pytest.mark.parametrize("at", range(8))
def test_a_client_is_gone_at_every_step_of_a_handshake(limits: Limits, at: int) -> None:
    world = World(limits, "tls")
    client = world.connects()
    context = ssl.create_default_context(cadata=AUTHORITY.pem)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(incoming, outgoing, server_hostname="relay.test")
    for step in range(8):
        if step == at:
            resets(client)
            world.turns()
            break
        if step % 2:
            with suppress(BlockingIOError):
                incoming.write(client.recv(1 << 16))
            continue
        with suppress(ssl.SSLWantReadError):
            session.do_handshake()
        client.send(outgoing.read(1 if step == 2 else -1) or b"\x17\x03\x03")
        world.turns()
    assert len(world.streams) == 0
    assert sum(world.ended().values()) == 1
    world.close()
    assert world.bugs == []


def resets(client: socket.socket) -> None:
    """Close a connection so that the other side hears RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(client)


# --- TLS -------------------------------------------------------------------------------------


@pytest.fixture
def tls(limits: Limits) -> Iterator[World]:
    world = World(limits, "tls")
    yield world
    world.close()
    assert world.bugs == []


def test_who_has_only_weak_ciphers_is_told_by_an_alert(tls: World) -> None:
    client = tls.connects(hello_of("AES128-SHA"))
    assert client.recv(100)[:1] == b"\x15"  # alert. RFC 8446 §5.1
    assert tls.ended() == {"tls": 1}


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\x01\x00\x00" + bytes(16)])
def test_who_speaks_no_tls_has_to_go(tls: World, first: bytes) -> None:
    tls.connects(first)
    assert tls.ended() == {"tls": 1}


def test_one_handshake_per_iteration(tls: World) -> None:
    """Each takes as long as many datagrams."""
    hello = hello_of()
    clients = [tls.stack.enter_context(socket.create_connection(tls.address)) for _ in range(8)]
    tls.turns()
    for client in clients:
        client.send(hello)
    for done in range(1, 9):
        tls.turns(1)
        assert sum(has_something(client) for client in clients) == done


def test_who_sends_a_part_of_a_hello_holds_up_nobody(tls: World) -> None:
    clients = [tls.connects() for _ in range(50)]
    hello = hello_of()
    last = tls.connects()
    for client in clients:
        client.send(hello[:1])
    last.send(hello)
    tls.turns(5)  # sixteen connections in each
    assert has_something(last)


def test_records_are_read_in_shares(tls: World) -> None:
    """One byte in each would take as long to decrypt as thousands."""
    alice, bob = opens(tls), opens(tls)
    for _ in range(200):
        alice.send(b"a")
    bob.send(b"four")
    tls.turns(1)
    assert b"four" in tls.receiver.taken
    assert len(b"".join(tls.receiver.taken)) <= 4 + RECORDS_AT_ONCE
    tls.turns(10)
    assert len(b"".join(tls.receiver.taken)) == 4 + 200


@pytest.mark.parametrize(("count", "ended"), [(1, {}), (5, {}), (2000, {"tls": 1})])
def test_who_asks_for_new_keys_over_and_over_has_to_go(
    tls: World, count: int, ended: dict[str, int]
) -> None:
    """Each time it takes as long as some datagrams, and an answer. RFC 8446 §4.6.3."""
    client = tls.connects()
    updater = KeyUpdater(client)
    tls.stack.callback(updater.close)
    for _ in range(5):
        is_done = updater.shakes_hands()
        tls.turns()
    assert is_done
    updates = updater.updates(count)
    with suppress(BrokenPipeError, ConnectionResetError):
        while updates:
            updates = updates[client.send(updates[:4000]) :]
            tls.turns(1)
    tls.turns(3)
    assert tls.ended() == ended


def test_a_hello_may_come_byte_by_byte(tls: World) -> None:
    client = tls.connects()
    for byte in hello_of():
        client.send(bytes([byte]))
        tls.turns(1)
    assert client.recv(100)[:1] == b"\x16"


def test_another_certificate_is_for_those_who_come_later(tls: World) -> None:
    before = opens(tls)
    other = AUTHORITY.issue("relay.test", "other.test")
    tls.streams.change_identity(Identity(read_chain(other.pem), other.key))
    after = opens(tls)
    assert shown(before) == {"relay.test"}
    assert shown(after) == {"relay.test", "other.test"}
    before.send(b"data")
    tls.turns()
    assert tls.receiver.taken == [b"data"]
    assert tls.streams.certificate_expires == other.expires


def test_one_that_is_no_good_changes_nothing(tls: World) -> None:
    with pytest.raises(ValueError, match="the key is not that"):
        tls.streams.change_identity(Identity(IDENTITY.chain, AUTHORITY.issue("relay.test").key))
    assert shown(opens(tls)) == {"relay.test"}


def test_older_clients_have_tls_1_2(tls: World) -> None:
    client = tls.shakes_hands(tls.connects(), ssl.TLSVersion.TLSv1_2)
    assert client.version() == "TLSv1.2"
    cipher = client.cipher()
    assert cipher is not None
    assert cipher[0].startswith("ECDHE-")


def test_bytes_of_tls_that_nobody_reads_have_a_limit(tls: World) -> None:
    """Each KeyUpdate of TLS 1.3 asks for an answer. RFC 8446 §4.6.3."""
    tls.connects(hello_of())
    (stream,) = tls.receiver.streams
    for _ in range(300):
        stream._send_outside(bytes(1000))
    tls.turns()
    assert tls.ended() == {"tls": 1}


def hello_of(ciphers: str = "") -> bytes:
    """Return what a client begins with; with *ciphers*, one of TLS 1.2."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context(cadata=AUTHORITY.pem)
    if ciphers:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers(ciphers)
    session = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="relay.test")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


def has_something(client: socket.socket) -> bool:
    try:
        return bool(client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def shown(client: socket.socket) -> set[str]:
    """Return the names in the certificate that a client was shown."""
    assert isinstance(client, ssl.SSLSocket)
    certificate = client.getpeercert()
    assert certificate is not None
    return {str(name[1]) for name in certificate["subjectAltName"]}


# --- Limits ----------------------------------------------------------------------------------


def test_connections_are_accepted_in_portions(tcp: World) -> None:
    for _ in range(ACCEPTS_AT_ONCE + 5):
        tcp.stack.enter_context(socket.create_connection(tcp.address))
    tcp.turns(1)
    assert len(tcp.streams) == ACCEPTS_AT_ONCE
    tcp.turns(1)
    assert len(tcp.streams) == ACCEPTS_AT_ONCE + 5


def test_who_is_good_for_nothing_has_to_go(world: World) -> None:
    opens(world)
    world.passes(PATIENCE - 0.1)
    assert len(world.streams) == 1
    world.passes(0.1)
    assert world.ended() == {"idle": 1}


def test_who_says_nothing_has_to_go(world: World) -> None:
    """And who speaks TLS too slowly."""
    client = world.connects()
    for byte in hello_of()[:9]:
        world.passes(1)
        client.send(bytes([byte]))
    world.passes(1)
    assert world.ended() == {"idle": 1}


def test_who_has_an_allocation_stays_until_it_ends(world: World) -> None:
    opens(world)
    world.receiver.in_use = {0}
    for _ in range(10):
        world.passes(PATIENCE)
    assert len(world.streams) == 1
    world.receiver.in_use = set()
    world.passes(PATIENCE)
    world.passes(PATIENCE)
    assert world.ended() == {"idle": 1}


def test_who_allocates_again_stays(world: World) -> None:
    """An allocation may have ended a moment before somebody looks."""
    opens(world)
    world.receiver.in_use = {0}
    world.passes(PATIENCE)
    world.receiver.in_use = set()
    world.passes(PATIENCE)
    world.receiver.in_use = {0}
    for _ in range(3):
        world.passes(PATIENCE)
    assert len(world.streams) == 1


def test_each_has_its_own_time(world: World) -> None:
    opens(world)
    world.passes(PATIENCE / 2)
    opens(world)
    world.passes(PATIENCE / 2)
    assert world.receiver.ended == [0]
    world.passes(PATIENCE / 2)
    assert world.receiver.ended == [0, 1]


@pytest.mark.parametrize("limits", [Limits(connections=3, per_address=None)])
def test_the_oldest_newcomer_goes_for_another(world: World) -> None:
    for _ in range(3):
        opens(world)
    world.receiver.in_use = {0}
    opens(world)
    assert world.receiver.ended == [1]
    assert world.ended() == {"crowded_out": 1}


@pytest.mark.parametrize("limits", [Limits(connections=3, per_address=None)])
def test_if_all_are_in_use_nobody_goes(world: World) -> None:
    for _ in range(3):
        opens(world)
    world.receiver.in_use = {0, 1, 2}
    client = world.connects()
    assert is_reset(client)
    assert world.ended() == {"full": 1}
    assert world.receiver.ended == [3]


@pytest.mark.parametrize("limits", [Limits(connections=3, per_address=None)])
def test_who_is_refused_crowds_nobody_out(world: World) -> None:
    for _ in range(3):
        opens(world)
    world.receiver.refuses = True
    assert is_reset(world.connects())
    assert world.ended() == {"rate": 1}
    assert len(world.streams) == 3


@pytest.mark.parametrize("limits", [Limits(connections=9, per_address=2)])
def test_one_address_has_so_many(world: World) -> None:
    first = opens(world)
    opens(world)
    client = world.connects()
    assert is_reset(client)
    assert world.ended() == {"address_full": 1}
    first.close()
    world.turns()
    opens(world)
    assert world.ended() == {"address_full": 1, "client": 1}


def test_what_the_receiver_refuses_is_reset(world: World) -> None:
    world.receiver.refuses = True
    assert is_reset(world.connects())
    assert world.ended() == {"rate": 1}


def test_without_descriptors_nobody_is_accepted_for_a_moment(tcp: World) -> None:
    client = tcp.stack.enter_context(socket.socket())
    client.connect(tcp.address)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest - 1, hard))
    fillers = []
    try:
        with suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        tcp.turns()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    assert len(tcp.streams) == 0
    tcp.passes(0.5)
    assert len(tcp.streams) == 0
    tcp.passes(0.5)
    assert len(tcp.streams) == 1
    assert tcp.bugs == []


def is_reset(client: socket.socket) -> bool:
    try:
        client.recv(1)
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False
    return False


# --- Behind a proxy --------------------------------------------------------------------------

PROXIED = Limits(connections=9, per_address=2, proxies=("127.0.0.0/8",))


@pytest.mark.parametrize("limits", [PROXIED])
@pytest.mark.parametrize("first", [len(HEADER), 1, 20])
def test_a_proxy_says_where_the_client_is(world: World, first: int) -> None:
    client = world.connects(HEADER[:first])
    if first < len(HEADER):
        client.send(HEADER[first:])
        world.turns()
    if world.transport == "tls":
        client = world.shakes_hands(client)
    client.send(b"data")
    world.turns()
    assert world.receiver.streams[0].address == ("192.0.2.7", 50000)
    assert world.receiver.taken == [b"data"]


@pytest.mark.parametrize("limits", [PROXIED])
def test_data_may_come_with_the_header(tcp: World) -> None:
    tcp.connects(HEADER + b"data")
    assert tcp.receiver.taken == [b"data"]


@pytest.mark.parametrize("limits", [PROXIED])
def test_a_hello_may_come_with_the_header(tls: World) -> None:
    client = tls.connects(HEADER + hello_of())
    assert client.recv(100)[:1] == b"\x16"


@pytest.mark.parametrize("limits", [PROXIED])
def test_a_proxy_that_speaks_for_itself(tcp: World) -> None:
    client = tcp.connects(b"PROXY UNKNOWN\r\ndata")
    assert tcp.receiver.streams[0].address == client.getsockname()


@pytest.mark.parametrize("limits", [PROXIED])
def test_limits_are_for_the_clients_of_a_proxy(world: World) -> None:
    for _ in range(3):
        world.connects(HEADER)
    world.connects(HEADER.replace(b"192.0.2.7", b"192.0.2.8"))
    assert world.ended() == {"address_full": 1}
    assert len(world.streams) == 3


@pytest.mark.parametrize("limits", [PROXIED])
@pytest.mark.parametrize("first", [b"\x00\x01\x00\x00", b"GET / HTTP/1.0\r\n", b"PROXY TCP4 x\r\n"])
def test_a_proxy_without_a_header_is_refused(world: World, first: bytes) -> None:
    assert is_reset(world.connects(first))
    assert world.ended() == {"proxy": 1}


def test_a_header_from_anybody_else_is_data(tcp: World) -> None:
    client = tcp.connects(HEADER)
    assert tcp.receiver.streams[0].address == client.getsockname()
    assert b"".join(tcp.receiver.taken) == HEADER[: len(HEADER) // 4 * 4]


def test_proxies_are_changed_by_a_reload(tcp: World) -> None:
    tcp.streams.change_limits(PROXIED)
    tcp.connects(HEADER)
    assert tcp.receiver.streams[0].address == ("192.0.2.7", 50000)
    assert End.PROXY not in tcp.streams.ended
