"""Clients, peers and time in any order, against a small model.

The model knows when each allocation, channel and permission ends, and nothing of tables, timers or
sockets. After every step relay and model must agree on what is relayed and on which ports
are open; at the end time passes, and nothing may be left.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Method
from relay.turn.server import Server
from tests.scenario import (
    Client,
    Indicated,
    Peer,
    Scenario,
    channel_data,
    indicated,
    relayed,
    to,
)
from tests.twin import TwinServer

CLIENTS = [f"192.0.2.10:{port}" for port in (5000, 5001, 5002)]
USERS = ["alice", "bob"]
PEERS = ["198.51.100.7:9000", "198.51.100.7:9001", "198.51.100.8:9000"]
HOSTS = ["198.51.100.7", "198.51.100.8"]
NUMBERS = [0x4000, 0x4001]
PORTS = range(50000, 50004)  # with takeover off, one more than there are clients


@dataclass
class ModelChannel:
    peer: str
    bound_until: float
    reserved_until: float


@dataclass
class ModelAllocation:
    user: str
    ends: float
    channels: dict[int, ModelChannel] = field(default_factory=dict)
    permitted_until: dict[str, float] = field(default_factory=dict)  # by host


class Model:
    """Who may relay what to whom, by RFC 8656."""

    def __init__(self, takeover: bool) -> None:
        self.now = 0.0
        self.takeover = takeover
        self.allocations: dict[str, ModelAllocation] = {}

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.allocations = {c: a for c, a in self.allocations.items() if a.ends > self.now}
        for allocation in self.allocations.values():
            allocation.channels = {
                n: c for n, c in allocation.channels.items() if c.reserved_until > self.now
            }

    def allocates(self, client: str, user: str, lifetime: int) -> int | None:
        if client in self.allocations:
            return 437
        if self.takeover:
            self.allocations = {c: a for c, a in self.allocations.items() if a.user != user}
        self.allocations[client] = ModelAllocation(user, self.now + lifetime)
        return None

    def refreshes(self, client: str, user: str, lifetime: int) -> int | None:
        if lifetime == 0:  # anybody's to end, who has the 5-tuple
            return None if self.allocations.pop(client, None) else 437
        code = self._rejects(client, user)
        if code is None:
            self.allocations[client].ends = self.now + lifetime
        return code

    def binds(self, client: str, user: str, number: int, peer: str) -> int | None:
        code = self._rejects(client, user)
        if code is not None:
            return code
        channels = self.allocations[client].channels
        if number in channels and channels[number].peer != peer:
            return 400
        if any(c.peer == peer and n != number for n, c in channels.items()):
            return 400
        channels[number] = ModelChannel(peer, self.now + 600, self.now + 900)
        return self.permits(client, user, host_of(peer))

    def permits(self, client: str, user: str, host: str) -> int | None:
        code = self._rejects(client, user)
        if code is None:
            self.allocations[client].permitted_until[host] = self.now + 300
        return code

    def is_permitted(self, client: str, host: str) -> bool:
        allocation = self.allocations.get(client)
        return allocation is not None and allocation.permitted_until.get(host, 0.0) > self.now

    def relays_to(self, client: str, number: int) -> str | None:
        """The peer that a client reaches on a channel number now."""
        allocation = self.allocations.get(client)
        channel = allocation.channels.get(number) if allocation else None
        return channel.peer if channel and channel.bound_until > self.now else None

    def _rejects(self, client: str, user: str) -> int | None:
        allocation = self.allocations.get(client)
        if allocation is None:
            return 437
        return None if allocation.user == user else 441


class Relay(RuleBasedStateMachine):
    """The relay and its model, side by side."""

    server: type[Server] = Server

    @initialize(takeover=st.booleans())
    def starts(self, takeover: bool) -> None:
        self.relay = Scenario(ports=PORTS, one_allocation_per_username=takeover, server=self.server)
        self.model = Model(takeover)
        self.clients: dict[tuple[str, str], Client] = {
            (address, user): self.relay.client(address, user)
            for address in CLIENTS
            for user in USERS
        }
        self.peers: dict[str, Peer] = {address: self.relay.peer(address) for address in PEERS}
        self.holders: dict[str, Client] = {}  # who made the allocation of each address

    @rule(
        address=st.sampled_from(CLIENTS),
        user=st.sampled_from(USERS),
        lifetime=st.sampled_from([1, 60, 600, 3600]),
    )
    def allocates(self, address: str, user: str, lifetime: int) -> None:
        client = self.clients[address, user]
        answer = client.asks(
            Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL), (Attr.LIFETIME, lifetime)
        )
        assert answer.code == self.model.allocates(address, user, lifetime)
        if answer.code is None:
            client.relayed_addresses = answer.get_all(Attr.XOR_RELAYED_ADDRESS)
            self.holders[address] = client

    @rule(
        address=st.sampled_from(CLIENTS),
        user=st.sampled_from(USERS),
        lifetime=st.sampled_from([0, 1, 60, 600, 3600]),
    )
    def refreshes(self, address: str, user: str, lifetime: int) -> None:
        answer = self.clients[address, user].refreshes(lifetime)
        assert answer.code == self.model.refreshes(address, user, lifetime)

    @rule(
        address=st.sampled_from(CLIENTS),
        user=st.sampled_from(USERS),
        number=st.sampled_from(NUMBERS),
        peer=st.sampled_from(PEERS),
    )
    def binds(self, address: str, user: str, number: int, peer: str) -> None:
        answer = self.clients[address, user].tries_to_bind(number, self.peers[peer])
        assert answer.code == self.model.binds(address, user, number, peer)

    @rule(
        address=st.sampled_from(CLIENTS),
        user=st.sampled_from(USERS),
        host=st.sampled_from(HOSTS),
    )
    def permits(self, address: str, user: str, host: str) -> None:
        answer = self.clients[address, user].tries_to_permit((host, 1))
        assert answer.code == self.model.permits(address, user, host)

    @rule(seconds=st.sampled_from([0.25, 1, 59, 60, 299, 300, 301, 599, 600, 3600]))
    def time_passes(self, seconds: float) -> None:
        self.relay.passes(seconds)
        self.model.passes(seconds)

    @rule()
    def is_replaced(self) -> None:
        self.relay.is_replaced()

    @invariant()
    def ports_are_open_for_live_allocations_only(self) -> None:
        live = self.model.allocations
        assert self.relay.server.allocations == len(live)
        assert len(self.relay.network.sockets) == len(live)

    @invariant()
    def exactly_what_is_bound_or_permitted_is_relayed_both_ways(self) -> None:
        for address in CLIENTS:
            bound = {}
            holder = self.holders.get(address, self.clients[address, USERS[0]])
            for number in NUMBERS:
                holder.sends_data(number, b"ping")
                peer = self.model.relays_to(address, number)
                if peer is None:
                    assert self.relay.sent() == []
                else:
                    assert self.relay.sent() == [relayed(holder, self.peers[peer], b"ping")]
                    bound[peer] = number
            for name in PEERS if address in self.model.allocations else ():
                them = self.peers[name]
                permitted = self.model.is_permitted(address, host_of(name))
                them.sends(b"pong", to=holder.relayed_address)
                sent = self.relay.sent()
                if name in bound:
                    assert sent == [to(holder, channel_data(bound[name], b"pong"))]
                elif permitted:
                    assert indicated(sent) == [Indicated(holder.address, them.address, b"pong")]
                else:
                    assert sent == []
                holder.indicates(them, b"ping")
                assert self.relay.sent() == [relayed(holder, them, b"ping")] * permitted

    @invariant()
    def indexes_agree(self) -> None:
        self.relay.server.check()

    def teardown(self) -> None:
        if hasattr(self, "relay"):
            self.relay.passes(3600)
            assert self.relay.server.allocations == 0
            assert self.relay.server.poll_timeout() is None
            assert self.relay.network.sockets == {}


def host_of(peer: str) -> str:
    return peer.partition(":")[0]


class ReplacedRelay(Relay):
    """The relay, its model, and a server that moves from process to process at its side."""

    server = TwinServer

    @rule()
    def begins_to_move(self) -> None:
        self.twin.begins_to_move(self.relay.time.now)

    @rule()
    def is_replaced(self) -> None:
        self.twin.moves(self.relay.time.now)

    @property
    def twin(self) -> TwinServer:
        assert isinstance(self.relay.server, TwinServer)
        return self.relay.server


TestRelay = Relay.TestCase
TestReplacedRelay = ReplacedRelay.TestCase
TestRelay.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReplacedRelay.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
