"""Certificates, and sessions of TLS without a socket."""

import ssl
from contextlib import suppress
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives import serialization

from relay.net.tls import (
    ALPN,
    RECORDS_AT_ONCE,
    Chain,
    Identity,
    TlsSession,
    hosts_of,
    read_chain,
    read_key,
)
from tests.certificates import Authority, Certificate


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.issue("relay.test", "192.0.2.1")


@pytest.fixture(scope="module")
def identity(certificate: Certificate) -> Identity:
    return Identity(read_chain(certificate.pem), read_key(certificate.key))


class TlsClient:
    """The client's side of a session, without a socket either."""

    def __init__(
        self, authority: Authority, ciphers: str = "DEFAULT", **versions: ssl.TLSVersion
    ) -> None:
        context = ssl.create_default_context(cadata=authority.pem)
        context.set_ciphers(ciphers)
        for name, version in versions.items():
            setattr(context, name, version)
        context.set_alpn_protocols(["stun.turn"])
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="relay.test")

    def arrives(self, sealed: bytes) -> None:
        self._incoming.write(sealed)

    def says(self, plain: bytes) -> bytes:
        self.tls.write(plain)
        return self._outgoing.read()

    def hears(self, sealed: bytes) -> bytes:
        """Return what was said; that may be nothing yet. Raises EOFError when that is over."""
        self._incoming.write(sealed)
        heard = b""
        while True:
            try:
                part = self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                return heard
            if not part:
                raise EOFError
            heard += part

    def shakes_hands(self, session: TlsSession) -> None:
        for _ in range(4):  # messages each way
            with suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
            session.feed(memoryview(self._outgoing.read()))
            session.shake_hands()
            self._incoming.write(session.output())


def read(session: TlsSession) -> bytes:
    buffer, found = memoryview(bytearray(1 << 17)), 0
    while size := session.read_into(buffer[found:]):
        found += size
    return bytes(buffer[:found])


def test_a_chain_says_for_whom_it_is_and_how_long(certificate: Certificate) -> None:
    chain = read_chain(certificate.pem)
    assert chain.names == ("relay.test", "192.0.2.1")
    assert chain.expires == certificate.expires


def test_the_first_certificate_of_a_chain_is_the_servers(
    authority: Authority, certificate: Certificate
) -> None:
    chain = read_chain(certificate.pem + authority.pem)
    assert chain.names == ("relay.test", "192.0.2.1")


def test_a_certificate_without_names_is_read_all_the_same(authority: Authority) -> None:
    assert read_chain(authority.issue().pem).names == ()


@pytest.mark.parametrize(
    "pem",
    [
        pytest.param("", id="empty"),
        pytest.param("hello", id="something else"),
        pytest.param(
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", id="damaged"
        ),
    ],
)
def test_what_is_no_certificate_is_refused(pem: str) -> None:
    with pytest.raises(ValueError, match="holds no certificate in PEM"):
        read_chain(pem)


def test_what_is_no_key_is_refused(certificate: Certificate) -> None:
    for pem in ("", certificate.pem):
        with pytest.raises(ValueError, match="holds no private key in PEM"):
            read_key(pem)


def test_an_encrypted_key_is_refused(certificate: Certificate) -> None:
    encrypted = certificate.encode_key(serialization.BestAvailableEncryption(b"word"))
    with pytest.raises(ValueError, match="is encrypted"):
        read_key(encrypted)


def test_the_key_of_another_certificate_is_refused(
    authority: Authority, certificate: Certificate
) -> None:
    other = authority.issue("relay.test")
    with pytest.raises(ValueError, match="the key is not that of the certificate"):
        Identity(read_chain(certificate.pem), other.key).context()


def test_a_weak_key_is_refused(authority: Authority) -> None:
    weak = authority.issue("relay.test", kind="rsa-1024")
    with pytest.raises(ValueError, match="OpenSSL does not take it"):
        Identity(read_chain(weak.pem), weak.key).context()


def test_the_key_is_in_no_representation(identity: Identity) -> None:
    assert "PRIVATE KEY" not in repr(identity)


