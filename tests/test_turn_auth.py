"""Credentials from a shared secret, and nonces without a table. RFC 8489 §9.2."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stun.attributes import Attr, DecodeError
from relay.stun.const import UDP_PROTOCOL, Method
from relay.turn.auth import NONCE_SIZE, REALM, REMEMBERED_KEYS, Authenticator, password
from relay.turn.commands import ClientAddress
from tests.scenario import Scenario

SECRET = "4c98bf59c99b3e467ecd7cf9d6b3e5279645fca59be67bc5bb4af3cf653761ab"

# What Firezone's portal hands out for these secrets.
PASSWORDS = [
    pytest.param(
        "1892160000",
        "n23JJ2wKKtt30oXi",
        SECRET,
        "00hqldgk5xLeKKOB+xls9mHMVtgqzie9DulfgQwMv68",
        id="secret as the relay draws it",
    ),
    pytest.param(
        "1685984278",
        "uvdgKvS9GXYZ_vmv",
        "1cab293a-4032-46f4-862a-40e5d174b0d2",
        "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg",
        id="secret of another form",
    ),
]


@pytest.mark.parametrize(("expiry", "salt", "secret", "expected"), PASSWORDS)
def test_password(expiry: str, salt: str, secret: str, expected: str) -> None:
    assert password(expiry, salt, secret) == expected


@given(
    salt=st.text(max_size=60),
    suffix=st.binary(max_size=60),
    secret_size=st.integers(1, 200),
)
def test_no_username_extends_another_ones_hash(salt: str, suffix: bytes, secret_size: int) -> None:
    """SHA-256 can be continued from its result, without the secret in front of the salt.

    What is hashed then goes on after the salt with the padding of the first hash: 0x80, zeros, and
    64 bits of length. So whoever has a password could make one for a username with that in it, and
    the salt is the client's choice. No text in UTF-8 goes on with 0x80 after a whole character.
    """
    username = f"1892160000:{salt}".encode()
    hashed = len(username) + 1 + secret_size
    padding = b"\x80" + bytes(-(hashed + 9) % 64) + (8 * hashed).to_bytes(8, "big")
    assert (hashed + len(padding)) % 64 == 0

    with pytest.raises(DecodeError):
        Attr.USERNAME.coding.decode(username + padding + suffix, bytes(12))


@pytest.mark.parametrize(("expiry", "salt", "secret", "expected"), PASSWORDS)
def test_key_is_that_of_the_password(expiry: str, salt: str, secret: str, expected: str) -> None:
    """RFC 8489 §9.2.2: MD5(username ":" realm ":" password)."""
    key = Authenticator(secret, b"nonce key").key(f"{expiry}:{salt}")

    assert REALM == "firezone"
    assert key == hashlib.md5(f"{expiry}:{salt}:firezone:{expected}".encode()).digest()


@pytest.mark.parametrize(
    "username",
    [
        pytest.param("", id="empty"),
        pytest.param("1892160000", id="no salt"),
        pytest.param(":salt", id="no expiry"),
        pytest.param("salt:1892160000", id="wrong way round"),
        pytest.param("alice:salt", id="expiry not a number"),
        pytest.param("-1:salt", id="negative"),
        pytest.param("+1:salt", id="with a plus"),
        pytest.param(" 1:salt", id="space before"),
        pytest.param("1 :salt", id="space after"),
        pytest.param("1\n:salt", id="line feed"),
        pytest.param("1_000:salt", id="underscore"),
        pytest.param("1.5:salt", id="fraction"),
        pytest.param("1e9:salt", id="exponent"),
        pytest.param("0x10:salt", id="hexadecimal"),
        pytest.param("\u0661\u0662\u0663:salt", id="Arabic digits"),
        pytest.param("1\u00b2:salt", id="superscript digit"),
        pytest.param("1" * 21 + ":salt", id="21 digits"),
        pytest.param("0" * 20 + "1:salt", id="21 digits, most of them zero"),
        pytest.param("9" * 5000 + ":salt", id="more digits than int() takes"),
    ],
)
def test_malformed_usernames_have_no_key(username: str) -> None:
    assert authenticator().key(username) is None


@pytest.mark.parametrize(
    "username",
    [
        pytest.param("0:salt", id="zero"),
        pytest.param("18446744073709551615:salt", id="2^64 - 1"),
        pytest.param("18446744073709551616:salt", id="2^64"),
        pytest.param("9" * 20 + ":salt", id="20 digits"),
        pytest.param("1892160000:\u30de\u30c8", id="salt not ASCII"),
    ],
)
def test_well_formed_usernames_have_a_key(username: str) -> None:
    key = authenticator().key(username)

    assert key is not None
    assert len(key) == 16


def test_key_depends_on_secret_expiry_and_salt() -> None:
    keys = {
        Authenticator(secret, b"").key(f"{expiry}:{salt}")
        for secret in ("secret", "terces")
        for expiry in ("1", "2")
        for salt in ("salt", "tlas")
    }
    assert len(keys) == 8
    # The same credential after a restart, when only the key of the nonces is new.
    assert Authenticator("secret", b"one").key("1:salt") == Authenticator("secret", b"two").key(
        "1:salt"
    )


@pytest.mark.parametrize(
    ("expiry", "now", "expired"),
    [
        pytest.param("1892160000", 1892159999.0, False, id="a second before"),
        pytest.param("1892160000", 1892160000.0, False, id="to the second"),
        pytest.param("1892160000", 1892160000.001, True, id="a moment after"),
        pytest.param("0", 1892160000.0, True, id="never valid"),
        pytest.param("18446744073709551615", 1892160000.0, False, id="2^64 - 1"),
        pytest.param("9" * 20, 1892160000.0, False, id="20 digits"),
    ],
)
def test_expiry(expiry: str, now: float, expired: bool) -> None:
    assert authenticator().has_expired(f"{expiry}:salt", now) is expired


# Nonces.


def test_a_nonce_tells_when_it_was_issued() -> None:
    nonce = authenticator().nonce(client(), 1000.75)

    assert authenticator().nonce_issued(nonce, client()) == 1000


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("192.0.2.11", 5000), id="another host"),
        pytest.param(("192.0.2.10", 5001), id="another port"),
        pytest.param(("192.0.2.1", 5000), id="a prefix of the host"),
        pytest.param(("::ffff:192.0.2.10", 5000), id="the same host, IPv4-mapped"),
        pytest.param(("192.0.2.10", 500), id="a prefix of the port"),
    ],
)
def test_nonce_is_only_for_the_client_that_got_it(other: tuple[str, int]) -> None:
    nonce = authenticator().nonce(client("192.0.2.10", 5000), 1000.0)

    assert was_issued(nonce, client("192.0.2.10", 5000))
    assert not was_issued(nonce, client(*other))


def test_nonce_of_an_ipv6_client_outlives_its_flow_label() -> None:
    """The label may change from one datagram to the next."""
    before = ClientAddress((("2001:db8::10", 5000, 0, 0), b""))
    after = ClientAddress((("2001:db8::10", 5000, 0xBEEF, 0), b""))
    nonce = authenticator().nonce(before, 1000.0)

    assert was_issued(nonce, after)


def test_nonce_of_another_relay_is_not_ours() -> None:
    nonce = Authenticator(SECRET, b"another key").nonce(client(), 1000.0)

    assert not was_issued(nonce, client())


def test_nonce_cannot_be_changed() -> None:
    """Neither a single bit nor the time alone."""
    nonce = authenticator().nonce(client(), 1000.0)
    later = authenticator().nonce(client(), 5000.0)

    for position in range(len(nonce)):
        for bit in range(8):
            forged = bytearray(nonce)
            forged[position] ^= 1 << bit
            assert not was_issued(bytes(forged), client())
    assert not was_issued(later[:5] + nonce[5:], client())


@pytest.mark.parametrize(
    "nonce",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 16, id="not UTF-8"),
        pytest.param(b"AAAD6A==", id="time alone"),
        pytest.param(b"z" * 16, id="no MAC of ours"),
        pytest.param(b"-" * 16, id="not base64"),
        pytest.param(b"A" * 15 + b"=", id="shorter than it looks"),
        pytest.param(bytes(16), id="zero bytes"),
        pytest.param(b"0" * 10_000, id="long"),
    ],
)
def test_what_was_never_a_nonce_is_not_valid(nonce: bytes) -> None:
    assert not was_issued(nonce, client())


def test_a_nonce_with_more_or_less_is_not_valid() -> None:
    nonce = authenticator().nonce(client(), 1000.0)

    for forged in (nonce + b"0", b"0" + nonce, nonce[:-1], nonce[1:], nonce.upper()):
        assert not was_issued(forged, client())


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_no_nonce(nonce: bytes) -> None:
    assert not was_issued(nonce, client())


@settings(deadline=None)
@given(
    host=st.ip_addresses(v=4, network="192.0.2.0/24")
    | st.ip_addresses(v=6, network="2001:db8::/32"),
    port=st.integers(1, 0xFFFF),
    now=st.floats(0, 2.0**32 - 1),
)
def test_nonces_are_short_and_printable(host: object, port: int, now: float) -> None:
    """Any client may ask for one, so a challenge must stay small. RFC 8489 §14.10."""
    address = client(str(host), port)
    nonce = authenticator().nonce(address, now)

    assert len(nonce) == NONCE_SIZE == 16  # of which the MAC is 64 bits
    assert set(nonce) <= set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/")
    assert was_issued(nonce, address)


def was_issued(nonce: bytes, address: ClientAddress) -> bool:
    return authenticator().nonce_issued(nonce, address) is not None


def authenticator() -> Authenticator:
    """Each call makes a new one: no state is kept."""
    return Authenticator(SECRET, b"key of the nonces")


def client(host: str = "192.0.2.10", port: int = 5000) -> ClientAddress:
    return ClientAddress(((host, port), b""))


def test_keys_of_proven_users_are_remembered_and_not_too_many() -> None:
    """The oldest goes first; nobody's key changes by being remembered or forgotten."""
    ours = authenticator()
    names = [f"1892160000:{number}" for number in range(REMEMBERED_KEYS + 10)]
    for name in names:
        key = ours.key(name)
        assert key is not None
        ours.remember(name, key)
        ours.remember(name, key)

    assert list(ours._remembered) == names[10:]
    assert [ours.key(name) for name in names] == [authenticator().key(name) for name in names]


def test_a_key_that_was_not_proven_is_not_remembered() -> None:
    """Otherwise a flood of invented usernames would push out those of clients."""
    relay = Scenario()
    honest, guessing = relay.client("192.0.2.10:5000").allocates(), relay.client("192.0.2.66:6000")
    guessing.password = "guessed"
    assert guessing.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).code == 401

    assert list(relay.server._admission._authenticator._remembered) == [honest.username]
