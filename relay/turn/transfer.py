"""From one process to the next: the server's state leaves as records, and comes from them.

While the old process serves on, it writes all allocations, then again those that have changed, and
at last, when it serves no more, those that have changed since and what else there is. The new
process reads them in that order. From then on it answers to everything as the old one would have.

Three things begin anew, for they are of no use to a client: the keys of users (made again when
needed), what was logged already, and by which prefixes much was asked. How much was asked by all
together is known, so a flood gains nothing but a share within the same bound.
"""

from collections import Counter
from typing import Any, Final

from relay.turn.admission import Admission
from relay.turn.auth import AuthFailure
from relay.turn.channels import ChannelHandler
from relay.turn.commands import ClientAddress, transport_of
from relay.turn.ratelimit import RateLimiter
from relay.turn.records import (
    Record,
    UnreadableState,
    dump_allocation,
    dump_reservation,
    load_allocation,
    load_reservation,
)
from relay.turn.state import State
from relay.turn.tables import Allocation

_TRANSPORTS_THAT_END: Final = frozenset({"tls"})


class Transfer:
    """Writes and reads the state of a server. Nothing of it may run in between."""

    def __init__(
        self,
        state: State,
        admission: Admission,
        channels: ChannelHandler,
        limiters: tuple[RateLimiter, RateLimiter],
    ) -> None:
        self._state = state
        self._admission = admission
        self._channels = channels
        self._limiters = limiters

    # --- Out ---------------------------------------------------------------------------------

    def begin(self) -> list[ClientAddress]:
        """Return whose allocations there are to write, and note from here on which ones change.

        Of a client that speaks TLS there is nothing to write: its session ends with the process.
        """
        tables = self._state.tables
        tables.changed = {}
        clients = (allocation.client for allocation in tables.all_allocations())
        return [client for client in clients if _can_go_on(client)]

    def take_changed(self) -> list[ClientAddress]:
        """Return the clients whose allocations have changed since, and begin to note anew."""
        tables = self._state.tables
        changed, tables.changed = tables.changed or {}, {}
        return [client for client in changed if _can_go_on(client)]

    @property
    def changed(self) -> int:
        """How many have changed since."""
        return len(self._state.tables.changed or ())

    def end(self) -> None:
        """Note no more."""
        self._state.tables.changed = None

    def dump(self, client: ClientAddress) -> Record | None:
        """Write what a client has; None if that is nothing."""
        allocation = self._state.tables.of_client(client)
        return None if allocation is None else dump_allocation(allocation)

    def dump_rest(self) -> Record:
        """Write all but the allocations."""
        tables, (limiter, connection_limiter) = self._state.tables, self._limiters
        last, before = tables.ended.dump()
        return {
            "reservations": [dump_reservation(one) for one in tables.all_reservations()],
            "ports_aside": tables.free_ports.aside,
            "ended": [last.hex(), before.hex()],
            "due_in_all": [limiter.due_in_all, connection_limiter.due_in_all],
            "responses": [[*key, count] for key, count in self._state.answers.sent.items()],
            "auth_failures": {why.value: n for why, n in self._admission.failures.items()},
            "refused_peers": dict(self._channels.refused),
        }

    # --- In ----------------------------------------------------------------------------------

    def load(self, record: Record) -> Allocation:
        """Enter an allocation; commands ask to relay what it relays, through ports that are open.

        Raises UnreadableState, also where this server cannot have such a one.
        """
        allocation, deadlines = load_allocation(record)
        settings = self._state.settings
        for family in allocation.families:
            if family not in settings.public_hosts:
                raise UnreadableState(
                    f"there is an allocation of {family.name}, and no public address of that"
                )
        if not settings.send_indications:
            allocation.permissions = None
        if not self._state.tables.restore(allocation, deadlines):
            ports = settings.ports
            raise UnreadableState(
                f"there is an allocation at port {allocation.port}, which is none of the ports "
                f"{ports[0]}-{ports[-1]} that may be lent, or is lent already"
            )
        return allocation

    def evict(self, client: ClientAddress) -> Allocation | None:
        """Forget what was entered for a client, and return it. No command says so."""
        return self._state.tables.evict(client)

    def load_rest(self, record: Record) -> None:
        """Enter what :meth:`dump_rest` wrote, once all allocations are there.

        Raises UnreadableState.
        """
        try:
            self._load_rest(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableState(f"the state: {type(error).__name__}: {error}") from None

    def _load_rest(self, record: dict[str, Any]) -> None:
        tables, (limiter, connection_limiter) = self._state.tables, self._limiters
        for each in record["reservations"]:
            reservation = load_reservation(each)
            # Of a port that may be lent no more nobody can redeem one.
            if tables.free_ports.claim(reservation.port):
                tables.reserve(reservation)
        tables.free_ports.put_aside(
            (float(until), int(port)) for until, port in record["ports_aside"]
        )
        last, before = record["ended"]
        tables.ended.load(bytes.fromhex(last), bytes.fromhex(before))
        limiter.due_in_all, connection_limiter.due_in_all = map(float, record["due_in_all"])
        self._state.answers.sent.update(
            {(str(method), str(code)): int(count) for method, code, count in record["responses"]}
        )
        failures = record["auth_failures"]
        self._admission.failures.update(
            {why: int(failures[why.value]) for why in AuthFailure if why.value in failures}
        )
        self._channels.refused.update(Counter(record["refused_peers"]))


def _can_go_on(client: ClientAddress) -> bool:
    return transport_of(client) not in _TRANSPORTS_THAT_END
