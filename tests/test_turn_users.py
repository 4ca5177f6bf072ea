"""Who there is: users of three kinds, their passwords and keys. RFC 8489 §9.2.2."""

import hashlib
import hmac
from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.stun.attributes import Attr, DecodeError
from relay.stun.const import PasswordAlgorithm
from relay.stun.integrity import userhash
from relay.turn.users import DEFAULT_REALM, Users, mint_rest, password, rest_password

MD5, SHA_256 = PasswordAlgorithm.MD5, PasswordAlgorithm.SHA_256
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
    (key,) = Users(secret=secret).keys(f"{expiry}:{salt}", MD5)

    assert DEFAULT_REALM == "firezone"
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
    users = Users(secret=SECRET, rest_secrets=(SECRET,))

    assert [*Users(secret=SECRET).keys(username, MD5)] == []
    assert len([*users.keys(username, MD5)]) == (username == "1892160000")


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
    users = Users(secret=SECRET, rest_secrets=("one", "two"))

    assert [len(key) for key in users.keys(username, MD5)] == [16] * 3
    assert [len(key) for key in users.keys(username, SHA_256)] == [32] * 3


def test_key_depends_on_secret_expiry_and_salt() -> None:
    keys = {
        key
        for secret in ("secret", "terces")
        for expiry in ("1", "2")
        for salt in ("salt", "tlas")
        for key in Users(secret=secret, rest_secrets=(secret,)).keys(f"{expiry}:{salt}", MD5)
    }
    assert len(keys) == 16


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
    assert Users(secret=SECRET).has_expired(f"{expiry}:salt", now) is expired


def test_the_password_of_a_rest_user_is_an_hmac_of_its_name() -> None:
    """As web services make it; here in other words."""
    digest = hmac.new(b"north", b"1892160000:alice", hashlib.sha1).digest()

    assert rest_password("1892160000:alice", "north") == b64encode(digest).decode()
    assert mint_rest(1892160000, "alice", "north") == (
        "1892160000:alice",
        b64encode(digest).decode(),
    )


def test_every_secret_is_good() -> None:
    """So that one can be replaced while credentials of the other are in use."""
    keys = [*Users(rest_secrets=("old", "new")).keys("1892160000:alice", MD5)]

    assert keys == [
        hashlib.md5(f"1892160000:alice:firezone:{made}".encode()).digest()
        for made in (rest_password("1892160000:alice", secret) for secret in ("old", "new"))
    ]


def test_a_static_user_is_known_by_password_or_key() -> None:
    md5 = hashlib.md5(b"bob:example.org:word").digest()
    sha256 = hashlib.sha256(b"carol:example.org:word").digest()
    static: dict[str, str | bytes] = {"alice": "word", "bob": md5, "carol": sha256}
    users = Users(realm="example.org", static=static)

    assert [*users.keys("alice", MD5)] == [hashlib.md5(b"alice:example.org:word").digest()]
    assert [*users.keys("alice", SHA_256)] == [hashlib.sha256(b"alice:example.org:word").digest()]
    assert [*users.keys("bob", MD5)] == [md5]
    assert [*users.keys("bob", SHA_256)] == []
    assert [*users.keys("carol", MD5)] == []
    assert [*users.keys("carol", SHA_256)] == [sha256]
    assert [*users.keys("dave", MD5)] == []


def test_a_static_user_may_look_like_a_timed_one() -> None:
    users = Users(secret=SECRET, rest_secrets=("secret",), static={"0:alice": "word"})

    assert [*users.keys("0:alice", MD5)] == [hashlib.md5(b"0:alice:firezone:word").digest()]
    assert not users.has_expired("0:alice", 1892160000.0)
    assert users.user_of("0:alice") == "0:alice"


@pytest.mark.parametrize(
    ("username", "user"),
    [
        pytest.param("1892160000:alice", "alice", id="what follows the expiry"),
        pytest.param("1892160000:alice:phone", "alice:phone", id="all of it"),
        pytest.param("1892160000", "1892160000", id="nothing follows"),
        pytest.param("1892160000:", "1892160000:", id="nothing follows the colon"),
        pytest.param("bob", "bob", id="static"),
    ],
)
def test_who_a_username_is(username: str, user: str) -> None:
    users = Users(rest_secrets=("secret",), static={"bob": "word"})

    assert users.user_of(username) == user


@pytest.mark.parametrize(
    ("static", "offered"),
    [
        pytest.param({}, (SHA_256, MD5), id="timed ones alone"),
        pytest.param({"alice": "word"}, (SHA_256, MD5), id="passwords"),
        pytest.param({"alice": "word", "bob": bytes(16)}, (MD5,), id="an MD5 key"),
        pytest.param({"alice": "word", "bob": bytes(32)}, (SHA_256,), id="a SHA-256 key"),
        pytest.param({"alice": bytes(16), "bob": bytes(32)}, (), id="one of each"),
    ],
)
def test_offered_is_what_everyone_can_do(
    static: dict[str, str | bytes], offered: tuple[PasswordAlgorithm, ...]
) -> None:
    """Else a client that picks the better one could not get in."""
    assert Users(secret=SECRET, static=static).algorithms == offered


def test_only_static_users_are_found_by_their_hash() -> None:
    hashed = userhash("alice", "example.org")
    alone = Users(realm="example.org", static={"alice": "word"})

    assert alone.name_of(hashed) == "alice"
    assert alone.name_of(bytes(32)) is None
    assert alone.finds_hashes
    for users in (
        Users(static={"alice": "word"}, secret=SECRET),
        Users(static={"alice": "word"}, rest_secrets=("secret",)),
        Users(secret=SECRET),
        Users(),
    ):
        assert not users.finds_hashes
