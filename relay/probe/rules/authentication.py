"""Who asks, and whether that is so. RFC 8489 §9.2, §14.5, RFC 8656 §5."""

from base64 import b64decode

from relay.probe.client import Pair
from relay.probe.lab import (
    TRANSPORT,
    UNKNOWN_OPTIONAL,
    UNKNOWN_REQUIRED,
    Broken,
    Inapplicable,
    Lab,
    expect_attributes,
    expect_code,
    expect_signed,
    expect_success,
)
from relay.probe.link import Link
from relay.probe.rules.rule import Rules
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Kind, Method, PasswordAlgorithm
from relay.stun.integrity import long_term_key, userhash
from relay.stun.message import Message

rules = Rules()

LONGEST_NONCE = 763  # bytes, of fewer than 128 characters
_COOKIE = b"obMatJos2"  # a nonce of RFC 8489 begins so. §9.2
_USERHASH_BITS = 0x400000, 0x000002  # for those who count from either end, see docs/protocol.md


@rules("RFC 8656 §5", "an Allocate without credentials: 401")
def unauthenticated(lab: Lab) -> None:
    link = lab.link()
    expect_code(
        link.transact(lab.message(link, Method.ALLOCATE, TRANSPORT)), ErrorCode.UNAUTHORIZED
    )


@rules("RFC 8489 §9.2.4", "the 401 has REALM and NONCE")
def challenge(lab: Lab) -> None:
    expect_attributes(_challenge(lab, lab.link()), Attr.REALM, Attr.NONCE)


@rules("RFC 8489 §9.2.4", "the 401 has neither USERNAME nor MESSAGE-INTEGRITY")
def challenge_is_unsigned(lab: Lab) -> None:
    answer = _challenge(lab, lab.link())
    present = {attribute for attribute, _ in answer.attributes}
    too_much = present & {Attr.USERNAME, Attr.MESSAGE_INTEGRITY, Attr.MESSAGE_INTEGRITY_SHA256}
    if too_much:
        raise Broken(f"it has {' and '.join(sorted(each.name for each in too_much))}")


@rules("RFC 8489 §14.10", "a nonce has fewer than 128 characters")
def length_of_nonce(lab: Lab) -> None:
    nonce = _challenge(lab, lab.link()).get(Attr.NONCE) or b""
    if len(nonce) > LONGEST_NONCE or len(nonce.decode(errors="replace")) >= 128:
        raise Broken(f"{len(nonce)} bytes")


@rules("RFC 8489 §9.2", "a nonce says which features the server has (nonce cookie)", level="SHOULD")
def nonce_cookie(lab: Lab) -> None:
    nonce = _challenge(lab, lab.link()).get(Attr.NONCE) or b""
    if not nonce.startswith(_COOKIE):
        raise Broken("a nonce as in RFC 5389")


@rules("RFC 8489 §9.2.4", "a request with good credentials succeeds, and its answer is signed")
def signed_success(lab: Lab) -> None:
    expect_signed(lab.allocation().answer)


@rules("RFC 8489 §9.2.4", "an error is signed, too, if its request was signed rightly")
def signed_error(lab: Lab) -> None:
    allocation = lab.allocation()
    again = allocation.link.request(Method.ALLOCATE, TRANSPORT)
    expect_code(again, ErrorCode.ALLOCATION_MISMATCH)
    expect_signed(again)


@rules("RFC 8489 §9.2.4", "a wrong password: 401")
def wrong_password(lab: Lab) -> None:
    link = lab.user()
    key = long_term_key(lab.credential.username, link.client.realm or "", "wrong")
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, signed=True, key=key)
    expect_code(link.transact(request), ErrorCode.UNAUTHORIZED)


@rules("RFC 8489 §9.2.4", "a user whom nobody knows: 401")
def unknown_user(lab: Lab) -> None:
    link = lab.user()
    pairs = _exchanged(link, Attr.USERNAME, "nobody")
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, *pairs, key=b"a key of 16 byte")
    expect_code(link.transact(request), ErrorCode.UNAUTHORIZED)


