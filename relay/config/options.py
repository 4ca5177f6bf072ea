"""Every option, one row each: its names, its default, how its text is read, what it does.

The command line, the environment and the configuration file all speak text, so a value is
read by the same function wherever it comes from.
"""

import errno
import os
import re
import select
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_network
from typing import Any, Final

from relay.observe.logs import FORMATS, parse_levels
from relay.portal.endpoint import endpoint
from relay.stun.address import Address, unpack_host
from relay.turn.channeldata import RFC5766_NUMBERS, RFC8656_NUMBERS

DEFAULT_FILE: Final = "/etc/firezone/relay.conf"

LONGEST_FILE: Final = 1 << 20  # bytes
PATIENCE: Final = 10.0  # seconds that the writer of a pipe may take


@dataclass(frozen=True, slots=True)
class Option:
    """One option. *parse* turns its text into a value, or raises ValueError with the reason."""

    name: str  # --name on the command line, "name = value" in the file
    variable: str
    parse: Callable[[str], Any]
    help: str
    group: str
    field: str  # of Config, where its value is stored
    default: str | None = None  # None: unset
    metavar: str | None = None  # None: a switch, with a --no- form
    repeatable: bool = False
    reloads: bool = False  # SIGHUP changes it in the running relay
    in_file: bool = False  # its text names a file, and *parse* gets what is in there

    @property
    def dest(self) -> str:
        """The attribute under which the parsers keep its text."""
        return self.name.replace("-", "_")


