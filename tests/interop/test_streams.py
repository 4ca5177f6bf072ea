"""Other people's programs with the relay over TCP and TLS: clients, and proxies in front of it."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.certificates import Authority
from tests.interop.browser import ice_server
from tests.interop.loopback import Endpoint, running_relay, udp_peer, within
from tests.interop.needs import missing, needs_programs
from tests.interop.program import Program, connect
from tests.interop.test_coturn_clients import all_of, echo_peer, numbers, to, uclient
from tests.interop.test_stacks import MESSAGES, pion
from tests.process import TIMEOUT, RelayProcess, free_tcp_port
from tests.turnclient import StreamClient

pytestmark = [pytest.mark.interop, pytest.mark.slow]
__all__ = ["pion"]  # a fixture

AUTHORITY: Final = Authority()
STREAMS_MD: Final = Path(__file__).parents[2] / "docs/streams.md"


class Ports:
    """Where the relay is reached, but for UDP."""

    def __init__(self) -> None:
        self.tcp, self.tls = free_tcp_port(), free_tcp_port()

    def arguments(self, folder: Path) -> list[str]:
        """Return what makes it so; the certificate is written to *folder*."""
        chain, key = AUTHORITY.issue("127.0.0.1", "relay.test").write_to(folder)
        return [
            *(f"--tcp-port={self.tcp}", f"--tls-port={self.tls}"),
            *(f"--tls-cert={chain}", f"--tls-key={key}"),
        ]


@pytest.fixture(scope="module")
def ports() -> Ports:
    return Ports()


@pytest.fixture(scope="module")
def relay(ports: Ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    arguments = ports.arguments(tmp_path_factory.mktemp("tls"))
    with running_relay(*arguments, "--channel-range=rfc5766") as relay:
        yield relay


# --- Clients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["-c"], ["-c", "-s"], ["-c", "-l", "1401"], []])
@within(seconds=60)
async def test_uclient_over_tcp_and_tls(
    relay: RelayProcess, ports: Ports, flags: list[str]
) -> None:
    """By channels and by indications, of sizes that have to be padded, and with RTCP."""
    needs_programs("turnutils_uclient")
    async with echo_peer("127.0.0.1") as peer:
        options = ["-t", *flags, *numbers(messages=50), *to(peer)]
        counted = await asyncio.gather(
            uclient(relay, "127.0.0.1", *options, port=ports.tcp),
            uclient(relay, "::1", *options, port=ports.tcp),
            uclient(relay, "127.0.0.1", "-S", *options, port=ports.tls),
        )
    assert set(counted) == {all_of(50 if "-c" in flags else 100)}


@within(seconds=60)
async def test_uclient_with_both_ends_on_this_relay(relay: RelayProcess, ports: Ports) -> None:
    needs_programs("turnutils_uclient")
    options = ["-t", "-y", "-c", *numbers(messages=50)]
    counted = await asyncio.gather(
        uclient(relay, "127.0.0.1", *options, port=ports.tcp),
        uclient(relay, "127.0.0.1", "-S", *options, port=ports.tls),
    )
    assert set(counted) == {all_of(2 * 50)}


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_pion_over_tcp_and_tls(
    relay: RelayProcess, ports: Ports, pion: Path, tmp_path: Path, transport: str
) -> None:
    """One end; the other has UDP. Over TLS it verifies the certificate."""
    (tmp_path / "authority.pem").write_text(AUTHORITY.pem)
    url = f"turn:127.0.0.1:{ports.tcp}?transport=tcp"
    if transport == "tls":
        url = f"turns:127.0.0.1:{ports.tls}?transport=tcp"
    with (
        end_by_pion(pion, tmp_path / "alice", ice_server(relay, "127.0.0.1", url)) as alice,
        end_by_pion(pion, tmp_path / "bob", ice_server(relay, "127.0.0.1")) as bob,
    ):
        connect(alice, bob)
        for sender, receiver in ((alice, bob), (bob, alice)):
            sender.call("send", MESSAGES)
            assert receiver.call("receive", len(MESSAGES)) == MESSAGES


@pytest.mark.parametrize("transport", ["tcp", "tls"])
@within(seconds=30)
async def test_aioice_over_tcp_and_tls(relay: RelayProcess, ports: Ports, transport: str) -> None:
    pytest.importorskip("aioice", reason="aioice is not installed")
    from aioice.turn import create_turn_endpoint  # noqa: PLC0415

    is_tls = transport == "tls"
    async with udp_peer("127.0.0.1") as bob:
        _, alice = await create_turn_endpoint(
            Endpoint,
            ("127.0.0.1", ports.tls if is_tls else ports.tcp),
            username=relay.username,
            password=relay.password,
            transport="tcp",
            ssl=ssl.create_default_context(cadata=AUTHORITY.pem) if is_tls else False,
        )
        for number in range(1, 20):
            payload = bytes(number)
            alice.sends(payload, bob.address)
            assert await bob.receives() == (payload, alice.address)
            bob.sends(payload, alice.address)
            assert await alice.receives() == (payload, bob.address)
        alice.transport.close()
        await alice.closed.wait()


def end_by_pion(pion: Path, folder: Path, server: dict[str, str]) -> Program:
    folder.mkdir()
    variables = {"SSL_CERT_FILE": str(folder.parent / "authority.pem")}
    return Program(f"pion ({folder.name})", [str(pion), json.dumps(server)], folder, variables)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        pytest.param(["-alpn", "stun.turn"], "ALPN protocol: stun.turn", id="ALPN"),
        pytest.param(["-alpn", "stun.nat-discovery"], "ALPN protocol: stun.nat", id="ALPN of STUN"),
        pytest.param(["-alpn", "h2"], "No ALPN negotiated", id="another ALPN is no reason to end"),
        pytest.param(["-tls1_3"], "New, TLSv1.3, Cipher is TLS_AES_256_GCM_SHA384", id="TLS 1.3"),
        pytest.param(
            ["-tls1_2"], "New, TLSv1.2, Cipher is ECDHE-ECDSA-AES256-GCM-SHA384", id="TLS 1.2"
        ),
        pytest.param(["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], "(NONE)", id="no TLS 1.1"),
        pytest.param(["-tls1", "-cipher", "ALL:@SECLEVEL=0"], "(NONE)", id="no TLS 1.0"),
        pytest.param(["-tls1_2", "-cipher", "AES128-SHA"], "(NONE)", id="no forward secrecy"),
        pytest.param(["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA"], "(NONE)", id="no CBC"),
        pytest.param(["-tls1_2", "-cipher", "aNULL"], "", id="no anonymous ones"),
        pytest.param([], "Verification: OK", id="the chain"),
        pytest.param(["-no_ticket", "-tls1_2"], "Secure Renegotiation IS supported", id="RFC 5746"),
        pytest.param([], "Compression: NONE", id="no compression"),
    ],
)
def test_openssl_gets_what_is_good_today(
    relay: RelayProcess, ports: Ports, tmp_path: Path, flags: list[str], expected: str
) -> None:
    assert relay.port
    said = s_client(ports, tmp_path, *flags)
    assert expected in said
    if not expected:
        assert "New, TLS" not in said


def test_openssl_is_refused_renegotiation(
    relay: RelayProcess, ports: Ports, tmp_path: Path
) -> None:
    assert relay.port
    said = s_client(ports, tmp_path, "-tls1_2", commands="R\n")
    assert "RENEGOTIATING" in said
    assert "no renegotiation" in said


def test_openssl_resumes_a_session(relay: RelayProcess, ports: Ports, tmp_path: Path) -> None:
    """By a ticket: then there is no signature to compute."""
    assert relay.port
    session = ["-tls1_2", "-sess_out", str(tmp_path / "session")]
    assert "New, TLSv1.2" in s_client(ports, tmp_path, *session)
    session = ["-tls1_2", "-sess_in", str(tmp_path / "session")]
    assert "Reused, TLSv1.2" in s_client(ports, tmp_path, *session)


def s_client(ports: Ports, folder: Path, *flags: str, commands: str = "") -> str:
    needs_programs("openssl")
    authority = folder / "authority.pem"
    authority.write_text(AUTHORITY.pem)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{ports.tls}"]
    command += ["-CAfile", str(authority)]
    done = subprocess.run(
        [*command, *flags],
        input=commands,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout + done.stderr


# --- Proxies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", ["haproxy", "nginx"])
def test_a_proxy_shares_443_by_name(tmp_path: Path, proxy: str) -> None:
    """As the page has it: the proxy looks at the name, and says where the client is."""
    needs_programs(proxy)
    ports = Ports()
    front, web = free_tcp_port(), free_tcp_port()
    written = block(proxy).replace("turn.example.org", "relay.test")
    written = written.replace("127.0.0.1:5349", f"127.0.0.1:{ports.tls}")
    written = written.replace("127.0.0.1:8443", f"127.0.0.1:{web}")
    with (
        running_relay(*ports.arguments(tmp_path), "--proxy-protocol-from=127.0.0.1/32") as relay,
        PROXIES[proxy](written, front, tmp_path),
    ):
        context = ssl.create_default_context(cadata=AUTHORITY.pem)
        until_listening(front)
        with StreamClient(
            ("127.0.0.1", front), relay.username, relay.password, context=context
        ) as alice:
            assert alice.maps() == alice.address
            alice.allocates()


def block(language: str) -> str:
    """Return the configuration on the page."""
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```$", STREAMS_MD.read_text(), re.MULTILINE | re.DOTALL
    )
    (only,) = found
    return only


@contextmanager
def haproxy(written: str, front: int, folder: Path) -> Iterator[None]:
    file = folder / "haproxy.cfg"
    timeouts = "timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
    web = "backend web\n mode tcp\n server none 127.0.0.1:9\n"
    file.write_text(f"defaults\n {timeouts}{written.replace(':443', f':{front}')}\n{web}")
    with running(["haproxy", "-db", "-f", str(file)]):
        yield


@contextmanager
def nginx(written: str, front: int, folder: Path) -> Iterator[None]:
    file = folder / "nginx.conf"
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    load = f"load_module {module};\n" if module.exists() else ""
    if not load:
        missing("nginx has no stream module (libnginx-mod-stream)")
    written = written.replace("listen 443;", f"listen {front};")
    written = written.replace("listen [::]:443;", f"listen [::]:{front};")
    file.write_text(
        f"{load}daemon off; pid {folder}/pid; error_log stderr;\nevents {{}}\n{written}"
    )
    with running(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(file)]):
        yield


PROXIES: Final = {"haproxy": haproxy, "nginx": nginx}


@contextmanager
def running(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def until_listening(port: int) -> None:
    """Knock until somebody opens."""
    give_up_at = time.monotonic() + TIMEOUT
    while time.monotonic() < give_up_at:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
    raise AssertionError("nobody listens")
