"""What is counted. Counters are plain numbers: the data path can afford one addition."""

from collections import Counter, defaultdict


class Counters:
    """The relay's counters since it started.

    Relayed datagrams are counted by the size of their payload, in bytes: how many there were,
    how many bytes they had and how their sizes are distributed all follow from that, and it
    is one addition per datagram, or per train of equal ones.
    """

    __slots__ = ("bugs", "dropped", "slow_turns", "to_client", "to_peer", "trains")

    def __init__(self) -> None:
        self.to_peer: defaultdict[int, int] = defaultdict(int)  # sent on to peers, by size
        self.to_client: defaultdict[int, int] = defaultdict(int)  # sent on to clients, by size
        self.trains: defaultdict[int, int] = defaultdict(int)  # those of two and more, by length
        self.dropped: Counter[str] = Counter()  # datagrams not relayed or answered, by reason
        self.slow_turns = 0  # turns of the loop that took longer than SLOW_TURN
        self.bugs = 0  # exceptions that a handler let through

    def lost(self, reason: str) -> None:
        """Count a datagram that the kernel did not take or give."""
        self.dropped[reason] += 1
