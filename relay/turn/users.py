"""Who there is: users of three kinds, known by secrets or by name.

==========  ===============================  ===================================================
kind        username                         password
==========  ===============================  ===================================================
Firezone's  ``{expiry}:{salt}``              unpadded base64 of a SHA-256, see :func:`password`
TURN REST   ``{expiry}:{name}``, or          base64 of HMAC-SHA1(secret, username), by any of the
            ``{expiry}``                     secrets, so that they can be replaced one by one
static      as the operator wrote it         likewise, or the key that is made of it
==========  ===============================  ===================================================

The first two are *timed*: whoever has the secret, Firezone's portal or a web service, can hand out
credentials that the relay can check without having seen them before. An expiry is Unix time.
"""

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Iterator, Mapping
from typing import Final

from relay.stun.const import PasswordAlgorithm
from relay.stun.integrity import long_term_key, userhash

DEFAULT_REALM: Final = "firezone"
_EXPIRY_DIGITS: Final = 20  # as many as 2^64 - 1 has

Password = str | bytes
"""A password, or the key that is made of one: 16 bytes by MD5, 32 by SHA-256."""

_ALGORITHM_OF_KEY: Final = {16: PasswordAlgorithm.MD5, 32: PasswordAlgorithm.SHA_256}
KEY_SIZES: Final = tuple(_ALGORITHM_OF_KEY)


def password(expiry: str, salt: str, secret: str) -> str:
    """Return the password of ``{expiry}:{salt}``: of SHA-256(``{expiry}:{secret}:{salt}``)."""
    # The client chooses the salt, so whoever has one password could extend the hash: the same salt,
    # the padding of SHA-256, and anything. The padding begins with 0x80, which after ASCII is not
    # UTF-8, and USERNAME has to be UTF-8: only that forbids it.
    digest = hashlib.sha256(f"{expiry}:{secret}:{salt}".encode()).digest()
    return b64encode(digest).rstrip(b"=").decode()


def rest_password(username: str, secret: str) -> str:
    """Return the password of a user of the TURN REST convention."""
    return b64encode(hmac.digest(secret.encode(), username.encode(), "sha1")).decode()


def mint(expiry: int, salt: str, secret: str) -> tuple[str, str]:
    """Return a username of Firezone's kind, valid until *expiry*, and its password."""
    return f"{expiry}:{salt}", password(str(expiry), salt, secret)


def mint_rest(expiry: int, name: str, secret: str) -> tuple[str, str]:
    """Return a username of the TURN REST convention, valid until *expiry*, and its password."""
    username = f"{expiry}:{name}"
    return username, rest_password(username, secret)


class Users:
    """Every user that there is. Never changed: a reload makes another one."""

    def __init__(
        self,
        *,
        realm: str = DEFAULT_REALM,
        secret: str | None = None,
        rest_secrets: tuple[str, ...] = (),
        static: Mapping[str, Password] | None = None,
    ) -> None:
        """Take Firezone's *secret* as it is written, if there is one, and what else there is."""
        self.realm = realm
        self._secret = secret
        self._rest_secrets = rest_secrets
        self._static = dict(static or {})
        self._static_by_hash = {userhash(name, realm): name for name in self._static}
        self.algorithms = self._algorithms()
        # By its hash a user is found who is known by name.
        self.finds_hashes = bool(self._static) and secret is None and not rest_secrets
        # One username may have several passwords, all of them good.
        self.are_ambiguous = len(rest_secrets) + (secret is not None) > 1

    def keys(self, username: str, algorithm: PasswordAlgorithm) -> Iterator[bytes]:
        """Return each long-term key that *username* may have, expired or not: none if malformed.

        A static user is no other: its name may look like a timed one.
        """
        known = self._static.get(username)
        if isinstance(known, bytes):
            if _ALGORITHM_OF_KEY[len(known)] is algorithm:
                yield known
        elif known is not None:
            yield long_term_key(username, self.realm, known, algorithm)
        else:
            for made in self._timed_passwords(username):
                yield long_term_key(username, self.realm, made, algorithm)

    def name_of(self, userhash: bytes) -> str | None:
        """Return the static user of a USERHASH."""
        return self._static_by_hash.get(userhash)

    def user_of(self, username: str) -> str:
        """Return who a *username* is that has a key: of a timed one what follows the expiry.

        The same client comes back with a new expiry whenever its credentials are renewed. Where
        nothing follows it, the username is all that there is.
        """
        return username if username in self._static else username.partition(":")[2] or username

    def has_expired(self, username: str, unix_now: float) -> bool:
        """Tell if a *username* that has a key is past its expiry, in seconds of Unix time."""
        return username not in self._static and int(username.partition(":")[0]) < unix_now

    def _timed_passwords(self, username: str) -> Iterator[str]:
        expiry, colon, salt = username.partition(":")
        if not _is_expiry(expiry):
            return
        if self._secret is not None and colon:
            yield password(expiry, salt, self._secret)
        for secret in self._rest_secrets:
            yield rest_password(username, secret)

    def _algorithms(self) -> tuple[PasswordAlgorithm, ...]:
        """Return which algorithms every user can do, the better one first."""
        keys = [known for known in self._static.values() if isinstance(known, bytes)]
        lacking = {
            algorithm
            for key in keys
            for algorithm in PasswordAlgorithm
            if algorithm is not _ALGORITHM_OF_KEY[len(key)]
        }
        best_first = (PasswordAlgorithm.SHA_256, PasswordAlgorithm.MD5)
        return tuple(algorithm for algorithm in best_first if algorithm not in lacking)


def _is_expiry(text: str) -> bool:
    """Tell if *text* is a decimal number, at most as large as 20 digits can say."""
    return text.isascii() and text.isdigit() and len(text) <= _EXPIRY_DIGITS
