"""The launcher, as a process in a checkout of its own.

Its `venv`, `pip` and `pytest` are stand-ins on PYTHONPATH that write down how they were
called, so that no test but the last waits for a real .venv and none needs a network.
"""

from __future__ import annotations

import ast
import configparser
import fcntl
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER = REPOSITORY / "relay.py"
# Root, but to files of others.
WITHOUT_OVERRIDE = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
CREATING = "relay.py: first start: creating .venv"
CREATING_ANEW = "relay.py: .venv is unfinished or of another Python: creating it anew"
INSTALLING = "relay.py: installing requirements/run.lock into .venv (pip)"
INSTALLING_TESTS = "relay.py: installing requirements/test.lock into .venv (pip)"
WAITING = "relay.py: another start, or what one left running, is setting up .venv: waiting for it"
INTERRUPTED = "relay.py: interrupted; the next start sets up what is missing"
SET_UP = "relay.py: all is set up; to run the relay, leave out --setup"
TO_GO_ON = "relay.py: to go on, start again; to try that alone, type: "


def test_first_start_announces_each_step_and_runs_the_relay(checkout: Checkout) -> None:
    start = checkout.start("--name", "a b", "")

    assert start.said == [CREATING, INSTALLING]
    assert checkout.calls() == ["venv", "pip run.lock"]
    assert start.relay == {
        "arguments": ["--name", "a b", ""],
        "prefix": str(checkout.root / ".venv"),
    }
    assert start.exit_code == 7  # as the stand-in's main() returned


def test_second_start_sets_nothing_up(checkout: Checkout) -> None:
    checkout.start()
    checkout.forget_calls()

    start = checkout.start("--name", "b")

    assert start.said == []
    assert checkout.calls() == []
    assert start.relay["arguments"] == ["--name", "b"]
    assert start.exit_code == 7


def test_set_up_leaves_nothing_outside_the_venv(checkout: Checkout) -> None:
    before = set(checkout.root.iterdir())
    checkout.start()
    assert set(checkout.root.iterdir()) == before | {checkout.root / ".venv"}


