"""How this relay and Debian's coturn keep the rules of the RFCs: as docs/conformance.md says.

What it says of coturn shows at the same time that a rule which this relay keeps can be broken.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contrib.conformance import NOT_TRIED, PAGE, columns, read
from relay.probe.rules import RULES
from tests.certificates import Authority
from tests.interop.needs import needs_programs
from tests.otherserver import running, until_answered
from tests.process import RelayProcess, free_port, free_tcp_port
from tests.test_probe_command import probe

SECRET = "0123456789abcdef"
COTURN = "4.6.1"  # that of the table
DEPARTURES = {  # of this relay, which docs/protocol.md explains
    "framing.unknown_method",
    "authentication.without_nonce",
    "allocation.shortest_lifetime",
}
SAME_USER = ("--user=root",) if os.geteuid() == 0 else ()

pytestmark = [pytest.mark.interop, pytest.mark.slow]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "auth.secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    return file


def test_this_relay_over_udp(secret: Path) -> None:
    with RelayProcess(f"--auth-secret-file={secret}", *SAME_USER, port=free_port()) as relay:
        found = rules_of(f"turn:127.0.0.1:{relay.port}", secret)
    expected = columns(PAGE.read_text())["this relay"]
    assert {name: cell for name, cell in found.items() if name in expected} == expected
    assert {name for name, cell in found.items() if cell not in {"kept", NOT_TRIED}} == DEPARTURES


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_this_relay_over_a_stream(secret: Path, tmp_path: Path, transport: str) -> None:
    port, authority = free_tcp_port(), Authority()
    certificate = authority.issue("relay.test")
    for name, text in (("cert", certificate.pem), ("key", certificate.key), ("ca", authority.pem)):
        (tmp_path / name).write_text(text)
    arguments = [f"--auth-secret-file={secret}", f"--{transport}-port={port}", *SAME_USER]
    if transport == "tls":
        arguments += [f"--tls-cert={tmp_path / 'cert'}", f"--tls-key={tmp_path / 'key'}"]
    scheme = "turns" if transport == "tls" else "turn"
    with RelayProcess(*arguments, port=free_port()):
        found = rules_of(
            *(f"{scheme}:relay.test:{port}?transport=tcp", secret),
            *("--address=127.0.0.1", f"--ca-file={tmp_path / 'ca'}"),
        )
    assert {name for name, cell in found.items() if cell not in {"kept", NOT_TRIED}} == DEPARTURES
    tried = {name for name, cell in found.items() if cell != NOT_TRIED}
    assert {rule.name for rule in RULES if rule.only == "stream"} <= tried


def test_hidden_names(tmp_path: Path) -> None:
    """Which are offered where all users are static ones."""
    users = tmp_path / "users"
    users.write_text("alice:correct horse battery\n")
    users.chmod(0o600)
    arguments = (f"--users-file={users}", *SAME_USER)
    with RelayProcess(*arguments, port=free_port(), portal=True) as relay:  # it prints nothing
        until_answered(relay.port)
        credential = ("--username=alice", "--credential=correct horse battery")
        found = rules_of(f"turn:127.0.0.1:{relay.port}", None, *credential)
    assert found["authentication.hidden_name"] == "kept"


def test_coturn(secret: Path, tmp_path: Path) -> None:
    needs_programs("turnserver")
    version = subprocess.check_output(["turnserver", "--version"], text=True, timeout=30).strip()
    if version != COTURN:
        pytest.skip(f"this is coturn {version}, not {COTURN}")
    with coturn(tmp_path) as port:
        found = rules_of(f"turn:127.0.0.1:{port}", secret)
    expected = columns(PAGE.read_text())[f"coturn {COTURN}"]
    assert {name: cell for name, cell in found.items() if name in expected} == expected


def test_the_table_has_every_rule_for_every_server() -> None:
    for_udp = {rule.name for rule in RULES if rule.only != "stream"}
    servers = columns(PAGE.read_text())
    assert len(servers) == 4
    for cells in servers.values():
        assert set(cells) == for_udp
        assert all(cells.values())


def test_rules_have_names_and_sections_of_their_own() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert len({(rule.section, rule.text, rule.name.partition(".")[0]) for rule in RULES}) == len(
        RULES
    )
    for rule in RULES:
        assert re.fullmatch(r"RFC (8489|8656) §\d+(\.\d+)*", rule.section)
        assert rule.level in {"MUST", "SHOULD"}


def rules_of(url: str, secret: Path | None, *arguments: str) -> dict[str, str]:
    """Return the cell of each rule for a server."""
    credential = () if secret is None else (f"--auth-secret-file={secret}",)
    ended = probe(url, *credential, *arguments, "--conformance", "--json")
    assert ended.stderr == ""
    return read(ended.stdout)


@contextmanager
def coturn(folder: Path) -> Iterator[int]:
    """Run coturn as Debian has it, for peers on this machine."""
    port = free_port()
    addresses = [f"-{option}{host}" for option in "LE" for host in ("127.0.0.1", "::1")]
    command = [
        *("turnserver", "-n", "--no-tls", "--no-dtls", "--no-cli", "--allow-loopback-peers"),
        *("--use-auth-secret", f"--static-auth-secret={SECRET}", "-r", "firezone", *addresses),
        *(f"-p{port}", "--no-rfc5780", "--log-file=stdout", f"--pidfile={folder / 'pid'}"),
        f"--userdb={folder / 'turndb'}",
    ]
    with running(command, folder / "coturn.log"):
        until_answered(port)
        yield port
