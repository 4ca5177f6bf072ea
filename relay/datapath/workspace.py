"""What all parts of the data path work with: the buffer of every datagram, and the counters."""

from collections.abc import Sequence
from typing import Final

from relay.observe.counters import Counters
from relay.turn.channeldata import HEADER_SIZE
from relay.turn.commands import Drop

LARGEST_DATAGRAM: Final = 65535
LARGEST_REMEMBERED: Final = 1500  # bytes, as many as an Ethernet frame carries


class Workspace:
    """What all parts of the data path work with: one buffer, and the counters.

    Clients' datagrams are read to the start of the buffer, peers' behind room for the header of
    ChannelData. So a payload always lies at offset 4, and is never copied; only where segments
    are handled singly they are moved to the front, one after another.
    """

    def __init__(self, counters: Counters) -> None:
        """Begin with an empty buffer."""
        self.buffer = bytearray(HEADER_SIZE + LARGEST_DATAGRAM)
        self.view = memoryview(self.buffer)
        self.for_peers = self.view[HEADER_SIZE:]  # where peers' datagrams are read to
        self.framed = Prefixes(self.view)  # by size, with the header of ChannelData
        self.payloads = Prefixes(self.for_peers)  # by size, without it
        self.counters = counters

    def drop(self, reason: Drop) -> None:
        """Count a datagram that is not relayed."""
        self.counters.dropped[reason.value] += 1

    def count_many(
        self, sizes: dict[int, int], sent: int, payloads: Sequence[memoryview | bytes], size: int
    ) -> None:
        """Count the first *sent* payloads, which were sent at once.

        All are of *size* bytes but perhaps the last.
        """
        if sent:
            sizes[len(payloads[sent - 1])] += 1
        if sent > 1:
            sizes[size] += sent - 1
            self.counters.batches[sent] += 1


class Prefixes(dict[int, memoryview]):
    """The first bytes of a buffer: ``prefixes[size]`` are *size* of them.

    Those of usual sizes are made once: to slice the buffer anew for each datagram is a sixteenth
    of all the instructions that one costs outside the kernel.
    """

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view

    def __missing__(self, size: int) -> memoryview:
        prefix = self._view[:size]
        if size <= LARGEST_REMEMBERED:
            self[size] = prefix
        return prefix
