"""The addresses that this host has at the moment, as the kernel tells of each that comes or goes.

Asked for at start, all of them, and then kept as a set by messages of rtnetlink. If these come
faster than they are read, the kernel drops some and says so (ENOBUFS): then all are asked for
again. Each call of the handler reads one piece, 200 addresses at most, however many there are.
"""

import errno
import logging
import os
import socket
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass
from typing import Final

from relay.net import netlink
from relay.net.addresses import READ_SIZE, binds_anything, can_bind, open_netlink

logger = logging.getLogger("relay.net")

_MAX_DISCARDED: Final = 1000  # messages per call, when all addresses are asked for again anyway

OpenSocket = Callable[[int], socket.socket]
OnChange = Callable[[Collection[bytes], bool], None]
"""Takes the addresses that came, went or changed, and whether any of them is new."""


class HostAddresses:
    """A live set: ``packed in addresses`` tells if the host has an address of 4 or 16 bytes."""

    def __init__(self, open_socket: OpenSocket = open_netlink) -> None:
        """Ask for all addresses, and wait for them. Raises OSError."""
        self.on_change: OnChange = _ignore
        self._entries: dict[netlink.Entry, int] = {}  # with the last dump that had them
        self._interfaces: dict[bytes, int] = {}  # how many entries each address has
        self._dump = 0  # the number of the last one
        self._is_dumping = self._lost_some = False
        self._sock = open_socket(netlink.GROUPS)
        try:
            self._ask()
            while self._is_dumping:
                self._read()
            if self._lost_some:
                self._ask_again()  # the loop reads what comes of it
        except BaseException:
            self._sock.close()
            raise

    def __contains__(self, packed: object) -> bool:
        return packed in self._interfaces

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def on_readable(self) -> bool:
        """Read some of what the kernel says; return whether there may be more."""
        try:
            self._read()
        except BlockingIOError:
            return False
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.ENOBUFS:
                self._lost_some = True
            else:
                logger.warning("what changes at this host's addresses may be missed: %s", error)
        if self._lost_some and not self._is_dumping:
            self._ask_again()
        return True

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _read(self) -> None:
        """Read one piece. Raises OSError, ValueError."""
        data, (sender, _) = self._sock.recvfrom(READ_SIZE)
        if sender != 0:  # not the kernel
            return
        touched: set[bytes] = set()
        is_new = False
        for kind, flags, sequence, body in netlink.messages(data):
            if kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
                found = netlink.address(body)
                if found is not None:
                    entry = found[0]
                    touched.add(entry[2])
                    if kind == netlink.RTM_NEWADDR:
                        is_new |= self._add(entry)
                    else:
                        self._remove(entry)
            elif sequence == self._dump and kind in (netlink.NLMSG_DONE, netlink.NLMSG_ERROR):
                self._is_dumping = False
                if kind == netlink.NLMSG_ERROR and (number := netlink.error(body)):
                    raise OSError(number, os.strerror(number))
                if not self._lost_some:
                    touched |= self._forget_what_it_lacked()
            if flags & netlink.NLM_F_DUMP_INTR:
                self._lost_some = True
        if touched:
            self.on_change(touched, is_new)

    def _add(self, entry: netlink.Entry) -> bool:
        """Add an entry; return whether its address is a new one that others could reach."""
        packed = entry[2]
        is_new = packed not in self._interfaces
        if entry not in self._entries:
            self._interfaces[packed] = self._interfaces.get(packed, 0) + 1
        self._entries[entry] = self._dump
        # Link-local ones come with every container that a host starts.
        return is_new and not (packed[0] == 0xFE and packed[1] & 0xC0 == 0x80)

    def _remove(self, entry: netlink.Entry) -> None:
        if self._entries.pop(entry, None) is not None:
            packed = entry[2]
            self._interfaces[packed] -= 1
            if not self._interfaces[packed]:
                del self._interfaces[packed]

    def _forget_what_it_lacked(self) -> set[bytes]:
        """Remove what the dump that has ended was without; return the addresses."""
        stale = [entry for entry, dump in self._entries.items() if dump != self._dump]
        for entry in stale:
            self._remove(entry)
        return {packed for _, _, packed in stale}

    def _ask(self) -> None:
        """Ask for all addresses. Raises OSError."""
        self._dump += 1
        self._sock.send(netlink.dump_request(self._dump))
        self._is_dumping = True

    def _ask_again(self) -> None:
        """Ask for all addresses once nothing older is left to read: there may be no room."""
        for _ in range(_MAX_DISCARDED):
            try:
                self._sock.recv(1)
            except BlockingIOError:
                self._ask()
                self._lost_some = False
                return
            except OSError:  # more is lost meanwhile, which makes no difference
                pass


class ProbedAddresses:
    """The same where the kernel does not tell: what a socket can be bound to is ours.

    Without descriptors that cannot be found out; then it counts as ours, which is safe.
    """

    def __contains__(self, packed: object) -> bool:
        assert isinstance(packed, bytes)
        family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        return can_bind(socket.inet_ntop(family, packed))


@dataclass(frozen=True, slots=True)
class Union:
    """Addresses that are always counted in, and those that come and go."""

    always: frozenset[bytes]
    live: Container[bytes]

    def __contains__(self, packed: object) -> bool:
        return packed in self.always or packed in self.live


def host_addresses(open_socket: OpenSocket = open_netlink) -> "HostAddresses | Container[bytes]":
    """Return the addresses of this host, live; or, with a warning, what there is instead."""
    try:
        return HostAddresses(open_socket)
    except (OSError, ValueError) as error:
        problem = f"the kernel does not tell of this host's addresses (AF_NETLINK: {error})"
    if binds_anything():
        logger.warning(
            "%s: clients are kept from the configured ones only; others of this host are closed "
            "to them only by --deny-peer",
            problem,
        )
        return frozenset()
    logger.warning(
        "%s: for each channel it is tried whether its peer is one, and a public address that "
        "comes or goes is noticed at a reload or a restart",
        problem,
    )
    return ProbedAddresses()


def _ignore(_touched: Collection[bytes], _is_new: bool) -> None:
    """Do nothing."""
