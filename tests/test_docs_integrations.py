"""What ``docs/integrations`` tells operators to write, fed to the software it is for."""

import base64
import hmac
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from relay.config.reading import read
from tests.otherserver import running, until_answered, wait_for
from tests.process import CHECKOUT, TIMEOUT, RelayProcess, free_port, free_tcp_port
from tests.turnclient import TurnClient

PAGES = CHECKOUT / "docs/integrations"
SECRET = "north"
SERVER = "turn.example.org"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a language in a page."""
    text = (PAGES / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block(page: str, language: str) -> str:
    (found,) = blocks(page, language)
    return found


def rest_password(username: str) -> str:
    """By the convention, in other words than the relay's."""
    return base64.b64encode(hmac.digest(SECRET.encode(), username.encode(), "sha1")).decode()


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "auth.secret"
    file.write_text(SECRET)
    return file


@pytest.mark.parametrize("page", ["README.md", "coturn.md"])
def test_the_relays_own_lines_are_good(page: str, tmp_path: Path, secret_file: Path) -> None:
    lines = "".join(one for one in blocks(page, "ini") if "[Service]" not in one).replace(
        "/etc/firezone/auth.secret", str(secret_file)
    )
    (tmp_path / "relay.conf").write_text(lines)
    config = read(["-c", str(tmp_path / "relay.conf")], {}).config

    assert config.public_ip4 == "192.0.2.1"
    assert config.auth_secrets == (SECRET,)
    assert config.realm == SERVER


def test_every_key_of_coturn_has_its_row() -> None:
    """Those that Debian's configuration file knows, commented out or not."""
    sample = Path("/etc/turnserver.conf")
    if not sample.exists():
        pytest.skip("Debian's coturn is not installed")
    keys = set(re.findall(r"^#?([a-z][a-z0-9-]+)(?:=.*|\s*)$", sample.read_text(), re.MULTILINE))
    table = (PAGES / "coturn.md").read_text().partition("## Key by key")[2]
    named = set(re.findall(r"`([a-z0-9-]+)`", table))

    assert len(keys) > 90
    assert keys - named == set()


@pytest.mark.slow
def test_coturn_and_the_relay_take_the_same_credential(tmp_path: Path, secret_file: Path) -> None:
    """So services notice nothing when one takes the place of the other."""
    if not (shutil.which("turnserver") and shutil.which("turnutils_uclient")):
        pytest.skip("coturn is not installed")
    username = f"{int(time.time()) + 3600}:alice"
    credential = (username, rest_password(username))
    port = free_port()
    written = block("coturn.md", "conf").replace("listening-port=3478", f"listening-port={port}")
    written = re.sub("external-ip=.*", "listening-ip=127.0.0.1\nrelay-ip=127.0.0.1", written)
    written = written.replace("denied-peer-ip=", "allow-loopback-peers\ndenied-peer-ip=")
    (tmp_path / "turnserver.conf").write_text(
        f"{written}\ncli-password=x\npidfile={tmp_path}/pid\nlog-file=stdout\n"
    )
    with (
        running(["turnserver", "-c", str(tmp_path / "turnserver.conf")], tmp_path / "coturn.log"),
        TurnClient(("127.0.0.1", port), *credential, realm=SERVER) as client,
    ):
        until_answered(port)
        assert client.allocates()[0] == "127.0.0.1"
    lines = [*blocks("coturn.md", "ini")[0].splitlines()]
    kept = [line for line in lines if not line.startswith(("listen-port", "public-ip4", "auth-"))]
    (tmp_path / "relay.conf").write_text("\n".join([*kept, f"auth-secret-file = {secret_file}"]))
    with (
        RelayProcess(f"--config={tmp_path / 'relay.conf'}", port=free_port()) as relay,
        TurnClient(("127.0.0.1", relay.port), *credential, realm=SERVER) as client,
    ):
        assert client.allocates()[0] == "127.0.0.1"


