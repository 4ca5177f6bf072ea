"""The vocabulary of the scenarios: clients, peers, and time that the test lets pass.

A :class:`Scenario` is the real server and the real data path between sockets that only
remember what was sent. A test reads like a sequence diagram::

    alice = relay.client("192.0.2.10:5000").allocates()
    bob = relay.peer("198.51.100.7:9000")
    alice.binds(0x4001, bob)

    bob.sends(b"pong", to=alice.relayed_address)
    assert relay.sent() == [to(alice, channel_data(0x4001, b"pong"))]
"""

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

from relay.datapath.adoption import Adoption, Arrival
from relay.datapath.datapath import DataPath
from relay.datapath.destination import Pieces
from relay.datapath.workspace import Workspace
from relay.net.icmp import Icmp, TakeError
from relay.net.stream import Then
from relay.net.udp import Receiver
from relay.observe.counters import Counters
from relay.stun import integrity
from relay.stun.address import Address, family_of, format_endpoint
from relay.stun.attributes import Attr, Attribute
from relay.stun.const import UDP_PROTOCOL, Family, Kind, Method
from relay.stun.message import Message, Received, decode
from relay.turn.auth import Authenticator
from relay.turn.channeldata import HEADER, RFC8656_NUMBERS
from relay.turn.commands import ClientAddress, PeerAddress
from relay.turn.framing import PADDING
from relay.turn.peers import PeerPolicy
from relay.turn.records import Record
from relay.turn.server import Server
from relay.turn.settings import Settings
from relay.turn.users import DEFAULT_REALM, Users, mint
from tests.written import decode as decode_records
from tests.written import encode

T = TypeVar("T")

SECRET = "4c98bf59c99b3e467ecd7cf9d6b3e5279645fca59be67bc5bb4af3cf653761ab"
PUBLIC_IP4, PUBLIC_IP6 = "192.0.2.1", "2001:db8::1"
LISTEN_PORT = 3478
START = 1000.25  # monotonic seconds when the relay starts
UNIX_START = 1_700_000_000.0
DOCUMENTATION = ("192.0.2.0/24", "198.51.100.0/24", "2001:db8::/32")
FOREVER = 2**64 - 1  # an expiry


