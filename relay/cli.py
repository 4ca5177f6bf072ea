"""From flags, environment and file to a ``Config``, and from how it ends to an exit code."""

import argparse
import functools
import glob
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import configargparse

from relay.config import Config, ConfigError, Reloaded
from relay.daemon import Daemon, DaemonError
from relay.logs import configure
from relay.net.addresses import is_local, outward_address
from relay.options import CREDENTIALS, DEFAULT_FILE, OPTIONS, Option, parse_token, read_token_file
from relay.turn.auth import mint
from relay.version import __version__

logger = logging.getLogger("relay.cli")

PROGRAM: Final = "firezone-relay"

_BY_NAME: Final = {option.name: option for option in OPTIONS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        return _run(arguments, read(arguments, os.environ))
    except UsageError as error:
        return _fail(os.EX_USAGE, f"{error} (--help lists the options)")
    except ConfigError as error:
        return _fail(os.EX_CONFIG, str(error))
    except DaemonError as error:
        return _fail(error.exit_code, str(error))
    except OSError as error:  # stdout is full, or closed
        return _fail(os.EX_OSERR, str(error))
    except Exception:
        logger.exception("stopped by a bug")
        return os.EX_SOFTWARE


@dataclass(frozen=True, slots=True)
class Command:
    """What the command line asks for, once everything has been read."""

    config: Config
    texts: dict[str, tuple[str, ...]]  # every option that has a value, as it could be written
    file: str  # of options; it need not exist
    secret_files: tuple[str, ...]
    check_config: bool
    print_config: bool
    mint: int | None  # seconds


def read(argv: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Read the options: a flag beats a variable beats a line of the file.

    Raises UsageError for a bad command line, ConfigError for a bad value.
    """
    _value.cache_clear()
    variables, bad_variable = _variables(environment)
    namespace = build_parser(_given_file(argv)).parse_args(list(argv), env_vars=variables)
    if bad_variable is not None:  # only now: --help should help
        raise bad_variable
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
    token_sources = _find_token(values, texts, environment)
    if values["token-file"] is None:
        _find_public_addresses(values, texts)
    config = Config(
        **{option.field: values[option.name] for option in OPTIONS},
        http_addr_given=namespace.http_addr is not None,
    )
    return Command(
        config,
        texts,
        file=namespace.config or DEFAULT_FILE,
        secret_files=(*token_sources, *texts.get("relay-secret-file", ())),
        check_config=namespace.check_config,
        print_config=namespace.print_config,
        mint=namespace.mint,
    )


class UsageError(Exception):
    """The command line is wrong."""


def _variables(environment: Mapping[str, str]) -> tuple[dict[str, str], ConfigError | None]:
    """Return the variables that hold good values, and what is wrong with the first other one."""
    good: dict[str, str] = {}
    bad: ConfigError | None = None
    for option in OPTIONS:
        text = environment.get(option.variable)
        if text:
            try:
                _parse(option, text, f"variable {option.variable}")
                good[option.variable] = text
            except ConfigError as error:
                bad = bad or error
    return good, bad


def reread(
    argv: Sequence[str], environment: Mapping[str, str], running: Command, config: Config
) -> Reloaded:
    """Read the options again for a relay that was started with *running* and has *config*.

    Raises UsageError or ConfigError, as :func:`read` does, also where something that was read
    cannot be read twice.
    """
    for path in (running.file, *running.secret_files):
        if Path(path).exists() and not Path(path).is_file():
            raise ConfigError(f"{path}: is no regular file and cannot be read again")
    wanted = read(argv, environment).config
    changed = [o for o in OPTIONS if getattr(wanted, o.field) != getattr(config, o.field)]
    return Reloaded(
        replace(config, **{o.field: getattr(wanted, o.field) for o in changed if o.reloads}),
        changed=tuple(option.name for option in changed if option.reloads),
        needs_restart=tuple(option.name for option in changed if not option.reloads),
    )


def _run(argv: Sequence[str], command: Command) -> int:
    configure(command.config.log_format, command.config.log_levels)
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
    _warn_about_secret_files(command.secret_files)
    daemon = Daemon(command.config, reread=partial(reread, argv, os.environ, command))
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


def _warn_about_secret_files(paths: Iterable[str]) -> None:
    for path in paths:
        if Path(path).stat().st_mode & 0o004:
            logger.warning("%s can be read by every user of this machine", path)


def _find_token(
    values: dict[str, Any], texts: Mapping[str, tuple[str, ...]], environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Look for a token where it may be; return the files that it was read from.

    In --token-file; in FIREZONE_TOKEN, itself or as a path; in the credentials of systemd.
    """
    if values["token-file"] is not None:
        return texts["token-file"]
    variable = environment.get("FIREZONE_TOKEN")
    directory = environment.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory or "/nowhere", "FIREZONE_TOKEN")
    source = "variable FIREZONE_TOKEN"
    try:
        if variable and not _is_file(variable):
            values["token-file"] = parse_token(variable)
            return ()
        if variable:
            source, path = f"{source}, file {variable}", variable
        elif directory and not _is_missing(credential):
            source, path = f"file {credential}", str(credential)
        else:
            return ()
        values["token-file"] = read_token_file(path)
    except ValueError as error:
        raise ConfigError(f"the token {error} ({source})") from None
    return (path,)


def _is_missing(path: Path) -> bool:
    """Tell if there is no such file; one that cannot be looked at is not missing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # as a name it is too long, or has a NUL in it
        return False


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
        return _value(option, text)
    except ValueError as error:
        raise ConfigError(f"{option.name} {text!r}: {error} ({source})") from None


@functools.cache  # a file may be a pipe, which can be read only once
def _value(option: Option, text: str) -> Any:  # noqa: ANN401
    if not text.isprintable() or (text != text.strip() and not option.repeatable):
        raise ValueError("holds control characters, or blanks at its ends")
    return option.parse(text)


def _texts(given: object) -> tuple[str, ...]:
    """Return what argparse has stored for an option as a tuple of texts."""
    match given:
        case None:
            return ()
        case bool():
            return (str(given).lower(),)
        case []:
            return ("--",)  # argparse drops it, although it is a value here
        case list():
            return tuple("--" if text == [] else text for text in given)
        case _:
            return (str(given),)


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Raises instead of printing and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _File(configargparse.ConfigFileParser):  # type: ignore[misc]
    """``key = value`` lines, the value as it stands; ``#`` or ``;`` begins a comment line."""

    def get_syntax_description(self) -> str:
        return "Lines of a file: key = value"

    def parse(self, stream: TextIO) -> dict[str, str | list[str]]:
        """Return text by option name. Raises ConfigError naming file and line."""
        texts: dict[str, list[str]] = {}
        for number, raw_line in enumerate(_lines(stream), 1):
            line = raw_line.strip()
            if not line or line[0] in "#;":
                continue
            place = f"{stream.name} line {number}"
            name, equals, text = (part.strip() for part in line.partition("="))
            if not name or not equals:
                raise ConfigError(f"{line!r}: not 'key = value' ({place})")
            option = _BY_NAME.get(name)
            if option is None:
                raise ConfigError(f"{name!r}: there is no such option ({place})")
            if name in texts and not option.repeatable:
                raise ConfigError(f"{name!r}: given twice ({place})")
            if text:
                _parse(option, text, place)
                texts.setdefault(name, []).append(text)
        return {name: t if _BY_NAME[name].repeatable else t[0] for name, t in texts.items()}


def _lines(stream: TextIO) -> Iterable[str]:
    try:
        yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{stream.name}: cannot be read: {error}") from None


def _open(path: str) -> TextIO:
    try:
        return Path(path).open(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = path or "''"
        raise ConfigError(f"{shown}: cannot be read: {reason}") from None


def _given_file(argv: Sequence[str]) -> str | None:
    """Return the file that the command line names. Raises ConfigError if it cannot be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config")
    try:
        path: str | None = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        return None  # -c without a value: the real parser will say so
    if path is not None and not {"-h", "--help", "--version"} & set(argv):
        _open(path).close()
    return path


def build_parser(file: str | None = None) -> _Parser:
    """Build the parser that reads *file*, or the default file if there is one."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [-c FILE] [option ...]",
        description="A STUN and TURN relay. Every option is also an environment variable, named "
        "in brackets, and a 'key = value' line in a file; a flag beats a variable beats the file.",
        epilog=f"Signals, exit codes and metrics are in README.md and in {PROGRAM}(8).",
        allow_abbrev=False,
        add_help=False,
        add_config_file_help=False,
        add_env_var_help=False,
        default_config_files=[glob.escape(file) if file is not None else DEFAULT_FILE],
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
    reading = parser.add_argument_group("Read and check the options")
    reading.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help=f"read options from this file (default: {DEFAULT_FILE}, if there is one)",
    )
    reading.add_argument("--check-config", action="store_true", help="check the options and exit")
    reading.add_argument("--print-config", action="store_true", help="print the options and exit")
    groups[CREDENTIALS].add_argument(
        "--mint",
        type=_seconds,
        metavar="SECONDS",
        help="print a credential for the secret of --relay-secret-file as JSON, and exit",
    )
    other = parser.add_argument_group("Other")
    other.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help="print the version and exit",
    )
    other.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _seconds(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 up")
    return int(text)


def _fail(exit_code: int, message: str) -> int:
    """Say on one line, whatever is in it, what is wrong."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"{PROGRAM}: {line}", file=sys.stderr)
    return exit_code
