"""How somebody is reached: a client, a peer, or another allocation of this relay."""

from typing import Protocol

Pieces = list[memoryview | bytes]
"""What datagrams are made of that are sent at once, in order."""


class Destination(Protocol):
    """A client, a peer, or another allocation of this relay: somebody who can be sent to.

    *tos* is the octet of DSCP and ECN that what is sent is to have. What is relayed has that with
    which it came, what the relay itself says has 0. RFC 8656 §14.
    """

    def send(self, datagram: memoryview | bytes, tos: int = 0, /) -> bool:
        """Send one datagram, or count it as lost; return whether it was sent."""

    def send_many(self, pieces: Pieces, each: int, size: int, tos: int = 0, /) -> int:
        """Send datagrams of *size* bytes, each of them *each* pieces; the last may be shorter.

        Returns how many were sent, from the first on. The others are not lost yet: they can be
        sent one by one.
        """


class ClientDestination(Destination, Protocol):
    """A client."""

    def answer(self, message: bytes, /) -> None:
        """Send what the relay itself says: an answer to a request."""


class PeerDestination(Destination, Protocol):
    """A peer, as it is reached from a relay port."""

    def send_whole(self, datagram: memoryview | bytes, tos: int = 0, /) -> bool:
        """Send one datagram that is not to be fragmented on its way. RFC 8656 §14."""
