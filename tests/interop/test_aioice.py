"""aioice, a TURN and ICE implementation in Python, against the relay."""

import asyncio
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("aioice", reason="aioice is not installed")

from aioice import Connection, TransportPolicy, stun, turn

from relay.stun.address import Address
from relay.stun.attributes import Attr
from tests.interop.loopback import Endpoint, running_relay, udp_peer, within
from tests.process import RelayProcess, free_port

pytestmark = pytest.mark.interop

PAGE = Path(__file__).parents[2] / "docs/integrations/aioice.md"
ASKS_FOR_IPV6 = 0x02000000  # REQUESTED-ADDRESS-FAMILY. RFC 8656 §18.6


@pytest.mark.parametrize("server", ["127.0.0.1", "::1"])
@within(seconds=30)
async def test_peer_is_echoed(relay: RelayProcess, server: str) -> None:
    """ChannelBind at the first datagram, then ChannelData both ways."""
    async with udp_peer("127.0.0.1") as bob, allocation(relay, server) as alice:
        assert alice.address[0] == "127.0.0.1"
        await echo(alice, bob)


@pytest.mark.parametrize("server", ["127.0.0.1", "::1"])
@within(seconds=30)
async def test_peer_is_echoed_over_ipv6(
    relay: RelayProcess, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An IPv6 allocation, which aioice has to be taught to ask for."""
    ask_for_ipv6(monkeypatch)
    async with udp_peer("::1") as bob, allocation(relay, server) as alice:
        assert alice.address[0] == "::1"
        await echo(alice, bob)


def test_two_clients_say_hello_as_the_page_has_it(relay: RelayProcess) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (program,) = [block for block in blocks if "import asyncio" in block]
    credential = (relay.username, relay.password)
    said = subprocess.run(
        [sys.executable, "-c", program, "127.0.0.1", str(relay.port), *credential],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout

    assert len(set(said.splitlines())) == 2  # alice heard bob, and bob alice
    assert all(line.startswith("hello from ('127.0.0.1', ") for line in said.splitlines())


@within(seconds=30)
async def test_each_peer_has_a_channel(relay: RelayProcess) -> None:
    async with (
        udp_peer("127.0.0.1") as bob,
        udp_peer("127.0.0.1") as carol,
        allocation(relay) as alice,
    ):
        for peer in bob, carol:
            alice.sends(b"ping", to=peer.address)
            assert await peer.receives() == (b"ping", alice.address)
        for peer, answer in (carol, b"from carol"), (bob, b"from bob"):
            peer.sends(answer, to=alice.address)
            assert await alice.receives() == (answer, peer.address)


@within(seconds=30)
async def test_mapped_address_is_where_the_client_is(relay: RelayProcess) -> None:
    async with allocation(relay) as alice:
        assert turn_client(alice).mapped_address == socket_address(alice)


@within(seconds=30)
async def test_allocation_is_refreshed(relay: RelayProcess) -> None:
    """By aioice's own loop, which is made to begin at once."""
    async with udp_peer("127.0.0.1") as bob, allocation(relay) as alice:
        client = turn_client(alice)
        client.lifetime = 1800
        with log_of("aioice.turn") as lines:
            refreshing = asyncio.create_task(client.refresh(0))
            said = await lines.get()
        refreshing.cancel()
        assert said == f"TURN allocation refreshed {alice.address} (expires in 1800 seconds)"
        await echo(alice, bob)


@within(seconds=30)
async def test_channel_is_refreshed(relay: RelayProcess) -> None:
    """As aioice does with the next datagram, when it takes the last bind to be long ago."""
    async with udp_peer("127.0.0.1") as bob, allocation(relay) as alice:
        await echo(alice, bob)
        [number] = turn_client(alice).channel_to_peer
        turn_client(alice).channel_refresh_at[number] = 0
        with log_of("aioice.turn") as lines:
            alice.sends(b"again", to=bob.address)
            assert await bob.receives() == (b"again", alice.address)
        assert lines.get_nowait() == f"TURN channel bound {number} {bob.address}"


@within(seconds=30)
async def test_stale_nonce_is_replaced(relay: RelayProcess) -> None:
    """The relay's 438 has a new nonce, with which aioice asks again. RFC 8489 §9.2.5."""
    async with udp_peer("127.0.0.1") as bob, allocation(relay) as alice:
        client = turn_client(alice)
        client.nonce = b"of another relay"
        await echo(alice, bob)
        assert client.nonce != b"of another relay"


@within(seconds=30)
async def test_wrong_password_is_told(relay: RelayProcess) -> None:
    with pytest.raises(stun.TransactionFailed) as failed:
        async with allocation(relay, password="wrong"):
            pass
    assert failed.value.response.error_code == 401


@within(seconds=30)
async def test_forbidden_peer_is_told(relay: RelayProcess) -> None:
    async with allocation(relay) as alice:
        alice.sends(b"into your network", to=("10.0.0.1", 53))
        with pytest.raises(stun.TransactionFailed) as failed:
            await alice.receives()
    assert failed.value.response.error_code == 403


@within(seconds=30)
async def test_closing_gives_the_port_back() -> None:
    """A range of one port serves one client after the other."""
    ports: set[int] = set()
    while len(ports) < 2:
        ports.add(free_port())
    listen_port, port = ports
    only = (f"--lowest-port={port}", f"--highest-port={port}")
    with running_relay(*only, port=listen_port) as relay:
        async with allocation(relay) as alice:
            assert alice.address == ("127.0.0.1", port)
            with pytest.raises(stun.TransactionFailed) as failed:
                async with allocation(relay):
                    pass
            assert failed.value.response.error_code == 508
        async with udp_peer("127.0.0.1") as carol, allocation(relay) as bob:
            assert bob.address == ("127.0.0.1", port)
            await echo(bob, carol)


@pytest.mark.parametrize("server", ["127.0.0.1", "::1"])
@within(seconds=30)
async def test_ice_connects_both_ends_over_the_relay(relay: RelayProcess, server: str) -> None:
    """All candidates are relayed, so the relay sends to itself. Two components each."""
    alice, bob = (ice_agent(relay, server, controlling=c) for c in (True, False))
    try:
        await introduce(alice, to=bob)
        await introduce(bob, to=alice)
        await asyncio.gather(alice.connect(), bob.connect())

        for agent in alice, bob:
            assert sorted(agent._nominated) == [1, 2]
            for pair in agent._nominated.values():
                assert (pair.local_candidate.type, pair.remote_candidate.type) == (
                    "relay",
                    "relay",
                )
        for component in 1, 2:
            for one, other in (alice, bob), (bob, alice):
                sent = [(b"%d" % i, component) for i in range(100)]
                for payload, _ in sent:
                    await one.sendto(payload, component)
                assert [await other.recvfrom() for _ in sent] == sent
    finally:
        await asyncio.gather(alice.close(), bob.close())


async def echo(client: Endpoint, peer: Endpoint) -> None:
    """Send datagrams of many sizes to the peer and back, then a hundred at once."""
    for size in 1, 2, 3, 4, 1200, 9000, 60000:
        payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
        client.sends(payload, to=peer.address)
        assert await peer.receives() == (payload, client.address)
        peer.sends(payload, to=client.address)
        assert await client.receives() == (payload, peer.address)

    burst = [b"%d" % i for i in range(100)]
    for sender, receiver in (client, peer), (peer, client):
        for payload in burst:
            sender.sends(payload, to=receiver.address)
        assert [await receiver.receives() for _ in burst] == [(p, sender.address) for p in burst]


@asynccontextmanager
async def allocation(
    relay: RelayProcess, server: str = "127.0.0.1", *, password: str | None = None
) -> AsyncIterator[Endpoint]:
    """Hold an allocation. Leaving deletes it, and returns when the relay has said so."""
    _, client = await turn.create_turn_endpoint(
        Endpoint,
        server_addr=(server, relay.port),
        username=relay.username,
        password=password or relay.password,
    )
    try:
        yield client
    finally:
        client.transport.close()
        await client.closed.wait()


def turn_client(endpoint: Endpoint) -> turn.TurnClientUdpProtocol:
    """Return what aioice keeps behind the transport."""
    client = vars(endpoint.transport)["_TurnTransport__inner_protocol"]
    assert isinstance(client, turn.TurnClientUdpProtocol)
    return client


def socket_address(endpoint: Endpoint) -> Address:
    host, port = turn_client(endpoint).transport.get_extra_info("sockname")
    return host, port


def ask_for_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Attr.REQUESTED_ADDRESS_FAMILY.name
    row = (
        Attr.REQUESTED_ADDRESS_FAMILY.type,
        name,
        stun.pack_unsigned,
        stun.unpack_unsigned,
    )
    monkeypatch.setitem(stun.ATTRIBUTES_BY_NAME, name, row)

    class Client(turn.TurnClientUdpProtocol):
        async def request_with_retry(
            self, request: stun.Message
        ) -> tuple[stun.Message, tuple[str, int]]:
            if request.message_method == stun.Method.ALLOCATE:
                request.attributes[name] = ASKS_FOR_IPV6
            return await super().request_with_retry(request)

    monkeypatch.setattr(turn, "TurnClientUdpProtocol", Client)


@contextmanager
def log_of(name: str) -> Iterator[asyncio.Queue[str]]:
    """Read what is logged from here on."""
    lines: asyncio.Queue[str] = asyncio.Queue()

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.put_nowait(record.getMessage())

    logger, reader = logging.getLogger(name), Reader()
    level = logger.level
    logger.addHandler(reader)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(reader)


def ice_agent(relay: RelayProcess, server: str, *, controlling: bool) -> Connection:
    return Connection(
        ice_controlling=controlling,
        components=2,
        turn_server=(server, relay.port),
        turn_username=relay.username,
        turn_password=relay.password,
        transport_policy=TransportPolicy.RELAY,
    )


async def introduce(agent: Connection, *, to: Connection) -> None:
    """Do what signalling does: hand over the candidates, and what checks are signed with."""
    await agent.gather_candidates()
    for candidate in agent.local_candidates:
        await to.add_remote_candidate(candidate)
    await to.add_remote_candidate(None)
    to.remote_username = agent.local_username
    to.remote_password = agent.local_password
