"""Write docs/conformance.md: how servers keep the rules that ``firezone-relay probe`` tries.

    python -m contrib.conformance "this relay=relay.json" "coturn 4.6.1=coturn.json" …

Each file is what ``firezone-relay probe --conformance --json URL`` has printed for a server.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from relay.probe.rules import RULES, Rule, Verdict

PAGE: Final = Path(__file__).parent.parent / "docs" / "conformance.md"
KEPT, NOT_TRIED = "kept", "not offered"

_HEAD: Final = """\
# How servers keep the RFCs

What `firezone-relay probe --conformance` has found of four servers over UDP, each with its
defaults, on loopback. A rule is what RFC 8489 (STUN) or RFC 8656 (TURN) demand of a server, as far
as a client can see it: {total} rules, without those about TCP. What came instead stands where a
rule is not kept. "not offered" is a rule about something that the server does not offer.

eturnal is made of the library p1_stun, and so is ejabberd; that was tried by itself. Where this
relay departs it means to: [protocol.md](protocol.md) says why. For this relay and Debian's coturn
the tests hold this table against what comes (`tests/interop/test_conformance.py`).

To see your own server:

<!-- not run: takes a server of yours -->
```console
$ firezone-relay probe turn:turn.example.org --username NAME --credential PASSWORD --conformance
```

"""


def main(arguments: Sequence[str]) -> int:
    """Write the page of what is named in the arguments, and return the exit code."""
    results = {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        results[name] = read(Path(file).read_text())
    PAGE.write_text(page(results))
    print(PAGE)
    return 0


def read(text: str) -> dict[str, str]:
    """Return the cell of each rule, by its name, of what the probe has printed."""
    [server] = json.loads(text)["servers"]
    return {rule["name"]: _cell(rule["verdict"], rule["came"]) for rule in server["rules"]}


def page(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return the whole page."""
    names = [*results]
    rules = [rule for rule in RULES if rule.only != "stream"]
    lines = [
        "| | | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
        "| | **kept, of those tried** | "
        + " | ".join(f"**{_score(results[name], rules)}**" for name in names)
        + " |",
    ]
    lines += [
        f"| {rule.section} | {_text(rule)} | "
        + " | ".join(results[name][rule.name] for name in names)
        + " |"
        for rule in rules
    ]
    return _HEAD.format(total=len(rules)) + "\n".join(lines) + "\n"


def columns(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of a page: by server, then by rule."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    names = rows[0][2:]
    by_text = {(rule.section, _text(rule)): rule.name for rule in RULES}
    return {
        name: {by_text[row[0], row[1]]: row[2 + column] for row in rows[3:]}
        for column, name in enumerate(names)
    }


def _text(rule: Rule) -> str:
    return rule.text if rule.level == "MUST" else f"{rule.text} ({rule.level})"


def _cell(verdict: str, came: str) -> str:
    if verdict == Verdict.KEPT:
        return KEPT
    return NOT_TRIED if verdict == Verdict.SKIPPED else came.replace("|", "/")


def _score(result: Mapping[str, str], rules: Sequence[Rule]) -> str:
    cells = [result[rule.name] for rule in rules]
    return f"{cells.count(KEPT)} of {len(cells) - cells.count(NOT_TRIED)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