class Scenario:
    """A relay, and everyone who talks to it."""

    def __init__(
        self,
        *,
        families: Iterable[Family] = Family,
        ports: range = range(49152, 65536),
        max_allocations: int = 100_000,
        max_sockets: int = 100_000,
        max_channels: int = 100_000,
        max_permissions: int = 100_000,
        send_indications: bool = True,
        channel_numbers: range = RFC8656_NUMBERS,
        one_allocation_per_username: bool = False,
        max_allocations_per_username: int | None = None,
        max_allocations_per_ip: int | None = None,
        max_channels_per_allocation: int | None = None,
        ignores_refused_peers: bool = False,
        unauthenticated_rate_per_prefix: int = 0,
        unauthenticated_rate: int = 0,
        allow_peers: Iterable[str] = DOCUMENTATION,
        deny_peers: Iterable[str] = (),
        software: str | None = None,
        authenticator: type[Authenticator] = Authenticator,
        users: Users | None = None,
        server: type[Server] = Server,
    ) -> None:
        both = {Family.IPV4: PUBLIC_IP4, Family.IPV6: PUBLIC_IP6}
        public_hosts = {family: both[family] for family in families}
        self.public_hosts = public_hosts
        self.time = Time()
        self.network = Network()
        self.counters = Counters()
        rng = random.Random(1)
        self.settings = Settings(
            public_hosts=public_hosts,
            ports=ports,
            listen_port=LISTEN_PORT,
            max_allocations=max_allocations,
            max_sockets=max_sockets,
            max_channels=max_channels,
            max_permissions=max_permissions,
            send_indications=send_indications,
            channel_numbers=channel_numbers,
            one_allocation_per_username=one_allocation_per_username,
            max_allocations_per_username=max_allocations_per_username,
            max_allocations_per_ip=max_allocations_per_ip,
            max_channels_per_allocation=max_channels_per_allocation,
            ignores_refused_peers=ignores_refused_peers,
            unauthenticated_rate_per_prefix=unauthenticated_rate_per_prefix,
            unauthenticated_rate=unauthenticated_rate,
            software=software,
        )
        self.authenticator = authenticator(
            Users(secret=SECRET) if users is None else users, rng.randbytes(32)
        )
        self._peer_policy = _peer_policy(allow_peers, deny_peers)
        self._server_type, self._randbelow = server, rng.randrange
        self._assemble()

    def _assemble(self) -> None:
        """Build a server and its data path, between the sockets that there are."""
        self.server = self._server_type(
            self.settings,
            authenticator=self.authenticator,
            peer_policy=self._peer_policy,
            randbelow=self._randbelow,
            now=self.time.now,
        )
        workspace = Workspace(self.counters)
        self._from_clients, self._from_peers = workspace.for_clients, workspace.for_peers
        self.datapath = DataPath(
            self.server,
            workspace,
            reach_client=self.network.reach_client,
            open_socket=self.network.open_socket,
            public_hosts=self.public_hosts,
            relay_ports=self.settings.ports,
            channel_numbers=self.settings.channel_numbers,
            timers=self.time,
            unix_clock=lambda: self.time.now - START + UNIX_START,
            is_relay_host=lambda host: host in self.public_hosts.values(),
        )

    def is_replaced(self) -> None:
        """Have another process go on in place of this one, with what that tells it in bytes."""
        old = self.server.transfer
        written = encode(filter(None, map(old.dump, old.begin())))
        (rest,) = decode_records(encode([old.dump_rest()]))
        self.is_replaced_by(*decode_records(written), rest)

    def is_replaced_by(self, *written: Record) -> None:
        """Have another process go on with records: of allocations, and the last one of the rest."""
        *allocations, rest = written
        self.time.forget()
        self._assemble()
        adoption = Adoption(self.datapath, self.server.transfer, self.network.adopt)
        adoption.apply([], map(self._arrival, allocations))
        self.server.transfer.load_rest(rest)
        self.server.check()

    def _arrival(self, record: Record) -> "Arrival[FakeSocket]":
        families = [Family(number) for number, _ in record["expires_at"]]
        ports = {family: self.network.sockets[family, record["port"]] for family in families}
        return Arrival(record, ports, {})

    def client(self, address: str, user: str = "", expiry: int = FOREVER) -> "Client":
        """A client with credentials of its own, or of *user*, that never expire."""
        return Client(self, parse(address), user or address, expiry)

    def stream_client(self, address: str, user: str = "", transport: str = "tcp") -> "StreamClient":
        """A client that has just opened a connection."""
        return StreamClient(self, parse(address), user or address, transport)

    def peer(self, address: str) -> "Peer":
        return Peer(self, PeerAddress(parse(address)))

    def passes(self, seconds: float) -> None:
        """Let time pass, stopping at each deadline on the way."""
        self.time.passes(seconds)
        self.server.check()

    def sent(self) -> list["ToClient | ToPeer"]:
        """What the relay sent since the last time this was asked."""
        sent, self.network.sent = self.network.sent, []
        return sent

    def dropped(self) -> dict[str, int]:
        """What the relay dropped since the last time this was asked, by reason."""
        dropped, self.counters.dropped = dict(self.counters.dropped), Counter()
        return dropped

    @property
    def buffer(self) -> memoryview:
        """What clients' datagrams are read to."""
        return self._from_clients

    def receives_from_client(self, datagram: bytes, client: ClientAddress, tos: int = 0) -> None:
        self.serves(datagram, client, tos)
        self.server.check()

    def serves(self, datagram: bytes, client: ClientAddress, tos: int = 0) -> None:
        """Receive a datagram, and nothing more: what this takes is the relay's work."""
        self._from_clients[: len(datagram)] = datagram
        self.datapath.clients.on_datagram(len(datagram), client, tos)

    def receives_segments_from_client(
        self, segments: bytes, segment: int, client: ClientAddress, tos: int = 0
    ) -> None:
        """Receive datagrams of *segment* bytes, the last perhaps shorter, in one read."""
        self._from_clients[: len(segments)] = segments
        self.datapath.clients.on_segments(len(segments), segment, client, tos)
        self.server.check()

    def receives_segments_from_peer(
        self, segments: bytes, segment: int, peer: PeerAddress, to: Address, tos: int = 0
    ) -> None:
        host, port = to
        sock = self.network.sockets.get((family_of(host), port))
        if sock is not None:
            self._from_peers[: len(segments)] = segments
            sock.receiver.on_segments(len(segments), segment, peer, tos)

    def hears_of_error(self, icmp: Icmp, about: PeerAddress, source: Address) -> None:
        """The network refuses what was sent from a relayed address, *source*, to a peer."""
        host, port = source
        sock = self.network.sockets[family_of(host), port]
        if sock.take_error is not None:  # else nobody has asked for errors
            sock.take_error(about, icmp)

    def receives_from_peer(
        self, datagram: bytes, peer: PeerAddress, to: Address, tos: int = 0
    ) -> None:
        host, port = to
        assert host in self.public_hosts.values()
        sock = self.network.sockets.get((family_of(host), port))
        if sock is not None:  # else the kernel has nobody to give it to
            self._from_peers[: len(datagram)] = datagram
            sock.receiver.on_datagram(len(datagram), peer, tos)

    def drain(self) -> None:
        self.server.drain()

    def changes_settings(self, **changed: Any) -> None:
        self.settings = replace(self.settings, **changed)
        self.server.change_settings(self.settings)

    def changes_peers(self, allow: Iterable[str] = DOCUMENTATION, deny: Iterable[str] = ()) -> None:
        self.datapath.control.change_peer_policy(_peer_policy(allow, deny))
        self.server.check()


