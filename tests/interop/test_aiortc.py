"""aiortc, a WebRTC implementation in Python: data channels with the relay between both ends."""

import asyncio
import random

import pytest

pytest.importorskip("aiortc", reason="aiortc is not installed")

from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCIceTransportPolicy,
    RTCPeerConnection,
)

from tests.interop.loopback import within
from tests.process import RelayProcess

pytestmark = pytest.mark.interop

MESSAGES = [f"message {i}" for i in range(300)]
LARGE_MESSAGE = random.Random(1).randbytes(250_000)  # some two hundred datagrams, in SCTP


@within(seconds=60)
async def test_data_channel_is_relayed_at_both_ends(relay: RelayProcess) -> None:
    """ICE, DTLS and SCTP: everything that they send is echoed, over relayed candidates only."""
    alice, bob = peer_connection(relay), peer_connection(relay)
    arrived: asyncio.Queue[str | bytes] = asyncio.Queue()
    opened = asyncio.Event()

    @bob.on("datachannel")
    def echo(channel: RTCDataChannel) -> None:
        channel.on("message", channel.send)

    channel = alice.createDataChannel("echo")
    channel.on("open", opened.set)
    channel.on("message", arrived.put_nowait)
    try:
        await connect(alice, bob)
        await opened.wait()
        for message in MESSAGES:
            channel.send(message)
        assert [await arrived.get() for _ in MESSAGES] == MESSAGES
        channel.send(LARGE_MESSAGE)
        assert await arrived.get() == LARGE_MESSAGE

        assert selected_pair(alice) == selected_pair(bob) == ("relay", "relay")
    finally:
        await asyncio.gather(alice.close(), bob.close())


def peer_connection(relay: RelayProcess) -> RTCPeerConnection:
    server = RTCIceServer(
        f"turn:127.0.0.1:{relay.port}", username=relay.username, credential=relay.password
    )
    return RTCPeerConnection(
        RTCConfiguration([server], iceTransportPolicy=RTCIceTransportPolicy.RELAY)
    )


async def connect(alice: RTCPeerConnection, bob: RTCPeerConnection) -> None:
    """Exchange offer and answer. Nothing but relayed candidates may be in them."""
    await alice.setLocalDescription(await alice.createOffer())
    await bob.setRemoteDescription(alice.localDescription)
    await bob.setLocalDescription(await bob.createAnswer())
    await alice.setRemoteDescription(bob.localDescription)
    for connection in alice, bob:
        lines = connection.localDescription.sdp.splitlines()
        candidates = [line for line in lines if line.startswith("a=candidate:")]
        assert len(candidates) == 1
        assert " typ relay " in candidates[0]


def selected_pair(connection: RTCPeerConnection) -> tuple[str, str]:
    """Return the types of the two candidates between which the data flows."""
    assert connection.sctp is not None
    ice = connection.sctp.transport.transport._connection
    [pair] = ice._nominated.values()
    return pair.local_candidate.type, pair.remote_candidate.type
