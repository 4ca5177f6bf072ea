"""A client that speaks RFC 8489, by a library that was written without knowing of this relay.

It counts the bits of the nonce cookie from the first one, as RFC 8489 says; libjuice, in
``test_stacks.py``, counts them from the last one, as its erratum says.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from relay.stun.attributes import Attr
from relay.stun.const import PasswordAlgorithm
from relay.stun.integrity import long_term_key, userhash
from relay.stun.message import Message
from relay.turn.users import mint_rest
from tests.interop.needs import missing, needs_programs
from tests.interop.proxy import Recorder
from tests.process import RelayProcess, free_port
from tests.turnclient import Peer

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HERE = Path(__file__).parent
STEPS = ["allocated", "permitted", "by an indication", "bound", "by a channel", "deleted"]
NEVER = 2**40
OLDEST_RUST = (1, 80)
SHA256_KEY = long_term_key("carol", "firezone", "word", PasswordAlgorithm.SHA_256)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program ``turn-client-proto/src/main.rs``."""
    needs_programs("cargo")
    asked = subprocess.run(["cargo", "--version"], capture_output=True, text=True, check=False)
    if asked.returncode:
        missing(f"cargo does not work: {asked.stderr[:500]}")
    if tuple(map(int, asked.stdout.split()[1].split(".")[:2])) < OLDEST_RUST:
        pytest.skip(f"turn-client-proto takes Rust 1.80: this is {asked.stdout}")
    folder = tmp_path_factory.mktemp("rust") / "turn-client-proto"
    shutil.copytree(HERE / folder.name, folder)  # cargo writes a lock beside what it builds
    built = subprocess.run(
        ["cargo", "build", "--quiet"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if built.returncode:
        missing(f"cargo cannot build turn-client-proto/src/main.rs: {built.stderr[-500:]}")
    return folder / "target/debug/end"


@pytest.mark.parametrize("integrity", ["sha1", "sha256"])
def test_a_timed_user_signs_by_either_algorithm(
    program: Path, tmp_path: Path, integrity: str
) -> None:
    """With SHA-1 the library takes the second algorithm that is offered, and says so."""
    secrets = written(tmp_path / "secrets", "north\n")
    signed = serves(
        program, [f"--auth-secret-file={secrets}"], *mint_rest(NEVER, "alice", "north"), integrity
    )

    is_sha256 = integrity == "sha256"
    algorithm = PasswordAlgorithm.SHA_256 if is_sha256 else PasswordAlgorithm.MD5
    for request in signed:
        assert request.get(Attr.PASSWORD_ALGORITHM) == ((algorithm, b""),)
        assert (request.get(Attr.MESSAGE_INTEGRITY_SHA256) is not None) is is_sha256


@pytest.mark.parametrize("password", ["word", f"0x{SHA256_KEY.hex()}"], ids=["password", "key"])
def test_a_static_user_hides_its_name(program: Path, tmp_path: Path, password: str) -> None:
    """Of whom has a key by SHA-256 no other client could come in."""
    users = written(tmp_path / "users", f"carol:{password}\n")
    signed = serves(program, [f"--users-file={users}"], "carol", "word", "sha256", "hidden")

    for request in signed:
        assert request.get(Attr.USERHASH) == userhash("carol", "firezone")
        assert request.get(Attr.USERNAME) is None
        assert request.get(Attr.MESSAGE_INTEGRITY_SHA256) is not None


def serves(
    program: Path,
    arguments: list[str],
    username: str,
    password: str,
    integrity: str,
    name: str = "named",
) -> list[Message]:
    """Have the library use a relay from an Allocate to the end; return what it has signed."""
    if os.geteuid() == 0:
        arguments.append("--user=root")  # nobody else may read what a test has written
    with (
        RelayProcess(*arguments, port=free_port(), portal=True) as relay,
        Recorder(("127.0.0.1", relay.port)) as recorder,
        Peer() as peer,
    ):
        relay.logs("relaying")
        ends = f"127.0.0.1:{recorder.port}", f"127.0.0.1:{peer.address[1]}"
        with subprocess.Popen(
            [program, *ends, username, password, integrity, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as client:
            for _ in ("by an indication", "by a channel"):
                peer.sends(*peer.receives())
            output, errors = client.communicate(timeout=60)
        assert errors == ""
        assert output.splitlines() == STEPS
    signed = recorder.signed_requests()
    assert len(signed) >= 4  # Allocate, CreatePermission, ChannelBind, Refresh
    return signed


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o600)
    return path
