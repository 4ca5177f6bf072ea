"""What is counted. Counters are plain numbers: the data path can afford an addition."""

from collections import Counter


class Counters:
    """The relay's counters since it started."""

    __slots__ = ("bugs", "dropped")

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()  # datagrams not relayed or answered, by reason
        self.bugs = 0  # exceptions that a handler let through

    def lost(self, reason: str) -> None:
        """Count a datagram that the kernel did not take or give."""
        self.dropped[reason] += 1