@pytest.mark.parametrize(
    ("names", "hosts", "expected"),
    [
        pytest.param(("a.test",), ["192.0.2.1"], ["a.test"], id="a name"),
        pytest.param(("192.0.2.1", "a.test"), ["192.0.2.1"], ["192.0.2.1"], id="its address"),
        pytest.param(("*.test", "a.test"), ["192.0.2.1"], ["a.test"], id="not a pattern"),
        pytest.param(("192.0.2.9",), ["192.0.2.1"], ["192.0.2.1"], id="another address"),
        pytest.param((), ["192.0.2.1", "2001:db8::1"], ["192.0.2.1", "2001:db8::1"], id="none"),
    ],
)
def test_clients_are_told_a_name_that_they_can_verify(
    names: tuple[str, ...], hosts: list[str], expected: list[str]
) -> None:
    assert hosts_of(Chain("", names, 0.0), hosts) == expected


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_client_and_relay_talk(
    authority: Authority, identity: Identity, version: ssl.TLSVersion
) -> None:
    client = TlsClient(authority, minimum_version=version, maximum_version=version)
    session = TlsSession(identity.context())
    client.shakes_hands(session)
    client.hears(session.output())
    assert client.tls.selected_alpn_protocol() == ALPN[0]
    records = memoryview(client.says(b"ping" * 10_000))
    assert session.feed(records) == len(records)
    assert read(session) == b"ping" * 10_000
    assert client.hears(session.seal([b"pong" * 10_000, b"end"])) == b"pong" * 10_000 + b"end"


def test_each_message_has_a_record_of_its_own(authority: Authority, identity: Identity) -> None:
    client, session = TlsClient(authority), TlsSession(identity.context())
    client.shakes_hands(session)
    client.hears(session.output())
    client.arrives(session.seal([b"one", b"two", bytes(20_000)]))
    assert [len(client.tls.read(1 << 16)) for _ in range(4)] == [3, 3, 16384, 3616]


def test_so_many_records_are_taken_at_once(authority: Authority, identity: Identity) -> None:
    """Wherever they are cut."""
    client, session = TlsClient(authority), TlsSession(identity.context())
    client.shakes_hands(session)
    records = b"".join(client.says(bytes([number])) for number in range(100))
    one = len(records) // 100
    assert session.feed(memoryview(records)) == RECORDS_AT_ONCE * one
    at, heard = RECORDS_AT_ONCE * one, read(session)
    while at < len(records):
        assert session.feed(memoryview(records[at : at + 7])) == len(records[at : at + 7])
        at += 7
        heard += read(session)
    assert heard == bytes(range(100))


def test_older_versions_are_refused(authority: Authority, identity: Identity) -> None:
    old = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSVersion.TLSv1_1 is deprecated"):
        client = TlsClient(authority, "ALL:@SECLEVEL=0", minimum_version=old, maximum_version=old)
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        client.shakes_hands(TlsSession(identity.context()))


def test_what_is_no_tls_is_an_error(identity: Identity) -> None:
    session = TlsSession(identity.context())
    session.feed(memoryview(b"GET / HTTP/1.1\r\n\r\n"))
    with pytest.raises(ssl.SSLError):
        session.shake_hands()


def test_the_end_is_said_on_both_sides(authority: Authority, identity: Identity) -> None:
    client, session = TlsClient(authority), TlsSession(identity.context())
    client.shakes_hands(session)
    client.hears(session.output())
    with pytest.raises(EOFError):
        client.hears(session.end())


def test_a_client_says_goodbye(authority: Authority, identity: Identity) -> None:
    client, session = TlsClient(authority), TlsSession(identity.context())
    client.shakes_hands(session)
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.unwrap()
    session.feed(memoryview(client._outgoing.read()))
    assert session.read_into(memoryview(bytearray(1 << 16))) == 0


def test_a_certificate_that_has_ended_can_be_shown(authority: Authority) -> None:
    """Some clients take it, and to serve nobody would help nobody: the log says what is wrong."""
    old = authority.issue("relay.test", lasts=timedelta(hours=-1))
    Identity(read_chain(old.pem), old.key).context()
