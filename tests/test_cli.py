"""From flags, environment and file to a configuration; from how it ends to an exit code."""

import hashlib
import hmac
import json
import logging
import os
import signal
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import pytest

from relay.cli import main
from relay.config.files import LONGEST_FILE
from relay.config.model import ConfigError, Quotas
from relay.config.options import OPTIONS, Option
from relay.config.reading import Command, read, reread
from relay.net.tls import read_chain
from relay.turn.channeldata import RFC5766_NUMBERS, RFC8656_NUMBERS
from relay.version import __version__
from tests.certificates import Authority
from tests.process import RelayProcess, free_port, run
from tests.turnclient import TurnClient, TurnError

SECRET: Final = "4c98bf59c99b3e467ecd7cf9d6b3e5279645fca59be67bc5bb4af3cf653761ab"
NOBODY: Final = 65534
OTHER_SECRET: Final = "1cab293a-4032-46f4-862a-40e5d174b0d2"

ECDSA: Final = Authority().issue("relay.test")
RSA: Final = Authority().issue("relay.test", "192.0.2.1", kind="rsa-2048")

# For each option two texts that are not its default, and what they mean. The files are
# those of the fixture ``directory``.
SAMPLES: Final[dict[str, tuple[tuple[str, object], tuple[str, object]]]] = {
    "public-ip4-addr": (("192.0.2.1", "192.0.2.1"), ("127.0.0.1", "127.0.0.1")),
    "public-ip6-addr": (("2001:DB8:0::1", "2001:db8::1"), ("::1", "::1")),
    "bind-ip4-addr": (("192.0.2.1", "192.0.2.1"), ("127.0.0.1", "127.0.0.1")),
    "bind-ip6-addr": (("2001:db8::1", "2001:db8::1"), ("::1", "::1")),
    "listen-port": (("1", 1), ("65535", 65535)),
    "tcp-port": (("1", 1), ("443", 443)),
    "tls-port": (("1", 1), ("443", 443)),
    "tls-cert": (("ecdsa.crt", read_chain(ECDSA.pem)), ("rsa.crt", read_chain(RSA.pem))),
    "tls-key": (("ecdsa.key", ECDSA.key), ("rsa.key", RSA.key)),
    "proxy-protocol-from": (
        ("10.0.0.0/8", ("10.0.0.0/8",)),
        ("192.0.2.7, 2001:db8::/32", ("192.0.2.7/32", "2001:db8::/32")),
    ),
    "lowest-port": (("50000", 50000), ("65535", 65535)),
    "highest-port": (("49152", 49152), ("60000", 60000)),
    "token-file": (("secret", SECRET), ("other-secret", OTHER_SECRET)),
    "api-url": (("ws://[::1]:8080/a", "ws://[::1]:8080/a"), ("wss://x.test", "wss://x.test")),
    "name": (("relay-1", "relay-1"), ("Zürich (West)", "Zürich (West)")),
    "relay-secret-file": (("secret", SECRET), ("other-secret", OTHER_SECRET)),
    "auth-secret-file": (("rest", ("one", "two")), ("secret", (SECRET,))),
    "users-file": (
        ("users", {"alice": "word", "bob": bytes(16), "carol": bytes(32)}),
        ("other-users", {"d\u00f6rte": "w\u00f6rd:with colon # and hash"}),
    ),
    "realm": (("example.org", "example.org"), ("\u00fc" * 16, "\u00fc" * 16)),
    "allow-peer": (
        ("10.0.0.0/8", ("10.0.0.0/8",)),
        ("192.0.2.7,2001:db8::/32", ("192.0.2.7/32", "2001:db8::/32")),
    ),
    "deny-peer": (
        ("198.51.100.0/24", ("198.51.100.0/24",)),
        ("192.0.2.7, 2001:db8::/32", ("192.0.2.7/32", "2001:db8::/32")),
    ),
    "print-credential": (("true", True), ("false", False)),
    "one-allocation-per-username": (("true", True), ("false", False)),
    "send-indications": (("true", True), ("false", False)),
    "max-allocations": (("1", 1), ("100000", 100000)),
    "refused-peers": (("error", False), ("ignore", True)),
    "max-allocations-per-username": (("1", 1), ("3", 3)),
    "max-allocations-per-ip": (("0", 0), ("1000", 1000)),
    "max-channels-per-allocation": (("0", 0), ("1000", 1000)),
    "max-connections": (("1", 1), ("100000", 100000)),
    "max-connections-per-ip": (("0", 0), ("10", 10)),
    "unauthenticated-rate": (("0", 0), ("5000", 5000)),
    "unauthenticated-rate-per-prefix": (("0", 0), ("50", 50)),
    "channel-range": (("rfc5766", RFC5766_NUMBERS), ("rfc8656", RFC8656_NUMBERS)),
    "offload": (("off", False), ("auto", True)),
    "copy-tos": (("off", "off"), ("on", "on")),
    "xdp": (("auto", "auto"), ("off", None)),
    "xdp-device": (("eth0", ("eth0",)), ("ens5,wan.7", ("ens5", "wan.7"))),
    "log-format": (("json", "json"), ("human", "human")),
    "log-level": (
        ("debug", {"": 10}),
        ("error,relay.turn=debug", {"": 40, "relay.turn": 10}),
    ),
    "http-addr": (("[::1]:9090", ("::1", 9090)), ("off", None)),
    "harden": (("require", "require"), ("off", "off")),
    "user": (("root", "root"), ("65534", "65534")),
    "drain-timeout": (("0", 0), ("86400", 86400)),
    "software": (("relay", "relay"), ("Größe: 1/2", "Größe: 1/2")),
    "rng-seed": (("0", 0), ("7", 7)),
}

FILES: Final = {
    "secret": SECRET,
    "other-secret": OTHER_SECRET,
    "rest": "# of the web service\none\n\n  two\none\n",
    "users": f"# three\nalice:word\n\nbob:0x{'00' * 16}\r\ncarol:0x{'00' * 32}\n",
    "ecdsa.crt": ECDSA.pem,
    "ecdsa.key": ECDSA.key,
    "rsa.crt": RSA.pem,
    "rsa.key": RSA.key,
    "other-users": "\ufeffd\u00f6rte:w\u00f6rd:with colon # and hash",
}

# For each option a text that means nothing.
BAD: Final = {
    "public-ip4-addr": "0.0.0.0",
    "public-ip6-addr": "ff02::1",
    "bind-ip4-addr": "localhost",
    "bind-ip6-addr": "fe80::1%eth0",
    "listen-port": "0",
    "tcp-port": "none",
    "tls-port": "65536",
    "tls-cert": "secret",
    "tls-key": "missing",
    "proxy-protocol-from": "proxy",
    "lowest-port": "65536",
    "highest-port": "-1",
    "token-file": "missing",
    "api-url": "ftp://x.test",
    "name": "a\x07b",
    "relay-secret-file": "missing",
    "auth-secret-file": "missing",
    "users-file": "missing",
    "realm": 'a "realm"',
    "allow-peer": "10.0.0.1/8",
    "deny-peer": "example.com",
    "refused-peers": "maybe",
    "print-credential": "maybe",
    "one-allocation-per-username": "maybe",
    "send-indications": "maybe",
    "max-allocations": "0",
    "max-allocations-per-username": "none",
    "max-allocations-per-ip": "-1",
    "max-channels-per-allocation": "many",
    "max-connections": "0",
    "max-connections-per-ip": "few",
    "unauthenticated-rate": "-1",
    "unauthenticated-rate-per-prefix": "1.5",
    "channel-range": "rfc3489",
    "offload": "always",
    "copy-tos": "0x28",
    "xdp": "native",
    "xdp-device": "a/b",
    "log-format": "xml",
    "log-level": "loud",
    "http-addr": "::1:8080",
    "harden": "maybe",
    "user": "no-such-user",
    "drain-timeout": "1.5",
    "software": "a\x07b",
    "rng-seed": "dice",
}

CERTIFICATE: Final = {"TLS_CERT": "ecdsa.crt", "TLS_KEY": "ecdsa.key"}

