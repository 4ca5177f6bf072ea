"""Transactions whose effect is over, so that a late duplicate has none.

UDP may deliver a request twice, a client sends it again while no answer comes, and whoever saw
it on its way can send it once more. Of what a duplicate may find, an allocation that is there
answers for itself. One that is gone cannot: a second Allocate would make an allocation that
nobody owns, and a second Refresh with LIFETIME 0 end the one that came after.
"""

from typing import Final

from relay.turn.commands import ClientAddress

# Retransmissions go on for 39.5 s (RFC 8489 §6.2.1). For so many transactions to be forgotten
# within that time, 200 allocations would have to end per second.
REMEMBERED: Final = 1 << 13


class EndedTransactions:
    """The last transactions that made what is gone, or ended it. Memory is bounded."""

    def __init__(self) -> None:
        # Their hashes, oldest first: 64 bits, seeded at random, do as well as the whole.
        self._known: dict[int, None] = {}

    def add(self, client: ClientAddress, method: int, transaction_id: bytes) -> None:
        """Remember a transaction of *client*, at the cost of the one that is known longest."""
        if len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[hash((client, method, transaction_id))] = None

    def has(self, client: ClientAddress, method: int, transaction_id: bytes) -> bool:
        """Tell if a request is a duplicate of one whose effect is over."""
        return hash((client, method, transaction_id)) in self._known
