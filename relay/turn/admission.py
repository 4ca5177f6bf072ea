"""Who is let in: the steps from a signed request to a user. RFC 8489 §9.2.4."""

import logging
from collections import Counter
from typing import Final, NoReturn

from relay.stun import integrity
from relay.stun.address import format_endpoint
from relay.stun.attributes import Attr, UndecodableAttribute
from relay.stun.const import HEADER_SIZE, ErrorCode, Method, PasswordAlgorithm
from relay.stun.raw import TLV, RawMessage
from relay.turn.auth import NONCE_LIFETIME, NONCE_SIZES, Authenticator, AuthFailure
from relay.turn.commands import ClientAddress
from relay.turn.request import Proof, Refused, Request, require_known_attributes

logger = logging.getLogger("relay.turn")

_NONCE_HEADERS: Final = tuple((TLV.pack(Attr.NONCE.type, size), size) for size in NONCE_SIZES)
_ALGORITHMS: Final = {algorithm.value: algorithm for algorithm in PasswordAlgorithm}


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
        if not message.is_signed:
            return None
        try:
            username, algorithm = self._username(message), _algorithm(message)
        except UndecodableAttribute:
            return None
        if username is None or algorithm is None:
            return None
        for key in self._authenticator.keys(username, algorithm):
            if _is_signed_with(key, message):
                self._authenticator.remember(username, algorithm, key)
                return key
        return None

    def proof_of_address(self, datagram: bytes, client: ClientAddress) -> Proof | None:
        """Return a nonce in a request that was sent to the address it says to be from, if any.

        Cheap where there is none: nothing is taken apart. A nonce of ours proves as much wherever
        it lies, and however old it is.
        """
        for header, size in _NONCE_HEADERS:
            at = datagram.find(header, HEADER_SIZE)
            if at >= 0:
                nonce = datagram[at + 4 : at + 4 + size]
                issued = self._authenticator.nonce_issued(nonce, client)
                return None if issued is None else (nonce, issued)
        return None

    def admit(self, request: Request) -> None:
        """Note who signed the request. Raises Refused, or UndecodableAttribute."""
        message, users = request.message, self._authenticator.users
        sha1 = message.get(Attr.MESSAGE_INTEGRITY)
        if message.get(Attr.MESSAGE_INTEGRITY_SHA256) is None and sha1 is None:
            raise Refused(ErrorCode.UNAUTHORIZED, "not signed")
        name, realm = message.get(Attr.USERNAME), message.get(Attr.REALM)
        if (name is None and message.get(Attr.USERHASH) is None) or realm is None:
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
        self._require_offered_algorithm(message, nonce)
        username = self._username(message)
        if request.key is None or username is None or realm != users.realm:
            self._fail(request, AuthFailure.WRONG_CREDENTIALS, "unknown user or wrong password")
        if users.has_expired(username, request.unix_now):
            self._fail(request, AuthFailure.EXPIRED_CREDENTIALS, "credentials have expired")
        require_known_attributes(request)
        request.user, request.nonce_issued = users.user_of(username), issued

    def _username(self, message: RawMessage) -> str | None:
        """Return whose a request is; None if that is not said, or by a hash that nobody has."""
        username = message.get(Attr.USERNAME)
        if username is not None:
            return username
        hashed = message.get(Attr.USERHASH)
        return None if hashed is None else self._authenticator.users.name_of(hashed)

    def _require_offered_algorithm(self, message: RawMessage, nonce: bytes) -> None:
        """Refuse (400) what shows that somebody has changed what was offered. RFC 8489 §9.2.4.

        A client that speaks RFC 5389 names no algorithm, which means MD5. One that has an
        allocation need not repeat the offer (§9.2.3.2): then it has to have chosen the best of it.
        """
        offered = message.get(Attr.PASSWORD_ALGORITHMS)
        chosen = message.get(Attr.PASSWORD_ALGORITHM)
        if offered is None and chosen is None:
            return
        ours = self._authenticator.offered if self._authenticator.has_cookie(nonce) else ()
        choices = ours
        if offered is None and message.method != Method.ALLOCATE:
            offered, choices = ours, ours[:1]
        if offered != ours or chosen is None or chosen[0] not in choices:
            raise Refused(ErrorCode.BAD_REQUEST, "not the password algorithms that were offered")

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


def _algorithm(message: RawMessage) -> PasswordAlgorithm | None:
    """Return how a request says that its key is made; None if nobody can make it so."""
    chosen = message.get(Attr.PASSWORD_ALGORITHM)
    if chosen is None:
        return PasswordAlgorithm.MD5
    number, parameters = chosen[0]
    return None if parameters else _ALGORITHMS.get(number)


def _is_signed_with(key: bytes, message: RawMessage) -> bool:
    """Verify the better one of the signatures that there are. RFC 8489 §9.2.4."""
    if message.sha256_offset is not None:
        return integrity.verify_sha256(message.raw, message.sha256_offset, key)
    assert message.integrity_offset is not None
    return integrity.verify(message.raw, message.integrity_offset, key)