BY_NAME: Final = {option.name: option for option in OPTIONS}
SOURCES: Final = ("flag", "variable", "file")
every_option = pytest.mark.parametrize("option", OPTIONS, ids=[option.name for option in OPTIONS])


# --- Three sources ---------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("source", SOURCES)
def test_every_option_can_come_from_every_source(option: Option, source: str) -> None:
    for text, value in SAMPLES[option.name]:
        assert stored(given(option, {source: text}), option) == value


@every_option
@pytest.mark.parametrize(
    ("winner", "loser"),
    [
        pytest.param("flag", "variable", id="flag beats variable"),
        pytest.param("flag", "file", id="flag beats file"),
        pytest.param("variable", "file", id="variable beats file"),
    ],
)
def test_a_flag_beats_a_variable_beats_the_file(option: Option, winner: str, loser: str) -> None:
    """A list is replaced by the winner's, not joined with it."""
    for (text, value), (other, _) in permutations(SAMPLES[option.name]):
        assert stored(given(option, {winner: text, loser: other}), option) == value


@every_option
def test_an_empty_variable_counts_as_unset(option: Option) -> None:
    text, value = SAMPLES[option.name][0]
    assert stored(given(option, {"variable": "", "file": text}), option) == value


def test_what_is_not_given_has_its_default() -> None:
    command = reads()

    config = command.config
    assert (config.public_ip4, config.public_ip6) == ("192.0.2.1", None)  # given by reads()
    assert (config.bind_ip4, config.bind_ip6) == ("0.0.0.0", "::")
    assert (config.listen_port, config.lowest_port, config.highest_port) == (3478, 49152, 65535)
    assert config.relay_secret is None
    assert (config.allow_peers, config.deny_peers) == ((), ())
    assert config.allows_takeover is False
    assert config.max_allocations is None
    assert config.quotas == Quotas(256, 1024, 256)
    assert config.ignores_refused_peers is False
    assert config.serves_send_indications is True
    assert (config.unauthenticated_rate, config.unauthenticated_rate_per_prefix) == (15000, 2000)
    assert (config.http_addr, config.http_addr_given) == (("127.0.0.1", 8080), False)
    assert config.harden == "auto"
    assert config.channel_numbers == range(0x4000, 0x5000)
    assert config.offload is True
    assert config.copy_tos == "auto"
    assert config.drain_timeout == 30
    assert config.software is None
    assert config.rng_seed is None
    assert (config.log_format, config.log_levels) == ("human", {"": 20})
    assert (command.check_config, command.print_config, command.mint) == (False, False, None)


def test_the_value_of_a_flag_may_be_the_next_argument() -> None:
    assert reads("--listen-port", "5").config.listen_port == 5


def test_other_variables_are_left_alone() -> None:
    assert reads(PORT="5", CONFIG="missing", MINT="5", LISTEN="5").config == reads().config


LISTS = [
    pytest.param(["--allow-peer=10.0.0.0/8", "--allow-peer=::/0"], "", {}, id="flag twice"),
    pytest.param(["--allow-peer=10.0.0.0/8,::/0"], "", {}, id="flag, comma"),
    pytest.param(["--allow-peer=10.0.0.0/8, ::/0"], "", {}, id="flag, comma and space"),
    pytest.param([], "", {"ALLOW_PEER": "10.0.0.0/8,::/0"}, id="variable, comma"),
    pytest.param([], "", {"ALLOW_PEER": "10.0.0.0/8 ::/0,"}, id="variable, space, comma at end"),
    pytest.param([], "allow-peer = 10.0.0.0/8\nallow-peer = ::/0\n", {}, id="line twice"),
    pytest.param([], "allow-peer = 10.0.0.0/8, ::/0\n", {}, id="line, comma"),
]


@pytest.mark.parametrize(("flags", "file", "variables"), LISTS)
def test_lists_can_be_written_in_several_ways(
    flags: list[str], file: str, variables: dict[str, str]
) -> None:
    config = reads(*flags, file=file, **variables).config

    assert config.allow_peers == ("10.0.0.0/8", "::/0")


SWITCHES = [
    pytest.param(["--one-allocation-per-username"], "", {}, True, id="flag"),
    pytest.param(["--no-one-allocation-per-username"], "", {}, False, id="--no- flag"),
    pytest.param(
        ["--no-one-allocation-per-username"],
        "one-allocation-per-username = yes\n",
        {"ONE_ALLOCATION_PER_USERNAME": "yes"},
        False,
        id="--no- flag against both",
    ),
    pytest.param(
        [],
        "one-allocation-per-username = yes\n",
        {"ONE_ALLOCATION_PER_USERNAME": "no"},
        False,
        id="variable against file",
    ),
    *(
        pytest.param([], "", {"ONE_ALLOCATION_PER_USERNAME": word}, True, id=f"variable {word}")
        for word in ("true", "Yes", "ON", "1")
    ),
    *(
        pytest.param([], f"one-allocation-per-username = {word}\n", {}, False, id=f"line {word}")
        for word in ("false", "No", "OFF", "0")
    ),
]


@pytest.mark.parametrize(("flags", "file", "variables", "expected"), SWITCHES)
def test_a_switch_can_be_thrown_both_ways(
    flags: list[str], file: str, variables: dict[str, str], *, expected: bool
) -> None:
    assert reads(*flags, file=file, **variables).config.one_allocation_per_username is expected


# --- The file --------------------------------------------------------------------------------


def test_comments_and_empty_lines_are_passed_over() -> None:
    file = "# listen-port = 1\n\n   ; listen-port = 2\n  listen-port=3  \n\t\n#"

    assert reads(file=file).config.listen_port == 3


def test_a_line_without_a_value_counts_as_unset() -> None:
    assert reads(file="listen-port =\n").config.listen_port == 3478


def test_the_default_file_is_read_if_there_is_one(
    default_file: Path, machine: Callable[..., None]
) -> None:
    machine(local={"127.0.0.1"})
    assert read([], {}).config.listen_port == 3478

    default_file.write_text("listen-port = 5\n")
    assert read([], {}).config.listen_port == 5


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["-c", "relay.conf"], id="-c FILE"),
        pytest.param(["-crelay.conf"], id="-cFILE"),
        pytest.param(["--config", "relay.conf"], id="--config FILE"),
        pytest.param(["--config=relay.conf"], id="--config=FILE"),
        pytest.param(["--lowest-port=50000", "-c", "relay.conf"], id="after other flags"),
    ],
)
def test_a_named_file_replaces_the_default_file(argv: list[str], default_file: Path) -> None:
    """Not even its mistakes are seen."""
    default_file.write_text("listen-port = 5\nnonsense\n")
    Path("relay.conf").write_text("public-ip4-addr = 192.0.2.9\n")

    config = read(argv, {}).config

    assert config.listen_port == 3478
    assert config.public_ip4 == "192.0.2.9"


def test_an_unreadable_default_file_is_an_error(cli: "Cli", default_file: Path) -> None:
    default_file.mkdir()

    assert str(default_file) in cli.refuses(78)


def test_a_default_file_in_a_closed_directory_is_not_absent(
    cli: "Cli", monkeypatch: pytest.MonkeyPatch, closed: Path
) -> None:
    """Otherwise its rules would go unnoticed."""
    monkeypatch.setattr("relay.config.reading.DEFAULT_FILE", str(closed / "relay.conf"))

    with unprivileged():
        complaint = cli.refuses(78, PUBLIC_IP4_ADDR="192.0.2.1")

    assert f"{closed}/relay.conf: cannot be read: Permission denied" in complaint


def test_a_default_file_that_points_nowhere_is_not_absent(cli: "Cli", default_file: Path) -> None:
    default_file.symlink_to("missing")

    assert f"{default_file}: cannot be read" in cli.refuses(78, PUBLIC_IP4_ADDR="192.0.2.1")


