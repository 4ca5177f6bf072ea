"""Files that options name: read whole, or refused with the reason."""

import errno
import os
import select
import stat
import time
from typing import Final

LONGEST_FILE: Final = 1 << 20  # bytes
PATIENCE: Final = 10.0  # seconds that the writer of a pipe may take


def read_file(path: str, *, again: bool) -> bytes:
    """Return what is in a file, or comes out of a pipe. Raises ValueError with the reason.

    *again*: the process has others to serve by now, so only a regular file will do.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if again and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("is no regular file and cannot be read again")
            deadline = time.monotonic() + PATIENCE
            readable = select.poll()
            readable.register(file, select.POLLIN)
            content = b""
            while len(content) <= LONGEST_FILE:
                if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise ValueError(f"cannot be read: its end did not come within {PATIENCE:g} s")
                part = file.read(LONGEST_FILE + 1 - len(content))
                if part == b"":
                    return content
                content += part or b""  # None: somebody else has read it
    except OSError as error:
        reason = error.strerror
        if again and error.errno == errno.EACCES:
            reason = f"{reason} to uid {os.geteuid()}, without privileges since the start"
        raise ValueError(f"cannot be read: {reason}") from None
    raise ValueError(f"is too long: more than {LONGEST_FILE} bytes")


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, even if it is a pipe that nobody writes to yet."""
    return os.open(path, flags | os.O_NONBLOCK)
