"""Datagrams through a TURN server, in both directions, and the times they take.

One thread sends and receives, and spins while it waits, because a sleep would end too late.
It sends single datagrams, or with GSO many in one system call, which the kernel segments.
Timestamps are taken just before a burst goes out and just after a batch came in.
"""

import gc
import itertools
import select
import socket
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Any, Final, Self

from bench.loadlib.clients import Clients, Credentials, LoadError, udp_socket
from bench.loadlib.mmsg import LARGEST_DATAGRAM, MAX_SEGMENTS, Inbox, Outbox, socket_name
from bench.loadlib.process import CpuTime, cpu_time, own_cpu_time
from bench.loadlib.tally import FLOW_SHIFT, RUN_SHIFT, Result, count_arrivals, latency_of
from relay.stun.address import Address, family_of, format_endpoint
from relay.stun.attributes import Attr, Attribute
from relay.stun.const import Kind, Method
from relay.stun.message import Message
from relay.turn.channeldata import HEADER, HEADER_SIZE

FIRST_CHANNEL: Final = 0x4000
MOST_CHANNELS: Final = 0x1000  # RFC 8656 §12
SMALLEST_PAYLOAD: Final = 16  # a word and a time
LONGEST: Final = 240.0  # seconds of one measurement: permissions end after 300
REBIND_AFTER: Final = 50.0  # seconds; with the longest measurement this stays below those 300

_BURSTS_PER_ITERATION: Final = 8  # at most, before what has arrived is received
_SOCKETS_PER_ITERATION: Final = 64
_TOO_LATE: Final = 2_000_000  # ns behind; what was due before is not made up for
_PROGRESS_EVERY: Final = 100_000_000  # ns
_LONGEST_DRAIN: Final = 10  # times the patience

OnProgress = Callable[[float, int, int], None]
"""Takes which part of the time is over, 0 to 1, and how many were sent and received."""


class Direction(Enum):
    """Who sends."""

    UP = "up"  # clients, to peers
    DOWN = "down"  # peers, to clients
    BOTH = "both"  # alternately