class Client:
    """A TURN client: asks, and hears the answers at once."""

    def __init__(self, relay: Scenario, address: Address, user: str, expiry: int) -> None:
        self._relay = relay
        host, port = address
        self.host_and_port = address
        full = address if family_of(host) is Family.IPV4 else (host, port, 0, 0)
        self.address = ClientAddress((full, b""))
        self.username, self.password = mint(expiry, user, SECRET)
        self._nonce: bytes | None = None
        self.relayed_addresses: list[Address] = []

    @property
    def relayed_address(self) -> Address:
        return self.relayed_addresses[0]

    @property
    def key(self) -> bytes:
        return integrity.long_term_key(self.username, DEFAULT_REALM, self.password)

    @property
    def nonce(self) -> bytes:
        """The nonce of the first 401, which is asked for when it is needed."""
        if self._nonce is None:
            asked = request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
            nonce = self.hears(asked.encode()).get(Attr.NONCE)
            assert nonce is not None
            self._nonce = nonce
        return self._nonce

    def use_nonce(self, nonce: bytes) -> None:
        """Go on with a nonce that another client got."""
        self._nonce = nonce

    def allocates(self, *attributes: "Value", lifetime: int | None = None) -> Self:
        """Allocate, successfully."""
        if lifetime is not None:
            attributes = (*attributes, (Attr.LIFETIME, lifetime))
        answer = self.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), *attributes)
        assert answer.code is None, answer
        self.relayed_addresses = answer.get_all(Attr.XOR_RELAYED_ADDRESS)
        return self

    def refreshes(self, lifetime: int | None = None) -> "Answer":
        attributes = () if lifetime is None else ((Attr.LIFETIME, lifetime),)
        return self.asks(Method.REFRESH, *attributes)

    def binds(self, number: int, peer: "Peer | Address") -> Self:
        """Bind a channel, successfully."""
        answer = self.tries_to_bind(number, peer)
        assert answer.code is None, answer
        return self

    def permits(self, *peers: "Peer | Address") -> Self:
        """Install permissions, successfully."""
        answer = self.tries_to_permit(*peers)
        assert answer.code is None, answer
        return self

    def tries_to_permit(self, *peers: "Peer | Address") -> "Answer":
        values = [(Attr.XOR_PEER_ADDRESS, _address(peer)) for peer in peers]
        return self.asks(Method.CREATE_PERMISSION, *values)

    def tries_to_bind(self, number: int, peer: "Peer | Address") -> "Answer":
        return self.asks(
            Method.CHANNEL_BIND,
            (Attr.CHANNEL_NUMBER, number),
            (Attr.XOR_PEER_ADDRESS, _address(peer)),
        )

    def asks(
        self, method: int, *attributes: "Value", transaction_id: bytes | None = None
    ) -> "Answer":
        """Send an authenticated request; with a new nonce, if the old one has gone stale."""
        answer = self.hears(self.signed(method, *attributes, transaction_id=transaction_id))
        if answer.code == 438:
            self._nonce = answer.get(Attr.NONCE)
            answer = self.hears(self.signed(method, *attributes, transaction_id=transaction_id))
        return answer

    def signed(
        self, method: int, *attributes: "Value", transaction_id: bytes | None = None
    ) -> bytes:
        """An authenticated request, as this client would send it now."""
        credentials: list[Value] = [
            (Attr.USERNAME, self.username),
            (Attr.REALM, DEFAULT_REALM),
            (Attr.NONCE, self.nonce),
        ]
        message = request(method, *attributes, *credentials, transaction_id=transaction_id)
        return message.encode(self.key)

    def hears(self, datagram: bytes) -> "Answer":
        """Send a datagram that the relay answers with exactly one message, to this client."""
        before = self._relay.sent()
        self.sends(datagram)
        sent = self._relay.sent()
        assert len(sent) == 1, sent
        assert isinstance(sent[0], ToClient)
        assert sent[0].client == self.address
        self._relay.network.sent = before
        return Answer(sent[0].datagram, self.key)

    def sends(self, datagram: bytes) -> None:
        """Send a datagram."""
        self._relay.receives_from_client(datagram, self.address)

    def indicates(self, peer: "Peer | Address", payload: bytes, *attributes: "Value") -> None:
        """Send a Send indication."""
        self.sends(send_indication(_address(peer), payload, *attributes))

    def sends_data(self, number: int, payload: bytes, padding: bytes = b"") -> None:
        self.sends(channel_data(number, payload) + padding)