@pytest.mark.slow
def test_prosody_hands_out_credentials_that_the_relay_takes(
    tmp_path: Path, secret_file: Path
) -> None:
    if shutil.which("prosody") is None:
        pytest.skip("prosody is not installed")
    port = free_tcp_port()
    (tmp_path / "prosody.cfg.lua").write_text(
        f"""
        data_path = "{tmp_path}"; pidfile = "{tmp_path}/prosody.pid"; run_as_root = true
        daemonize = false; log = {{ {{ levels = {{ min = "info" }}, to = "console" }} }}
        interfaces = {{ "127.0.0.1" }}; c2s_ports = {{ {port} }}; s2s_ports = {{}}
        c2s_require_encryption = false; allow_unencrypted_plain_auth = true
        modules_enabled = {{ "saslauth", "disco", "external_services" }}
        modules_disabled = {{ "s2s", "tls" }}
        {block("jitsi.md", "lua")}
        VirtualHost "meet.example.org"
            authentication = "anonymous"
        """
    )
    command = ["prosody", "--config", str(tmp_path / "prosody.cfg.lua"), "-F"]
    with running(command, tmp_path / "prosody.log"):
        service = external_service(port, "meet.example.org")
    assert (service["type"], service["host"], service["port"]) == ("turn", SERVER, "3478")
    assert service["transport"] == "udp"
    with (
        RelayProcess(f"--auth-secret-file={secret_file}", port=free_port()) as relay,
        TurnClient(("127.0.0.1", relay.port), service["username"], service["password"]) as client,
    ):
        assert client.allocates()[0] == "127.0.0.1"


@pytest.mark.slow
def test_janus_uses_the_relay(tmp_path: Path) -> None:
    if shutil.which("janus") is None:
        pytest.skip("janus is not installed")
    written = block("janus.md", "libconfig")
    (tmp_path / "janus.jcfg").write_text(
        f'general: {{ admin_secret = "x" }}\n{written.replace(SERVER, "127.0.0.1")}'
    )
    log = tmp_path / "janus.log"
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = [f"--plugins-folder={empty}", f"--configs-folder={tmp_path}"]
    command = ["janus", f"--config={tmp_path / 'janus.jcfg'}", *folders, "--disable-colors"]
    with running(command, log):
        wait_for(lambda: "TURN server to use" in log.read_text(errors="replace"), log)
    assert "TURN server to use: 127.0.0.1:3478 (udp)" in log.read_text(errors="replace")


def test_synapse_reads_its_lines() -> None:
    config = pytest.importorskip("synapse.config.voip", reason="Synapse is not installed")
    yaml = pytest.importorskip("yaml", reason="Synapse is not installed")
    voip = config.VoipConfig(None)
    voip.read_config(yaml.safe_load(block("synapse.md", "yaml")), allow_secrets_in_config=True)

    assert voip.turn_uris == [f"turn:{SERVER}:3478?transport=udp"]
    assert voip.turn_shared_secret == SECRET
    assert voip.turn_user_lifetime == 86400 * 1000


def test_galenes_file_is_json() -> None:
    (server,) = json.loads(block("galene.md", "json"))

    assert server["urls"] == [f"turn:{SERVER}:3478?transport=udp"]
    assert (server["credential"], server["credentialType"]) == (SECRET, "hmac-sha1")


# --- Other people's servers ------------------------------------------------------------------


def external_service(port: int, host: str) -> dict[str, str]:
    """Ask a server of XMPP what it has of services elsewhere, as an anonymous user. XEP-0215."""
    stream = f"<stream:stream to='{host}' version='1.0' xmlns='jabber:client' {STREAMS}>"
    with connected(port) as xmpp:
        said(xmpp, f"<?xml version='1.0'?>{stream}", "</stream:features>")
        said(xmpp, "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='ANONYMOUS'/>", "/>")
        said(xmpp, stream, "</stream:features>")
        bind = "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>"
        said(xmpp, f"<iq type='set' id='1'>{bind}</iq>", "</iq>")
        asks = "<services xmlns='urn:xmpp:extdisco:2'/>"
        answer = said(xmpp, f"<iq type='get' id='2' to='{host}'>{asks}</iq>", "</iq>")
    (service,) = ET.fromstring(answer)[0]
    return dict(service.attrib)


STREAMS = "xmlns:stream='http://etherx.jabber.org/streams'"


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """Connect as soon as somebody listens."""
    give_up_at = time.monotonic() + TIMEOUT
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < give_up_at, "nobody listens"
    with sock:
        yield sock


def said(xmpp: socket.socket, text: str, end: str) -> str:
    """Say something, and return what comes back, up to its *end*."""
    xmpp.sendall(text.encode())
    heard = ""
    while not heard.endswith(end):
        part = xmpp.recv(4096).decode()
        assert part, heard
        heard += part
    return heard
