"""TLS for streams, without a socket: bytes from the network in, bytes for it out.

The standard library's ``ssl`` does the work, on two buffers in memory. So whole records of many
datagrams are read with one system call, a PROXY header may come before the handshake, and nothing
here ever waits.
"""

import os
import ssl
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import IO, Final

# RFC 7443: the client may say that it is STUN or TURN that it wants. Most say nothing.
ALPN: Final = ("stun.turn", "stun.nat-discovery")

# ECDHE only, and only ciphers that authenticate what they encrypt: for TLS 1.2, as Mozilla's
# "intermediate" has it, without those that no client needs which has not a better one too. Those
# of TLS 1.3 are all of that kind.
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

LARGEST_RECORD: Final = 16 << 10  # bytes of plain text. RFC 8446 §5.1
# Records that OpenSSL is given at once: it may spend 20 µs on one that has nothing for us (a
# KeyUpdate), and does not come back before it has looked at all.
RECORDS_AT_ONCE: Final = 32
# Bytes that a client may make us say, by one lot of records, beside what we seal. The answer to a
# KeyUpdate has 27, and nobody asks for many at a time.
LARGEST_REPLY: Final = 200
_RECORD_HEADER: Final = 5  # bytes: type, version, length. RFC 8446 §5.1

# What OpenSSL says of a key that is not the certificate's: of one of another kind, the latter.
_ANOTHER_KEY: Final = frozenset({"KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})
_NOT_IN_PEM: Final = "holds no {} in PEM (-----BEGIN …)"


@dataclass(frozen=True, slots=True)
class Chain:
    """A certificate, and those that lead from it to one that clients know."""

    pem: str
    names: tuple[str, ...]  # hosts that it is for: DNS names, and IP addresses
    expires: float  # Unix time
    rsa_bits: int = 0  # of the key, if it is one of RSA


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server shows, and proves to be: a chain with the key of its first certificate."""

    chain: Chain
    key: str = field(repr=False)  # PEM

    def context(self) -> ssl.SSLContext:
        """Return what new sessions begin with.

        Raises ValueError if the key is another one's, or one that no TLS client would take.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_ciphers(CIPHERS)
        context.set_alpn_protocols(list(ALPN))
        # ssl reads nothing but files, and a file of secrets is to be nowhere but in memory.
        try:
            with _memory_file(self.chain.pem) as chain, _memory_file(self.key) as key:
                context.load_cert_chain(_path(chain.fileno()), _path(key.fileno()))
        except ssl.SSLError as error:
            if error.reason in _ANOTHER_KEY:
                raise ValueError("the key is not that of the certificate") from None
            raise ValueError(f"OpenSSL does not take it: {error.reason}") from None
        except OSError as error:  # there are no descriptors, for instance
            raise ValueError(f"cannot be loaded: {error.strerror}") from None
        return context


def read_chain(pem: str) -> Chain:
    """Read certificates, the server's own first. Raises ValueError with the reason."""
    # Only here: tens of milliseconds for those who have no TLS.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415

    try:
        first = x509.load_pem_x509_certificates(pem.encode())[0]
    except ValueError:
        raise ValueError(_NOT_IN_PEM.format("certificate")) from None
    names: list[str] = []
    try:
        found = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += found.get_values_for_type(x509.DNSName)
        names += map(str, found.get_values_for_type(x509.IPAddress))
    except (
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
        ValueError,
    ):
        pass  # then no browser takes it, but others may
    try:
        key = first.public_key()
    except (UnsupportedAlgorithm, ValueError):
        raise ValueError("holds a certificate with a key of an unknown kind") from None
    bits = key.key_size if isinstance(key, rsa.RSAPublicKey) else 0
    return Chain(pem, tuple(names), first.not_valid_after_utc.timestamp(), bits)


def read_key(pem: str) -> str:
    """Look at a private key, and return it. Raises ValueError with the reason."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    try:
        serialization.load_pem_private_key(pem.encode(), None)
    except TypeError:
        raise ValueError("is encrypted, and nobody is there to type a passphrase") from None
    except UnsupportedAlgorithm:
        raise ValueError("holds a key of an unknown kind") from None
    except ValueError:
        raise ValueError(_NOT_IN_PEM.format("private key")) from None
    return pem


def hosts_of(chain: Chain, hosts: list[str]) -> list[str]:
    """Return as which hosts clients should know a server that is at *hosts*.

    Those of them that the certificate is for; else the first name in it; else all the same.
    """
    names = [name for name in chain.names if "*" not in name and not _is_address(name)]
    return [host for host in hosts if host in chain.names] or names[:1] or hosts


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _memory_file(text: str) -> IO[bytes]:
    file = os.fdopen(os.memfd_create("pem"), "w+b")
    file.write(text.encode())
    file.flush()
    return file


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


class TlsSession:
    """The server's side of one connection.

    What arrives goes to :meth:`feed`, some of it at a time; then comes :meth:`shake_hands` until it
    says that this is done, and :meth:`read_into` as long as there is something. What is to leave is
    in :meth:`output` after each of these. All raise ``ssl.SSLError`` if the client breaks the
    protocol; an alert that tells it so is then in the output.
    """

    __slots__ = ("_header", "_incoming", "_outgoing", "_rest", "_session")

    def __init__(self, context: ssl.SSLContext) -> None:
        """Wait for a client's hello."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._header = b""  # the start of a record's
        self._rest = 0  # bytes that are still to come of a record

    def feed(self, received: memoryview) -> int:
        """Take some of what has arrived; return how many bytes. What they hold is to be read first.

        That is up to the end of RECORDS_AT_ONCE records.
        """
        at, end, records = 0, len(received), 0
        while at < end and records < RECORDS_AT_ONCE:
            if not self._rest:
                more = received[at : at + _RECORD_HEADER - len(self._header)]
                self._header += bytes(more)
                at += len(more)
                if len(self._header) < _RECORD_HEADER:
                    break
                self._rest = int.from_bytes(self._header[3:], "big")
                self._header = b""
            step = min(self._rest, end - at)
            at += step
            self._rest -= step
            records += not self._rest
        self._incoming.write(received[:at])
        return at

    def shake_hands(self) -> bool:
        """Go on with the handshake; return whether it is done. May take a millisecond or two."""
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def read_into(self, buffer: memoryview) -> int | None:
        """Decrypt one record; return how many bytes it had, or None if none is complete.

        0 is the end: the client has closed its side.
        """
        if not self._incoming.pending and not self._session.pending():
            return None
        try:
            return self._session.read(LARGEST_RECORD, buffer)  # type: ignore[return-value]
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return 0

    def seal(self, messages: list[bytes]) -> bytes:
        """Encrypt, and return what is to leave.

        Each message has a record of its own, or several if it is longer than one: there are clients
        (coturn's, for one) that take what is in a record for one message.
        """
        write = self._session.write
        for message in messages:
            write(message)
        return self._outgoing.read()

    def output(self) -> bytes:
        """Return what is to leave beside that: handshakes, alerts, tickets."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def end(self) -> bytes:
        """Say goodbye (close_notify), and return what is to leave."""
        with suppress(ssl.SSLError):  # it waits for the client's goodbye; we do not
            self._session.unwrap()
        return self._outgoing.read()

    @property
    def version(self) -> str | None:
        """Which version was agreed on, such as ``TLSv1.3``; None before."""
        return self._session.version()
