"""What RFC 8489 has beyond RFC 5389: stronger signatures and keys, hidden names, no bidding down.

A client that speaks RFC 5389 sees nothing of it: all other tests are such clients.
"""

import struct
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config.parsing import LONGEST_REALM
from relay.stun.attributes import BY_TYPE, Attr, Attribute, PasswordAlgorithms
from relay.stun.const import UDP_PROTOCOL, Kind, Method, PasswordAlgorithm
from relay.stun.integrity import integrity_sha256, long_term_key, userhash, verify_sha256
from relay.stun.message import Message, Received, decode
from relay.turn.users import Users, mint, mint_rest
from tests.scenario import SECRET, Client, Scenario, ToClient, Value, request

MD5, SHA_256 = PasswordAlgorithm.MD5, PasswordAlgorithm.SHA_256
OFFERED: PasswordAlgorithms = ((SHA_256, b""), (MD5, b""))
REALM = "firezone"
ALLOCATE: Value = (Attr.REQUESTED_TRANSPORT, UDP_PROTOCOL)


class Modern:
    """A client that speaks RFC 8489, with a username and password."""

    def __init__(self, relay: Scenario, username: str, password: str) -> None:
        self._relay = relay
        self._client = relay.client("192.0.2.10:5000")
        self.username, self.password = username, password
        challenge = self.asks_plainly(request(Method.ALLOCATE, ALLOCATE).encode()).message
        nonce, offered = challenge.get(Attr.NONCE), challenge.get(Attr.PASSWORD_ALGORITHMS)
        assert nonce is not None
        self.nonce = nonce
        self.offered: PasswordAlgorithms | None = offered

    def key(self, algorithm: PasswordAlgorithm) -> bytes:
        return long_term_key(self.username, REALM, self.password, algorithm)

    def asks_plainly(self, datagram: bytes) -> Received:
        self._client.sends(datagram)
        (sent,) = self._relay.sent()
        assert isinstance(sent, ToClient)
        return decode(sent.datagram)

    def asks(
        self,
        *more: Value,
        method: Method = Method.REFRESH,
        algorithm: PasswordAlgorithm = SHA_256,
        offered: PasswordAlgorithms | None = OFFERED,
        chosen: PasswordAlgorithms | None = None,
        is_hidden: bool = False,
        is_sha256: bool = True,
    ) -> Received:
        """Ask, and check that the answer is signed as the request is, if at all."""
        who: Value = (Attr.USERNAME, self.username)
        if is_hidden:
            who = (Attr.USERHASH, userhash(self.username, REALM))
        values: list[Value] = [*more, who, (Attr.REALM, REALM), (Attr.NONCE, self.nonce)]
        if offered is not None:
            values.append((Attr.PASSWORD_ALGORITHMS, offered))
            values.append((Attr.PASSWORD_ALGORITHM, chosen or ((algorithm, b""),)))
        elif chosen is not None:
            values.append((Attr.PASSWORD_ALGORITHM, chosen))
        key = self.key(algorithm)
        answer = self.asks_plainly(request(method, *values).encode(key, sha256=is_sha256))
        if answer.sha256_offset is not None:
            assert is_sha256
            assert verify_sha256(answer.raw, answer.sha256_offset, key)
        assert is_sha256 or answer.sha256_offset is None
        return answer

    def allocates(self) -> None:
        answer = self.asks(ALLOCATE, method=Method.ALLOCATE)
        assert answer.message.kind is Kind.SUCCESS


def code_of(answer: Received) -> int | None:
    error = answer.message.get(Attr.ERROR_CODE)
    return None if error is None else error[0]


@pytest.fixture
def modern(relay: Scenario) -> Modern:
    client = relay.client("192.0.2.10:5000")
    return Modern(relay, client.username, client.password)


@pytest.mark.parametrize("algorithm", PasswordAlgorithm, ids=lambda one: one.name)
@pytest.mark.parametrize("is_sha256", [True, False], ids=["SHA-256", "SHA-1"])
def test_every_key_goes_with_every_signature(
    modern: Modern, algorithm: PasswordAlgorithm, is_sha256: bool
) -> None:
    assert modern.offered == OFFERED
    answer = modern.asks(ALLOCATE, method=Method.ALLOCATE, algorithm=algorithm, is_sha256=is_sha256)

    assert code_of(answer) is None
    assert (answer.sha256_offset is not None) is is_sha256
    assert (answer.integrity_offset is not None) is not is_sha256


