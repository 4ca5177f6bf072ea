"""A browser in a network namespace, with a page of WebRTC ends; see ``web/page.js``."""

import subprocess
from pathlib import Path
from typing import Final

from tests.certificates import Authority
from tests.interop.program import Program
from tests.process import RelayProcess

PROGRAMS: Final = {"chromium": "chromium", "firefox": "firefox-esr"}
WEB: Final = Path(__file__).parent / "web"


class Browser(Program):
    """A headless browser. Its calls are those of ``ends`` in ``web/page.js``.

    What it leaves running ends who owns the namespace.
    """

    def __init__(
        self, kind: str, namespace: str, folder: Path, authority: Authority | None = None
    ) -> None:
        """Take which one, where, and an empty *folder* for its profile and its home.

        It believes what *authority* has signed.
        """
        home, profile = folder / "home", folder / "profile"
        home.mkdir(parents=True)
        if authority is not None:
            # Each where it keeps what its user has added.
            store = home / ".pki/nssdb" if kind == "chromium" else profile
            _add_to_store(store, authority)
        command = [
            *("ip", "netns", "exec", namespace),
            *("node", str(WEB / "driver.mjs"), kind, f"/usr/bin/{PROGRAMS[kind]}", str(profile)),
        ]
        super().__init__(kind, command, folder, {"HOME": str(home)})


class Visitor(Program):
    """A headless browser that visits pages. Its calls are those of ``web/visitor.mjs``."""

    def __init__(self, kind: str, namespace: str | None, folder: Path) -> None:
        """Take which one, where (None: here), and an empty *folder* for its home."""
        home = folder / "home"
        home.mkdir(parents=True)
        command = [
            *(() if namespace is None else ("ip", "netns", "exec", namespace)),
            *("node", str(WEB / "visitor.mjs"), kind, f"/usr/bin/{PROGRAMS[kind]}"),
            str(folder / "profile"),
        ]
        super().__init__(kind, command, folder, {"HOME": str(home)})


def _add_to_store(store: Path, authority: Authority) -> None:
    store.mkdir(parents=True)
    certutil = ["certutil", "-d", f"sql:{store}"]
    subprocess.run([*certutil, "-N", "--empty-password"], check=True, capture_output=True)
    subprocess.run(
        [*certutil, "-A", "-n", "tests", "-t", "C,,"],
        input=authority.pem,
        text=True,
        check=True,
        capture_output=True,
    )


def ice_server(relay: RelayProcess, host: str, url: str = "") -> dict[str, str]:
    """Return the relay as RTCPeerConnection takes it; by UDP, or by another *url* of it."""
    return {
        "urls": url or f"turn:{host}:{relay.port}?transport=udp",
        "username": relay.username,
        "credential": relay.password,
    }
