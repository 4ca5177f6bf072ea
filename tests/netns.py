"""Network namespaces, by ip(8)."""

import subprocess

from bench.loadlib.netns import inside
from tests.turnclient import TIMEOUT

__all__ = ["inside", "ip", "prefixed"]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=TIMEOUT)


def prefixed(host: str) -> tuple[str, ...]:
    """The arguments for ``ip address add``; an IPv6 address is to be usable at once."""
    return (f"{host}/64", "nodad") if ":" in host else (f"{host}/24",)
