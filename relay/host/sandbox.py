"""What the process gives up, and how it is called, before it serves anyone.

All of it but being dumpable is a setting of one thread, which the threads that it starts
inherit. So it is given up before there is any other, and looked at in each of them once all
of them run. See capabilities(7), and PR_SET_NO_NEW_PRIVS and PR_SET_DUMPABLE in prctl(2).
"""

import errno
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Any, Final

from relay.host.identity import ROOT, Identity, become, identity_of, reason

logger = logging.getLogger("relay.host")

PROCESS_NAME: Final = "firezone-relay"  # the kernel keeps 15 bytes


class SandboxError(Exception):
    """The process keeps what it must not keep."""


def enter(harden: str, user: str | None = None) -> "Sandbox":
    """Name the process and give up every privilege, for good. Call it before there is any thread.

    Root becomes *user*, or nobody. Given up are all capabilities, gaining any by exec, and being
    dumped or traced by its own user: secrets are in memory. With *harden* "require" everything
    that the process has the power to give up must go, and root must become another user; with
    "auto" only the capabilities of root must, and whom root becomes if *user* names one; the rest
    is a warning. With "off" the process is named, becomes a *user* that is named, and that is
    all. Raises SandboxError; ValueError if there is no such user.
    """
    name_thread(PROCESS_NAME)
    is_root = os.geteuid() == ROOT
    wanted = _wanted(harden, user)
    if is_root and user is not None and wanted is None:
        logger.warning("stays root, as --user says: a flaw could change what root's files are")
    if harden == "off":
        if wanted is not None:
            wanted = _become(wanted, harden, is_named=True)
        return Sandbox(harden, was_root=is_root, identity=wanted)
    try:
        prctl = _prctl()
        has_setpcap = _has_setpcap(prctl)
    except Exception as error:  # noqa: BLE001
        _complain(f"cannot drop privileges: {error}", is_fatal=is_root or harden == "require")
        return Sandbox(harden, was_root=is_root)
    before = []
    if has_setpcap:  # which goes with the other capabilities
        before = [
            ("set securebits", _lock_securebits),
            ("empty the bounding set", _empty_bounding_set),
        ]
    _give_up(before, prctl, must_succeed=harden == "require")
    # With the securebits set, capabilities do not go with root: that is for the next steps.
    if wanted is not None:
        wanted = _become(wanted, harden, is_named=user is not None)
    _give_up(
        [("drop capabilities", _drop_capabilities)],
        prctl,
        must_succeed=is_root or harden == "require",
    )
    after = [
        ("set no_new_privs", _forbid_new_privileges),
        ("become undumpable", _forbid_dumps),
    ]
    _give_up(after, prctl, must_succeed=harden == "require")
    return Sandbox(harden, was_root=is_root, identity=wanted, empties_bounding_set=has_setpcap)


def user_wanted(harden: str, user: str | None) -> int:
    """Return the uid that :func:`enter` is to leave this process with. Raises ValueError."""
    identity = _wanted(harden, user)
    return os.geteuid() if identity is None else identity.uid


def _wanted(harden: str, user: str | None) -> Identity | None:
    """Return whom this process is to become. Raises ValueError if there is no such user."""
    if os.geteuid() != ROOT or (user is None and harden == "off"):
        return None
    identity = identity_of(user)
    return None if identity.uid == ROOT else identity


def adopt_orphans() -> None:
    """Be the parent of all descendants whose own parent ends (PR_SET_CHILD_SUBREAPER)."""
    try:
        _prctl().set_child_subreaper(1)
    except Exception as error:  # noqa: BLE001
        logger.warning("cannot become the parent of orphans: %s", error)


