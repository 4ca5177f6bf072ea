"""Transactions whose effect is over, so that a late duplicate has none.

UDP may deliver a request twice, a client sends it again while no answer comes, and whoever saw
it on its way can send it once more. Of what a duplicate may find, an allocation that is there
answers for itself. One that is gone cannot: a second Allocate would make an allocation that
nobody owns, and a second Refresh with LIFETIME 0 end the one that came after.
"""

from typing import Final

from relay.turn.commands import ClientAddress

# How many are remembered at least; at most it is twice as many. Retransmissions go on for 39.5 s
# (RFC 8489 §6.2.1). For a transaction to be forgotten within that time, 100 allocations would have
# to end per second.
REMEMBERED: Final = 1 << 12


class EndedTransactions:
    """The last transactions that made what is gone, or ended it. Memory is bounded."""

    def __init__(self) -> None:
        # Their hashes: 64 bits, seeded at random, do as well as the whole.
        self._last: set[int] = set()
        self._before: set[int] = set()

    def add(self, client: ClientAddress, method: int, transaction_id: bytes) -> None:
        """Remember a transaction of *client*, and forget the oldest now and then."""
        if len(self._last) >= REMEMBERED:
            self._before, self._last = self._last, set()
        self._last.add(hash((client, method, transaction_id)))

    def has(self, client: ClientAddress, method: int, transaction_id: bytes) -> bool:
        """Tell if a request is a duplicate of one whose effect is over."""
        key = hash((client, method, transaction_id))
        return key in self._last or key in self._before
