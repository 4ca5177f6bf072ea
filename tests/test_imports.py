"""Imports point down only, siblings do not know each other, and what is pure stays pure."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import pytest

# --- The rules ------------------------------------------------------------------------------

# Who may import what of this package, from the top down. A package's row counts for all of its
# modules, and these may import each other. relay/__init__.py has no row: it imports nothing.
MAY_IMPORT: Final[dict[str, tuple[str, ...]]] = {
    "relay.__main__": ("relay.cli",),
    "relay.cli": (
        "relay.daemon",
        "relay.upgrade",
        "relay.assembly",
        "relay.config",
        "relay.observe.logs",
        "relay.probe.command",
        "relay.turn.users",
    ),
    "relay.daemon": (
        "relay.upgrade",
        "relay.assembly",
        "relay.config",
        "relay.host",
        "relay.observe",
        "relay.net.signals",
        "relay.portal.phoenix",
        "relay.xdp",
        "relay.turn.users",
        "relay.stun.address",
    ),
    "relay.upgrade": (
        "relay.assembly",
        "relay.config.model",
        "relay.datapath",
        "relay.host",
        "relay.net.reactor",
        "relay.net.stream",
        "relay.net.udp",
        "relay.turn",
        "relay.stun",
        "relay.version",
    ),
    "relay.assembly": (
        "relay.config.differences",
        "relay.config.model",
        "relay.datapath",
        "relay.host",
        "relay.observe",
        "relay.portal",
        "relay.xdp",
        "relay.net",
        "relay.turn",
        "relay.stun",
        "relay.version",
    ),
    # A client like any other: it knows no part of the relay but the protocol, and how
    # a file of secrets is written.
    "relay.probe": (
        "relay.config.parsing",
        "relay.net.buffers",
        "relay.turn.channeldata",
        "relay.turn.framing",
        "relay.turn.users",
        "relay.stun",
    ),
    "relay.probe.client": (
        "relay.turn.channeldata",
        "relay.turn.framing",
        "relay.stun",
    ),
    "relay.config": (
        "relay.net.addresses",
        "relay.net.listening",
        "relay.net.tls",
        "relay.net.udp",
        "relay.portal.endpoint",
        "relay.turn.channeldata",
        "relay.turn.users",
        "relay.stun.address",
        "relay.version",
    ),
    "relay.config.model": (
        "relay.net.tls",
        "relay.stun.address",
        "relay.stun.const",
        "relay.turn.users",
    ),
    "relay.datapath": (
        "relay.observe.counters",
        "relay.net.stream",
        "relay.net.udp",
        "relay.turn",
        "relay.stun",
    ),
    "relay.xdp": (
        "relay.observe.counters",
        "relay.net.addresses",
        "relay.turn.commands",
        "relay.stun",
    ),
    # Packages that import no other: they are handed what they work with.
    "relay.host": ("relay.stun.address", "relay.stun.const"),
    "relay.observe": (),
    "relay.observe.counters": (),
    "relay.observe.logs": ("relay.observe.logratelimit", "relay.observe.recent"),
    "relay.observe.logratelimit": (),
    "relay.observe.recent": (),
    "relay.portal": (),
    "relay.portal.endpoint": (),
    "relay.net": (),
    # The protocol.
    "relay.turn": ("relay.stun",),
    "relay.turn.channeldata": (),
    "relay.stun": (),
    "relay.version": (),
}

# What is pure: bytes, time and randomness are handed in. It may import what is pure itself,
# and this of the standard library: no socket, clock, thread, file or randomness.
PURE: Final = (
    "relay.stun",
    "relay.turn",
    "relay.net.netlink",
    "relay.net.proxyprotocol",
    "relay.portal.phoenix",
    "relay.probe.client",
)
PURE_MAY_IMPORT: Final = (
    "array",
    "base64",
    "binascii",
    "bisect",
    "collections",
    "contextlib",
    "dataclasses",
    "email.utils.parsedate_to_datetime",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "ipaddress",
    "itertools",
    "json",
    "logging",  # to say what happened; where that goes is decided elsewhere
    "math",
    "operator",
    "re",
    "socket.AF_INET",  # names of the families, and their spelling: no socket comes of these
    "socket.AF_INET6",
    "socket.inet_ntop",
    "socket.inet_pton",
    "string",
    "struct",
    "types",
    "typing",
    "urllib.parse",
    "zlib",
)
# Builtins that reach the world outside, or get around the imports.
IMPURE_BUILTINS: Final = frozenset(
    {"open", "input", "print", "exec", "eval", "compile", "breakpoint", "__import__"}
)

# No module may: the loop is our own, and a second one would hide what it waits for.
NEVER: Final = ("asyncio",)


# --- The package keeps them -----------------------------------------------------------------

ROOT: Final = Path(__file__).parent.parent
FILES: Final = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("relay/**/*.py"))


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_the_rules(file: str) -> None:
    assert violations(file, (ROOT / file).read_text()) == []


def test_all_files_are_looked_at() -> None:
    assert {"relay/__init__.py", "relay/turn/timerwheel.py", "relay/stun/message.py"} <= set(FILES)


def test_the_rules_point_down_only() -> None:
    rows = list(MAY_IMPORT)
    for position, (row, allowed) in enumerate(MAY_IMPORT.items()):
        for name in allowed:
            assert row_of(name) in rows[position + 1 :], f"{row} -> {name}"


def test_what_is_pure_may_import_only_what_is_pure() -> None:
    for name in PURE:
        row = row_of(name)
        assert row is not None
        assert all(is_within(PURE, allowed) for allowed in MAY_IMPORT[row])


# --- The checker sees what it should --------------------------------------------------------

ALLOWED = [
    pytest.param("relay/turn/server.py", "relay.stun.message", id="down"),
    pytest.param("relay/turn/server.py", "relay.stun.message.Message", id="down, by name"),
    pytest.param("relay/turn/server.py", "relay.turn.auth", id="same package"),
    pytest.param("relay/turn/__init__.py", "relay.turn.auth", id="from the package itself"),
    pytest.param("relay/turn/server.py", "collections.abc", id="submodule of what is allowed"),
    pytest.param("relay/assembly.py", "relay.net.addresses", id="far down"),
    pytest.param("relay/datapath/control.py", "relay.turn.server", id="data path to server"),
    pytest.param("relay/net/udp.py", "socket", id="net is not pure"),
    pytest.param("relay/portal/client.py", "relay.portal.phoenix", id="portal to its pure part"),
    pytest.param("relay/portal/client.py", "threading", id="portal is not pure"),
    pytest.param("relay/portal/phoenix.py", "email.utils.parsedate_to_datetime", id="pure part"),
    pytest.param("relay/stun/address.py", "socket.inet_pton", id="the pure part of socket"),
]


@pytest.mark.parametrize(("file", "name"), ALLOWED)
def test_checker_allows(file: str, name: str) -> None:
    assert violations(file, f"import {name}") == []


FORBIDDEN = [
    pytest.param("relay/stun/message.py", "relay.turn.auth", id="stun up to turn"),
    pytest.param("relay/stun/message.py", "relay", id="the whole package"),
    pytest.param("relay/turn/server.py", "relay.net.udp", id="turn to sibling net"),
    pytest.param("relay/turn/server.py", "relay.observe.counters", id="turn to sibling observe"),
    pytest.param("relay/turn/server.py", "relay.turnstile", id="only begins like turn"),
    pytest.param("relay/turn/tables.py", "relay.datapath.routes", id="turn up to datapath"),
    pytest.param("relay/net/udp.py", "relay.turn.commands", id="net up to turn"),
    pytest.param("relay/net/reactor.py", "relay.turn.timerwheel", id="net to sibling turn"),
    pytest.param("relay/net/udp.py", "relay.stun.const", id="net to sibling stun"),
    pytest.param("relay/portal/client.py", "relay.config.model", id="portal up to config"),
    pytest.param("relay/host/inherited.py", "relay.config.model", id="host up to config"),
    pytest.param("relay/host/supervision.py", "relay.net.reactor", id="host to sibling net"),
    pytest.param("relay/observe/monitor.py", "relay.turn.server", id="observe to sibling turn"),
    pytest.param("relay/observe/monitor.py", "relay.net.reactor", id="observe to sibling net"),
    pytest.param("relay/datapath/control.py", "relay.daemon", id="datapath up to daemon"),
    pytest.param(
        "relay/datapath/control.py", "relay.portal.client", id="datapath to sibling portal"
    ),
    pytest.param("relay/datapath/control.py", "relay.net.reactor", id="past the interfaces"),
    pytest.param("relay/datapath/routes.py", "relay.config.model", id="datapath up to config"),
    pytest.param("relay/assembly.py", "relay.daemon", id="assembly up to daemon"),
    pytest.param("relay/daemon.py", "relay.cli", id="daemon up to cli"),
    pytest.param("relay/daemon.py", "relay.datapath.routes", id="daemon past assembly"),
    pytest.param("relay/config/options.py", "relay.observe.logs", id="config to sibling observe"),
    pytest.param("relay/config/model.py", "relay.turn.server", id="config to more than constants"),
    pytest.param("relay/observe/counters.py", "relay.version", id="counters to sibling version"),
    pytest.param("relay/__init__.py", "sys", id="the map imports something"),
    pytest.param("relay/__init__.py", "relay.version", id="the map imports the version"),
    pytest.param("relay/stun/message.py", "socket", id="stun with a socket"),
    pytest.param("relay/stun/address.py", "socket.socket", id="the impure part of socket"),
    pytest.param("relay/turn/server.py", "time.monotonic", id="turn with a clock"),
    pytest.param("relay/turn/auth.py", "secrets", id="turn with randomness"),
    pytest.param("relay/turn/timerwheel.py", "threading", id="timerwheel with a thread"),
    pytest.param("relay/portal/phoenix.py", "datetime", id="phoenix with a clock"),
    pytest.param(
        "relay/portal/phoenix.py", "email.utils.localtime", id="phoenix with a hidden one"
    ),
    pytest.param("relay/portal/phoenix.py", "relay.portal.client", id="pure to impure"),
    pytest.param("relay/net/netlink.py", "relay.net.addresses", id="messages to their socket"),
    pytest.param("relay/net/reactor.py", "asyncio", id="asyncio"),
    pytest.param("relay/cli.py", "asyncio.events", id="a part of asyncio"),
]


@pytest.mark.parametrize(("file", "name"), FORBIDDEN)
def test_checker_forbids(file: str, name: str) -> None:
    (found,) = violations(file, f"import {name}")

    assert found.startswith(f"{name} in ")


@pytest.mark.parametrize("file", ["relay/gadget.py", "relay/gadgets/left.py"])
def test_checker_asks_for_a_row(file: str) -> None:
    (found,) = violations(file, "")

    assert "has no row" in found


WAYS_TO_IMPORT = [
    pytest.param("import a", {"a"}, id="import"),
    pytest.param("import a.b as c, d", {"a.b", "d"}, id="import several"),
    pytest.param("from a import b, c as d", {"a.b", "a.c"}, id="from"),
    pytest.param("from a.b import *", {"a.b.*"}, id="from, all"),
    pytest.param("from . import a", {"relay.stun.a"}, id="from the own package"),
    pytest.param("from .a import b", {"relay.stun.a.b"}, id="from a sibling module"),
    pytest.param("from .. import a", {"relay.a"}, id="from the package above"),
    pytest.param("from ..a.b import c", {"relay.a.b.c"}, id="from another package"),
    pytest.param("def f():\n    import a", {"a"}, id="within a function"),
    pytest.param("class C:\n    import a", {"a"}, id="within a class"),
    pytest.param("if TYPE_CHECKING:\n    import a", {"a"}, id="for types only"),
    pytest.param("try:\n    import a\nexcept E:\n    import b", {"a", "b"}, id="within a try"),
    pytest.param("# import a\n'import b'", set(), id="no import at all"),
]


@pytest.mark.parametrize(("source", "names"), WAYS_TO_IMPORT)
def test_checker_sees_every_way_to_import(source: str, names: set[str]) -> None:
    assert set(imported(ast.parse(source), "relay.stun")) == names


WAYS_TO_THE_BUILTINS = [
    pytest.param("open('state')", 1, id="called"),
    pytest.param("reader = open", 1, id="under another name"),
    pytest.param("__import__('socket')", 1, id="import by call"),
    pytest.param("def f():\n    print(input())", 2, id="two of them"),
    pytest.param("def open(): self.open()", 0, id="a method of that name"),
    pytest.param("len([])", 0, id="a pure one"),
]


@pytest.mark.parametrize(("source", "count"), WAYS_TO_THE_BUILTINS)
def test_checker_sees_impure_builtins_in_pure_modules_only(source: str, count: int) -> None:
    assert len(violations("relay/turn/server.py", source)) == count
    assert violations("relay/net/udp.py", source) == []


# --- The checker ----------------------------------------------------------------------------


def violations(file: str, source: str) -> list[str]:
    """Say what breaks the rules in a file, given by its path in the repository and its text."""
    tree = ast.parse(source)
    module, package = names_of(file)
    if module != "relay" and row_of(module) is None:
        return [f"{module} has no row in MAY_IMPORT: decide what it may import"]
    reasons = [(name, objection(module, name)) for name in sorted(set(imported(tree, package)))]
    if is_within(PURE, module):
        reasons += [(name, "it is not pure") for name in sorted(impure_builtins(tree))]
    return [f"{name} in {module}: {reason}" for name, reason in reasons if reason]


def objection(module: str, name: str) -> str | None:
    """Say why *module* may not import *name*, or None if it may."""
    if is_within(NEVER, name):
        return "nothing here imports that"
    row = row_of(module)
    if row is None:
        return "this module imports nothing"
    if is_within(("relay",), name) and not is_within((row, *MAY_IMPORT[row]), name):
        return "it is in a layer above, or a sibling"
    if is_within(PURE, module) and not is_within((*PURE, *PURE_MAY_IMPORT), name):
        return "it is not pure"
    return None


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the dotted name of everything imported, wherever in the module that happens."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                parts = package.split(".")
                origin = parts[: len(parts) - node.level + 1] + origin
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def impure_builtins(tree: ast.Module) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names & IMPURE_BUILTINS


def names_of(file: str) -> tuple[str, str]:
    """Return the module of a file, and the package from which its relative imports start."""
    path = PurePosixPath(file).with_suffix("")
    package = ".".join(path.parent.parts)
    return (package if path.name == "__init__" else f"{package}.{path.name}"), package


def row_of(module: str) -> str | None:
    """Return the longest name in MAY_IMPORT that the module lies within."""
    return max((row for row in MAY_IMPORT if is_within((row,), module)), key=len, default=None)


def is_within(names: Iterable[str], name: str) -> bool:
    """Tell if *name* is one of *names*, or inside of one."""
    return any(name == outer or name.startswith(f"{outer}.") for outer in names)
