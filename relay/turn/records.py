"""The relay's state as records: what one process writes for its successor to go on with.

A record is what JSON calls an object: one for each allocation, and one for the rest. Times are
seconds of the system's monotonic clock, which all processes share. Bytes are in hexadecimal,
families and codes the numbers that the protocol has for them. An allocation is::

    {"client": [["192.0.2.10", 5000], "" or ["tcp", 7]],    its address, and ours or the connection
     "user": "alice", "port": 50000, "nonce_issued": 940,
     "transaction_id": "6162...", "reservation_token": null or "0001...",
     "expires_at": [[1, 1600.25]], "address_errors": [[2, 440]],
     "budget_due": 1000.25,
     "channels": [[16385, "198.51.100.7", 9000, true, "bound", 1600.25]],
     "permissions": null or {"hosts": [["198.51.100.7", 1300.25]], "reports_errors": false}}

Whoever changes what a record means raises :data:`FORMAT`, and goes on reading the one before.
What a reader does not know it passes over, so a new key alone is no new format.
"""

from typing import Any, Final

from relay.stun.const import ErrorCode, Family
from relay.turn.commands import ClientAddress, Connection, PeerAddress
from relay.turn.tables import Allocation, Binding, Channel, Permissions, Reservation

FORMAT: Final = 1
"""The format of the records that are written."""
READABLE: Final = (1,)
"""The formats that can be read: this one, and the one before once there is one."""

Record = dict[str, Any]


class UnreadableState(ValueError):
    """What another process has written cannot be gone on with. The text says why."""


def require_readable(number: object) -> None:
    """Raise UnreadableState unless records of this format can be read."""
    if number not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise UnreadableState(
            f"the state is of format {number!r}, and this version reads only {known}"
        )


# --- Clients ---------------------------------------------------------------------------------


def dump_client(client: ClientAddress) -> list[Any]:
    """Write a client's address."""
    address, ours = client
    return [list(address), ours.hex() if isinstance(ours, bytes) else list(ours)]


def load_client(written: Any) -> ClientAddress:  # noqa: ANN401
    """Read a client's address. Raises TypeError or ValueError."""
    address, ours = written
    if isinstance(ours, str):
        return ClientAddress((tuple(address), bytes.fromhex(ours)))
    transport, number = ours
    return ClientAddress((tuple(address), Connection(str(transport), int(number))))


# --- Allocations -----------------------------------------------------------------------------


def dump_allocation(allocation: Allocation) -> Record:
    """Write an allocation, with its channels and permissions."""
    permissions, token = allocation.permissions, allocation.reservation_token
    return {
        "client": dump_client(allocation.client),
        "user": allocation.user,
        "port": allocation.port,
        "nonce_issued": allocation.nonce_issued,
        "transaction_id": allocation.transaction_id.hex(),
        "reservation_token": None if token is None else token.hex(),
        "expires_at": list(allocation.expires_at.items()),
        "address_errors": list(allocation.address_errors.items()),
        "budget_due": allocation.budget.due,
        "channels": [_dump_channel(channel) for channel in allocation.channels.values()],
        "permissions": None
        if permissions is None
        else {
            "hosts": list(permissions.expires_at.items()),
            "reports_errors": permissions.report_errors,
        },
    }


def load_allocation(record: Record) -> tuple[Allocation, dict[Channel, float]]:
    """Read an allocation, which is in no table yet, and when each of its channels ends.

    Raises UnreadableState.
    """
    try:
        return _load_allocation(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableState(f"an allocation: {type(error).__name__}: {error}") from None


def _load_allocation(record: Record) -> tuple[Allocation, dict[Channel, float]]:
    client, port = load_client(record["client"]), int(record["port"])
    token = record["reservation_token"]
    allocation = Allocation(
        client=client,
        user=str(record["user"]),
        port=port,
        expires_at={Family(number): float(end) for number, end in record["expires_at"]},
        address_errors={
            Family(number): ErrorCode(code) for number, code in record["address_errors"]
        },
        transaction_id=bytes.fromhex(record["transaction_id"]),
        nonce_issued=int(record["nonce_issued"]),
        reservation_token=None if token is None else bytes.fromhex(token),
    )
    if not allocation.expires_at:
        raise ValueError("it has no family")
    allocation.budget.due = float(record["budget_due"])
    deadlines: dict[Channel, float] = {}
    for number, host, peer_port, reaches_outside, state, deadline in record["channels"]:
        peer = PeerAddress((str(host), int(peer_port)))
        channel = Channel(client, int(number), port, peer, bool(reaches_outside), _STATES[state])
        allocation.channels[channel.number] = allocation.channels_by_peer[peer] = channel
        deadlines[channel] = float(deadline)
    permissions = record["permissions"]
    if permissions is not None:
        hosts = {str(host): float(end) for host, end in permissions["hosts"]}
        allocation.permissions = Permissions(
            client, port, hosts, bool(permissions["reports_errors"])
        )
    return allocation, deadlines


_STATES: Final = {"bound": Binding.BOUND, "cooling": Binding.COOLING}
_NAMES: Final = {state: name for name, state in _STATES.items()}


def _dump_channel(channel: Channel) -> list[Any]:
    assert channel.timer is not None
    return [
        channel.number,
        *channel.peer,
        channel.reaches_outside,
        _NAMES[channel.state],
        channel.timer.deadline,
    ]


# --- Reservations ----------------------------------------------------------------------------


def dump_reservation(reservation: Reservation) -> Record:
    """Write a reservation."""
    return {
        "token": reservation.token.hex(),
        "user": reservation.user,
        "site": reservation.site.hex(),
        "family": reservation.family,
        "port": reservation.port,
        "expires_at": reservation.expires_at,
    }


def load_reservation(record: Record) -> Reservation:
    """Read a reservation. Raises KeyError, TypeError or ValueError."""
    return Reservation(
        token=bytes.fromhex(record["token"]),
        user=str(record["user"]),
        site=bytes.fromhex(record["site"]),
        family=Family(record["family"]),
        port=int(record["port"]),
        expires_at=float(record["expires_at"]),
    )
