"""How much of the relay one user, one address, and all of them may hold. RFC 8656 §7.2."""

from relay.stun.const import ErrorCode, Family
from relay.turn.request import Refused
from relay.turn.state import State
from relay.turn.tables import Allocation, site_of


def require_quota(
    state: State, user: str, host: str, replaced: list[Allocation], *, wanted: int = 1
) -> None:
    """Refuse (486) *wanted* allocations and reservations more than a user, or an address, may have.

    The allocations *replaced* are about to end.
    """
    settings, tables = state.settings, state.tables
    limit = settings.max_allocations_per_username
    if limit is not None and tables.count_of_user(user) - len(replaced) + wanted > limit:
        raise Refused(ErrorCode.ALLOCATION_QUOTA_REACHED, f"the user has {limit}")
    limit = settings.max_allocations_per_ip
    if limit is not None:
        site = site_of(host)
        ending = sum(site_of(other.client[0][0]) == site for other in replaced)
        if tables.at_site(site) - ending + wanted > limit:
            raise Refused(ErrorCode.ALLOCATION_QUOTA_REACHED, f"the address has {limit}")


def room_for(state: State, families: tuple[Family, ...], replaced: list[Allocation]) -> int:
    """Return in how many *families*, from the first on, an allocation is possible now.

    Refuses (508) one that is more than this relay may hold, or can.
    """
    settings, tables = state.settings, state.tables
    if not replaced and len(tables) >= settings.max_allocations:
        raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many allocations as are allowed")
    ending = sum(len(other.families) for other in replaced)
    room = settings.max_sockets - tables.sockets + ending
    if room < 1:
        raise Refused(ErrorCode.INSUFFICIENT_CAPACITY, "as many sockets as are allowed")
    return min(room, len(families))
