"""What the handlers share: what is allowed, what there is, and where commands go."""

from collections import deque
from dataclasses import dataclass, field

from relay.stun.address import Address, family_of
from relay.stun.const import ErrorCode
from relay.turn.commands import Command
from relay.turn.hints import Hints
from relay.turn.peers import PeerPolicy
from relay.turn.request import Answers, Refused, Request
from relay.turn.settings import Settings
from relay.turn.tables import Allocation, Tables


@dataclass(slots=True)
class State:
    """The server's state, and the rules that a reload changes. Only ``Tables`` writes to tables."""

    settings: Settings
    peer_policy: PeerPolicy
    tables: Tables
    answers: Answers
    commands: deque[Command]
    hints: Hints = field(default_factory=Hints)

    def allocation(self, request: Request) -> Allocation:
        """Find the allocation that a request other than Allocate is about. RFC 8656 §5."""
        allocation = self.any_allocation(request)
        if allocation.user != request.user:
            raise Refused(ErrorCode.WRONG_CREDENTIALS, "made by another user")
        return allocation

    def any_allocation(self, request: Request) -> Allocation:
        """Find what the 5-tuple of a request holds, whoever made it."""
        allocation = self.tables.live_of_client(request.client, request.now)
        if allocation is None:
            raise Refused(ErrorCode.ALLOCATION_MISMATCH, "this 5-tuple has no allocation")
        return allocation

    def is_relayed_here(self, address: Address) -> bool:
        """Tell if *address* is the relayed address of an allocation that lives."""
        host, port = address
        allocation = self.tables.at_port(port)
        family = family_of(host)
        return (
            allocation is not None
            and family in allocation.families
            and self.settings.public_hosts[family] == host
        )
