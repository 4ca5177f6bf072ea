"""From the command line, the environment and a file to a ``Config``."""

import argparse
import io
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import configargparse

from relay.config import parsing
from relay.config.files import read_file
from relay.config.model import Config, ConfigError, Reloaded
from relay.config.options import CREDENTIALS, DEFAULT_FILE, OPTIONS, Option
from relay.net.addresses import is_local, outward_address
from relay.version import __version__

PROGRAM: Final = "firezone-relay"

_BY_NAME: Final = {option.name: option for option in OPTIONS}


@dataclass(slots=True)
class Command:
    """What the command line asks for, once everything has been read."""

    config: Config
    file: str | None  # of options; None: there is none
    token_source: str | None  # if that is no option
    private_hosts: dict[str, str]  # by option: what the routing table says, and nobody can reach
    secret_files: tuple[str, ...]
    other_files: tuple[str, ...]  # that options name
    check_config: bool
    print_config: bool
    mint: int | None  # seconds
    mint_user: str | None  # whom it is for


def read(argv: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Read the options: a flag beats a variable beats a line of the file.

    Raises UsageError for a bad command line, ConfigError for a bad value.
    """
    return _read(argv, environment, _Reader(again=False))


def process_to_upgrade(argv: Sequence[str]) -> int | None:
    """Return which process is to be upgraded, if that is what is asked for. Raises UsageError.

    No option counts beside that, and none is read: the process has its own.
    """
    if not any(argument.partition("=")[0] == "--upgrade" for argument in argv):
        return None  # as a rule: the options need not be looked at twice
    process: int | None = build_parser().parse_args(list(argv), env_vars={}).upgrade
    alone = (["--upgrade", f"{process}"], [f"--upgrade={process}"])
    if process is not None and list(argv) not in alone:
        raise UsageError("--upgrade takes no other option: the running relay reads its own")
    return process


def _read(argv: Sequence[str], environment: Mapping[str, str], reader: "_Reader") -> Command:
    parser = build_parser()
    given = parser.parse_args(list(argv), env_vars={})  # --help ends here, before files are read
    if given.mint_user is not None and given.mint is None:
        raise UsageError("--mint-user says whom --mint is for, and that is not there")
    variables = _variables(environment, reader)
    file, lines = _file(given.config, reader)
    namespace = parser.parse_args(
        list(argv), env_vars=variables, config_file_contents=json.dumps(lines)
    )
    values: dict[str, Any] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for option in OPTIONS:
        written = _texts(getattr(namespace, option.dest))
        parsed = [reader.value(option, text, "command line") for text in written]
        if parsed:
            values[option.name] = sum(parsed, ()) if option.repeatable else parsed[-1]
            texts[option.name] = written
        elif option.default is not None:
            values[option.name] = option.parse(option.default)
            texts[option.name] = (option.default,)
        else:
            values[option.name] = () if option.repeatable else None
    token_source, token_files = _find_token(values, texts, environment, reader)
    private_hosts: dict[str, str] = {}
    if values["token-file"] is None:
        private_hosts = _find_public_addresses(values, texts)
    config = Config(
        **{option.field: values[option.name] for option in OPTIONS},
        http_addr_given=namespace.http_addr is not None,
        texts=texts,
    )
    _check_certificate(config)
    return Command(
        config,
        file=file,
        token_source=token_source,
        private_hosts=private_hosts,
        secret_files=(*token_files, *_files(texts, are_secret=True)),
        other_files=(*_files(texts, are_secret=False),),
        check_config=namespace.check_config,
        print_config=namespace.print_config,
        mint=namespace.mint,
        mint_user=namespace.mint_user,
    )


def _files(texts: Mapping[str, tuple[str, ...]], *, are_secret: bool) -> Iterator[str]:
    """Return the files that options name, of secrets or others, but for the token's."""
    for option in OPTIONS:
        if option.in_file and option.is_secret is are_secret and option.name != "token-file":
            yield from texts.get(option.name, ())


def _check_certificate(config: Config) -> None:
    """See if TLS can be spoken with what there is. Raises ConfigError."""
    if config.tls_identity is not None:
        try:
            config.tls_identity.context()
        except ValueError as error:
            raise ConfigError(f"tls-cert and tls-key: {error}") from None


class UsageError(Exception):
    """The command line is wrong."""


def _variables(environment: Mapping[str, str], reader: "_Reader") -> dict[str, str]:
    """Return the variables that are set. Raises ConfigError if one is wrong."""
    texts = {o.variable: environment[o.variable] for o in OPTIONS if environment.get(o.variable)}
    for option in OPTIONS:
        if option.variable in texts:
            reader.value(option, texts[option.variable], f"variable {option.variable}")
    return texts


def reread(
    argv: Sequence[str], environment: Mapping[str, str], running: Command, config: Config
) -> Reloaded:
    """Read the options again for a relay that was started with *running* and has *config*.

    Raises ConfigError, also where a file is gone or cannot be read again. *running* is told which
    file was read.
    """
    try:
        command = _read(argv, environment, _Reader(again=True))
    except UsageError as error:  # of a command line that was good at the start
        raise ConfigError(str(error)) from None
    if running.file is not None and command.file is None:
        raise ConfigError(f"{running.file}: is gone")
    running.file = command.file
    wanted = command.config
    changed = [o for o in OPTIONS if getattr(wanted, o.field) != getattr(config, o.field)]
    new = [option for option in changed if option.reloads]
    reloaded = replace(
        config,
        texts={**config.texts, **{o.name: wanted.texts.get(o.name, ()) for o in new}},
        **{option.field: getattr(wanted, option.field) for option in new},
    )
    _check_certificate(reloaded)
    return Reloaded(
        reloaded,
        changed=tuple(option.name for option in new),
        needs_restart=tuple(option.name for option in changed if not option.reloads),
    )


def _find_token(
    values: dict[str, Any],
    texts: Mapping[str, tuple[str, ...]],
    environment: Mapping[str, str],
    reader: "_Reader",
) -> tuple[str | None, tuple[str, ...]]:
    """Look for a token where it may be; return the source if that is no option, and its files.

    In --token-file; in FIREZONE_TOKEN, itself or as a path; in the credentials of systemd.
    """
    if values["token-file"] is not None:
        return None, texts["token-file"]
    variable = environment.get("FIREZONE_TOKEN")
    directory = environment.get("CREDENTIALS_DIRECTORY")
    credential = Path(directory or "/nowhere", "FIREZONE_TOKEN")
    source = place = "variable FIREZONE_TOKEN"
    try:
        if variable and not _is_file(variable):
            values["token-file"] = parsing.token(variable)
            return source, ()
        if variable:
            place, path = f"{source}, file {variable}", variable
        elif directory and not _is_missing(credential):
            source, place, path = "credentials directory", f"file {credential}", str(credential)
        else:
            return None, ()
        values["token-file"] = parsing.token(reader.text(path))
    except ValueError as error:
        raise ConfigError(f"the token {error} ({place})") from None
    return source, (path,)


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
    """Tell if a text, which may be a token as well, names a file."""
    try:
        Path(text).lstat()
    except PermissionError:
        return text.startswith("/")
    except (OSError, ValueError):  # also if as a name it is too long, or has a NUL in it
        return False
    return True


# RFC 1918, RFC 6598, RFC 4193, and loopback.
_PRIVATE: Final = tuple(
    ip_network(cidr)
    for cidr in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8"),
        *("fc00::/7", "::1/128"),
    )
)