class StreamClient(Client):
    """A TURN client with a connection, which it opens at once."""

    def __init__(self, relay: Scenario, address: Address, user: str, transport: str) -> None:
        super().__init__(relay, address, user, FOREVER)
        self.stream = FakeStream(self.address[0], transport, relay.network)
        self._side = relay.datapath.stream_clients
        client = self._side.on_connected(self.stream)  # type: ignore[arg-type]
        self.is_refused = client is None
        if client is not None:
            self.address = self.stream.client = client
        self._view = memoryview(bytearray(1 << 18))
        self._unserved = b""
        self.then = Then.MORE  # what the relay said last

    def sends(self, datagram: bytes) -> None:
        """Send a message, with its padding, in one piece."""
        self.streams(datagram + PADDING[len(datagram) % 4])

    def streams(self, data: bytes) -> None:
        """Send bytes of the stream. Raises Broken."""
        received = self._unserved + data
        self._view[: len(received)] = received
        served, self.then = self._side.on_stream(self.address, self._view, len(received))
        self._unserved = received[served:]
        self._relay.server.check()

    def has_its_turns(self) -> None:
        """Let the relay go on with what waits only for the others."""
        while self.then is Then.AGAIN:
            self.streams(b"")

    @property
    def unserved(self) -> int:
        """How many bytes of what it has sent wait to be served."""
        return len(self._unserved)

    def disconnects(self) -> None:
        """Close the connection."""
        self._side.on_disconnected(self.address)
        self._relay.server.check()


class Peer:
    """Someone out there, who knows nothing of TURN."""

    def __init__(self, relay: Scenario, address: PeerAddress) -> None:
        self._relay = relay
        self.address = address

    def sends(self, payload: bytes, to: Address) -> None:
        self._relay.receives_from_peer(payload, self.address, to)


class Answer:
    """A response, and whether it is signed with the key of the client that asked."""

    def __init__(self, datagram: bytes, key: bytes) -> None:
        self.datagram = datagram
        self.received: Received = decode(datagram)
        assert self.received.undecodable is None
        assert self.received.message.kind in {Kind.SUCCESS, Kind.ERROR}
        self._key = key

    def __repr__(self) -> str:
        return f"{self.received.message}"

    @property
    def code(self) -> int | None:
        """The error code, or None for a success."""
        error = self.get(Attr.ERROR_CODE)
        return None if error is None else error[0]

    @property
    def signed(self) -> bool:
        offset = self.received.integrity_offset
        return offset is not None and integrity.verify(self.datagram, offset, self._key)

    @property
    def attributes(self) -> set[Attribute[Any]]:
        return {attribute for attribute, _ in self.received.message.attributes}

    def get(self, attribute: Attribute[T]) -> T | None:
        return self.received.message.get(attribute)

    def get_all(self, attribute: Attribute[T]) -> list[T]:
        return self.received.message.get_all(attribute)


