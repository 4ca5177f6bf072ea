"""Servers that others have written, as long as a test needs them."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.process import TIMEOUT


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server as long as this lasts."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,  # where it may leave a core: one of them does not like to be ended
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], log: Path) -> None:
    """Look until a condition holds, for a server that has no other way to say so."""
    give_up_at = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < give_up_at, log.read_text(errors="replace")


def until_answered(port: int) -> None:
    """Send Binding requests until one is answered."""
    request = bytes.fromhex("00010000 2112a442") + bytes(12)
    give_up_at = time.monotonic() + TIMEOUT
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(0.1)
        while time.monotonic() < give_up_at:
            with suppress(ConnectionRefusedError, TimeoutError):
                sock.send(request)
                sock.recv(2048)
                return
    raise AssertionError("no answer")
