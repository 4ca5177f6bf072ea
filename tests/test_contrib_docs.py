"""The manual page, the completions and the documents say what the parser says."""

import ast
import os
import pty
import re
import select
import shutil
import subprocess
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from contrib.generate import HERE, choices, generated
from relay.config.options import OPTIONS, Option
from relay.config.reading import build_parser
from relay.daemon import CAUGHT
from relay.observe.counters import QUEUE_FULL
from relay.turn.commands import Drop

ROOT: Final = HERE.parent
PAGE: Final = HERE / "man/firezone-relay.8"
DEADLINE: Final = 30.0  # seconds, for a shell that does not answer

ALL_OPTIONS: Final = [pytest.param(option, id=option.name) for option in OPTIONS]


# --- What is generated ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [str(path.relative_to(HERE)) for path in generated()])
def test_file_is_what_the_parser_makes_of_it(name: str) -> None:
    path = HERE / name

    assert path.read_text() == generated()[path], "type: python -m contrib.generate"


WITH_CHOICES = [
    pytest.param("channel-range", ("rfc8656", "rfc5766"), id="one of two"),
    pytest.param("log-format", ("human", "json"), id="formats"),
    pytest.param("log-level", ("debug", "info", "warning", "error"), id="one or a list"),
    pytest.param("harden", ("auto", "require", "off"), id="one of three"),
    pytest.param("listen-port", (), id="a number"),
    pytest.param("token-file", (), id="a file"),
    pytest.param("one-allocation-per-username", (), id="a switch"),
]


@pytest.mark.parametrize(("name", "words"), WITH_CHOICES)
def test_choices_are_those_of_the_parser(name: str, words: tuple[str, ...]) -> None:
    (option,) = (option for option in OPTIONS if option.name == name)

    assert choices(option) == words


def test_each_choice_is_one() -> None:
    for option in OPTIONS:
        for word in choices(option):
            option.parse(word)


