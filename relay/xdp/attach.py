"""Putting the program to work: at which devices, in which mode, and if not, why not."""

import errno
import logging
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from relay.observe.counters import NOT_ATTACHED, PACKET_SIZES, InKernel, Relayed
from relay.stun.const import Family
from relay.xdp import XdpError, bpf
from relay.xdp.devices import SENDING_DRIVERS, VETH, driver_of, is_ethernet
from relay.xdp.routes import KNOWN_FAILURES, LAYOUT, KernelRoutes, LostControl, RouteMap

logger = logging.getLogger("relay.xdp")

Mode = Literal["auto", "require", "generic"]
"""require: at each device, or not at all. generic: also where the driver has no place for it."""

OBJECT: Final = "turn.bpf.o"
_MODES: Final = {"native": bpf.NATIVE, "generic": bpf.GENERIC}
_NAME: Final = "turn"  # of the program, as ip and bpftool show it
_SIZE_CLASSES: Final = len(PACKET_SIZES) + 1
_RELAYED: Final = struct.Struct("=QQ")  # struct relayed

# What sends by the host's routes without making the host a router, by family.
FORWARDING: Final = {
    Family.IPV4: "net/ipv4/conf/lo/forwarding",
    Family.IPV6: "net/ipv6/conf/lo/forwarding",
}

PRIVILEGES: Final = (
    "it takes CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON in the host's user namespace "
    "(contrib/systemd/xdp.conf gives them), and the system call bpf"
)
_LOAD_HELP: Final = {
    errno.EPERM: PRIVILEGES,
    errno.EACCES: PRIVILEGES,
    errno.ENOSYS: "this kernel, or this kind of machine, has no bpf(2)",
    errno.EINVAL: "it takes Linux 5.19",
}
_ATTACH_HELP: Final = {
    errno.EPERM: PRIVILEGES,
    errno.EOPNOTSUPP: "its driver has no place for a program; --xdp generic does without one",
    errno.EINVAL: "its driver refuses; often it has too few queues (ethtool -l and -L), or what "
    "does not go together with it is on (ethtool -k: large-receive-offload, rx-gro-hw)",
    errno.ENOMEM: "it has too few queues that are free (ethtool -l and -L)",
    errno.ERANGE: "its MTU is too large: there is room for about 3,500 bytes",
    errno.EBUSY: "another program is there already (ip link show)",
    errno.EEXIST: "another program is there already, in another mode (ip link show)",
}


_VETH_HELP: Final = (
    "it is a veth, and what its driver is to send is lost unless there is a program or GRO at the "
    "other end; --xdp generic does without the driver, --xdp-device names it all the same"
)


class MakeRoutes(Protocol):
    """Returns what writes to a map of routes."""

    def __call__(self, routes: RouteMap, *, on_lost_control: LostControl) -> KernelRoutes:
        """Do that."""


