"""How long one step of a handshake of TLS holds up everybody's datagrams, by the kind of key."""

import ssl
from contextlib import suppress

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from relay.net.tls import Identity, TlsSession, read_chain
from tests.certificates import Authority


def hello() -> bytes:
    """Return what a client begins with."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    session = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="relay.test")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("kind", ["ecdsa", "rsa-2048", "rsa-4096"])
def test_answer_a_hello(benchmark: BenchmarkFixture, kind: str) -> None:
    """Make a session, and compute what the server says: key exchange and signature."""
    certificate = Authority().issue("relay.test", kind=kind)
    context = Identity(read_chain(certificate.pem), certificate.key).context()
    greeting = memoryview(hello())

    def answer() -> bytes:
        session = TlsSession(context)
        session.feed(greeting)
        session.shake_hands()
        return session.output()

    assert benchmark(answer)


def test_make_a_context(benchmark: BenchmarkFixture) -> None:
    """What a reload with a new certificate takes in the loop, beside reading the files."""
    certificate = Authority().issue("relay.test")
    identity = Identity(read_chain(certificate.pem), certificate.key)
    benchmark(identity.context)