@rules("RFC 8489 §9.2.4", "a signature without USERNAME: 400")
def without_username(lab: Lab) -> None:
    _expect_bad_request(lab, Attr.USERNAME.type)


@rules("RFC 8489 §9.2.4", "a signature without REALM: 400")
def without_realm(lab: Lab) -> None:
    _expect_bad_request(lab, Attr.REALM.type)


@rules("RFC 8489 §9.2.4", "a signature without NONCE: 400")
def without_nonce(lab: Lab) -> None:
    _expect_bad_request(lab, Attr.NONCE.type)


@rules("RFC 8489 §9.2.4", "a nonce that is not the server's: 438, with one that is, and REALM")
def stale_nonce(lab: Lab) -> None:
    link = lab.user()
    stale = (link.client.nonce or b"")[:-4] + b"0000"
    pairs = _exchanged(link, Attr.NONCE, stale)
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, *pairs, key=link.client.key)
    answer = expect_code(link.transact(request, link.client.key), ErrorCode.STALE_NONCE)
    expect_attributes(answer, Attr.REALM, Attr.NONCE)


@rules("RFC 8489 §14.5", "a request that was changed on its way: 401")
def tampered(lab: Lab) -> None:
    link = lab.user()
    lifetime = (Attr.LIFETIME, 600)
    request = bytearray(lab.message(link, Method.ALLOCATE, lifetime, TRANSPORT, signed=True))
    request[20 + 7] ^= 0x01  # the last byte of LIFETIME, the first attribute
    expect_code(link.transact(bytes(request)), ErrorCode.UNAUTHORIZED)


@rules("RFC 8489 §14.5", "what follows MESSAGE-INTEGRITY is ignored")
def after_the_signature(lab: Lab) -> None:
    link = lab.user()
    request = bytearray(lab.message(link, Method.ALLOCATE, TRANSPORT, signed=True))
    request += (UNKNOWN_REQUIRED.type).to_bytes(2) + b"\0\4more"
    request[2:4] = (len(request) - 20).to_bytes(2)
    expect_success(link.transact(bytes(request), link.client.key))


@rules("RFC 8489 §7", "FINGERPRINT may follow MESSAGE-INTEGRITY")
def fingerprint_after_the_signature(lab: Lab) -> None:
    link = lab.user()
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, signed=True, fingerprinted=True)
    expect_success(link.transact(request, link.client.key))


@rules("RFC 8489 §6.3.1", "who is not known is told 401, not 420")
def authentication_comes_first(lab: Lab) -> None:
    link = lab.link()
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, (UNKNOWN_REQUIRED, b""))
    expect_code(link.transact(request), ErrorCode.UNAUTHORIZED)


@rules("RFC 8489 §14", "a signed request with an attribute that must be understood: 420")
def unknown_attribute_of_a_user(lab: Lab) -> None:
    link = lab.user()
    answer = link.request(Method.ALLOCATE, TRANSPORT, (UNKNOWN_REQUIRED, b"\0\0\0\0"))
    expect_code(answer, ErrorCode.UNKNOWN_ATTRIBUTE)


@rules("RFC 8489 §14", "a signed request with an attribute that need not be understood succeeds")
def unknown_optional_attribute_of_a_user(lab: Lab) -> None:
    link = lab.user()
    expect_success(link.request(Method.ALLOCATE, TRANSPORT, (UNKNOWN_OPTIONAL, b"\0\0\0\0")))


@rules("RFC 8489 §9.2.4", "a client may sign by SHA-256 if that is offered")
def sha256(lab: Lab) -> None:
    link = lab.user()
    request, key = _by_sha256(lab, link)
    answer = link.transact(request, key)
    expect_success(answer)
    expect_signed(answer)


