"""Network devices: which of them the program is for, and what their drivers can do."""

import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from relay.net.addresses import WILDCARDS, dump_addresses, pack

VETH: Final = "veth"
"""The driver of a pair of devices that are each other's far end."""

# Drivers that send a frame for another device's program (ndo_xdp_xmit). A frame for one that does
# not would be lost after the program has counted it as relayed.
SENDING_DRIVERS: Final = frozenset(
    {
        *("bnxt_en", "ena", "fsl_enetc", "fsl_dpaa2_eth", "gve", "hv_netvsc", "i40e", "ice", "igb"),
        *("igc", "ixgbe", "ixgbevf", "mana", "mlx4_en", "mlx5_core", "mvneta", "mvpp2", "qede"),
        *("sfc", "st_gmac", "tsnep", "tun", VETH, "virtio_net"),
    }
)

_SIOCGIFHWADDR: Final = 0x8927  # <linux/sockios.h>
_IFREQ: Final = struct.Struct("16sH22x")  # name and address family of <linux/if.h>
_ARPHRD_ETHER: Final = 1  # <linux/if_arp.h>
_SIOCETHTOOL: Final = 0x8946
_GDRVINFO: Final = 3  # <linux/ethtool.h>
_DRVINFO_SIZE: Final = 196  # struct ethtool_drvinfo: command, driver, and more
_IFREQ_OF_ETHTOOL: Final = struct.Struct("16sQ16x")  # name and pointer
_RTF_REJECT: Final = 0x200  # <linux/route.h>


def usual_devices(hosts: Iterable[str]) -> list[str]:
    """Return the Ethernet devices at which the program is put if the operator names none.

    Those are the ones that have one of *hosts*, wildcards aside, and those of the default routes;
    on a host without a default route all that have an address.
    """
    wanted = {pack(host) for host in hosts if host not in WILDCARDS}
    owners = {packed: _device(index) for index, _, packed in dump_addresses()}
    found = set(_devices_of_default_routes()) or set(owners.values())
    found |= {device for packed, device in owners.items() if packed in wanted}
    return sorted(device for device in found if device and is_ethernet(device))


def driver_of(device: str) -> str:
    """Return the name of a device's driver; nothing if it does not tell."""
    answer = ctypes.create_string_buffer(struct.pack("=I", _GDRVINFO), _DRVINFO_SIZE)
    request = _IFREQ_OF_ETHTOOL.pack(device.encode(), ctypes.addressof(answer))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCETHTOOL, request)
    except OSError:
        return ""
    return answer.raw[4:36].partition(b"\0")[0].decode(errors="replace")


def is_ethernet(device: str) -> bool:
    """Tell if frames of a device begin with an Ethernet header. lo says that its do not."""
    request = _IFREQ.pack(device.encode(), 0)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, request)
    except OSError:
        return False
    kind: int = _IFREQ.unpack(answer)[1]
    return kind == _ARPHRD_ETHER


def _device(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it has just gone
        return ""


def _devices_of_default_routes() -> Iterator[str]:
    """Yield the devices of the default routes that lead somewhere. See proc_net(5), route(8)."""
    with suppress(OSError):
        for line in Path("/proc/thread-self/net/route").read_text().splitlines()[1:]:
            device, destination, _, flags, _, _, _, mask, *_ = line.split()
            if int(destination, 16) == int(mask, 16) == 0 and not int(flags, 16) & _RTF_REJECT:
                yield device
    with suppress(OSError):
        for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines():
            destination, length, *_, flags, device = line.split()
            if int(destination, 16) == int(length, 16) == 0 and not int(flags, 16) & _RTF_REJECT:
                yield device