@dataclass(frozen=True, slots=True)
class Load:
    """What to send."""

    payload: int = 160  # bytes
    rate: float | None = 1000.0  # datagrams per second, all flows together; None is no limit
    seconds: float = 1.0
    direction: Direction = Direction.BOTH
    burst: int = 1  # datagrams of one flow, back to back
    gso: bool = False  # each burst in one system call

    def __post_init__(self) -> None:
        """Raise ValueError if nobody can send that."""
        largest = LARGEST_DATAGRAM - HEADER_SIZE
        if not SMALLEST_PAYLOAD <= self.payload <= largest:
            raise ValueError(f"payload is {SMALLEST_PAYLOAD} to {largest} bytes")
        if self.rate is not None and self.rate <= 0:
            raise ValueError("rate is above 0")
        if not 0 < self.seconds <= LONGEST:
            raise ValueError(f"seconds are above 0, and at most {LONGEST:.0f}")
        if self.burst < 1:
            raise ValueError("burst is at least 1")
        longest = min(MAX_SEGMENTS, LARGEST_DATAGRAM // (self.payload + HEADER_SIZE))
        if self.gso and self.burst > longest:
            raise ValueError(
                f"with GSO a burst of {self.payload} bytes each is at most {longest} long"
            )

    def at(self, rate: float) -> "Load":
        """Return the same at another rate."""
        return replace(self, rate=rate)


_WARM_UP: Final = Load(seconds=0.1)


class Framing(Enum):
    """What clients and server put around the payload."""

    CHANNELS = "channels"
    INDICATIONS = "indications"

    def head(self, channel: int, peer: Address, payload: int) -> bytes:
        """Return what goes in front of so many bytes for a peer that has a channel, or has none."""
        if self is Framing.CHANNELS:
            return HEADER.pack(FIRST_CHANNEL + channel, payload)
        values: list[tuple[Attribute[Any], Any]] = [
            (Attr.XOR_PEER_ADDRESS, peer),
            (Attr.DATA, bytes(payload)),
        ]
        message = Message(Kind.INDICATION, Method.SEND, bytes(12), values)
        return message.encode()[: -self.padded(payload)]

    def padded(self, payload: int) -> int:
        """Return how long a payload is with what pads it."""
        return payload if self is Framing.CHANNELS else payload + -payload % 4


class Session:
    """Clients with allocations and channels, and the peers that these lead to.

    Channel *i* of each client is bound to peer *i*; with indications there is a permission instead.
    Entering allocates, binds and tries it, leaving gives all back; both raise LoadError. The peers
    stay their owner's.
    """

    def __init__(
        self,
        server: Address,
        credentials: Credentials,
        *,
        clients: int,
        peers: Sequence[socket.socket],
        pid: int | None = None,
        threads: Sequence[int] = (),
        patience: float = 0.5,
        framing: Framing = Framing.CHANNELS,
    ) -> None:
        """With *pid*, the server's process, results say what a datagram costs there.

        What *threads* of the kernel do counts as done for it.
        After the last one was sent, what is still missing when nothing has come for
        *patience* seconds is lost.
        """
        self._clients = Clients(server, credentials, clients)
        self._framing = framing
        self._server = server
        self._peers = peers
        self._pid = pid
        self._threads = threads
        self._patience = patience
        self._poll = select.epoll()
        self._inbox = Inbox()
        self._runs = itertools.cycle(range(1 << 64 - RUN_SHIFT))
        self._bound_at = 0.0
        self.allocate_seconds = 0.0
        self.set_up_cost = CpuTime()  # the server's, for allocations and channels

    def __enter__(self) -> Self:
        try:
            family = family_of(self._peers[0].getsockname()[0])
            before = self._server_cpu_time()
            self.allocate_seconds = self._clients.allocate(family)
            self._bind()
            self.set_up_cost = self._server_cpu_time() - before
            for sock in (*self._peers, *(client.socket for client in self._clients.all)):
                self._poll.register(sock, select.EPOLLIN)
            if not self.measure(_WARM_UP).received:
                raise LoadError("nothing that is sent arrives: may the server reach the peers?")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not isinstance(exception, LoadError):  # else it would be another one
                self._clients.release()
        finally:
            self._close()

    def measure(self, load: Load, on_progress: OnProgress | None = None) -> Result:
        """Put *load* on the server and return what came of it. Raises LoadError."""
        if time.monotonic() - self._bound_at > REBIND_AFTER:
            self._bind()
        measurement = _Measurement(
            self._inbox,
            self._poll,
            {peer.fileno() for peer in self._peers},
            next(self._runs),
            load,
            frame=self._frame_to_client(load.payload),
        )
        own, server = own_cpu_time(), self._server_cpu_time()
        try:
            with _no_garbage_collection():
                measurement.run(self._flows(load), on_progress or _nothing)
                measurement.drain(self._patience)
        except ConnectionRefusedError as error:
            raise LoadError(f"{format_endpoint(*self._server)}: nobody listens there") from error
        own, server = own_cpu_time() - own, self._server_cpu_time() - server
        return measurement.result(own, None if self._pid is None else server)

    def _server_cpu_time(self) -> CpuTime:
        if self._pid is None:
            return CpuTime()
        if not self._threads:
            return cpu_time(self._pid)
        # On one CPU they wait for each other, which is no disturbance.
        return CpuTime(sum(map(cpu_time, self._threads), cpu_time(self._pid)).spent)

    def _flows(self, load: Load) -> "list[_Flow]":
        head = self._head(0, load)
        up_size = len(head) + self._framing.padded(load.payload)
        up, stamp = Outbox(up_size, load.burst, gso=load.gso), struct.Struct(f"!{len(head)}sQQ")
        name_size = len(socket_name(*self._clients.all[0].relayed_address))
        down = Outbox(load.payload, load.burst, gso=load.gso, name_size=name_size)
        flows = []
        for channel, peer in enumerate(self._peers):
            head = self._head(channel, load)
            for client in self._clients.all:
                if load.direction is not Direction.DOWN:
                    flows.append(_Flow(up, client.socket.fileno(), b"", stamp, (head,)))
                if load.direction is not Direction.UP:
                    name = socket_name(*client.relayed_address)
                    flows.append(_Flow(down, peer.fileno(), name, _DOWN, ()))
        return flows

    def _head(self, channel: int, load: Load) -> bytes:
        peer: Address = self._peers[channel].getsockname()[:2]
        return self._framing.head(channel, peer, load.payload)

    def _frame_to_client(self, payload: int) -> tuple[int, int]:
        """Return where the payload begins in what clients receive, and how long that is.

        In Data indications servers have what they like: SOFTWARE, or DATA first. So it is tried.
        """
        if self._framing is Framing.CHANNELS:
            return HEADER_SIZE, HEADER_SIZE + payload
        client, filler = self._clients.all[0], b"\xa5" * payload
        self._peers[0].sendto(filler, client.relayed_address)
        poll = select.poll()
        poll.register(client.socket, select.POLLIN)
        while poll.poll(1000):
            datagram = client.socket.recv(LARGEST_DATAGRAM)
            if filler in datagram:
                return datagram.index(filler), len(datagram)
        raise LoadError("no Data indication arrives: may the server reach the peers?")

    def _bind(self) -> None:
        for channel, peer in enumerate(self._peers):
            address = peer.getsockname()[:2]
            if self._framing is Framing.CHANNELS:
                self._clients.bind(FIRST_CHANNEL + channel, address)
            else:
                self._clients.permit(address)
        self._bound_at = time.monotonic()

    def _close(self) -> None:
        self._poll.close()
        self._clients.close()


def open_peers(host: str, count: int) -> list[socket.socket]:
    """Return so many peers on that host. Raises LoadError."""
    peers = []
    try:
        for _ in range(count):
            peers.append(udp_socket(host))
            peers[-1].bind((host, 0))
    except (OSError, LoadError) as error:
        for peer in peers:
            peer.close()
        raise LoadError(f"peers on {host}: {error}") from error
    return peers


_DOWN: Final = struct.Struct("!QQ")  # word, time
_unpack_stamp: Final = _DOWN.unpack_from


class _Flow:
    """Datagrams from one socket to one destination."""

    __slots__ = ("_descriptor", "_header", "_name", "_next_word", "_outbox", "_pack_into")

    def __init__(
        self,
        outbox: Outbox,
        descriptor: int,
        name: bytes,
        stamp: struct.Struct,
        header: tuple[bytes, ...],
    ) -> None:
        self._outbox = outbox
        self._descriptor = descriptor
        self._name = name
        self._pack_into = stamp.pack_into
        self._header = header
        self._next_word = 0

    def begin(self, word: int) -> None:
        """Count from *word*."""
        self._next_word = word

    def send(self, now: int) -> int:
        """Send a burst, and return how many datagrams the kernel took."""
        outbox, header, pack_into, word = (
            self._outbox,
            self._header,
            self._pack_into,
            self._next_word,
        )
        buffer = outbox.buffer
        for offset in outbox.offsets:
            pack_into(buffer, offset, *header, word, now)
            word += 1
        if self._name:
            outbox.address_to(self._name)
        sent = outbox.send(self._descriptor)
        self._next_word += sent
        return sent


class _Measurement:
    """One load while it runs. Arrivals are only noted; they are made sense of afterwards."""

    def __init__(
        self,
        inbox: Inbox,
        poll: select.epoll,
        peers: set[int],
        run: int,
        load: Load,
        *,
        frame: tuple[int, int],
    ) -> None:
        """*frame*: where the payload begins in what clients receive, and how long that is."""
        self._frame = frame
        self._inbox = inbox
        self._poll = poll
        self._peers = peers
        self._run = run
        self._load = load
        self._sent = 0
        self._words = array("Q")
        self._delays = array("q")
        self._busy = 0  # ns in iterations that moved something
        self._took = 0  # ns, without the drain
        self._under_way = 0

    def run(self, flows: list[_Flow], on_progress: OnProgress) -> None:
        """Send at the wanted rate, and receive, until the time is over."""
        for number, flow in enumerate(flows):
            flow.begin(self._run << RUN_SHIFT | number << FLOW_SHIFT)
        senders = itertools.cycle([flow.send for flow in flows])
        load, clock = self._load, time.monotonic_ns
        interval = 1e9 * load.burst / load.rate if load.rate else 0.0
        began = now = clock()
        end, due, progress_at = began + int(load.seconds * 1e9), float(began), began
        while now < end:
            moved = 0
            for _ in range(_BURSTS_PER_ITERATION):
                if due > now:
                    break
                moved += next(senders)(clock())
                due += interval
            self._sent += moved
            moved += self._receive()
            later = clock()
            if moved:
                self._busy += later - now
            now = later
            if due < now - _TOO_LATE:
                due = float(now)
            if now >= progress_at:
                progress_at += _PROGRESS_EVERY
                on_progress((now - began) / (end - began), self._sent, len(self._words))
        self._took = now - began
        self._under_way = self._sent - len(self._words)

    def drain(self, patience: float) -> None:
        """Receive the stragglers, until nothing has come for *patience* seconds."""
        clock, quiet = time.monotonic_ns, int(patience * 1e9)
        now = heard_at = clock()
        give_up_at = now + _LONGEST_DRAIN * quiet
        while len(self._words) < self._sent and now < min(heard_at + quiet, give_up_at):
            moved = self._receive()
            later = clock()
            if moved:
                self._busy += later - now
                heard_at = later
            now = later

    def _receive(self) -> int:
        """Note what has arrived, and return how many that were."""
        readable = self._poll.poll(0, _SOCKETS_PER_ITERATION)
        if not readable:
            return 0
        before = len(self._words)
        buffer, receive = self._inbox.buffer, self._inbox.receive
        word_came, delay_was = self._words.append, self._delays.append
        for descriptor, _ in readable:
            pieces = receive(descriptor)
            now = time.monotonic_ns()
            if descriptor in self._peers:
                at, size = 0, self._load.payload
            else:
                at, size = self._frame
            for start, stop, step in pieces:
                if step != size:  # not ours: a late answer to a request, or someone else's
                    continue
                for offset in range(start + at, stop, step):
                    word, sent_at = _unpack_stamp(buffer, offset)
                    word_came(word)
                    delay_was(now - sent_at)
        return len(self._words) - before

    def result(self, own: CpuTime, server: CpuTime | None) -> Result:
        """Sum up, given what this thread and the server's process had of their CPUs."""
        arrivals = count_arrivals(self._words, self._run)
        received = arrivals.received
        return Result(
            wanted_rate=self._load.rate,
            seconds=self._took / 1e9,
            sent=self._sent,
            under_way=self._under_way,
            received=received,
            reordered=arrivals.reordered,
            duplicated=arrivals.duplicated,
            latency=latency_of(
                delay
                for word, delay in zip(self._words, self._delays, strict=True)
                if word >> RUN_SHIFT == self._run
            ),
            server_cost=server.spent / received / 1000 if server and received else None,
            client_cost=self._busy / received / 1000 if received else None,
            client_busy=min(self._busy / self._took, 1.0),
            client_waited=own.waited / self._took,
            server_waited=server.waited / self._took if server else None,
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _nothing(_part: float, _sent: int, _received: int) -> None:
    pass
