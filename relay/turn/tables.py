"""Allocations, channels, permissions and every index over them. The only writer of that state.

Rules about *who may* are the server's; what is kept here is that the indexes agree, that
each change of what is relayed leaves as a command, and that everything has a deadline.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, TypeVar

from relay.stun.address import family_of, prefix_of
from relay.stun.const import ErrorCode, Family, Method
from relay.turn.commands import (
    BindChannel,
    ClientAddress,
    ClosePort,
    Command,
    InstallPermissions,
    PeerAddress,
    RemovePermissions,
    UnbindChannel,
)
from relay.turn.ended import EndedTransactions
from relay.turn.ports import FreePorts
from relay.turn.ratelimit import ClientBudget
from relay.turn.timerwheel import Timer, TimerWheel

T = TypeVar("T")

CHANNEL_LIFETIME: Final = 600  # seconds. RFC 8656 §12
CHANNEL_COOLDOWN: Final = 300  # seconds until number and peer are free again. RFC 8656 §12

PERMISSION_LIFETIME: Final = 300  # seconds. RFC 8656 §9
RESERVATION_LIFETIME: Final = 30  # seconds. RFC 8656 §7.2

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
class Permissions:
    """The hosts that may send to an allocation, and be sent to, at any port. RFC 8656 §9.

    All permissions last equally long, so the one that was asked for first ends first.
    """

    client: ClientAddress
    port: int  # of the allocation
    expires_at: dict[str, float] = field(default_factory=dict)  # by host, the first to end first
    report_errors: bool = False  # the client has asked for one, not just bound channels
    timer: Timer | None = None


@dataclass(slots=True, eq=False)
class Reservation:
    """A relay port that is kept for another Allocate of the same user. RFC 8656 §7.2."""

    token: bytes  # 8 bytes
    user: str
    site: bytes
    family: Family
    port: int
    expires_at: float  # monotonic seconds
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
    reservation_token: bytes | None = None  # of the next port, if that was to be kept
    budget: ClientBudget = field(default_factory=ClientBudget)
    channels: dict[int, Channel] = field(default_factory=dict)
    channels_by_peer: dict[PeerAddress, Channel] = field(default_factory=dict)
    permissions: Permissions | None = None  # None: there has not been any yet
    timer: Timer | None = None

    @property
    def families(self) -> tuple[Family, ...]:
        """The families of its relayed addresses, IPv4 first."""
        return tuple(self.expires_at)


class Tables:
    """Everything that the relay holds for clients, by all that it is looked up by."""

    def __init__(self, now: float, free_ports: FreePorts, commands: deque[Command]) -> None:
        """Begin empty; what changes leaves through *commands*."""
        self.free_ports = free_ports
        self._by_client: dict[ClientAddress, Allocation] = {}
        self._by_port: dict[int, Allocation] = {}
        # A dict serves as an ordered set.
        self._by_user: dict[str, dict[Allocation, None]] = {}
        self._by_site: Counter[bytes] = Counter()  # with reservations
        self._reservations: dict[bytes, Reservation] = {}  # by token
        self._reserved_by_user: Counter[str] = Counter()
        self._deadlines: TimerWheel[Allocation | Channel | Permissions | Reservation]
        self._deadlines = TimerWheel(now)
        self._commands = commands
        self.ended = EndedTransactions()
        # Those whose allocation has changed since somebody wanted to know; None: nobody does.
        self.changed: dict[ClientAddress, None] | None = None
        self.sockets = 0  # relay ports in use, counted once per family
        self.channels = 0  # bound and cooling ones
        self.bound = 0
        self.permissions = 0

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
        """Return how many allocations a user has, or has a port reserved for."""
        return len(self._by_user.get(user, ())) + self._reserved_by_user[user]

    def at_site(self, site: bytes) -> int:
        """Return how many allocations the clients of a site have, or a port reserved for."""
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
        self.note(allocation.client)

    def note(self, client: ClientAddress) -> None:
        """Note that something of a client's allocation has changed, if somebody wants to know."""
        if self.changed is not None:
            self.changed[client] = None

    def restore(self, allocation: Allocation, deadlines: Mapping[Channel, float]) -> bool:
        """Enter an allocation of another process, with all that is in it.

        Its port is open. Each channel ends at its deadline, in monotonic seconds. Returns False if
        its client has another one here, or its port is not free.
        """
        if allocation.client in self._by_client or not self.free_ports.claim(allocation.port):
            return False
        self.add(allocation)
        self.channels += len(deadlines)
        for channel, deadline in deadlines.items():
            self._deadlines.schedule(channel, deadline)
            if channel.state is Binding.BOUND:
                self._bind(channel, reaches_outside=channel.reaches_outside)
        permissions = allocation.permissions
        if permissions is not None:
            self.permissions += len(permissions.expires_at)
            self._install(permissions, list(permissions.expires_at))
            self._schedule_permissions(permissions)
        return True

    def evict(self, client: ClientAddress) -> Allocation | None:
        """Forget what a client has as if it had never been here; return it.

        No command says so, and its port is free.
        """
        allocation = self._by_client.get(client)
        if allocation is None:
            return None
        for channel in allocation.channels.values():
            self._deadlines.cancel(channel)
            self.bound -= channel.state is Binding.BOUND
        self.channels -= len(allocation.channels)
        if allocation.permissions is not None:
            self._deadlines.cancel(allocation.permissions)
            self.permissions -= len(allocation.permissions.expires_at)
        self.sockets -= len(allocation.expires_at)
        self._remove_from_indexes(allocation)
        return allocation

    def refresh(self, allocation: Allocation, families: Iterable[Family], end: float) -> None:
        """Move the end of an allocation's *families*, in either direction."""
        for family in families:
            allocation.expires_at[family] = end
        self._deadlines.schedule(allocation, min(allocation.expires_at.values()))
        self.note(allocation.client)

    def delete(self, allocation: Allocation, families: tuple[Family, ...] | None = None) -> None:
        """Free an allocation, or some of its *families*, with all channels and permissions.

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
        permissions = allocation.permissions
        if permissions is not None:
            hosts = [host for host in permissions.expires_at if family_of(host) in families]
            self._forget_permissions(permissions, hosts)
        self.channels -= len(ending)
        self.bound -= len(bound)
        self.sockets -= len(families)
        for family in families:
            del allocation.expires_at[family]
        self.note(allocation.client)
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
        self.note(channel.client)

    def permit(
        self, allocation: Allocation, hosts: list[str], *, reports_errors: bool, now: float
    ) -> None:
        """Install or refresh permissions. The caller has seen that nothing is in the way."""
        permissions = allocation.permissions
        if permissions is None:
            permissions = Permissions(allocation.client, allocation.port)
            allocation.permissions = permissions
        expires_at, end = permissions.expires_at, now + PERMISSION_LIFETIME
        before = len(expires_at)
        new = [host for host in hosts if expires_at.pop(host, None) is None]
        expires_at.update(dict.fromkeys(hosts, end))
        self.permissions += len(expires_at) - before
        if new or (reports_errors and not permissions.report_errors):
            permissions.report_errors = permissions.report_errors or reports_errors
            self._install(permissions, new)
        self._schedule_permissions(permissions)
        self.note(permissions.client)

    def recheck_permission(self, permissions: Permissions, host: str, *, is_allowed: bool) -> None:
        """Apply changed rules to a permission, if there is still one."""
        if host not in permissions.expires_at:
            return
        if is_allowed:
            self._install(permissions, [host])
        else:
            self._remove(permissions, [host])

    def reserve(self, reservation: Reservation) -> None:
        """Keep a port, which was taken from the free ones, for another Allocate of its user."""
        assert reservation.token not in self._reservations
        self._reservations[reservation.token] = reservation
        self._reserved_by_user[reservation.user] += 1
        self._by_site[reservation.site] += 1
        self._deadlines.schedule(reservation, reservation.expires_at)

    def all_reservations(self) -> list[Reservation]:
        """Return every reservation."""
        return list(self._reservations.values())

    def reservation(self, token: bytes) -> Reservation | None:
        """Return what is reserved under a token."""
        return self._reservations.get(token)

    def redeem(self, reservation: Reservation) -> int:
        """End a reservation, and return its port, which is the caller's then."""
        self._deadlines.cancel(reservation)
        del self._reservations[reservation.token]
        _count_down(self._reserved_by_user, reservation.user)
        _count_down(self._by_site, reservation.site)
        return reservation.port

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
            self.note(channel.client)

    def expire(self, now: float) -> None:
        """Serve the deadlines up to *now*, or a portion of them if there are many."""
        work = 0
        while work < ENDED_AT_ONCE and self._deadlines.has_passed(now):
            for due in self._deadlines.advance(now, _PORTION):
                match due:
                    case Allocation():
                        work += _ALLOCATION_COSTS + len(due.channels)
                        self._expire_allocation(due, now)
                    case Channel():
                        work += 1
                        if due.state is not Binding.GONE:  # with its allocation, a moment ago
                            self._expire_channel(due, now)
                    case Permissions():
                        work += self._expire_permissions(due, now)
                    case Reservation():
                        self.free_ports.give_back(self.redeem(due))
            work += 1

    def _expire_allocation(self, allocation: Allocation, now: float) -> None:
        ended = tuple(family for family, end in allocation.expires_at.items() if end <= now)
        assert ended
        self.delete(allocation, ended)

    def _forget(self, allocation: Allocation) -> None:
        self._remove_from_indexes(allocation)
        self.ended.add(allocation.client, Method.ALLOCATE, allocation.transaction_id)

    def _remove_from_indexes(self, allocation: Allocation) -> None:
        client, user = allocation.client, allocation.user
        self._deadlines.cancel(allocation)
        del self._by_client[client]
        del self._by_port[allocation.port]
        of_user = self._by_user[user]
        del of_user[allocation]
        if not of_user:
            del self._by_user[user]
        _count_down(self._by_site, site_of(client[0][0]))
        self.free_ports.give_back(allocation.port)

    def _expire_channel(self, channel: Channel, now: float) -> None:
        self.note(channel.client)
        channel.state = NEXT[channel.state, Input.EXPIRED]
        if channel.state is Binding.COOLING:
            self._unbind(channel)
            self._deadlines.schedule(channel, now + CHANNEL_COOLDOWN)
        else:
            allocation = self._by_client[channel.client]
            del allocation.channels[channel.number]
            del allocation.channels_by_peer[channel.peer]
            self.channels -= 1

    def _expire_permissions(self, permissions: Permissions, now: float) -> int:
        """End those whose time has come, or a portion of them; return how many."""
        ended: list[str] = []
        for host, end in permissions.expires_at.items():
            if end > now or len(ended) == ENDED_AT_ONCE:
                break
            ended.append(host)
        if ended:  # else they are gone with their allocation, a moment ago
            self._remove(permissions, ended)
        return len(ended)

    def _install(self, permissions: Permissions, hosts: list[str]) -> None:
        client, port = permissions.client, permissions.port
        self._commands.append(InstallPermissions(client, port, hosts, permissions.report_errors))

    def _remove(self, permissions: Permissions, hosts: list[str]) -> None:
        self._forget_permissions(permissions, hosts)
        self._commands.append(RemovePermissions(permissions.client, permissions.port, hosts))

    def _forget_permissions(self, permissions: Permissions, hosts: list[str]) -> None:
        self.note(permissions.client)
        for host in hosts:
            del permissions.expires_at[host]
        self.permissions -= len(hosts)
        self._schedule_permissions(permissions)

    def _schedule_permissions(self, permissions: Permissions) -> None:
        """Wake up when the first of them ends."""
        if permissions.expires_at:
            self._deadlines.schedule(permissions, next(iter(permissions.expires_at.values())))
        else:
            self._deadlines.cancel(permissions)

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
            permissions = allocation.permissions
            if permissions is not None:
                assert permissions.client == allocation.client
                assert permissions.port == allocation.port
                ends = list(permissions.expires_at.values())
                assert ends == sorted(ends)
                assert all(
                    family_of(host) in allocation.families for host in permissions.expires_at
                )
        reservations = self._reservations.values()
        self.free_ports.check(taken=[*self._by_port, *(r.port for r in reservations)])
        sites = [*(site_of(a.client[0][0]) for a in allocations), *(r.site for r in reservations)]
        assert self._by_site == Counter(sites)
        assert self._reserved_by_user == Counter(r.user for r in reservations)
        assert self.sockets == sum(len(a.expires_at) for a in allocations)
        assert self.channels == sum(len(a.channels) for a in allocations)
        channels = [c for a in allocations for c in a.channels.values()]
        assert self.bound == sum(c.state is Binding.BOUND for c in channels)
        permitting = [a.permissions.expires_at for a in allocations if a.permissions is not None]
        assert self.permissions == sum(map(len, permitting))
        timed = len(allocations) + self.channels + len(reservations)
        assert len(self._deadlines) == timed + sum(map(bool, permitting))


def _count_down(counter: Counter[T], key: T) -> None:
    """Count one less; what is at zero is forgotten."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def site_of(host: str) -> bytes:
    """Return what a client's address is counted by: all of it, or the /64 of IPv6."""
    return prefix_of(host, IPV4_SITE, IPV6_SITE)
