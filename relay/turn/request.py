"""A request on its way through the handlers, and the answer to it."""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from relay.stun.address import Address
from relay.stun.attributes import Attr, Attribute
from relay.stun.const import ErrorCode, Kind, Method
from relay.stun.message import Message
from relay.stun.raw import RawMessage
from relay.turn.auth import Authenticator
from relay.turn.commands import ClientAddress, Command, SendMessage

logger = logging.getLogger("relay.turn")

# How many times as long as a request its answer may be, if it proves nothing: it may be forged.
MAX_AMPLIFICATION: Final = 3
MAX_UNKNOWN_NAMED: Final = 32  # attributes in a 420: more could not be a mistake

_METHOD_NAMES: Final[dict[int, str]] = {method: method.name.lower() for method in Method}

AttributeValue = tuple[Attribute[Any], Any]
Attributes = list[AttributeValue]
"""What an answer is to hold, in order."""


Proof = tuple[bytes, int]
"""A nonce that was sent to the address of a request, and when, in monotonic seconds."""


@dataclass(slots=True)
class Request:
    """A request: what was asked, by whom, and when."""

    message: RawMessage
    client: ClientAddress
    key: bytes | None  # of the user it claims to be from, if it is signed with that
    now: float  # monotonic seconds
    unix_now: float
    proof: Proof | None = None  # that its address is not forged
    user: str = ""  # once it is admitted: who that is, see Authenticator.user_of
    nonce_issued: int = 0  # and when its nonce was issued, in monotonic seconds

    @property
    def mapped_address(self) -> Address:
        """The client's address as seen from here. RFC 8489 §14.2."""
        host, port = self.client[0][:2]
        return host, port


class Refused(Exception):
    """A request cannot be granted: *code* is for the client, *reason* for the log.

    *attributes* are what the answer is to hold besides.
    """

    def __init__(self, code: ErrorCode, reason: str, *attributes: AttributeValue) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.attributes = attributes


def require_known_attributes(request: Request) -> None:
    """RFC 8489 §6.3.1: 420 for what must be understood and is not."""
    unknown = request.message.unknown
    if unknown:
        named = (Attr.UNKNOWN_ATTRIBUTES, unknown[:MAX_UNKNOWN_NAMED])
        raise Refused(ErrorCode.UNKNOWN_ATTRIBUTE, f"{len(unknown)} unknown attributes", named)


class Answers:
    """Puts answers together, counts them, and leaves them as commands."""

    def __init__(
        self, authenticator: Authenticator, commands: deque[Command], software: str | None
    ) -> None:
        """Take who makes nonces, and what SOFTWARE is to say, if anything."""
        self._authenticator = authenticator
        self._commands = commands
        self.software = software
        self.sent: Counter[tuple[str, str]] = Counter()  # by method, and code or "success"

    def success(self, request: Request, attributes: Attributes, *, key: bytes | None) -> None:
        """Answer with a success response, signed if *key* is given."""
        self._count(request, "success")
        is_sent = self._send(request, Kind.SUCCESS, attributes, key)
        assert is_sent, "who proves nothing gets an address, and that is short enough"

    def refuse(self, request: Request, refused: Refused) -> None:
        """Answer with an error response: signed and with its reason, or as short as can be.

        Short, because anyone can ask for an unsigned one in the name of anyone else.
        """
        client, code = request.client, refused.code
        logger.debug("%d to %s: %s", code, client[0], refused.reason)
        self._count(request, str(code.value))
        reason = "" if request.key is None else code.reason
        attributes: Attributes = [(Attr.ERROR_CODE, (code, reason)), *refused.attributes]
        if code in {ErrorCode.UNAUTHORIZED, ErrorCode.STALE_NONCE}:
            for challenge in self._challenges(request):
                if self._send(request, Kind.ERROR, attributes + challenge, request.key):
                    return
        elif self._send(request, Kind.ERROR, attributes, request.key):
            return
        self._send(request, Kind.ERROR, attributes[:1], request.key)

    def _challenges(self, request: Request) -> Iterator[Attributes]:
        """Return what a client is to sign its next request for, and a shorter form of the same.

        The shorter one is that of RFC 5389, which knows no password algorithms: so nonce cookie and
        PASSWORD-ALGORITHMS are there together, or neither.
        """
        authenticator, client, now = self._authenticator, request.client, request.now
        realm: Attributes = [(Attr.REALM, authenticator.users.realm)]
        full = [*realm, (Attr.NONCE, authenticator.nonce(client, now))]
        if authenticator.offered:
            full.append((Attr.PASSWORD_ALGORITHMS, authenticator.offered))
        yield full
        yield [*realm, (Attr.NONCE, authenticator.nonce(client, now, with_cookie=False))]

    def _count(self, request: Request, code: str) -> None:
        self.sent[_METHOD_NAMES.get(request.message.method, "unknown"), code] += 1

    def _send(
        self, request: Request, kind: Kind, attributes: Attributes, key: bytes | None
    ) -> bool:
        """Send an answer, unless it may be forged for whom it is, and is too long for that."""
        asked, most = request.message, MAX_AMPLIFICATION * len(request.message.raw)
        message = Message(kind, asked.method, asked.transaction_id, attributes)
        is_sha256 = asked.sha256_offset is not None
        for software in ([(Attr.SOFTWARE, self.software)], []) if self.software else ([],):
            message.attributes = attributes + software
            datagram = message.encode(key, sha256=is_sha256, fingerprinted=asked.fingerprinted)
            if key is not None or len(datagram) <= most:
                self._commands.append(SendMessage(request.client, datagram))
                return True
        return False
