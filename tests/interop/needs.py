"""What a test needs that is not everywhere: without it the test is skipped, or fails in CI."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRED = "RELAY_TESTS_REQUIRE_CLIENTS"  # set where nothing may be missing


def needs_programs(*programs: str) -> None:
    """Skip the test, or the module, if one of these is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            missing(f"{program} is not installed")


def needs_root() -> None:
    """Skip the test, or the module, if this is not root: it makes network namespaces."""
    if os.geteuid() != 0:
        missing("making a network namespace takes root")


def needs_packages(folder: Path) -> None:
    """Install the npm packages that a *folder* asks for, unless that is done already."""
    needs_programs("node", "npm")
    lock, installed = folder / "package-lock.json", folder / "node_modules/.package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    result = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if result.returncode:
        missing(f"npm cannot install what {folder.name} needs: {result.stderr[-500:]}")
    installed.touch()


def missing(reason: str) -> NoReturn:
    """Skip for a reason, or fail where nothing may be missing."""
    if os.environ.get(REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
