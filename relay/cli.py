"""The command: what it is told to do, and the exit code it ends with."""

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from relay.assembly import DaemonError
from relay.config.credentials import as_json
from relay.config.model import Config, ConfigError
from relay.config.options import OPTIONS
from relay.config.reading import (
    PROGRAM,
    Command,
    UsageError,
    process_to_upgrade,
    read,
    reread,
)
from relay.config.risks import look, risks
from relay.daemon import CAUGHT, Daemon
from relay.observe.logs import configure
from relay.turn.users import mint, mint_rest
from relay.upgrade.incoming import Incoming, UpgradeError
from relay.upgrade.launch import Launcher
from relay.upgrade.request import RequestError, ask

logger = logging.getLogger("relay.cli")

PROBE: Final = "probe"
INTERRUPTED: Final = 130  # what a shell makes of SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    incoming = None
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == [PROBE]:
        return _probe(arguments[1:])
    try:
        incoming = Incoming.from_environment(os.environ)
        if incoming is not None:
            incoming.begin()
        process = process_to_upgrade(arguments)
        if process is not None:
            print(ask(process))
            return os.EX_OK
        return _run(arguments, read(arguments, os.environ), incoming)
    except UsageError as error:
        return _fail(os.EX_USAGE, f"{error} (--help lists the options)", incoming)
    except (ConfigError, UpgradeError) as error:
        return _fail(os.EX_CONFIG, str(error), incoming)
    except RequestError as error:
        return _fail(os.EX_UNAVAILABLE, f"not upgraded: {error}", incoming)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # stdout is full, or closed
        return _fail(os.EX_OSERR, str(error), incoming)
    except Exception:
        logger.exception("stopped by a bug")
        if incoming is not None:
            incoming.failed("the new process is stopped by a bug, see above")
        return os.EX_SOFTWARE


def _probe(arguments: Sequence[str]) -> int:
    """Be a client of some server instead of a relay."""
    # A relay that runs is not to hold what it never needs.
    from relay.probe.command import ProbeUsageError, main  # noqa: PLC0415

    try:
        return main(arguments)
    except ProbeUsageError as error:
        return _fail(os.EX_USAGE, f"{PROBE}: {error} ({PROBE} --help lists the options)", None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:  # stdout is full, or closed
        return _fail(os.EX_OSERR, str(error), None)


def _run(argv: Sequence[str], command: Command, incoming: Incoming | None) -> int:
    configure(command.config.log_format, command.config.log_levels)
    if command.print_config:
        _print_config(command)
    if command.check_config:
        _print_risks(command)
    if command.mint is not None:
        _print_credential(command.config, command.mint, command.mint_user)
    if command.print_config or command.check_config or command.mint is not None:
        return os.EX_OK
    _warn_about_private_hosts(command.private_hosts)
    _warn_about_secret_files(command.secret_files)
    # From here on the log tells, which waits for nobody, in the format that was asked for.
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)  # until they are caught
    launcher = Launcher(os.environ)
    try:
        files = [*command.secret_files, *command.other_files]
        files += [command.file] if command.file else []
        again = partial(reread, argv, os.environ, command)
        daemon = Daemon(command.config, again, files, launcher, incoming)
        daemon.run()
    except ConfigError as error:
        return _log_failure(os.EX_CONFIG, str(error), incoming)
    except UpgradeError as error:
        return _log_failure(os.EX_UNAVAILABLE, str(error), incoming)
    except DaemonError as error:
        return _log_failure(error.exit_code, str(error), incoming)
    if daemon.successor is not None and launcher.is_to_stay:
        launcher.stay(daemon.successor)
    return os.EX_OK


def _log_failure(exit_code: int, message: str, incoming: Incoming | None) -> int:
    """Log what is wrong; of a successor the process before it does, if it can be told."""
    if incoming is None or not incoming.failed(message):
        logger.error("%s", message)
    return exit_code


def _print_risks(command: Command) -> None:
    """Say what is risky, line by line, of a configuration that is good."""
    files = command.secret_files
    found = risks(command.config, files, look(files))
    for risk in found:
        print(f"risk: {risk.what}: {risk.text}")
    number = f", with {len(found)} risk{'' if len(found) == 1 else 's'}" if found else ""
    print(f"the configuration is good{number}")


def _print_config(command: Command) -> None:
    """Print a file that means the same, but for a token that no option names."""
    for option in OPTIONS:
        for text in command.config.texts.get(option.name, ()):
            print(f"{option.name} = {text}")
    config = command.config
    if command.token_source is not None:
        print(f"# token: from {command.token_source}")
    quotas = config.quotas
    for name, given, effective in (
        ("refused-peers", config.ignore_refused_peers, _refusal(config)),
        (
            "send-indications",
            config.send_indications,
            str(config.serves_send_indications).lower(),
        ),
        (
            "one-allocation-per-username",
            config.one_allocation_per_username,
            str(config.allows_takeover).lower(),
        ),
        (
            "max-allocations-per-username",
            config.max_allocations_per_username,
            quotas.allocations_per_user or 0,
        ),
        ("max-allocations-per-ip", config.max_allocations_per_ip, quotas.allocations_per_ip or 0),
        (
            "max-channels-per-allocation",
            config.max_channels_per_allocation,
            quotas.channels_per_allocation or 0,
        ),
    ):
        if given is None:
            why = "without" if config.token is None else "with"
            print(f"# {name} = {effective} (default {why} a token)")


def _refusal(config: Config) -> str:
    return "ignore" if config.ignores_refused_peers else "error"


def _print_credential(config: Config, seconds: int, user: str | None) -> None:
    expires, name = int(time.time()) + seconds, user or secrets.token_urlsafe(12)
    if config.auth_secrets is not None:
        username, password = mint_rest(expires, name, config.auth_secrets[0])
    elif config.relay_secret is not None:
        username, password = mint(expires, name, config.relay_secret)
    else:
        raise ConfigError(
            "--mint needs --auth-secret-file or --relay-secret-file: without them every relay "
            "draws a secret of its own"
        )
    print(as_json(config.urls, username, password, expires))


def _warn_about_private_hosts(hosts: Mapping[str, str]) -> None:
    if hosts:
        logger.warning(
            "%s, which the routing table gives, is private: nobody on the internet can reach it. "
            "Behind a NAT, as in most clouds, give the public address: %s",
            " and ".join(hosts.values()),
            " ".join(f"--{name} ADDR" for name in hosts),
        )


def _warn_about_secret_files(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(OSError):  # a pipe may be gone by now
            if Path(path).stat().st_mode & 0o004:
                logger.warning("%s can be read by every user of this machine", path)


def _fail(exit_code: int, message: str, incoming: Incoming | None) -> int:
    """Say on one line, whatever is in it, what is wrong; a successor to the process before it."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    if incoming is not None and incoming.failed(line):
        return exit_code
    try:
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody can be told, but the exit code still tells
        with suppress(OSError, ValueError):
            sys.stderr.close()  # or it would be tried again at exit, and change the code
    return exit_code
