"""Who is let in: the steps from a signed request to a user. RFC 8489 §9.2.4."""

import logging
from collections import Counter
from typing import Final, NoReturn

from relay.stun import integrity
from relay.stun.address import format_endpoint
from relay.stun.attributes import Attr, UndecodableAttribute
from relay.stun.const import HEADER_SIZE, ErrorCode
from relay.stun.raw import TLV, RawMessage
from relay.turn.auth import NONCE_LIFETIME, NONCE_SIZE, REALM, Authenticator, AuthFailure
from relay.turn.commands import ClientAddress
from relay.turn.request import Proof, Refused, Request, require_known_attributes

logger = logging.getLogger("relay.turn")

_NONCE_HEADER: Final = TLV.pack(Attr.NONCE.type, NONCE_SIZE)


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

    def proof_of_address(self, datagram: bytes, client: ClientAddress) -> Proof | None:
        """Return a nonce in a request that was sent to the address it says to be from, if any.

        Cheap where there is none: nothing is taken apart. A nonce of ours proves as much wherever
        it lies, and however old it is.
        """
        at = datagram.find(_NONCE_HEADER, HEADER_SIZE)
        if at < 0:
            return None
        nonce = datagram[at + 4 : at + 4 + NONCE_SIZE]
        issued = self._authenticator.nonce_issued(nonce, client)
        return None if issued is None else (nonce, issued)

    def admit(self, request: Request) -> None:
        """Note who signed the request. Raises Refused, or UndecodableAttribute."""
        message = request.message
        if message.get(Attr.MESSAGE_INTEGRITY) is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "not signed")
        username, realm = message.get(Attr.USERNAME), message.get(Attr.REALM)
        if username is None or realm is None:
            raise Refused(ErrorCode.BAD_REQUEST, "signed without USERNAME or REALM")
        nonce = message.get(Attr.NONCE)
        if nonce is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "no nonce")
        # As a rule that is the nonce which has been looked at: its MAC need not be made again.
        proof = request.proof
        if proof is not None and proof[0] == nonce:
            issued: int | None = proof[1]
        else:
            issued = self._authenticator.nonce_issued(nonce, request.client)
        if issued is None or int(request.now) - issued > NONCE_LIFETIME:
            self.failures[AuthFailure.STALE_NONCE] += 1
            raise Refused(ErrorCode.STALE_NONCE, "nonce not from here, or too old")
        if request.key is None or realm != REALM:
            self._fail(request, AuthFailure.WRONG_CREDENTIALS, "unknown user or wrong password")
        if self._authenticator.has_expired(username, request.unix_now):
            self._fail(request, AuthFailure.EXPIRED_CREDENTIALS, "credentials have expired")
        require_known_attributes(request)
        request.user, request.nonce_issued = self._authenticator.user_of(username), issued

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
