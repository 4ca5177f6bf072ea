"""CreatePermission and ChannelBind: which peers a client may reach, and how. RFC 8656 §9 to §12."""

import logging
from collections import Counter
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import Final

from relay.stun.address import Address, family_of, format_endpoint
from relay.stun.attributes import Attr
from relay.stun.const import ErrorCode, Family
from relay.stun.raw import MAX_PEERS
from relay.turn.channeldata import RFC5766_NUMBERS
from relay.turn.commands import PeerAddress
from relay.turn.peers import PeerPolicy, Refusal
from relay.turn.request import Refused, Request
from relay.turn.state import State
from relay.turn.tables import Allocation, Channel, Permissions

logger = logging.getLogger("relay.turn")

# Channels and permissions, when rules change; the others wait for the next portion.
CHECKED_AT_ONCE: Final = 500
LOGGED_AGAIN_AFTER: Final = 60.0  # seconds, for each rule about peers
ANY_PORT: Final = 9  # discard: at which nothing of ours is


class ChannelHandler:
    """Serves CreatePermission and ChannelBind, and applies changed rules about peers."""

    def __init__(self, state: State) -> None:
        self._state = state
        # Against rules about peers that have changed:
        self._unchecked: list[Channel | tuple[Permissions, str]] = []
        self._unchecked_allocations: list[Allocation] = []
        self.refused: Counter[str] = Counter()  # peers, by the rule that refused them
        self._logged: dict[str, float] = {}  # when, by rule, in monotonic seconds

    def create_permission(self, request: Request) -> None:
        """RFC 8656 §10.2. Without effect but for its checks where only channels relay."""
        allocation = self._state.allocation(request)
        peers = request.message.get_all(Attr.XOR_PEER_ADDRESS)
        if not peers:
            raise Refused(ErrorCode.BAD_REQUEST, "no XOR-PEER-ADDRESS")
        if len(peers) > MAX_PEERS:
            raise Refused(ErrorCode.BAD_REQUEST, f"{len(peers)} peers at once")
        families = allocation.families
        for host, _ in peers:
            _require_family(families, host)
        hosts = []
        known = _permitted(allocation)
        for host, _ in peers:
            # What there is already was held against the rules, and is whenever these change.
            refusal = None if host in known else self._host_refusal(host)
            if refusal is None:
                hosts.append(host)
            else:
                self._refuse(refusal, host, request.now)
        if self._state.settings.send_indications:
            self._require_permissions(allocation, hosts)
            self._state.tables.permit(allocation, hosts, reports_errors=True, now=request.now)
        self._state.answers.success(request, [], key=request.key)

    def channel_bind(self, request: Request) -> None:
        """RFC 8656 §12.2."""
        settings, tables, message = self._state.settings, self._state.tables, request.message
        number = message.get(Attr.CHANNEL_NUMBER)
        # Checked before the allocation is looked for: it is wrong whatever the client has.
        if number is not None and number not in settings.channel_numbers:
            if number in RFC5766_NUMBERS:
                self._state.hints.give(
                    "channel range",
                    f"a client binds channel {number:#06x}, which is refused; "
                    "--channel-range rfc5766 takes such numbers",
                )
            raise Refused(ErrorCode.BAD_REQUEST, f"channel number {number:#06x} is out of range")
        allocation = self._state.allocation(request)
        address = message.get(Attr.XOR_PEER_ADDRESS)
        if number is None or address is None:
            raise Refused(ErrorCode.BAD_REQUEST, "no CHANNEL-NUMBER or no XOR-PEER-ADDRESS")
        peer = PeerAddress(address)
        _require_family(allocation.families, peer[0])
        reaches_outside, refusal = self._reach(peer)
        is_refused = refusal is not None and reaches_outside is None
        if refusal is not None and is_refused:
            self._refuse(refusal, format_endpoint(*peer), request.now)
        by_peer, by_number = allocation.channels_by_peer.get(peer), allocation.channels.get(number)
        if by_peer is not None and by_peer.number != number:
            raise Refused(ErrorCode.BAD_REQUEST, f"peer is on channel {by_peer.number:#06x}")
        if by_number is not None and by_number.peer != peer:
            raise Refused(ErrorCode.BAD_REQUEST, f"channel {number:#06x} has another peer")
        if not is_refused:
            if by_number is None:
                self._require_room(allocation)
            if settings.send_indications:
                self._require_permissions(allocation, [peer[0]])
            outside = reaches_outside is True
            tables.bind(allocation, number, peer, reaches_outside=outside, now=request.now)
            if settings.send_indications:
                tables.permit(allocation, [peer[0]], reports_errors=False, now=request.now)
        self._state.answers.success(request, [], key=request.key)

    def change_peer_policy(self, peer_policy: PeerPolicy, now: float) -> None:
        """Go on with other rules, and check a first portion of what there is against them."""
        self._state.peer_policy = peer_policy
        self._unchecked = []
        self._unchecked_allocations = self._state.tables.all_allocations()
        self.recheck_some(now)

    def recheck_some(self, now: float) -> None:
        """Check the next portion of channels and permissions; end what is forbidden now."""
        left, tables = CHECKED_AT_ONCE, self._state.tables
        while left > 0 and self.is_rechecking:
            portion = self._unchecked[-left:]
            del self._unchecked[-left:]
            left -= len(portion)
            for item in portion:
                if isinstance(item, Channel):
                    tables.recheck_peer(item, self.reaches_outside(item.peer), now)
                else:
                    is_allowed = self._host_refusal(item[1]) is None
                    tables.recheck_permission(*item, is_allowed=is_allowed)
            if not self._unchecked and self._unchecked_allocations:
                allocation = self._unchecked_allocations.pop()
                self._unchecked = list(allocation.channels.values())
                permissions = allocation.permissions
                if permissions is not None:
                    self._unchecked += [(permissions, host) for host in permissions.expires_at]
                left -= 1

    @property
    def is_rechecking(self) -> bool:
        """Tell if something is left to be checked."""
        return bool(self._unchecked or self._unchecked_allocations)

    def reaches_outside(self, peer: Address) -> bool | None:
        """Tell whether datagrams to *peer* may leave this relay, None if none may be sent to it."""
        return self._reach(peer)[0]

    def _host_refusal(self, host: str) -> Refusal | None:
        """Say why there may be no permission for a host, if so. Its port does not count.

        Of what this relay lends out any may be meant, so the answer does not tell which ports are
        lent. Each peer there is looked at when it is sent to.
        """
        if host in self._state.settings.public_hosts.values():
            return None
        return self._state.peer_policy.refusal((host, ANY_PORT))

    def _reach(self, peer: Address) -> tuple[bool | None, Refusal | None]:
        """Tell whether datagrams to *peer* may leave this relay, None if none may be sent to it.

        With the rule that forbids it. What this relay lends out may always be reached, from
        inside.
        """
        rule = self._state.peer_policy.refusal(peer)
        if rule is None:
            return True, None
        return (False if self._state.is_relayed_here(peer) else None), rule

    def _refuse(self, refusal: Refusal, peer: str, now: float) -> None:
        """Count a peer that is forbidden, and refuse it, unless refusals are to be ignored.

        Then the client hears "success", and nothing is relayed: Firezone's client offers private
        addresses in every connection, and answers 403 by binding again for every datagram it has.
        """
        rule = refusal.rule
        self.refused[rule] += 1
        if self._logged.get(rule, -LOGGED_AGAIN_AFTER) + LOGGED_AGAIN_AFTER <= now:
            self._logged[rule] = now
            logger.info("peer refused: %s (%s, %d so far)", refusal, rule, self.refused[rule])
        if not self._state.settings.ignores_refused_peers:
            raise Refused(ErrorCode.FORBIDDEN, f"{peer}: {refusal}")

    def _require_room(self, allocation: Allocation) -> None:
        """Refuse (508) one channel more than an allocation, or this relay, may have."""
        settings = self._state.settings
        limit = settings.max_channels_per_allocation
        if limit is not None and len(allocation.channels) >= limit:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, f"the allocation has {limit} channels")
        if self._state.tables.channels >= settings.max_channels:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many channels as are allowed")

    def _require_permissions(self, allocation: Allocation, hosts: Collection[str]) -> None:
        """Refuse (508) more permissions than an allocation, or this relay, may have."""
        settings, known = self._state.settings, _permitted(allocation)
        new = len(set(hosts) - known)
        limit = settings.max_channels_per_allocation
        if limit is not None and new and len(known) + new > limit:
            reason = f"the allocation has {len(known)} permissions"
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, reason)
        if new and self._state.tables.permissions + new > settings.max_permissions:
            raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many permissions as are allowed")


def _permitted(allocation: Allocation) -> AbstractSet[str]:
    """Return the hosts for which an allocation has permissions."""
    permissions = allocation.permissions
    return frozenset() if permissions is None else permissions.expires_at.keys()


def _require_family(families: tuple[Family, ...], host: str) -> None:
    if family_of(host) not in families:
        code = ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH
        raise Refused(code, f"no {family_of(host).name} allocated")
