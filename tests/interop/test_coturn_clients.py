"""The clients of coturn, as Debian packages them, against the relay.

``turnutils_uclient`` begins between one and six seconds after its last ChannelBind, at
random, so most of what follows is waiting. It ends with 0 even when every datagram was
lost: only the statistics tell.
"""

import asyncio
import os
import re
import shutil
import socket
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.stun.address import Address
from tests.interop.loopback import Endpoint, running_relay, within
from tests.process import RelayProcess, free_port

UCLIENT, STUNCLIENT = "turnutils_uclient", "turnutils_stunclient"

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(UCLIENT) and shutil.which(STUNCLIENT)), reason="coturn is not installed"
    ),
]


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    """A relay for the channel numbers of RFC 5766, among which uclient draws its own."""
    with running_relay("--channel-range=rfc5766") as relay:
        yield relay


@within(seconds=60)
async def test_echo_peers_of_both_families(relay: RelayProcess) -> None:
    """An allocation is of the peer's family, which need not be the client's. All at once."""
    async with echo_peer("127.0.0.1") as ipv4_peer, echo_peer("::1") as ipv6_peer:
        options = ["-c", *numbers(messages=100)]
        counted = await asyncio.gather(
            uclient(relay, "127.0.0.1", *options, *to(ipv4_peer)),
            uclient(relay, "127.0.0.1", *options, *to(ipv6_peer)),
            uclient(relay, "::1", *options, *to(ipv4_peer)),
            uclient(relay, "::1", *options, *to(ipv6_peer)),
        )
    assert set(counted) == {all_of(100)}


@within(seconds=60)
async def test_both_ends_on_this_relay(relay: RelayProcess) -> None:
    """Client to client, each at a relayed address: a pair with IPv4, another with IPv6."""
    options = ["-y", "-c", *numbers(messages=100)]
    counted = await asyncio.gather(
        uclient(relay, "127.0.0.1", "-X", *options), uclient(relay, "127.0.0.1", "-x", *options)
    )
    assert set(counted) == {all_of(2 * 100)}


@within(seconds=60)
async def test_large_datagrams(relay: RelayProcess) -> None:
    async with echo_peer("127.0.0.1") as peer:
        options = ["-c", "-l", "1400", *numbers(messages=50), *to(peer)]
        assert await uclient(relay, "127.0.0.1", *options) == all_of(50)


@within(seconds=60)
async def test_padded_channel_data(relay: RelayProcess) -> None:
    """As some clients send it over UDP too. What comes back is not padded."""
    async with echo_peer("127.0.0.1") as peer:
        options = ["-c", "-D", "-l", "171", *numbers(messages=100), *to(peer)]
        assert await uclient(relay, "127.0.0.1", *options) == all_of(100)


@within(seconds=60)
async def test_refused_requests_do_no_harm(relay: RelayProcess) -> None:
    """Many more channels and permissions, some for peers of another family."""
    async with echo_peer("127.0.0.1") as peer:
        options = ["-c", "-G", *numbers(messages=100), *to(peer)]
        assert await uclient(relay, "127.0.0.1", *options) == all_of(100)


@within(seconds=60)
async def test_rtp_and_rtcp(relay: RelayProcess) -> None:
    """Without -c, uclient wants pairs of ports, and sends on both."""
    async with echo_peer("127.0.0.1") as peer:
        options = [*numbers(messages=100), *to(peer)]
        assert await uclient(relay, "127.0.0.1", *options) == all_of(2 * 100)


@within(seconds=60)
async def test_rtp_and_rtcp_with_both_ends_on_this_relay(relay: RelayProcess) -> None:
    options = ["-y", *numbers(messages=100)]
    assert await uclient(relay, "127.0.0.1", *options) == all_of(4 * 100)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-s"], id="RTP and RTCP"),
        pytest.param(["-s", "-c"], id="RTP alone"),
        pytest.param(["-s", "-g"], id="DONT-FRAGMENT"),
        pytest.param(["-s", "-c", "-l", "171"], id="padded"),
    ],
)
@within(seconds=60)
async def test_send_indications(relay: RelayProcess, flags: list[str]) -> None:
    """To peers of both families at once; what comes back are Data indications."""
    async with echo_peer("127.0.0.1") as ipv4_peer, echo_peer("::1") as ipv6_peer:
        options = [*flags, *numbers(messages=50)]
        counted = await asyncio.gather(
            uclient(relay, "127.0.0.1", *options, *to(ipv4_peer)),
            uclient(relay, "::1", *options, *to(ipv6_peer)),
        )
    assert set(counted) == {all_of(50 if "-c" in flags else 2 * 50)}


