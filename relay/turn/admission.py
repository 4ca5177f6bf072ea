"""Who is let in: the steps from a signed request to a username. RFC 8489 §9.2.4."""

import logging
from collections import Counter
from typing import NoReturn

from relay.stun import integrity
from relay.stun.address import format_endpoint
from relay.stun.attributes import Attr, UndecodableAttribute
from relay.stun.const import ErrorCode
from relay.stun.raw import RawMessage
from relay.turn.auth import Authenticator, AuthFailure
from relay.turn.request import Refused, Request, require_known_attributes

logger = logging.getLogger("relay.turn")


class Admission:
    """Checks signatures, nonces and credentials, and counts what fails."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator
        self.failures: Counter[AuthFailure] = Counter()

    def signing_key(self, message: RawMessage) -> bytes | None:
        """Return the claimed user's key if the message is signed with it, else None.

        Every answer to a request that proves to know the key is signed with it, errors
        too: Firezone's clients discard what is not.
        """
        if message.integrity_offset is None:
            return None
        try:
            username = message.get(Attr.USERNAME)
        except UndecodableAttribute:
            return None
        if username is None:
            return None
        key = self._authenticator.key(username)
        if key is None or not integrity.verify(message.raw, message.integrity_offset, key):
            return None
        self._authenticator.remember(username, key)
        return key

    def authenticate(self, request: Request) -> str:
        """Return the username that signed the request. Raises Refused, or UndecodableAttribute."""
        message = request.message
        if message.get(Attr.MESSAGE_INTEGRITY) is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "not signed")
        username = message.get(Attr.USERNAME)
        if username is None or message.get(Attr.REALM) is None:
            raise Refused(ErrorCode.BAD_REQUEST, "signed without USERNAME or REALM")
        nonce = message.get(Attr.NONCE)
        if nonce is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "no nonce")
        if not self._authenticator.nonce_is_valid(nonce, request.client, request.now):
            self.failures[AuthFailure.STALE_NONCE] += 1
            raise Refused(ErrorCode.STALE_NONCE, "nonce not from here, or too old")
        if request.key is None:
            self._fail(request, AuthFailure.WRONG_CREDENTIALS, "unknown user or wrong password")
        if self._authenticator.has_expired(username, request.unix_now):
            self._fail(request, AuthFailure.EXPIRED_CREDENTIALS, "credentials have expired")
        require_known_attributes(request)
        return username

    def _fail(self, request: Request, failure: AuthFailure, reason: str) -> NoReturn:
        """Refuse a client whose nonce was good: the address is its own, and can be named."""
        self.failures[failure] += 1
        host, port = request.mapped_address
        logger.warning(
            "authentication failed for %s: %s",
            format_endpoint(host, port),
            reason,
            extra={"client": host, "reason": reason},
        )
        raise Refused(ErrorCode.UNAUTHORIZED, reason)
