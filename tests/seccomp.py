"""Runs the relay where a system call is refused, as a service manager's filter would refuse it."""

import platform

import pytest

_PROGRAM = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | {error}
program = b"".join(struct.pack("=HBBI", *step) for step in [
    (LOAD, 0, 0, 0), (EQUAL, 0, 3, {call}),
    (LOAD, 0, 0, 16), (EQUAL, 0, 1, {argument}),
    (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW),
])
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Program(6, program))) == 0  # PR_SET_SECCOMP
import relay.cli
raise SystemExit(relay.cli.main())
"""
SOCKET, BPF = 41, 321  # system calls of x86-64


def refusing(call: int, first_argument: int, error: int) -> str:
    """Return the text of a program: the relay, to which one use of a system call is refused.

    That with this first argument, with an errno. Skips the test on another kind of machine.
    """
    if platform.machine() != "x86_64":
        pytest.skip("system calls have other numbers on this kind of machine")
    return _PROGRAM.format(call=call, argument=first_argument, error=error)
