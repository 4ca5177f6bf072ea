"""From flags, environment and file to a ``Config``, and from how it ends to an exit code."""

import argparse
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import configargparse

from relay.config import Config, ConfigError
from relay.daemon import Daemon, StartError
from relay.logs import configure, parse_levels
from relay.net.addresses import is_local, outward_address
from relay.options import DEFAULT_FILE, OPTIONS, Option
from relay.turn.auth import mint
from relay.version import __version__

logger = logging.getLogger("relay.cli")

PROGRAM: Final = "firezone-relay"

# From <sysexits.h>.
EX_USAGE: Final = 64
EX_SOFTWARE: Final = 70
EX_CONFIG: Final = 78

_BY_NAME: Final = {option.name: option for option in OPTIONS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        return _run(read(sys.argv[1:] if argv is None else argv, os.environ))
    except UsageError as error:
        return _fail(EX_USAGE, f"{error} (--help lists the options)")
    except ConfigError as error:
        return _fail(EX_CONFIG, str(error))
    except StartError as error:
        return _fail(error.exit_code, str(error))
    except Exception:
        logger.exception("stopped by a bug")
        return EX_SOFTWARE


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asks for, once everything has been read."""

    config: Config
    texts: dict[str, tuple[str, ...]]  # every option that has a value, as it could be written
    log_format: str
    log_levels: dict[str, int]
    check_config: bool
    print_config: bool
    mint: int | None  # seconds


def read(argv: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Read the options: a flag beats a variable beats a line of the file.

    Raises UsageError for a bad command line, ConfigError for a bad value.
    """
    variables = {option.variable for option in OPTIONS}
    set_variables = {k: v for k, v in environment.items() if v and k in variables}
    for option in OPTIONS:
        if option.variable in set_variables:
            _parse(option, set_variables[option.variable], f"variable {option.variable}")
    namespace = _parser(argv).parse_args(list(argv), env_vars=set_variables)
    values: dict[str, Any] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for option in OPTIONS:
        given = _texts(getattr(namespace, option.dest))
        parsed = [_parse(option, text, "command line") for text in given]
        if parsed:
            values[option.name] = sum(parsed, ()) if option.repeatable else parsed[-1]
            texts[option.name] = given
        elif option.default is not None:
            values[option.name] = option.parse(option.default)
            texts[option.name] = (option.default,)
        else:
            values[option.name] = () if option.repeatable else None
    _find_public_addresses(values, texts)
    config = Config(**{o.field: values[o.name] for o in OPTIONS if o.field is not None})
    return Command(
        config,
        texts,
        log_format=values["log-format"],
        log_levels=parse_levels(values["log-level"]),
        check_config=namespace.check_config,
        print_config=namespace.print_config,
        mint=namespace.mint,
    )


class UsageError(Exception):
    """The command line is wrong."""


def _run(command: Command) -> int:
    configure(command.log_format, command.log_levels)
    if command.print_config:
        for option in OPTIONS:
            for text in command.texts.get(option.name, ()):
                print(f"{option.name} = {text}")
    if command.check_config:
        print("the configuration is good")
    if command.mint is not None:
        _print_credential(command.config, command.mint)
    if command.print_config or command.check_config or command.mint is not None:
        return os.EX_OK
    _warn_about_secret_file(command.texts)
    daemon = Daemon(command.config)
    daemon.run()
    return os.EX_OK


def _print_credential(config: Config, seconds: int) -> None:
    if config.relay_secret is None:
        raise ConfigError(
            "--mint needs --relay-secret-file: without it every relay draws a secret of its own"
        )
    expires = int(time.time()) + seconds
    username, password = mint(expires, secrets.token_urlsafe(12), config.relay_secret)
    credential = {
        "urls": config.urls,
        "username": username,
        "credential": password,
        "expires": expires,
    }
    print(json.dumps(credential))


def _warn_about_secret_file(texts: Mapping[str, Iterable[str]]) -> None:
    for path in texts.get("relay-secret-file", ()):
        if Path(path).stat().st_mode & 0o004:
            logger.warning("%s can be read by every user of this machine", path)


def _find_public_addresses(values: dict[str, Any], texts: dict[str, tuple[str, ...]]) -> None:
    """Ask the routing table when neither address is given; with no route, use loopback."""
    names = {
        "public-ip4-addr": (socket.AF_INET, "127.0.0.1"),
        "public-ip6-addr": (socket.AF_INET6, "::1"),
    }
    if any(values[name] for name in names):
        return
    found = {name: outward_address(family) for name, (family, _) in names.items()}
    if not any(found.values()):
        found = {name: loopback for name, (_, loopback) in names.items() if is_local(loopback)}
    for name, host in found.items():
        if host is not None:
            values[name] = host
            texts[name] = (host,)


def _parse(option: Option, text: str, source: str) -> Any:  # noqa: ANN401
    """Read one value. Raises ConfigError with the option, the value and its *source*."""
    try:
        return option.parse(text)
    except ValueError as error:
        raise ConfigError(f"{option.name} {text!r}: {error} ({source})") from None


def _texts(given: object) -> tuple[str, ...]:
    """Return what argparse has stored for an option as a tuple of texts."""
    match given:
        case None:
            return ()
        case bool():
            return (str(given).lower(),)
        case list():
            return tuple(given)
        case _:
            return (str(given),)


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Raises instead of printing and exiting."""

    def error(self, message: str) -> NoReturn:
        raised = sys.exc_info()[1]
        if isinstance(raised, ConfigError):  # from _open, which the parser would rephrase
            raise raised
        raise UsageError(message)


class _File(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """``key = value`` lines; ``#`` and ``;`` begin a comment."""

    def parse(self, stream: TextIO) -> dict[str, str | list[str]]:
        """Return text by option name. Raises ConfigError naming file and line."""
        items: dict[str, list[str]] = {}
        for number, line in enumerate(_lines(stream), 1):
            place = f"{stream.name} line {number}"
            try:
                parsed = super().parse([line])
            except configargparse.ConfigFileParserException:
                raise ConfigError(f"{line.strip()!r}: not 'key = value' ({place})") from None
            for key, value in parsed.items():
                option = _BY_NAME.get(key)
                if option is None:
                    raise ConfigError(f"{key!r}: there is no such option ({place})")
                if key in items and not option.repeatable:
                    raise ConfigError(f"{key!r}: given twice ({place})")
                for text in value if isinstance(value, list) else [value]:
                    if text:
                        _parse(option, str(text), place)
                        items.setdefault(key, []).append(str(text))
        return {
            key: texts if _BY_NAME[key].repeatable else texts[0] for key, texts in items.items()
        }


def _lines(stream: TextIO) -> Iterable[str]:
    try:
        yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{stream.name}: cannot be read: {error}") from None


def _open(path: str) -> TextIO:
    try:
        return Path(path).open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _parser(argv: Sequence[str]) -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description="A STUN and TURN relay. Every option is also an environment variable and a "
        "'key = value' line in a file; a flag beats a variable beats the file.",
        allow_abbrev=False,
        add_help=False,
        add_config_file_help=False,
        add_env_var_help=False,
        default_config_files=[] if _names_a_file(argv) else [DEFAULT_FILE],
        config_file_parser_class=_File,
        config_file_open_func=_open,
        formatter_class=argparse.HelpFormatter,
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        group = groups.get(option.group)
        if group is None:
            group = groups[option.group] = parser.add_argument_group(option.group)
        described = f"{option.help} [{option.variable}]"
        if option.default is not None and option.metavar is not None:
            described = f"{option.help} (default: {option.default}) [{option.variable}]"
        flag = "--" + option.name
        if option.metavar is None:
            group.add_argument(
                flag,
                env_var=option.variable,
                help=described,
                action=argparse.BooleanOptionalAction,
                default=None,
            )
        else:
            group.add_argument(
                flag,
                env_var=option.variable,
                help=described,
                metavar=option.metavar,
                action="append" if option.repeatable else "store",
            )
    other = parser.add_argument_group("other")
    other.add_argument(
        "-c",
        "--config",
        is_config_file=True,
        metavar="FILE",
        help=f"read options from this file (default: {DEFAULT_FILE}, if there is one)",
    )
    other.add_argument("--check-config", action="store_true", help="check the options and exit")
    other.add_argument("--print-config", action="store_true", help="print the options and exit")
    other.add_argument(
        "--mint",
        type=_seconds,
        metavar="SECONDS",
        help="print a credential for the secret of --relay-secret-file as JSON, and exit",
    )
    other.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    other.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _names_a_file(argv: Sequence[str]) -> bool:
    """Tell if a configuration file is given, so that the default one is not read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config")
    try:
        return parser.parse_known_args(argv)[0].config is not None
    except argparse.ArgumentError:
        return False  # -c without a value: the real parser will say so


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:12]) <= 10**10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 up")
    return int(text)


def _fail(exit_code: int, message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return exit_code
