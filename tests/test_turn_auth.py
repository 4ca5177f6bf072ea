"""Nonces without a table, and keys that were proven. RFC 8489 §9.2."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.stun.attributes import Attr
from relay.stun.const import UDP_PROTOCOL, Method, PasswordAlgorithm
from relay.turn.auth import NONCE_SIZES, REMEMBERED_KEYS, Authenticator
from relay.turn.commands import ClientAddress
from relay.turn.users import Users
from tests.scenario import SECRET, Scenario

MD5 = PasswordAlgorithm.MD5
USERS = Users(secret=SECRET)


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
    nonce = Authenticator(USERS, b"another key").nonce(client(), 1000.0)

    assert not was_issued(nonce, client())


@pytest.mark.parametrize("with_cookie", [True, False])
def test_nonce_cannot_be_changed(with_cookie: bool) -> None:
    """Neither a single bit nor the time alone, nor what it says of features."""
    nonce = authenticator().nonce(client(), 1000.0, with_cookie=with_cookie)
    later = authenticator().nonce(client(), 5000.0, with_cookie=with_cookie)

    for position in range(len(nonce)):
        for bit in range(8):
            forged = bytearray(nonce)
            forged[position] ^= 1 << bit
            assert not was_issued(bytes(forged), client())
    assert not was_issued(later[:-10] + nonce[-10:], client())
    for other in (b"", b"obMatJos2AAAA", b"obMatJos2gAAB", b"obMatJos2wAAD"):
        assert was_issued(other + nonce[-15:], client()) is (other == nonce[:-15])


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
    short = authenticator().nonce(address, now, with_cookie=False)

    assert (len(nonce), len(short)) == NONCE_SIZES == (28, 15)  # of which the MAC is 56 bits
    assert was_issued(short, address)
    assert set(nonce) <= set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/")
    assert was_issued(nonce, address)


def was_issued(nonce: bytes, address: ClientAddress) -> bool:
    return authenticator().nonce_issued(nonce, address) is not None


def authenticator() -> Authenticator:
    """Each call makes a new one: no state is kept."""
    return Authenticator(USERS, b"key of the nonces")


def client(host: str = "192.0.2.10", port: int = 5000) -> ClientAddress:
    return ClientAddress(((host, port), b""))


def test_keys_of_proven_users_are_remembered_and_not_too_many() -> None:
    """The oldest goes first; nobody's key changes by being remembered or forgotten."""
    ours = authenticator()
    names = [f"1892160000:{number}" for number in range(REMEMBERED_KEYS + 10)]
    for name in names:
        (key,) = ours.keys(name, MD5)
        ours.remember(name, MD5, key)
        ours.remember(name, MD5, key)

    assert list(ours._remembered) == [(name, MD5) for name in names[10:]]
    assert all([*ours.keys(name, MD5)] == [*authenticator().keys(name, MD5)] for name in names)


def test_a_key_that_was_not_proven_is_not_remembered() -> None:
    """Otherwise a flood of invented usernames would push out those of clients."""
    relay = Scenario()
    honest, guessing = relay.client("192.0.2.10:5000").allocates(), relay.client("192.0.2.66:6000")
    guessing.password = "guessed"
    assert guessing.asks(Method.ALLOCATE, (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)).code == 401

    assert list(relay.authenticator._remembered) == [(honest.username, MD5)]


def test_what_was_proven_counts_no_more_when_users_change() -> None:
    ours = authenticator()
    ours.remember("alice", MD5, b"key of alice")
    ours.change_users(Users(static={"alice": "another word"}))

    assert b"key of alice" not in [*ours.keys("alice", MD5)]


@pytest.mark.parametrize(
    ("users", "cookie"),
    [
        pytest.param(Users(secret=SECRET), b"obMatJos2gAAB", id="password algorithms"),
        pytest.param(Users(static={"a": "b"}), b"obMatJos2wAAD", id="username anonymity, too"),
        pytest.param(
            Users(static={"a": bytes(16), "b": bytes(32)}), b"obMatJos2QAAC", id="that alone"
        ),
        pytest.param(
            Users(secret=SECRET, static={"a": bytes(16), "b": bytes(32)}),
            b"obMatJos2AAAA",
            id="neither",
        ),
    ],
)
def test_the_cookie_says_which_features_there_are(users: Users, cookie: bytes) -> None:
    """RFC 8489 §9.2, by which bit 0 is the first one, and its erratum: the last one."""
    ours = Authenticator(users, b"key")
    nonce = ours.nonce(client(), 1000.0)

    assert nonce[:-15] == cookie
    assert ours.nonce_issued(nonce, client()) == 1000


def test_a_nonce_that_says_otherwise_than_is_true_now_is_stale() -> None:
    """The client has to hear of what is offered now."""
    ours = authenticator()
    nonce = ours.nonce(client(), 1000.0)
    ours.change_users(Users(static={"alice": "word"}))

    assert ours.nonce_issued(nonce, client()) is None


def test_to_find_that_there_is_no_such_user_takes_a_key_too() -> None:
    assert len([*Authenticator(Users(), b"key").keys("nobody", MD5)]) == 1