# --- The manual page ------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="there is no mandoc")
def test_mandoc_finds_nothing_wrong() -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff")
def test_groff_finds_nothing_wrong() -> None:
    command = ["groff", "-mdoc", "-T", "utf8", "-w", "mac", str(PAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stderr == ""


@pytest.mark.parametrize("option", ALL_OPTIONS)
def test_page_says_whether_an_option_reloads(option: Option) -> None:
    hangup, others = section("SIGNALS").split("Everything else needs a restart")

    assert f".Fl -{option.name} " in (hangup if option.reloads else others)


def test_page_has_the_exit_codes_of_the_documents_and_of_the_source() -> None:
    on_page = set(re.findall(r"^\.It (\d+)$", section("EXIT STATUS"), re.MULTILINE))
    in_documents = set(re.findall(r"^\| (\d+) \|", OPERATING, re.MULTILINE))
    names = {name for text in SOURCES for name in re.findall(r"os\.(EX_\w+)", text)}

    assert on_page == in_documents == {str(getattr(os, name)) for name in names}


def test_page_has_every_signal_that_is_caught() -> None:
    on_page = re.findall(r"SIG[A-Z0-9]+", "".join(re.findall(r"\.It Dv .*", section("SIGNALS"))))

    assert sorted(on_page) == sorted(signal.name for signal in CAUGHT)


def test_page_has_every_logger() -> None:
    on_page = re.findall(r"^\.It (relay\S*)$", section("LOGS"), re.MULTILINE)
    in_source = {name for text in SOURCES for name in re.findall(r'getLogger\("(.+)"\)', text)}

    assert on_page == sorted(in_source)


def test_page_quotes_what_the_log_says() -> None:
    quoted = re.findall(r"^\.It (.+)$", section("DIAGNOSTICS"), re.MULTILINE)

    assert quoted
    assert [text for text in quoted if not any(text in source for source in SOURCES)] == []


# --- The documents --------------------------------------------------------------------------


@pytest.mark.parametrize("option", ALL_OPTIONS)
def test_there_is_a_row_for_the_option(option: Option) -> None:
    metavar = f" {option.metavar}" if option.metavar else ""
    (variable, default) = option_rows()[f"--{option.name}{metavar}"]

    assert variable == f"`{option.variable}`"
    if option.default is None:
        assert "`" not in default
    else:
        assert default == f"`{option.default}`"


def test_there_is_no_row_for_what_is_no_option() -> None:
    flags = {flag.partition(" ")[0] for flag in option_rows()}

    assert flags <= set(all_flags(build_parser()))


def test_every_metric_is_explained() -> None:
    source = (ROOT / "relay/observe/exposition.py").read_text()
    named = set(re.findall(r'"(relay_[a-z_]+)"', source))
    assert len(named) > 20
    assert [name for name in sorted(named) if f"`{name}`" not in OPERATING] == []


def test_every_reason_of_a_loss_is_explained() -> None:
    reasons = [*(drop.value for drop in Drop), QUEUE_FULL]
    assert [reason for reason in reasons if f"`{reason}`" not in OPERATING] == []


@pytest.mark.parametrize("level", ["warning", "error", "exception"])
def test_every_line_of_the_log_is_explained(level: str) -> None:
    """Of those that an operator should look at: what is constant in them."""
    said = [line for text in SOURCES for line in logged(text, level)]
    assert said
    assert [line for line in said if not is_explained(line)] == []


def is_explained(line: str) -> bool:
    """Tell if the page has what a line begins with, or another part of it that is constant."""
    parts = [part.strip(" :;,()")[:25] for part in re.split(r"%[sdr]", line)]
    constant = [part for part in parts if len(part) > 6]
    return not constant or any(part in OPERATING for part in constant)


def logged(source: str, level: str) -> Iterator[str]:
    """Yield the format of each line that a module logs at a level."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="logger"), attr=attribute),
                args=[ast.Constant(value=str(text)), *_],
            ) if attribute == level:
                yield text


def option_rows() -> dict[str, tuple[str, str]]:
    """Return variable and default as they stand there, by flag with its metavar."""
    rows: dict[str, tuple[str, str]] = {}
    for line in re.findall(r"^\| (`-.*) \|$", OPTIONS_PAGE, re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        for flag in re.findall("`(.+?)`", cells[0]):
            assert flag not in rows
            rows[flag] = (cells[1], cells[2])
    return rows


# --- Completion -----------------------------------------------------------------------------

TAB: Final = "\t"
ALL: Final = "\x1b*"  # types every match: insert-completions of readline; for zsh see ZSHRC

# What is typed after the command, and what the command is called with then.
TYPED = [
    pytest.param(f"--lo{ALL}", ["--log-format", "--log-level", "--lowest-port"], id="flags"),
    pytest.param(f"--check{TAB}", ["--check-config"], id="one flag"),
    pytest.param(f"--no-o{TAB}", ["--no-one-allocation-per-username"], id="a switch turned off"),
    pytest.param(
        f"--allow-peer ::/0 --al{TAB}", ["--allow-peer", "::/0", "--allow-peer"], id="again"
    ),
    pytest.param(f"--channel-range {ALL}", ["--channel-range", "rfc5766", "rfc8656"], id="range"),
    pytest.param(f"--log-format {ALL}", ["--log-format", "human", "json"], id="format"),
    pytest.param(f"--log-format j{TAB}", ["--log-format", "json"], id="one format"),
    pytest.param(f"--log-format=j{TAB}", ["--log-format=json"], id="after ="),
    pytest.param(f"--harden {ALL}", ["--harden", "auto", "off", "require"], id="mode"),
    pytest.param(
        f"--log-level {ALL}", ["--log-level", "debug", "error", "info", "warning"], id="level"
    ),
    pytest.param(f"--log-level=w{TAB}", ["--log-level=warning"], id="level after ="),
    pytest.param(f"--log-level info,d{TAB}", ["--log-level", "info,debug"], id="level in a list"),
    pytest.param(
        f"--log-level info,relay.turn=d{TAB}",
        ["--log-level", "info,relay.turn=debug"],
        id="level of a logger",
    ),
    pytest.param(
        f"--log-level=info,relay.turn=d{TAB}",
        ["--log-level=info,relay.turn=debug"],
        id="level of a logger after =",
    ),
    pytest.param(f"--log-level x=i{TAB} --h{TAB}", ["--log-level", "x=info", "--h"], id="goes on"),
    pytest.param(f"-c relay.c{TAB}", ["-c", "relay.conf"], id="file"),
    pytest.param(f"--config=relay.c{TAB}", ["--config=relay.conf"], id="file after ="),
    pytest.param(
        f"--token-file my{TAB}to{TAB}", ["--token-file", "my files/token"], id="directory"
    ),
    pytest.param(f"--relay-secret-file s{TAB}", ["--relay-secret-file", "secret"], id="secret"),
    pytest.param(f"--name {ALL}", ["--name"], id="what only the operator knows"),
    pytest.param(f"--mint {ALL}", ["--mint"], id="a number"),
    pytest.param(f"relay.c{TAB}", ["relay.c"], id="no operands"),
    pytest.param(f"probe --conf{TAB}", ["probe", "--conformance"], id="probe"),
    pytest.param(
        f"probe --ice-servers relay.c{TAB}", ["probe", "--ice-servers", "relay.conf"], id="its file"
    ),
]


@pytest.mark.parametrize(("typed", "arguments"), TYPED)
@pytest.mark.parametrize("command", ["firezone-relay", "./relay.py"])
def test_shell_completes(shell: "Shell", command: str, typed: str, arguments: list[str]) -> None:
    assert sorted(shell.call(f"{command} {typed}")) == sorted(arguments)


def test_shell_completes_every_flag(shell: "Shell") -> None:
    assert sorted(shell.call(f"firezone-relay -{ALL}")) == sorted(all_flags(build_parser()))


BASHRC: Final = """
source "$COMPLETION/firezone-relay.bash"
"""

ZSHRC: Final = r"""
fpath=("$COMPLETION" $fpath)
autoload -Uz compinit
compinit -u -D
zle -C all-matches complete-word _generic
bindkey '\e*' all-matches
zstyle ':completion:all-matches::::' completer _all_matches _complete
zstyle ':completion:all-matches:*' insert true
"""

# Stands in for the relay.
COMMAND: Final = """#!/bin/sh
printf '%s\\n' "$@" END >"$CALLS"
"""


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Shell"]:
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param}")
    directory = tmp_path_factory.mktemp(request.param)
    (directory / ".bashrc").write_text(BASHRC)
    (directory / ".zshrc").write_text(ZSHRC)
    (directory / "my files").mkdir()
    for file in ("relay.conf", "secret", "my files/token"):
        (directory / file).touch()
    for command in ("firezone-relay", "relay.py"):
        (directory / command).write_text(COMMAND)
        (directory / command).chmod(0o755)
    shell = Shell(
        {
            "bash": ["bash", "--noprofile", "--rcfile", ".bashrc", "-i"],
            "zsh": ["zsh", "-d", "-i"],
        }[request.param],
        directory,
    )
    yield shell
    shell.close()


class Shell:
    """An interactive shell on a terminal of its own, where somebody types."""

    def __init__(self, command: list[str], directory: Path) -> None:
        calls = directory / "calls"
        os.mkfifo(calls)
        self._calls = os.open(calls, os.O_RDWR)
        self._terminal, its_end = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=directory,
            env={
                "HOME": str(directory),
                "ZDOTDIR": str(directory),
                "PATH": f"{directory}:{os.environ['PATH']}",
                "TERM": "vt100",
                "COMPLETION": str(HERE / "completion"),
                "CALLS": str(calls),
            },
            stdin=its_end,
            stdout=its_end,
            stderr=its_end,
        )
        os.close(its_end)

    def call(self, line: str) -> list[str]:
        """Type a line, and return the arguments with which it calls the command."""
        os.write(self._terminal, f"{line}\r".encode())
        screen, arguments = b"", b""
        while not arguments.endswith(b"END\n"):
            readable, _, _ = select.select([self._terminal, self._calls], [], [], DEADLINE)
            assert readable, screen
            if self._terminal in readable:
                screen += os.read(self._terminal, 65536)
            if self._calls in readable:
                arguments += os.read(self._calls, 65536)
        return arguments.decode().splitlines()[:-1]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)
        os.close(self._calls)


# --- Helpers --------------------------------------------------------------------------------

OPERATING: Final = (ROOT / "docs/operating.md").read_text()
OPTIONS_PAGE: Final = (ROOT / "docs/options.md").read_text()
SOURCES: Final = [path.read_text() for path in sorted((ROOT / "relay").rglob("*.py"))]


def section(title: str) -> str:
    """Return the text of one section of the page."""
    _, _, text = PAGE.read_text().partition(f"\n.Sh {title}\n")
    return text.partition("\n.Sh ")[0]


def all_flags(parser: ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]