WRONG_FILES = [
    pytest.param(b"liste-port = 5\n", ["'liste-port'", "line 1"], id="unknown key"),
    pytest.param(b"listen_port = 5\n", ["no such option", "line 1"], id="underscore"),
    pytest.param(b"Listen-Port = 5\n", ["no such option", "line 1"], id="key in capitals"),
    pytest.param(b"listen-po = 5\n", ["'listen-po'", "line 1"], id="key abbreviated"),
    pytest.param(b"config = relay.conf\n", ["'config'", "line 1"], id="a file names a file"),
    pytest.param(b"mint = 5\n", ["'mint'", "line 1"], id="no option, but a flag"),
    pytest.param(
        b"no-one-allocation-per-username = 1\n",
        ["'no-one-allocation-per-username'", "line 1"],
        id="--no- form",
    ),
    pytest.param(b"this is prose\n", ["key = value", "line 1"], id="prose"),
    pytest.param(b"\n# comment\n = 5\n", ["key = value", "line 3"], id="no key"),
    pytest.param(b"# one\r# two\rprose\r", ["key = value", "line 3"], id="carriage returns"),
    pytest.param(
        b"listen-port = 5\nlowest-port = 50000\nlisten-port = 6\n",
        ["'listen-port'", "twice", "line 3"],
        id="key twice",
    ),
    pytest.param(
        b"listen-port = 5\nlisten-port = 5\n", ["'listen-port'", "twice", "line 2"], id="line twice"
    ),
    pytest.param(b"software = caf\xe9\n", ["cannot be read"], id="Latin-1"),
    pytest.param(bytes(range(256)), ["cannot be read"], id="binary"),
    pytest.param(b"allow-peer = ::/0\nallow-peer = x\n", ["'x'", "line 2"], id="second of a list"),
    pytest.param(b"allow-peer = ::/0, x\n", ["'::/0, x'", "line 1"], id="second in a line"),
    pytest.param(b"listen-port\n", ["key = value", "line 1"], id="no value"),
    pytest.param(b"software\n", ["key = value", "line 1"], id="text without a value"),
    pytest.param(b"[relay] listen-port = 5\n", ["line 1"], id="brackets"),
    pytest.param(b"---listen-port = 5\n", ["line 1"], id="dashes"),
    pytest.param(b"max-allocations = [1, 2]\n", ["'[1, 2]'", "line 1"], id="a list of numbers"),
]


@pytest.mark.parametrize(("content", "named"), WRONG_FILES)
def test_a_wrong_file_is_refused_in_one_line_that_says_where(
    cli: "Cli", content: bytes, named: list[str]
) -> None:
    Path("relay.conf").write_bytes(content)

    complaint = cli.refuses(78, "-c", "relay.conf")

    for word in ["relay.conf", *named]:
        assert word in complaint


NOT_TO_BE_REPEATED = [
    pytest.param(SECRET, id="a secret"),
    pytest.param("root:*:19000:0:99999:7:::", id="/etc/shadow"),
    pytest.param("root:$y$j9T$c2FsdA=:19000", id="/etc/shadow, with an equals sign"),
    pytest.param("q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ==", id="base64"),
    pytest.param(f"{SECRET}=", id="hexadecimal, with an equals sign"),
]


@pytest.mark.parametrize("line", NOT_TO_BE_REPEATED)
def test_what_may_be_a_secret_is_not_repeated(cli: "Cli", line: str) -> None:
    """As when ``-c`` is given the wrong file."""
    Path("written").write_text(f"{line}\n")

    complaint = cli.refuses(78, "-c", "written")

    assert "(written line 1)" in complaint
    assert line.partition("=")[0] not in complaint


UNREADABLE = [
    pytest.param("missing.conf", "missing.conf", id="missing"),
    pytest.param("secret/relay.conf", "secret/relay.conf", id="below a file"),
    pytest.param(".", "Is a directory", id="directory"),
    pytest.param("two\nlines", "lines", id="a name of two lines"),
    pytest.param("", "''", id="no name"),
]


@pytest.mark.parametrize(("name", "named"), UNREADABLE)
def test_a_named_file_must_be_readable(cli: "Cli", name: str, named: str) -> None:
    assert named in cli.refuses(78, "-c", name)


# --- Values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "source"),
    [
        pytest.param(option, source, id=f"{option.name} by {source}")
        for option in OPTIONS
        for source in SOURCES
        if option.metavar is not None or source != "flag"  # a switch has no value there
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_says_where_it_is_from(
    cli: "Cli", option: Option, source: str
) -> None:
    text = BAD[option.name]
    Path("relay.conf").write_text("# first line\n")
    if source == "flag":
        place = "command line"
        complaint = cli.refuses(78, "-c", "relay.conf", as_flag(option, text))
    elif source == "variable":
        place = option.variable
        complaint = cli.refuses(78, "-c", "relay.conf", **{option.variable: text})
    else:
        place = "relay.conf line 2"
        Path("relay.conf").write_text(f"# first line\n{option.name} = {text}\n")
        complaint = cli.refuses(78, "-c", "relay.conf")

    for word in [option.name, repr(text), place]:
        assert word in complaint


MORE_BAD_VALUES = [
    pytest.param("--public-ip4-addr=2001:db8::1", id="IPv6 for IPv4"),
    pytest.param("--public-ip4-addr=192.0.2.01", id="IPv4, octal"),
    pytest.param("--public-ip4-addr=192.0.2.1:3478", id="IPv4 with port"),
    pytest.param("--public-ip4-addr=224.0.0.1", id="multicast"),
    pytest.param("--public-ip4-addr=", id="no address"),
    pytest.param("--public-ip6-addr=192.0.2.1", id="IPv4 for IPv6"),
    pytest.param("--public-ip6-addr=[2001:db8::1]", id="IPv6 in brackets"),
    pytest.param("--public-ip6-addr=::", id="unspecified"),
    pytest.param("--public-ip6-addr=fe80::1%1", id="IPv6 with scope"),
    pytest.param("--listen-port=", id="no port"),
    pytest.param("--listen-port=+5", id="port with sign"),
    pytest.param("--listen-port=5_0", id="port with underscore"),
    pytest.param("--listen-port=٣٤٧٨", id="port in Arabic digits"),
    pytest.param("--listen-port=--", id="two dashes"),
    pytest.param("--allow-peer=--", id="two dashes in a list"),
    pytest.param("--max-allocations=" + "9" * 19, id="number of 19 digits"),
    pytest.param("--drain-timeout=86401", id="more than a day"),
    pytest.param("--allow-peer=", id="no prefix"),
    pytest.param("--allow-peer=,", id="comma only"),
    pytest.param("--allow-peer=10.0.0.0/33", id="prefix too long"),
    pytest.param("--log-level=info,", id="comma after level"),
    pytest.param("--software=" + "x" * 764, id="SOFTWARE of 764 bytes"),
    pytest.param("--software=" + "é" * 382, id="SOFTWARE of 382 characters, 764 bytes"),
    pytest.param("--software=two\nlines", id="SOFTWARE of two lines"),
]


@pytest.mark.parametrize("flag", MORE_BAD_VALUES)
def test_a_value_out_of_bounds_is_refused(cli: "Cli", flag: str) -> None:
    name, _, text = flag.removeprefix("--").partition("=")

    assert f"{name} {text!r}" in cli.refuses(78, "-c", os.devnull, flag)


def test_software_may_have_763_bytes() -> None:
    assert reads("--software=" + "x" * 763).config.software == "x" * 763


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        pytest.param(
            ["--lowest-port=50001", "--highest-port=50000"],
            ["lowest-port 50001", "highest-port 50000"],
            id="range upside down",
        ),
        pytest.param(
            ["--lowest-port=5", "--highest-port=5", "--listen-port=5"],
            ["listen-port", "5"],
            id="no port is left",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(
    cli: "Cli", argv: list[str], named: list[str]
) -> None:
    complaint = cli.refuses(78, "-c", os.devnull, "--public-ip4-addr=192.0.2.1", *argv)

    for word in named:
        assert word in complaint


SECRET_FILES = [
    pytest.param(b"", "empty", id="empty"),
    pytest.param(b" \n\n", "empty", id="blank"),
    pytest.param(b"\x7fELF\x02\x01\x01\x00", "holds", id="binary, ASCII"),
    pytest.param(b"\xff\xfe\x00\x01", "ASCII", id="binary"),
    pytest.param("geheimnis-ß".encode(), "ASCII", id="not ASCII"),
    pytest.param(b"correct horse\n", "more than one word", id="two words"),
    pytest.param(b"correct\nhorse\n", "more than one word", id="two lines"),
]


@pytest.mark.parametrize(("content", "reason"), SECRET_FILES)
def test_a_secret_file_holds_one_word(cli: "Cli", content: bytes, reason: str) -> None:
    """What is in the file is not repeated: it may be a secret."""
    Path("written").write_bytes(content)

    complaint = cli.refuses(78, "-c", os.devnull, "--relay-secret-file=written")

    for word in ["relay-secret-file", "'written'", reason]:
        assert word in complaint
    for secret in content.split():
        assert repr(secret)[2:-1] not in complaint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("missing", "No such file", id="missing"),
        pytest.param(".", "Is a directory", id="directory"),
        pytest.param("a\0b", "", id="null byte"),
    ],
)
def test_a_secret_file_must_be_readable(cli: "Cli", name: str, reason: str) -> None:
    complaint = cli.refuses(78, "-c", os.devnull, f"--relay-secret-file={name}")

    for word in ["relay-secret-file", repr(name), reason]:
        assert word in complaint


