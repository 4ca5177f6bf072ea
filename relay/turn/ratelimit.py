"""How many unauthenticated requests are answered: per prefix of source addresses, and in all.

Anyone can ask in the name of anyone else, so what goes to those who prove nothing is bounded
twice: what one network can be made to receive, and what all of them can cost. Above that
there is silence. Memory is fixed: prefixes share the slots of one table, by a hash that
CPython seeds at random for each process, so nobody can aim at another's slot.
"""

from array import array
from typing import Final

from relay.stun.address import prefix_of
from relay.turn.commands import Drop

BURST: Final = 5.0  # seconds' worth of answers that may come at once after a pause
IPV4_BYTES: Final = 3  # of an address make the prefix: /24
IPV6_BYTES: Final = 7  # /56, what a customer of a provider gets
SLOTS: Final = 1 << 16


class RateLimiter:
    """Spaces answers evenly, but for bursts: the generic cell rate algorithm (ITU-T I.371).

    For each slot it keeps when the next answer would be due if they were sent at exactly the
    rate; an answer may leave up to :data:`BURST` seconds before that.
    """

    def __init__(self, per_prefix: int, total: int) -> None:
        """Take the rates in answers per second; 0 is no limit."""
        self._due = array("d", bytes(8 * SLOTS))
        self._due_in_all = 0.0
        self.set_rates(per_prefix, total)

    def set_rates(self, per_prefix: int, total: int) -> None:
        """Go on with other rates, in answers per second; 0 is no limit."""
        self._spacing = 1 / per_prefix if per_prefix else 0.0
        self._spacing_in_all = 1 / total if total else 0.0

    def refusal(self, host: str, now: float) -> Drop | None:
        """Say which limit an answer to *host* would exceed, or None."""
        latest = now + BURST
        if self._spacing_in_all and self._due_in_all > latest:
            return Drop.TOTAL_RATE
        if self._spacing and self._due[_slot(host)] > latest:
            return Drop.PREFIX_RATE
        return None

    def count(self, host: str, now: float) -> None:
        """Count an answer to *host* as sent."""
        slot = _slot(host)
        self._due[slot] = max(self._due[slot], now) + self._spacing
        self._due_in_all = max(self._due_in_all, now) + self._spacing_in_all


def _slot(host: str) -> int:
    return hash(prefix_of(host, IPV4_BYTES, IPV6_BYTES)) % SLOTS