def test_errors_are_signed_alike(modern: Modern) -> None:
    answer = modern.asks(method=Method.REFRESH)

    assert code_of(answer) == 437
    assert answer.sha256_offset is not None


def test_a_challenge_says_what_is_offered(modern: Modern) -> None:
    """A 438, too. RFC 8489 §9.2.4."""
    modern.nonce = b"stale"
    answer = modern.asks()

    assert code_of(answer) == 438
    assert answer.message.get(Attr.PASSWORD_ALGORITHMS) == OFFERED
    assert (answer.message.get(Attr.NONCE) or b"").startswith(b"obMatJos2gAAB")
    assert answer.sha256_offset is not None


def test_a_wrong_password_is_a_wrong_password(modern: Modern) -> None:
    modern.password = "guessed"
    answer = modern.asks()

    assert code_of(answer) == 401
    assert (answer.sha256_offset, answer.integrity_offset) == (None, None)


BIDDING_DOWN = [
    pytest.param({"offered": ((MD5, b""),), "algorithm": MD5}, id="only the weaker was offered"),
    pytest.param({"offered": ((MD5, b""), (SHA_256, b""))}, id="another order"),
    pytest.param({"offered": None, "chosen": ((SHA_256, b""),)}, id="no word of what was offered"),
    pytest.param({"chosen": ((SHA_256, b"?"),)}, id="one with parameters"),
    pytest.param({"chosen": ((0x0003, b""),)}, id="one that was not offered"),
]


@pytest.mark.parametrize("changed", BIDDING_DOWN)
def test_who_was_told_something_else_is_told_so(modern: Modern, changed: dict[str, object]) -> None:
    """RFC 8489 §9.2.4: somebody on the way has changed the challenge."""
    answer = modern.asks(ALLOCATE, method=Method.ALLOCATE, **changed)  # type: ignore[arg-type]

    assert code_of(answer) == 400


SUBSEQUENT = [Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND]


@pytest.mark.parametrize("method", SUBSEQUENT, ids=lambda method: method.name)
def test_what_was_offered_need_not_be_repeated_once_it_was_checked(
    modern: Modern, method: Method
) -> None:
    """RFC 8489 §9.2.3.2: subsequent requests have PASSWORD-ALGORITHM, of the two."""
    modern.allocates()
    peer = (Attr.XOR_PEER_ADDRESS, ("198.51.100.7", 9000))
    answer = modern.asks(
        peer,
        (Attr.CHANNEL_NUMBER, 0x4000),
        method=method,
        offered=None,
        chosen=((SHA_256, b""),),
    )

    assert code_of(answer) is None
    assert answer.sha256_offset is not None


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        pytest.param(((MD5, b""),), ((MD5, b""),), id="not what was offered"),
        pytest.param(None, ((0x0003, b""),), id="one that was not offered"),
        pytest.param(None, ((MD5, b""),), id="not the best of what was offered"),
    ],
)
def test_later_requests_are_held_against_the_offer_as_well(
    modern: Modern, offered: PasswordAlgorithms | None, chosen: PasswordAlgorithms
) -> None:
    modern.allocates()

    assert code_of(modern.asks(offered=offered, chosen=chosen, algorithm=MD5)) == 400


def test_no_algorithm_at_all_is_a_client_of_rfc_5389(modern: Modern) -> None:
    assert code_of(modern.asks(offered=None, algorithm=MD5, is_sha256=False)) == 437
    assert code_of(modern.asks(offered=None, algorithm=SHA_256)) == 401


def test_a_nonce_ends_with_the_offer_that_it_came_with() -> None:
    """After a reload a client is told what is offered now, not that it has done wrong."""
    relay = Scenario(users=Users(static={"alice": "word"}))
    alice = Modern(relay, "alice", "word")
    alice.allocates()
    relay.authenticator.change_users(Users(static={"alice": "word", "bob": bytes(16)}))
    answer = alice.asks()

    assert code_of(answer) == 438
    assert answer.message.get(Attr.PASSWORD_ALGORITHMS) == ((MD5, b""),)
    alice.nonce = answer.message.get(Attr.NONCE) or b""
    assert code_of(alice.asks(offered=((MD5, b""),), algorithm=MD5)) is None


