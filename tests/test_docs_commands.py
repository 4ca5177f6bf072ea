"""The commands in the documents are run, or say why they are not.

A comment before a block tells: ``<!-- run in CI: FILE -->`` or ``<!-- not run: REASON -->``. Those
that name this file are run here, in a folder with an ``auth.secret``, beside a relay that has it.
That relay is on loopback at a port of its own: ``PUBLIC_IP4_ADDR`` and ``LISTEN_PORT`` say so.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import PAGES, ROOT, Block, blocks
from tests.interop.needs import needs_programs
from tests.process import TIMEOUT, RelayProcess, environment, free_port

HERE = "run in CI: tests/test_docs_commands.py"
LANGUAGES = ("console", "sh", "bash", "python")
# Nobody else may read what a test has written.
SAME_USER = ("--user=root",) if os.geteuid() == 0 else ()

PUBLISHED = [
    page for page in PAGES if page == ROOT / "README.md" or page.is_relative_to(ROOT / "docs")
]


def commands_of(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in LANGUAGES]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PUBLISHED, ids=name_of)
def test_each_command_is_run_or_says_why_not(page: Path) -> None:
    for block in commands_of(page):
        if block.mark.startswith("run in CI: "):
            assert (ROOT / block.mark.removeprefix("run in CI: ")).exists(), block
        else:
            assert re.match(r"not run( as it stands)?: \w+", block.mark), block


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "auth.secret").write_text("0123456789abcdef\n")
    (tmp_path / "auth.secret").chmod(0o600)
    script = tmp_path / "relay.py"
    script.write_text(f'#!/bin/sh\nPYTHONSAFEPATH=1 exec {sys.executable} -m relay "$@"\n')
    script.chmod(0o755)
    return tmp_path


@pytest.fixture
def relay(folder: Path) -> Iterator[RelayProcess]:
    given = f"--auth-secret-file={folder / 'auth.secret'}"
    with RelayProcess(given, *SAME_USER, port=free_port()) as relay:
        yield relay


HAVE_SOME = [page for page in PUBLISHED if any(block.mark == HERE for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", HAVE_SOME, ids=name_of)
def test_the_commands_of_a_page(page: Path, folder: Path, relay: RelayProcess) -> None:
    needs_programs("bash", "openssl")
    variables = {
        "TURN_URL": f"turn:127.0.0.1:{relay.port}?transport=udp",
        "USERNAME": relay.username,
        "CREDENTIAL": relay.password,
        "PUBLIC_IP4_ADDR": "127.0.0.1",
        "LISTEN_PORT": str(relay.port),
    }
    for block in commands_of(page):
        if block.mark == HERE:
            run(block, folder, variables)


def run(block: Block, folder: Path, variables: dict[str, str]) -> None:
    """Run what is typed in a block; the rest of it is what comes."""
    port = variables["LISTEN_PORT"]
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
    else:
        typed = re.findall(r"^[$#] (.*)$", block.text, re.MULTILINE)
        assert typed, block
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(typed)]
        command[-1] = command[-1].replace("127.0.0.1:3478", f"127.0.0.1:{port}")
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
        check=False,
    )
    assert ended.returncode == 0, (block.text, ended.stdout, ended.stderr)


def test_there_are_commands_that_are_run() -> None:
    assert {name_of(page) for page in HAVE_SOME} >= {"README.md", "docs/probe.md"}
