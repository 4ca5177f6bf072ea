"""The command ``firezone-relay probe``: which servers, as whom, and how the result is told."""

import argparse
import os
import secrets
import ssl
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NoReturn

from relay.probe.checks import Checks, Options
from relay.probe.client import Credential
from relay.probe.findings import Report, State
from relay.probe.output import Lines, as_json, summary
from relay.probe.rules import RULES, Outcome, Verdict, try_rule
from relay.probe.target import (
    Target,
    TargetError,
    from_firezone_secret,
    from_rest_secret,
    parse_uri,
    read_ice_servers,
)
from relay.stun.const import Family

BROKEN: Final = 1  # the exit code if a check failed, or with --strict a warning or a rule
STDIN: Final = "-"

_EPILOG: Final = """\
A credential comes from --username and --credential (or --credential-file, which no list of
processes shows), of a secret (--auth-secret-file, --relay-secret-file), or with the URLs as JSON:
firezone-relay --auth-secret-file FILE --mint 600 | firezone-relay probe --ice-servers -

exit codes: 0 all is well, or there are warnings; 1 something is broken; 64 the command line is
wrong.
"""


class ProbeUsageError(Exception):
    """The command line is wrong; the text says what."""


def main(argv: Sequence[str]) -> int:
    """Probe what the arguments behind ``probe`` name, and return the exit code.

    Raises ProbeUsageError.
    """
    arguments = build_parser().parse_args(list(argv))
    try:
        servers = _servers(arguments)
        own, other, is_firezone = _credentials(arguments)
    except TargetError as error:
        raise ProbeUsageError(str(error)) from error
    lines = Lines(sys.stderr if arguments.json else sys.stdout, os.environ)
    results = []
    for target, credential in servers:
        options = Options(
            credential=own or credential,
            other_credential=other,
            address=arguments.address,
            families=_families(arguments),
            context=_context(arguments),
            is_firezone=is_firezone,
            time_limit=arguments.timeout,
            seconds=0 if arguments.conformance else arguments.seconds,
            most_per_second=0 if arguments.conformance else arguments.max_rate,
        )
        report, outcomes = _probe(target, options, lines, arguments)
        results.append((target, report, outcomes))
        if not arguments.json:
            lines.end(f"  {summary(report, outcomes)}")
    if arguments.json:
        lines.fall_silent()
        print(as_json(results))
    bad = {State.FAILED, State.WARNING} if arguments.strict else {State.FAILED}
    is_bad = any(report.worst in bad for _, report, _ in results) or (
        arguments.strict
        and any(each.verdict is Verdict.BROKEN for _, _, outcomes in results for each in outcomes)
    )
    return BROKEN if is_bad else os.EX_OK


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments behind ``probe``."""
    parser = _Parser(
        prog="firezone-relay probe",
        description="Tell if a STUN or TURN server is all right, seen from here: any server, by "
        "whomever it was made.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("url", nargs="*", metavar="URL", help="such as turn:turn.example.org:3478?transport=udp")
    add("--username", metavar="NAME", help="whom the server knows")
    add("--credential", metavar="PASSWORD", help="the password")
    add("--credential-file", metavar="FILE", help="file with the password; - is standard input")
    add("--auth-secret-file", metavar="FILE", help="make a credential of a TURN REST secret")
    add("--relay-secret-file", metavar="FILE", help="make one of the secret of Firezone's kind")
    add(
        "--ice-servers",
        metavar="FILE",
        help="URLs and credentials as JSON, as --mint prints them; - is standard input",
    )
    add("--conformance", action="store_true", help="try each rule of RFC 8489 and RFC 8656")
    add("--json", action="store_true", help="print the result as JSON")
    add("--strict", action="store_true", help="exit with 1 for warnings and broken rules, too")
    add("--address", metavar="ADDR", help="where the server is, whatever its name resolves to")
    add("-4", dest="ipv4", action="store_true", help="by IPv4 only")
    add("-6", dest="ipv6", action="store_true", help="by IPv6 only")
    add("--ca-file", metavar="FILE", help="certificates to trust instead of the system's (PEM)")
    add(
        "--timeout",
        metavar="SECONDS",
        type=_positive,
        default=5.0,
        help="for one request (%(default)s)",
    )
    add(
        "--seconds",
        metavar="SECONDS",
        type=_not_negative,
        default=5.0,
        help="how long to measure latency and loss (%(default)s; 0: not at all)",
    )
    add(
        "--max-rate",
        metavar="RATE",
        type=_not_negative,
        default=4000.0,
        help="to how many datagrams of 1,000 bytes per second the load is raised "
        "(%(default)s; 0: not at all)",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing."""
        raise ProbeUsageError(message)


