"""The container: what a linter says of it, and what an operator relies on.

Its steps are run by ``.ci/container``, which takes minutes.
"""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from relay.config.options import OPTIONS
from tests.process import CHECKOUT, TIMEOUT

FILE: Final = CHECKOUT / "contrib/container/Containerfile"
COMPOSE: Final = CHECKOUT / "contrib/container/compose.yaml"
HADOLINT: Final = Path(sys.executable).parent / "hadolint"
DRAINS_FOR: Final = 30  # seconds


def values(instruction: str) -> list[str]:
    parser = DockerfileParser(fileobj=io.BytesIO(FILE.read_bytes()))
    return [step["value"] for step in parser.structure if step["instruction"] == instruction]


def test_hadolint_finds_nothing() -> None:
    if not HADOLINT.exists():
        pytest.skip("there is no hadolint for this machine")
    ended = subprocess.run([HADOLINT, FILE], capture_output=True, text=True, timeout=TIMEOUT)  # noqa: PLW1510
    assert (ended.stdout, ended.returncode) == ("", 0)


def test_it_is_nobody_and_drains() -> None:
    assert values("USER") == ["65534:65534"]
    assert values("STOPSIGNAL") == ["SIGTERM"]
    assert "/healthz" in values("HEALTHCHECK")[0]
    assert values("FROM")[-1] == "docker.io/library/debian:bookworm-slim"


def test_what_it_installs_is_locked() -> None:
    installs = [value for value in values("RUN") if "pip install" in value]
    assert len(installs) == 2
    for value in installs:
        assert "--require-hashes" in value or "--no-deps" in value


def test_compose_runs_it_as_it_is_meant() -> None:
    service: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]["relay"]
    assert (COMPOSE.parent / service["build"]["context"]).resolve() == CHECKOUT
    assert (CHECKOUT / service["build"]["dockerfile"]) == FILE
    assert service["network_mode"] == "host"
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert int(service["stop_grace_period"].removesuffix("s")) > DRAINS_FOR
    assert set(service["environment"]) <= {option.variable for option in OPTIONS}
    [drain] = [option for option in OPTIONS if option.name == "drain-timeout"]
    assert drain.default == str(DRAINS_FOR)
