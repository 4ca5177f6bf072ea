"""What protects a message, over the bytes as they travel. RFC 8489 §14.5 to §14.7."""

import hashlib
import hmac
import zlib
from typing import Final

from relay.stun.const import HEADER_SIZE, PasswordAlgorithm

INTEGRITY_SIZE: Final = 24  # MESSAGE-INTEGRITY with its header: 4 + 20
INTEGRITY_SHA256_SIZE: Final = 36  # 4 + 32; what is received may be cut to 16 and more
FINGERPRINT_SIZE: Final = 8  # 4 + 4
_TLV_SIZE: Final = 4
_FINGERPRINT_XOR: Final = 0x5354554E  # "STUN"


def long_term_key(
    username: str,
    realm: str,
    password: str,
    algorithm: PasswordAlgorithm = PasswordAlgorithm.MD5,
) -> bytes:
    """Return the key of a long-term credential, of 16 bytes or 32. RFC 8489 §9.2.2, §18.5.1."""
    text = f"{username}:{realm}:{password}".encode()
    if algorithm == PasswordAlgorithm.SHA_256:
        return hashlib.sha256(text).digest()
    return hashlib.md5(text, usedforsecurity=False).digest()


def userhash(username: str, realm: str) -> bytes:
    """Return what stands for a username that is not to be seen, 32 bytes. RFC 8489 §14.4."""
    return hashlib.sha256(f"{username}:{realm}".encode()).digest()


def integrity(message: bytes | bytearray, key: bytes) -> bytes:
    """Return the HMAC-SHA1 for a MESSAGE-INTEGRITY that is to follow *message*.

    The header's length is taken to reach the end of that attribute, whatever it
    says: "the length MUST be set to point to the end of MESSAGE-INTEGRITY".
    """
    return hmac.digest(key, _up_to(message, INTEGRITY_SIZE), "sha1")


def integrity_sha256(
    message: bytes | bytearray, key: bytes, size: int = INTEGRITY_SHA256_SIZE
) -> bytes:
    """Return the HMAC-SHA256 for a MESSAGE-INTEGRITY-SHA256 of *size* bytes with its header."""
    return hmac.digest(key, _up_to(message, size), "sha256")[: size - _TLV_SIZE]


def verify(message: bytes, offset: int, key: bytes) -> bool:
    """Tell, in constant time, if the MESSAGE-INTEGRITY at *offset* was made with *key*."""
    received = message[offset + _TLV_SIZE : offset + INTEGRITY_SIZE]
    return hmac.compare_digest(received, integrity(message[:offset], key))


def verify_sha256(message: bytes, offset: int, key: bytes) -> bool:
    """Tell the same of the MESSAGE-INTEGRITY-SHA256 at *offset*, which may be cut."""
    size = _TLV_SIZE + int.from_bytes(message[offset + 2 : offset + _TLV_SIZE], "big")
    received = message[offset + _TLV_SIZE : offset + size]
    return hmac.compare_digest(received, integrity_sha256(message[:offset], key, size))


def fingerprint(message: bytes | bytearray | memoryview) -> int:
    """Return the FINGERPRINT of *message*, whose length field counts that attribute already."""
    return zlib.crc32(message) ^ _FINGERPRINT_XOR


def _up_to(message: bytes | bytearray, size: int) -> bytearray:
    """Return *message* with the length that it has once *size* bytes more are behind it."""
    covered = bytearray(message)
    covered[2:4] = (len(message) - HEADER_SIZE + size).to_bytes(2, "big")
    return covered
