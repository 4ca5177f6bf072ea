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

_SIOCETHTOOL: Final = 0x8946  # <linux/sockios.h>
_ETHTOOL_STXCSUM: Final = 0x17  # <linux/ethtool.h>
_ETHTOOL_SGRO: Final = 0x2C


@contextmanager
def like_a_cable(device: str) -> Iterator[None]:
    """Finish checksums before they leave by *device*, and take in what comes back from it.

    For a device of the present network namespace. Raises OSError.
    """
    finish_checksums(device)
    with always(bpf.XDP_PASS) as program, attached(program, device):
        yield


@contextmanager
def always(verdict: int, head: bytes = b"") -> Iterator[bpf.Program]:
    """Load a program that says the same of every frame, and makes it begin with *head*.

    That has a multiple of four bytes, and frames at least as many. Raises OSError.
    """
    instructions = [
        (0x61, 0x12, 0, 0),  # r2 = where the frame begins
        (0x61, 0x13, 4, 0),  # r3 = where it ends
        (0xBF, 0x24, 0, 0),  # r4 = r2
        (0x07, 0x04, 0, len(head)),  # r4 += len(head)
        (0x2D, 0x34, len(head) // 4, 0),  # if r4 > r3, write nothing
        *(
            (0x62, 0x02, 4 * index, word)
            for index, (word,) in enumerate(struct.iter_unpack("<i", head))
        ),
        (0xB7, 0x00, 0, verdict),  # r0 = verdict
        (0x95, 0x00, 0, 0),  # return r0
    ]
    code = b"".join(struct.pack("<BBhi", *instruction) for instruction in instructions)
    program = bpf.Program(bpf.ProgramObject(code, b"GPL", maps={}, references=()), "always")
    try:
        yield program
    finally:
        program.close()


@contextmanager
def attached(program: bpf.Program, device: str) -> Iterator[None]:
    """Attach a program to a device of the present network namespace. Raises OSError."""
    link = program.attach(socket.if_nametoindex(device), bpf.NATIVE)
    try:
        yield
    finally:
        os.close(link)


def finish_checksums(device: str) -> None:
    """Turn checksum offload off, as ``ethtool -K DEVICE tx off`` does. Raises OSError."""
    _ethtool(device, _ETHTOOL_STXCSUM, 0)


def receive_by_napi(device: str) -> None:
    """Receive as from a network card, as ``ethtool -K DEVICE gro on`` has it. Raises OSError."""
    _ethtool(device, _ETHTOOL_SGRO, 1)


def _ethtool(device: str, command: int, setting: int) -> None:
    value = array.array("I", [command, setting])
    request = struct.pack("16sQ16x", device.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