def _find_public_addresses(
    values: dict[str, Any], texts: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """Ask the routing table when neither address is given; with no route, use loopback.

    Returns those of the found ones, by option, that only the same network can reach.
    """
    names = {
        "public-ip4-addr": (socket.AF_INET, "127.0.0.1"),
        "public-ip6-addr": (socket.AF_INET6, "::1"),
    }
    if any(values[name] for name in names):
        return {}
    found = {name: outward_address(family) for name, (family, _) in names.items()}
    if not any(found.values()):
        found = {name: loopback for name, (_, loopback) in names.items() if is_local(loopback)}
    for name, host in found.items():
        if host is not None:
            values[name] = host
            texts[name] = (host,)
    return {
        name: host
        for name, host in found.items()
        if host is not None and any(ip_address(host) in network for network in _PRIVATE)
    }


class _Reader:
    """Reads values and files, every value once: its file may be a pipe.

    *again*: files are read for the second time, see :func:`relay.config.files.read_file`.
    """

    def __init__(self, *, again: bool) -> None:
        self._again = again
        self._values: dict[tuple[str, str], Any] = {}

    def value(self, option: Option, text: str, source: str) -> Any:  # noqa: ANN401
        """Read one value. Raises ConfigError with the option, the value and its *source*."""
        key = (option.name, text)
        try:
            if key not in self._values:
                self._values[key] = self._parse(option, text)
        except ValueError as error:
            raise ConfigError(f"{option.name} {text!r}: {error} ({source})") from None
        return self._values[key]

    def text(self, path: str) -> str:
        """Return what is in a file that should be UTF-8. Raises ValueError with the reason."""
        return self.content(path).decode("utf-8", "replace")

    def content(self, path: str) -> bytes:
        """Return what is in a file. Raises ValueError with the reason."""
        return read_file(path, again=self._again)

    def _parse(self, option: Option, text: str) -> Any:  # noqa: ANN401
        if not text.isprintable() or (text != text.strip() and not option.repeatable):
            raise ValueError("holds control characters, or blanks at its ends")
        return option.parse(self.text(text) if option.in_file else text)


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


class _Lines(configargparse.ConfigFileParser):  # type: ignore[misc]
    """Takes what ``_file`` has read: as JSON, since ConfigArgParse passes on nothing but text."""

    def parse(self, stream: TextIO) -> dict[str, str | list[str]]:
        return dict(json.load(stream))


def _file(path: str | None, reader: _Reader) -> tuple[str | None, dict[str, str | list[str]]]:
    """Read the file at *path*, or the default file if there is one: its path, text by option.

    Lines are ``key = value``, the value as it stands; ``#`` or ``;`` begins a comment line.
    Raises ConfigError naming file and line. What may be a line of another file, perhaps of
    secrets, is not quoted.
    """
    if path is None:
        if _is_missing(Path(DEFAULT_FILE)):
            return None, {}
        path = DEFAULT_FILE
    shown = path or "''"
    try:
        content = reader.content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}") from None
    texts: dict[str, list[str]] = {}
    for number, raw_line in enumerate(io.StringIO(content, newline=None), 1):
        line = raw_line.strip()
        if not line or line[0] in "#;":
            continue
        place = f"{path} line {number}"
        name, equals, text = (part.strip() for part in line.partition("="))
        if not name or not equals:
            raise ConfigError(f"not 'key = value' ({place})")
        option = _BY_NAME.get(name)
        if option is None:
            named = f"{name!r}: " if re.fullmatch("[a-z0-9-]{1,40}", name) else ""
            raise ConfigError(f"{named}there is no such option ({place})")
        if name in texts and not option.repeatable:
            raise ConfigError(f"{name!r}: given twice ({place})")
        if text:
            reader.value(option, text, place)
            texts.setdefault(name, []).append(text)
    return path, {name: t if _BY_NAME[name].repeatable else t[0] for name, t in texts.items()}


