#!/usr/bin/env python3
"""Run the relay from a checkout, setting up what it needs on first use.

``./relay.py [options]`` installs requirements/run.lock into ``.venv`` beside
this file and hands the options to :mod:`relay.cli`; ``./relay.py --setup`` does
only the first; ``./relay.py --run-tests [pytest options]`` installs
requirements/test.lock and runs pytest. While a stamp in .venv says that all is
there, a start runs no other program. With ``RELAY_NO_BOOTSTRAP=1`` the running
interpreter is used as it is.

Standard library only; any Python since 3.8 gets as far as `check_python`.
The package ``relay`` shares this directory and this file's name: import prefers
a directory with an ``__init__.py`` to a module, so ``relay/`` must keep its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent
RUN_LOCK = ROOT / "requirements" / "run.lock"
TEST_LOCK = ROOT / "requirements" / "test.lock"  # all of RUN_LOCK, and more

VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "relay-setup.stamp"  # the Python that made .venv, then each lock installed
THIS_PYTHON = "python {}.{}".format(*sys.version_info)


class SetupError(Exception):
    """Set-up cannot go on; the text says why, and what to type."""


class ProgramFailed(SetupError):
    """A program ended by itself, and said that it failed."""


def main(arguments: list[str]) -> int:
    """Run the relay, or its tests, and return the exit code."""
    try:
        check_python(sys.version_info[:2])
        if arguments == ["--setup"]:
            set_up(RUN_LOCK)
            say("all is set up; to run the relay, leave out --setup")
            return os.EX_OK
        command = prepare(arguments)
    except SetupError as error:
        say(str(error))
        return os.EX_UNAVAILABLE
    except OSError as error:
        say(f"cannot set up {VENV}: {error}")
        return os.EX_UNAVAILABLE
    except KeyboardInterrupt:
        say("interrupted; the next start sets up what is missing")
        return 130
    if command:
        os.execv(command[0], command)
    return run_relay()


def check_python(version: tuple[int, ...]) -> None:
    """Raise SetupError if the relay cannot run on Python *version*."""
    if version < (3, 11):
        found = ".".join(map(str, version))
        raise SetupError(f"Python 3.11 or newer is needed, and {sys.executable} is {found}")


def prepare(arguments: list[str]) -> list[str]:
    """Install what is missing; return the command to execute, [] for this process as it is."""
    testing = arguments[:1] == ["--run-tests"]
    lock = TEST_LOCK if testing else RUN_LOCK
    if os.environ.get("RELAY_NO_BOOTSTRAP", "0") in ("", "0"):
        python = str(VENV_PYTHON)
        changed = set_up(lock)
    else:
        python = sys.executable
        changed = False
        if testing and find_spec("pytest") is None:
            raise SetupError(f"cannot import pytest; {how_to_install(lock)}")
    if testing:
        os.chdir(ROOT)
        return [python, "-m", "pytest", *arguments[1:]]
    if changed or sys.executable != python:
        return [python, str(ROOT / "relay.py"), *arguments]
    return []


def run_relay() -> int:
    """Hand over to the relay, which reads its options from sys.argv."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # PYTHONSAFEPATH leaves a script's directory out
    try:
        from relay.cli import main as relay_main
    except ImportError as error:
        if (error.name or "relay").partition(".")[0] == "relay":
            raise  # not a dependency: a fault of ours
        say(f"cannot import {error.name}; {how_to_install(RUN_LOCK)}")
        return os.EX_UNAVAILABLE
    return relay_main()


def how_to_install(lock: Path) -> str:
    """Say what puts *lock* within reach of the running interpreter."""
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    if sys.prefix == sys.base_prefix and managed.exists():  # pip would refuse
        return f"type: env -u RELAY_NO_BOOTSTRAP {shlex.join([sys.executable, *sys.argv])}"
    return f"type: {shlex.join(pip_install(sys.executable, lock))}"


def set_up(lock: Path) -> bool:
    """Bring .venv up to *lock*; return whether that took any work."""
    if is_current(lock):
        return False
    require_writable()
    with only_one_set_up() as held:
        if is_current(lock):  # another start did it meanwhile
            return True
        stamp = read_stamp()
        usable = stamp[:1] == [THIS_PYTHON] and VENV_PYTHON.exists()
        install_system_packages(missing_packages(lock, new_venv=not usable), held)
        if not usable:
            unfit = ".venv is unfinished or of another Python: creating it anew"
            say(unfit if VENV.exists() else "first start: creating .venv")
            run([sys.executable, "-m", "venv", "--clear", str(VENV)], held)
            stamp = [THIS_PYTHON]  # a .venv is kept when pip fails: what is typed by hand counts
        say(f"installing {lock.relative_to(ROOT)} into .venv (pip)")
        STAMP.unlink(missing_ok=True)  # pip that is killed leaves packages in halves
        try:
            run(pip_install(str(VENV_PYTHON), lock), held)
        except ProgramFailed:
            write_stamp(stamp)
            raise
        installed = [RUN_LOCK, TEST_LOCK] if lock == TEST_LOCK else [RUN_LOCK]
        write_stamp([THIS_PYTHON, *map(stamp_line, installed)])
    return True


