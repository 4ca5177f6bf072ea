"""Which server, and who asks it: URIs of RFC 7064 and RFC 7065, and credentials of every kind."""

import json
import re
import time
from dataclasses import dataclass
from typing import Any, Final

from relay.config import parsing
from relay.probe.client import Credential
from relay.turn.users import mint, mint_rest

SCHEMES: Final = ("stun", "stuns", "turn", "turns")
TRANSPORTS: Final = ("udp", "tcp")
DEFAULT_PORT: Final = 3478
DEFAULT_TLS_PORT: Final = 5349
MINTED_FOR: Final = 3600  # seconds for which a credential is good that is made of a secret
_URI: Final = re.compile(
    r"(?P<scheme>[a-zA-Z]+):(?://)?(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[^\[\]:/?#@\s]+))"
    r"(?::(?P<port>\d+))?(?:\?transport=(?P<transport>\w+))?"
)


class TargetError(ValueError):
    """What was given does not name a server, or a user; the text says which part."""


@dataclass(frozen=True, slots=True)
class Target:
    """One server, over one transport."""

    scheme: str  # stun, stuns, turn or turns
    host: str  # a name or an address, without brackets
    port: int
    transport: str  # udp, tcp or tls

    @property
    def relays(self) -> bool:
        """Whether it is asked for more than the own address."""
        return self.scheme.startswith("turn")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        suffix = "" if not self.relays else f"?transport={self.transport.replace('tls', 'tcp')}"
        return f"{self.scheme}:{host}:{self.port}{suffix}"


def parse_uri(text: str) -> Target:
    """Read ``turn:host:port?transport=udp`` and its like. Raises TargetError.

    Without a transport it is UDP, or for ``turns:`` and ``stuns:`` TLS over TCP.
    """
    matched = _URI.fullmatch(text)
    if matched is None:
        raise TargetError(f"{text!r} is no URL such as turn:turn.example.org:3478?transport=udp")
    scheme = matched["scheme"].lower()
    if scheme not in SCHEMES:
        raise TargetError(f"{text!r}: {scheme} is none of {', '.join(SCHEMES)}")
    is_secure = scheme.endswith("s")
    transport = (matched["transport"] or ("tcp" if is_secure else "udp")).lower()
    if transport not in TRANSPORTS:
        raise TargetError(f"{text!r}: transport {transport} is neither udp nor tcp")
    if is_secure and transport == "udp":
        raise TargetError(f"{text!r} is DTLS, which is not spoken here")
    port = int(matched["port"] or (DEFAULT_TLS_PORT if is_secure else DEFAULT_PORT))
    if not 0 < port < 1 << 16:
        raise TargetError(f"{text!r}: {port} is no port")
    return Target(
        scheme, matched["ipv6"] or matched["host"], port, "tls" if is_secure else transport
    )


def read_ice_servers(text: str) -> list[tuple[str, Credential | None]]:
    """Return URLs and their credentials from JSON. Raises TargetError.

    That is what ``--mint`` prints, an RTCIceServer, a list of them, or an object with such a list
    under ``iceServers``.
    """
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise TargetError(f"the ICE servers are no JSON: {error}") from None
    if isinstance(parsed, dict) and "iceServers" in parsed:
        parsed = parsed["iceServers"]
    servers = parsed if isinstance(parsed, list) else [parsed]
    found = [each for server in servers for each in _urls_of(server)]
    if not found:
        raise TargetError("there is no URL among the ICE servers")
    return found


def from_rest_secret(secrets: str, name: str) -> Credential:
    """Make a credential of the TURN REST convention of the first secret in a file's text.

    Raises TargetError.
    """
    try:
        secret = parsing.rest_secrets(secrets)[0]
    except ValueError as error:
        raise _no_secret(error) from None
    return Credential(*mint_rest(_expiry(), name, secret))


def from_firezone_secret(text: str, salt: str) -> Credential:
    """Make a credential of Firezone's kind of the secret in a file's text. Raises TargetError."""
    try:
        secret = parsing.secret(text)
    except ValueError as error:
        raise _no_secret(error) from None
    return Credential(*mint(_expiry(), salt, secret))


def expired_since(credential: Credential) -> float | None:
    """Return for how many seconds a credential has been expired, if its name tells so."""
    expiry = credential.username.partition(":")[0]
    if not (expiry.isascii() and expiry.isdigit()) or len(expiry) < len("1000000000"):
        return None
    late = time.time() - int(expiry)
    return late if late > 0 else None


def _no_secret(error: ValueError) -> TargetError:
    return TargetError(f"no secret can be read from the file: it {error}")


def _expiry() -> int:
    return int(time.time()) + MINTED_FOR


def _urls_of(server: Any) -> list[tuple[str, Credential | None]]:  # noqa: ANN401  # of JSON
    if not isinstance(server, dict) or "urls" not in server:
        raise TargetError(f"an ICE server has no urls: {server!r}")
    urls = server["urls"] if isinstance(server["urls"], list) else [server["urls"]]
    username, password = server.get("username"), server.get("credential")
    if not all(isinstance(each, str) for each in urls):
        raise TargetError(f"a URL is no text: {urls!r}")
    if username is None or password is None:
        return [(url, None) for url in urls]
    return [(url, Credential(str(username), str(password))) for url in urls]
