"""The numbers of RFC 8489 and RFC 8656, each named once."""

from enum import IntEnum
from typing import Final

MAGIC_COOKIE: Final = 0x2112A442  # RFC 8489 §5
HEADER_SIZE: Final = 20  # type, length, cookie, transaction id. RFC 8489 §5
TRANSACTION_ID_SIZE: Final = 12
UDP_PROTOCOL: Final = 17  # REQUESTED-TRANSPORT for UDP. RFC 8656 §18.8

# Attribute types below this one must be understood. RFC 8489 §14
COMPREHENSION_OPTIONAL: Final = 0x8000


class Method(IntEnum):
    """RFC 8489 §18.2 and RFC 8656 §17."""

    BINDING = 0x001
    ALLOCATE = 0x003
    REFRESH = 0x004
    SEND = 0x006
    DATA = 0x007
    CREATE_PERMISSION = 0x008
    CHANNEL_BIND = 0x009


class Kind(IntEnum):
    """The message class: bits C1 (0x100) and C0 (0x010) of the type. RFC 8489 §5."""

    REQUEST = 0x000
    INDICATION = 0x010
    SUCCESS = 0x100
    ERROR = 0x110


class Family(IntEnum):
    """Address families as STUN numbers them. RFC 8489 §14.1."""

    IPV4 = 0x01
    IPV6 = 0x02


class PasswordAlgorithm(IntEnum):
    """How a long-term key is made of a password. RFC 8489 §18.5."""

    MD5 = 0x0001
    SHA_256 = 0x0002


class ErrorCode(IntEnum):
    """Codes of ERROR-CODE. RFC 8489 §14.8, RFC 8656 §19."""

    BAD_REQUEST = 400
    UNAUTHORIZED = 401
    FORBIDDEN = 403
    UNKNOWN_ATTRIBUTE = 420
    ALLOCATION_MISMATCH = 437
    STALE_NONCE = 438
    ADDRESS_FAMILY_NOT_SUPPORTED = 440
    WRONG_CREDENTIALS = 441
    UNSUPPORTED_TRANSPORT_PROTOCOL = 442
    PEER_ADDRESS_FAMILY_MISMATCH = 443
    ALLOCATION_QUOTA_REACHED = 486
    SERVER_ERROR = 500
    INSUFFICIENT_CAPACITY = 508

    @property
    def reason(self) -> str:
        """The recommended reason phrase, such as ``Stale Nonce``."""
        return _REASONS.get(self) or self.name.replace("_", " ").title()


# Where the phrase is not simply the name in title case.
_REASONS = {ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED: "Address Family not Supported"}
