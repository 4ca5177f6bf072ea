"""CreatePermission and ChannelBind: which peers a client may reach, and how. RFC 8656 §10, §12."""

import logging
from typing import Final

from relay.stun.address import Address, family_of, format_endpoint
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode
from relay.turn.commands import PeerAddress
from relay.turn.peers import PeerPolicy
from relay.turn.request import Refused, Request
from relay.turn.state import State
from relay.turn.tables import Allocation, Channel

logger = logging.getLogger("relay.turn")

CHECKED_AT_ONCE: Final = 500  # channels, when rules change; the others wait for the next portion


class ChannelHandler:
    """Serves CreatePermission and ChannelBind, and applies changed rules about peers."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._unchecked: list[Channel] = []  # against rules about peers that have changed

    def create_permission(self, request: Request, username: str) -> None:
        """RFC 8656 §10.2: checked, but without effect, since only channels relay here."""
        allocation = self._state.allocation(request, username)
        peers = request.message.get_all(Attr.XOR_PEER_ADDRESS)
        if not peers:
            raise Refused(ErrorCode.BAD_REQUEST, "no XOR-PEER-ADDRESS")
        for host, port in peers:
            _require_family(allocation, host)
            # A permission is for a host: the port is ignored, and often 0. RFC 8656 §10.1
            self._require_permitted((host, port or 1))
        self._state.answers.success(request, [], key=request.key)

    def channel_bind(self, request: Request, username: str) -> None:
        """RFC 8656 §12.2."""
        settings, tables, message = self._state.settings, self._state.tables, request.message
        number = message.get(Attr.CHANNEL_NUMBER)
        # Checked before the allocation is looked for: it is wrong whatever the client has.
        if number is not None and number not in settings.channel_numbers:
            raise Refused(ErrorCode.BAD_REQUEST, f"channel number {number:#06x} is out of range")
        allocation = self._state.allocation(request, username)
        address = message.get(Attr.XOR_PEER_ADDRESS)
        if number is None or address is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no CHANNEL-NUMBER or no XOR-PEER-ADDRESS")
        peer = PeerAddress(address)
        _require_family(allocation, peer[0])
        reaches_outside = self._require_permitted(peer)
        by_peer, by_number = allocation.channels_by_peer.get(peer), allocation.channels.get(number)
        if by_peer is not None and by_peer.number != number:
            raise Refused(ErrorCode.BAD_REQUEST, f"peer is on channel {by_peer.number:#06x}")
        if by_number is not None and by_number.peer != peer:
            raise Refused(ErrorCode.BAD_REQUEST, f"channel {number:#06x} has another peer")
        if by_number is None and tables.channels >= settings.max_channels:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many channels as are allowed")
        tables.bind(allocation, number, peer, reaches_outside=reaches_outside, now=request.now)
        self._state.answers.success(request, [], key=request.key)

    def change_peer_policy(self, peer_policy: PeerPolicy, now: float) -> None:
        """Go on with other rules, and check a first portion of the channels against them."""
        self._state.peer_policy = peer_policy
        self._unchecked = self._state.tables.all_channels()
        self.recheck_some(now)

    def recheck_some(self, now: float) -> None:
        """Check the next portion of the channels; unbind those whose peer is forbidden now."""
        for channel in self._unchecked[-CHECKED_AT_ONCE:]:
            reaches_outside, _ = self._reach(channel.peer)
            self._state.tables.recheck_peer(channel, reaches_outside, now)
        del self._unchecked[-CHECKED_AT_ONCE:]

    @property
    def is_rechecking(self) -> bool:
        """Tell if channels are left to be checked."""
        return bool(self._unchecked)

    def _require_permitted(self, peer: Address) -> bool:
        """Refuse a forbidden peer; return whether datagrams to it may leave this relay."""
        reaches_outside, rule = self._reach(peer)
        if reaches_outside is None:
            logger.warning("peer refused: %s", rule)
            raise Refused(ErrorCode.FORBIDDEN, f"{format_endpoint(*peer)}: {rule}")
        return reaches_outside

    def _reach(self, peer: Address) -> tuple[bool | None, str | None]:
        """Tell whether datagrams to *peer* may leave this relay, None if none may be sent to it.

        With the rule that forbids it. What this relay lends out may always be reached, from
        inside.
        """
        rule = self._state.peer_policy.refusal(peer)
        if rule is None:
            return True, None
        return (False if self._state.is_relayed_here(peer) else None), rule


def _require_family(allocation: Allocation, host: str) -> None:
    if family_of(host) not in allocation.families:
        code = ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH
        raise Refused(code, f"no {family_of(host).name} allocated")