def require_writable() -> None:
    """Raise SetupError where .venv cannot be written, before anything is installed."""
    for directory in filter(Path.exists, [ROOT, VENV]):
        if os.access(directory, os.W_OK):
            continue
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            reason = f"{directory} is on a read-only file system: install it as a package (pip)"
        else:
            owner = directory.stat().st_uid
            reason = (
                f"{directory} belongs to user {owner}: as that user, type {ROOT}/relay.py --setup"
            )
        raise SetupError(f"cannot set up .venv; {reason}")


def is_current(lock: Path) -> bool:
    """Whether this Python made .venv and all of *lock* is in it."""
    stamp = read_stamp()
    return stamp[:1] == [THIS_PYTHON] and stamp_line(lock) in stamp and VENV_PYTHON.exists()


def read_stamp() -> list[str]:
    """Return the stamp's lines, none if .venv was never finished."""
    return STAMP.read_text().splitlines() if STAMP.exists() else []


def write_stamp(lines: list[str]) -> None:
    """Say what is in .venv, once that is on the disk."""
    os.sync()  # or a power cut might leave the stamp and take what it stands for
    STAMP.write_text("".join(f"{line}\n" for line in lines))


def stamp_line(lock: Path) -> str:
    """Return the line by which the stamp names this very content of *lock*."""
    return f"{lock.name} {hashlib.sha256(lock.read_bytes()).hexdigest()}"


@contextmanager
def only_one_set_up() -> Iterator[int]:
    """Wait until nothing else sets up this checkout, and hold off the next; yield the lock.

    The lock is a descriptor and held until its last copy is closed. Each program that sets up
    gets a copy, so what a killed start leaves running still holds off the next one.
    """
    directory = os.open(ROOT, os.O_RDONLY)  # a lock file would be litter, or in the way of --clear
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another start, or what one left running, is setting up .venv: waiting for it")
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(directory)


def missing_packages(lock: Path, *, new_venv: bool) -> list[str]:
    """Return the Debian packages without which .venv cannot be made or *lock* not be built."""
    version = "python{}.{}".format(*sys.version_info)
    present = {}
    if new_venv:
        present[f"{version}-venv"] = find_spec("ensurepip") is not None
    prctl = re.search(r"^python-prctl==([\w.]+)", lock.read_text(), re.MULTILINE)
    if prctl and (new_venv or not any(VENV.glob(f"lib/*/site-packages/python_prctl-{prctl[1]}*"))):
        present["gcc"] = shutil.which("gcc") is not None
        present["libc6-dev"] = Path("/usr/include/stdio.h").exists()
        present["libcap-dev"] = Path("/usr/include/sys/capability.h").exists()
        present[f"{version}-dev"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    return [package for package, is_present in present.items() if not is_present]


def install_system_packages(packages: list[str], held: int) -> None:
    """Install *packages* if the system and the user allow it, or else say how."""
    if not packages:
        return
    names = " ".join(packages)
    if not Path("/etc/debian_version").exists():
        names = names.replace("libc6-", "glibc-").replace("-dev", "-devel")  # as RPMs are named
        manager = "type: dnf install" if shutil.which("dnf") else "install:"
        raise SetupError(f"system packages are missing; {manager} {names}")
    if os.geteuid() != 0:
        raise SetupError(f"system packages are missing; type: sudo apt-get install -y {names}")
    say(f"installing system packages: {names} (apt-get; not with RELAY_NO_BOOTSTRAP=1)")
    # dpkg that a power cut stopped wants to go on before anything else. A new machine has no
    # package lists. Neither failure is final: perhaps there is nothing to go on with, and old
    # lists may do.
    before = "export DEBIAN_FRONTEND=noninteractive; dpkg --configure -a; apt-get update"
    install = "apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends"
    run(["sh", "-c", f"{before}; {install} {names}"], held, ends_when_interrupted=False)


def pip_install(python: str, lock: Path) -> list[str]:
    """Return the command that installs *lock*; `-m pip` as a script breaks when .venv moves."""
    options = ["--disable-pip-version-check", "--require-hashes"]
    return [python, "-m", "pip", "install", *options, "-r", str(lock)]


def run(command: list[str], held: int, *, ends_when_interrupted: bool = True) -> None:
    """Run *command* unheard, with a copy of the lock *held*; raise SetupError if it fails."""
    # Memory, not a pipe: a pipe would break with this process, and apt-get with the pipe.
    with os.fdopen(os.memfd_create("output"), "w+b") as output:
        with subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[held],
        ) as process:
            try:
                process.wait()
            except KeyboardInterrupt:
                if ends_when_interrupted:
                    process.terminate()
                process.wait()  # apt-get that is cut off leaves packages in a mess
                raise
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    if process.returncode < 0:
        raise SetupError(f"{shlex.join(command)}: killed by signal {-process.returncode}")
    if process.returncode > 0:
        end = "".join(f"\n    {line}" for line in lines[-12:])
        again = f"relay.py: to go on, start again; to try that alone, type: {shlex.join(command)}"
        raise ProgramFailed(f"that failed:{end}\n{again}")


def say(text: str) -> None:
    """Tell the user one thing on stderr."""
    print(f"relay.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
