"""Secrets and users of a running relay, and what a reload makes of them."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.stun.integrity import long_term_key
from relay.turn.users import mint_rest
from tests.process import RelayProcess, free_port
from tests.turnclient import TurnClient, TurnError

NEVER = 2**40
# Nobody else may read what a test has written.
SAME_USER = ("--user=root",) if os.geteuid() == 0 else ()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "auth.secret": "old\n",
        "relay.conf": "",  # which can be read again
        "users": f"alice:word\nbob:0x{long_term_key('bob', 'firezone', 'word').hex()}\n",
    }.items():
        file = tmp_path / name
        file.write_text(content)
        file.chmod(0o600)
    return tmp_path


@pytest.fixture
def relay(folder: Path) -> Iterator[RelayProcess]:
    arguments = [f"--auth-secret-file={folder / 'auth.secret'}", f"--users-file={folder / 'users'}"]
    arguments += [f"--config={folder / 'relay.conf'}", *SAME_USER]
    with RelayProcess(*arguments, port=free_port()) as relay:
        yield relay


def allocates(relay: RelayProcess, username: str, password: str) -> TurnClient:
    """Return a client that has an allocation. Raises TurnError."""
    client = TurnClient(("127.0.0.1", relay.port), username, password)
    try:
        client.allocates()
    except BaseException:
        client.socket.close()
        raise
    return client


def test_every_kind_of_user_allocates(relay: RelayProcess) -> None:
    """The credential that it printed is of the REST convention: there are none of Firezone's."""
    for username, password in (
        ("alice", "word"),
        ("bob", "word"),
        mint_rest(NEVER, "carol", "old"),
        (relay.username, relay.password),
    ):
        allocates(relay, username, password).socket.close()


def test_secrets_are_replaced_by_a_reload(relay: RelayProcess, folder: Path) -> None:
    old, new = mint_rest(NEVER, "carol", "old"), mint_rest(NEVER, "dave", "new")
    with allocates(relay, *old) as carol:
        (folder / "auth.secret").write_text("new\nold\n")
        reload(relay, "reloaded; changed: auth-secret-file")
        allocates(relay, *new).socket.close()
        carol.refreshes(600)
        (folder / "auth.secret").write_text("new\n")
        reload(relay, "reloaded; changed: auth-secret-file")
        with pytest.raises(TurnError, match="401"):
            carol.refreshes(600)
        allocates(relay, *new).socket.close()


def test_users_come_and_go_by_a_reload(relay: RelayProcess, folder: Path) -> None:
    with allocates(relay, "alice", "word") as alice:
        alice.refreshes(600)
        (folder / "users").write_text("erin:word\n")
        reload(relay, "reloaded; changed: users-file")
        with pytest.raises(TurnError, match="401"):
            alice.refreshes(600)
        allocates(relay, "erin", "word").socket.close()


def test_a_file_that_is_wrong_changes_nothing(relay: RelayProcess, folder: Path) -> None:
    (folder / "auth.secret").write_text("new\n")
    (folder / "users").write_text("erin:word\nalice\n")
    reload(relay, "not reloaded")

    line = relay.logs("not reloaded")
    assert "line 2 is not name:password" in line
    assert str(folder / "users") in line
    allocates(relay, "alice", "word").socket.close()
    allocates(relay, *mint_rest(NEVER, "carol", "old")).socket.close()


def test_a_relay_with_static_users_alone_prints_no_credential(folder: Path) -> None:
    arguments = [f"--users-file={folder / 'users'}", "--realm=example.org"]
    (folder / "users").write_text("alice:word\n")
    with RelayProcess(*arguments, port=free_port(), portal=True) as relay:
        assert "users: those of --users-file" in relay.logs("TURN URL")
        relay.logs("relaying")
        with TurnClient(("127.0.0.1", relay.port), "alice", "word", realm="example.org") as alice:
            alice.allocates()


def test_json_goes_into_an_array_of_ice_servers(folder: Path) -> None:
    arguments = [f"--auth-secret-file={folder / 'auth.secret'}", "--log-format=json"]
    with RelayProcess(*arguments, port=free_port(), portal=True) as relay:
        assert relay.process.stdout is not None
        printed = json.loads(relay.process.stdout.readline())
        relay.logs("relaying")
        assert {"urls", "username", "credential"} <= set(printed)
        allocates(relay, printed["username"], printed["credential"]).socket.close()


def reload(relay: RelayProcess, outcome: str) -> None:
    """Reload, and wait for what comes of it."""
    before = relay.lines
    relay.process.send_signal(signal.SIGHUP)
    relay.logs(outcome, after=before)
