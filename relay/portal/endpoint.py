"""Where the portal takes relays in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlencode, urlsplit

_SCHEMES: Final = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the portal takes relays in."""

    url: str
    host: str
    port: int
    is_secure: bool


def endpoint(api_url: str, parameters: Mapping[str, str | int | None]) -> Endpoint:
    """Find the websocket of the portal at *api_url*; parameters that are None are left out.

    Raises ValueError with the reason if *api_url* is no URL to connect to.
    """
    split = urlsplit(api_url)
    if split.scheme not in _SCHEMES:
        raise ValueError("does not begin with wss://, ws://, https:// or http://")
    if not split.hostname or split.username is not None or split.query or split.fragment:
        raise ValueError("is not just a host, with perhaps a port and a path")
    is_secure = _SCHEMES[split.scheme] == "wss"
    port = split.port  # ValueError if it is no port
    if port == 0:
        raise ValueError("names port 0")
    if port is None:
        port = 443 if is_secure else 80
    query = urlencode({name: value for name, value in parameters.items() if value is not None})
    path = split.path.rstrip("/") + "/relay/websocket"
    url = SplitResult(_SCHEMES[split.scheme], split.netloc, path, query, "").geturl()
    return Endpoint(url, split.hostname, port, is_secure)
