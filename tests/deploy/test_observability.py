"""The alert rules and the dashboard ask for metrics that exist, and say what they mean."""

import json
import re
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from pokebridge.api.metrics import _LABELS
from pokebridge.telemetry import Metric
from tests.support.missing import require

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
RULES: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0][
    "rules"
]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/pokebridge.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [rule["expr"] for rule in RULES] + TARGETS

# What a scrape adds to every sample.
SCRAPE_LABELS = {"job", "instance"}
OF_PROMETHEUS = {"up"}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def metrics() -> set[str]:
    """Every name under which an instance shows a sample."""
    names = {name for name in Metric if not name.endswith("_seconds")}
    histograms = {name for name in Metric if name.endswith("_seconds")}
    return names | {name + part for name in histograms for part in ("_bucket", "_count", "_sum")}


def named(expression: str) -> set[str]:
    """The metrics that ``expression`` asks for."""
    return set(re.findall(r"\b(?:job:)?pokebridge_\w+(?::\w+)?", expression)) | (
        OF_PROMETHEUS & set(re.findall(r"\w+", expression))
    )


def matchers(expression: str) -> Iterator[tuple[str, str]]:
    """Each metric with a label by which it is selected."""
    for metric, selection in re.findall(r"(\w+)\{([^}]*)\}", expression):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selection):
            yield metric, label


def labels_of(metric: str) -> set[str]:
    """The labels that samples of ``metric`` have."""
    for name, labels in _LABELS.items():
        if metric.startswith(name):
            return {*labels, *SCRAPE_LABELS, "le"}
    return SCRAPE_LABELS


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_exists(expression: str) -> None:
    """A metric that is renamed takes its alerts and panels with it."""
    unknown = named(expression) - metrics() - OF_PROMETHEUS - RECORDED
    assert not unknown
    assert named(expression) or "vector(" in expression


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_label_exists(expression: str) -> None:
    """A selection by a label that a metric lacks selects nothing, without an error."""
    for metric, label in matchers(expression):
        assert label in labels_of(metric)


def test_an_unknown_metric_is_noticed() -> None:
    """The search above finds what it looks for."""
    expression = 'sum(rate(pokebridge_typo_total{colour="red"}[5m])) and up == 1'
    assert named(expression) == {"pokebridge_typo_total", "up"}
    assert list(matchers(expression)) == [("pokebridge_typo_total", "colour")]


# --- alerts -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_says_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    """It has a summary that names its subject, a severity, and a link to an existing heading."""
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert "{{ $" in rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    assert anchor in anchors(ROOT / page)


def test_every_runbook_has_its_alert() -> None:
    """A heading whose alert was removed must be removed, too."""
    headings = anchors(ROOT / "docs/monitoring.md") - {"monitoring", "alerts"}
    assert headings == {rule["alert"].lower() for rule in ALERTS}


def test_alerts_fire_when_they_should() -> None:
    """Prometheus's own tool runs the rules over made-up series: a quiet cluster, a broken one."""
    command = [require("promtool"), "test", "rules", "alerts_test.yml"]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_in_a_test() -> None:
    """One that is not would never have fired."""
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    assert {rule["alert"] for rule in ALERTS if rule["alert"] not in tests} == set()


# --- the dashboard ------------------------------------------------------------------------------


def test_every_panel_says_what_it_shows() -> None:
    """Each panel has a unique title, a description, a unit, and a selectable source."""
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_have_their_places() -> None:
    """Ids are unique, and no two panels overlap on the grid of 24 columns."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_every_variable_is_defined() -> None:
    """What an expression takes from a variable can be chosen on the dashboard, and is used."""
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for target in TARGETS for name in re.findall(r"\$(\w+)", target)}
    assert used - {"__rate_interval"} | {"datasource"} == defined


def test_every_query_is_promql(tmp_path: Path) -> None:
    """Prometheus's own tool reads each expression of the dashboard, its variables filled in."""
    values = {"$__rate_interval": "5m", "$job": "pokebridge", "$instance": ".*", "$red_line": "1"}
    queries: list[dict[str, str]] = []
    for target in TARGETS:
        expression = target
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        queries.append({"record": f"query:number{len(queries)}", "expr": expression})
    rules = tmp_path / "queries.yml"
    rules.write_text(json.dumps({"groups": [{"name": "queries", "rules": queries}]}))
    command = [require("promtool"), "check", "rules", str(rules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
