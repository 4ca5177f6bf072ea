"""Calls that go on while something happens to the relay: not one datagram may be missed.

Some clients relay at a steady rate, both ways, and each datagram has a number. Many others hold an
allocation, refresh it, and come and go. All of it is one thread with one loop, which waits for
nobody, so what it sees late was late.
"""

import os
import random
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from relay.stun.address import Address
from relay.stun.attributes import Attr, Attribute
from relay.stun.const import UDP_PROTOCOL, Kind, Method
from relay.stun.integrity import long_term_key
from relay.stun.message import Message, decode
from relay.turn.channeldata import HEADER, HEADER_SIZE
from relay.turn.users import DEFAULT_REALM
from tests.turnclient import TurnClient

CHANNEL = 0x4001
PAYLOAD = struct.Struct("!IId")  # flow, number, when it was sent
ANSWER_TIMEOUT = 5.0  # seconds; only a failing test waits for so long
TICK = 0.001  # seconds


@dataclass(slots=True)
class Flow:
    """Numbered datagrams in one direction."""

    send: Callable[[bytes], object]
    sent: int = 0
    expected: int = 0  # the number that is to come next
    missed: int = 0
    odd: int = 0  # came twice, or after a later one
    last_arrival: float = 0.0
    longest_gap: float = 0.0  # seconds between two arrivals
    longest_delay: float = 0.0  # seconds on the way

    def arrives(self, number: int, sent_at: float, now: float) -> None:
        """Take a datagram."""
        if number >= self.expected:
            self.missed += number - self.expected
            self.expected = number + 1
        else:
            self.odd += 1
        if self.last_arrival:
            self.longest_gap = max(self.longest_gap, now - self.last_arrival)
        self.last_arrival = now
        self.longest_delay = max(self.longest_delay, now - sent_at)


@dataclass(slots=True)
class Outcome:
    """What became of it all."""

    sent: int
    lost: int
    odd: int  # twice, or out of order
    unanswered: int
    answers: Counter[str] = field(default_factory=Counter)  # what requests got
    longest_gap: float = 0.0  # seconds
    longest_delay: float = 0.0

    @property
    def refused(self) -> dict[str, int]:
        """Requests that got anything but a success."""
        return {answer: n for answer, n in self.answers.items() if not answer.endswith("success")}


class Asking:
    """A client that asks without waiting for the answer."""

    def __init__(self, server: Address, username: str, password: str) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect(server)
        self.socket.setblocking(False)
        self._credentials = username
        self._key = long_term_key(username, DEFAULT_REALM, password)
        self.nonce = b""
        self.unanswered: dict[bytes, tuple[str, float]] = {}

    def asks(self, method: Method, *attributes: tuple[Attribute[Any], Any]) -> None:
        values = [*attributes]
        if self.nonce:
            values += [
                (Attr.USERNAME, self._credentials),
                (Attr.REALM, DEFAULT_REALM),
                (Attr.NONCE, self.nonce),
            ]
        message = Message(Kind.REQUEST, method, os.urandom(12), values)
        name = method.name.lower() if self.nonce else "first"
        self.unanswered[message.transaction_id] = (name, time.monotonic())
        self.socket.send(message.encode(self._key if self.nonce else None))

    def hears(self, datagram: bytes) -> tuple[str, Message]:
        """Take an answer: what it is to, and the answer."""
        message = decode(datagram).message
        name, _ = self.unanswered.pop(message.transaction_id)
        nonce = message.get(Attr.NONCE)
        if nonce is not None:
            self.nonce = nonce
        return name, message


