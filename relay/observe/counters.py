"""What is counted. Counters are plain numbers: the data path can afford one addition."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

QUEUE_FULL: Final = "receive_queue_full"  # how datagrams count that came when a queue was full

UDP: Final = "udp"
STREAM_TRANSPORTS: Final = ("tcp", "tls")
TRANSPORTS: Final = (UDP, *STREAM_TRANSPORTS)  # between clients and the relay

# Upper bounds of the classes by which datagrams are counted, in bytes of payload. The program in
# the kernel (relay/xdp) has the same, and one class for what is larger.
PACKET_SIZES: Final = (64, 128, 256, 512, 1024, 1280, 1500)


class Sizes:
    """Datagrams relayed for the clients of one transport, by the size of their payload in bytes.

    How many there were, how many bytes they had and how their sizes are distributed all follow from
    that, and it is one addition per datagram, or per call that sends many equal ones.
    """

    __slots__ = ("to_client", "to_peer")

    def __init__(self) -> None:
        """Begin at zero."""
        self.to_peer: defaultdict[int, int] = defaultdict(int)  # sent on to peers
        self.to_client: defaultdict[int, int] = defaultdict(int)  # sent on to clients


class Counters:
    """The relay's counters since it started."""

    __slots__ = ("batches", "bugs", "by_transport", "dropped", "to_client", "to_peer")

    def __init__(self, known_drops: Iterable[str] = ()) -> None:
        """Begin at zero. *known_drops* are reasons to report before they are counted."""
        self.by_transport = {transport: Sizes() for transport in TRANSPORTS}
        self.to_peer = self.by_transport[UDP].to_peer  # where no look-up is to be paid for
        self.to_client = self.by_transport[UDP].to_client
        # How often two or more datagrams were handed to the kernel at once, by how many.
        self.batches: defaultdict[int, int] = defaultdict(int)
        # Datagrams neither relayed nor answered, by reason. Those that found a queue full are not
        # among them: the kernel counts them, and is asked when somebody wants to know.
        self.dropped: Counter[str] = Counter(dict.fromkeys(known_drops, 0))
        self.bugs = 0  # exceptions that a handler let through

    def lost(self, reason: str) -> None:
        """Count a datagram that the kernel did not take or give."""
        self.dropped[reason] += 1

    def all_dropped(self, overflows: int) -> dict[str, int]:
        """Return what was dropped by reason, with *overflows*: those that found a queue full.

        For any thread: what is counted meanwhile may be missing.
        """
        return {**dict(self.dropped), QUEUE_FULL: overflows}

    def dump(self) -> dict[str, Any]:
        """Return all of them as JSON can hold them, for :meth:`load`."""
        return {
            "by_transport": {
                transport: [list(sizes.to_peer.items()), list(sizes.to_client.items())]
                for transport, sizes in self.by_transport.items()
            },
            "batches": list(self.batches.items()),
            "dropped": dict(self.dropped),
            "bugs": self.bugs,
        }

    def load(self, counted: Mapping[str, Any]) -> None:
        """Count on from where another process has stopped. Raises KeyError, TypeError, ValueError.

        What this one has counted by then is added.
        """
        for transport, both in counted["by_transport"].items():
            sizes = self.by_transport[transport]
            for counts, items in zip((sizes.to_peer, sizes.to_client), both, strict=True):
                _add(counts, items)
        _add(self.batches, counted["batches"])
        self.dropped.update(counted["dropped"])
        self.bugs += counted["bugs"]


def _add(counts: defaultdict[int, int], items: Iterable[tuple[int, int]]) -> None:
    for key, count in items:
        counts[key] += count


@dataclass(frozen=True, slots=True)
class InKernel:
    """What the data path in the kernel is at one moment, and what it has relayed."""

    devices: Mapping[str, str]  # those asked for, and how it is attached: native, generic or no
    routes: int  # two for each channel
    failures: Mapping[str, int]  # why something was left to the sockets, and how often
    to_peer: "Sequence[Relayed]"  # by the classes of PACKET_SIZES, then what is larger
    to_client: "Sequence[Relayed]"

    @property
    def is_attached(self) -> bool:
        """Whether it relays anything."""
        return any(mode != NOT_ATTACHED for mode in self.devices.values())


NOT_ATTACHED: Final = "no"


@dataclass(frozen=True, slots=True)
class Connections:
    """The connections of clients over TCP and TLS, at one moment and since the start."""

    open: Mapping[str, int]  # by transport
    accepted: Mapping[str, int]  # likewise
    ended: Mapping[str, int]  # by reason
    queued: int  # bytes that wait for clients
    certificate_expires: float | None  # Unix time; None: there is no TLS


@dataclass(frozen=True, slots=True)
class Relayed:
    """Datagrams of one class of sizes."""

    datagrams: int
    bytes: int  # of payload
