"""Who may ask: keys that were proven, and nonces without a table. RFC 8489 §9.2.

A nonce is base64 of a time and of a MAC over that and the client. In front of it is the *nonce
cookie*, where an answer has room for it: it says which of RFC 8489's security features the relay
has, and as the MAC covers it, nobody on the way can take one away unnoticed. An answer to anyone
must stay short, so it is as short as it can be::

    obMatJos2 gAAB qrvM3d4ZxpD6mZ8    cookie, 24 bits of features, 4 bytes of time and 7 of MAC
                   qrvM3d4ZxpD6mZ8    the same without a cookie, for who speaks RFC 5389
"""

import hashlib
import hmac
from base64 import b64encode
from binascii import Error as BinasciiError
from binascii import a2b_base64
from collections.abc import Iterable
from enum import Enum
from itertools import chain
from typing import Final

from relay.stun.attributes import PasswordAlgorithms
from relay.stun.const import PasswordAlgorithm
from relay.turn.commands import ClientAddress
from relay.turn.users import Users

NONCE_LIFETIME: Final = 3600  # seconds
_TIMESTAMP_SIZE: Final = 4  # bytes
_MAC_SIZE: Final = 7  # bytes
_OWN_SIZE: Final = 15  # characters that these are

_COOKIE: Final = b"obMatJos2"  # RFC 8489 §9.2
# Bits of the security features. RFC 8489 §9.2 counts them from the first one, an erratum to it from
# the last one, and there are clients of both readings. To each the other bit is one of those that
# are not assigned, and nobody looks at.
_HAS_PASSWORD_ALGORITHMS: Final = 1 << 0 | 1 << 23
_HAS_USERNAME_ANONYMITY: Final = 1 << 1 | 1 << 22
_COOKIE_SIZE: Final = 13  # characters, with the features

NONCE_SIZES: Final = (_COOKIE_SIZE + _OWN_SIZE, _OWN_SIZE)
"""How many characters a nonce of this relay may have."""

REMEMBERED_KEYS: Final = 1024  # a client's key is wanted for each of its requests


class AuthFailure(Enum):
    """Why a signed request was not believed. The value is the name under which it is counted."""

    STALE_NONCE = "stale_nonce"  # not from here, for somebody else, or too old
    WRONG_CREDENTIALS = "wrong_credentials"  # unknown user or wrong password
    EXPIRED_CREDENTIALS = "expired_credentials"


class Authenticator:
    """Checks usernames and nonces. Keeps a bounded number of keys, and nothing else."""

    users: Users

    def __init__(self, users: Users, nonce_key: bytes) -> None:
        """Take who there is, and a random key of 32 bytes for nonces."""
        self.nonce_key: Final = nonce_key
        self.change_users(users)

    def change_users(self, users: Users) -> None:
        """Go on with other users; keys that were proven before count no more."""
        self.users = users
        # By username and algorithm, oldest first.
        self._remembered: dict[tuple[str, PasswordAlgorithm], bytes] = {}
        self.offered: PasswordAlgorithms = tuple((number, b"") for number in users.algorithms)
        features = 0
        if self.offered:
            features = _HAS_PASSWORD_ALGORITHMS
        if users.finds_hashes:
            features |= _HAS_USERNAME_ANONYMITY
        self._cookie = _COOKIE + b64encode(features.to_bytes(3, "big"))
        self._offer = bytes(users.algorithms)

    def keys(self, username: str, algorithm: PasswordAlgorithm) -> Iterable[bytes]:
        """Return each long-term key that *username* may have, the likeliest first.

        To find that there is none takes as long as to find that one is not the right one.
        """
        users = self.users
        remembered = self._remembered.get((username, algorithm))
        if remembered is not None and not users.are_ambiguous:
            return (remembered,)
        keys = users.keys(username, algorithm)
        if remembered is not None:
            return chain((remembered,), keys)
        return chain((next(keys, self.nonce_key),), keys)

    def remember(self, username: str, algorithm: PasswordAlgorithm, key: bytes) -> None:
        """Keep the key of a user who has proven to know it, for the next requests.

        Of others none is kept: what anyone can send must not push out what clients need.
        """
        if (username, algorithm) not in self._remembered:
            if len(self._remembered) >= REMEMBERED_KEYS:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[username, algorithm] = key

    def nonce(self, client: ClientAddress, now: float, *, with_cookie: bool = True) -> bytes:
        """Return a nonce for *client*: when it was issued, and a MAC that binds it to them."""
        cookie = self._cookie if with_cookie else b""
        return self._nonce(cookie, int(now).to_bytes(_TIMESTAMP_SIZE, "big"), client)

    def has_cookie(self, nonce: bytes) -> bool:
        """Tell if a nonce that was issued here says which features there are."""
        return len(nonce) > _OWN_SIZE

    def nonce_issued(self, nonce: bytes, client: ClientAddress) -> int | None:
        """Return when *nonce* was issued to *client*, in monotonic seconds; None if never here.

        Whoever has such a nonce receives what is sent to the client's address.
        """
        cookie, own = nonce[:-_OWN_SIZE], nonce[-_OWN_SIZE:]
        if len(own) != _OWN_SIZE or (cookie and cookie != self._cookie):
            return None
        try:
            issued = a2b_base64(own + b"=", strict_mode=True)[:_TIMESTAMP_SIZE]
        except BinasciiError:
            return None
        # Made again and compared as it is written: base64 has bits to spare at the end.
        if not hmac.compare_digest(nonce, self._nonce(cookie, issued, client)):
            return None
        return int.from_bytes(issued, "big")

    def _nonce(self, cookie: bytes, issued: bytes, client: ClientAddress) -> bytes:
        host, port = client[0][:2]
        # A client is held to the offer that its nonce came with: with another offer it goes stale.
        offer = self._offer if cookie else b""
        covered = issued + cookie + offer + f" {host} {port}".encode()
        mac = hashlib.blake2s(covered, key=self.nonce_key, digest_size=_MAC_SIZE).digest()
        return cookie + b64encode(issued + mac)[:_OWN_SIZE]