def _ipv4(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        raise ValueError("not an IPv4 address") from None


def _ipv6(text: str) -> str:
    try:
        address = IPv6Address(text)
    except AddressValueError:
        raise ValueError("not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError("an address with a scope cannot be given to others")
    return unpack_host(address.packed)


def _public(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Read an address that others can send to."""

    def read(text: str) -> str:
        host = parse(text)
        address = IPv6Address(host) if ":" in host else IPv4Address(host)
        if address.is_unspecified or address.is_multicast:
            raise ValueError("not an address that a peer could send to")
        return host

    return read


def _number(lowest: int, highest: int | None, what: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError(f"not {what}")
        number = int(text)
        if number < lowest or (highest is not None and number > highest):
            raise ValueError(f"not {what}")
        return number

    return read


def _cidrs(text: str) -> tuple[str, ...]:
    """Read prefixes, separated by commas or white space."""
    prefixes = []
    for word in re.split(r"[,\s]+", text.strip(", \t")):
        try:
            prefixes.append(str(ip_network(word)))
        except ValueError as error:
            raise ValueError(f"not a prefix such as 10.0.0.0/8: {error}") from None
    return tuple(prefixes)


def _switch(text: str) -> bool:
    word = text.lower()
    if word in {"true", "yes", "on", "1"}:
        return True
    if word in {"false", "no", "off", "0"}:
        return False
    raise ValueError("neither true nor false")


def _choice(**choices: object) -> Callable[[str], Any]:
    def read(text: str) -> object:
        if text not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return choices[text]

    return read


def _software(text: str) -> str:
    if not 0 < len(text.encode()) <= 763 or text != text.strip():
        raise ValueError("empty, or longer than 763 bytes, or with blanks at its ends")
    return text


def _secret(text: str) -> str:
    """Read the shared secret: one line of printable text."""
    secret = text.strip()
    if not secret:
        raise ValueError("is empty")
    if not secret.isascii():
        raise ValueError("holds no plain ASCII text")
    if not secret.isprintable() or " " in secret:
        raise ValueError("holds more than one word")
    return secret


def parse_token(text: str) -> str:
    """Return a token without any white space. Raises ValueError, which does not quote it."""
    token = "".join(text.split())
    if not token:
        raise ValueError("is empty")
    if not token.isascii() or not token.isprintable():
        raise ValueError("holds characters that no token has")
    return token


def read_file(path: str, *, again: bool) -> bytes:
    """Return what is in a file, or comes out of a pipe. Raises ValueError with the reason.

    *again*: the process has others to serve by now, so only a regular file will do.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if again and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("is no regular file and cannot be read again")
            deadline = time.monotonic() + PATIENCE
            readable = select.poll()
            readable.register(file, select.POLLIN)
            content = b""
            while len(content) <= LONGEST_FILE:
                if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise ValueError(f"cannot be read: its end did not come within {PATIENCE:g} s")
                part = file.read(LONGEST_FILE + 1 - len(content))
                if part == b"":
                    return content
                content += part or b""  # None: somebody else has read it
    except OSError as error:
        reason = error.strerror
        if again and error.errno == errno.EACCES and os.geteuid() == 0:
            reason = f"{reason}; privileges have been given up since the start"
        raise ValueError(f"cannot be read: {reason}") from None
    raise ValueError(f"is too long: more than {LONGEST_FILE} bytes")


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, even if it is a pipe that nobody writes to yet."""
    return os.open(path, flags | os.O_NONBLOCK)


def _http_address(text: str) -> Address | None:
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not is_ipv6):
        raise ValueError("neither ADDRESS:PORT, [IPV6]:PORT nor off")
    return (_ipv6(host[1:-1]) if is_ipv6 else _ipv4(host)), _port(port)


def _api_url(text: str) -> str:
    endpoint(text, {})
    return text


def _name(text: str) -> str:
    if not 0 < len(text) <= 255 or text != text.strip():
        raise ValueError("empty, or longer than 255 characters, or with blanks at its ends")
    return text


_port = _number(1, 65535, "a port from 1 to 65535")

ADDRESSES: Final = "Say where clients and peers reach it"
PORTAL: Final = "Join Firezone's portal"
CREDENTIALS: Final = "Make credentials"
PEERS: Final = "Decide which peers may be reached"
LIMITS: Final = "Limit what clients and strangers may take"
WATCHING: Final = "See how it is doing"
RUNNING: Final = "Confine it, and stop it"
SPECIAL: Final = "Serve special cases, and test"

OPTIONS: Final = (
    Option(
        "public-ip4-addr",
        "PUBLIC_IP4_ADDR",
        _public(_ipv4),
        "IPv4 address at which clients and peers reach this relay (default, without "
        "a token and if neither is given: what the routing table says, or loopback)",
        ADDRESSES,
        metavar="ADDR",
        field="public_ip4",
    ),
    Option(
        "public-ip6-addr",
        "PUBLIC_IP6_ADDR",
        _public(_ipv6),
        "the same for IPv6",
        ADDRESSES,
        metavar="ADDR",
        field="public_ip6",
    ),
    Option(
        "bind-ip4-addr",
        "BIND_IP4_ADDR",
        _ipv4,
        "IPv4 address to listen on",
        ADDRESSES,
        default="0.0.0.0",  # noqa: S104
        metavar="ADDR",
        field="bind_ip4",
    ),
    Option(
        "bind-ip6-addr",
        "BIND_IP6_ADDR",
        _ipv6,
        "IPv6 address to listen on",
        ADDRESSES,
        default="::",
        metavar="ADDR",
        field="bind_ip6",
    ),
    Option(
        "listen-port",
        "LISTEN_PORT",
        _port,
        "UDP port for clients",
        ADDRESSES,
        default="3478",
        metavar="PORT",
        field="listen_port",
    ),
    Option(
        "lowest-port",
        "LOWEST_PORT",
        _port,
        "first port of the range for allocations",
        ADDRESSES,
        default="49152",
        metavar="PORT",
        field="lowest_port",
    ),
    Option(
        "highest-port",
        "HIGHEST_PORT",
        _port,
        "last port of that range, included",
        ADDRESSES,
        default="65535",
        metavar="PORT",
        field="highest_port",
    ),
    Option(
        "token-file",
        "FIREZONE_TOKEN_FILE",
        parse_token,
        "file with the token for Firezone's portal; it can also be in FIREZONE_TOKEN, itself or "
        "as a path. With a token the relay serves once the portal says so, without one at once",
        PORTAL,
        metavar="FILE",
        field="token",
        in_file=True,
    ),
    Option(
        "api-url",
        "FIREZONE_API_URL",
        _api_url,
        "where the portal is",
        PORTAL,
        default="wss://api.firezone.dev",
        metavar="URL",
        field="api_url",
    ),
    Option(
        "name",
        "FIREZONE_NAME",
        _name,
        "how the portal is to call this relay",
        PORTAL,
        metavar="NAME",
        field="name",
    ),
    Option(
        "relay-secret-file",
        "RELAY_SECRET_FILE",
        _secret,
        "file with the secret that credentials are made from, so that they outlive a restart "
        "(default: a new secret at every start)",
        CREDENTIALS,
        metavar="FILE",
        field="relay_secret",
        in_file=True,
    ),
    Option(
        "allow-peer",
        "ALLOW_PEER",
        _cidrs,
        "let clients reach peers in this prefix, though it is not public; repeatable, or a list "
        "with commas",
        PEERS,
        metavar="CIDR",
        field="allow_peers",
        repeatable=True,
        reloads=True,
    ),
    Option(
        "deny-peer",
        "DENY_PEER",
        _cidrs,
        "do not let clients reach peers in this prefix; repeatable, or a list with commas; of "
        "several prefixes the longest wins",
        PEERS,
        metavar="CIDR",
        field="deny_peers",
        repeatable=True,
        reloads=True,
    ),
    Option(
        "one-allocation-per-username",
        "ONE_ALLOCATION_PER_USERNAME",
        _switch,
        "a client that comes back from another address takes over: what its username had "
        "allocated there ends (default: on with a portal, else off)",
        LIMITS,
        field="one_allocation_per_username",
        reloads=True,
    ),
    Option(
        "max-allocations",
        "MAX_ALLOCATIONS",
        _number(1, None, "a number from 1 up"),
        "most allocations at a time (default: what ports and descriptors allow)",
        LIMITS,
        metavar="NUMBER",
        field="max_allocations",
        reloads=True,
    ),
    Option(
        "max-allocations-per-username",
        "MAX_ALLOCATIONS_PER_USERNAME",
        _number(1, None, "a number from 1 up"),
        "most allocations of one username at a time (default: no limit)",
        LIMITS,
        metavar="NUMBER",
        field="max_allocations_per_username",
        reloads=True,
    ),
    Option(
        "max-allocations-per-ip",
        "MAX_ALLOCATIONS_PER_IP",
        _number(1, None, "a number from 1 up"),
        "most allocations of clients at one address, of IPv6 in one /64, at a time; everyone "
        "behind one NAT has one address (default: no limit)",
        LIMITS,
        metavar="NUMBER",
        field="max_allocations_per_ip",
        reloads=True,
    ),
    Option(
        "unauthenticated-rate",
        "UNAUTHENTICATED_RATE",
        _number(0, 10**9, "a number of answers per second"),
        "most answers per second to requests that prove no credential; what comes beyond that, "
        "and beyond a burst, is met with silence; 0 is no limit",
        LIMITS,
        default="4000",
        metavar="RATE",
        field="unauthenticated_rate",
        reloads=True,
    ),
    Option(
        "unauthenticated-rate-per-prefix",
        "UNAUTHENTICATED_RATE_PER_PREFIX",
        _number(0, 10**9, "a number of answers per second"),
        "the same for each /24 of IPv4 and /56 of IPv6",
        LIMITS,
        default="2000",
        metavar="RATE",
        field="unauthenticated_rate_per_prefix",
        reloads=True,
    ),
    Option(
        "log-format",
        "LOG_FORMAT",
        _choice(**{name: name for name in FORMATS}),
        "human or json",
        WATCHING,
        default="human",
        metavar="FORMAT",
        field="log_format",
        reloads=True,
    ),
    Option(
        "log-level",
        "LOG_LEVEL",
        parse_levels,
        "debug, info, warning or error; per logger: info,relay.turn=debug",
        WATCHING,
        default="info",
        metavar="LEVELS",
        field="log_levels",
        reloads=True,
    ),
    Option(
        "http-addr",
        "HEALTH_CHECK_ADDR",
        _http_address,
        "where to serve /healthz, /readyz and /metrics over HTTP: ADDRESS:PORT, [IPV6]:PORT or off",
        WATCHING,
        default="127.0.0.1:8080",
        metavar="ADDR",
        field="http_addr",
    ),
    Option(
        "harden",
        "HARDEN",
        _choice(**{mode: mode for mode in ("auto", "require", "off")}),
        "give up privileges at start: auto warns of what cannot be given up, require ends instead, "
        "off keeps them",
        RUNNING,
        default="auto",
        metavar="MODE",
        field="harden",
    ),
    Option(
        "drain-timeout",
        "DRAIN_TIMEOUT",
        _number(0, 86400, "a number of seconds, at most 86400"),
        "how long to go on relaying after SIGTERM",
        RUNNING,
        default="30",
        metavar="SECONDS",
        field="drain_timeout",
        reloads=True,
    ),
    Option(
        "channel-range",
        "CHANNEL_RANGE",
        _choice(rfc8656=RFC8656_NUMBERS, rfc5766=RFC5766_NUMBERS),
        "channel numbers: rfc8656 (0x4000-0x4FFF), or rfc5766 (0x4000-0x7FFF) for older clients",
        SPECIAL,
        default="rfc8656",
        metavar="RFC",
        field="channel_numbers",
    ),
    Option(
        "offload",
        "OFFLOAD",
        _choice(auto=True, off=False),
        "auto: read and send trains of datagrams at once where the kernel can (UDP_GRO, "
        "UDP_SEGMENT); off: one by one",
        SPECIAL,
        default="auto",
        metavar="WHEN",
        field="offload",
    ),
    Option(
        "software",
        "SOFTWARE",
        _software,
        "text of a SOFTWARE attribute in every answer",
        SPECIAL,
        metavar="TEXT",
        field="software",
        reloads=True,
    ),
    Option(
        "rng-seed",
        "RNG_SEED",
        _number(0, None, "a number"),
        "make everything random predictable, for tests",
        SPECIAL,
        metavar="NUMBER",
        field="rng_seed",
    ),
)