def name_thread(name: str) -> None:
    """Call the calling thread *name*, as ``ps -L`` and ``top -H`` show it."""
    try:
        _prctl().set_name(name)
    except Exception as error:  # noqa: BLE001
        logger.warning("cannot name the thread %s: %s", name, error)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What was asked for, to be held against what the kernel says."""

    harden: str
    was_root: bool
    identity: Identity | None = None  # whom root has become
    # Without CAP_SETPCAP it stays, which no_new_privs makes harmless.
    empties_bounding_set: bool = False

    def verify(self) -> None:
        """Look at every thread there is, and log in one line what holds.

        Raises SandboxError if something does not hold that must: see :func:`enter`. Securebits
        are the one thing that the kernel does not show.
        """
        if self.harden == "off":
            whose = f"; user {self.identity.name}" if self.identity else ""
            logger.info("not sandboxed: harden is off%s", whose)
            return
        try:
            threads = _threads()
        except (OSError, KeyError, ValueError) as error:
            _complain(
                f"cannot verify the sandbox: {_reason(error)}", is_fatal=self.harden == "require"
            )
            return
        capable = [
            f"{thread.name} ({thread.capabilities:#x})" for thread in threads if thread.capabilities
        ]
        bounded = [thread.name for thread in threads if thread.bounding_set]
        gaining = [thread.name for thread in threads if not thread.no_new_privileges]
        dumpable = _dumpable()
        others = [
            thread.name
            for thread in threads
            if self.identity is not None and not thread.is_of(self.identity)
        ]

        problems = []
        if others:
            problems.append(f"another user or group in {', '.join(others)}")
        if capable:
            problems.append(f"capabilities in {', '.join(capable)}")
        if bounded and self.empties_bounding_set:
            problems.append(f"a bounding set in {', '.join(bounded)}")
        if gaining:
            problems.append(f"new privileges possible in {', '.join(gaining)}")
        if dumpable:
            problems.append(dumpable)
        if problems:
            must_hold = self.harden == "require" or (self.was_root and bool(capable or others))
            _complain(f"not sandboxed: {'; '.join(problems)}", is_fatal=must_hold)
            return
        logger.info(
            "sandboxed: %sno capabilities%s, no new privileges, not dumpable, in %s (%s)",
            f"user {self.identity.name}, " if self.identity else "",
            "" if bounded else ", empty bounding set",
            "1 thread" if len(threads) == 1 else f"{len(threads)} threads",
            ", ".join(thread.name for thread in threads),
        )


def _complain(problem: str, *, is_fatal: bool) -> None:
    if is_fatal:
        raise SandboxError(f"{problem} (--harden off runs it all the same)")
    logger.warning("%s", problem)


# --- Giving up ------------------------------------------------------------------------------


def _give_up(
    steps: Iterable[tuple[str, Callable[[Any], None]]],
    prctl: Any,  # noqa: ANN401
    *,
    must_succeed: bool,
) -> None:
    for what, give_up in steps:
        try:
            give_up(prctl)
        except Exception as error:  # noqa: BLE001
            _complain(f"cannot {what}: {error}", is_fatal=must_succeed)


def _become(identity: Identity, harden: str, *, is_named: bool) -> Identity | None:
    """Become another user than root; return it, or None if that cannot be and need not."""
    try:
        become(identity)
    except OSError as error:
        problem = f"cannot become user {identity.name}: {reason(error, identity)}"
        if is_named or harden == "require":
            raise SandboxError(f"{problem} (--user root stays root)") from error
        # In a container such a root may own next to nothing, and is the only user that there is.
        logger.warning("%s; stays root", problem)
        return None
    return identity


def _prctl() -> Any:  # noqa: ANN401
    """Import python-prctl: on a kernel or libc it was not built for, anything can come of it."""
    return import_module("prctl")


def _has_setpcap(prctl: Any) -> bool:  # noqa: ANN401
    held = prctl.get_caps((prctl.CAP_SETPCAP, prctl.CAP_EFFECTIVE))
    return bool(held[prctl.CAP_EFFECTIVE][prctl.CAP_SETPCAP])


def _lock_securebits(prctl: Any) -> None:  # noqa: ANN401
    """Make uid 0 a user like any other, to exec and setuid too."""
    prctl.set_securebits(
        prctl.SECBIT_NOROOT
        | prctl.SECBIT_NOROOT_LOCKED
        | prctl.SECBIT_NO_SETUID_FIXUP
        | prctl.SECBIT_NO_SETUID_FIXUP_LOCKED
        | prctl.SECBIT_KEEP_CAPS_LOCKED
    )


def _empty_bounding_set(prctl: Any) -> None:  # noqa: ANN401
    for capability in sorted(prctl.ALL_CAPS):
        try:
            is_in = prctl.capbset_read(capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # python-prctl was built for a newer kernel
                break
            raise
        if is_in:
            prctl.capbset_drop(capability)


def _drop_capabilities(prctl: Any) -> None:  # noqa: ANN401
    """Empty the effective, permitted and inheritable set, and with these the ambient one."""
    prctl.set_caps((prctl.ALL_CAPS, prctl.ALL_FLAGS, False))


def _forbid_new_privileges(prctl: Any) -> None:  # noqa: ANN401
    prctl.set_no_new_privs(1)


def _forbid_dumps(prctl: Any) -> None:  # noqa: ANN401
    prctl.set_dumpable(0)


# --- Looking at it --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Thread:
    """What /proc/PID/task/TID/status says of one thread. See proc(5)."""

    name: str
    capabilities: int  # of all four sets together, as a bit mask, as is the next
    bounding_set: int
    no_new_privileges: bool
    ids: tuple[frozenset[int], frozenset[int], frozenset[int]]  # of user, group, other groups

    def is_of(self, identity: Identity) -> bool:
        """Tell if it is that user's through and through, without another group."""
        users, groups, others = self.ids
        return users == {identity.uid} and groups == {identity.gid} and not others


def _threads() -> list[_Thread]:
    """Return the threads of this process, by name. Raises OSError, KeyError or ValueError."""
    threads = []
    for directory in Path("/proc/self/task").iterdir():
        try:
            text = (directory / "status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        fields = dict(line.split(":\t", 1) for line in text.splitlines())
        sets = (int(fields[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
        threads.append(
            _Thread(
                fields["Name"],
                capabilities=reduce(or_, sets),
                bounding_set=int(fields["CapBnd"], 16),
                no_new_privileges=fields["NoNewPrivs"] == "1",
                ids=(_ids(fields["Uid"]), _ids(fields["Gid"]), _ids(fields["Groups"])),
            )
        )
    return sorted(threads, key=lambda thread: thread.name)


def _ids(text: str) -> frozenset[int]:
    return frozenset(map(int, text.split()))


def _dumpable() -> str:
    """Return what is wrong, or nothing. It is a setting of the process, and not in /proc."""
    try:
        return "dumpable" if _prctl().get_dumpable() else ""
    except Exception as error:  # noqa: BLE001
        return f"perhaps dumpable: {error}"


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
