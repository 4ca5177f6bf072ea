"""stun-rs, which speaks RFC 8489 in full: an Allocate by SHA-256, key and signature, both ways."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.interop.needs import missing, needs_programs
from tests.process import RelayProcess

pytestmark = [pytest.mark.interop, pytest.mark.slow]

HERE = Path(__file__).parent / "rust"


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program ``rust/src/main.rs``."""
    needs_programs("cargo")
    folder = tmp_path_factory.mktemp("rust") / "modern"
    shutil.copytree(HERE, folder)  # cargo writes a lock beside what it builds
    built = subprocess.run(
        ["cargo", "build", "--quiet"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if built.returncode:
        missing(f"cargo cannot build rust/src/main.rs: {built.stderr[-500:]}")
    return folder / "target/debug/modern"


def test_it_allocates_by_sha_256_and_believes_the_answer(relay: RelayProcess, modern: Path) -> None:
    server = f"127.0.0.1:{relay.port}"
    result = subprocess.run(
        [str(modern), server, relay.username, relay.password],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("127.0.0.1:")
