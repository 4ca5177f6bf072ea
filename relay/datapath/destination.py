"""How somebody is reached: a client, a peer, or another allocation of this relay."""

from typing import Protocol

Pieces = list[memoryview | bytes]
"""What datagrams are made of that are sent at once, in order."""


class Destination(Protocol):
    """A client, a peer, or another allocation of this relay: somebody who can be sent to."""

    def send(self, datagram: memoryview | bytes, /) -> bool:
        """Send one datagram, or count it as lost; return whether it was sent."""

    def send_many(self, pieces: Pieces, each: int, size: int, /) -> int:
        """Send datagrams of *size* bytes, each of them *each* pieces; the last may be shorter.

        Returns how many were sent, from the first on. The others are not lost yet: they can be
        sent one by one.
        """
