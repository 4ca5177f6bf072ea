"""Makes the pictures of the status page in docs/images, by ``python -m contrib.screenshots``.

The page and its server are the relay's own; the numbers are made up, of an hour of some calls. It
takes root, Chromium, and the npm packages of tests/interop/web.
"""

import logging
import math
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from relay.observe.counters import Counters
from relay.observe.exposition import Status
from relay.observe.history import PERIOD, SAMPLES, Sample
from relay.observe.http import HealthServer
from relay.observe.recent import RECENT
from relay.observe.statuspage import About
from tests.interop.browser import WEB, Visitor
from tests.interop.needs import needs_packages
from tests.probes import QUIET

IMAGES = Path(__file__).parent.parent / "docs" / "images"
PICTURES = {  # name: width, height, dark; each ends between two cards
    "status": (1180, 922, False),
    "status-dark": (1180, 922, True),
    "status-phone": (360, 1075, True),
}
UPTIME = 3 * 86400 + 7 * 3600  # seconds
PAYLOAD = 620  # bytes of a datagram, on average


def main() -> int:
    """Make them, and say where they are."""
    IMAGES.mkdir(exist_ok=True)
    made_up = MadeUp()
    server = HealthServer(
        *("127.0.0.1", 0, made_up.status), version="1.0.0", cpu_time=made_up.cpu_time
    )
    server.status_page.started -= UPTIME
    server.show(
        About(
            ["turn:192.0.2.1:3478?transport=udp", "turns:turn.example.org:5349?transport=tcp"],
            [
                ("public-ip4-addr", "192.0.2.1"),
                ("public-ip6-addr", "2001:db8::1"),
                ("auth-secret-file", "set"),
                ("tls-port", "5349"),
                ("tls-cert", "set"),
            ],
        )
    )
    server.status_page.history.samples.extend(made_up.hour())
    warn()
    with tempfile.TemporaryDirectory() as folder:
        server.start()
        try:
            host, port = server.address
            take(f"http://{host}:{port}/", Path(folder))
        finally:
            server.stop()
    return 0


def take(url: str, folder: Path) -> None:
    """Take the pictures of a page."""
    needs_packages(WEB)
    with Visitor("chromium", None, folder) as visitor:
        for name, (width, height, is_dark) in PICTURES.items():
            visitor.call("open", url, width, height, is_dark)
            visitor.call("until", "document.querySelector('#cpu span') !== null")
            path = IMAGES / f"{name}.png"
            visitor.call("picture", str(path), False)
            sys.stdout.write(f"{path}\n")


def warn() -> None:
    """Have the log say two things."""
    for seconds, text in (
        (2400, "the certificate for TLS ends in 12 days: 2026-12-09"),
        (400, "cannot open relay port 51413: Address already in use"),
    ):
        record = logging.LogRecord("relay.daemon", logging.WARNING, "", 0, text, (), None)
        record.created = time.time() - seconds
        RECENT.emit(record)


class MadeUp:
    """The numbers of a relay for an hour, and from then on."""

    def __init__(self) -> None:
        self._random = random.Random(8656)  # noqa: S311  # nobody is to be surprised
        self._up = self._down = self._lost = self._answered = 0.0
        self._cpu = 0.0
        self._calls = 55.0
        self._at = time.monotonic()

    def hour(self) -> list[Sample]:
        """Return the samples of the last hour."""
        began = time.monotonic() - (SAMPLES - 1) * PERIOD
        samples = []
        for number in range(SAMPLES - 1):
            self._pass(PERIOD, number / SAMPLES)
            samples.append(self._sample(began + number * PERIOD))
        self._at = began + (SAMPLES - 2) * PERIOD
        return samples

    def status(self) -> Status:
        """Return what the relay is at this moment."""
        now = time.monotonic()
        self._pass(now - self._at, 1.0)
        self._at = now
        answered = int(self._answered)
        counters = Counters()
        counters.to_peer[PAYLOAD] = int(self._up)
        counters.to_client[PAYLOAD] = int(self._down)
        shares_lost = {"unbound_channel": 62, "no_permission": 29, "unbound_peer": 9}
        counters.dropped.update(
            {why: int(self._lost) * share // 100 for why, share in shares_lost.items()}
        )
        shares = {
            ("refresh", "success"): 48,
            ("create_permission", "success"): 19,
            ("channel_bind", "success"): 12,
            ("binding", "success"): 9,
            ("allocate", "success"): 6,
        }
        responses = Counter({key: answered * share // 100 for key, share in shares.items()})
        responses["allocate", "401"] = answered - responses.total()
        return replace(
            QUIET,
            counters=counters,
            allocations=round(self._calls) * 2,
            channels=round(self._calls) * 2,
            permissions=round(self._calls) * 5,
            loop_lag=0.0016,
            responses=responses,
            auth_failures={"expired": 19, "wrong credentials": 7},
            refused_peers={"private": 312, "link-local": 44},
        )

    def cpu_time(self) -> float:
        """Return how many seconds of CPU time it has used."""
        return self._cpu

    def _pass(self, seconds: float, share: float) -> None:
        calls = 52 + 34 * math.sin(3.4 * share + 0.4) + 6 * math.sin(31 * share)
        self._calls += 0.3 * (calls - self._calls) + self._random.uniform(-1.5, 1.5)
        rate = self._calls * 95 * seconds
        self._up += rate * self._random.uniform(0.93, 1.07)
        self._down += rate * 1.35 * self._random.uniform(0.93, 1.07)
        self._cpu += rate * 1.9e-5 + 0.002 * seconds
        self._answered += self._calls * 0.09 * seconds * self._random.uniform(0.7, 1.3)
        if self._random.random() < 0.02:
            self._lost += self._random.uniform(5, 40)

    def _sample(self, at: float) -> Sample:
        up, down = int(self._up), int(self._down)
        return Sample(
            *(at, round(self._calls) * 2, self._cpu),
            *(up, up * PAYLOAD, down, down * PAYLOAD),
            *(int(self._lost), int(self._answered)),
        )


if __name__ == "__main__":
    sys.exit(main())
