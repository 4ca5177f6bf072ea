"""Who may ask, and which answers are signed. RFC 8489 §9.2, RFC 8656 §5."""

import struct
from typing import Any

import pytest

from relay.stun.attributes import Attr, Attribute, Coding
from relay.stun.const import UDP_PROTOCOL, Kind, Method
from relay.stun.integrity import integrity, long_term_key
from relay.stun.message import Message
from relay.turn.users import DEFAULT_REALM, mint
from tests.scenario import SECRET, UNIX_START, Client, Scenario, Value, request

AUTHENTICATED = [Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND]
methods = pytest.mark.parametrize("method", AUTHENTICATED, ids=lambda m: m.name)

UNKNOWN: Attribute[bytes] = Attribute(
    0x7ABC, "unknown", Coding(lambda value, _: value, lambda value, _: value)
)


@methods
def test_without_integrity_it_is_401_with_realm_and_nonce(relay: Scenario, method: Method) -> None:
    answer = relay.client("192.0.2.10:5000").hears(request(method).encode())

    assert answer.code == 401
    assert answer.get(Attr.REALM) == "firezone"
    assert answer.get(Attr.NONCE)
    assert not answer.signed


def test_the_first_401_is_a_poor_amplifier(relay: Scenario) -> None:
    bare = request(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).encode()
    answer = relay.client("192.0.2.10:5000").hears(bare)

    assert len(bare) == 28
    assert len(answer.datagram) == 84
    assert answer.get(Attr.ERROR_CODE) == (401, "")


@methods
@pytest.mark.parametrize("missing", [Attr.USERNAME, Attr.REALM], ids=repr)
def test_integrity_without_username_or_realm_is_400(
    relay: Scenario, method: Method, missing: Attribute[str]
) -> None:
    alice = relay.client("192.0.2.10:5000")
    answer = alice.hears(signed(alice, method, without=missing))

    assert answer.code == 400
    # Without a name there is no key to sign with; with one, the answer is signed.
    assert answer.signed == (missing is Attr.REALM)


@methods
def test_firezones_first_request_has_no_nonce_and_gets_a_signed_401(
    relay: Scenario, method: Method
) -> None:
    alice = relay.client("192.0.2.10:5000")
    answer = alice.hears(signed(alice, method, without=Attr.NONCE))

    assert answer.code == 401
    assert answer.signed
    assert answer.get(Attr.ERROR_CODE) == (401, "Unauthorized")
    assert answer.get(Attr.REALM) == "firezone"
    assert answer.get(Attr.NONCE)


@methods
def test_the_nonce_of_another_client_is_stale(relay: Scenario, method: Method) -> None:
    alice, mallory = relay.client("192.0.2.10:5000"), relay.client("192.0.2.66:5000")
    answer = alice.hears(signed(alice, method, (Attr.NONCE, mallory.nonce)))

    assert answer.code == 438
    assert answer.signed
    fresh = answer.get(Attr.NONCE)
    assert fresh is not None
    assert alice.hears(signed(alice, method, (Attr.NONCE, fresh))).code not in {401, 438}


def test_the_nonce_of_another_port_of_the_same_host_is_stale(relay: Scenario) -> None:
    alice, neighbour = relay.client("192.0.2.10:5000"), relay.client("192.0.2.10:5001")

    assert alice.hears(signed(alice, Method.REFRESH, (Attr.NONCE, neighbour.nonce))).code == 438


@pytest.mark.parametrize(
    "nonce",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"somebody else's nonce", id="foreign"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b"0" * 32, id="right size"),
        pytest.param(b"x" * 700, id="long"),
    ],
)
def test_a_nonce_that_is_not_ours_is_stale(relay: Scenario, nonce: bytes) -> None:
    alice = relay.client("192.0.2.10:5000")
    answer = alice.hears(signed(alice, Method.ALLOCATE, (Attr.NONCE, nonce)))

    assert answer.code == 438
    assert answer.signed


