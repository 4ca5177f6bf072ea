"""The dashboard and the alerts ask only for what the relay exports, and can be read."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from relay.assembly import KNOWN_AUTH_FAILURES, KNOWN_DROPS
from relay.net.stream import End
from relay.observe.counters import (
    STREAM_TRANSPORTS,
    Connections,
    Counters,
    InKernel,
    Relayed,
)
from relay.observe.exposition import RelayCollector
from relay.stun.const import ErrorCode, Method
from relay.turn.peers import RULES
from tests.probes import QUIET

CONTRIB = Path(__file__).parent.parent / "contrib/grafana"
DASHBOARD = CONTRIB / "dashboard.json"
ALERTS = CONTRIB / "alerts.yml"

Labels = dict[str, set[str]]  # the values of each label


class Use(NamedTuple):
    """A metric in an expression, and what is asked of its labels."""

    name: str
    matchers: list[tuple[str, str, str]]  # label, operator, value
    grouped_by: list[str]


def exported() -> dict[str, Labels]:
    """Return what a relay with a portal exports after a while, by the names of the samples."""
    codes = ["success", *(str(code.value) for code in ErrorCode)]
    counters = Counters(KNOWN_DROPS)
    counters.lost("receive_econnrefused")
    status = replace(
        QUIET,
        portal_connected=True,
        responses={(method.name.lower(), code): 1 for method in Method for code in codes},
        auth_failures=dict.fromkeys(KNOWN_AUTH_FAILURES, 0),
        refused_peers=dict.fromkeys(RULES, 0),
        counters=counters,
        in_kernel=InKernel(
            {"eth0": "native"}, 0, {"map_full": 0}, [Relayed(0, 0)] * 8, [Relayed(0, 0)] * 8
        ),
        connections=Connections(
            open=dict.fromkeys(STREAM_TRANSPORTS, 0),
            accepted=dict.fromkeys(STREAM_TRANSPORTS, 0),
            ended={why.value: 0 for why in End},
            queued=0,
            certificate_expires=0.0,
        ),
    )
    registry = CollectorRegistry()
    registry.register(RelayCollector(lambda: status, version="1.2.3"))
    ProcessCollector(registry=registry)
    of_prometheus: Labels = {"job": set(), "instance": set()}  # it adds these to each
    found: dict[str, Labels] = {"up": {**of_prometheus}}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {**of_prometheus})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


EXPORTED: Final = exported()


# --- The two of them ------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, str]]:
    """Read the alerts without YAML, which the relay does not need: each key has a line."""
    found: list[dict[str, str]] = []
    for line in ALERTS.read_text().splitlines():
        if match := re.fullmatch(r" +(?:- )?(\w+): (.+)", line):
            key, value = match.groups()
            if key == "alert":
                found.append({})
            if found:
                found[-1][key] = value
    return found


def expressions() -> list[Any]:
    shown = [
        pytest.param(target["expr"], id=f"dashboard: {panel['title']}")
        for panel in panels()
        for target in panel["targets"]
    ]
    return [*shown, *(pytest.param(rule["expr"], id=f"alert: {rule['alert']}") for rule in rules())]


@pytest.mark.parametrize("expression", expressions())
def test_expression_uses_only_what_is_exported(expression: str) -> None:
    uses = list(uses_in(expression))

    assert uses
    assert [problem for use in uses for problem in problems_with(use)] == []


def test_every_metric_of_the_relay_is_shown() -> None:
    shown = {use.name for panel in panels() for use in uses_of(panel)}
    left_out = {name for name in EXPORTED if family(name) not in {family(one) for one in shown}}

    assert left_out == {"up"}


@pytest.mark.parametrize("panel", [pytest.param(one, id=one["title"]) for one in panels()])
def test_panel_follows_the_variables_and_says_what_it_shows(panel: dict[str, Any]) -> None:
    for target in [panel, *panel["targets"]]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for use in uses_of(panel):
        assert {("job", "=~", "$job"), ("instance", "=~", "$instance")} <= set(use.matchers)
    assert panel["description"].endswith(".")
    assert len(panel["targets"]) == len({target["refId"] for target in panel["targets"]})


def test_variables_are_there() -> None:
    names = [variable["name"] for variable in dashboard()["templating"]["list"]]

    assert names == ["datasource", "job", "instance"]


def test_panels_do_not_lie_on_each_other() -> None:
    cells = [
        (x, y)
        for panel in dashboard()["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]

    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)


@pytest.mark.parametrize("rule", [pytest.param(one, id=one["alert"]) for one in rules()])
def test_alert_says_where_and_what_to_do(rule: dict[str, str]) -> None:
    assert rule["severity"] in {"critical", "warning"}
    assert "{{ $labels.instance }}" in rule["summary"]
    assert rule["description"].endswith('."')
    for use in uses_in(rule["expr"]):  # or the label is lost on the way
        assert not use.grouped_by or "instance" in use.grouped_by


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_alerts() -> None:
    checked = subprocess.run(
        ["promtool", "check", "rules", str(ALERTS)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {len(rules())} rules found" in checked.stdout


# --- The checker sees what it should --------------------------------------------------------

WRONG = [
    pytest.param("relay_redy == 0", "relay_redy is not exported", id="name"),
    pytest.param("rate(typo_total[5m])", "typo_total is not exported", id="name of any kind"),
    pytest.param('relay_ready{reason="x"}', "relay_ready has no label reason", id="label"),
    pytest.param(
        'sum(rate(relay_responses_total{code="999"}[5m])) > 1',
        'no relay_responses_total has code="999"',
        id="value",
    ),
    pytest.param(
        'relay_dropped_packets_total{reason=~"sent_.+"}',
        'no relay_dropped_packets_total has reason=~"sent_.+"',
        id="pattern",
    ),
    pytest.param(
        "sum by (reason) (relay_allocations)", "relay_allocations has no label reason", id="by"
    ),
]


@pytest.mark.parametrize(("expression", "problem"), WRONG)
def test_checker_sees_what_is_not_exported(expression: str, problem: str) -> None:
    assert [one for use in uses_in(expression) for one in problems_with(use)] == [problem]


# --- The checker ----------------------------------------------------------------------------

_TOKENS: Final = re.compile(
    r"""
    \[[^\]]*\]                                # a range
    | \b(?:by|on)\s*\((?P<groups>[^)]*)\)      # labels
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{(?P<matchers>[^}]*)\})?(?P<call>\s*\()?
    """,
    re.VERBOSE,
)
_WORDS: Final = {"sum", "and"}  # that look like names


def uses_in(expression: str) -> Iterator[Use]:
    """Yield the metrics of a PromQL expression, as far as those here go."""
    grouped_by: list[str] = []
    for token in _TOKENS.finditer(expression):
        if token["groups"] is not None:
            grouped_by = token["groups"].replace(" ", "").split(",")
        elif token["name"] and not token["call"] and token["name"] not in _WORDS:
            matchers = re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', token["matchers"] or "")
            yield Use(token["name"], matchers, grouped_by)


def uses_of(panel: dict[str, Any]) -> Iterator[Use]:
    for target in panel["targets"]:
        yield from uses_in(target["expr"])


def problems_with(use: Use) -> Iterator[str]:
    labels = EXPORTED.get(use.name)
    if labels is None:
        yield f"{use.name} is not exported"
        return
    for label in {*use.grouped_by, *(label for label, _, _ in use.matchers)} - labels.keys():
        yield f"{use.name} has no label {label}"
    for label, operator, value in use.matchers:
        pattern = value if operator.endswith("~") else re.escape(value)
        values = labels.get(label)
        if values and not any(re.fullmatch(pattern, one) for one in values):
            yield f'no {use.name} has {label}{operator}"{value}"'


def family(name: str) -> str:
    return re.sub("_(bucket|count|sum)$", "", name)
