"""Transactions whose effect is over, so that a late duplicate has none.

UDP may deliver a request twice, a client sends it again while no answer comes, and whoever saw
it on its way can send it once more. Of what a duplicate may find, an allocation that is there
answers for itself. One that is gone cannot: a second Allocate would make an allocation that
nobody owns, and a second Refresh with LIFETIME 0 end the one that came after.
"""

import hashlib
from collections.abc import Iterable
from typing import Final

from relay.turn.commands import ClientAddress

# How many are remembered at least; at most it is twice as many. Retransmissions go on for 39.5 s
# (RFC 8489 §6.2.1). For a transaction to be forgotten within that time, 100 allocations would have
# to end per second.
REMEMBERED: Final = 1 << 12
DIGEST_SIZE: Final = 8  # bytes


class EndedTransactions:
    """The last transactions that made what is gone, or ended it. Memory is bounded."""

    def __init__(self) -> None:
        # Their hashes: 64 bits do as well as the whole, for nobody knows the ids that others will
        # draw. They are the same in any process, so that a successor can go on with them.
        self._last: set[bytes] = set()
        self._before: set[bytes] = set()

    def add(self, client: ClientAddress, method: int, transaction_id: bytes) -> None:
        """Remember a transaction of *client*, and forget the oldest now and then."""
        if len(self._last) >= REMEMBERED:
            self._before, self._last = self._last, set()
        self._last.add(_digest(client, method, transaction_id))

    def has(self, client: ClientAddress, method: int, transaction_id: bytes) -> bool:
        """Tell if a request is a duplicate of one whose effect is over."""
        key = _digest(client, method, transaction_id)
        return key in self._last or key in self._before

    def dump(self) -> tuple[bytes, bytes]:
        """Return what is remembered, :data:`DIGEST_SIZE` bytes each: the last ones, and others."""
        return b"".join(self._last), b"".join(self._before)

    def load(self, last: bytes, before: bytes) -> None:
        """Remember what another process did."""
        self._last, self._before = set(_cut(last)), set(_cut(before))


def _digest(client: ClientAddress, method: int, transaction_id: bytes) -> bytes:
    address, ours = client
    where = ours if isinstance(ours, bytes) else tuple(ours)
    whole = repr((address, where, int(method), transaction_id)).encode()
    return hashlib.blake2s(whole, digest_size=DIGEST_SIZE).digest()


def _cut(digests: bytes) -> Iterable[bytes]:
    return (digests[at : at + DIGEST_SIZE] for at in range(0, len(digests), DIGEST_SIZE))
