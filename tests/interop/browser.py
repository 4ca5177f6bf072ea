"""A browser in a network namespace, with a page of WebRTC ends; see ``web/page.js``."""

import json
import os
import selectors
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.process import RelayProcess

PROGRAMS: Final = {"chromium": "chromium", "firefox": "firefox-esr"}
WEB: Final = Path(__file__).parent / "web"
TIMEOUT: Final = 60  # seconds; only a failing test waits for so long


class BrowserError(Exception):
    """A call failed, or was not answered in time."""


class Browser:
    """A headless browser. Its calls are those of ``ends`` in ``web/page.js``."""

    def __init__(self, kind: str, namespace: str, folder: Path) -> None:
        """Take which one, where, and an empty *folder* for its profile and its home."""
        self.kind = kind
        home, profile = folder / "home", folder / "profile"
        home.mkdir()
        self._errors = folder / "errors"
        self._command = [
            *("ip", "netns", "exec", namespace),
            *("node", str(WEB / "driver.mjs"), kind, f"/usr/bin/{PROGRAMS[kind]}", str(profile)),
        ]
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        self._last_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._partial = b""

    def __enter__(self) -> Self:
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            self._answer(0)  # its version
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def call(self, name: str, *arguments: object) -> Any:
        """Call one of the page's functions and wait for what it returns. Raises BrowserError."""
        return self.result(self.begin(name, *arguments))

    def begin(self, name: str, *arguments: object) -> int:
        """Call one of the page's functions; :meth:`result` waits for it."""
        self._last_id += 1
        line = json.dumps({"id": self._last_id, "call": name, "arguments": arguments}) + "\n"
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        return self._last_id

    def result(self, call: int) -> Any:
        """Wait for the end of a call. Raises BrowserError."""
        answer = self._answer(call)
        if "error" in answer:
            raise BrowserError(f"{self.kind}: {answer['error']}")
        return answer["result"]

    def _answer(self, call: int) -> dict[str, Any]:
        while call not in self._answers:
            answer = json.loads(self._line())
            self._answers[answer["id"]] = answer
        return self._answers.pop(call)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                if not selector.select(TIMEOUT):
                    raise BrowserError(f"{self.kind} does not answer: {self._said()}")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise BrowserError(f"{self.kind} has ended: {self._said()}")
                self._partial += part
        line, _, self._partial = self._partial.partition(b"\n")
        return line

    def _said(self) -> str:
        return self._errors.read_text(errors="replace")[-2000:]

    def _end(self) -> None:
        """Have the driver close the browser. Who owns the namespace ends what is left."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def ice_server(relay: RelayProcess, host: str) -> dict[str, str]:
    """Return the relay as RTCPeerConnection takes it."""
    return {
        "urls": f"turn:{host}:{relay.port}?transport=udp",
        "username": relay.username,
        "credential": relay.password,
    }
