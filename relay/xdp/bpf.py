"""bpf(2): loading a program and its maps from an object file, attaching it, and running it.

By ctypes, so nothing is needed but the kernel; what it takes is UAPI, in <linux/bpf.h>. What
they give is file descriptors, and it goes with these: when they are closed, or the process ends,
however it does. Maps stay readable and writable without privileges (Linux 5.19).
"""

import ctypes
import os
import platform
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

# Commands.
_MAP_CREATE: Final = 0
_MAP_LOOKUP: Final = 1
_MAP_UPDATE: Final = 2
_MAP_DELETE: Final = 3
_PROG_LOAD: Final = 5
_PROG_TEST_RUN: Final = 10
_MAP_LOOKUP_BATCH: Final = 24
_MAP_DELETE_BATCH: Final = 27
_LINK_CREATE: Final = 28

_PERCPU_ARRAY: Final = 6  # enum bpf_map_type
_PROG_TYPE_XDP: Final = 6  # enum bpf_prog_type
_ATTACH_XDP: Final = 37  # enum bpf_attach_type: BPF_XDP, not BPF_LINK_TYPE_XDP
_PSEUDO_MAP_FD: Final = 1 << 4  # in the instruction's src_reg: the immediate is a descriptor

# How a program is attached: XDP_FLAGS_SKB_MODE and XDP_FLAGS_DRV_MODE of <linux/if_link.h>.
GENERIC: Final = 2  # by the host's stack, for any device
NATIVE: Final = 4  # by the device's driver

# What an XDP program says is to become of the frame: enum xdp_action.
XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = range(5)

_BATCH: Final = struct.Struct("=QQQQIIQQ")
# For BPF_PROG_TEST_RUN, up to batch_size; and BPF_F_TEST_XDP_LIVE_FRAMES.
_TEST_RUN: Final = struct.Struct("=IIIIQQIIIIQQIIII")
_LIVE_FRAMES: Final = 2
_FRAMES_AT_ONCE: Final = 64

_NAME_SIZE: Final = 16
_LONGEST_FRAME: Final = 65536
_LOG_SIZE: Final = 1 << 20

# The number of the system call, by machine. Most of them have that of <asm-generic/unistd.h>.
_SYSCALLS: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
}

_NUMBER: Final = _SYSCALLS.get(platform.machine(), -1)  # which the kernel answers with ENOSYS
_libc: Final = ctypes.CDLL(None, use_errno=True)


