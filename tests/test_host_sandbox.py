"""What the kernel says of a process that has given up its privileges, thread by thread."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.process import TIMEOUT, environment

ROOT = pytest.param("root", marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root"))
USERS = [ROOT, "ordinary"]
HARDENED = ["auto", "require"]


@pytest.mark.parametrize("harden", HARDENED)
@pytest.mark.parametrize("user", USERS)
def test_every_thread_has_given_up_everything(user: str, harden: str) -> None:
    with Child(user, harden) as child:
        threads = child.threads()
        assert sorted(thread["Name"] for thread in threads) == [
            "firezone-relay",
            "health",
            "portal",
        ]
        for thread in threads:
            assert {thread[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {NONE}
            assert thread["NoNewPrivs"] == "1"
            if user == "root":
                assert thread["CapBnd"] == NONE
        bounding = ", empty bounding set" if threads[0]["CapBnd"] == NONE else ""
        whose = "user nobody, " if user == "root" else ""
        (line,) = child.log
        assert line == (
            f"INFO sandboxed: {whose}no capabilities{bounding}, no new privileges, not dumpable, "
            "in 3 threads (firezone-relay, health, portal)"
        )


WHOSE = "print(os.stat('/proc/self/environ').st_uid, dumpable())"


@pytest.mark.parametrize("user", USERS)
def test_it_cannot_be_looked_into_by_its_own_user(user: str) -> None:
    """What /proc has of it is root's, as of every process that is not dumpable. See proc(5)."""
    with Child(user, "auto", after=WHOSE) as child:
        assert child.log[-1] == "0 False"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_is_a_user_like_any_other_for_good() -> None:
    """Neither uid 0 nor its exec brings anything back: the securebits are locked."""
    locked = "print(hex(prctl.get_securebits()), *capabilities_of_a_program())"
    with Child("root", "auto", after=locked) as child:
        assert child.log[-1] == f"0x2f {NONE} {NONE}"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the user capabilities")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is missing")
