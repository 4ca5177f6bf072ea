"""The relay as a process of its own, on loopback: what an operator starts and signals."""

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

SECRET = "4c98bf59c99b3e467ecd7cf9d6b3e5279645fca59be67bc5bb4af3cf653761ab"
TIMEOUT = 30  # seconds; only a failing test waits for so long
CHECKOUT = Path(__file__).parent.parent
NO_HTTP = "--http-addr=off"  # its default port is one for the whole machine
LOOPBACK = (
    "--public-ip4-addr=127.0.0.1",
    "--public-ip6-addr=::1",
    "--allow-peer=127.0.0.0/8,::1/128",
)


def environment(**more: str) -> dict[str, str]:
    """Return a clean environment: none of the relay's own variables are inherited."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return {**kept, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, and return its exit code and what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "relay", "-c", os.devnull, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


class RelayProcess:
    """A running relay. Entering waits until it says that it serves; leaving ends it.

    ``port`` is the listening port, ``username`` and ``password`` the credential that it
    printed. With a *portal* it prints none, and entering waits for nothing:
    ``logs()`` does. *prefix* may hold a command that runs it elsewhere, such as ``ip netns exec``.
    *program* is run instead of the command, by ``python -c`` with the same arguments.
    It is asked to print a credential, unless *asks* is False.
    *descriptors* are handed over as systemd does: from number 3 on, to this process.
    """

    def __init__(
        self,
        *arguments: str,
        port: int,
        prefix: tuple[str, ...] = (),
        loopback: bool = True,
        variables: Mapping[str, str] | None = None,
        portal: bool = False,
        program: str | None = None,
        descriptors: tuple[int, ...] = (),
        stdout: int = subprocess.PIPE,
        asks: bool = True,
    ) -> None:
        self.port = port
        self._portal = portal
        self.username = self.password = ""
        self.printed_at_start: list[str] = []  # what it printed before it was ready
        self._log: list[str] = []
        self._log_grows = threading.Condition()
        self._log_ended = False
        self._log_reader = threading.Thread(target=self._read_log)
        self._stdout = stdout
        # Numbers that do not get into each other's way when the shell moves them.
        self._descriptors = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in descriptors]
        self._command = [
            *prefix,
            *_hand_over(self._descriptors),
            sys.executable,
            *(("-m", "relay") if program is None else ("-c", program)),
            f"--config={os.devnull}",  # not what this machine may have
            f"--listen-port={port}",
            NO_HTTP,
            *(("--print-credential",) if asks else ()),
            *(LOOPBACK if loopback else ()),
            *arguments,
        ]
        self._environment = environment(**(variables or {}))

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._stdout,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=self._descriptors,
        )
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._log_reader.start()
        if self._portal:
            return self
        for line in _pipe(self.process.stdout):
            self.printed_at_start.append(line.rstrip("\n"))
            name, _, value = line.partition(":")
            if name == "username":
                self.username = value.strip()
            elif name == "credential":
                self.password = value.strip()
            if line.startswith("(good until"):
                return self
        self.wait()
        raise AssertionError(f"the relay did not start: {self.errors()}")

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(signal.SIGTERM)
                self.process.send_signal(signal.SIGINT)  # a second signal ends it at once
        self.wait()

    @property
    def urls(self) -> list[str]:
        """The TURN URLs that it printed."""
        return [line.split()[-1] for line in self.printed_at_start if line.startswith("TURN URL")]

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._log_reader.join()
            if self.process.stdout is not None:
                self.process.stdout.close()
            _pipe(self.process.stdin).close()
        return self.process.returncode

    def writes(self, text: str) -> None:
        """Write to its standard input."""
        pipe = _pipe(self.process.stdin)
        pipe.write(text)
        pipe.flush()

    def signals(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def logs(self, text: str, *, after: int = 0) -> str:
        """Wait for a line of the log that holds *text*, and return it.

        The first *after* lines do not count.
        """
        seen = after
        with self._log_grows:
            while True:
                for line in self._log[seen:]:
                    if text in line:
                        return line
                seen = len(self._log)
                if self._log_ended or not self._log_grows.wait(TIMEOUT):
                    raise AssertionError(f"{text!r} is not logged: {self.errors()}")

    @property
    def lines(self) -> int:
        """How many lines it has logged so far."""
        return len(self._log)

    def errors(self) -> str:
        """Return what it has logged so far; after its end, all of it."""
        return "".join(self._log)

    def _read_log(self) -> None:
        with _pipe(self.process.stderr) as log:
            for line in log:
                with self._log_grows:
                    self._log.append(line)
                    self._log_grows.notify_all()
        with self._log_grows:
            self._log_ended = True
            self._log_grows.notify_all()


def _hand_over(descriptors: Sequence[int]) -> tuple[str, ...]:
    """Return a command that runs another with *descriptors* as systemd passes them."""
    if not descriptors:
        return ()
    moves = " ".join(f"{number}<&{fd} {fd}<&-" for number, fd in enumerate(descriptors, 3))
    return ("bash", "-c", f'exec {moves}; LISTEN_PID=$$ exec "$@"', "bash")


def free_port() -> int:
    """Return a UDP port that is free in both families, outside the usual relay range."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("::", port))  # dual-stack: takes IPv4 with it
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


class Stopped:
    """The relay does not run inside this block."""

    def __init__(self, relay: RelayProcess) -> None:
        self._pid = relay.pid

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._pid, os.WSTOPPED)

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGCONT)


def wait_until_read(port: int) -> None:
    """Look until nothing is queued for a UDP port, at any IPv4 address."""
    queued = ["?"]
    while queued:
        lines = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
        ours = [fields for fields in lines if fields[1].endswith(f":{port:04X}")]
        assert ours
        queued = [fields[4] for fields in ours if not fields[4].endswith(":00000000")]


def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