def test_a_nonce_outlives_a_reload_that_leaves_the_offer_as_it_was() -> None:
    relay = Scenario(users=Users(static={"alice": "word"}))
    alice = Modern(relay, "alice", "word")
    alice.allocates()
    relay.authenticator.change_users(Users(static={"alice": "word", "carol": "word"}))

    assert code_of(alice.asks()) is None


def test_who_offers_nothing_says_that_it_speaks_rfc_8489() -> None:
    """RFC 8489 §9.2: without any feature the cookie has 24 bits of zero."""
    static: dict[str, str | bytes] = {"alice": bytes(16), "bob": bytes(32)}
    modern = Modern(Scenario(users=Users(secret=SECRET, static=static)), "alice", "word")

    assert modern.offered is None
    assert modern.nonce.startswith(b"obMatJos2AAAA")


def test_algorithms_with_a_nonce_that_knows_none_are_a_bad_request(relay: Scenario) -> None:
    """Such a nonce goes to clients for whose request the whole challenge is too long."""
    client = relay.client("192.0.2.10:5000")
    modern = Modern(relay, client.username, client.password)
    modern.nonce = relay.authenticator.nonce(client.address, relay.time.now, with_cookie=False)

    assert code_of(modern.asks()) == 400
    assert code_of(modern.asks(offered=None, algorithm=MD5)) == 437


def test_the_better_signature_counts_if_there_are_both(modern: Modern) -> None:
    """RFC 8489 §9.2.4. In the first one nobody has to believe."""
    values: list[Value] = [
        (Attr.USERNAME, modern.username),
        (Attr.REALM, REALM),
        (Attr.NONCE, modern.nonce),
    ]
    for first, second, code in ((b"wrong", modern.key(MD5), 437), (modern.key(MD5), b"wrong", 401)):
        datagram = request(Method.REFRESH, *values).encode(first)
        longer = struct.pack("!HH", Attr.MESSAGE_INTEGRITY_SHA256.type, 32)
        datagram += longer + integrity_sha256(datagram, second)
        datagram = datagram[:2] + struct.pack("!H", len(datagram) - 20) + datagram[4:]
        assert code_of(modern.asks_plainly(datagram)) == code


@pytest.mark.parametrize(("size", "code"), [(32, 437), (28, 437), (16, 437), (12, 400), (30, 400)])
def test_a_signature_may_be_cut(modern: Modern, size: int, code: int) -> None:
    """RFC 8489 §14.6: to 16 bytes at least, and a multiple of four."""
    values: list[Value] = [
        (Attr.USERNAME, modern.username),
        (Attr.REALM, REALM),
        (Attr.NONCE, modern.nonce),
    ]
    unsigned = request(Method.REFRESH, *values).encode()
    signature = integrity_sha256(unsigned, modern.key(MD5), 4 + size + -size % 4)[:size]
    datagram = unsigned + struct.pack("!HH", 0x001C, size) + signature + bytes(-size % 4)
    datagram = datagram[:2] + struct.pack("!H", len(datagram) - 20) + datagram[4:]

    assert code_of(modern.asks_plainly(datagram)) == code


def test_what_follows_the_better_signature_is_ignored(modern: Modern) -> None:
    modern.allocates()
    values: list[Value] = [
        (Attr.USERNAME, modern.username),
        (Attr.REALM, REALM),
        (Attr.NONCE, modern.nonce),
    ]
    datagram = request(Method.REFRESH, *values).encode(modern.key(MD5), sha256=True)
    for attribute in (Attr.LIFETIME, Attribute(0x7ABC, "unknown", Attr.LIFETIME.coding)):
        appended = Message(Kind.REQUEST, Method.REFRESH, bytes(12), [(attribute, 0)]).encode()
        longer = datagram + appended[20:]
        longer = longer[:2] + struct.pack("!H", len(longer) - 20) + longer[4:]
        answer = modern.asks_plainly(longer)
        assert answer.message.get(Attr.LIFETIME) == 600


# --- Hidden names ----------------------------------------------------------------------------