def test_a_nonce_is_good_for_an_hour(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    asked = signed(alice, Method.REFRESH)

    relay.passes(seconds=3600)
    assert alice.hears(asked).code == 437

    relay.passes(seconds=1)
    answer = alice.hears(asked)
    assert answer.code == 438
    assert answer.signed
    assert alice.refreshes().code == 437  # with the fresh nonce


@methods
def test_a_stale_nonce_is_told_unsigned_to_who_does_not_know_the_password(
    relay: Scenario, method: Method
) -> None:
    mallory = relay.client("192.0.2.66:5000")
    mallory.password = "a guess"
    answer = mallory.hears(signed(mallory, method, (Attr.NONCE, b"stale")))

    assert answer.code == 438
    assert answer.received.integrity_offset is None


@methods
def test_a_wrong_password_gets_an_unsigned_401(relay: Scenario, method: Method) -> None:
    mallory = relay.client("192.0.2.66:5000")
    assert mallory.nonce
    mallory.password = "a guess"
    answer = mallory.hears(signed(mallory, method))

    assert answer.code == 401
    assert answer.received.integrity_offset is None
    assert answer.get(Attr.ERROR_CODE) == (401, "")
    assert answer.get(Attr.NONCE)


@pytest.mark.parametrize(
    "username",
    [
        pytest.param("", id="empty"),
        pytest.param("alice", id="no colon"),
        pytest.param(":salt", id="no expiry"),
        pytest.param("soon:salt", id="not a number"),
        pytest.param("-1:salt", id="negative"),
        pytest.param("1e9:salt", id="float"),
        pytest.param("٣:salt", id="digits of another script"),
        pytest.param("1" * 21 + ":salt", id="21 digits"),
    ],
)
def test_a_malformed_username_is_as_unknown_as_any(relay: Scenario, username: str) -> None:
    mallory = relay.client("192.0.2.66:5000")
    assert mallory.nonce
    mallory.username = username
    answer = mallory.hears(signed(mallory, Method.ALLOCATE))

    assert answer.code == 401
    assert answer.received.integrity_offset is None


def test_credentials_are_good_up_to_their_last_second(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    alice.username, alice.password = mint(int(UNIX_START) + 60, "salt", SECRET)
    asked = signed(alice, Method.REFRESH)

    relay.passes(seconds=60)
    assert alice.hears(asked).code == 437

    relay.passes(seconds=0.5)
    answer = alice.hears(asked)
    assert answer.code == 401
    assert answer.signed  # they are right, if too old


@pytest.mark.parametrize("expiry", [2**63, 2**64 - 1, 10**20 - 1])
def test_a_huge_expiry_is_just_far_away(relay: Scenario, expiry: int) -> None:
    alice = relay.client("192.0.2.10:5000")
    alice.username, alice.password = mint(expiry, "salt", SECRET)

    alice.allocates()


def test_a_tampered_request_is_unauthorized(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")
    datagram = bytearray(alice.signed(Method.REFRESH, (Attr.LIFETIME, 600)))
    datagram[27] ^= 1  # the last byte of LIFETIME

    assert alice.hears(bytes(datagram)).code == 401


def test_integrity_covers_the_bytes_as_received(relay: Scenario) -> None:
    """What pads an attribute may be anything, and is signed as it is. RFC 8489 §14."""
    alice = relay.client("192.0.2.10:5000")
    padded: Attribute[bytes] = Attribute(
        0x8ABC, "optional", Coding(lambda value, _: value, lambda value, _: value)
    )
    message = request(
        Method.REFRESH,
        (padded, b"one"),
        (Attr.USERNAME, alice.username),
        (Attr.REALM, DEFAULT_REALM),
        (Attr.NONCE, alice.nonce),
    )
    unsigned = bytearray(message.encode())
    assert unsigned[27] == 0
    unsigned[27] = 0x2A  # the byte that pads "one"

    assert alice.hears(sign(bytes(unsigned), alice.key)).code == 437


@methods
def test_unknown_attributes_are_named_after_authentication(relay: Scenario, method: Method) -> None:
    alice = relay.client("192.0.2.10:5000")

    assert alice.hears(request(method, (UNKNOWN, b"")).encode()).code == 401
    answer = alice.asks(method, (UNKNOWN, b""))
    assert answer.code == 420
    assert answer.get(Attr.UNKNOWN_ATTRIBUTES) == (0x7ABC,)
    assert answer.signed


def test_what_follows_message_integrity_is_ignored(relay: Scenario) -> None:
    """RFC 8489 §14.5: attributes after it are not protected by it."""
    alice = relay.client("192.0.2.10:5000")
    datagram = alice.signed(Method.REFRESH, (Attr.LIFETIME, 100))
    for attribute, value in (((UNKNOWN, b"x")), (Attr.LIFETIME, 0), (Attr.USERNAME, "nobody")):
        appended = Message(Kind.REQUEST, Method.REFRESH, bytes(12), [(attribute, value)]).encode()
        longer = datagram + appended[20:]
        longer = longer[:2] + struct.pack("!H", len(longer) - 20) + longer[4:]
        assert alice.hears(longer).code == 437


def test_errors_are_signed_for_who_proves_to_know_the_key(relay: Scenario) -> None:
    alice = relay.client("192.0.2.10:5000")

    bad = alice.hears(alice.signed(Method.CHANNEL_BIND, (Attr.CHANNEL_NUMBER, 1)))
    assert (bad.code, bad.signed) == (400, True)
    unknown_method = alice.hears(alice.signed(0x00A))
    assert (unknown_method.code, unknown_method.signed) == (400, True)
    mismatch = alice.refreshes()
    assert (mismatch.code, mismatch.signed) == (437, True)
    assert mismatch.get(Attr.ERROR_CODE) == (437, "Allocation Mismatch")


@methods
def test_the_order_in_which_a_request_is_checked(relay: Scenario, method: Method) -> None:
    """Each fault hides those behind it: 401, 400, 401, 438, 401, 420, then the method's own."""
    alice = relay.client("192.0.2.10:5000")
    wrong: list[Value] = [(UNKNOWN, b"")]
    nobody = (Attr.USERNAME, "nobody")
    realm = (Attr.REALM, DEFAULT_REALM)
    stale = (Attr.NONCE, b"stale")
    fresh = (Attr.NONCE, alice.nonce)

    def code(*attributes: Value, key: bytes | None) -> int | None:
        return alice.hears(request(method, *wrong, *attributes).encode(key)).code

    assert code(nobody, realm, stale, key=None) == 401
    assert code(nobody, stale, key=b"?") == 400
    assert code(nobody, realm, key=b"?") == 401
    assert code(nobody, realm, stale, key=b"?") == 438
    assert code(nobody, realm, fresh, key=b"?") == 401
    assert code((Attr.USERNAME, alice.username), realm, fresh, key=alice.key) == 420


def signed(
    alice: Client, method: Method, *changed: Value, without: Attribute[Any] | None = None
) -> bytes:
    """An authenticated request of *alice* in which one thing is changed or missing."""
    values: dict[Attribute[Any], Any] = {
        Attr.USERNAME: alice.username,
        Attr.REALM: DEFAULT_REALM,
        **dict(changed),
    }
    if Attr.NONCE not in values and without is not Attr.NONCE:
        values[Attr.NONCE] = alice.nonce
    kept = [(attribute, value) for attribute, value in values.items() if attribute is not without]
    key = long_term_key(alice.username, DEFAULT_REALM, alice.password)
    return request(method, *kept).encode(key)


def sign(datagram: bytes, key: bytes) -> bytes:
    """Append MESSAGE-INTEGRITY to a whole message, whatever its bytes are."""
    signature = struct.pack("!HH", Attr.MESSAGE_INTEGRITY.type, 20) + integrity(datagram, key)
    return datagram[:2] + struct.pack("!H", len(datagram) + 4) + datagram[4:] + signature