def test_works_from_another_directory_through_a_link(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "linked-relay"
    link.symlink_to(checkout.launcher)
    assert checkout.start(launcher=link).exit_code == 7


def test_works_when_python_leaves_out_the_script_directory(checkout: Checkout) -> None:
    assert checkout.start(PYTHONSAFEPATH="1").exit_code == 7


def test_changed_lock_is_installed(checkout: Checkout) -> None:
    checkout.start()
    checkout.forget_calls()
    checkout.run_lock.write_text("# another dependency\n")

    assert checkout.start().said == [INSTALLING]
    assert checkout.calls() == ["pip run.lock"]
    assert checkout.start().said == []


def test_run_tests_installs_the_test_lock_and_runs_pytest(checkout: Checkout) -> None:
    start = checkout.start("--run-tests", "-k", "a b")

    assert start.said == [CREATING, INSTALLING_TESTS]
    assert checkout.calls() == ["venv", "pip test.lock", f"pytest -k 'a b' in {checkout.root}"]
    assert start.exit_code == 3  # as the stand-in for pytest ended


def test_test_lock_serves_the_relay_too(checkout: Checkout) -> None:
    checkout.start("--run-tests")
    assert checkout.start("--run-tests").said == []
    assert checkout.start().said == []


def test_run_lock_does_not_serve_the_tests(checkout: Checkout) -> None:
    checkout.start()
    assert checkout.start("--run-tests").said == [INSTALLING_TESTS]


def test_changed_test_lock_does_not_concern_the_relay(checkout: Checkout) -> None:
    checkout.start("--run-tests")
    checkout.test_lock.write_text("# another test dependency\n")
    assert checkout.start().said == []
    assert checkout.start("--run-tests").said == [INSTALLING_TESTS]


def test_failed_pip_says_what_to_type(checkout: Checkout) -> None:
    checkout.fails("pip", "no route to the package index")

    start = checkout.start()

    assert start.exit_code == os.EX_UNAVAILABLE
    assert start.output == ""
    assert start.said[:4] == [
        CREATING,
        INSTALLING,
        "relay.py: that failed:",
        "    no route to the package index",
    ]
    typed = start.said[4].removeprefix(TO_GO_ON)
    assert checkout.type_in(typed) == 1  # it is the command that failed
    checkout.works("pip")
    assert checkout.type_in(typed) == 0


def test_after_a_failed_pip_the_venv_is_kept(checkout: Checkout) -> None:
    """So that packages installed by hand, as the message said, are found."""
    checkout.fails("pip", "no route to the package index")
    checkout.start()
    checkout.works("pip")
    checkout.forget_calls()

    start = checkout.start()

    assert start.said == [INSTALLING]
    assert checkout.calls() == ["pip run.lock"]
    assert start.exit_code == 7


def test_failed_update_of_the_tests_leaves_the_relay_startable(checkout: Checkout) -> None:
    checkout.start()
    checkout.fails("pip", "no route to the package index")
    assert checkout.start("--run-tests").exit_code == os.EX_UNAVAILABLE
    assert checkout.start().said == []


def test_unfinished_venv_is_created_anew(checkout: Checkout) -> None:
    """Set-up was interrupted before .venv was whole, so it has no stamp."""
    rest = checkout.root / ".venv" / "bin" / "rest"
    rest.parent.mkdir(parents=True)
    rest.touch()

    start = checkout.start()

    assert start.said == [CREATING_ANEW, INSTALLING]
    assert start.exit_code == 7
    assert not rest.exists()


def test_venv_whose_python_is_gone_is_created_anew(checkout: Checkout) -> None:
    checkout.start()
    checkout.venv_python.unlink()
    checkout.venv_python.symlink_to("/nonexistent/python")

    start = checkout.start()

    assert start.said == [CREATING_ANEW, INSTALLING]
    assert start.exit_code == 7


def test_venv_of_another_python_is_created_anew(checkout: Checkout) -> None:
    checkout.start()
    stamp = checkout.root / ".venv" / "relay-setup.stamp"
    this_python = f"python {sys.version_info.major}.{sys.version_info.minor}\n"
    assert stamp.read_text().startswith(this_python)
    stamp.write_text(stamp.read_text().replace(this_python, "python 3.2\n"))

    start = checkout.start()

    assert start.said == [CREATING_ANEW, INSTALLING]
    assert start.exit_code == 7


def test_concurrent_first_starts_set_up_once(checkout: Checkout) -> None:
    """Both find nothing set up, and are held until both have said so."""
    with (
        checkout.another_set_up() as end_it,
        checkout.launch() as one,
        checkout.launch() as other,
    ):
        assert next_line(one) == next_line(other) == WAITING
        end_it()
        said = [*ended(one).said, *ended(other).said]

    assert sorted(said) == [CREATING, INSTALLING]
    assert one.returncode == other.returncode == 7
    assert checkout.calls() == ["venv", "pip run.lock"]


def test_interrupt_while_waiting_is_one_line(checkout: Checkout) -> None:
    with checkout.another_set_up(), checkout.launch() as process:
        assert next_line(process) == WAITING
        process.send_signal(signal.SIGINT)
        start = ended(process)

    assert start.said == [INTERRUPTED]
    assert start.exit_code == 130


def test_interrupt_ends_pip_and_the_next_start_does_not_trust_what_it_left(
    checkout: Checkout,
) -> None:
    checkout.hangs("pip")
    with checkout.launch() as process:
        pip = checkout.hanging("pip")
        process.send_signal(signal.SIGINT)
        start = ended(process)

    assert pip.has_ended()
    assert start.said == [CREATING, INSTALLING, INTERRUPTED]
    assert start.exit_code == 130
    checkout.works("pip")
    assert checkout.start().said == [CREATING_ANEW, INSTALLING]


@pytest.mark.parametrize("program", ["venv", "pip"])
def test_start_after_a_killed_one_waits_for_what_that_left_running(
    checkout: Checkout, program: str
) -> None:
    checkout.hangs(program)
    with checkout.launch() as killed:
        left_running = checkout.hanging(program)
        killed.kill()
        killed.wait()
    checkout.works(program)

    with checkout.launch() as next_start:
        assert next_line(next_start) == WAITING
        left_running.goes_on()  # and writes into .venv
        start = ended(next_start)

    assert start.said == [CREATING_ANEW, INSTALLING]
    assert start.exit_code == 7
    before = {"venv": ["venv"], "pip": ["venv", "pip run.lock"]}[program]
    assert checkout.calls() == [*before, f"{program} went on", "venv", "pip run.lock"]
    assert not checkout.rest_of(program).exists()


@pytest.mark.parametrize("program", ["venv", "pip"])
def test_start_after_all_was_killed_sets_up_anew(checkout: Checkout, program: str) -> None:
    checkout.hangs(program)
    with checkout.launch() as killed:
        left_running = checkout.hanging(program)
        killed.kill()
        killed.wait()
    left_running.is_killed()
    checkout.works(program)

    with checkout.launch() as process:
        start = ended(process)

    assert [line for line in start.said if line != WAITING] == [CREATING_ANEW, INSTALLING]
    assert start.exit_code == 7


def test_pip_that_is_killed_is_told_from_one_that_fails(checkout: Checkout) -> None:
    checkout.hangs("pip")
    with checkout.launch() as process:
        checkout.hanging("pip").is_killed()
        start = ended(process)
    assert re.fullmatch(r"relay.py: .*/run.lock': killed by signal 9", start.said[-1])
    assert start.exit_code == os.EX_UNAVAILABLE
    checkout.works("pip")

    assert checkout.start().said == [CREATING_ANEW, INSTALLING]


def test_setup_sets_up_and_runs_nothing(checkout: Checkout) -> None:
    start = checkout.start("--setup")
    assert start.said == [CREATING, INSTALLING, SET_UP]
    assert start.output == ""
    assert start.exit_code == 0

    assert checkout.start("--setup").said == [SET_UP]
    assert checkout.start().said == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_read_only_checkout_is_said_to_be_one(checkout: Checkout) -> None:
    read_only = 'mount --bind -o ro "$0" "$0" && exec "$@"'
    start = checkout.start(within=("unshare", "--mount", "sh", "-c", read_only, checkout.root))

    system = f"{checkout.root} is on a read-only file system: install it as a package (pip)"
    assert start.said == [f"relay.py: cannot set up .venv; {system}"]
    assert start.exit_code == os.EX_UNAVAILABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the checkout away")
def test_checkout_of_another_user_says_whose_it_is(checkout: Checkout) -> None:
    os.chown(checkout.root, 12345, -1)
    start = checkout.start(within=WITHOUT_OVERRIDE)

    typed = f"as that user, type {checkout.launcher} --setup"
    assert start.said == [
        f"relay.py: cannot set up .venv; {checkout.root} belongs to user 12345: {typed}"
    ]
    assert start.exit_code == os.EX_UNAVAILABLE
    assert checkout.calls() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give the checkout away")
def test_checkout_of_another_user_that_is_set_up_runs(checkout: Checkout) -> None:
    checkout.start()
    os.chown(checkout.root, 12345, -1)
    os.chown(checkout.root / ".venv", 12345, -1)
    assert checkout.start(within=WITHOUT_OVERRIDE).exit_code == 7


@pytest.mark.parametrize("value", ["1", "yes"])
def test_no_bootstrap_runs_this_interpreter_as_it_is(checkout: Checkout, value: str) -> None:
    start = checkout.start("--name", "b", RELAY_NO_BOOTSTRAP=value)

    assert start.said == []
    assert start.relay == {"arguments": ["--name", "b"], "prefix": sys.prefix}
    assert start.exit_code == 7
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("value", ["", "0"])
def test_no_bootstrap_counts_as_unset(checkout: Checkout, value: str) -> None:
    assert checkout.start(RELAY_NO_BOOTSTRAP=value).said == [CREATING, INSTALLING]


def test_no_bootstrap_without_dependencies_says_what_to_type(checkout: Checkout) -> None:
    checkout.start()
    checkout.relay_imports("no_such_dependency.part")
    checkout.forget_calls()

    start = checkout.start(python=checkout.venv_python, RELAY_NO_BOOTSTRAP="1")

    assert start.exit_code == os.EX_UNAVAILABLE
    [line] = start.said
    message, typed = line.split("; type: ")
    assert message == "relay.py: cannot import no_such_dependency"
    assert checkout.type_in(typed) == 0
    assert checkout.calls() == ["pip run.lock"]


def test_no_bootstrap_without_pytest_says_what_to_type(checkout: Checkout) -> None:
    checkout.start()
    checkout.forget_calls()

    start = checkout.start(
        "--run-tests", python=checkout.venv_python, RELAY_NO_BOOTSTRAP="1", PYTHONPATH=""
    )

    assert start.exit_code == os.EX_UNAVAILABLE
    [line] = start.said
    message, typed = line.split("; type: ")
    assert message == "relay.py: cannot import pytest"
    assert checkout.type_in(typed) == 0
    assert checkout.calls() == ["pip test.lock"]


def test_fault_of_our_own_is_not_taken_for_a_missing_dependency(checkout: Checkout) -> None:
    checkout.relay_imports("relay.nowhere")
    start = checkout.start()
    assert "Traceback (most recent call last):" in start.said
    assert start.exit_code == 1


@pytest.mark.parametrize("version", [(3, 11), (3, 13), (4, 0)])
def test_python_is_new_enough(launcher: ModuleType, version: tuple[int, int]) -> None:
    launcher.check_python(version)


@pytest.mark.parametrize("version", [(2, 7), (3, 8), (3, 10)])
def test_python_is_too_old(launcher: ModuleType, version: tuple[int, int]) -> None:
    found = "is {}.{}$".format(*version)
    with pytest.raises(launcher.SetupError, match=f"Python 3.11 or newer is needed.*{found}"):
        launcher.check_python(version)


def test_old_python_can_read_the_launcher() -> None:
    """As far as the version check, whose message is better than a SyntaxError."""
    ast.parse(LAUNCHER.read_text(), feature_version=(3, 8))


def test_build_packages_are_asked_for_only_to_build_prctl(
    launcher: ModuleType, checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # hence no gcc
    checkout.run_lock.write_text("some-package==1.0\n")
    assert launcher.missing_packages(checkout.run_lock, new_venv=True) == []

    checkout.run_lock.write_text("python-prctl==1.8.1 \\\n    --hash=sha256:00\n")
    assert "gcc" in launcher.missing_packages(checkout.run_lock, new_venv=True)
    assert "gcc" in launcher.missing_packages(checkout.run_lock, new_venv=False)

    built = checkout.root / ".venv/lib/python3/site-packages/python_prctl-1.8.1.dist-info"
    built.mkdir(parents=True)
    assert launcher.missing_packages(checkout.run_lock, new_venv=False) == []


def test_who_may_not_install_packages_is_told_how(
    launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(launcher.SetupError, match=r"missing; .*install.* gcc"):
        launcher.install_system_packages(["gcc"], held=0)


@pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="Debian's ways")
class TestDebian:
    def test_root_installs_what_is_missing(
        self, launcher: ModuleType, apt_get: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        launcher.install_system_packages(["gcc", "libcap-dev"], held=0)

        how = "(apt-get; not with RELAY_NO_BOOTSTRAP=1)"
        said = f"relay.py: installing system packages: gcc libcap-dev {how}\n"
        assert capfd.readouterr() == ("", said)
        go_on, update, install = (apt_get.parent / "calls").read_text().splitlines()
        assert go_on == "noninteractive --configure -a"
        assert update == "noninteractive update"
        assert re.fullmatch("noninteractive .* install -y .* gcc libcap-dev", install)

    def test_failed_apt_get_says_what_to_type(self, launcher: ModuleType, apt_get: Path) -> None:
        with apt_get.open("a") as script:
            script.write("echo no such mirror\nexit 100\n")
        with pytest.raises(launcher.SetupError) as raised:
            launcher.install_system_packages(["gcc"], held=0)
        assert re.search(r"    no such mirror\n.*type: sh -c .* install .* gcc", str(raised.value))

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
    def test_apt_get_survives_a_killed_start_and_the_next_waits_for_it(
        self, checkout: Checkout
    ) -> None:
        """Cut off in the middle, it would leave a mess that takes a person to clean up."""
        checkout.needs_a_compiler()
        checkout.hangs("apt-get")
        with checkout.launch(PATH=checkout.programs) as killed:
            apt_get = checkout.hanging("apt-get")
            killed.kill()
            killed.wait()
        checkout.works("apt-get")

        with checkout.launch(PATH=checkout.programs) as next_start:
            assert next_line(next_start) == WAITING
            apt_get.goes_on()  # and says so, to whom it may concern
            start = ended(next_start)

        assert start.said[-2:] == [CREATING, INSTALLING]
        assert start.exit_code == 7
        assert checkout.calls()[:3] == ["apt-get", "apt-get went on", "apt-get"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
    def test_interrupt_lets_apt_get_finish(self, checkout: Checkout) -> None:
        checkout.needs_a_compiler()
        checkout.hangs("apt-get")
        with checkout.launch(PATH=checkout.programs) as process:
            apt_get = checkout.hanging("apt-get")
            process.send_signal(signal.SIGINT)
            apt_get.goes_on()
            start = ended(process)

        assert start.said[1:] == [INTERRUPTED]
        assert start.exit_code == 130
        assert checkout.calls() == ["apt-get", "apt-get went on"]

    @pytest.fixture
    def apt_get(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Stand in for apt-get, and for being root."""
        script = tmp_path / "bin" / "apt-get"
        script.parent.mkdir()
        script.write_text('#!/bin/sh\necho $DEBIAN_FRONTEND "$@" >>"${0%/*}/calls"\n')
        script.chmod(0o755)
        shutil.copy(script, script.parent / "dpkg")
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("DEBIAN_FRONTEND", raising=False)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        return script


@pytest.mark.parametrize("name", ["run.lock", "test.lock"])
def test_lock_pins_every_package_by_hash(name: str) -> None:
    lines = (REPOSITORY / "requirements" / name).read_text().replace("\\\n", "").splitlines()
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    options = {line for line in lines if line.startswith("-")}
    assert options <= {"--no-binary python-prctl"}  # no index, no directory
    for line in set(lines) - options:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .*?)?(\s+--hash=sha256:[0-9a-f]{64})+", line)


def test_run_lock_pins_what_the_relay_depends_on() -> None:
    assert setup_cfg_names("options:install_requires") <= pins("run.lock").keys()


def test_test_lock_pins_what_tests_and_checks_depend_on() -> None:
    extras = [f"options.extras_require:{extra}" for extra in ("test", "interop", "dev")]
    assert setup_cfg_names(*extras) <= pins("test.lock").keys()


def test_test_lock_holds_the_run_lock() -> None:
    """The launcher counts run.lock as installed when test.lock is."""
    assert pins("run.lock").items() <= pins("test.lock").items()


@pytest.mark.slow
def test_real_venv_and_pip_without_a_home(checkout: Checkout) -> None:
    first = checkout.start(PYTHONPATH="")
    assert first.said == [CREATING, INSTALLING]
    assert first.relay["prefix"] == str(checkout.root / ".venv")
    assert first.exit_code == 7

    second = checkout.start(PYTHONPATH="")
    assert second.said == []
    assert second.relay == first.relay


@dataclass(frozen=True)
class Start:
    """What came of one start."""

    said: list[str]  # lines on stderr
    output: str
    exit_code: int

    @property
    def relay(self) -> dict[str, object]:
        """What the stand-in for the relay saw."""
        seen: dict[str, object] = json.loads(self.output)
        return seen


@dataclass(frozen=True)
class Hanging:
    """A stand-in that stopped halfway."""

    pid: int

    def goes_on(self) -> None:
        os.kill(self.pid, signal.SIGUSR1)

    def is_killed(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


class Checkout:
    """A copy of the launcher, with stand-ins for all that it starts."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "check out"  # a space must not matter
        self.launcher = self.root / "relay.py"
        self.run_lock = self.root / "requirements" / "run.lock"
        self.test_lock = self.root / "requirements" / "test.lock"
        self.venv_python = self.root / ".venv" / "bin" / "python"
        self._stand_ins = directory / "stand-ins"

        self.run_lock.parent.mkdir(parents=True)
        shutil.copy(LAUNCHER, self.launcher)
        self.run_lock.write_text("# nothing to install\n")
        self.test_lock.write_text("# nothing to install\n")
        (self.root / "relay").mkdir()
        (self.root / "relay" / "__init__.py").touch()
        (self.root / "relay" / "cli.py").write_text(RELAY)
        self._stand_ins.mkdir()
        for name, body in [("venv", VENV), ("pip", PIP), ("pytest", PYTEST)]:
            self._stand_in(name, self._stand_ins / f"{name}.py", body)

    def start(
        self, *arguments: str, within: tuple[str | Path, ...] = (), **options: str | Path
    ) -> Start:
        with self.launch(*arguments, within=within, **options) as process:
            return ended(process)

    @contextmanager
    def launch(
        self,
        *arguments: str,
        python: str | Path = sys.executable,
        launcher: str | Path | None = None,
        within: tuple[str | Path, ...] = (),
        **environment: str | Path,
    ) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [*within, python, launcher or self.launcher, *arguments],
            cwd="/",
            env={**self._environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # a failed test must not wait for it

    def type_in(self, command: str) -> int:
        """Do as the launcher said; return the exit code."""
        done = subprocess.run(
            command, shell=True, cwd="/", env=self._environment(), capture_output=True, check=False
        )
        return done.returncode

    @contextmanager
    def another_set_up(self) -> Iterator[Callable[[], None]]:
        """Be a set-up under way; the function yielded ends it."""
        directory = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield lambda: fcntl.flock(directory, fcntl.LOCK_UN)
        finally:
            os.close(directory)

    def calls(self) -> list[str]:
        """Return what the launcher started, as the stand-ins wrote it down."""
        log = self._stand_ins / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def forget_calls(self) -> None:
        (self._stand_ins / "calls").unlink()

    def works(self, program: str) -> None:
        (self._stand_ins / f"{program} does").write_text("")

    def fails(self, program: str, message: str) -> None:
        (self._stand_ins / f"{program} does").write_text(f"sys.exit({message!r})")

    def hangs(self, program: str) -> None:
        """Have *program* stop halfway, until it is told to go on."""
        os.mkfifo(self._stand_ins / f"{program} hangs")
        (self._stand_ins / f"{program} does").write_text(HANG)

    def hanging(self, program: str) -> Hanging:
        """Wait until *program* hangs."""
        pipe = os.open(self._stand_ins / f"{program} hangs", os.O_RDWR)  # which need not wait
        try:
            assert select.select([pipe], [], [], 60)[0], f"{program} was not started"
            return Hanging(int(os.read(pipe, 100)))
        finally:
            os.close(pipe)

    def rest_of(self, program: str) -> Path:
        """Return what *program* writes into .venv when it goes on."""
        return self.root / ".venv" / f"rest of {program}"

    @property
    def programs(self) -> Path:
        """A search path on which there is apt-get, but no compiler."""
        return self._stand_ins / "bin"

    def needs_a_compiler(self) -> None:
        self.run_lock.write_text("python-prctl==1.8.1\n")
        self.programs.mkdir()
        (self.programs / "sh").symlink_to("/bin/sh")
        self._stand_in("apt-get", self.programs / "apt-get", APT_GET)

    def relay_imports(self, module: str) -> None:
        (self.root / "relay" / "cli.py").write_text(f"import {module}\n")

    def _stand_in(self, name: str, path: Path, body: str) -> None:
        head = f"#!{sys.executable}\nname, here = {name!r}, {str(self._stand_ins)!r}\n"
        path.write_text(head + LOG + body)
        path.chmod(0o755)
        self.works(name)

    def _environment(self) -> dict[str, str | Path]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": self._stand_ins,
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def next_line(process: subprocess.Popen[str]) -> str:
    """Return what *process* says before it waits for the test."""
    assert process.stderr is not None
    assert select.select([process.stderr], [], [], 60)[0], "it says nothing"
    return process.stderr.readline().rstrip("\n")


def ended(process: subprocess.Popen[str]) -> Start:
    output, said = process.communicate(timeout=60)
    return Start(said.splitlines(), output, process.returncode)


RELAY = """
import json, sys

def main():
    print(json.dumps({"arguments": sys.argv[1:], "prefix": sys.prefix}))
    return 7
"""

LOG = """
import os, shlex, shutil, signal, sys
from pathlib import Path

here = Path(here)

def log(line):
    with (here / "calls").open("a") as calls:
        print(line, file=calls)
"""

VENV = """
log("venv")
venv = Path(sys.argv[-1])
if venv.exists() and "--clear" in sys.argv:
    shutil.rmtree(venv)
(venv / "bin").mkdir(parents=True)
exec((here / "venv does").read_text())
python = Path(sys.executable).resolve()
(venv / "bin" / "python").symlink_to(python)
config = f"home = {python.parent}\\ninclude-system-site-packages = false\\n"
(venv / "pyvenv.cfg").write_text(config)
"""

PIP = """
assert sys.argv[1] == "install"
assert "--require-hashes" in sys.argv
log(f"pip {Path(sys.argv[-1]).name}")
venv = Path(sys.prefix)
exec((here / "pip does").read_text())
"""

APT_GET = """
venv = None
if "install" in sys.argv:
    log("apt-get")
    exec((here / "apt-get does").read_text())
"""

HANG = """
signal.alarm(60)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
(here / f"{name} hangs").write_text(str(os.getpid()))
signal.sigwait([signal.SIGUSR1])
print("going on", flush=True)
if venv:
    (venv / f"rest of {name}").touch()
log(f"{name} went on")
"""

PYTEST = """
log(f"pytest {shlex.join(sys.argv[1:])} in {os.getcwd()}")
sys.exit(3)
"""


def pins(name: str) -> dict[str, str]:
    """Return the version that a lock pins each package to."""
    text = (REPOSITORY / "requirements" / name).read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def setup_cfg_names(*keys: str) -> set[str]:
    """Return the packages that setup.cfg lists under each ``section:option``."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(REPOSITORY / "setup.cfg")
    lines = [line for key in keys for line in config.get(*key.split(":")).split("\n") if line]
    return {re.sub("[-_.]+", "-", re.split("[^\\w.-]", line)[0]).lower() for line in lines}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def launcher(checkout: Checkout) -> ModuleType:
    """Load the launcher of the checkout, by a name that is not the package's."""
    spec = importlib.util.spec_from_file_location("launcher", checkout.launcher)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
