"""A client's end of one 5-tuple: transactions, credentials, and data. RFC 8489 §6.2, RFC 8656.

It is pure: what arrives and the time are handed in. After each call take what is to be sent from
:attr:`Client.outgoing`, and what has happened from :attr:`Client.events`; call
:meth:`Client.handle_timeout` at :meth:`Client.next_timeout`.

It judges nothing. An answer without a signature, say, is handed out like any other, and says so:
what a server does wrong is what its user wants to see.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from relay.stun.address import Address
from relay.stun.attributes import Attr, Attribute, DecodeError
from relay.stun.const import HEADER_SIZE, TRANSACTION_ID_SIZE, ErrorCode, Kind, Method
from relay.stun.integrity import long_term_key, verify, verify_sha256
from relay.stun.message import Message, Received, decode
from relay.turn import channeldata
from relay.turn.framing import FIRST_CHANNEL, PADDING, message_size

RTO: Final = 0.5  # seconds until the first retransmission, RFC 8489 §6.2.1; each doubles it
TIME_LIMIT: Final = 7.5  # seconds: five transmissions, where the RFC has seven and 39.5 s
MOST_CHALLENGES: Final = 4  # 401 and 438 with a new nonce, until a request is given up

Pair = tuple[Attribute[Any], Any]


@dataclass(frozen=True, slots=True)
class Credential:
    """What a user signs with."""

    username: str
    password: str


class Signature(Enum):
    """What an answer says by MESSAGE-INTEGRITY, or MESSAGE-INTEGRITY-SHA256."""

    NONE = "not signed"
    GOOD = "signed"
    WRONG = "signed wrongly"


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a request."""

    request: bytes  # what Client.request, or Client.transact, has returned
    received: Received
    signature: Signature
    transmissions: int  # 1, and one for each time that it was sent again
    round_trip: float  # seconds since the first of them
    challenges: int  # 401 and 438 that came before this answer and were heeded

    @property
    def message(self) -> Message:
        """The answer itself."""
        return self.received.message

    @property
    def code(self) -> int | None:
        """The error code; None of a success, 0 of an error that has none."""
        if self.message.kind is Kind.SUCCESS:
            return None
        code, _ = self.message.get(Attr.ERROR_CODE) or (0, "")
        return code


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Nothing has answered a request in time."""

    request: bytes
    transmissions: int


@dataclass(frozen=True, slots=True)
class Data:
    """What a peer has sent, in an indication or on a channel."""

    payload: bytes
    peer: Address | None  # of an indication
    channel: int | None  # of ChannelData


@dataclass(frozen=True, slots=True)
class Stray:
    """A message that nobody waits for, or bytes that are none."""

    data: bytes
    why: str


Event = Answered | NoAnswer | Data | Stray


@dataclass(slots=True)
class _Transaction:
    request: bytes  # by which the caller knows it
    encoded: bytes
    key: bytes | None
    began: float  # seconds, of the clock that is handed in
    send_again: float
    gives_up: float
    transmissions: int = 1
    # Of a request whose credentials are renewed as the server asks for it.
    method: Method | None = None
    attributes: Sequence[Pair] = ()
    challenges: int = 0


class Client:
    """One client, as one 5-tuple knows it."""

    def __init__(
        self,
        credential: Credential | None,
        random: Callable[[int], bytes],
        *,
        is_stream: bool = False,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        """Take what it signs with, and ``random(size)``, of which transaction ids are made.

        In a stream (TCP, TLS) nothing is sent again, and messages are padded.
        """
        self.credential = credential
        self.realm: str | None = None
        self.nonce: bytes | None = None
        self.outgoing: deque[bytes] = deque()
        self.events: deque[Event] = deque()
        self._random = random
        self._is_stream = is_stream
        self._time_limit = time_limit
        self._transactions: dict[bytes, _Transaction] = {}  # by transaction id
        self._stream = bytearray()  # received, and not yet a whole message

    @property
    def key(self) -> bytes | None:
        """The long-term key, once the server has said for which realm. RFC 8489 §9.2.2."""
        if self.credential is None or self.realm is None:
            return None
        return long_term_key(self.credential.username, self.realm, self.credential.password)

    def signature(self) -> list[Pair]:
        """Return the attributes of a request that is signed, without MESSAGE-INTEGRITY."""
        if self.credential is None or self.realm is None or self.nonce is None:
            return []
        return [
            (Attr.USERNAME, self.credential.username),
            (Attr.REALM, self.realm),
            (Attr.NONCE, self.nonce),
        ]

    def request(self, now: float, method: Method, *attributes: Pair) -> bytes:
        """Send a request, signed as far as can be, again with each new nonce; return its name."""
        return self._sign_and_send(now, method, attributes)

    def transact(self, now: float, encoded: bytes, key: bytes | None = None) -> bytes:
        """Send a request as it is, and hand out whatever answers it; return its name.

        By *key* the answer is checked.
        """
        transaction_id = encoded[HEADER_SIZE - TRANSACTION_ID_SIZE : HEADER_SIZE]
        self._begin(now, transaction_id, encoded, key)
        return transaction_id

    def new_transaction_id(self) -> bytes:
        """Return one that nobody can guess. RFC 8489 §5."""
        return self._random(TRANSACTION_ID_SIZE)

    def indicate(self, peer: Address, payload: bytes) -> None:
        """Send to a peer by a Send indication. RFC 8656 §11.1."""
        values: list[Pair] = [(Attr.XOR_PEER_ADDRESS, peer), (Attr.DATA, payload)]
        self.send(Message(Kind.INDICATION, Method.SEND, self.new_transaction_id(), values).encode())

    def send_on(self, channel: int, payload: bytes) -> None:
        """Send to a peer by ChannelData. RFC 8656 §12.5."""
        self.send(channeldata.HEADER.pack(channel, len(payload)) + payload)

    def send(self, message: bytes) -> None:
        """Send bytes as they are; in a stream they are padded."""
        self.outgoing.append(message + PADDING[len(message) % 4] if self._is_stream else message)

    def handle_datagram(self, datagram: bytes, now: float) -> None:
        """Take what has come in one datagram."""
        if len(datagram) >= channeldata.HEADER_SIZE and datagram[0] & 0xC0 == FIRST_CHANNEL >> 8:
            self._handle_channel_data(datagram)
        else:
            self._handle_stun(datagram, now)

    def handle_stream(self, data: bytes, now: float) -> None:
        """Take what has come next of a stream. Raises NotFramed if it cannot be understood."""
        self._stream += data
        at, end = 0, len(self._stream)
        while (size := message_size(self._stream, at, end)) and size <= end - at:
            message = bytes(self._stream[at : at + size])
            at += size
            self.handle_datagram(message, now)
        del self._stream[:at]

    def next_timeout(self) -> float | None:
        """Return when :meth:`handle_timeout` is due; None: nothing is waited for."""
        return min(
            (min(each.send_again, each.gives_up) for each in self._transactions.values()),
            default=None,
        )

    def handle_timeout(self, now: float) -> None:
        """Send again what is not answered, or give it up."""
        for transaction_id, transaction in list(self._transactions.items()):
            if now >= transaction.gives_up:
                del self._transactions[transaction_id]
                self.events.append(NoAnswer(transaction.request, transaction.transmissions))
            elif now >= transaction.send_again:
                self.outgoing.append(transaction.encoded)
                transaction.send_again = now + RTO * 2**transaction.transmissions
                transaction.transmissions += 1

    def heed(self, challenge: Message) -> bool:
        """Sign by realm and nonce of a 401 or 438 from here on; return whether it has both.

        A 438 may leave the realm out, if that is known.
        """
        nonce, realm = challenge.get(Attr.NONCE), challenge.get(Attr.REALM) or self.realm
        if self.credential is None or nonce is None or realm is None:
            return False
        self.nonce, self.realm = nonce, realm
        return True

    def forget(self, request: bytes) -> None:
        """Wait for the answer to a request no more."""
        for transaction_id, transaction in list(self._transactions.items()):
            if transaction.request == request:
                del self._transactions[transaction_id]

    def _sign_and_send(
        self,
        now: float,
        method: Method,
        attributes: Sequence[Pair],
        *,
        request: bytes | None = None,
        challenges: int = 0,
    ) -> bytes:
        transaction_id = self.new_transaction_id()
        signature = self.signature()
        key = self.key if signature else None
        message = Message(Kind.REQUEST, method, transaction_id, [*attributes, *signature])
        transaction = self._begin(now, transaction_id, message.encode(key), key)
        transaction.request = request or transaction_id
        transaction.method = method
        transaction.attributes = attributes
        transaction.challenges = challenges
        return transaction.request

    def _begin(
        self, now: float, transaction_id: bytes, encoded: bytes, key: bytes | None
    ) -> _Transaction:
        gives_up = now + self._time_limit
        transaction = _Transaction(
            request=transaction_id,
            encoded=encoded,
            key=key,
            began=now,
            send_again=gives_up if self._is_stream else now + RTO,
            gives_up=gives_up,
        )
        self._transactions[transaction_id] = transaction
        self.outgoing.append(encoded)
        return transaction

    def _handle_channel_data(self, datagram: bytes) -> None:
        frame = channeldata.parse(datagram, len(datagram))
        if frame is None:
            self.events.append(Stray(datagram, "ChannelData that is longer than its datagram"))
            return
        number, length = frame
        payload = datagram[channeldata.HEADER_SIZE : channeldata.HEADER_SIZE + length]
        self.events.append(Data(payload, None, number))

    def _handle_stun(self, datagram: bytes, now: float) -> None:
        try:
            received = decode(datagram)
        except DecodeError as error:
            self.events.append(Stray(datagram, str(error)))
            return
        message = received.message
        if message.kind is Kind.INDICATION and message.method == Method.DATA:
            self._handle_data(datagram, message)
        elif message.kind in {Kind.SUCCESS, Kind.ERROR}:
            self._handle_answer(datagram, received, now)
        else:
            self.events.append(Stray(datagram, "neither an answer nor a Data indication"))

    def _handle_data(self, datagram: bytes, message: Message) -> None:
        peer, payload = message.get(Attr.XOR_PEER_ADDRESS), message.get(Attr.DATA)
        if peer is not None and payload is not None:
            self.events.append(Data(payload, peer, None))
        elif message.get(Attr.ICMP) is None:  # RFC 8656 §11.6
            self.events.append(Stray(datagram, "a Data indication without peer or data"))

    def _handle_answer(self, datagram: bytes, received: Received, now: float) -> None:
        message = received.message
        transaction = self._transactions.pop(message.transaction_id, None)
        if transaction is None:
            self.events.append(Stray(datagram, "an answer that nobody waits for"))
            return
        answer = Answered(
            transaction.request,
            received,
            _signature(received, transaction.key),
            transaction.transmissions,
            now - transaction.began,
            transaction.challenges,
        )
        method = transaction.method
        if method is None or not self._heed(answer, was_signed=transaction.key is not None):
            self.events.append(answer)
            return
        self._sign_and_send(
            now,
            method,
            transaction.attributes,
            request=transaction.request,
            challenges=transaction.challenges + 1,
        )

    def _heed(self, answer: Answered, *, was_signed: bool) -> bool:
        """Tell if a request is to be sent again, for its answer is a challenge. RFC 8489 §9.2.5."""
        is_first = answer.code == ErrorCode.UNAUTHORIZED and not was_signed
        if not is_first and answer.code != ErrorCode.STALE_NONCE:
            return False
        return self.heed(answer.message) and answer.challenges < MOST_CHALLENGES


def _signature(received: Received, key: bytes | None) -> Signature:
    """Tell who has signed an answer. Where there is no key, whatever signs it is wrong."""
    raw = received.raw
    if received.integrity_offset is not None:
        is_good = key is not None and verify(raw, received.integrity_offset, key)
    elif received.sha256_offset is not None:
        is_good = key is not None and verify_sha256(raw, received.sha256_offset, key)
    else:
        return Signature.NONE
    return Signature.GOOD if is_good else Signature.WRONG
