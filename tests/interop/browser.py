"""A browser in a network namespace, with a page of WebRTC ends; see ``web/page.js``."""

from pathlib import Path
from typing import Final

from tests.interop.program import Program
from tests.process import RelayProcess

PROGRAMS: Final = {"chromium": "chromium", "firefox": "firefox-esr"}
WEB: Final = Path(__file__).parent / "web"


class Browser(Program):
    """A headless browser. Its calls are those of ``ends`` in ``web/page.js``.

    What it leaves running ends who owns the namespace.
    """

    def __init__(self, kind: str, namespace: str, folder: Path) -> None:
        """Take which one, where, and an empty *folder* for its profile and its home."""
        home, profile = folder / "home", folder / "profile"
        home.mkdir(parents=True)
        command = [
            *("ip", "netns", "exec", namespace),
            *("node", str(WEB / "driver.mjs"), kind, f"/usr/bin/{PROGRAMS[kind]}", str(profile)),
        ]
        super().__init__(kind, command, folder, {"HOME": str(home)})


def ice_server(relay: RelayProcess, host: str) -> dict[str, str]:
    """Return the relay as RTCPeerConnection takes it."""
    return {
        "urls": f"turn:{host}:{relay.port}?transport=udp",
        "username": relay.username,
        "credential": relay.password,
    }
