"""Compiles the program that relays in the kernel, and says from what and by what it was made.

The object is committed, so nobody needs a compiler to run the relay. It is made by clang, without
debugging information: then the same clang makes the same bytes.
"""

import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Final

import relay.xdp

FOLDER: Final = Path(relay.xdp.__file__).parent
SOURCE: Final = FOLDER / "turn.bpf.c"
OBJECT: Final = FOLDER / "turn.bpf.o"
RECORD: Final = FOLDER / "turn.bpf.txt"

_HEADERS: Final = f"/usr/include/{platform.machine()}-linux-gnu"  # <asm/types.h>, on Debian
_WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")
COMPILERS: Final = {
    "clang": ("clang", "-O2", "-target", "bpf", "-mcpu=v3", *_WARNINGS, "-isystem", _HEADERS),
    # A second opinion, of 10 MB instead of 200. For BPF it knows no place of headers.
    "gcc": (
        *("bpf-gcc", "-O2", "-mcpu=v3", *_WARNINGS),
        *("-isystem", "/usr/include", "-isystem", _HEADERS),
    ),
}


def compile_program(compiler: str, target: Path, source: Path = SOURCE) -> None:
    """Compile it by one of :data:`COMPILERS`. Raises OSError, CalledProcessError."""
    # From its folder: its path would be in the object.
    command = [*COMPILERS[compiler], "-c", source.name, "-o", str(target.absolute())]
    subprocess.run(command, cwd=source.parent, check=True, timeout=60)  # noqa: S603


def clang_version() -> str:
    """Return what clang calls itself. Raises OSError, CalledProcessError."""
    command = ["clang", "--version"]
    answer = subprocess.run(  # noqa: S603
        command, check=True, capture_output=True, text=True, timeout=60
    )
    return answer.stdout.splitlines()[0]


def digest() -> str:
    """Return the SHA-256 of the source, in hexadecimal."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def recorded() -> dict[str, str]:
    """Return of which source the object was made, and by which compiler."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    return dict(line.split(": ", 1) for line in lines)


def update() -> list[Path]:
    """Compile it if the source has changed; return what was written.

    Raises OSError, CalledProcessError.
    """
    if recorded().get("sha256 of turn.bpf.c") == digest() and OBJECT.exists():
        return []
    compile_program("clang", OBJECT)
    RECORD.write_text(f"compiler: {clang_version()}\nsha256 of turn.bpf.c: {digest()}\n")
    return [OBJECT, RECORD]
