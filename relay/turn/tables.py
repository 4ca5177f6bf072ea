"""Allocations, channels and every index over them. The only writer of that state.

Rules about *who may* are the server's; what is kept here is that the indexes agree, that
each change of what is relayed leaves as a command, and that everything has a deadline.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from relay.stun.address import family_of, prefix_of
from relay.stun.const import ErrorCode, Family, Method
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Command,
    PeerAddress,
    UnbindChannel,
)
from relay.turn.ended import EndedTransactions
from relay.turn.ports import FreePorts
from relay.turn.ratelimit import ClientBudget
from relay.turn.timerwheel import Timer, TimerWheel

CHANNEL_LIFETIME: Final = 600  # seconds. RFC 8656 §12
CHANNEL_COOLDOWN: Final = 300  # seconds until number and peer are free again. RFC 8656 §12

# How much is ended in one go: as many channels, each of which is some 3 µs of work. So many clients
# may come and go at one time that all of their deadlines together would hold up everyone's data.
ENDED_AT_ONCE: Final = 500
_ALLOCATION_COSTS: Final = 20  # as much as so many channels, to end: sockets have to be closed
_PORTION: Final = 8  # deadlines that are looked at before the work they made is weighed

# Bytes of a client's address by which its allocations are counted.
IPV4_SITE: Final = 4  # all of it
IPV6_SITE: Final = 8  # a /64: whoever has one address of it has them all


class Binding(Enum):
    """The life of a channel."""

    BOUND = auto()  # relays
    COOLING = auto()  # relays nothing; number and peer are still reserved for each other
    GONE = auto()


class Input(Enum):
    """What moves a channel from one state to the next."""

    BIND = auto()
    EXPIRED = auto()


NEXT: Final = {
    (Binding.BOUND, Input.BIND): Binding.BOUND,  # a refresh
    (Binding.BOUND, Input.EXPIRED): Binding.COOLING,
    (Binding.COOLING, Input.BIND): Binding.BOUND,  # revived, both ways
    (Binding.COOLING, Input.EXPIRED): Binding.GONE,
}


@dataclass(slots=True, eq=False)
class Channel:
    """A channel number bound to one peer of one allocation. RFC 8656 §12."""

    client: ClientAddress
    number: int
    port: int  # of the allocation
    peer: PeerAddress
    reaches_outside: bool  # False: only as an allocation of this very relay
    state: Binding = Binding.COOLING
    timer: Timer | None = None


@dataclass(slots=True, eq=False)
class Allocation:
    """A relay port lent to one client. RFC 8656 §6.

    Each family of a dual allocation has an end of its own: a Refresh may be about one of them.
    """

    client: ClientAddress
    user: str  # who made it, see Authenticator.user_of
    port: int
    expires_at: dict[Family, float]  # monotonic seconds; a relayed address in each, IPv4 first
    address_errors: dict[Family, ErrorCode]  # why there is none in a family that was asked for
    transaction_id: bytes  # of the Allocate that made it
    nonce_issued: int  # when that of the Allocate was, in monotonic seconds
    budget: ClientBudget = field(default_factory=ClientBudget)
    channels: dict[int, Channel] = field(default_factory=dict)
    channels_by_peer: dict[PeerAddress, Channel] = field(default_factory=dict)
    timer: Timer | None = None

    @property
    def families(self) -> tuple[Family, ...]:
        """The families of its relayed addresses, IPv4 first."""
        return tuple(self.expires_at)


class Tables:
    """Every allocation and channel of the relay, by all that they are looked up by."""

    def __init__(self, now: float, free_ports: FreePorts, commands: deque[Command]) -> None:
        """Begin empty; what changes leaves through *commands*."""
        self.free_ports = free_ports
        self._by_client: dict[ClientAddress, Allocation] = {}
        self._by_port: dict[int, Allocation] = {}
        # A dict serves as an ordered set.
        self._by_user: dict[str, dict[Allocation, None]] = {}
        self._by_site: Counter[bytes] = Counter()
        self._deadlines: TimerWheel[Allocation | Channel] = TimerWheel(now)
        self._commands = commands
        self.ended = EndedTransactions()
        self.sockets = 0  # relay ports in use, counted once per family
        self.channels = 0  # bound and cooling ones
        self.bound = 0

    def __len__(self) -> int:
        return len(self._by_client)

    def all_allocations(self) -> list[Allocation]:
        """Return every allocation."""
        return list(self._by_client.values())

    def of_client(self, client: ClientAddress) -> Allocation | None:
        """Return the allocation of a 5-tuple, perhaps one that has expired and still waits."""
        return self._by_client.get(client)

    def live_of_client(self, client: ClientAddress, now: float) -> Allocation | None:
        """Return the allocation of a 5-tuple, ending first what of it has expired at *now*.

        :meth:`expire` may not have come to it, if many end at once.
        """
        allocation = self._by_client.get(client)
        if allocation is None or min(allocation.expires_at.values()) > now:
            return allocation
        self._expire_allocation(allocation, now)
        return self._by_client.get(client)

    def at_port(self, port: int) -> Allocation | None:
        """Return the allocation that holds a relay port."""
        return self._by_port.get(port)

    def of_user(self, user: str) -> list[Allocation]:
        """Return the allocations that a user made, oldest first."""
        return list(self._by_user.get(user, ()))

    def count_of_user(self, user: str) -> int:
        """Return how many allocations a user has."""
        return len(self._by_user.get(user, ()))

    def at_site(self, site: bytes) -> int:
        """Return how many allocations the clients of a site have."""
        return self._by_site[site]

    @property
    def next_deadline(self) -> float | None:
        """When :meth:`expire` should be called next."""
        return self._deadlines.next_deadline

    def add(self, allocation: Allocation) -> None:
        """Enter a new allocation, whose port is open and was taken from the free ones."""
        assert allocation.client not in self._by_client
        assert allocation.port not in self._by_port
        self._by_client[allocation.client] = allocation
        self._by_port[allocation.port] = allocation
        self._by_user.setdefault(allocation.user, {})[allocation] = None
        self._by_site[site_of(allocation.client[0][0])] += 1
        self._deadlines.schedule(allocation, min(allocation.expires_at.values()))
        self.sockets += len(allocation.expires_at)

    def refresh(self, allocation: Allocation, families: Iterable[Family], end: float) -> None:
        """Move the end of an allocation's *families*, in either direction."""
        for family in families:
            allocation.expires_at[family] = end
        self._deadlines.schedule(allocation, min(allocation.expires_at.values()))

    def delete(self, allocation: Allocation, families: tuple[Family, ...] | None = None) -> None:
        """Free an allocation, or some of its *families*, with all channels, cooling ones too.

        When no family is left nothing is left of it, and its 5-tuple and port are free.
        """
        present = allocation.families
        families = present if families is None else families
        if len(families) == len(present):
            ending = list(allocation.channels.values())
        else:
            ending = [c for c in allocation.channels.values() if family_of(c.peer[0]) in families]
        bound = []
        for channel in ending:
            self._deadlines.cancel(channel)
            if channel.state is Binding.BOUND:
                bound.append((channel.number, channel.peer))
            channel.state = Binding.GONE
            del allocation.channels[channel.number], allocation.channels_by_peer[channel.peer]
        self.channels -= len(ending)
        self.bound -= len(bound)
        self.sockets -= len(families)
        for family in families:
            del allocation.expires_at[family]
        self._commands.append(ClosePort(allocation.client, allocation.port, families, bound))
        if allocation.expires_at:
            self._deadlines.schedule(allocation, min(allocation.expires_at.values()))
        else:
            self._forget(allocation)

    def bind(
        self,
        allocation: Allocation,
        number: int,
        peer: PeerAddress,
        *,
        reaches_outside: bool,
        now: float,
    ) -> None:
        """Bind, refresh or revive a channel. The caller has seen that nothing is in the way."""
        channel = allocation.channels.get(number)
        if channel is None:
            channel = Channel(allocation.client, number, allocation.port, peer, reaches_outside)
            allocation.channels[number] = allocation.channels_by_peer[peer] = channel
            self.channels += 1
        if channel.state is not Binding.BOUND:
            self._bind(channel, reaches_outside=reaches_outside)
        channel.state = NEXT[channel.state, Input.BIND]
        self._deadlines.schedule(channel, now + CHANNEL_LIFETIME)

    def recheck_peer(self, channel: Channel, reaches_outside: bool | None, now: float) -> None:
        """Apply changed rules to a channel, if it is bound.

        *reaches_outside* tells whether datagrams to its peer may leave this relay; None if it may
        not be reached at all: the channel is unbound, as if its time had come.
        """
        if channel.state is not Binding.BOUND:
            return
        if reaches_outside is None:
            self._expire_channel(channel, now)
        elif reaches_outside is not channel.reaches_outside:
            self._unbind(channel)
            self._bind(channel, reaches_outside=reaches_outside)

    def expire(self, now: float) -> None:
        """Serve the deadlines up to *now*, or a portion of them if there are many."""
        work = 0
        while work < ENDED_AT_ONCE and self._deadlines.has_passed(now):
            for due in self._deadlines.advance(now, _PORTION):
                if isinstance(due, Allocation):
                    work += _ALLOCATION_COSTS + len(due.channels)
                    self._expire_allocation(due, now)
                elif due.state is not Binding.GONE:  # gone with its allocation, a moment ago
                    work += 1
                    self._expire_channel(due, now)
            work += 1

    def _expire_allocation(self, allocation: Allocation, now: float) -> None:
        ended = tuple(family for family, end in allocation.expires_at.items() if end <= now)
        assert ended
        self.delete(allocation, ended)

    def _forget(self, allocation: Allocation) -> None:
        client, user = allocation.client, allocation.user
        self._deadlines.cancel(allocation)
        del self._by_client[client]
        del self._by_port[allocation.port]
        of_user = self._by_user[user]
        del of_user[allocation]
        if not of_user:
            del self._by_user[user]
        site = site_of(client[0][0])
        self._by_site[site] -= 1
        if not self._by_site[site]:
            del self._by_site[site]
        self.free_ports.give_back(allocation.port)
        self.ended.add(client, Method.ALLOCATE, allocation.transaction_id)

    def _expire_channel(self, channel: Channel, now: float) -> None:
        channel.state = NEXT[channel.state, Input.EXPIRED]
        if channel.state is Binding.COOLING:
            self._unbind(channel)
            self._deadlines.schedule(channel, now + CHANNEL_COOLDOWN)
        else:
            allocation = self._by_client[channel.client]
            del allocation.channels[channel.number]
            del allocation.channels_by_peer[channel.peer]
            self.channels -= 1

    def _bind(self, channel: Channel, *, reaches_outside: bool) -> None:
        channel.reaches_outside = reaches_outside
        self.bound += 1
        self._commands.append(
            BindChannel(channel.client, channel.number, channel.port, channel.peer, reaches_outside)
        )

    def _unbind(self, channel: Channel) -> None:
        self.bound -= 1
        self._commands.append(
            UnbindChannel(channel.client, channel.number, channel.port, channel.peer)
        )

    def check(self) -> None:
        """Assert that every index tells the same story. For tests; looks at everything."""
        allocations = list(self._by_client.values())
        assert {a.client for a in allocations} == set(self._by_client)
        assert {a.port: a for a in allocations} == self._by_port
        assert set(allocations) == {a for some in self._by_user.values() for a in some}
        assert all(
            some and all(a.user == user for a in some) for user, some in self._by_user.items()
        )
        for allocation in allocations:
            assert allocation.expires_at
            assert {c.peer: c for c in allocation.channels.values()} == allocation.channels_by_peer
            for number, channel in allocation.channels.items():
                assert channel.number == number
                assert channel.client == allocation.client
                assert channel.port == allocation.port
                assert channel.state is not Binding.GONE
                assert family_of(channel.peer[0]) in allocation.families
        self.free_ports.check(taken=self._by_port)
        assert self._by_site == Counter(site_of(a.client[0][0]) for a in allocations)
        assert self.sockets == sum(len(a.expires_at) for a in allocations)
        assert self.channels == sum(len(a.channels) for a in allocations)
        channels = [c for a in allocations for c in a.channels.values()]
        assert self.bound == sum(c.state is Binding.BOUND for c in channels)
        assert len(self._deadlines) == len(allocations) + self.channels


def site_of(host: str) -> bytes:
    """Return what a client's address is counted by: all of it, or the /64 of IPv6."""
    return prefix_of(host, IPV4_SITE, IPV6_SITE)