@pytest.fixture
def hidden() -> Modern:
    relay = Scenario(users=Users(static={"alice": "word", "bob": "other"}))
    return Modern(relay, "alice", "word")


def test_a_static_user_may_hide_its_name(hidden: Modern) -> None:
    assert hidden.nonce.startswith(b"obMatJos2wAAD")
    for algorithm, is_sha256 in product(PasswordAlgorithm, [True, False]):
        answer = hidden.asks(algorithm=algorithm, is_sha256=is_sha256, is_hidden=True)
        assert code_of(answer) == 437
        assert (answer.sha256_offset or answer.integrity_offset) is not None


def test_hidden_or_not_it_is_the_same_user(hidden: Modern) -> None:
    hidden.allocates()

    assert code_of(hidden.asks(is_hidden=True)) is None


def test_a_hash_that_nobody_has_is_a_wrong_password(hidden: Modern) -> None:
    hidden.username = "carol"
    answer = hidden.asks(is_hidden=True)

    assert code_of(answer) == 401
    assert answer.sha256_offset is None


def test_where_names_cannot_be_found_by_hash_the_cookie_says_so(modern: Modern) -> None:
    assert modern.nonce.startswith(b"obMatJos2gAAB")
    assert code_of(modern.asks(is_hidden=True)) == 401


# --- Amplification ---------------------------------------------------------------------------

REALMS = ["a", "firezone", "example.org", "turn.example.com", "x" * 21, "x" * 32, "ü" * 16]
USERS: list[dict[str, str | bytes]] = [
    {},
    {"alice": "word"},
    {"alice": bytes(16)},
    {"alice": bytes(16), "bob": bytes(32)},
]


@pytest.mark.parametrize("realm", REALMS)
@pytest.mark.parametrize("static", USERS, ids=["timed", "static", "MD5 key", "a key of each"])
@pytest.mark.parametrize("software", [None, "relay", "x" * 100], ids=["", "relay", "long"])
def test_no_answer_to_who_proves_nothing_is_longer_than_three_times(
    realm: str, static: dict[str, str | bytes], software: str | None
) -> None:
    """And each to a real client's first Allocate holds what it needs to sign the next one."""
    secret = None if static else SECRET
    users = Users(realm=realm, secret=secret, static=static)
    relay = Scenario(users=users, software=software)
    alice = relay.client("192.0.2.10:5000")
    signed: list[Value] = [(Attr.USERNAME, "nobody"), (Attr.REALM, realm), (Attr.NONCE, b"stale")]
    shapes: list[list[Value]] = [[], [ALLOCATE], [ALLOCATE, (Attr.LIFETIME, 600)], [*signed]]
    for method, shape, key, fingerprinted in product(
        [*Method, 0x0FF], shapes, [None, b"guessed"], [False, True]
    ):
        datagram = request(method, *shape).encode(key, fingerprinted=fingerprinted)
        alice.sends(datagram)
        for sent in relay.sent():
            assert len(sent.datagram) <= 3 * len(datagram)  # type: ignore[union-attr]
            answer = decode(sent.datagram)  # type: ignore[union-attr]
            nonce = answer.message.get(Attr.NONCE)
            if method == Method.ALLOCATE and ALLOCATE in shape and key is None:
                assert nonce is not None
                assert answer.message.get(Attr.REALM) == realm
            has_algorithms = answer.message.get(Attr.PASSWORD_ALGORITHMS) is not None
            says_so = nonce is not None and nonce[:9] == b"obMatJos2" and nonce[12] in b"BD"
            assert has_algorithms == says_so


realms = st.text(min_size=1, max_size=32).filter(lambda text: len(text.encode()) <= LONGEST_REALM)
types = st.sampled_from(sorted(BY_TYPE)) | st.integers(0, 0xFFFF)
raw_attributes = st.lists(st.tuples(types, st.binary(max_size=40)), max_size=6)


