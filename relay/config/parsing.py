"""From the text of an option to its value. All raise ValueError with the reason.

The command line, the environment and the configuration file all speak text, so a value is
read by the same function wherever it comes from.
"""

import logging
import pwd
import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_network
from typing import Any, Final

from relay.portal.endpoint import endpoint
from relay.stun.address import Address, unpack_host

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


def token(text: str) -> str:
    """Read a token, without any white space. The ValueError does not quote it."""
    word = "".join(text.split())
    if not word:
        raise ValueError("is empty")
    if not word.isascii() or not word.isprintable():
        raise ValueError("holds characters that no token has")
    return word


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