def build_parser() -> _Parser:
    """Build the parser of the command line."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [-c FILE] [option ...]",
        description="A STUN and TURN relay. Every option is also an environment variable, named "
        "in brackets, and a 'key = value' line in a file; a flag beats a variable beats the file.",
        epilog=f"'{PROGRAM} probe URL' tells if a server is all right, any server (probe --help). "
        f"Signals, exit codes and metrics are in docs/operating.md and in {PROGRAM}(8).",
        allow_abbrev=False,
        add_help=False,
        add_config_file_help=False,
        add_env_var_help=False,
        config_file_parser_class=_Lines,
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
    reading.add_argument(
        "--check-config",
        action="store_true",
        help="check the options, name what is risky, and exit",
    )
    reading.add_argument("--print-config", action="store_true", help="print the options and exit")
    groups[CREDENTIALS].add_argument(
        "--mint",
        type=_seconds,
        metavar="SECONDS",
        help="print a credential for the secret of --auth-secret-file, or else "
        "--relay-secret-file, as JSON, and exit",
    )
    groups[CREDENTIALS].add_argument(
        "--mint-user",
        type=_credential_user,
        metavar="NAME",
        help="whom that is for: the username is EXPIRY:NAME (default: drawn at random)",
    )
    other = parser.add_argument_group("Other")
    other.add_argument(
        "--upgrade",
        type=_process,
        metavar="PID",
        help="have the running relay PID start its program anew, which goes on with all that it "
        "has, and wait until it does; like SIGUSR2, but it tells what comes of it",
    )
    other.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help="print the version and exit",
    )
    other.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _credential_user(text: str) -> str:
    try:
        return parsing.credential_user(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _process(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a process")
    return int(text)


def _seconds(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 up")
    return int(text)
