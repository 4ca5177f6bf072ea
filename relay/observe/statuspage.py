"""What the relay does right now, for people: a page that keeps itself up to date.

``/`` is one file with all that it needs in it; it fetches ``/status.json`` every two seconds while
somebody looks, and ``/history.json`` once. A browser lets it load, run and ask nothing else.

None of it names a user, a client or a peer, or holds a secret. Even so it is for the operator: a
page of somebody else, in a browser that may come here, could have the name it came from resolve to
this machine, and read it (DNS rebinding). So who asks by a name hears that this is not for him:
:func:`is_ours`.
"""

import base64
import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from relay.observe.counters import InKernel
from relay.observe.exposition import Status
from relay.observe.history import PERIOD, History, Sample, to_client, to_peer
from relay.observe.recent import RECENT

PAGE: Final = (Path(__file__).parent / "page" / "index.html").read_text()

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class About:
    """What is configured, as far as it is to be shown."""

    urls: Sequence[str]  # of this relay, as clients are given them
    options: Sequence[tuple[str, str]]  # what differs from the default: name and value


def _policy() -> str:
    """Return what a browser is to let the page do, and nothing else."""
    sources = {
        name: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
        )
        for name, element in (("script-src", "script"), ("style-src", "style"))
    }
    return "; ".join(
        [
            "default-src 'none'",
            *(f"{name} {hashes}" for name, hashes in sources.items()),
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


SAFETY: Final[Headers] = [
    ("Content-Security-Policy", _policy()),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
]
"""Headers of all that a browser is to show."""

FRESH: Final[Headers] = [("Cache-Control", "no-store")]
"""Of what is another thing at every moment."""

ETAG: Final = f'"{hashlib.sha256(PAGE.encode()).hexdigest()[:32]}"'
LASTING: Final[Headers] = [("Cache-Control", "no-cache"), ("ETag", ETAG)]
"""Of the page, which is the same for as long as the program is: a browser asks if it still is."""


class StatusPage:
    """Makes the page, and what it asks for."""

    def __init__(
        self,
        status: Callable[[], Status],
        *,
        version: str,
        cpu_time: Callable[[], float] = time.process_time,
    ) -> None:
        """``status()`` and ``cpu_time()`` are called in the thread of the caller."""
        self.about = About((), ())
        self.history = History(status, cpu_time)
        self.started = time.monotonic()
        self._status = status
        self._cpu_time = cpu_time
        self._version = version

    def now(self) -> dict[str, Any]:
        """Return what the relay is at this moment, as JSON can hold it."""
        status, about = self._status(), self.about
        up, down = to_peer(status), to_client(status)
        connections = status.connections
        return {
            "version": self._version,
            "python": platform.python_version(),
            "clock_seconds": round(time.monotonic(), 3),  # that of the samples
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "ready": status.unready is None,
            "reason": status.unready,
            "portal": _portal(status),
            "portal_reconnects": status.portal_reconnects,
            "allocations": status.allocations,
            "channels": status.channels,
            "permissions": status.permissions,
            "connections": None if connections is None else dict(connections.open),
            "kernel": None if status.in_kernel is None else _kernel(status.in_kernel),
            "traffic": {"to_peer": up._asdict(), "to_client": down._asdict()},
            "cpu_seconds": round(self._cpu_time(), 3),
            "loop_lag_seconds": round(max(status.loop_lag, status.stuck_for), 4),
            "bugs": status.counters.bugs,
            "dropped": status.counters.all_dropped(status.overflows),
            "responses": {" ".join(key): count for key, count in status.responses.items()},
            "auth_failures": dict(status.auth_failures),
            "refused_peers": dict(status.refused_peers),
            "urls": list(about.urls),
            "options": [list(option) for option in about.options],
            "warnings": [list(line) for line in RECENT.lines],
        }

    def last_hour(self) -> dict[str, Any]:
        """Return the samples of the last hour, as JSON can hold them."""
        return {
            "period_seconds": PERIOD,
            "fields": list(Sample._fields),
            "samples": [list(sample) for sample in self.history.samples],
        }


def is_ours(host: str | None) -> bool:
    """Tell if a Host header is one that an operator's browser sends: an address, or localhost."""
    if host is None:  # of HTTP/1.0, which no browser speaks
        return True
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    name = name.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_known(etags: str | None) -> bool:
    """Tell if an If-None-Match header says that the page is there already. RFC 9110 §13.1.2."""
    if etags is None:
        return False
    return bool({tag.strip().removeprefix("W/") for tag in etags.split(",")} & {ETAG, "*"})


def as_json(value: object) -> str:
    """Return JSON that is short."""
    return json.dumps(value, separators=(",", ":"))


def _portal(status: Status) -> str | None:
    if status.portal_connected is None:
        return None
    return "connected" if status.portal_connected else "away"


def _kernel(in_kernel: InKernel) -> dict[str, Any]:
    return {"devices": dict(in_kernel.devices), "routes": in_kernel.routes}
