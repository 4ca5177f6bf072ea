"""Who may ask: credentials made from a shared secret, and nonces without a table.

The portal and the relay share a secret, so that the portal can hand out credentials
that the relay can check without having seen them before.
"""

import hashlib
import hmac
from base64 import b64encode
from binascii import Error as BinasciiError
from binascii import a2b_base64
from enum import Enum
from typing import Final

from relay.stun.integrity import long_term_key
from relay.turn.commands import ClientAddress

REALM: Final = "firezone"
NONCE_LIFETIME: Final = 3600  # seconds
_EXPIRY_DIGITS: Final = 20  # as many as 2^64 - 1 has
# A nonce is base64 of a time and a MAC. An answer to anyone must stay short: with this one a 401
# to a request that is nothing but a header has three times its size.
_TIMESTAMP_SIZE: Final = 4  # bytes
_MAC_SIZE: Final = 8  # bytes
NONCE_SIZE: Final = 16  # characters
REMEMBERED_KEYS: Final = 1024  # usernames; a client's key is wanted for each of its requests


class AuthFailure(Enum):
    """Why a signed request was not believed. The value is the name under which it is counted."""

    STALE_NONCE = "stale_nonce"  # not from here, for somebody else, or too old
    WRONG_CREDENTIALS = "wrong_credentials"  # unknown user or wrong password
    EXPIRED_CREDENTIALS = "expired_credentials"


def password(expiry: str, salt: str, secret: str) -> str:
    """Return the password of user ``{expiry}:{salt}``: unpadded base64 of a SHA-256."""
    # The client chooses the salt, so whoever has one password could extend the hash: the same salt,
    # the padding of SHA-256, and anything. The padding begins with 0x80, which after ASCII is not
    # UTF-8, and USERNAME has to be UTF-8: only that forbids it.
    digest = hashlib.sha256(f"{expiry}:{secret}:{salt}".encode()).digest()
    return b64encode(digest).rstrip(b"=").decode()


def mint(expiry: int, salt: str, secret: str) -> tuple[str, str]:
    """Return a username, valid until *expiry* in Unix time, and its password."""
    return f"{expiry}:{salt}", password(str(expiry), salt, secret)


class Authenticator:
    """Checks usernames and nonces. Keeps a bounded number of keys, and nothing else."""

    def __init__(self, secret: str, nonce_key: bytes) -> None:
        """Take the shared *secret* as it is written, and a random key of 32 bytes for nonces."""
        self._secret = secret
        self._nonce_key = nonce_key
        self._remembered: dict[str, bytes] = {}  # keys that were proven, oldest first

    def key(self, username: str) -> bytes | None:
        """Return the long-term key of *username*, expired or not; None if it is malformed."""
        remembered = self._remembered.get(username)
        if remembered is not None:
            return remembered
        expiry, colon, salt = username.partition(":")
        if not colon or not _is_expiry(expiry):
            return None
        return long_term_key(username, REALM, password(expiry, salt, self._secret))

    def remember(self, username: str, key: bytes) -> None:
        """Keep the key of a user who has proven to know it, for the next requests.

        Of others none is kept: what anyone can send must not push out what clients need.
        """
        if username not in self._remembered:
            if len(self._remembered) >= REMEMBERED_KEYS:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[username] = key

    def user_of(self, username: str) -> str:
        """Return who a well-formed *username* is: what follows its expiry.

        The same client comes back with a new expiry whenever its credentials are renewed.
        """
        return username.partition(":")[2]

    def has_expired(self, username: str, unix_now: float) -> bool:
        """Tell if a well-formed *username* is past its expiry, in seconds of Unix time."""
        return int(username.partition(":")[0]) < unix_now

    def nonce(self, client: ClientAddress, now: float) -> bytes:
        """Return a nonce for *client*: when it was issued, and a MAC that binds it to them."""
        issued = int(now).to_bytes(_TIMESTAMP_SIZE, "big")
        return b64encode(issued + self._nonce_mac(issued, client))

    def nonce_issued(self, nonce: bytes, client: ClientAddress) -> int | None:
        """Return when *nonce* was issued to *client*, in monotonic seconds; None if never here.

        Whoever has such a nonce receives what is sent to the client's address.
        """
        if len(nonce) != NONCE_SIZE:
            return None
        try:
            decoded = a2b_base64(nonce, strict_mode=True)
        except BinasciiError:
            return None
        issued = decoded[:_TIMESTAMP_SIZE]
        if not hmac.compare_digest(decoded[_TIMESTAMP_SIZE:], self._nonce_mac(issued, client)):
            return None
        return int.from_bytes(issued, "big")

    def _nonce_mac(self, issued: bytes, client: ClientAddress) -> bytes:
        host, port = client[0][:2]
        covered = issued + f" {host} {port}".encode()
        return hashlib.blake2s(covered, key=self._nonce_key, digest_size=_MAC_SIZE).digest()


def _is_expiry(text: str) -> bool:
    """Tell if *text* is a decimal number, at most as large as 20 digits can say."""
    return text.isascii() and text.isdigit() and len(text) <= _EXPIRY_DIGITS