class ObjectError(ValueError):
    """An object file is not what a program can be loaded from."""


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What a map is to be: ``struct map`` in turn.bpf.c."""

    kind: int
    key_size: int  # bytes, as is the next
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class ProgramObject:
    """What the object file of a program holds."""

    code: bytes  # instructions, of 8 bytes each
    license: bytes
    maps: dict[str, MapDefinition]
    references: tuple[tuple[int, str], ...]  # to maps: at which byte of the code, and to which


class Map:
    """A map of the kernel. Not for two threads at once, but for :meth:`lookup_all`."""

    def __init__(self, name: str, definition: MapDefinition, fd: int | None = None) -> None:
        """Create it, or own the one that there is already at descriptor *fd*. Raises OSError."""
        self.definition = definition
        self.fd = _create(name, definition) if fd is None else fd
        self._values = possible_cpus() if definition.kind == _PERCPU_ARRAY else 1
        self._key = ctypes.create_string_buffer(definition.key_size)
        self._value = ctypes.create_string_buffer(self._stride)
        # Made once: what changes is in the two buffers.
        self._attributes = ctypes.create_string_buffer(
            struct.pack("=IIQQQ", self.fd, 0, _address(self._key), _address(self._value), 0)
        )
        self._attributes_of_delete = ctypes.create_string_buffer(
            struct.pack("=IIQ", self.fd, 0, _address(self._key)), 16
        )

    @property
    def _stride(self) -> int:
        """How many bytes an entry's value has in the buffers."""
        size = self.definition.value_size
        return size if self._values == 1 else -(-size // 8) * 8 * self._values

    def update(self, key: bytes, value: bytes) -> None:
        """Set an entry. Raises OSError: E2BIG if the map is full, ENOMEM, EPERM."""
        self._key.raw = key
        self._value.raw = value
        _call(_MAP_UPDATE, self._attributes, 32)

    def delete(self, key: bytes) -> None:
        """Delete an entry. Raises OSError: ENOENT if there is none, EPERM."""
        self._key.raw = key
        _call(_MAP_DELETE, self._attributes_of_delete, 16)

    def delete_many(self, keys: bytes, count: int) -> None:
        """Delete *count* entries, whose keys lie end to end, in one call. Raises OSError.

        At the first that is not there it stops: ENOENT.
        """
        buffer = ctypes.create_string_buffer(keys, len(keys))
        _bpf(
            _MAP_DELETE_BATCH,
            _BATCH.pack(0, 0, _address(buffer), 0, count, self.fd, 0, 0),
        )

    def lookup(self, key: bytes) -> bytes:
        """Return the value of an entry. Raises OSError: ENOENT if there is none, EPERM."""
        self._key.raw = key
        _call(_MAP_LOOKUP, self._attributes, 32)
        return self._value.raw

    def lookup_all(self) -> list[list[bytes]]:
        """Return all values of an array in one call: by index, and of one per CPU by that.

        For any thread. Raises OSError.
        """
        size, count = self.definition.value_size, self.definition.max_entries
        keys = ctypes.create_string_buffer(4 * count)
        values = ctypes.create_string_buffer(self._stride * count)
        position = ctypes.create_string_buffer(4)
        _bpf(
            _MAP_LOOKUP_BATCH,
            _BATCH.pack(
                0, _address(position), _address(keys), _address(values), count, self.fd, 0, 0
            ),
        )
        raw, each = values.raw, self._stride // self._values
        return [
            [raw[at : at + size] for at in range(start, start + self._stride, each)]
            for start in range(0, len(raw), self._stride)
        ]

    def close(self) -> None:
        """Give up the descriptor; the map goes with the last one, the program's included."""
        os.close(self.fd)


class Program:
    """An XDP program in the kernel, with its maps."""

    def __init__(self, content: ProgramObject, name: str, *, explain: bool = False) -> None:
        """Create the maps and load the program. Raises OSError.

        With *explain*, what the verifier has to say is its strerror; that takes much longer.
        """
        self.maps: dict[str, Map] = {}
        self.fd = -1
        try:
            for map_name, definition in content.maps.items():
                self.maps[map_name] = Map(map_name, definition)
            self.fd = _load(_linked(content, self.maps), content.license, name, explain=explain)
        except BaseException:
            self.close()
            raise

    @classmethod
    def inherited(cls, fd: int, maps: Mapping[str, tuple[MapDefinition, int]]) -> "Program":
        """Own a program that another process has loaded, with its maps: each with descriptor."""
        program = cls.__new__(cls)
        program.fd = fd
        program.maps = {
            name: Map(name, definition, each) for name, (definition, each) in maps.items()
        }
        return program

    def attach(self, ifindex: int, mode: int) -> int:
        """Attach it to a device, :data:`NATIVE` or :data:`GENERIC`. Raises OSError.

        Returns the descriptor of the link: it is detached when that is closed.
        """
        attributes = struct.pack("=IIII", self.fd, ifindex, _ATTACH_XDP, mode)
        return _bpf(_LINK_CREATE, attributes.ljust(64, b"\0"))

    def run(self, frame: bytes, repeat: int = 1) -> tuple[int, bytes, int]:
        """Run it on a frame as if that had come to lo, and nothing becomes of it.

        Returns what it says (such as :data:`XDP_PASS`), the frame as it is then, and how long it
        took in nanoseconds, on average. If repeated, it gets what it left. Raises OSError: EINVAL
        for a frame without a whole Ethernet header.
        """
        given = ctypes.create_string_buffer(frame, len(frame))
        left = ctypes.create_string_buffer(_LONGEST_FRAME)
        attributes = ctypes.create_string_buffer(
            _TEST_RUN.pack(
                *(self.fd, 0, len(frame), _LONGEST_FRAME, _address(given), _address(left)),
                *(repeat, 0, 0, 0, 0, 0, 0, 0, 0, 0),
            ),
            _TEST_RUN.size,
        )
        _call(_PROG_TEST_RUN, attributes, _TEST_RUN.size)
        _, verdict, _, size, _, _, _, duration, *_ = _TEST_RUN.unpack(attributes.raw)
        return verdict, left.raw[:size], duration

    def inject(self, frame: bytes, ifindex: int, count: int) -> None:
        """Run it on *count* copies of a frame as if these had come to a device, and do as it says.

        The device needs a program, too. It takes Linux 5.18. Raises OSError.
        """
        given = ctypes.create_string_buffer(frame, len(frame))
        # struct xdp_md: the frame's bounds and metadata, then device and queue.
        arrival = ctypes.create_string_buffer(struct.pack("=6I", 0, len(frame), 0, ifindex, 0, 0))
        attributes = _TEST_RUN.pack(
            *(self.fd, 0, len(frame), 0, _address(given), 0, count, 0, 24, 0),
            *(_address(arrival), 0, _LIVE_FRAMES, 0, _FRAMES_AT_ONCE, 0),
        )
        _bpf(_PROG_TEST_RUN, attributes)

    def close(self) -> None:
        """Give up its descriptor and those of its maps. Where it is attached it stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        for each in self.maps.values():
            each.close()
        self.maps.clear()


def read_object(path: Traversable) -> ProgramObject:
    """Read the program in section ``xdp`` of an ELF object. Raises ObjectError, OSError."""
    elf = path.read_bytes()
    try:
        return _parsed(elf)
    except (struct.error, LookupError, ValueError) as error:
        raise ObjectError(f"{path.name}: {error}") from error


def possible_cpus() -> int:
    """Return how many CPUs there can be: a map per CPU has room for each. Raises OSError."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    ranges = [part.partition("-") for part in text.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


# --- System calls ---------------------------------------------------------------------------


def _bpf(command: int, attributes: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes))


