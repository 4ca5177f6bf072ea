"""The unit files and samples: what systemd and nft say of them, and that they fit the code."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from relay.assembly import HTTP_DESCRIPTORS, MAX_CONNECTIONS, SPARE_DESCRIPTORS
from relay.config.options import DEFAULT_FILE, OPTIONS
from relay.config.reading import process_to_upgrade, read
from relay.host.inherited import ACTIVATED
from relay.net.listening import LISTEN_BUFFER
from relay.xdp.attach import FORWARDING, PRIVILEGES
from tests.certificates import Authority

ROOT = Path(__file__).parent.parent
SYSTEMD = ROOT / "contrib/systemd"
SERVICE = SYSTEMD / "firezone-relay.service"
SOCKET = SYSTEMD / "firezone-relay.socket"
XDP = SYSTEMD / "xdp.conf"
TLS = SYSTEMD / "tls.conf"
UPGRADE = SYSTEMD / "upgrade.conf"
STREAMS = SYSTEMD / "firezone-relay-streams.socket"
DEPLOY_HOOK = ROOT / "contrib/certbot/deploy-hook"
SYSCTL = SYSTEMD / "firezone-relay.sysctl.conf"
SAMPLE = SYSTEMD / "relay.conf"
ENVIRONMENT = SYSTEMD / "firezone-relay.env"
README = SYSTEMD / "README.md"
NFTABLES = ROOT / "contrib/nftables/firezone-relay.nft"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing"
)
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="nft is missing")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

DEFAULTS = {option.name: option.default for option in OPTIONS}


# --- The units ------------------------------------------------------------------------------


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    """In copies that start a program which is on this machine."""
    shutil.copy(SOCKET, tmp_path)
    shutil.copy(STREAMS, tmp_path)
    (tmp_path / SERVICE.name).write_text(with_a_program(SERVICE))
    complaints = output_of(
        "systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))
    ).splitlines()
    # It reads the units that ours depend on, too, and may not like those of this machine.
    assert [line for line in complaints if "firezone-relay" in line] == []


def with_a_program(unit: Path) -> str:
    """Return what is in a unit, with a program that is on this machine."""
    return unit.read_text().replace("/opt/firezone-relay/bin/firezone-relay", "/bin/true")


def test_drop_in_for_upgrades_asks_for_one() -> None:
    reset, command = settings(UPGRADE)["ExecReload"]
    assert reset == ""
    program, *arguments = command.replace("$MAINPID", "4711").split()
    assert settings(SERVICE)["ExecStart"] == [program]
    assert process_to_upgrade(arguments) == 4711


@needs_systemd
@pytest.mark.parametrize("drop_in", [XDP, TLS, UPGRADE], ids=["xdp", "tls", "upgrade"])
def test_systemd_finds_nothing_wrong_with_a_drop_in(tmp_path: Path, drop_in: Path) -> None:
    (tmp_path / SERVICE.name).write_text(with_a_program(SERVICE))
    folder = tmp_path / f"{SERVICE.name}.d"
    folder.mkdir()
    (folder / drop_in.name).write_text(with_a_program(drop_in))
    complaints = output_of("systemd-analyze", "verify", str(tmp_path / SERVICE.name)).splitlines()
    assert [line for line in complaints if "firezone-relay" in line] == []


def test_drop_in_gives_what_the_log_asks_for() -> None:
    drop_in = settings(XDP)
    capabilities = drop_in["AmbientCapabilities"][0].split()
    assert drop_in["CapabilityBoundingSet"][0].split() == capabilities
    assert PRIVILEGES.startswith(f"it takes {', '.join(capabilities[:-1])} and {capabilities[-1]}")
    assert "contrib/systemd/xdp.conf" in PRIVILEGES
    (variable,) = drop_in["Environment"]
    assert read([], dict([variable.split("=", 1)])).config.xdp == "auto"


def test_drop_in_for_tls_and_its_socket_unit_agree(tmp_path: Path) -> None:
    """On ports, and on where the hook of certbot puts the files."""
    variables = dict(
        word.split("=", 1) for line in settings(TLS)["Environment"] for word in line.split()
    )
    chain, key = (
        tmp_path / PurePosixPath(variables[name]).name for name in ("TLS_CERT", "TLS_KEY")
    )
    certificate = Authority().issue("relay.test")
    chain.write_text(certificate.pem)
    key.write_text(certificate.key)
    config = read([], {**variables, "TLS_CERT": str(chain), "TLS_KEY": str(key)}).config
    stream = settings(STREAMS)
    assert stream["ListenStream"] == [
        f"{host}:{port}"
        for port in (config.tcp_port, config.tls_port)
        for host in ("0.0.0.0", "[::]")
    ]
    assert stream["BindIPv6Only"] == ["ipv6-only"]
    assert stream["FileDescriptorName"] == [ACTIVATED]
    assert stream["Service"] == [SERVICE.name]
    assert f":-{PurePosixPath(variables['TLS_CERT']).parent}}}" in DEPLOY_HOOK.read_text()
    (group,) = settings(TLS)["SupplementaryGroups"]
    assert f":-{group}}}" in DEPLOY_HOOK.read_text()


def test_certbots_hook_copies_what_was_renewed(tmp_path: Path) -> None:
    """For the group, whole at each moment; then it reloads the service."""
    lineage, to, programs = (tmp_path / name for name in ("turn.example.org", "tls", "bin"))
    lineage.mkdir()
    programs.mkdir()
    (lineage / "fullchain.pem").write_text("chain")
    (lineage / "privkey.pem").write_text("key")
    (programs / "systemctl").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n')
    (programs / "systemctl").chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RENEWED_LINEAGE": str(lineage),
        "FIREZONE_RELAY_TLS": str(to),
        "FIREZONE_RELAY_GROUP": str(os.getegid()),
    }
    subprocess.run([DEPLOY_HOOK], env=environment, check=True)
    assert {path.name: path.read_text() for path in to.iterdir()} == {
        "fullchain.pem": "chain",
        "privkey.pem": "key",
    }
    assert {path.stat().st_mode & 0o777 for path in to.iterdir()} == {0o640}
    assert (tmp_path / "told").read_text() == (
        f"is-active --quiet {SERVICE.name}\nkill --signal=HUP --kill-whom=main {SERVICE.name}\n"
    )

    (lineage / "privkey.pem").write_text("another one's")
    environment["FIREZONE_RELAY_NAME"] = "other.example.org"
    subprocess.run([DEPLOY_HOOK], env=environment, check=True)
    assert (to / "privkey.pem").read_text() == "key"


def test_sysctls_let_the_program_look_up_routes() -> None:
    names = {line.split(" = ")[0] for line in SYSCTL.read_text().splitlines()}
    assert {name.replace("/", ".") for name in FORWARDING.values()} <= names


@needs_systemd
def test_systemd_finds_the_service_well_confined() -> None:
    """At most 1.5, of 10 for a service that may do everything."""
    report = output_of("systemd-analyze", "security", "--offline=true", "--no-pager", str(SERVICE))
    found = re.search(r"Overall exposure level for firezone-relay.service: ([\d.]+)", report)
    assert found is not None
    assert float(found[1]) <= 1.5


def test_service_is_not_started_again_when_that_would_not_help() -> None:
    service = settings(SERVICE)
    assert service["Restart"] == ["always"]
    codes = [int(code) for code in service["RestartPreventExitStatus"][0].split()]
    assert codes == [os.EX_USAGE, os.EX_NOPERM, os.EX_CONFIG]
    assert f"exit codes {codes[0]}, {codes[1]} and {codes[2]}" in README.read_text()


def test_service_has_the_descriptors_and_the_time_that_the_defaults_take() -> None:
    service = settings(SERVICE)
    ports = int(DEFAULTS["highest-port"] or 0) - int(DEFAULTS["lowest-port"] or 0) + 1
    needed = 2 * ports + SPARE_DESCRIPTORS + HTTP_DESCRIPTORS + MAX_CONNECTIONS
    assert int(service["LimitNOFILE"][0]) >= needed
    assert int(service["TimeoutStopSec"][0]) > int(DEFAULTS["drain-timeout"] or 0)


def test_socket_hands_over_what_the_relay_looks_for() -> None:
    socket = settings(SOCKET)
    port = DEFAULTS["listen-port"]
    assert socket["ListenDatagram"] == [f"0.0.0.0:{port}", f"[::]:{port}"]
    assert socket["BindIPv6Only"] == ["ipv6-only"]
    assert socket["FileDescriptorName"] == [ACTIVATED]
    assert socket["ReceiveBuffer"] == socket["SendBuffer"] == [f"{LISTEN_BUFFER >> 20}M"]
    assert SOCKET.stem == SERVICE.stem  # by which systemd knows whom it is for


# --- The steps of the README ----------------------------------------------------------------


def test_steps_are_commands_of_a_shell() -> None:
    blocks = steps()
    assert len(blocks) > 5
    for block in blocks:
        output_of("sh", "-n", "-c", block)


def test_steps_install_files_that_exist_where_others_look_for_them() -> None:
    targets = installed()
    assert targets[SERVICE] == PurePosixPath("/etc/systemd/system", SERVICE.name)
    assert targets[SOCKET] == PurePosixPath("/etc/systemd/system", SOCKET.name)
    assert targets[SAMPLE] == PurePosixPath(DEFAULT_FILE)
    assert targets[SYSCTL].parent == PurePosixPath("/etc/sysctl.d")
    assert all(source.is_file() for source in targets)

    service = settings(SERVICE)
    assert service["EnvironmentFile"] == [f"-{targets[ENVIRONMENT]}"]
    (program,) = service["ExecStart"]
    assert program == f"{venv()}/bin/firezone-relay"


def test_token_is_where_the_service_looks_for_it() -> None:
    """Without a path: systemd looks into /etc/credstore, and goes on if it is not there."""
    (credential,) = settings(SERVICE)["LoadCredential"]
    name, _, file = credential.partition(":")
    assert name == "FIREZONE_TOKEN"
    assert "/" not in file
    assert f"/dev/stdin /etc/credstore/{file} <<" in README.read_text()


def test_what_the_steps_install_they_uninstall() -> None:
    *_, uninstall = steps()
    removed = [
        PurePosixPath(word)
        for command in commands(uninstall)
        if command[0] == "rm"
        for word in command[2:]
    ]
    token = PurePosixPath("/etc/credstore", settings(SERVICE)["LoadCredential"][0].split(":")[1])
    for target in [*installed().values(), venv(), token]:
        assert any(target.is_relative_to(path) for path in removed), target


# --- The samples ----------------------------------------------------------------------------

IN_SAMPLE = re.compile(r"^# ([a-z0-9-]+) = (.+)$", re.MULTILINE)
MENTIONED = re.compile(r"^# ([A-Z0-9_]+)=(.+)$", re.MULTILINE)


def test_sample_configuration_is_one_that_changes_nothing() -> None:
    assert read(["-c", str(SAMPLE)], {}).config == read(["-c", os.devnull], {}).config


def test_sample_configuration_has_every_option_once() -> None:
    names = [name for name, _ in IN_SAMPLE.findall(SAMPLE.read_text())]
    assert len(names) == len(set(names))
    assert set(names) == {option.name for option in OPTIONS} - {"rng-seed"}


def test_sample_configuration_shows_the_defaults_and_good_values_for_the_rest(
    tmp_path: Path,
) -> None:
    shown = dict(IN_SAMPLE.findall(SAMPLE.read_text()))
    files = {option.name for option in OPTIONS if option.metavar == "FILE"}
    for name, value in shown.items():
        assert DEFAULTS[name] in (None, value), name

    lines = [f"{name} = {value}\n" for name, value in shown.items() if name not in files]
    (tmp_path / "relay.conf").write_text("".join(lines))
    texts = read(["-c", str(tmp_path / "relay.conf")], {}).config.texts
    assert shown.keys() - files <= texts.keys()


def test_sample_environment_names_variables_that_are_read() -> None:
    text = ENVIRONMENT.read_text()
    assert all(not line or line.startswith("#") for line in text.splitlines())
    variables = dict(MENTIONED.findall(text))
    assert len(variables) > 3
    assert variables.keys() <= {option.variable for option in OPTIONS}
    read(["-c", os.devnull], variables)


def test_sysctl_settings_are_what_the_relay_wants() -> None:
    values = settings(SYSCTL)
    assert values["net.core.rmem_max"] == values["net.core.wmem_max"] == [str(LISTEN_BUFFER)]
    _, highest = values["net.ipv4.ip_local_port_range"][0].split()
    assert int(highest) == int(DEFAULTS["lowest-port"] or 0) - 1
    for key in values:
        assert Path("/proc/sys", *key.split(".")).exists()


@needs_nft
@needs_root
def test_nft_loads_the_ruleset_any_number_of_times() -> None:
    """In a network of its own."""
    load = f"nft -c -f {NFTABLES} && nft -f {NFTABLES} && nft -f {NFTABLES} && nft list ruleset"
    ruleset = output_of("unshare", "--net", "sh", "-c", load)
    ports = "{listen-port}, {lowest-port}-{highest-port}".format(**DEFAULTS)
    assert ruleset.count("notrack") == 2  # one for each direction, not for each time
    assert f"elements = {{ {ports} }}" in ruleset
    assert f"tcp dport {(DEFAULTS['http-addr'] or '').rpartition(':')[2]} reject" in ruleset


# --- Helpers --------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """Run a command that must succeed, and return all that it prints."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def settings(file: Path) -> dict[str, list[str]]:
    """Return the values of each key of a file with ``key=value`` lines."""
    values: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            values.setdefault(key.strip(), []).append(value.strip())
    return values


def steps() -> list[str]:
    """Return what the README says to type, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.splitlines() if line]


def installed() -> dict[Path, PurePosixPath]:
    """Return which file of the checkout the first steps put where."""
    targets: dict[Path, PurePosixPath] = {}
    for command in commands(steps()[0]):
        if command[0] != "install":
            continue
        match command:
            case ["install", "-D", "-m", "0644", source, target]:
                targets[ROOT / source] = PurePosixPath(target)
            case ["install", "-m", "0644", "-t", directory, *sources]:
                for source in sources:
                    targets[ROOT / source] = PurePosixPath(directory, Path(source).name)
            case _:
                raise AssertionError(command)
    return targets


def venv() -> PurePosixPath:
    """Return the directory in which the first steps make a virtual environment."""
    (path,) = (c[3] for c in commands(steps()[0]) if c[:3] == ["python3", "-m", "venv"])
    return PurePosixPath(path)
