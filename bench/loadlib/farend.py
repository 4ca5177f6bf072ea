"""The other end of a veth, so that it behaves like a cable to a network card.

By default a veth leaves checksums to be finished by hardware that is not there, and delivers what
an XDP program sends back only where its other end has an XDP program, too.
"""

import array
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from relay.xdp import bpf

# Return XDP_PASS: mov64 r0, 2; exit.
_PASS: Final = struct.pack("<BBhiBBhi", 0xB7, 0, 0, bpf.XDP_PASS, 0x95, 0, 0, 0)
_SIOCETHTOOL: Final = 0x8946  # <linux/sockios.h>
_ETHTOOL_STXCSUM: Final = 0x17  # <linux/ethtool.h>


@contextmanager
def like_a_cable(device: str) -> Iterator[None]:
    """Finish checksums before they leave by *device*, and take in what comes back from it.

    For a device of the present network namespace. Raises OSError.
    """
    finish_checksums(device)
    passes = bpf.ProgramObject(code=_PASS, license=b"GPL", maps={}, references=())
    program = bpf.Program(passes, "pass")
    try:
        link = program.attach(socket.if_nametoindex(device), bpf.NATIVE)
    finally:
        program.close()
    try:
        yield
    finally:
        os.close(link)


def finish_checksums(device: str) -> None:
    """Turn checksum offload off, as ``ethtool -K DEVICE tx off`` does. Raises OSError."""
    value = array.array("I", [_ETHTOOL_STXCSUM, 0])
    request = struct.pack("16sQ16x", device.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