@pytest.mark.parametrize("flags", [["-s"], ["-s", "-c"]], ids=["RTP and RTCP", "RTP alone"])
@within(seconds=60)
async def test_send_indications_with_both_ends_on_this_relay(
    relay: RelayProcess, flags: list[str]
) -> None:
    options = [*flags, "-y", *numbers(messages=50)]
    counted = await uclient(relay, "127.0.0.1", *options)
    assert counted == all_of(50 * (2 if "-c" in flags else 4))


@within(seconds=60)
async def test_a_user_of_the_rest_convention(tmp_path: Path) -> None:
    """Whose password uclient makes itself, from the secret."""
    secret = tmp_path / "auth.secret"
    secret.write_text("north\n")
    owner = ["--user=root"] if os.geteuid() == 0 else []
    with running_relay(f"--auth-secret-file={secret}", *owner) as relay:
        async with echo_peer("127.0.0.1") as peer:
            options = ["-s", "-W", "north", *numbers(messages=20), *to(peer)]
            assert await uclient(relay, "127.0.0.1", *options, user=["-u", "alice"]) == all_of(40)


@pytest.mark.parametrize(("server", "family"), [("127.0.0.1", "IPv4"), ("::1", "IPv6")])
@within(seconds=30)
async def test_binding(relay: RelayProcess, server: str, family: str) -> None:
    exit_code, output = await run(STUNCLIENT, "-p", str(relay.port), server)
    assert exit_code == 0
    assert re.search(rf"{family}\. UDP reflexive addr: {server}:\d+$", output, re.MULTILINE)


@dataclass(frozen=True)
class Statistics:
    """What uclient counted."""

    sent: int
    received: int
    lost: int
    dropped: int


def all_of(messages: int) -> Statistics:
    return Statistics(sent=messages, received=messages, lost=0, dropped=0)


async def uclient(
    relay: RelayProcess,
    server: str,
    *options: str,
    user: list[str] | None = None,
    port: int = 0,
) -> Statistics:
    """Run uclient to its end. At random it asks for an even port, or for none such."""
    arguments = ["-p", str(port or relay.port), *(user or ["-u", relay.username])]
    arguments += [] if user else ["-w", relay.password]
    exit_code, output = await run(UCLIENT, *arguments, *options, server)
    assert exit_code == 0, output
    *_, (sent, received) = re.findall(r"tot_send_msgs=(\d+), tot_recv_msgs=(\d+)", output)
    [(lost, dropped)] = re.findall(r"Total lost packets (\d+) .*, total send dropped (\d+)", output)
    return Statistics(int(sent), int(received), int(lost), int(dropped))


def numbers(*, messages: int) -> list[str]:
    """Return the options for so many messages from each socket, every 5 ms.

    They are few enough to wait in the kernel's buffers, all of them, while a process is
    not given the processor.
    """
    return ["-n", str(messages), "-z", "5"]


def to(peer: Address) -> list[str]:
    host, port = peer
    return ["-e", host, "-r", str(port)]


async def run(program: str, *arguments: str) -> tuple[int, str]:
    """Run a program to its end and return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode()


class Echo(Endpoint):
    """Sends everything back."""

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.transport.sendto(data, addr)


@asynccontextmanager
async def echo_peer(host: str) -> AsyncIterator[Address]:
    """Echo at a port and at the next one, to which uclient sends RTCP."""
    loop = asyncio.get_running_loop()
    sockets = neighbours(host)
    echoes = [(await loop.create_datagram_endpoint(Echo, sock=sock))[1] for sock in sockets]
    try:
        yield echoes[0].address
    finally:
        for echo in echoes:
            echo.transport.close()
            await echo.closed.wait()


def neighbours(host: str) -> tuple[socket.socket, socket.socket]:
    """Return sockets at two ports in a row."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = free_port()
        one, next_one = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        try:
            one.bind((host, port))
            next_one.bind((host, port + 1))
        except OSError:  # taken by someone else
            one.close()
            next_one.close()
        else:
            return one, next_one