Value = tuple[Attribute[Any], Any]


def request(method: int, *attributes: Value, transaction_id: bytes | None = None) -> Message:
    """A request, with a transaction id that no other has unless one is given."""
    return Message(Kind.REQUEST, method, transaction_id or _next_id(), list(attributes))


def send_indication(peer: Address, payload: bytes, *attributes: Value) -> bytes:
    """A Send indication: peer, payload, and whatever else is given."""
    values: list[Value] = [(Attr.XOR_PEER_ADDRESS, peer), (Attr.DATA, payload), *attributes]
    return Message(Kind.INDICATION, Method.SEND, _next_id(), values).encode()


@dataclass(frozen=True)
class Indicated:
    """What a client hears in a Data indication."""

    client: ClientAddress
    peer: Address
    payload: bytes | None = None
    icmp: Icmp | None = None


def indicated(sent: "Iterable[ToClient | ToPeer]") -> list[Indicated]:
    """Read Data indications that were sent; nothing else may have been, and be in them."""
    found = []
    for one in sent:
        assert isinstance(one, ToClient)
        assert len(one.datagram) % 4 == 0
        message = decode(one.datagram).message
        assert (message.kind, message.method) == (Kind.INDICATION, Method.DATA)
        assert len(message.attributes) == 2
        peer = message.get(Attr.XOR_PEER_ADDRESS)
        assert peer is not None
        data, icmp = message.get(Attr.DATA), message.get(Attr.ICMP)
        found.append(Indicated(one.client, peer, data, icmp))
    return found


def channel_data(number: int, payload: bytes) -> bytes:
    return HEADER.pack(number, len(payload)) + payload


def to(client: Client, datagram: bytes) -> "ToClient":
    return ToClient(client.address, datagram)


def spelled(address: Address) -> str:
    """Write ``192.0.2.1:3478`` or ``[2001:db8::1]:3478``."""
    return format_endpoint(*address)


def parse(address: str) -> Address:
    """Read ``192.0.2.1:3478`` or ``[2001:db8::1]:3478``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@dataclass(frozen=True)
class ToClient:
    """A datagram that the relay sent to a client from the listening socket."""

    client: ClientAddress
    datagram: bytes


@dataclass(frozen=True)
class ToPeer:
    """A datagram that the relay sent to a peer from a relay port."""

    port: int
    peer: Address
    payload: bytes


def relayed(client: Client, peer: Peer, payload: bytes) -> ToPeer:
    """A datagram to *peer* from the relay port of *client*."""
    return ToPeer(client.relayed_address[1], peer.address, payload)


class Time:
    """The reactor's clock and timers, moved by hand."""

    def __init__(self) -> None:
        self.now = START
        self.clock: Callable[[], float] = lambda: self.now
        self._deadlines: dict[Callable[[], None], float] = {}

    def call_at(self, deadline: float, callback: Callable[[], None]) -> None:
        self._deadlines[callback] = deadline

    def cancel(self, callback: Callable[[], None]) -> None:
        self._deadlines.pop(callback, None)

    def forget(self) -> None:
        """Call nothing that was to be called: who wanted it is gone."""
        self._deadlines.clear()

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self._deadlines and min(self._deadlines.values()) <= end:
            callback = min(self._deadlines, key=self._deadlines.__getitem__)
            self.now = max(self.now, self._deadlines.pop(callback))
            callback()
        self.now = end


