"""Certificates for servers of tests and benchmarks, and the authority that signs them."""

import ipaddress
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def new_key(kind: str = "ecdsa") -> PrivateKey:
    """Return a key: ``ecdsa``, or ``rsa-2048`` and the like."""
    if kind == "ecdsa":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, int(kind.removeprefix("rsa-")))


_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


class Certificate:
    """A certificate with its key, as PEM."""

    def __init__(self, certificate: x509.Certificate, key: PrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @cached_property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @cached_property
    def key(self) -> str:
        return self.encode_key(serialization.NoEncryption())

    def encode_key(self, encryption: serialization.KeySerializationEncryption) -> str:
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return self._key.private_bytes(*pem, encryption).decode()

    @property
    def expires(self) -> float:
        return self.certificate.not_valid_after_utc.timestamp()

    def write_to(self, folder: Path, name: str = "server") -> tuple[Path, Path]:
        """Write certificate and key; return both paths. Whoever the relay becomes can read them."""
        chain, key = folder / f"{name}.crt", folder / f"{name}.key"
        chain.write_text(self.pem)
        key.write_text(self.key)
        return chain, key


class Authority:
    """Signs certificates."""

    def __init__(self) -> None:
        self._key = new_key()
        self._name = _name("tests' authority")
        self._own = self._sign(
            self._name,
            self._key,
            x509.BasicConstraints(ca=True, path_length=0),
            timedelta(days=3650),
        )

    @property
    def pem(self) -> str:
        return self._own.public_bytes(serialization.Encoding.PEM).decode()

    def issue(
        self, *names: str, lasts: timedelta = timedelta(days=90), kind: str = "ecdsa"
    ) -> Certificate:
        """Return a certificate for DNS names and IP addresses that is good from an hour ago."""
        key = new_key(kind)
        certificate = self._sign(
            _name(names[0] if names else "nobody"),
            key,
            x509.BasicConstraints(ca=False, path_length=None),
            lasts,
            names,
        )
        return Certificate(certificate, key)

    def _sign(
        self,
        subject: x509.Name,
        key: PrivateKey,
        constraints: x509.BasicConstraints,
        lasts: timedelta,
        names: Iterable[str] = (),
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, now + lasts) - timedelta(hours=1))
            .not_valid_after(now + lasts)
            .add_extension(constraints, critical=True)
            # Without these, Python from 3.13 on does not believe it (VERIFY_X509_STRICT).
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False
            )
        )
        if constraints.ca:
            builder = builder.add_extension(_SIGNS_CERTIFICATES, critical=True)
        if not constraints.ca:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
            builder = builder.add_extension(usage, critical=False)
        alternatives = [_alternative(name) for name in names]
        if alternatives:
            named = x509.SubjectAlternativeName(alternatives)
            builder = builder.add_extension(named, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def without_checks() -> ssl.SSLContext:
    """Return a context for clients that believe every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