@settings(deadline=None)
@given(
    method=st.sampled_from([*Method, 0x0FF]),
    attributes=raw_attributes,
    realm=realms,
    static=st.sampled_from(USERS),
    software=st.none() | st.text(min_size=1, max_size=40),
)
def test_that_goes_for_whatever_is_asked(
    method: int,
    attributes: list[tuple[int, bytes]],
    realm: str,
    static: dict[str, str | bytes],
    software: str | None,
) -> None:
    """No signature in these is good, so none of them proves anything."""
    relay = Scenario(users=Users(realm=realm, static=static), software=software)
    alice = relay.client("[2001:db8::10]:5000")
    coding = Attr.DATA.coding
    values = [(Attribute(kind, "drawn", coding), value) for kind, value in attributes]
    datagram = request(method, *values).encode()
    alice.sends(datagram)
    for sent in relay.sent():
        assert len(sent.datagram) <= 3 * len(datagram)  # type: ignore[union-attr]


def test_an_unknown_user_and_a_wrong_password_look_the_same() -> None:
    relay = Scenario(users=Users(static={"alice": "word"}, rest_secrets=("secret",)))
    answers = []
    for username in ("alice", "nobody", "1892160000:alice"):
        modern = Modern(relay, username, "guessed")
        answer = modern.asks()
        answers.append((len(answer.raw), [attribute for attribute, _ in answer.message.attributes]))

    assert answers[0] == answers[1] == answers[2]


# --- Users of several kinds ------------------------------------------------------------------


def test_all_kinds_are_served_at_once() -> None:
    static: dict[str, str | bytes] = {
        "alice": "word",
        "bob": long_term_key("bob", REALM, "word"),
        "carol": long_term_key("carol", REALM, "word", MD5),
    }
    relay = Scenario(users=Users(secret=SECRET, rest_secrets=("old", "new"), static=static))
    for number, (username, password) in enumerate(
        [
            ("alice", "word"),
            ("bob", "word"),
            mint(2**40, "dave", SECRET),
            mint_rest(2**40, "erin", "old"),
            mint_rest(2**40, "frank", "new"),
        ]
    ):
        client = with_credential(relay.client(f"192.0.2.10:{5000 + number}"), username, password)
        client.allocates()


def test_both_passwords_of_a_username_are_good_while_secrets_are_replaced() -> None:
    relay = Scenario(users=Users(rest_secrets=("old", "new")))
    for number, secret in enumerate(("old", "new", "old")):
        username, password = mint_rest(2**40, "alice", secret)
        client = with_credential(relay.client(f"192.0.2.10:{5000 + number}"), username, password)
        client.allocates()
    relay.authenticator.change_users(Users(rest_secrets=("new",)))
    username, password = mint_rest(2**40, "alice", "old")
    late = with_credential(relay.client("192.0.2.10:6000"), username, password)
    assert late.asks(Method.ALLOCATE, ALLOCATE).code == 401


def test_takeover_and_shares_go_by_who_it_is_over_all_kinds() -> None:
    relay = Scenario(
        users=Users(rest_secrets=("secret",), static={"alice": "word"}),
        max_allocations_per_username=2,
    )
    credentials = [
        ("alice", "word"),
        mint_rest(2**40, "alice", "secret"),
        mint_rest(2**41, "alice", "secret"),
    ]
    clients = [
        with_credential(relay.client(f"192.0.2.10:{5000 + n}"), *credential)
        for n, credential in enumerate(credentials)
    ]
    clients[0].allocates()
    clients[1].allocates()
    assert clients[2].asks(Method.ALLOCATE, ALLOCATE).code == 486


@pytest.mark.parametrize("realm", ["example.org", "firezone"])
def test_the_realm_of_a_request_has_to_be_ours(realm: str) -> None:
    relay = Scenario(users=Users(realm="example.org", static={"alice": "word"}))
    client = relay.client("192.0.2.10:5000")
    values: list[Value] = [
        (Attr.USERNAME, "alice"),
        (Attr.REALM, realm),
        (Attr.NONCE, client.nonce),
    ]
    key = long_term_key("alice", "example.org", "word")
    answer = client.hears(request(Method.REFRESH, *values).encode(key))

    assert answer.code == (437 if realm == "example.org" else 401)


def test_a_static_user_never_expires() -> None:
    relay = Scenario(users=Users(static={"0": "word"}))
    with_credential(relay.client("192.0.2.10:5000"), "0", "word").allocates()


def with_credential(client: Client, username: str, password: str) -> Client:
    client.username, client.password = username, password
    return client