class KernelPath:
    """The program and the devices where it is to be attached. What it does not do, sockets do."""

    def __init__(
        self, mode: Mode, devices: Iterable[str], make_routes: MakeRoutes, *, are_named: bool
    ) -> None:
        """Begin without a program. *are_named*: the operator has chosen the *devices*."""
        self._mode = mode
        self._are_named = are_named
        self._make_routes = make_routes
        self._devices = dict.fromkeys(devices, NOT_ATTACHED)
        self._program: bpf.Program | None = None
        self._links: dict[str, int] = {}  # by device
        self._failures = Counter(dict.fromkeys(("not_loaded", "not_attached"), 0))
        self._last_counts = [Relayed(0, 0)] * (2 * _SIZE_CLASSES)
        self.routes: KernelRoutes | None = None  # once the program is at work

    def start(self, families: Collection[Family]) -> None:
        """Load the program, and attach it wherever that can be; where it cannot, say why.

        Raises XdpError if it is attached nowhere; in mode "require" if it is not everywhere.
        """
        if not self._devices:
            raise XdpError("there is no Ethernet device for it; --xdp-device names one")
        try:
            program = self._program = load()
        except XdpError:
            self._failures["not_loaded"] += 1
            raise
        for family in families:
            _forward_from_loopback(family)
        for device in self._devices:
            try:
                self._devices[device] = self._attach(program, device)
            except XdpError as error:
                self._failures["not_attached"] += 1
                if self._mode == "require":
                    raise
                logger.warning("xdp: %s", error)
        self._allow_to_leave(program)
        attached = [f"{name} ({how})" for name, how in self._devices.items() if how != NOT_ATTACHED]
        if not attached:
            raise XdpError("it is attached to no device")
        self.routes = self._make_routes(program.maps["routes"], on_lost_control=self._give_up)
        logger.info("xdp: the kernel relays channels at %s", ", ".join(attached))

    def dump(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return what a successor needs to go on with it, and descriptors; None if it is nowhere.

        The latter are those of the program, of each map and of each link.
        """
        program = self._program
        if program is None or not self._links:
            return None
        maps = {name: list(astuple(each.definition)) for name, each in program.maps.items()}
        links = {device: self._devices[device] for device in self._links}
        descriptors = [program.fd, *(each.fd for each in program.maps.values())]
        inherited = {"layout": LAYOUT, "maps": maps, "links": links}
        return inherited, [*descriptors, *self._links.values()]

    def inherit(self, inherited: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Go on with what another process has attached, in the form of :meth:`dump`.

        The descriptors are ours from here on. Raises XdpError if this version cannot go on with it;
        then they are closed, and it is detached when the other process ends.
        """
        maps = _read_program().maps
        theirs = {name: tuple(numbers) for name, numbers in inherited["maps"].items()}
        ours = {name: astuple(definition) for name, definition in maps.items()}
        if inherited["layout"] != LAYOUT or theirs != ours:
            for descriptor in descriptors:
                os.close(descriptor)
            raise XdpError("what is in the kernel is of another version: it takes a restart")
        program, *others = descriptors
        of_maps, of_links = others[: len(maps)], others[len(maps) :]
        self._program = bpf.Program.inherited(
            program,
            {name: (maps[name], each) for name, each in zip(theirs, of_maps, strict=True)},
        )
        links: Mapping[str, str] = inherited["links"]
        self._links = dict(zip(links, of_links, strict=True))
        self._devices = dict.fromkeys(self._devices, NOT_ATTACHED) | dict(links)
        self.routes = self._make_routes(self._program.maps["routes"], on_lost_control=self._give_up)
        self.routes.hold_back()

    @property
    def is_attached(self) -> bool:
        """Whether it is attached anywhere."""
        return bool(self._links)

    def take_over(self, *, is_attached: bool, next_id: int) -> None:
        """See to what was inherited from here on, unless the other process has detached it."""
        if self.routes is not None:
            if not is_attached:
                self._detach()
            self.routes.next_id = next_id
            self.routes.release()

    def verify(self) -> None:
        """Write to a map, and take that back, with the privileges there are now.

        Kernels before 5.19 refuse that to who has none: then nothing is attached any more. Raises
        XdpError.
        """
        if self._program is None or self.routes is None:
            return
        routes = self._program.maps["routes"]
        nobodys = bytes(routes.definition.key_size)  # the flow of no datagram
        try:
            routes.update(nobodys, bytes(routes.definition.value_size))
            routes.delete_many(nobodys, 1)
        except OSError as error:
            self._detach()
            problem = f"a map cannot be written without privileges ({error.strerror})"
            raise XdpError(f"{problem}: that takes Linux 5.19") from error

    def status(self) -> InKernel:
        """Return what it does and has done. For any thread."""
        if self._program is not None:
            with suppress(OSError):  # closed by now, or refused: what was read last stays true
                self._last_counts = [
                    Relayed(*map(sum, zip(*map(_RELAYED.unpack, each), strict=True)))
                    for each in self._program.maps["relayed"].lookup_all()
                ]
        counts, failures = self._last_counts, dict.fromkeys(KNOWN_FAILURES, 0)
        if self.routes is not None:
            failures.update(self.routes.failures)
        return InKernel(
            devices=dict(self._devices),
            routes=0 if self.routes is None else len(self.routes),
            failures={**self._failures, **failures},
            to_peer=counts[:_SIZE_CLASSES],
            to_client=counts[_SIZE_CLASSES:],
        )

    def close(self) -> None:
        """Detach and unload it."""
        self._detach()
        if self._program is not None:
            self._program.close()
            self._program = None

    def _give_up(self, reason: str) -> None:
        logger.error("xdp: %s: the program is detached, and the sockets relay everything", reason)
        self._detach()

    def _detach(self) -> None:
        for link in self._links.values():
            os.close(link)
        self._links.clear()
        self._devices = dict.fromkeys(self._devices, NOT_ATTACHED)
        if self.routes is not None:
            self.routes.stop()

    def _attach(self, program: bpf.Program, device: str) -> str:
        """Attach it to a device; return in which mode. Raises XdpError."""
        try:
            index = socket.if_nametoindex(device)
        except OSError:
            raise XdpError(f"{device}: there is no such device") from None
        if not is_ethernet(device):
            raise XdpError(f"{device}: it is no Ethernet device")
        is_veth = driver_of(device) == VETH
        if is_veth and self._are_named:
            logger.warning("xdp: %s: %s", device, _VETH_HELP)
        may_lose = is_veth and not self._are_named
        modes = [] if may_lose else ["native"]
        if self._mode == "generic":
            modes.append("generic")
        for mode in modes:
            try:
                self._links[device] = program.attach(index, _MODES[mode])
            except OSError as error:
                failure = error
            else:
                return mode
        if may_lose:
            raise XdpError(f"{device}: {_VETH_HELP}")
        raise XdpError(_explained(f"{device}: it cannot be attached", failure, _ATTACH_HELP))

    def _allow_to_leave(self, program: bpf.Program) -> None:
        """Let frames go from one device to another.

        From a native one they go by the driver of the other, which has to be native as well.
        """
        modes = set(self._devices.values()) - {NOT_ATTACHED}
        only = "native" if "native" in modes else "generic"
        for device, mode in self._devices.items():
            if mode != only:
                continue
            if mode == "native" and driver_of(device) not in SENDING_DRIVERS:
                logger.info(
                    "xdp: %s: what comes in elsewhere leaves here by the sockets: its driver (%s) "
                    "is not known to send for another device",
                    device,
                    driver_of(device) or "unknown",
                )
                continue
            try:
                key = struct.pack("=I", socket.if_nametoindex(device))
                program.maps["devices"].update(key, key)
            except OSError as error:  # there are too many, or it has just gone
                logger.warning(
                    "xdp: %s: what comes in elsewhere leaves here by the sockets: %s",
                    device,
                    error.strerror,
                )


def load() -> bpf.Program:
    """Load the program that is installed with this package. Raises XdpError."""
    if sys.byteorder != "little":
        raise XdpError("the program is for little-endian machines only")
    content = _read_program()
    try:
        return bpf.Program(content, _NAME)
    except OSError as error:
        raise XdpError(_explained("the program cannot be loaded", error, _LOAD_HELP)) from error


def _read_program() -> bpf.ProgramObject:
    """Read the program that is installed with this package. Raises XdpError."""
    try:
        return bpf.read_object(resources.files("relay.xdp") / OBJECT)
    except bpf.ObjectError as error:
        raise XdpError(f"the program is damaged: {error}") from error
    except OSError as error:
        raise XdpError(f"the program cannot be read: {error.strerror}") from error


def _explained(problem: str, error: OSError, helps: Mapping[int, str]) -> str:
    advice = helps.get(error.errno or 0)
    return f"{problem}: {error.strerror}" + (f" ({advice})" if advice else "")


def _forward_from_loopback(family: Family) -> None:
    """Let the program ask for routes. Raises XdpError."""
    name = FORWARDING[family]
    path = Path("/proc/sys", name)
    with suppress(OSError):
        path.write_text("1")
    try:
        is_on = path.read_text().strip() == "1"
    except OSError as error:
        raise XdpError(f"/proc/sys/{name} cannot be read: {error.strerror}") from error
    if not is_on:
        setting = name.replace("/", ".")
        raise XdpError(
            f"{setting} is off and cannot be written: set it by sysctl -w {setting}=1, or by a "
            "file in /etc/sysctl.d, as contrib/systemd/firezone-relay.sysctl.conf does"
        )
