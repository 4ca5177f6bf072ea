"""What ``--check-config`` says of a configuration that is good, and risky on this machine."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relay.config.model import Config
from relay.config.reading import read
from relay.config.risks import FileFacts, System, look, risks
from relay.net.listening import LISTEN_BUFFER
from tests.certificates import Authority
from tests.process import run

NOW = 1_800_000_000.0
PORT_RANGE, RESERVED = "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports"
SAFE = {
    PORT_RANGE: "32768\t60999\n",
    RESERVED: "49152-65535\n",
    "net.core.rmem_max": f"{LISTEN_BUFFER}\n",
    "net.core.wmem_max": f"{LISTEN_BUFFER}\n",
}
SYSTEM = System(NOW, 524288, SAFE)
PUBLIC = ("--public-ip4-addr=1.1.1.1",)  # one that the internet knows: there is no other kind


def found(*arguments: str, system: System = SYSTEM, **changes: Any) -> dict[str, str]:
    """Return the risks of a configuration by what they are about."""
    command = read(["-c", os.devnull, *PUBLIC, *arguments], {})
    config: Config = replace(command.config, **changes)
    listed = risks(config, command.secret_files, system)
    assert len({risk.what for risk in listed}) == len(listed)
    return {risk.what: risk.text for risk in listed}


def on(**settings: str) -> System:
    return replace(
        SYSTEM, settings={**SAFE, **{k.replace("__", "."): v for k, v in settings.items()}}
    )


def test_nothing_is_risky_by_default() -> None:
    assert found() == {}


@pytest.mark.parametrize(
    ("argument", "what", "text"),
    [
        ("--public-ip4-addr=10.0.0.7", "public-ip4-addr", "10.0.0.7 is not public"),
        ("--public-ip4-addr=127.0.0.1", "public-ip4-addr", "only this machine"),
        ("--public-ip6-addr=fd00::1", "public-ip6-addr", "fd00::1 is not public"),
        ("--max-allocations-per-username=0", "max-allocations-per-username", "one user"),
        ("--max-allocations-per-ip=0", "max-allocations-per-ip", "one address"),
        ("--max-channels-per-allocation=0", "max-channels-per-allocation", "one allocation"),
        ("--unauthenticated-rate=0", "unauthenticated-rate", "a flood"),
        ("--allow-peer=10.0.0.0/8", "allow-peer 10.0.0.0/8", "a private network"),
        ("--allow-peer=127.0.0.1/32", "allow-peer 127.0.0.1/32", "services on this host"),
        ("--allow-peer=169.254.0.0/16", "allow-peer 169.254.0.0/16", "metadata"),
        ("--allow-peer=0.0.0.0/0", "allow-peer 0.0.0.0/0", "opens everything"),
        ("--http-addr=0.0.0.0:8080", "http-addr", "0.0.0.0 shows"),
        ("--harden=off", "harden", "privileges"),
        ("--user=root", "user", "root's files"),
        ("--rng-seed=1", "rng-seed", "predictable"),
        ("--log-level=info,relay.turn=debug", "log-level", "info,relay.turn=debug"),
        ("--proxy-protocol-from=0.0.0.0/0", "proxy-protocol-from", "any address"),
    ],
)
def test_an_option_that_is_risky(argument: str, what: str, text: str) -> None:
    listed = found(argument)
    assert list(listed) == [what]
    assert text in listed[what]


@pytest.mark.parametrize(
    "argument",
    ["--allow-peer=1.1.1.0/24", "--http-addr=[::1]:8080", "--http-addr=off", "--log-level=info"],
)
def test_an_option_that_is_not(argument: str) -> None:
    assert found(argument) == {}


def test_with_a_portal_no_quota_is_meant(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token")
    assert found(f"--token-file={tmp_path / 'token'}") == {}


@pytest.mark.parametrize(
    ("reserved", "is_risky"),
    [
        ("", True),
        ("8080,49152-65535", False),
        ("49152-60999", False),
        ("49153-65535", True),
        ("49152-50000,50001-61000", False),
    ],
)
def test_ports_that_other_programs_are_given(reserved: str, is_risky: bool) -> None:
    listed = found(system=on(net__ipv4__ip_local_reserved_ports=reserved))
    assert bool(listed) == is_risky
    for text in listed.values():
        assert "sysctl -w net.ipv4.ip_local_reserved_ports=49152-65535" in text


def test_ports_that_nobody_else_is_given() -> None:
    settings = {PORT_RANGE: "32768 49151", RESERVED: ""}
    assert found(system=replace(SYSTEM, settings={**SAFE, **settings})) == {}


def test_few_ports() -> None:
    listed = found("--lowest-port=60000", "--highest-port=60009")
    assert "10 ports" in listed["lowest-port 60000, highest-port 60009"]


def test_short_queues() -> None:
    listed = found(system=on(net__core__rmem_max="212992", net__core__wmem_max="212992"))
    assert list(listed) == ["buffers"]
    assert f"sysctl -w net.core.rmem_max={LISTEN_BUFFER}" in listed["buffers"]
    listed = found(system=on(net__core__wmem_max="212992"))
    assert "rmem_max" not in listed["buffers"]


def test_few_descriptors() -> None:
    listed = found(system=replace(SYSTEM, descriptors=1024))
    assert "about 924 allocations, not for 16384" in listed["descriptors"]
    assert found("--max-allocations=500", system=replace(SYSTEM, descriptors=1024)) == {}


def test_settings_that_cannot_be_read_are_no_risks() -> None:
    assert found(system=System(NOW, 524288, {})) == {}


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (FileFacts(0o644, False), "can read the secret"),
        (FileFacts(0o602, False), "can exchange it: chmod"),
        (FileFacts(0o600, True), "its folder is open"),
        (FileFacts(0o640, False), None),
        (None, None),
    ],
)
def test_a_file_of_secrets(tmp_path: Path, facts: FileFacts | None, text: str | None) -> None:
    file = tmp_path / "auth.secret"
    file.write_text("0123456789abcdef")
    files = {} if facts is None else {str(file): facts}
    listed = found(f"--auth-secret-file={file}", system=replace(SYSTEM, files=files))
    assert list(listed) == ([str(file)] if text else [])
    assert text is None or text in listed[str(file)]


@pytest.mark.parametrize(
    ("option", "content", "text"),
    [
        ("auth-secret-file", "0123456789abcdef\nshort\n", "fewer than 16"),
        ("relay-secret-file", "short", "fewer than 16"),
        ("users-file", "alice:word\nbob:a long password\n", "1 passwords have fewer than 8"),
    ],
)
def test_secrets_that_can_be_guessed(tmp_path: Path, option: str, content: str, text: str) -> None:
    (tmp_path / "file").write_text(content)
    listed = found(f"--{option}={tmp_path / 'file'}")
    assert text in listed[option]
    assert not any(word in str(listed) for word in ("short", "word:", "alice"))


@pytest.mark.parametrize(
    ("days", "text"), [(60, None), (20, "ends in 20 days"), (-3, "has ended 3 days ago")]
)
def test_a_certificate_near_its_end(tmp_path: Path, days: int, text: str | None) -> None:
    certificate = Authority().issue("turn.example.org")
    (tmp_path / "cert").write_text(certificate.pem)
    (tmp_path / "key").write_text(certificate.key)
    arguments = (
        "--tls-port=5349",
        f"--tls-cert={tmp_path / 'cert'}",
        f"--tls-key={tmp_path / 'key'}",
    )
    at = certificate.expires - days * 86400
    listed = found(*arguments, system=replace(SYSTEM, now=at))
    assert listed.get("tls-cert") == (None if text is None else f"the certificate {text}: renew it")


# --- On this machine ------------------------------------------------------------------------


def test_what_is_asked_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("secret")
    file.chmod(0o644)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    system = look([str(file), str(pipe), str(tmp_path / "none")])
    assert system.files == {str(file): FileFacts(0o644, False)}
    assert set(system.settings) <= set(SAFE)
    assert PORT_RANGE in system.settings
    assert abs(system.now - time.time()) < 60
    tmp_path.chmod(0o777)
    assert look([str(file)]).files[str(file)].is_in_open_folder


def test_check_config_names_risks_and_ends_well(tmp_path: Path) -> None:
    file = tmp_path / "auth.secret"
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    ended = run("--check-config", "--public-ip4-addr=10.0.0.7", f"--auth-secret-file={file}")
    assert (ended.returncode, ended.stderr) == (0, "")
    *listed, last = ended.stdout.splitlines()
    assert all(line.startswith("risk: ") for line in listed)
    assert (
        f"risk: {file}: every user of this machine can read the secret: chmod o= {file}" in listed
    )
    assert last == f"the configuration is good, with {len(listed)} risks"


def test_check_config_of_what_is_wrong_names_no_risks() -> None:
    ended = run("--check-config", "--public-ip4-addr=10.0.0.7", "--listen-port=0")
    assert ended.returncode == 78
    assert "risk" not in ended.stdout
