"""At which address ports are bound: the public one while this host has it, else another.

On a host with several addresses only binding to one makes the kernel send from it. Behind a 1:1
NAT the public address is not ours to bind, and the listening one has to do.
"""

import errno
import logging
from collections.abc import Callable, Collection, Container, Mapping
from typing import Final, TypeVar

from relay.net.addresses import WILDCARDS, can_bind, has_local_route, pack

logger = logging.getLogger("relay.net")

T = TypeVar("T")


class PortHosts:
    """For each family the address to bind ports at, as of now."""

    def __init__(
        self, own: Container[bytes], public: Mapping[int, str], bind: Mapping[int, str]
    ) -> None:
        """Take the addresses that this host has, packed, and by family which are wanted.

        *public* is where peers reach a port, *bind* where the operator said to listen. If that is
        one address, and not a wildcard, ports are bound there and nowhere else.
        """
        self._own = own
        self._public = dict(public)
        self._bind = dict(bind)
        # The address of this host without which a family is not served.
        self._wanted = {
            family: public[family] if host in WILDCARDS else host for family, host in bind.items()
        }
        self._packed: Final = {pack(host): family for family, host in self._wanted.items()}
        self._had = {family for family in self._wanted if self._has(family)}
        self.current = {family: self._choice(family) for family in self._wanted}
        # What may come from a port of ours. Behind a NAT that loops back, its public address too.
        self._sources = {
            family: {self._public[family], self.current[family]} for family in self._wanted
        }

    def on_change(self, touched: Collection[bytes]) -> None:
        """Look again whether the addresses are there that are *touched* by a change."""
        for packed, family in self._packed.items():
            if packed in touched:
                self._look(family)

    def look_at_all(self) -> None:
        """Look again whether any of the addresses is there."""
        for family in self._wanted:
            self._look(family)

    def open(self, family: int, open_at_current: Callable[[], T]) -> T:
        """Open a port at the current address, or if that fails where it can. Raises OSError.

        An address can be there and not be ready: of IPv6 while it is being checked for
        duplicates, or for good when there is one.
        """
        try:
            return open_at_current()
        except OSError as error:
            current, bind = self.current[family], self._bind[family]
            if error.errno != errno.EADDRNOTAVAIL or current == bind:
                raise
            self._change(family, bind)
        return open_at_current()

    def are_sources_of(self, family: int, host: str) -> bool:
        """Tell if a port bound here sends from *host*."""
        return any(
            host == source or (source in WILDCARDS and pack(host) in self._own)
            for source in self._sources[family]
        )

    @property
    def missing(self) -> str:
        """The addresses that this host had and lost, if it has none that is left; else nothing."""
        if any(family not in self._had or self._has(family) for family in self._wanted):
            return ""
        return " and ".join(self._wanted.values())

    def _has(self, family: int) -> bool:
        return pack(self._wanted[family]) in self._own

    def _look(self, family: int) -> None:
        if self._has(family):
            self._had.add(family)
        choice = self._choice(family)
        if choice != self.current[family]:
            self._change(family, choice)

    def _choice(self, family: int) -> str:
        public, bind = self._public[family], self._bind[family]
        if bind not in WILDCARDS:
            return bind
        is_ours = can_bind(public) if pack(public) in self._own else has_local_route(public)
        return public if is_ours else bind

    def _change(self, family: int, host: str) -> None:
        self.current[family] = host
        self._sources[family].add(host)
        if host in WILDCARDS:
            logger.warning(
                "%s cannot be bound: new relay ports are bound to %s, so peers may hear from "
                "another address than they were told",
                self._public[family],
                host,
            )
        else:
            logger.info("new relay ports are bound to %s, which this host has now", host)