class Steady:
    """All who call."""

    def __init__(
        self,
        server: Address,
        username: str,
        password: str,
        *,
        calls: int,
        rate: int,
        idle: int,
        requests: int,
    ) -> None:
        """Begin *calls*, at *rate* datagrams per second each way, beside *idle* allocations.

        *requests* are those per second by the others, of which every fifth is by a newcomer.
        """
        self._server, self._username, self._password = server, username, password
        self._interval = 1 / (rate * calls * 2)
        self._request_interval = 1 / requests if requests else float("inf")
        self._epoll = select.epoll()
        self._on_readable: dict[int, Callable[[], None]] = {}
        self.flows: list[Flow] = []
        self._idle: list[Asking] = []
        self._leaving: dict[Asking, float] = {}
        self._answers: Counter[str] = Counter()
        self._unanswered = 0
        self._random = random.Random(1)
        self._clients: list[TurnClient] = []
        self._peers: list[socket.socket] = []
        for _ in range(calls):
            self._begins_call()
        for _ in range(idle):
            client = Asking(server, username, password)
            for _ in range(2):
                client.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
                client.socket.settimeout(ANSWER_TIMEOUT)
                _, answer = client.hears(client.socket.recv(2048))
            assert answer.kind is Kind.SUCCESS, answer
            self._joins(client)
            self._idle.append(client)

    def runs(self, until: Callable[[], bool]) -> Outcome:
        """Let them go on until something is true, then wait for what is on its way."""
        now = next_datagram = next_request = time.monotonic()
        turn = 0
        while not until():
            now = time.monotonic()
            while next_datagram <= now:
                number = turn % len(self.flows)
                flow = self.flows[number]
                flow.send(PAYLOAD.pack(number, flow.sent, time.monotonic()))
                flow.sent += 1
                turn += 1
                next_datagram += self._interval
                if not turn % 16:
                    self._receives(0)
            while next_request <= now:
                self._someone_asks(now)
                next_request += self._request_interval
            self._receives(max(0.0, min(next_datagram, next_request) - time.monotonic(), TICK))
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while time.monotonic() < deadline and not self._has_all:
            self._receives(TICK)
        return Outcome(
            sent=sum(flow.sent for flow in self.flows),
            lost=sum(flow.missed + flow.sent - flow.expected for flow in self.flows),
            odd=sum(flow.odd for flow in self.flows),
            unanswered=sum(len(one.unanswered) for one in (*self._idle, *self._leaving)),
            answers=self._answers,
            longest_gap=max(flow.longest_gap for flow in self.flows),
            longest_delay=max(flow.longest_delay for flow in self.flows),
        )

    def forgets_delays(self) -> None:
        """Count gaps and delays anew."""
        for flow in self.flows:
            flow.longest_gap = flow.longest_delay = flow.last_arrival = 0.0

    def everyone_refreshes(self) -> int:
        """Have each who holds an allocation refresh it; return how many have been told of one."""
        for client in self._idle:
            client.asks(Method.REFRESH, (Attr.LIFETIME, 600))
            self._receives(0)
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while time.monotonic() < deadline and any(one.unanswered for one in self._idle):
            self._receives(TICK)
        for call in self._clients:
            call.socket.setblocking(True)
            call.socket.settimeout(ANSWER_TIMEOUT)
            call.refreshes(600)
            call.socket.setblocking(False)
        return sum(not client.unanswered for client in self._idle) + len(self._clients)

    def close(self) -> None:
        asking = [one.socket for one in (*self._idle, *self._leaving)]
        for sock in (*asking, *(one.socket for one in self._clients), *self._peers):
            sock.close()
        self._epoll.close()

    @property
    def _has_all(self) -> bool:
        asking = any(one.unanswered for one in (*self._idle, *self._leaving))
        return not asking and all(flow.expected == flow.sent for flow in self.flows)

    def _begins_call(self) -> None:
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.bind(("127.0.0.1", 0))
        peer.setblocking(False)
        client = TurnClient(self._server, self._username, self._password)
        relayed = client.allocates()
        client.binds(CHANNEL, peer.getsockname())
        client.socket.setblocking(False)
        self._clients.append(client)
        self._peers.append(peer)
        self.flows.append(Flow(lambda payload: client.sends(CHANNEL, payload)))
        self.flows.append(Flow(lambda payload: peer.sendto(payload, relayed)))
        self._watch(peer, lambda: self._read(peer, 0))
        self._watch(client.socket, lambda: self._read(client.socket, HEADER_SIZE))

    def _watch(self, sock: socket.socket, on_readable: Callable[[], None]) -> None:
        self._epoll.register(sock, select.EPOLLIN)
        self._on_readable[sock.fileno()] = on_readable

    def _receives(self, timeout: float) -> None:
        for fd, _ in self._epoll.poll(timeout, 64):
            self._on_readable[fd]()

    def _read(self, sock: socket.socket, header: int) -> None:
        while True:
            try:
                datagram = sock.recv(2048)
            except BlockingIOError:
                return
            if header and HEADER.unpack_from(datagram) != (CHANNEL, PAYLOAD.size):
                continue  # an answer that came late
            flow, number, sent_at = PAYLOAD.unpack_from(datagram, header)
            self.flows[flow].arrives(number, sent_at, time.monotonic())

    def _joins(self, client: Asking) -> None:
        client.socket.setblocking(False)
        self._watch(client.socket, lambda: self._hears(client))

    def _hears(self, client: Asking) -> None:
        name, answer = client.hears(client.socket.recv(2048))
        code = (answer.get(Attr.ERROR_CODE) or (0, ""))[0]
        if name == "first":
            assert code == 401
            client.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
            return
        self._answers[f"{name} {code or 'success'}"] += 1
        if client in self._leaving:
            if name == "allocate" and not code:
                client.asks(Method.REFRESH, (Attr.LIFETIME, 0))
            else:
                del self._leaving[client]
                self._epoll.unregister(client.socket)
                client.socket.close()

    def _someone_asks(self, now: float) -> None:
        if self._random.random() < 0.2:
            newcomer = Asking(self._server, self._username, self._password)
            self._joins(newcomer)
            self._leaving[newcomer] = now
            newcomer.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL))
        elif self._idle:
            client = self._random.choice(self._idle)
            client.asks(Method.REFRESH, (Attr.LIFETIME, 600))
