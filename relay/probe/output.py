"""What a probe says: lines for people as it goes, or JSON for machines at the end."""

import json
import os
from collections.abc import Iterable
from typing import Any, Final, TextIO

from relay.probe.findings import Finding, Report, State
from relay.probe.rules import Outcome, Verdict
from relay.probe.target import Target

NAME_WIDTH: Final = 18
STATE_WIDTH: Final = 9
_RESET: Final = "\x1b[0m"
_CLEAR_LINE: Final = "\r\x1b[K"
_COLOURS: Final = {
    State.OK: "\x1b[32m",
    State.NOTE: "\x1b[36m",
    State.WARNING: "\x1b[33m",
    State.FAILED: "\x1b[31m",
    State.SKIPPED: "\x1b[2m",
}
_STATE_OF: Final = {
    Verdict.KEPT: State.OK,
    Verdict.BROKEN: State.FAILED,
    Verdict.SKIPPED: State.SKIPPED,
}


class Lines:
    """Writes lines for people; on a terminal in colours, and with what is being done."""

    def __init__(self, stream: TextIO, environment: "os._Environ[str] | dict[str, str]") -> None:
        self._stream = stream
        self._is_terminal = stream.isatty() and environment.get("TERM") != "dumb"
        self._has_colours = self._is_terminal and not environment.get("NO_COLOR")

    def title(self, target: Target) -> None:
        """Say which server is looked at."""
        self._write(f"{target}\n")

    def finding(self, finding: Finding) -> None:
        """Say what was found."""
        self._line(finding.state, finding.name, finding.text)

    def outcome(self, outcome: Outcome) -> None:
        """Say how a rule has fared."""
        rule = outcome.rule
        text = rule.text if not outcome.came else f"{rule.text}. Came: {outcome.came}"
        if outcome.verdict is Verdict.SKIPPED:
            text = f"{rule.text}: {outcome.came}"
        state = _STATE_OF[outcome.verdict]
        if state is State.FAILED and rule.level == "SHOULD":
            state = State.WARNING
        self._line(state, rule.section, text)

    def progress(self, text: str) -> None:
        """Say what is being done, until the next line."""
        if self._is_terminal:
            self._write(f"{_CLEAR_LINE}  … {text}")

    def end(self, text: str) -> None:
        """Say what comes of it all."""
        self._write(f"{self._clear()}{text}\n")

    def fall_silent(self) -> None:
        """Take back what is being done."""
        self._write(self._clear())

    def _line(self, state: State, name: str, text: str) -> None:
        word = f"{state.value:<{STATE_WIDTH}}"
        if self._has_colours:
            word = f"{_COLOURS[state]}{word}{_RESET}"
        self._write(f"{self._clear()}  {word}{name:<{NAME_WIDTH}}  {printable(text)}\n")

    def _clear(self) -> str:
        return _CLEAR_LINE if self._is_terminal else ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def printable(text: str) -> str:
    """Return text from a server without what a terminal might obey."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def as_json(results: Iterable[tuple[Target, Report, list[Outcome]]]) -> str:
    """Return all that was found as JSON."""
    return json.dumps({"servers": [_server(*result) for result in results]}, indent=2)


def summary(report: Report, outcomes: list[Outcome]) -> str:
    """Say in a few words what is wrong with one server."""
    found = {state: sum(each.state is state for each in report) for state in State}
    parts = []
    if found[State.FAILED]:
        parts.append(f"{found[State.FAILED]} of {len(report.findings)} checks failed")
    if found[State.WARNING]:
        parts.append(_counted(found[State.WARNING], "warning"))
    if outcomes:
        tried = [each for each in outcomes if each.verdict is not Verdict.SKIPPED]
        kept = sum(each.verdict is Verdict.KEPT for each in tried)
        parts.append(f"{kept} of {len(tried)} rules kept, {len(outcomes) - len(tried)} not tried")
    if not found[State.FAILED]:
        parts.insert(0, "all is well" if not found[State.WARNING] else "it works")
    return "; ".join(parts)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _server(target: Target, report: Report, outcomes: list[Outcome]) -> dict[str, Any]:
    server: dict[str, Any] = {
        "url": str(target),
        "state": report.worst.value,
        "checks": [
            {"name": each.name, "state": each.state.value, "text": each.text, **each.details}
            for each in report
        ],
    }
    if outcomes:
        server["rules"] = [
            {
                "name": each.rule.name,
                "section": each.rule.section,
                "level": each.rule.level,
                "expected": each.rule.text,
                "verdict": each.verdict.value,
                "came": each.came,
            }
            for each in outcomes
        ]
    return server
