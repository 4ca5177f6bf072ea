"""This relay and coturn, each a process in the relay's network namespace, on one CPU."""

import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.loadlib.clients import Credentials, LoadError
from bench.loadlib.netns import PEER_PREFIX, RELAY_HOST, Network, inside
from relay.stun.address import Address
from relay.stun.const import Kind, Method
from relay.stun.message import Message
from relay.turn.users import mint

CHECKOUT: Final = Path(__file__).parent.parent.parent
STARTS_WITHIN: Final = 10.0  # seconds
CREDENTIAL_LIFETIME: Final = 86400  # seconds


@dataclass(frozen=True, slots=True)
class Server:
    """A running TURN server."""

    name: str
    address: Address
    credentials: Credentials
    pid: int
    network: Network  # in which it is


Command = tuple[list[str], Credentials]
"""How to start a server, and who may use it."""


def relay_command(port: int, folder: Path) -> Command:
    """Return how to start this relay, as README says; its secret goes to *folder*."""
    secret, secret_file = secrets.token_hex(32), folder / "relay.secret"
    lowest, highest = _RELAY_PORTS[port]
    secret_file.touch(mode=0o600)
    secret_file.write_text(secret)
    command = [
        *(sys.executable, "-m", "relay"),
        f"--config={os.devnull}",
        f"--public-ip4-addr={RELAY_HOST}",
        f"--listen-port={port}",
        *(f"--lowest-port={lowest}", f"--highest-port={highest}"),
        f"--allow-peer={PEER_PREFIX}",
        f"--relay-secret-file={secret_file}",
    ]
    expiry = int(time.time()) + CREDENTIAL_LIFETIME
    return command, Credentials(*mint(expiry, "versus", secret))


def xdp_command(port: int, folder: Path) -> Command:
    """Return how to start this relay so that the kernel relays channels."""
    command, credentials = relay_command(port, folder)
    devices = (f"--xdp-device={device}" for device in ("towards0", "towards1"))
    return [*command, "--xdp=require", *devices], credentials


def coturn_command(port: int, folder: Path) -> Command:
    """Return how to start coturn with one relay thread and without what this relay lacks."""
    command, credentials = default_coturn_command(port, folder)
    command += [
        *("-m", "1"),
        *("--no-cli", "--no-tls", "--no-dtls", "--no-tcp", "--no-tcp-relay"),
        *("--no-rfc5780", "--no-multicast-peers"),
    ]
    return command, credentials


def default_coturn_command(port: int, folder: Path) -> Command:
    """Return how to start coturn as Debian has it: with a relay thread per CPU of the machine."""
    credentials = Credentials("versus", secrets.token_hex(16))
    lowest, highest = _RELAY_PORTS[port]
    command = [
        *("turnserver", "-n", "--lt-cred-mech", "--realm=versus"),
        f"--user={credentials.username}:{credentials.password}",
        f"--listening-ip={RELAY_HOST}",
        f"--relay-ip={RELAY_HOST}",
        f"--listening-port={port}",
        *(f"--min-port={lowest}", f"--max-port={highest}"),
        *("--log-file=stdout", "--simple-log"),
        f"--pidfile={folder / f'coturn-{port}.pid'}",
    ]
    return command, credentials


UNLIMITED: Final = (
    "--unauthenticated-rate=0",
    "--unauthenticated-rate-per-prefix=0",
    "--max-allocations-per-username=0",
    "--max-allocations-per-ip=0",
    "--max-channels-per-allocation=0",
)

IN_KERNEL: Final = "relay, in the kernel"
SERVERS: Final[dict[str, Callable[[int, Path], Command]]] = {
    "relay": relay_command,
    "coturn": coturn_command,
    "coturn, defaults": default_coturn_command,
    IN_KERNEL: xdp_command,
}
_PORTS: Final = {"relay": 3478, "coturn": 3479, "coturn, defaults": 3490, IN_KERNEL: 3478}
# All run at the same time, at one address. Enough for the most allocations that are held.
_RELAY_PORTS: Final = {3478: (10_000, 27_999), 3479: (28_000, 45_999), 3490: (46_000, 65_535)}


@contextmanager
def running(
    name: str,
    network: Network,
    cpu: int,
    folder: Path,
    *,
    limited: bool = False,
    more: Sequence[str] = (),
) -> Iterator[Server]:
    """Run one of :data:`SERVERS`, with its log in *folder*; yield it once it answers.

    *more* are arguments for it; with any, coturn serves TCP and TLS, too.
    Unless it is to be *limited*, the relay serves one address and one user without end, as coturn
    does. Raises LoadError.
    """
    port, log = _PORTS[name], folder / f"{name}.log"
    command, credentials = SERVERS[name](port, folder)
    if name in {"relay", IN_KERNEL} and not limited:
        command += UNLIMITED
    if more:
        command = [word for word in command if word not in {"--no-tls", "--no-tcp"}]
    command += more
    within = ["ip", "netns", "exec", network.relay, "taskset", "-c", str(cpu)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*within, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with inside(network.clients):
            _wait_for(RELAY_HOST, port, process, log)
        yield Server(name, (RELAY_HOST, port), credentials, process.pid, network)
    finally:
        process.kill()  # neither has anything to save
        process.wait()


def _wait_for(host: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Send Binding requests until one is answered. Raises LoadError."""
    request = Message(Kind.REQUEST, Method.BINDING, os.urandom(12)).encode()
    give_up_at = time.monotonic() + STARTS_WITHIN
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, port))
        while time.monotonic() < give_up_at and process.poll() is None:
            with suppress(ConnectionRefusedError):
                sock.send(request)
                if select.select([sock], [], [], 0.05)[0]:
                    sock.recv(2048)
                    return
    said = log.read_text(errors="replace").strip().splitlines()[-3:]
    raise LoadError(f"{process.args!r} does not answer: {' / '.join(said)}")
