"""``firezone-relay probe``: what it is told on the command line, and how it says what it found."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.probe.findings import Report, State
from relay.probe.output import Lines, printable, summary
from relay.probe.target import parse_uri
from tests.process import TIMEOUT, RelayProcess, environment, free_port

SECRET = "0123456789abcdef"
QUICK = ("--seconds=0", "--max-rate=0")
# Nobody else may read what a test has written.
SAME_USER = ("--user=root",) if os.geteuid() == 0 else ()


def probe(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", "probe", *arguments],
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
        check=False,
    )


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("probe") / "auth.secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def relay(secret: Path) -> Iterator[RelayProcess]:
    with RelayProcess(f"--auth-secret-file={secret}", *SAME_USER, port=free_port()) as relay:
        yield relay


@pytest.fixture
def url(relay: RelayProcess) -> str:
    return f"turn:127.0.0.1:{relay.port}"


# --- What it says ---------------------------------------------------------------------------


def test_a_server_that_is_all_right(relay: RelayProcess, url: str) -> None:
    credential = (f"--username={relay.username}", f"--credential={relay.password}")
    ended = probe(url, *credential, *QUICK)
    assert (ended.returncode, ended.stderr) == (0, "")
    first, *lines, last = ended.stdout.splitlines()
    assert first == f"{url}?transport=udp"
    assert all(line.startswith("  ok") for line in lines)
    assert last == "  all is well"


def test_a_server_that_is_not(relay: RelayProcess, url: str) -> None:
    ended = probe(url, f"--username={relay.username}", "--credential=wrong", *QUICK)
    assert ended.returncode == 1
    assert "failed   authentication" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "  1 of 3 checks failed"


def test_stun_alone(relay: RelayProcess) -> None:
    ended = probe(f"stun:127.0.0.1:{relay.port}")
    assert ended.returncode == 0
    assert "authentication" not in ended.stdout


def test_without_a_credential_it_goes_as_far_as_it_can(url: str) -> None:
    ended = probe(url, *QUICK)
    assert ended.returncode == 0
    assert "skipped  authentication" in ended.stdout


def test_several_servers(url: str) -> None:
    ended = probe(f"stun:127.0.0.1:{free_port()}", url, *QUICK)
    assert ended.returncode == 1
    assert "refused: nothing listens at that port" in ended.stdout
    assert ended.stdout.count("turn:") == 1


def test_json(url: str, secret: Path) -> None:
    ended = probe(url, f"--auth-secret-file={secret}", "--seconds=0.2", "--max-rate=300", "--json")
    assert ended.returncode == 0
    [server] = json.loads(ended.stdout)["servers"]
    assert (server["url"], server["state"]) == (f"{url}?transport=udp", "ok")
    checks: dict[str, dict[str, Any]] = {check["name"]: check for check in server["checks"]}
    assert checks["mapped address"]["is_behind_nat"] is False
    assert checks["allocation, IPv4"]["relayed_address"][0] == "127.0.0.1"
    assert checks["loss"]["received"] == checks["loss"]["sent"] == 20
    assert 0 < checks["latency"]["p50_seconds"] <= checks["latency"]["p99_seconds"]
    assert checks["rate"]["carried_per_second"] == 300


def test_what_it_does_is_shown_on_a_terminal_alone(url: str) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "relay", "probe", url, *QUICK],
        env=environment(TERM="xterm"),
        stdout=terminal,
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(controller, 4096):
                shown += part
        except OSError:  # EIO: nobody holds the other end any more
            pass
        os.close(controller)
    assert process.returncode == 0
    assert b"\x1b[32mok" in shown
    assert b"asking 127.0.0.1" in shown
    assert "\x1b" not in probe(url, *QUICK).stdout


def test_what_a_server_says_cannot_command_a_terminal() -> None:
    assert printable("evil\x1b]0;title\x07") == "evil\\x1b]0;title\\x07"


def test_colours_can_be_switched_off() -> None:
    controller, terminal = pty.openpty()
    report = Report()
    report.ok("name", "text")
    try:
        with os.fdopen(terminal, "w") as stream:
            Lines(stream, {"TERM": "xterm", "NO_COLOR": "1"}).finding(report.findings[0])
            shown = os.read(controller, 4096)
    finally:
        os.close(controller)
    assert b"\x1b[32m" not in shown


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([State.OK, State.NOTE], "all is well"),
        ([State.OK, State.WARNING], "it works; 1 warning"),
        ([State.FAILED, State.WARNING, State.WARNING], "1 of 3 checks failed; 2 warnings"),
    ],
)
def test_summary(states: list[State], text: str) -> None:
    report = Report()
    for state in states:
        report.add("name", state, "text")
    assert summary(report, []) == text


# --- What it is told ------------------------------------------------------------------------


def test_what_mint_prints_can_be_piped_into_it(relay: RelayProcess, secret: Path) -> None:
    minted = subprocess.run(
        [
            *(sys.executable, "-m", "relay", "-c", os.devnull, "--mint=60"),
            *("--public-ip4-addr=127.0.0.1", f"--listen-port={relay.port}"),
            f"--auth-secret-file={secret}",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    ended = probe("--ice-servers=-", *QUICK, stdin=minted.stdout)
    assert ended.returncode == 0
    assert "all is well" in ended.stdout


def test_a_password_in_a_file(relay: RelayProcess, url: str, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{relay.password}\n")
    name = f"--username={relay.username}"
    assert probe(url, name, f"--credential-file={tmp_path / 'password'}", *QUICK).returncode == 0
    assert probe(url, name, "--credential-file=-", *QUICK, stdin=relay.password).returncode == 0


def test_a_secret_of_firezones_kind(tmp_path: Path) -> None:
    (tmp_path / "relay.secret").write_text(SECRET)
    given = f"--relay-secret-file={tmp_path / 'relay.secret'}"
    with RelayProcess(given, "--no-send-indications", *SAME_USER, port=free_port()) as relay:
        ended = probe(f"turn:127.0.0.1:{relay.port}", given, *QUICK)
    assert ended.returncode == 0
    assert "as by Firezone's relays" in ended.stdout


def test_strict(relay: RelayProcess, secret: Path) -> None:
    """A warning is a failure then, and so is a rule that is not kept."""
    given = (f"turn:127.0.0.1:{relay.port}", f"--auth-secret-file={secret}", *QUICK)
    assert probe(*given, "--strict").returncode == 0
    assert probe(*given, "--strict", "--conformance").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "which server?"),
        (("relay.test",), "'relay.test' is no URL"),
        (("turn:a", "--username=u"), "--credential is missing"),
        (("turn:a", "--credential=c"), "--username is missing"),
        (("turn:a", "--credential=c", "--auth-secret-file=f"), "one of them is enough"),
        (("turn:a", "--auth-secret-file=/none"), "/none: No such file"),
        (("turn:a", "--ca-file=/none"), "--ca-file /none: No such file"),
        (("--ice-servers=/none",), "/none: No such file"),
        (("turn:a", "--timeout=0"), "has to be more than 0"),
        (("turn:a", "--max-rate=-1"), "less than 0"),
        (("turn:a", "--seconds=long"), "no number"),
        (("turn:a", "--conform"), "unrecognized arguments"),
    ],
)
def test_a_command_line_that_is_wrong(arguments: tuple[str, ...], reason: str) -> None:
    ended = probe(*arguments)
    assert (ended.returncode, ended.stdout) == (64, "")
    assert reason in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_help_names_every_option() -> None:
    ended = probe("--help")
    assert ended.returncode == 0
    assert "--conformance" in ended.stdout


def test_a_url_keeps_its_form() -> None:
    assert str(parse_uri("turn:[2001:db8::1]")) == "turn:[2001:db8::1]:3478?transport=udp"
