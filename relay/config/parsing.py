"""From the text of an option to its value. All raise ValueError with the reason.

The command line, the environment and the configuration file all speak text, so a value is
read by the same function wherever it comes from.
"""

import logging
import pwd
import re
from collections.abc import Callable, Iterator
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_network
from typing import Any, Final

from relay.portal.endpoint import endpoint
from relay.stun.address import Address, unpack_host
from relay.turn.users import KEY_SIZES, Password

LOG_LEVELS: Final = ("debug", "info", "warning", "error")


def ipv4(text: str) -> str:
    """Read an IPv4 address."""
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        raise ValueError("not an IPv4 address") from None


def ipv6(text: str) -> str:
    """Read an IPv6 address without a scope."""
    try:
        address = IPv6Address(text)
    except AddressValueError:
        raise ValueError("not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError("an address with a scope cannot be given to others")
    return unpack_host(address.packed)


def public(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Read an address that others can send to."""

    def read(text: str) -> str:
        host = parse(text)
        address = IPv6Address(host) if ":" in host else IPv4Address(host)
        if address.is_unspecified or address.is_multicast:
            raise ValueError("not an address that a peer could send to")
        return host

    return read


def number(lowest: int, highest: int | None, what: str) -> Callable[[str], int]:
    """Read a decimal number from *lowest* to *highest*, both included."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError(f"not {what}")
        value = int(text)
        if value < lowest or (highest is not None and value > highest):
            raise ValueError(f"not {what}")
        return value

    return read


port = number(1, 65535, "a port from 1 to 65535")


def cidrs(text: str) -> tuple[str, ...]:
    """Read prefixes, separated by commas or white space."""
    prefixes = []
    for word in re.split(r"[,\s]+", text.strip(", \t")):
        try:
            prefixes.append(str(ip_network(word)))
        except ValueError as error:
            raise ValueError(f"not a prefix such as 10.0.0.0/8: {error}") from None
    return tuple(prefixes)


def devices(text: str) -> tuple[str, ...]:
    """Read names of network devices, separated by commas or white space."""
    names = tuple(re.split(r"[,\s]+", text.strip(", \t")))
    for name in names:
        if not re.fullmatch(r"[!-.0-9;-~]{1,15}", name, re.ASCII) or name in {".", ".."}:
            raise ValueError("not the name of a network device such as eth0")
    return names


def switch(text: str) -> bool:
    """Read yes or no, in one of their spellings."""
    word = text.lower()
    if word in {"true", "yes", "on", "1"}:
        return True
    if word in {"false", "no", "off", "0"}:
        return False
    raise ValueError("neither true nor false")


def choice(**choices: object) -> Callable[[str], Any]:
    """Read one of some words, each of which stands for a value."""

    def read(text: str) -> object:
        if text not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return choices[text]

    return read


def software(text: str) -> str:
    """Read the text of a SOFTWARE attribute. RFC 8489 §14.14."""
    if not 0 < len(text.encode()) <= 763 or text != text.strip():
        raise ValueError("empty, or longer than 763 bytes, or with blanks at its ends")
    return text


def secret(text: str) -> str:
    """Read the shared secret: one line of printable text."""
    word = text.strip()
    if not word:
        raise ValueError("is empty")
    if not word.isascii():
        raise ValueError("holds no plain ASCII text")
    if not word.isprintable() or " " in word:
        raise ValueError("holds more than one word")
    return word


MOST_SECRETS: Final = 8  # a wrong password is held against each of them


def rest_secrets(text: str) -> tuple[str, ...]:
    """Read the secrets of the TURN REST convention: one per line; ``#`` begins a comment line."""
    found: list[str] = []
    for number, line in _lines(text):
        try:
            word = secret(line)
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
        if word not in found:
            found.append(word)
    if not found:
        raise ValueError("holds no secret")
    if len(found) > MOST_SECRETS:
        raise ValueError(f"holds more than {MOST_SECRETS} secrets")
    return tuple(found)


def users(text: str) -> dict[str, Password]:
    """Read static users: ``name:password`` or ``name:0xKEY`` per line, the key in hexadecimal.

    ``#`` begins a comment line. No ValueError quotes a password.
    """
    found: dict[str, Password] = {}
    for number, line in _lines(text):
        name, colon, written = line.partition(":")
        problem = None
        if "\ufffd" in line:
            problem = "is not UTF-8"
        elif not line.isprintable():
            problem = "holds control characters"
        elif not colon:
            problem = "is not name:password"
        elif not name or len(name.encode()) > LONGEST_USERNAME:
            problem = f"has a name that is empty, or longer than {LONGEST_USERNAME} bytes"
        elif not written:
            problem = "has no password"
        elif name in found:
            problem = "is of a user that there is already"
        if problem:
            raise ValueError(f"line {number} {problem}")
        try:
            found[name] = _password(written)
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
    return found


def _password(written: str) -> Password:
    """Read a password, or a key, which begins with 0x."""
    if not written.startswith("0x"):
        return written
    digits = written[2:]
    if not re.fullmatch("[0-9A-Fa-f]*", digits) or len(digits) not in {2 * n for n in KEY_SIZES}:
        sizes = " or ".join(str(2 * size) for size in KEY_SIZES)
        raise ValueError(f"has a key that is not {sizes} hexadecimal digits")
    return bytes.fromhex(digits)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Return the lines in which something is said, with their numbers.

    A line ends where an editor says so, not at all that Unicode has: that is an error in it.
    """
    for number, line in enumerate(re.split("\r\n?|\n", text.removeprefix("\ufeff")), 1):
        said = line.strip(" \t")
        if said and not said.startswith("#"):
            yield number, said


LONGEST_USERNAME: Final = 508  # bytes. RFC 8489 §14.3
# A 401 to the shortest Allocate, of 28 bytes, may have 84: with a longer one it could not hold both
# realm and nonce.
LONGEST_REALM: Final = 32  # bytes


def realm(text: str) -> str:
    """Read a realm: what may stand between quotes. RFC 8489 §14.9."""
    if not 0 < len(text.encode()) <= LONGEST_REALM:
        raise ValueError(f"empty, or longer than {LONGEST_REALM} bytes")
    if text != text.strip() or not text.isprintable() or {*text} & {'"', "\\"}:
        raise ValueError("holds quotes, backslashes or control characters, or blanks at its ends")
    return text


def credential_user(text: str) -> str:
    """Read whom a credential is for: what follows the expiry in its username."""
    if not 0 < len(text.encode()) <= LONGEST_USERNAME - 21 or not text.isprintable():
        raise ValueError("empty, too long, or with control characters")
    return text


def token(text: str) -> str:
    """Read a token, without any white space. The ValueError does not quote it."""
    word = "".join(text.split())
    if not word:
        raise ValueError("is empty")
    if not word.isascii() or not word.isprintable():
        raise ValueError("holds characters that no token has")
    return word


def optional_port(text: str) -> int | None:
    """Read a port, or off."""
    return None if text == "off" else port(text)


def http_address(text: str) -> Address | None:
    """Read a numeric address with a port, or off."""
    if text == "off":
        return None
    host, colon, port_text = text.rpartition(":")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not is_ipv6):
        raise ValueError("neither ADDRESS:PORT, [IPV6]:PORT nor off")
    return (ipv6(host[1:-1]) if is_ipv6 else ipv4(host)), port(port_text)


def api_url(text: str) -> str:
    """Read the URL of a portal."""
    endpoint(text, {})
    return text


def relay_name(text: str) -> str:
    """Read the name by which the portal is to call this relay."""
    if not 0 < len(text) <= 255 or text != text.strip():
        raise ValueError("empty, or longer than 255 characters, or with blanks at its ends")
    return text


def user(text: str) -> str:
    """Read the name of a user that there is, or a number."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        try:
            pwd.getpwnam(text)
        except KeyError:
            raise ValueError("there is no such user") from None
    return text


def log_levels(text: str) -> dict[str, int]:
    """Read ``info,relay.turn=debug`` into levels by logger name; "" is the root.

    Raises ValueError for what is not a level, or not a logger name.
    """
    levels: dict[str, int] = {}
    for item in text.split(","):
        name, equals, level = (part.strip() for part in item.rpartition("="))
        if level.lower() not in LOG_LEVELS:
            raise ValueError(f"{level!r} is not one of {', '.join(LOG_LEVELS)}")
        if equals and not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", name):
            raise ValueError(f"{name!r} is not the name of a logger")
        if name in levels:
            raise ValueError(f"{item.strip()!r}: given twice")
        levels[name] = logging.getLevelName(level.upper())
    return {"": logging.INFO, **levels}
