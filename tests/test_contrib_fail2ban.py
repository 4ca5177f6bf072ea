"""The filter and the jail for fail2ban, held against what the relay logs."""

import configparser
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest

from relay.observe.logs import configure
from relay.stun.attributes import Attr
from relay.stun.const import Method
from relay.turn.users import mint
from tests.process import CHECKOUT
from tests.scenario import SECRET, UNIX_START, Scenario

CONTRIB: Final = CHECKOUT / "contrib" / "fail2ban"
FILTER: Final = CONTRIB / "filter.d" / "firezone-relay.conf"
JAIL: Final = CONTRIB / "jail.d" / "firezone-relay.conf"

IN_JOURNAL: Final = "vm firezone-relay[12]: "  # what fail2ban puts before the message

formats = pytest.mark.parametrize("log_format", ["human", "json"])
places = pytest.mark.parametrize("place", ["file", "journal"])


# --- What is found ---------------------------------------------------------------------------


CLIENTS: Final = {
    "203.0.113.9:5000": "203.0.113.9",
    "[2001:db8::9]:65535": "2001:db8::9",
    "[2001:db8:0:1:2:3:4:5]:1": "2001:db8:0:1:2:3:4:5",
}


@formats
@places
@pytest.mark.parametrize("expired", [False, True], ids=["wrong", "expired"])
def test_who_fails_is_found(log: "Log", log_format: str, place: str, expired: bool) -> None:
    with log.written(log_format, place):
        for client in CLIENTS:
            fails(client, expired=expired)

    assert hosts_found(log.lines) == list(CLIENTS.values())
    assert hosts_found_by_fail2ban(log) == list(CLIENTS.values())


@formats
@places
def test_what_was_held_back_does_not_hide_the_next(log: "Log", log_format: str, place: str) -> None:
    line = "authentication failed for %s: %s (%d more like this held back)"
    fields = {"client": "203.0.113.9", "reason": "credentials have expired"}
    with log.written(log_format, place):
        logging.getLogger("relay.turn").warning(
            line, "203.0.113.9:5000", fields["reason"], 123456, extra=fields
        )

    assert hosts_found(log.lines) == ["203.0.113.9"]
    assert hosts_found_by_fail2ban(log) == ["203.0.113.9"]


@formats
def test_the_time_in_a_file_is_found(log: "Log", log_format: str) -> None:
    """Otherwise fail2ban would take an old log, read at its start, for new."""
    with log.written(log_format, "file"):
        fails("203.0.113.9:5000")
    log.path.write_text(re.sub(r"\d{4}-", "2020-", log.path.read_text(), count=1))

    (time,) = fail2ban_regex(log, "<time>")
    assert datetime.fromtimestamp(float(time), UTC).year in {2019, 2020, 2021}  # in any zone


def test_the_filter_can_be_told_to_look_for_one_reason(log: "Log") -> None:
    with log.written("human", "file"):
        fails("203.0.113.1:5000", expired=True)
        fails("203.0.113.2:5000", expired=False)

    option = '[reason="unknown user or wrong password"]'
    assert fail2ban_regex(log, "<ip>", option) == ["203.0.113.2"]


# --- What is not -----------------------------------------------------------------------------


FAILURE: Final = "authentication failed for 203.0.113.66:5000: credentials have expired"
HUMAN: Final = f"2026-01-31 12:00:00,000 WARNING relay.turn: {FAILURE}"
JSON: Final = (
    '{"timestamp": "2026-01-31T11:00:00.000+00:00", "level": "WARNING", "logger": "relay.turn", '
    f'"message": "{FAILURE}", "client": "203.0.113.66", "reason": "credentials have expired"}}'
)
FORGERIES: Final = [
    FAILURE,
    *(
        f"{before}{line}"
        for line in [HUMAN, JSON, f"WARNING relay.turn: {FAILURE}"]
        for before in ["", "\n", "\r\n", "\u2028", "\x1b[2K\r", f'"\n{IN_JOURNAL}', IN_JOURNAL]
    ),
    f'"}}\n{JSON}',
    f'", "logger": "relay.turn", "message": "{FAILURE}", "client": "a", "reason": "b"}}',
]

INNOCENT: Final[list[Callable[[str], None]]] = [
    lambda text: logging.getLogger("relay.portal").warning("ignored from the portal: %s", text),
    lambda text: logging.getLogger("relay.portal").warning("%s", text, extra={"text": text}),
    lambda text: logging.getLogger("relay.turn").warning("peer refused: %s", text),
    lambda text: logging.getLogger("relay.turn").warning("%s and more", text),
    lambda text: logging.getLogger("relay.turn").info("%s", text),
    lambda text: logging.getLogger("relay").error("failed", exc_info=ValueError(text)),
    lambda text: logging.getLogger("relay.turn").warning(
        "authentication failed for %s: %s", "203.0.113.66:5000", text
    ),
    lambda text: logging.getLogger("relay.turn").warning(
        "authentication failed for %s: %s", text, "credentials have expired"
    ),
]


