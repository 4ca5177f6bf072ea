"""Wheel and sdist: as an index takes them, and as they are installed."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from relay.version import __version__
from tests.interop.needs import needs_programs
from tests.process import CHECKOUT, environment

pytestmark = pytest.mark.slow

TIMEOUT = 300  # seconds; building takes a few, and what it takes from an index


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, made of a copy of what git knows."""
    needs_programs("git", "tar")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    listed = run(
        "git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    )
    names = [name for name in listed.split("\0") if name and (CHECKOUT / name).exists()]
    subprocess.run(
        ["tar", "--create", f"--file={folder / 'source.tar'}", "--null", "--files-from=-"],
        cwd=CHECKOUT,
        input="\0".join(names),
        text=True,
        check=True,
        timeout=TIMEOUT,
    )
    run("tar", "--extract", f"--file={folder / 'source.tar'}", f"--directory={source}")
    run(sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source))
    return folder / "dist"


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def one(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


def test_an_index_takes_them(built: Path) -> None:
    files = [str(path) for path in sorted(built.iterdir())]
    assert len(files) == 2
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert said.count("PASSED") == 2


def test_the_wheel_has_all_that_runs(built: Path) -> None:
    with zipfile.ZipFile(one(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
    files = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "relay").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= names
    assert not any(name.startswith(("tests/", "bench/", "contrib/")) for name in names)


def test_the_sdist_has_all_that_it_is_built_of(built: Path) -> None:
    with tarfile.open(one(built, "*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "relay/cli.py"} <= names
    assert not any(name.startswith("tests/") for name in names)  # half of them would be no use


def test_the_command_of_the_wheel_runs(built: Path, tmp_path: Path) -> None:
    """With the dependencies of these tests."""
    wheel = str(one(built, "*.whl"))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), wheel)
    said = subprocess.run(
        [sys.executable, str(tmp_path / "bin/firezone-relay"), "--version"],
        env=environment(PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    ).stdout
    assert __version__ in said