def test_white_space_around_the_secret_does_not_count() -> None:
    Path("written").write_text(f"  {SECRET}\r\n")

    assert reads("--relay-secret-file=written").config.relay_secret == SECRET


# --- Pipes, and what has no end --------------------------------------------------------------

# What a file of each kind may hold, and which field that becomes.
KINDS: Final = {
    "config": ("software = elsewhere\n", "software", "elsewhere"),
    "token-file": (SECRET, "token", SECRET),
    "relay-secret-file": (SECRET, "relay_secret", SECRET),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_file_may_be_a_pipe(kind: str) -> None:
    """As from ``--token-file <(pass relay)``, which can be read only once."""
    content, field, value = KINDS[kind]
    with pipe_with(content) as path:
        assert getattr(reads(f"--{kind}={path}").config, field) == value


@pytest.mark.parametrize("source", SOURCES)
def test_the_secret_may_come_through_a_pipe_from_every_source(source: str) -> None:
    with pipe_with(SECRET) as path:
        command = given(BY_NAME["relay-secret-file"], {source: path})

    assert command.config.relay_secret == SECRET


def test_the_token_may_come_through_a_pipe_that_its_variable_names() -> None:
    with pipe_with(SECRET) as path:
        assert reads(FIREZONE_TOKEN=path).config.token == SECRET


@every_kind
def test_the_writer_of_a_pipe_may_come_later(tmp_path: Path, kind: str) -> None:
    """It can open the pipe once the reader has, and writes in two parts."""
    content, field, value = KINDS[kind]
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(content[:5].encode())
            pipe.write(content[5:].encode())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        config = reads(f"--{kind}={path}").config
    finally:
        writer.join()

    assert getattr(config, field) == value


def test_a_pipe_may_be_gone_once_it_has_been_read(tmp_path: Path) -> None:
    """The port is taken, so that the relay ends by itself."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("w") as pipe:
            path.unlink()
            pipe.write(SECRET)

    writer = threading.Thread(target=write)
    writer.start()
    with bound("127.0.0.1") as holder:
        result = run(
            *["--public-ip4-addr=127.0.0.1", "--bind-ip4-addr=127.0.0.1"],
            *[f"--listen-port={holder.getsockname()[1]}", f"--relay-secret-file={path}"],
        )
    writer.join()

    assert result.returncode == 73


@every_kind
@pytest.mark.parametrize("begun", [False, True], ids=["no writer", "a writer that does not end"])
def test_a_pipe_is_not_waited_for_for_ever(
    cli: "Cli",
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    *,
    begun: bool,
) -> None:
    monkeypatch.setattr("relay.config.files.PATIENCE", 0.0)
    content, _, value = KINDS[kind]
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR) if begun else None
    if pipe is not None:
        os.write(pipe, content.encode())

    complaint = cli.refuses(78, f"--{kind}={path}")

    if pipe is not None:
        os.close(pipe)
    assert str(path) in complaint
    assert "its end did not come within 0 s" in complaint
    assert value not in complaint


@every_kind
def test_what_has_no_end_is_not_read_for_ever(cli: "Cli", kind: str) -> None:
    complaint = cli.refuses(78, f"--{kind}=/dev/zero")

    assert "/dev/zero" in complaint
    assert "is too long: more than 1048576 bytes" in complaint


@pytest.mark.parametrize(("size", "fits"), [(LONGEST_FILE, True), (LONGEST_FILE + 1, False)])
def test_how_long_a_file_may_be(size: int, *, fits: bool) -> None:
    file = "software = relay\n".ljust(size, "#")
    if fits:
        assert reads(file=file).config.software == "relay"
    else:
        with pytest.raises(ConfigError, match="too long"):
            reads(file=file)


@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
@pytest.mark.parametrize("variable", ["FIREZONE_TOKEN_FILE", "RELAY_SECRET_FILE", "FIREZONE_TOKEN"])
def test_help_and_version_read_no_file(cli: "Cli", flag: str, variable: str) -> None:
    with pipe_with(SECRET) as path:
        assert cli(flag, **{variable: path}).exit_code == 0
        assert Path(path).read_text() == SECRET


# --- Reading again ---------------------------------------------------------------------------


@every_kind
def test_what_is_no_regular_file_is_not_read_again(kind: str) -> None:
    Path("relay.conf").write_text("")
    with pipe_with(KINDS[kind][0]) as path:
        argv = ["-c", "relay.conf", "--public-ip4-addr=192.0.2.1", f"--{kind}={path}"]
        command = read(argv, {})
        with pytest.raises(ConfigError, match=f"{path}.* is no regular file"):
            reread(argv, {}, command, command.config)


@pytest.mark.parametrize("name", ["token-file", "relay-secret-file"])
def test_a_file_that_is_named_later_must_be_a_regular_one(name: str) -> None:
    argv = ["-c", "relay.conf"]
    command = reads(file="public-ip4-addr = 192.0.2.1\n")
    with pipe_with(SECRET) as path:
        Path("relay.conf").write_text(f"public-ip4-addr = 192.0.2.1\n{name} = {path}\n")
        with pytest.raises(ConfigError, match=f"{path}.* is no regular file .*conf line 2"):
            reread(argv, {}, command, command.config)

        assert Path(path).read_text() == SECRET  # nothing has been taken out of it


def test_a_pipe_that_is_named_no_more_does_not_matter() -> None:
    argv = ["-c", "relay.conf"]
    with pipe_with(SECRET) as path:
        command = reads(file=f"relay-secret-file = {path}\npublic-ip4-addr = 192.0.2.1\n")
    Path("relay.conf").write_text("public-ip4-addr = 192.0.2.1\n")

    reloaded = reread(argv, {}, command, command.config)

    assert reloaded.needs_restart == ("relay-secret-file",)


def test_the_default_file_may_come_but_not_go(default_file: Path) -> None:
    """Otherwise the rules in it would go unnoticed."""
    variables = {"PUBLIC_IP4_ADDR": "192.0.2.1"}
    command = read([], variables)
    config = command.config
    assert reread([], variables, command, config).changed == ()

    default_file.write_text("deny-peer = 192.0.2.0/24\n")
    reloaded = reread([], variables, command, config)
    assert reloaded.changed == ("deny-peer",)

    default_file.unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"{default_file}: is gone"):
            reread([], variables, command, reloaded.config)

    default_file.write_text("")
    assert reread([], variables, command, reloaded.config).changed == ("deny-peer",)


def test_a_default_file_that_may_be_looked_at_no_longer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, closed: Path
) -> None:
    file = closed / "relay.conf"
    monkeypatch.setattr("relay.config.reading.DEFAULT_FILE", str(file))
    closed.chmod(0o700)
    file.write_text("deny-peer = 192.0.2.0/24\n")
    variables = {"PUBLIC_IP4_ADDR": "192.0.2.1"}
    command = read([], variables)
    closed.chmod(0)

    with (
        unprivileged(),
        pytest.raises(ConfigError, match=f"{file}: cannot be read: Permission denied to uid"),
    ):
        reread([], variables, command, command.config)


def test_a_token_file_that_may_be_looked_at_no_longer_is_not_taken_for_a_token(
    closed: Path,
) -> None:
    argv = ["-c", os.devnull]
    variables = {"PUBLIC_IP4_ADDR": "192.0.2.1", "FIREZONE_TOKEN": str(closed / "token")}

    with unprivileged(), pytest.raises(ConfigError, match="the token cannot be read"):
        read(argv, variables)


def test_a_token_needs_no_directory_that_may_be_looked_into(
    monkeypatch: pytest.MonkeyPatch, closed: Path
) -> None:
    closed.chmod(0o700)
    monkeypatch.chdir(closed)
    closed.chmod(0)

    with unprivileged():
        variables = {"PUBLIC_IP4_ADDR": "192.0.2.1", "FIREZONE_TOKEN": SECRET}
        assert read(["-c", os.devnull], variables).config.token == SECRET


# --- The command line ------------------------------------------------------------------------


USAGE = [
    pytest.param(["--bogus"], "--bogus", id="unknown flag"),
    pytest.param(["-x"], "-x", id="unknown short flag"),
    pytest.param(["--listen-po=5"], "--listen-po=5", id="abbreviated flag"),
    pytest.param(["--confi", os.devnull], "--confi", id="abbreviated --config"),
    pytest.param(["--confi", "missing"], "--confi", id="abbreviated --config, and no such file"),
    pytest.param(["--no-listen-port"], "--no-listen-port", id="--no- of what is no switch"),
    pytest.param(["--one-allocation-per-username=yes"], "yes", id="switch with a value"),
    pytest.param(["relay.conf"], "relay.conf", id="no flag"),
    pytest.param(["--listen-port"], "--listen-port", id="flag without a value"),
    pytest.param(["-c"], "-c", id="-c without a value"),
    pytest.param(["--config"], "--config", id="--config without a value"),
    pytest.param(["--mint"], "--mint", id="--mint without a value"),
    pytest.param(["--mint="], "--mint", id="--mint, empty"),
    pytest.param(["--mint=0"], "'0'", id="--mint 0"),
    pytest.param(["--mint=-5"], "'-5'", id="--mint, negative"),
    pytest.param(["--mint=1.5"], "'1.5'", id="--mint, fraction"),
    pytest.param(["--mint=1h"], "'1h'", id="--mint, unit"),
    pytest.param(["--mint=10000000001"], "'10000000001'", id="--mint, centuries"),
    pytest.param(
        ["--mint=0000000000010000000001"], "10000000001", id="--mint, centuries after zeros"
    ),
    pytest.param(["--two\nlines"], "lines", id="a flag of two lines"),
]


@pytest.mark.parametrize(("argv", "named"), USAGE)
def test_a_wrong_command_line_is_refused_in_one_line(
    cli: "Cli", argv: list[str], named: str
) -> None:
    assert named in cli.refuses(64, *argv, PUBLIC_IP4_ADDR="192.0.2.1")


def test_help_lists_every_option_with_its_variable_and_default(cli: "Cli") -> None:
    result = cli("--help", COLUMNS="1000")

    assert result.exit_code == 0
    assert result.err == ""
    described = result.out.split("\n  -")
    for option in OPTIONS:
        (line,) = (one for one in described if f"[{option.variable}]" in one)
        assert line.startswith(f"-{option.name}")
        if option.metavar is not None and option.default is not None:
            assert f"(default: {option.default})" in line
    for flag in ["-c FILE", "--config FILE", "--check-config", "--print-config", "--mint SECONDS"]:
        assert flag in result.out


def test_version_is_printed(cli: "Cli") -> None:
    result = cli("--version")

    assert (result.exit_code, result.err) == (0, "")
    assert result.out == f"firezone-relay {__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_do_not_need_a_good_configuration(cli: "Cli", flag: str) -> None:
    assert cli(flag, LISTEN_PORT="bad").exit_code == 0


def test_check_config_says_that_all_is_well(cli: "Cli") -> None:
    result = cli("-c", os.devnull, "--check-config", PUBLIC_IP4_ADDR="192.0.2.1")

    assert (result.exit_code, result.err) == (0, "")
    assert result.out.splitlines()[-1].startswith("the configuration is good")


@every_option
def test_the_printed_configuration_is_a_file_that_means_the_same(
    cli: "Cli", option: Option
) -> None:
    for text, _ in SAMPLES[option.name]:
        expected = given(option, {"flag": text})
        printed = cli("-c", os.devnull, as_flag(option, text), "--print-config", **address(option))

        assert (printed.exit_code, printed.err) == (0, "")
        Path("relay.conf").write_text(printed.out)
        reread = read(["-c", "relay.conf"], {})
        assert reread.config == expected.config


TEXTS = [
    pytest.param("--software=two  words #1", id="comment sign"),
    pytest.param("--software=a ;b", id="other comment sign"),
    pytest.param('--software="quoted"', id="quotes"),
    pytest.param("--software=[bracketed, twice]", id="brackets"),
    pytest.param("--software= ", id="blank"),
    pytest.param("--software=", id="nothing"),
    pytest.param("--name=", id="no name"),
    pytest.param("--api-url=wss://x.test\n", id="line feed"),
    pytest.param("--allow-peer=10.0.0.0/8\n::/0", id="two lines"),
    pytest.param("--log-level=info,\nrelay=debug", id="levels"),
]


@pytest.mark.parametrize("flag", TEXTS)
def test_a_text_is_printed_as_it_would_be_read_or_refused(cli: "Cli", flag: str) -> None:
    variables = {"PUBLIC_IP4_ADDR": "192.0.2.1"}
    printed = cli("-c", os.devnull, flag, "--print-config", **variables)

    if printed.exit_code != 78:
        Path("relay.conf").write_text(printed.out)
        reread, expected = read(["-c", "relay.conf"], {}), read(["-c", os.devnull, flag], variables)
        assert reread.config == expected.config


def test_the_printed_configuration_lists_what_is_repeated(cli: "Cli") -> None:
    flags = ["--allow-peer=10.0.0.0/8", "--allow-peer=192.0.2.7, ::/0"]
    printed = cli("-c", os.devnull, *flags, "--print-config", PUBLIC_IP4_ADDR="192.0.2.1")

    Path("relay.conf").write_text(printed.out)
    allowed = read(["-c", "relay.conf"], {}).config.allow_peers
    assert allowed == ("10.0.0.0/8", "192.0.2.7/32", "::/0")


@pytest.mark.parametrize(
    ("variable", "source"),
    [
        pytest.param("FIREZONE_TOKEN", "variable FIREZONE_TOKEN", id="variable"),
        pytest.param("CREDENTIALS_DIRECTORY", "credentials directory", id="credential"),
    ],
)
def test_where_a_token_is_from_is_printed_as_a_comment(
    cli: "Cli", tmp_path: Path, variable: str, source: str
) -> None:
    (tmp_path / "FIREZONE_TOKEN").write_text(SECRET)
    variables = {variable: SECRET if variable == "FIREZONE_TOKEN" else str(tmp_path)}
    printed = cli(
        "-c", os.devnull, "--print-config", "--public-ip4-addr=192.0.2.1", **variables
    ).out

    assert f"# token: from {source}\n" in printed
    assert "# one-allocation-per-username = true (default with a token)\n" in printed
    assert SECRET not in printed
    Path("relay.conf").write_text(printed)
    assert read(["-c", "relay.conf"], variables).config == reads(**variables).config


def test_a_token_that_an_option_names_needs_no_comment(cli: "Cli") -> None:
    flags = ["--token-file=secret", "--public-ip4-addr=192.0.2.1", "--one-allocation-per-username"]

    assert "# token" not in cli("-c", os.devnull, "--print-config", *flags).out


def test_what_depends_on_a_token_is_printed_without_one_too(cli: "Cli") -> None:
    printed = cli("-c", os.devnull, "--print-config", PUBLIC_IP4_ADDR="192.0.2.1").out

    assert printed.endswith(
        "# refused-peers = error (default without a token)\n"
        "# send-indications = true (default without a token)\n"
        "# one-allocation-per-username = false (default without a token)\n"
        "# max-allocations-per-username = 256 (default without a token)\n"
        "# max-allocations-per-ip = 1024 (default without a token)\n"
        "# max-channels-per-allocation = 256 (default without a token)\n"
    )
    assert "# token" not in printed


def test_what_is_given_needs_no_comment(cli: "Cli") -> None:
    given = ["--refused-peers=ignore", "--max-allocations-per-ip=0"]
    printed = cli("-c", os.devnull, "--print-config", *given, PUBLIC_IP4_ADDR="192.0.2.1").out

    assert "refused-peers = ignore\n" in printed
    assert "# refused-peers" not in printed
    assert "# max-allocations-per-ip" not in printed


def test_with_a_token_nobody_is_limited_to_a_share() -> None:
    """A portal knows whom it sends, and its gateways serve many."""
    config = reads("--token-file=secret").config

    assert config.quotas == Quotas(None, None, None)
    assert config.ignores_refused_peers is True
    assert config.serves_send_indications is False
    given = reads("--token-file=secret", "--max-channels-per-allocation=9").config
    assert given.quotas == Quotas(None, None, 9)


def test_0_is_no_limit() -> None:
    assert reads("--max-allocations-per-username=0").config.quotas == Quotas(None, 1024, 256)


@pytest.mark.parametrize("flag", ["--print-config", "--check-config", "--mint=60"])
def test_the_secret_is_never_printed(cli: "Cli", flag: str) -> None:
    result = cli("-c", os.devnull, "--relay-secret-file=secret", "--log-level=debug", flag)

    assert result.exit_code == 0
    assert result.out != ""
    assert SECRET not in result.out + result.err


def test_the_secret_is_not_part_of_what_a_configuration_looks_like() -> None:
    config = reads("--relay-secret-file=secret").config

    assert config.relay_secret == SECRET
    assert SECRET not in repr(config)


# --- Secrets and users in files --------------------------------------------------------------

BAD_USERS = [
    pytest.param("alice", "line 1 is not name:password", id="no colon"),
    pytest.param("# one\n\n:word", "line 3 has a name that is empty", id="no name"),
    pytest.param("a" * 509 + ":word", "longer than 508 bytes", id="a long name"),
    pytest.param("alice:", "line 1 has no password", id="no password"),
    pytest.param("alice:one\nalice:two", "line 2 is of a user that there is", id="twice"),
    pytest.param("alice:0x12", "line 1 has a key that is not 32 or 64 hex", id="a short key"),
    pytest.param("alice:0x" + "xy" * 16, "line 1 has a key", id="no hexadecimal"),
    pytest.param("alice:a\tb", "line 1 holds control characters", id="a tab"),
    pytest.param(b"alice:\xff", "line 1 is not UTF-8", id="not UTF-8"),
    pytest.param(
        "alice:word\nbob:wo\u2028rd\n", "line 2 holds control characters", id="no end of a line"
    ),
    pytest.param("alice:word\x0bbob:word", "line 1 holds control characters", id="a vertical tab"),
]


@pytest.mark.parametrize(("content", "problem"), BAD_USERS)
def test_a_bad_line_of_users_is_named_and_not_quoted(
    cli: "Cli", content: str | bytes, problem: str
) -> None:
    written = content.encode() if isinstance(content, str) else content
    Path("bad").write_bytes(written.replace(b"word", b"Geheim"))
    result = cli("-c", os.devnull, "--check-config", "--users-file=bad")

    assert result.exit_code == 78
    assert "users-file 'bad'" in result.complaint
    assert problem in result.complaint
    assert "Geheim" not in result.complaint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param("", "holds no secret", id="empty"),
        pytest.param("# one\n", "holds no secret", id="a comment"),
        pytest.param("one\ntwo words", "line 2 holds more than one word", id="two words"),
        pytest.param("w\u00f6rd", "line 1 holds no plain ASCII", id="not ASCII"),
        pytest.param("\n".join("abcdefghi"), "more than 8", id="nine"),
    ],
)
def test_bad_secrets_are_named_and_not_quoted(cli: "Cli", content: str, problem: str) -> None:
    Path("bad").write_text(content)
    result = cli("-c", os.devnull, "--check-config", "--auth-secret-file=bad")

    assert result.exit_code == 78
    assert "auth-secret-file 'bad'" in result.complaint
    assert problem in result.complaint
    assert "two words" not in result.complaint


def test_what_is_configured_says_whether_there_are_firezones_users() -> None:
    assert reads().config.has_firezones_users
    assert reads("--relay-secret-file=secret", "--users-file=users").config.has_firezones_users
    assert reads("--token-file=secret", "--users-file=users").config.has_firezones_users
    assert not reads("--users-file=users").config.has_firezones_users
    assert not reads("--auth-secret-file=rest").config.has_firezones_users


def test_with_a_token_the_realm_is_firezones() -> None:
    with pytest.raises(ConfigError, match=r"realm 'example.org': with a token it is 'firezone'"):
        reads("--token-file=secret", "--realm=example.org")


@pytest.mark.parametrize("realm", ["x" * 33, "\u00fc" * 17, "", "a\\b"])
def test_a_realm_is_short_and_plain(cli: "Cli", realm: str) -> None:
    """With a longer one a 401 to the shortest Allocate could hold no nonce."""
    result = cli("-c", os.devnull, "--check-config", f"--realm={realm}")

    assert result.exit_code == 78
    assert "realm" in result.complaint


# --- Minting credentials ---------------------------------------------------------------------


def test_mint_prints_a_credential(cli: "Cli") -> None:
    before = int(time.time())
    result = cli(
        *["-c", os.devnull, "--mint=600", "--relay-secret-file=secret", "--listen-port=3479"],
        *["--public-ip4-addr=192.0.2.1", "--public-ip6-addr=2001:db8::1"],
    )
    after = int(time.time())

    assert (result.exit_code, result.err) == (0, "")
    credential = json.loads(result.out)
    assert set(credential) == {"urls", "username", "credential", "expires"}
    assert credential["urls"] == [
        "turn:192.0.2.1:3479?transport=udp",
        "turn:[2001:db8::1]:3479?transport=udp",
    ]
    assert before + 600 <= credential["expires"] <= after + 600
    assert credential["username"].startswith(f"{credential['expires']}:")
    assert credential["credential"] == password_of(credential["username"], SECRET)


@pytest.mark.parametrize(
    ("username", "secret", "password"),
    [
        pytest.param(
            "1892160000:n23JJ2wKKtt30oXi",
            SECRET,
            "00hqldgk5xLeKKOB+xls9mHMVtgqzie9DulfgQwMv68",
            id="hexadecimal secret",
        ),
        pytest.param(
            "1685984278:uvdgKvS9GXYZ_vmv",
            OTHER_SECRET,
            "6xUIoZ+QvxKhRasLifwfRkMXl+ETLJUsFkHlXjlHAkg",
            id="UUID as secret",
        ),
    ],
)
def test_minted_passwords_are_checked_by_a_formula_that_is_right(
    username: str, secret: str, password: str
) -> None:
    assert password_of(username, secret) == password


def test_mint_makes_credentials_of_the_first_secret_of_a_web_service(cli: "Cli") -> None:
    options = ["--auth-secret-file=rest", "--relay-secret-file=secret", "--mint-user=alice"]
    minted = json.loads(cli("-c", os.devnull, "--mint=60", *options).out)

    username = minted["username"]
    assert username == f"{minted['expires']}:alice"
    digest = hmac.digest(b"one", username.encode(), "sha1")
    assert minted["credential"] == b64encode(digest).decode()


def test_whom_a_credential_is_for_can_be_said(cli: "Cli") -> None:
    options = ["--relay-secret-file=secret", "--mint-user=alice"]
    minted = json.loads(cli("-c", os.devnull, "--mint=60", *options).out)

    assert minted["username"] == f"{minted['expires']}:alice"
    assert minted["credential"] == password_of(minted["username"], SECRET)


def test_whom_a_credential_is_for_says_nothing_without_one(cli: "Cli") -> None:
    result = cli("-c", os.devnull, "--check-config", "--mint-user=alice")

    assert result.exit_code == 64
    assert "--mint-user" in result.complaint


def test_no_two_credentials_are_the_same(cli: "Cli") -> None:
    usernames = set()
    for _ in range(3):
        result = cli("-c", os.devnull, "--mint=60", "--relay-secret-file=secret")
        usernames.add(json.loads(result.out)["username"])

    assert len(usernames) == 3


def test_mint_needs_a_secret_that_stays(cli: "Cli") -> None:
    result = cli("-c", os.devnull, "--mint=60", PUBLIC_IP4_ADDR="192.0.2.1")

    assert result.exit_code == 78
    assert "--auth-secret-file or --relay-secret-file" in result.complaint


@pytest.mark.parametrize("option", ["--relay-secret-file=secret", "--auth-secret-file=rest"])
def test_a_minted_credential_is_good_for_a_relay_with_that_secret(cli: "Cli", option: str) -> None:
    minted = json.loads(cli("-c", os.devnull, "--mint=60", option).out)
    with (
        running(option) as relay,
        TurnClient(("127.0.0.1", relay.port), minted["username"], minted["credential"]) as client,
    ):
        assert client.allocates()[0] == "127.0.0.1"


# --- Public addresses that nobody gave -------------------------------------------------------


PUBLIC_ADDRESSES = [
    pytest.param(
        {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"},
        ("192.0.2.1", "2001:db8::1"),
        id="both families are routed",
    ),
    pytest.param({socket.AF_INET: "192.0.2.1"}, ("192.0.2.1", None), id="IPv4 is routed"),
    pytest.param({socket.AF_INET6: "2001:db8::1"}, (None, "2001:db8::1"), id="IPv6 is routed"),
    pytest.param({}, ("127.0.0.1", "::1"), id="nothing is routed"),
]


@pytest.mark.parametrize(("routes", "expected"), PUBLIC_ADDRESSES)
def test_public_addresses_are_those_that_the_routing_table_names(
    machine: Callable[..., None],
    routes: dict[int, str],
    expected: tuple[str | None, str | None],
) -> None:
    machine(routes=routes, local={"127.0.0.1", "::1"})

    config = read(["-c", os.devnull], {}).config

    assert (config.public_ip4, config.public_ip6) == expected


def test_loopback_is_used_as_far_as_there_is_one(machine: Callable[..., None]) -> None:
    machine(local={"127.0.0.1"})

    config = read(["-c", os.devnull], {}).config

    assert (config.public_ip4, config.public_ip6) == ("127.0.0.1", None)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        pytest.param("--public-ip4-addr=192.0.2.9", ("192.0.2.9", None), id="IPv4"),
        pytest.param("--public-ip6-addr=2001:db8::9", (None, "2001:db8::9"), id="IPv6"),
    ],
)
def test_one_address_given_means_one_family(
    machine: Callable[..., None], flag: str, expected: tuple[str | None, str | None]
) -> None:
    machine(routes={socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"})

    config = read(["-c", os.devnull, flag], {}).config

    assert (config.public_ip4, config.public_ip6) == expected


def test_without_any_address_there_is_nothing_to_lend(machine: Callable[..., None]) -> None:
    machine()

    with pytest.raises(ConfigError, match=r"public-ip4-addr.*public-ip6-addr"):
        read(["-c", os.devnull], {})


# --- The process -----------------------------------------------------------------------------


def test_an_error_is_one_line_and_an_exit_code() -> None:
    result = run("-c", os.devnull, LISTEN_PORT="many")

    assert result.returncode == 78
    assert result.stdout == ""
    assert result.stderr == (
        "firezone-relay: listen-port 'many': not a port from 1 to 65535 (variable LISTEN_PORT)\n"
    )


@pytest.mark.parametrize(("host", "where"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_a_port_in_use_is_named(host: str, where: str) -> None:
    with bound(host) as holder:
        port = holder.getsockname()[1]
        family = "6" if ":" in host else "4"
        result = run(
            *["-c", os.devnull, f"--listen-port={port}"],
            *[f"--public-ip{family}-addr={host}", f"--bind-ip{family}-addr={host}"],
        )

    assert result.returncode == 73
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"{where}:{port}" in result.stderr


@pytest.mark.parametrize(
    ("host", "where"), [("198.51.100.77", "198.51.100.77"), ("2001:db8::77", "[2001:db8::77]")]
)
def test_an_address_that_cannot_be_bound_is_named(host: str, where: str) -> None:
    family = "6" if ":" in host else "4"
    result = run(
        *["-c", os.devnull, "--listen-port=20000"],
        *[f"--public-ip{family}-addr={host}", f"--bind-ip{family}-addr={host}"],
    )

    assert result.returncode == 71
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"{where}:20000" in result.stderr


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)]
)
def test_a_secret_that_everyone_can_read_is_worth_a_warning(mode: int, *, warned: bool) -> None:
    """The port is taken, so that the relay ends by itself."""
    Path("written").write_text(SECRET)
    Path("written").chmod(mode)
    with bound("127.0.0.1") as holder:
        result = run(
            *["-c", os.devnull, "--public-ip4-addr=127.0.0.1", "--bind-ip4-addr=127.0.0.1"],
            *[f"--listen-port={holder.getsockname()[1]}", "--relay-secret-file=written"],
        )

    assert result.returncode == 73
    assert ("WARNING relay.cli: written can be read by every user" in result.stderr) is warned


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_relay_with_success(number: signal.Signals) -> None:
    with running("--drain-timeout=86400") as relay:
        relay.process.send_signal(number)

        assert relay.wait() == 0


def test_a_draining_relay_relays_on_and_ends_with_its_last_allocation() -> None:
    with (
        running("--drain-timeout=86400") as relay,
        client_of(relay) as alice,
        client_of(relay) as carol,
        bound("127.0.0.1") as bob,
    ):
        alice.allocates()
        alice.binds(0x4000, bob.getsockname())
        relay.process.send_signal(signal.SIGTERM)
        relay.logs("draining: 1 allocations left")

        with pytest.raises(TurnError) as refusal:
            carol.allocates()
        assert refusal.value.code == 508
        assert carol.maps() == carol.address
        alice.refreshes(lifetime=600)
        alice.sends(0x4000, b"ping")
        payload, relayed_address = bob.recvfrom(100)
        assert payload == b"ping"
        bob.sendto(b"pong", relayed_address)
        assert alice.receives() == (0x4000, b"pong")

        alice.refreshes(lifetime=0)
        assert relay.wait() == 0


def test_a_second_signal_ends_draining_at_once() -> None:
    with running("--drain-timeout=86400") as relay, client_of(relay) as alice:
        alice.allocates()
        relay.process.send_signal(signal.SIGTERM)
        relay.logs("draining")

        relay.process.send_signal(signal.SIGTERM)
        assert relay.wait() == 0


def test_a_drain_timeout_of_zero_ends_at_once() -> None:
    with running("--drain-timeout=0") as relay, client_of(relay) as alice:
        alice.allocates()
        relay.process.send_signal(signal.SIGTERM)

        assert relay.wait() == 0


# --- A public address that is none ----------------------------------------------------------

PRIVATE = [
    pytest.param("10.0.0.5", None, {"public-ip4-addr": "10.0.0.5"}, id="RFC 1918"),
    pytest.param("172.31.255.9", None, {"public-ip4-addr": "172.31.255.9"}, id="as EC2 has"),
    pytest.param("192.168.1.2", None, {"public-ip4-addr": "192.168.1.2"}, id="at home"),
    pytest.param("100.64.0.1", None, {"public-ip4-addr": "100.64.0.1"}, id="carrier's NAT"),
    pytest.param("10.0.0.5", "2001:db8::5", {"public-ip4-addr": "10.0.0.5"}, id="but for IPv6"),
    pytest.param(None, "fd00::5", {"public-ip6-addr": "fd00::5"}, id="unique local"),
    pytest.param("192.0.2.1", "2001:db8::5", {}, id="neither"),
]


@pytest.mark.parametrize(("ipv4", "ipv6", "private"), PRIVATE)
def test_a_private_address_that_is_found_is_noted(
    machine: Callable[..., None], ipv4: str | None, ipv6: str | None, private: dict[str, str]
) -> None:
    machine(routes={socket.AF_INET: ipv4, socket.AF_INET6: ipv6})
    assert read(["-c", os.devnull], {}).private_hosts == private


def test_loopback_for_want_of_a_route_is_private(machine: Callable[..., None]) -> None:
    machine(local={"127.0.0.1"})
    assert read(["-c", os.devnull], {}).private_hosts == {"public-ip4-addr": "127.0.0.1"}


def test_a_private_address_that_is_given_is_wanted(machine: Callable[..., None]) -> None:
    machine(routes={socket.AF_INET: "192.168.1.2"})
    assert read(["-c", os.devnull, "--public-ip4-addr=10.0.0.5"], {}).private_hosts == {}


# --- TLS --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        pytest.param([], "tls-port 5349: there is no tls-cert", id="nothing"),
        pytest.param(["--tls-cert=ecdsa.crt"], "tls-port 5349: there is no tls-key", id="no key"),
        pytest.param(
            ["--tls-cert=ecdsa.crt", "--tls-key=rsa.key"],
            "tls-cert and tls-key: the key is not that of the certificate",
            id="the key of another one",
        ),
        pytest.param(
            ["--tls-cert=missing", "--tls-key=ecdsa.key"],
            "tls-cert 'missing': cannot be read: No such file or directory (command line)",
            id="no file",
        ),
        pytest.param(
            ["--tls-cert=ecdsa.key", "--tls-key=ecdsa.key"],
            "tls-cert 'ecdsa.key': holds no certificate in PEM (-----BEGIN …) (command line)",
            id="no certificate",
        ),
        pytest.param(
            ["--tls-cert=ecdsa.crt", "--tls-key=ecdsa.crt"],
            "tls-key 'ecdsa.crt': holds no private key in PEM (-----BEGIN …) (command line)",
            id="no key in it",
        ),
        pytest.param(
            ["--tls-cert=ecdsa.crt", "--tls-key=ecdsa.key", "--tcp-port=5349"],
            "tls-port 5349 is the tcp-port, too",
            id="one port for both",
        ),
    ],
)
def test_what_tls_cannot_be_spoken_with_is_one_line(
    cli: "Cli", arguments: list[str], problem: str
) -> None:
    complaint = cli.refuses(78, "-c", os.devnull, "--tls-port=5349", *arguments)
    assert complaint == f"firezone-relay: {problem}\n"


def test_urls_are_those_of_every_transport() -> None:
    """For TLS it is what the certificate is for that clients look for."""
    ports = ["--public-ip4-addr=192.0.2.1", "--public-ip6-addr=2001:db8::1", "--tcp-port=443"]
    ports += ["--tls-port=5349"]
    udp_and_tcp = [
        "turn:192.0.2.1:3478?transport=udp",
        "turn:[2001:db8::1]:3478?transport=udp",
        "turn:192.0.2.1:443?transport=tcp",
        "turn:[2001:db8::1]:443?transport=tcp",
    ]
    named = reads(*ports, "--tls-cert=ecdsa.crt", "--tls-key=ecdsa.key")
    assert named.config.urls == [*udp_and_tcp, "turns:relay.test:5349?transport=tcp"]
    addressed = reads(*ports, "--tls-cert=rsa.crt", "--tls-key=rsa.key")
    assert addressed.config.urls == [*udp_and_tcp, "turns:192.0.2.1:5349?transport=tcp"]


def test_only_secrets_are_to_be_kept_from_others() -> None:
    command = reads("--tls-cert=ecdsa.crt", "--tls-key=ecdsa.key", "--auth-secret-file=rest")
    assert command.secret_files == ("ecdsa.key", "rest")
    assert command.other_files == ("ecdsa.crt",)


# --- Helpers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with secrets and users in it. Tests may write other files there."""
    path = tmp_path_factory.mktemp("cli")
    for name, content in FILES.items():
        (path / name).write_text(content)
        (path / name).chmod(0o600)
    return path


@pytest.fixture(autouse=True)
def place(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in that directory, without any of the relay's own variables."""
    monkeypatch.chdir(directory)
    for variable in [*(o.variable for o in OPTIONS), "FIREZONE_TOKEN", "CREDENTIALS_DIRECTORY"]:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the default file be one that does not exist yet."""
    path = tmp_path / "default.conf"
    monkeypatch.setattr("relay.config.reading.DEFAULT_FILE", str(path))
    return path


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody may look into, but for root."""
    path = tmp_path / "closed"
    path.mkdir(mode=0)
    yield path
    path.chmod(0o700)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As an ordinary user."""
    user = os.geteuid()
    os.seteuid(user or NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def pipe_with(content: str) -> Iterator[str]:
    """A pipe that has been written to, by its path."""
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    try:
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what sets which source address each family has a route for, and what is local."""

    def install(routes: dict[int, str] | None = None, local: set[str] | None = None) -> None:
        monkeypatch.setattr("relay.config.reading.outward_address", (routes or {}).get)
        monkeypatch.setattr("relay.config.reading.is_local", (local or set()).__contains__)

    return install


@dataclass(frozen=True)
class Result:
    """How the command ended."""

    exit_code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that it printed."""
        assert self.out == ""
        assert len(self.err.splitlines()) == 1
        assert self.err.startswith("firezone-relay: ")
        return self.err


class Cli:
    """The command, run in this process for what ends before anything is served."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *argv: str, **variables: str) -> Result:
        with self._monkeypatch.context() as patched:
            for name, text in variables.items():
                patched.setenv(name, text)
            try:
                exit_code: Any = main(argv)
            except SystemExit as exited:  # --help and --version
                exit_code = exited.code
        return Result(exit_code, *self._capsys.readouterr())

    def refuses(self, exit_code: int, *argv: str, **variables: str) -> str:
        """Run what must fail, and return the one line that it prints.

        It only checks the configuration: else a fault that goes unseen would serve for ever.
        """
        result = self("--check-config", *argv, **variables)
        assert result.exit_code == exit_code
        return result.complaint


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Cli]:
    """Leave logging as it was before: the command sets it up for its process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield Cli(monkeypatch, capsys)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def reads(*flags: str, file: str = "", **variables: str) -> Command:
    """Read options without a look at this machine's routes and its default file."""
    if not any("public" in text.lower() for text in [*flags, file, *variables]):
        variables["PUBLIC_IP4_ADDR"] = "192.0.2.1"
    if any("tls-port" in text for text in [*flags, file]) or "TLS_PORT" in variables:
        variables = {**CERTIFICATE, **variables}
    if file:
        Path("relay.conf").write_text(file)
    return read(["-c", "relay.conf" if file else os.devnull, *flags], variables)


def given(option: Option, texts: dict[str, str]) -> Command:
    """Read one option, given by one or several sources, and nothing else."""
    return reads(
        *([as_flag(option, texts["flag"])] if "flag" in texts else []),
        file=f"{option.name} = {texts['file']}\n" if "file" in texts else "",
        **({option.variable: texts["variable"]} if "variable" in texts else {}),
    )


def as_flag(option: Option, text: str) -> str:
    if option.metavar is None:
        return f"--{option.name}" if text == "true" else f"--no-{option.name}"
    return f"--{option.name}={text}"


def address(option: Option) -> dict[str, str]:
    """Return the variable that keeps this machine's routes out of it, if that is needed.

    And what an option cannot be without.
    """
    if option.name.startswith("public-"):
        return {}
    more = CERTIFICATE if option.name == "tls-port" else {}
    return {"PUBLIC_IP4_ADDR": "192.0.2.1", **more}


def stored(command: Command, option: Option) -> object:
    """Return what became of an option."""
    return getattr(command.config, option.field)


def password_of(username: str, secret: str) -> str:
    """Return the password that belongs to a username."""
    expiry, _, salt = username.partition(":")
    digest = hashlib.sha256(f"{expiry}:{secret}:{salt}".encode()).digest()
    return b64encode(digest).decode().rstrip("=")


def running(*arguments: str) -> RelayProcess:
    return RelayProcess("-c", os.devnull, *arguments, port=free_port())


def client_of(relay: RelayProcess) -> TurnClient:
    return TurnClient(("127.0.0.1", relay.port), relay.username, relay.password)


@contextmanager
def bound(host: str) -> Iterator[socket.socket]:
    """A UDP socket of somebody else, on a port of its own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10.0)  # only a failing test waits for so long
        sock.bind((host, 0))
        yield sock
