"""Who may ask: credentials made from a shared secret, and nonces without a table.

The portal and the relay share a secret, so that the portal can hand out credentials
that the relay can check without having seen them before.
"""

import hashlib
import hmac
from base64 import b64encode
from enum import Enum
from typing import Final

from relay.stun.integrity import long_term_key
from relay.turn.commands import ClientAddress

REALM: Final = "firezone"
NONCE_LIFETIME: Final = 3600  # seconds
_EXPIRY_DIGITS: Final = 20  # as many as 2^64 - 1 has
_TIMESTAMP_SIZE: Final = 8  # hexadecimal digits
_MAC_SIZE: Final = 12  # bytes, twice as many digits; an answer to anyone must stay short
REMEMBERED_KEYS: Final = 1024  # usernames; a client's key is wanted for each of its requests


class AuthFailure(Enum):
    """Why a signed request was not believed. The value is the name under which it is counted."""

    STALE_NONCE = "stale_nonce"  # not from here, for somebody else, or too old
    WRONG_CREDENTIALS = "wrong_credentials"  # unknown user or wrong password
    EXPIRED_CREDENTIALS = "expired_credentials"


def password(expiry: str, salt: str, secret: str) -> str:
    """Return the password of user ``{expiry}:{salt}``: unpadded base64 of a SHA-256."""
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

    def has_expired(self, username: str, unix_now: float) -> bool:
        """Tell if a well-formed *username* is past its expiry, in seconds of Unix time."""
        return int(username.partition(":")[0]) < unix_now

    def nonce(self, client: ClientAddress, now: float) -> bytes:
        """Return a nonce for *client*: when it was issued, and a MAC that binds it to them."""
        issued = b"%0*x" % (_TIMESTAMP_SIZE, int(now))
        return issued + self._nonce_mac(issued, client)

    def nonce_is_valid(self, nonce: bytes, client: ClientAddress, now: float) -> bool:
        """Tell if *nonce* was issued here, to this client, at most an hour ago."""
        issued, mac = nonce[:_TIMESTAMP_SIZE], nonce[_TIMESTAMP_SIZE:]
        if not hmac.compare_digest(mac, self._nonce_mac(issued, client)):
            return False
        return int(now) - int(issued, 16) <= NONCE_LIFETIME

    def _nonce_mac(self, issued: bytes, client: ClientAddress) -> bytes:
        host, port = client[0][:2]
        covered = issued + f" {host} {port}".encode()
        mac = hashlib.blake2s(covered, key=self._nonce_key, digest_size=_MAC_SIZE)
        return mac.hexdigest().encode()


def _is_expiry(text: str) -> bool:
    """Tell if *text* is a decimal number, at most as large as 20 digits can say."""
    return text.isascii() and text.isdigit() and len(text) <= _EXPIRY_DIGITS