def _call(command: int, attributes: "ctypes.Array[ctypes.c_char]", size: int) -> int:
    """Call bpf(2) with *size* bytes of attributes. Raises OSError."""
    result: int = _libc.syscall(_NUMBER, command, attributes, size)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _address(buffer: "ctypes.Array[ctypes.c_char]") -> int:
    return ctypes.addressof(buffer)


def _create(name: str, definition: MapDefinition) -> int:
    attributes = struct.pack(
        "=6I16s",
        definition.kind,
        definition.key_size,
        definition.value_size,
        definition.max_entries,
        definition.flags,
        0,
        name.encode()[: _NAME_SIZE - 1],
    )
    return _bpf(_MAP_CREATE, attributes.ljust(72, b"\0"))


def _load(code: bytes, license_text: bytes, name: str, *, explain: bool) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    terms = ctypes.create_string_buffer(license_text)
    log = ctypes.create_string_buffer(_LOG_SIZE) if explain else None
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        *(_PROG_TYPE_XDP, len(code) // 8, _address(instructions), _address(terms)),
        *((1, _LOG_SIZE, _address(log)) if log is not None else (0, 0, 0)),
        *(0, 0, name.encode()[: _NAME_SIZE - 1], 0, _ATTACH_XDP),
    )
    try:
        return _bpf(_PROG_LOAD, attributes)
    except OSError as error:
        if log is not None:
            error.strerror = log.value.decode(errors="replace")
        raise


# --- Object files ---------------------------------------------------------------------------

_ELF_OF_64_BITS: Final = b"\x7fELF\x02\x01"  # and little-endian
_ELF_MACHINE: Final = 247  # EM_BPF
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QQ")
_RELOCATIONS: Final = 9  # SHT_REL
_MAP: Final = struct.Struct("<5I")


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    content: bytes
    link: int  # the index of a section that belongs to it
    info: int


def _parsed(elf: bytes) -> ProgramObject:
    """Read an object file. Raises ObjectError, struct.error, IndexError, KeyError."""
    (machine,) = struct.unpack_from("<H", elf, 18)
    if elf[:6] != _ELF_OF_64_BITS or machine != _ELF_MACHINE:
        raise ObjectError("no object file of a BPF program")
    sections = list(_sections(elf))
    index_of = {section.name: index for index, section in enumerate(sections)}
    code, definitions = sections[index_of["xdp"]], sections[index_of["maps"]]
    maps: dict[str, MapDefinition] = {}
    references: list[tuple[int, str]] = []
    for section in sections:
        if section.kind != _RELOCATIONS or section.info != index_of["xdp"]:
            continue
        symbols = sections[section.link]
        names = sections[symbols.link].content
        for offset, info in _RELOCATION.iter_unpack(section.content):
            symbol = _SYMBOL.unpack_from(symbols.content, (info >> 32) * _SYMBOL.size)
            name_at, _, _, of_section, value, _ = symbol
            if of_section != index_of["maps"]:
                raise ObjectError("the program refers to something that is no map")
            name = _string(names, name_at)
            maps[name] = MapDefinition(*_MAP.unpack_from(definitions.content, value))
            references.append((offset, name))
    terms = sections[index_of["license"]].content.rstrip(b"\0")
    return ProgramObject(code.content, terms, maps, tuple(references))


def _sections(elf: bytes) -> Iterator[_Section]:
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, index_of_names = struct.unpack_from("<3H", elf, 58)
    rows = [_SECTION.unpack_from(elf, table + index * size) for index in range(count)]
    at, length = rows[index_of_names][4:6]
    names = elf[at : at + length]
    for name_at, kind, _, _, at, length, link, info, _, _ in rows:
        yield _Section(_string(names, name_at), kind, elf[at : at + length], link, info)


def _string(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def _linked(content: ProgramObject, maps: dict[str, Map]) -> bytes:
    """Return the instructions, with the descriptors of maps where these are referred to."""
    code = bytearray(content.code)
    for offset, name in content.references:
        code[offset + 1] |= _PSEUDO_MAP_FD
        struct.pack_into("<i", code, offset + 4, maps[name].fd)
    return bytes(code)