def _probe(
    target: Target, options: Options, lines: Lines, arguments: argparse.Namespace
) -> tuple[Report, list[Outcome]]:
    report = Report(
        (lambda _: None) if arguments.json else lines.finding,
        lines.progress,
    )
    if not arguments.json:
        lines.title(target)
    outcomes: list[Outcome] = []
    with closing(Checks(target, options, report)) as checks:
        checks.run()
        if arguments.conformance and checks.lab is not None:
            for rule in RULES:
                lines.progress(f"{rule.section}: {rule.text}")
                outcomes.append(try_rule(rule, checks.lab, is_stream=checks.is_stream))
                if not arguments.json:
                    lines.outcome(outcomes[-1])
    return report, outcomes


def _servers(arguments: argparse.Namespace) -> list[tuple[Target, Credential | None]]:
    servers: list[tuple[Target, Credential | None]] = [
        (parse_uri(url), None) for url in arguments.url
    ]
    if arguments.ice_servers is not None:
        servers += [
            (parse_uri(url), credential)
            for url, credential in read_ice_servers(_text_of(arguments.ice_servers))
        ]
    if not servers:
        raise ProbeUsageError("which server? Give a URL, or --ice-servers")
    return servers


def _credentials(
    arguments: argparse.Namespace,
) -> tuple[Credential | None, Credential | None, bool]:
    """Return who asks, somebody else, and whether they are of Firezone's kind."""
    given = {
        name
        for name in ("credential", "credential_file", "auth_secret_file", "relay_secret_file")
        if getattr(arguments, name) is not None
    }
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise ProbeUsageError(f"{names}: one of them is enough")
    if arguments.auth_secret_file is not None:
        text = _text_of(arguments.auth_secret_file)
        return from_rest_secret(text, "probe"), from_rest_secret(text, "another"), False
    if arguments.relay_secret_file is not None:
        text = _text_of(arguments.relay_secret_file)
        own, other = (from_firezone_secret(text, secrets.token_urlsafe(12)) for _ in range(2))
        return own, other, True
    password = arguments.credential
    if arguments.credential_file is not None:
        password = _text_of(arguments.credential_file).strip()
    if (password is None) != (arguments.username is None):
        missing = "--credential" if password is None else "--username"
        raise ProbeUsageError(f"{missing} is missing: a username and a password go together")
    return (None if password is None else Credential(arguments.username, password)), None, False


def _families(arguments: argparse.Namespace) -> list[Family]:
    asked = [
        family
        for family, is_asked in ((Family.IPV4, arguments.ipv4), (Family.IPV6, arguments.ipv6))
        if is_asked
    ]
    return asked or list(Family)


def _context(arguments: argparse.Namespace) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=arguments.ca_file)
    except OSError as error:
        raise ProbeUsageError(
            f"--ca-file {arguments.ca_file}: {error.strerror or error}"
        ) from error


def _text_of(name: str) -> str:
    try:
        return sys.stdin.read() if name == STDIN else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise ProbeUsageError(f"{name}: {reason}") from error


def _positive(text: str) -> float:
    number = _not_negative(text)
    if not number:
        raise argparse.ArgumentTypeError("has to be more than 0")
    return number


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is less than 0, or has no end")
    return number
