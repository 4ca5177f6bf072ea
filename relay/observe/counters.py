"""What is counted. Counters are plain numbers: the data path can afford one addition."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Final

QUEUE_FULL: Final = "receive_queue_full"  # how datagrams count that came when a queue was full


class Counters:
    """The relay's counters since it started.

    Relayed datagrams are counted by the size of their payload, in bytes: how many there were,
    how many bytes they had and how their sizes are distributed all follow from that, and it
    is one addition per datagram, or per call that sends many equal ones.
    """

    __slots__ = ("batches", "bugs", "dropped", "to_client", "to_peer")

    def __init__(self, known_drops: Iterable[str] = ()) -> None:
        """Begin at zero. *known_drops* are reasons to report before they are counted."""
        self.to_peer: defaultdict[int, int] = defaultdict(int)  # sent on to peers, by size
        self.to_client: defaultdict[int, int] = defaultdict(int)  # sent on to clients, by size
        # How often two or more datagrams were handed to the kernel at once, by how many.
        self.batches: defaultdict[int, int] = defaultdict(int)
        # Datagrams neither relayed nor answered, by reason. Those that found a queue full are not
        # among them: the kernel counts them, and is asked when somebody wants to know.
        self.dropped: Counter[str] = Counter(dict.fromkeys(known_drops, 0))
        self.bugs = 0  # exceptions that a handler let through

    def lost(self, reason: str) -> None:
        """Count a datagram that the kernel did not take or give."""
        self.dropped[reason] += 1