def test_an_ordinary_user_gives_up_the_capabilities_it_has() -> None:
    """Those of AmbientCapabilities= in a unit are in all four sets."""
    capabilities = "+dac_read_search,+net_bind_service"  # the former, to read this very file
    prefix = (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        f"--inh-caps={capabilities}",
        f"--ambient-caps={capabilities}",
    )
    before = "print(*capabilities_of_a_program())"
    with Child("ordinary", "require", before=before, prefix=prefix) as child:
        assert child.log[0] == "0000000000000404 0000000000000404"
        for thread in child.threads():
            assert {thread[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {NONE}
        assert child.log[-1].startswith("INFO sandboxed: no capabilities, no new privileges,")


@pytest.mark.parametrize("user", USERS)
def test_off_only_gives_names(user: str) -> None:
    with Child(user, "off") as child:
        assert child.log == ["INFO not sandboxed: harden is off"]
        assert child.threads()[0]["Name"] == "firezone-relay"
        for thread in child.threads():
            assert thread["NoNewPrivs"] == "0"
            assert (thread["CapEff"] == NONE) == (user != "root")


# --- What fails -----------------------------------------------------------------------------

MISSING = "prctl_fails_with(ModuleNotFoundError('no prctl'))"
BROKEN = "prctl_fails_with(SystemError('built for another kernel'))"


@pytest.mark.parametrize("without_prctl", [MISSING, BROKEN])
def test_without_prctl_an_ordinary_user_is_served_with_a_warning(without_prctl: str) -> None:
    reason = without_prctl.split("'")[1]
    with Child("ordinary", "auto", before=without_prctl) as child:
        names = ", ".join(thread["Name"] for thread in child.threads())
        problems = f"new privileges possible in {names}; perhaps dumpable: {reason}"
        assert child.log == [
            f"WARNING cannot name the thread firezone-relay: {reason}",
            f"WARNING cannot drop privileges: {reason}",
            f"WARNING cannot name the thread portal: {reason}",
            f"WARNING cannot name the thread health: {reason}",
            f"WARNING not sandboxed: {problems}",
        ]


REFUSALS = [
    pytest.param("root", "auto", id="root", marks=ROOT.marks),
    pytest.param("root", "require", id="root, required", marks=ROOT.marks),
    pytest.param("ordinary", "require", id="ordinary, required"),
]


@pytest.mark.parametrize(("user", "harden"), REFUSALS)
def test_without_prctl_it_refuses(user: str, harden: str) -> None:
    with Child(user, harden, before=MISSING) as child:
        assert child.log[-1] == (
            "REFUSED cannot drop privileges: no prctl (--harden off runs it all the same)"
        )


@pytest.mark.parametrize("user", USERS)
def test_without_prctl_off_serves(user: str) -> None:
    with Child(user, "off", before=MISSING) as child:
        assert child.log[-1] == "INFO not sandboxed: harden is off"


STEPS = [
    pytest.param("set_caps", "drop capabilities", "root", "auto", id="root's capabilities"),
    pytest.param("set_caps", "drop capabilities", "ordinary", "require", id="capabilities"),
    pytest.param("set_no_new_privs", "set no_new_privs", "ordinary", "require", id="privileges"),
    pytest.param("set_dumpable", "become undumpable", "ordinary", "require", id="dumpable"),
    pytest.param("set_securebits", "set securebits", "root", "require", id="securebits"),
    pytest.param("capbset_drop", "empty the bounding set", "root", "require", id="bounding set"),
]


@pytest.mark.parametrize(("function", "what", "user", "harden"), STEPS)
def test_it_refuses_if_a_step_that_must_succeed_fails(
    function: str, what: str, user: str, harden: str
) -> None:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    before = f"prctl.{function} = refuse"
    with Child(user, harden, before=before) as child:
        (line,) = child.log
        assert line == (
            f"REFUSED cannot {what}: [Errno 1] Operation not permitted "
            "(--harden off runs it all the same)"
        )


# A function that only claims to have done something: what the kernel says afterwards counts.
LIES = [
    pytest.param("set_caps", "root", "auto", "REFUSED", "capabilities in ", id="root"),
    pytest.param(
        "set_no_new_privs",
        "ordinary",
        "auto",
        "WARNING",
        "new privileges possible in firezone-relay, health, portal",
        id="new privileges",
    ),
    pytest.param(
        "set_no_new_privs",
        "ordinary",
        "require",
        "REFUSED",
        "new privileges possible in firezone-relay, health, portal",
        id="new privileges, required",
    ),
    pytest.param("set_dumpable", "ordinary", "auto", "WARNING", "dumpable", id="dumpable"),
    pytest.param("set_dumpable", "ordinary", "require", "REFUSED", "dumpable", id="required"),
    pytest.param(
        "capbset_drop",
        "root",
        "require",
        "REFUSED",
        "a bounding set in firezone-relay, health, portal",
        id="bounding set",
    ),
]


@pytest.mark.parametrize(("function", "user", "harden", "level", "problem"), LIES)
def test_what_was_given_up_is_verified(
    function: str, user: str, harden: str, level: str, problem: str
) -> None:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("needs root")
    before = f"prctl.{function} = pretend"
    with Child(user, harden, before=before) as child:
        assert child.log[-1].startswith(f"{level} not sandboxed: {problem}")


@pytest.mark.parametrize(("harden", "level"), [("auto", "WARNING"), ("require", "REFUSED")])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to hide /proc")
def test_without_proc_it_says_that_it_cannot_know(harden: str, level: str) -> None:
    prefix = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    with Child("root", harden, prefix=prefix) as child:
        assert child.log[-1].startswith(f"{level} cannot verify the sandbox: [Errno 2]")


# --- Helpers --------------------------------------------------------------------------------

NONE = "0" * 16  # an empty set, as /proc writes it
# Becomes the user, enters the sandbox, starts two threads, verifies; says "ready" when it has.
# The user may not be able to read Python's library, so all of it is imported before that.
CHILD = """
import logging, os, subprocess, sys, threading
import _prctl, prctl
from relay.host import sandbox

NOBODY = 65534

class prctl_fails_with:
    def __init__(self, error):
        self.error = error
        del sys.modules["prctl"]
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path, target=None):
        if name == "prctl":
            raise self.error

def refuse(*arguments):
    raise PermissionError(1, "Operation not permitted")

def pretend(*arguments):
    pass

def dumpable():
    return _prctl.prctl(_prctl.PR_GET_DUMPABLE)

def capabilities_of_a_program():
    command = ["sed", "-n", "-E", "s/^Cap(Eff|Prm):.//p", "/proc/self/status"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()

def run(name):
    sandbox.name_thread(name)
    named.set()
    end.wait()

user, harden, before, after = sys.argv[1:]
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stdout)
if user == "ordinary" and os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _prctl.prctl(_prctl.PR_SET_DUMPABLE, 1)  # as a process is that this user starts
exec(before)
end = threading.Event()
threads = []
try:
    entered = sandbox.enter(harden)
    for name in ("portal", "health"):
        named = threading.Event()
        threads.append(threading.Thread(target=run, args=(name,)))
        threads[-1].start()
        named.wait()
    entered.verify()
except sandbox.SandboxError as error:
    print("REFUSED", error)
exec(after)
print("ready", flush=True)
sys.stdin.read()
end.set()
for thread in threads:
    thread.join()
"""


class Child:
    """A process that enters the sandbox and starts threads. ``log`` is what it has printed.

    *before* and *after* are statements for it to run. *prefix* is a command to run it.
    """

    def __init__(
        self,
        user: str,
        harden: str,
        *,
        before: str = "",
        after: str = "",
        prefix: tuple[str, ...] = (),
    ) -> None:
        self._command = [*prefix, sys.executable, "-c", CHILD, user, harden, before, after]
        self.log: list[str] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == "ready\n":
                return self
            self.log.append(line.rstrip("\n"))
        self._process.communicate()
        raise AssertionError("\n".join(self.log))

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=TIMEOUT)  # closes its stdin, which ends it
        assert self._process.returncode == 0

    def threads(self) -> list[dict[str, str]]:
        """Return what /proc/PID/task/TID/status says of each thread, the main one first."""
        directories = Path(f"/proc/{self._process.pid}/task").iterdir()
        return [
            dict(line.split(":\t", 1) for line in (directory / "status").read_text().splitlines())
            for directory in sorted(directories, key=lambda directory: int(directory.name))
        ]
