"""What all parts of the data path work with: the buffer of every datagram, and the counters."""

from collections.abc import Sequence
from typing import Final

from relay.observe.counters import Counters
from relay.turn.channeldata import HEADER_SIZE
from relay.turn.commands import Drop
from relay.turn.indications import DATA_HEADER_SIZES, TransactionIds

LARGEST_DATAGRAM: Final = 65535
LARGEST_REMEMBERED: Final = 1500  # bytes, as many as an Ethernet frame carries
# Where the payload lies, and where the header of ChannelData does.
PAYLOAD_AT: Final = max(DATA_HEADER_SIZES)
FRAME_AT: Final = PAYLOAD_AT - HEADER_SIZE
_PADDING: Final = 3  # bytes that a Data indication may have behind the payload


class Workspace:
    """What all parts of the data path work with: one buffer, and the counters.

    Peers' datagrams are read to where there is room in front for any header, clients' to where the
    payload of ChannelData comes to lie at the same place. So a payload is never copied; only where
    segments are handled singly they are moved to the front, one after another.
    """

    def __init__(self, counters: Counters, random_id: int = 0) -> None:
        """Begin with an empty buffer. *random_id*, of 96 bits, is where transaction ids begin."""
        self.buffer = bytearray(PAYLOAD_AT + LARGEST_DATAGRAM + _PADDING)
        self.view = memoryview(self.buffer)
        self.for_clients = self.view[FRAME_AT : FRAME_AT + LARGEST_DATAGRAM]
        self.for_peers = self.view[PAYLOAD_AT : PAYLOAD_AT + LARGEST_DATAGRAM]
        self.framed = Prefixes(self.view[FRAME_AT:])  # by size, with the header of ChannelData
        self.payloads = Prefixes(self.for_peers)  # by size, without it
        self.counters = counters
        # By size of the header of a Data indication, which ends where the payload begins.
        self.indicated = {
            size: Prefixes(self.view[PAYLOAD_AT - size :]) for size in DATA_HEADER_SIZES
        }
        self.transaction_ids = TransactionIds(random_id)

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
