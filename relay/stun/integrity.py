"""MESSAGE-INTEGRITY and FINGERPRINT, over the bytes as they travel. RFC 8489 §14.5, §14.7."""

import hashlib
import hmac
import zlib
from typing import Final

INTEGRITY_SIZE: Final = 24  # the attribute with its header: 4 + 20
FINGERPRINT_SIZE: Final = 8  # 4 + 4
_HEADER_SIZE: Final = 20
_FINGERPRINT_XOR: Final = 0x5354554E  # "STUN"


def long_term_key(username: str, realm: str, password: str) -> bytes:
    """Return the 16-byte key of a long-term credential. RFC 8489 §9.2.2."""
    return hashlib.md5(f"{username}:{realm}:{password}".encode(), usedforsecurity=False).digest()


def integrity(message: bytes | bytearray, key: bytes) -> bytes:
    """Return the HMAC-SHA1 for a MESSAGE-INTEGRITY that is to follow *message*.

    The header's length is taken to reach the end of that attribute, whatever it
    says: "the length MUST be set to point to the end of MESSAGE-INTEGRITY".
    """
    covered = bytearray(message)
    covered[2:4] = (len(message) - _HEADER_SIZE + INTEGRITY_SIZE).to_bytes(2, "big")
    return hmac.digest(key, covered, "sha1")


def verify(message: bytes, integrity_offset: int, key: bytes) -> bool:
    """Tell, in constant time, if the MESSAGE-INTEGRITY at that offset was made with *key*."""
    received = message[integrity_offset + 4 : integrity_offset + INTEGRITY_SIZE]
    return hmac.compare_digest(received, integrity(message[:integrity_offset], key))


def fingerprint(message: bytes | bytearray | memoryview) -> int:
    """Return the FINGERPRINT of *message*, whose length field counts that attribute already."""
    return zlib.crc32(message) ^ _FINGERPRINT_XOR