class Network:
    """Listening socket and relay ports that remember what was sent."""

    def __init__(self) -> None:
        self.sent: list[ToClient | ToPeer] = []
        self.whole: list[ToClient | ToPeer] = []  # those of them that were not to be fragmented
        self.tos: list[int] = []  # the octet of DSCP and ECN of each datagram that was sent
        self.sockets: dict[tuple[Family, int], FakeSocket] = {}
        self.tried: list[int] = []  # every port that was to be opened, in order
        self.opened: list[int] = []  # those of them that could be
        self.occupied: set[tuple[Family, int]] = set()  # held by other processes
        self.failure: int | None = None  # an errno with which every open fails
        self.failing = set(Family)  # in these families
        self.on_open: Callable[[], None] = lambda: None  # while a socket is opened
        self.is_full = False  # takes no datagram
        self.takes = 1000  # at most this many datagrams at once
        self.at_once: list[int] = []  # how many datagrams were sent in each call

    def reach_client(self, client: ClientAddress) -> "FakeDestination":
        return FakeDestination(self, partial(ToClient, client))

    def open_socket(self, family: Family, port: int, receiver: Receiver) -> "FakeSocket":
        self.tried.append(port)
        self.on_open()
        if self.failure is not None and family in self.failing:
            raise OSError(self.failure, "as the test wants it")
        if (family, port) in self.occupied or (family, port) in self.sockets:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        sock = self.sockets[family, port] = FakeSocket(self, family, port, receiver)
        self.opened.append(port)
        return sock

    def adopt(self, sock: "FakeSocket", receiver: Receiver) -> "FakeSocket":
        """Have another receiver take what arrives at a socket."""
        sock.receiver = receiver
        return sock


class FakeSocket:
    """One relay port in one family."""

    def __init__(self, network: Network, family: Family, port: int, receiver: Receiver) -> None:
        self._network = network
        self._family = family
        self._port = port
        self.receiver = receiver
        self.take_error: TakeError | None = None  # once somebody wants to hear of ICMP errors

    @property
    def host(self) -> str:
        return {Family.IPV4: PUBLIC_IP4, Family.IPV6: PUBLIC_IP6}[self._family]

    def reach(self, peer: PeerAddress) -> "FakeDestination":
        assert family_of(peer[0]) is self._family
        return FakeDestination(self._network, partial(self._to_peer, peer))

    def look_for_marks(self) -> None:
        pass

    def report_errors(self, take: TakeError) -> None:
        self.take_error = take

    def close(self) -> None:
        assert self._network.sockets.pop((self._family, self._port)) is self

    def _to_peer(self, peer: PeerAddress, payload: bytes) -> "ToPeer":
        assert self._network.sockets[self._family, self._port] is self
        return ToPeer(self._port, peer, payload)


class FakeDestination:
    """A destination that remembers what is sent to it."""

    def __init__(self, network: Network, arrive: "Callable[[bytes], ToClient | ToPeer]") -> None:
        self._network = network
        self._arrive = arrive

    def send(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        if self._network.is_full:
            return False
        self._network.tos.append(tos)
        self._network.sent.append(self._arrive(bytes(datagram)))
        return True

    def answer(self, message: bytes) -> None:
        self.send(message)

    def send_whole(self, datagram: memoryview | bytes, tos: int = 0) -> bool:
        is_sent = self.send(datagram, tos)
        if is_sent:
            self._network.whole.append(self._network.sent[-1])
        return is_sent

    def send_many(self, pieces: Pieces, each: int, size: int, tos: int = 0) -> int:
        """Cut as UDP_SEGMENT does: it knows nothing of pieces."""
        network = self._network
        if network.is_full or network.takes == 0:
            return 0
        joined = b"".join(pieces)
        datagrams = [joined[start : start + size] for start in range(0, len(joined), size)]
        assert len(datagrams) * each == len(pieces)
        del datagrams[network.takes :]
        network.at_once.append(len(datagrams))
        network.sent += map(self._arrive, datagrams)
        network.tos += [tos] * len(datagrams)
        return len(datagrams)


class FakeStream(FakeDestination):
    """A connection as the relay sees it."""

    def __init__(self, address: tuple[Any, ...], transport: str, network: Network) -> None:
        super().__init__(network, self._arrives)
        self.address = address
        self.transport = transport
        self.client: ClientAddress | None = None
        self.is_clogged = False

    def _arrives(self, message: bytes) -> ToClient:
        assert self.client is not None
        return ToClient(self.client, message)


def _address(peer: Peer | Address) -> Address:
    return peer.address if isinstance(peer, Peer) else peer


def _peer_policy(allow: Iterable[str], deny: Iterable[str]) -> PeerPolicy:
    return PeerPolicy(allow, deny, [(host, LISTEN_PORT) for host in (PUBLIC_IP4, PUBLIC_IP6)])


_ids = iter(range(1, 1 << 62))


def _next_id() -> bytes:
    return next(_ids).to_bytes(12, "big")