@rules("RFC 8489 §9.2.1", "password algorithms other than those that were offered: 400")
def bidding_down(lab: Lab) -> None:
    link = lab.user()
    offered = _algorithms(lab)
    md5 = ((PasswordAlgorithm.MD5.value, b""),)
    if offered == md5:
        raise Inapplicable("offers MD5 alone")
    pairs: list[Pair] = [
        (Attr.PASSWORD_ALGORITHM, md5),
        (Attr.PASSWORD_ALGORITHMS, md5),
        *link.client.signature(),
    ]
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, *pairs, key=link.client.key)
    expect_code(link.transact(request, link.client.key), ErrorCode.BAD_REQUEST)


@rules("RFC 8489 §9.2.4", "a user may go by USERHASH if that is offered")
def hidden_name(lab: Lab) -> None:
    link = lab.user()
    features = _features(link.client.nonce or b"")
    if not any(features & bit for bit in _USERHASH_BITS):
        raise Inapplicable("is not offered")
    offered = _algorithms(lab)
    realm = link.client.realm or ""
    hashed = userhash(lab.credential.username, realm)
    pairs: list[Pair] = [(Attr.USERHASH, hashed), *link.client.signature()[1:]]
    pairs += [(Attr.PASSWORD_ALGORITHM, offered[:1]), (Attr.PASSWORD_ALGORITHMS, offered)]
    algorithm = PasswordAlgorithm(offered[0][0])
    key = long_term_key(lab.credential.username, realm, lab.credential.password, algorithm)
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, *pairs, key=key)
    expect_success(link.transact(request, key))


def _challenge(lab: Lab, link: Link) -> Message:
    request = lab.message(link, Method.ALLOCATE, TRANSPORT)
    return expect_code(link.transact(request), ErrorCode.UNAUTHORIZED)


def _expect_bad_request(lab: Lab, lacks: int) -> None:
    link = lab.user()
    pairs = [pair for pair in link.client.signature() if pair[0].type != lacks]
    request = lab.message(link, Method.ALLOCATE, TRANSPORT, *pairs, key=link.client.key)
    expect_code(link.transact(request, link.client.key), ErrorCode.BAD_REQUEST)


def _exchanged(link: Link, attribute: object, value: object) -> list[Pair]:
    """Return what a link signs with, with one value exchanged."""
    return [
        (name, value if name is attribute else as_is) for name, as_is in link.client.signature()
    ]


def _features(nonce: bytes) -> int:
    """Return the security feature bits of a nonce, 24 of them. RFC 8489 §9.2."""
    if not nonce.startswith(_COOKIE):
        return 0
    try:
        return int.from_bytes(b64decode(nonce[len(_COOKIE) : len(_COOKIE) + 4], validate=True))
    except ValueError:
        raise Broken("the feature bits behind the nonce cookie are no base64") from None


def _algorithms(lab: Lab) -> tuple[tuple[int, bytes], ...]:
    """Return the password algorithms that are offered. Raises Inapplicable if there are none."""
    offered = _challenge(lab, lab.link()).get(Attr.PASSWORD_ALGORITHMS)
    if offered is None:
        raise Inapplicable("is not offered (no PASSWORD-ALGORITHMS)")
    return offered


def _by_sha256(lab: Lab, link: Link) -> tuple[bytes, bytes]:
    """Return an Allocate that is signed by SHA-256, and the key."""
    offered = _algorithms(lab)
    sha256 = (PasswordAlgorithm.SHA_256.value, b"")
    if sha256 not in offered:
        raise Inapplicable("is not offered")
    key = long_term_key(
        lab.credential.username,
        link.client.realm or "",
        lab.credential.password,
        PasswordAlgorithm.SHA_256,
    )
    pairs: list[Pair] = [
        TRANSPORT,
        (Attr.PASSWORD_ALGORITHMS, offered),
        (Attr.PASSWORD_ALGORITHM, (sha256,)),
        *link.client.signature(),
    ]
    message = Message(Kind.REQUEST, Method.ALLOCATE, link.client.new_transaction_id(), pairs)
    return message.encode(key, sha256=True), key
