"""What the tests in this folder share: a relay, ends of UDP conversations, a time limit."""

import asyncio
import functools
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ParamSpec, cast

from relay.stun.address import Address
from tests.process import RelayProcess, free_port

P = ParamSpec("P")


def within(
    seconds: float,
) -> Callable[[Callable[P, Coroutine[Any, Any, None]]], Callable[P, None]]:
    """Make a coroutine a test, which fails if it takes longer. Only a failing test does."""

    def decorate(scenario: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
        @functools.wraps(scenario)
        def test(*args: P.args, **kwargs: P.kwargs) -> None:
            async def limited() -> None:
                async with asyncio.timeout(seconds):
                    await scenario(*args, **kwargs)

            asyncio.run(limited())

        return test

    return decorate


@contextmanager
def running_relay(
    *arguments: str, port: int | None = None, loopback: bool = True
) -> Iterator[RelayProcess]:
    """Run a relay, as RelayProcess does. In the end it must have met no bug of its own."""
    arguments = ("--drain-timeout=0", *arguments)
    with RelayProcess(*arguments, port=port or free_port(), loopback=loopback) as relay:
        yield relay
        relay.process.send_signal(signal.SIGTERM)
        assert relay.wait() == 0
        assert "ERROR" not in relay.errors()


class Endpoint(asyncio.DatagramProtocol):
    """One end of a UDP conversation. What arrives waits until it is asked for."""

    transport: asyncio.DatagramTransport

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[tuple[bytes, Address] | Exception] = asyncio.Queue()
        self.closed = asyncio.Event()

    @property
    def address(self) -> Address:
        """Where the other end sends to: of a TURN client, its relayed address."""
        host, port = self.transport.get_extra_info("sockname")[:2]
        return host, port

    def sends(self, payload: bytes, to: Address) -> None:
        self.transport.sendto(payload, to)

    async def receives(self) -> tuple[bytes, Address]:
        """Wait for a datagram and where it came from. Raises what went wrong instead."""
        arrived = await self._arrived.get()
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._arrived.put_nowait((data, (addr[0], addr[1])))

    def error_received(self, exc: Exception) -> None:
        self._arrived.put_nowait(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._arrived.put_nowait(exc)
        self.closed.set()


@asynccontextmanager
async def udp_peer(host: str) -> AsyncIterator[Endpoint]:
    """Open a plain UDP socket: a peer, as RFC 8656 §2 has it."""
    loop = asyncio.get_running_loop()
    _, peer = await loop.create_datagram_endpoint(Endpoint, local_addr=(host, 0))
    try:
        yield peer
    finally:
        peer.transport.close()
        await peer.closed.wait()