@formats
@places
def test_nothing_that_is_sent_gets_another_one_banned(
    log: "Log", log_format: str, place: str
) -> None:
    """Whatever text from outside another line contains."""
    with log.written(log_format, place, is_limited=False):
        for logs in INNOCENT:
            for text in FORGERIES:
                logs(text)

    assert len(log.lines) >= len(INNOCENT) * len(FORGERIES)
    spoken = [line for line in log.lines if FAILURE in line]
    assert spoken  # so there was something to mistake
    assert hosts_found(log.lines) == []
    assert hosts_found_by_fail2ban(log) == []


@formats
def test_names_are_not_looked_up(log: "Log", log_format: str) -> None:
    with log.written(log_format, "file"):
        logging.getLogger("relay.turn").warning(
            "authentication failed for %s: %s",
            "victim.example:5000",
            "credentials have expired",
            extra={"client": "victim.example", "reason": "credentials have expired"},
        )

    assert hosts_found(log.lines) == []
    assert hosts_found_by_fail2ban(log) == []


# --- The jail --------------------------------------------------------------------------------


def test_the_jail_bans_udp(tmp_path: Path) -> None:
    """What fail2ban would tell its server: read from its own configuration with ours in it."""
    jail = jail_of_fail2ban(tmp_path)

    assert "['add', 'firezone-relay', 'systemd']" in jail
    assert "'addjournalmatch', '_SYSTEMD_UNIT=firezone-relay.service'" in jail
    assert "['protocol', 'udp']" in jail
    assert "['port', '3478']" in jail
    assert "'tcp'" not in jail


def test_the_jail_knows_the_filter() -> None:
    jail = parsed(JAIL)["firezone-relay"]

    assert jail["filter"] == FILTER.stem
    assert (jail["protocol"], jail["port"]) == ("udp", "3478")


# --- Helpers ---------------------------------------------------------------------------------


class Log:
    """What the relay logs, in a file as fail2ban gets to see it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._monkeypatch = monkeypatch

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    @contextmanager
    def written(self, log_format: str, place: str, *, is_limited: bool = True) -> Iterator[None]:
        """Log to the file, or to the journal: then what reads it has taken the priority off."""
        handlers, level = logging.root.handlers[:], logging.root.level
        with self.path.open("w") as stream, self._monkeypatch.context() as patched:
            status = self.path.stat()
            patched.setattr(sys, "stderr", stream)
            patched.setenv(
                "JOURNAL_STREAM",
                f"{status.st_dev}:{status.st_ino}" if place == "journal" else "0:0",
            )
            configure(log_format, {"": logging.INFO})
            if not is_limited:
                logging.root.handlers[0].filters.clear()
            yield
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        if place == "journal":
            lines = [re.sub(r"^<[0-7]>", IN_JOURNAL, line) for line in self.lines]
            self.path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(tmp_path / "log", monkeypatch)


def fails(client: str, *, expired: bool = False) -> None:
    """Let a client of a real server fail to authenticate."""
    alice = Scenario().client(client)
    nonce = alice.nonce
    if expired:
        alice.username, alice.password = mint(int(UNIX_START) - 1, "alice", SECRET)
    else:
        alice.password = "wrong"
    answer = alice.asks(Method.ALLOCATE, (Attr.NONCE, nonce))
    assert answer.code == 401


def hosts_found(lines: list[str]) -> list[str]:
    """Return what the failregex finds, by Python's own means: so much is tested everywhere."""
    definition = parsed(FILTER)["Definition"]
    address = r"\[?(?P<host>\d+(?:\.\d+){3}|[\da-f:]+)\]?"  # as <ADDR>, in fail2ban's failregex.py
    found = []
    for line in lines:
        rest = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "", line)  # as fail2ban does
        for regex in definition["failregex"].splitlines():
            match = re.search(filled_in(regex, definition).replace("<ADDR>", address), rest)
            if match:
                found.append(match["host"])
    return found


def filled_in(regex: str, definition: configparser.SectionProxy) -> str:
    """Put the filter's own options in the place of their tags."""
    tag = re.compile("<([_a-z]+)>")
    while tag.search(regex):
        regex = tag.sub(lambda match: definition[match[1]], regex)
    return regex


def parsed(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read_string(path.read_text())
    return parser


def hosts_found_by_fail2ban(log: Log) -> list[str]:
    """Return what fail2ban finds itself; where it is not installed, skip what is left."""
    return fail2ban_regex(log, "<ip>")


def fail2ban_regex(log: Log, output: str, option: str = "") -> list[str]:
    command = [program("fail2ban-regex"), "--out", output, str(log.path), f"{FILTER}{option}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def jail_of_fail2ban(tmp_path: Path) -> str:
    client = program("fail2ban-client")
    configuration = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", configuration)
    shutil.copytree(CONTRIB, configuration, dirs_exist_ok=True)
    command = [client, "-c", str(configuration), "-d"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    lines = done.stdout.splitlines()
    return "\n".join(line for line in lines if "'firezone-relay'" in line)


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip("fail2ban is not installed; Python's re has found what it should")
    return path
