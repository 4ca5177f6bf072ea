"""How much work is done for those who ask, before and after they have proven anything.

Everything that a request can cost is bounded, and each bound is there for one attack:

=====================================  ========================================================
bound                                  what it stands against
=====================================  ========================================================
:data:`CLIENT_RATE` per allocation     a client with a good credential that asks and asks
rate per prefix                        a network that asks and asks, and answers to requests
                                       that were forged in the name of one network
rate in all                            requests from everywhere, forged or not
a prefix that was quiet comes first    whoever is new while some networks use up the rate in all
a proven address comes first           whoever is new while forged requests from everywhere do:
                                       only the first request, of two, has to compete with them
=====================================  ========================================================

What is counted is work, in units of what the answer to a Binding request costs, and it is counted
whether or not an answer comes of it. Above a bound there is silence, and nothing is computed.

Memory is fixed: prefixes share the slots of one table, by a hash that CPython seeds at random for
each process, so nobody can aim at another's slot.
"""

from array import array
from typing import ClassVar, Final

from relay.stun.address import prefix_of
from relay.turn.commands import Drop

# A gateway may have hundreds of peers to bind a channel to, all at once, but not every second.
CLIENT_RATE: Final = 100.0  # requests per second
CLIENT_BURST: Final = 500.0  # requests after a pause

# Whose peer is gone has an error for each datagram that is sent there; a few of them will do.
ERROR_RATE: Final = 8.0  # ICMP errors per second
ERROR_BURST: Final = 16.0

BURST: Final = 5.0  # seconds' worth of work that a prefix may ask for at once after a pause
# How many times as much a prefix may ask for from proven addresses: no answer to these hits anybody
# who has not asked, and behind one address many may call at once.
PROVEN: Final = 4
# Likewise for all together: less, for so long everybody's data may have to share the processor.
BURST_IN_ALL: Final = 0.5
# A prefix is quiet as long as it asks no more than this, served or not; some households share one.
QUIET_RATE: Final = 2.0  # requests per second
QUIET_BURST: Final = 20.0  # requests after a pause
_QUIET_AGAIN: Final = 10.0  # seconds after its last request, however many there were

IPV4_BYTES: Final = 3  # of an address make the prefix: /24
IPV6_BYTES: Final = 7  # /56, what a customer of a provider gets
SLOTS: Final = 1 << 16

# How much of BURST_IN_ALL is there for whom. Who is served last leaves the rest for the others: a
# flood of one kind stands at its own mark and never reaches the next.
_UNPROVEN_BUSY, _UNPROVEN_QUIET, _PROVEN_BUSY, _PROVEN_QUIET = 0.25, 0.5, 0.75, 1.0

Source = int
"""A prefix, and whether what comes from there was proven to: a slot of the tables."""


class Budget:
    """What one allocation may have of something: so much per second, after a burst."""

    __slots__ = ("due",)

    rate: ClassVar[float]  # per second
    burst: ClassVar[float]

    def __init__(self) -> None:
        """Begin with a full budget."""
        self.due = 0.0  # when the next one would be due at exactly the rate, in monotonic seconds

    def is_spent(self, now: float) -> bool:
        """Tell if there is nothing left at *now*, in monotonic seconds."""
        return self.due > now + (self.burst - 1) / self.rate

    def spend(self, now: float) -> None:
        """Count one."""
        self.due = max(self.due, now) + 1 / self.rate


class ClientBudget(Budget):
    """The requests that one 5-tuple may have served."""

    __slots__ = ()
    rate = CLIENT_RATE
    burst = CLIENT_BURST


class ErrorBudget(Budget):
    """The ICMP errors of which a client hears: anyone can make up as many as they like."""

    __slots__ = ()
    rate = ERROR_RATE
    burst = ERROR_BURST


class RateLimiter:
    """Bounds the work for sources that hold no allocation: per prefix, and in all.

    Each bound is the generic cell rate algorithm (ITU-T I.371): kept is when the next unit of work
    would be due at exactly the rate; it may be done so much earlier as the burst is long.
    """

    def __init__(self, per_prefix: int, total: int) -> None:
        """Take the rates in units of work per second; 0 is no limit."""
        self._due = array("d", bytes(8 * 2 * SLOTS))  # by Source
        self._quiet_due = array("d", bytes(8 * 2 * SLOTS))
        self.due_in_all = 0.0  # when the next unit of all would be, in monotonic seconds
        self.set_rates(per_prefix, total)

    def set_rates(self, per_prefix: int, total: int) -> None:
        """Go on with other rates, in units of work per second; 0 is no limit."""
        unproven = 1 / per_prefix if per_prefix else 0.0
        self._spacing = (unproven, unproven / PROVEN)
        self._spacing_in_all = 1 / total if total else 0.0

    def source(self, host: str, *, is_proven: bool) -> Source:
        """Return what a request from *host* is counted by.

        *is_proven*: it holds a nonce that was sent to its address, so that is not forged. Such
        requests are counted on their own; nobody else can use up what they may ask for.
        """
        slot = hash(prefix_of(host, IPV4_BYTES, IPV6_BYTES)) % SLOTS
        return slot + SLOTS if is_proven else slot

    def refusal(self, source: Source, now: float) -> Drop | None:
        """Say which bound a request from *source* would exceed at *now*, or None."""
        share = self._share(source, now)
        if self._spacing_in_all and self.due_in_all > now + BURST_IN_ALL * share:
            return Drop.TOTAL_RATE
        if self._spacing[source >= SLOTS] and self._due[source] > now + BURST:
            return Drop.PREFIX_RATE
        return None

    def count(self, source: Source, work: int, now: float) -> None:
        """Count *work* that was done for *source*."""
        self._due[source] = max(self._due[source], now) + work * self._spacing[source >= SLOTS]
        self.due_in_all = max(self.due_in_all, now) + work * self._spacing_in_all

    def _share(self, source: Source, now: float) -> float:
        """Return how much of BURST_IN_ALL is there for *source*, which has just asked."""
        due, busy = self._quiet_due[source], now + QUIET_BURST / QUIET_RATE
        self._quiet_due[source] = min(max(due, now) + 1 / QUIET_RATE, busy + _QUIET_AGAIN)
        is_quiet = due <= busy
        if source < SLOTS:
            return _UNPROVEN_QUIET if is_quiet else _UNPROVEN_BUSY
        return _PROVEN_QUIET if is_quiet else _PROVEN_BUSY
