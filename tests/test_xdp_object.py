"""The object that is committed is what the source says, and what the package says it is."""

import re
import struct
from pathlib import Path

import pytest

from contrib import program
from relay.assembly import MAX_CHANNELS
from relay.xdp import bpf
from tests import xdpbed


def test_the_object_is_of_the_source() -> None:
    """Else python -m contrib.generate makes it anew."""
    assert program.recorded()["sha256 of turn.bpf.c"] == program.digest()
    assert program.recorded()["compiler"].startswith("Debian clang version ")


def test_the_same_compiler_makes_the_same_bytes(tmp_path: Path) -> None:
    xdpbed.needs_compiler("clang")
    if program.clang_version() != program.recorded()["compiler"]:
        pytest.skip(f"it was made by {program.recorded()['compiler']}")
    program.compile_program("clang", tmp_path / "turn.bpf.o")
    assert (tmp_path / "turn.bpf.o").read_bytes() == program.OBJECT.read_bytes()


def test_no_path_of_any_machine_is_in_it() -> None:
    assert re.search(rb"/\w+/", program.OBJECT.read_bytes()) is None


def test_its_maps_are_as_large_as_the_relay() -> None:
    content = bpf.read_object(program.OBJECT)
    assert content.license == b"Dual MIT/GPL"
    assert {name: (each.key_size, each.value_size) for name, each in content.maps.items()} == {
        "routes": (40, 120),
        "devices": (4, 4),
        "relayed": (4, 16),
    }
    assert content.maps["routes"].max_entries == 2 * MAX_CHANNELS


@pytest.mark.parametrize("size", [0, 10, 63, 64, 1000, -1])
def test_a_truncated_object_is_named(tmp_path: Path, size: int) -> None:
    damaged = tmp_path / "turn.bpf.o"
    damaged.write_bytes(program.OBJECT.read_bytes()[:size])
    with pytest.raises(bpf.ObjectError, match=r"^turn\.bpf\.o: "):
        bpf.read_object(damaged)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, b"\x7fELX"), (4, b"\1"), (5, b"\2"), (18, struct.pack("<H", 62))],
    ids=["no ELF", "32 bits", "big-endian", "another machine"],
)
def test_another_kind_of_object_is_named(tmp_path: Path, at: int, value: bytes) -> None:
    content = bytearray(program.OBJECT.read_bytes())
    content[at : at + len(value)] = value
    other = tmp_path / "other.o"
    other.write_bytes(content)
    with pytest.raises(bpf.ObjectError, match=r"^other\.o: no object file of a BPF program$"):
        bpf.read_object(other)
