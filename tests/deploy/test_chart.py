"""The Helm chart: it renders, Kubernetes knows what it renders, and the raw manifests agree."""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pokebridge.session import Timing
from pokebridge.settings import Settings
from tests.deploy.workloads import SECRETS, documents, of_pod
from tests.docs.blocks import blocks
from tests.support.helm import CHART, ROOT, Schemas, helm, refusal, render, values_file
from tools import chart_docs
from tools.helm import KUBERNETES

Object = dict[str, Any]
VARIANTS = {
    "fanout": ["deployment", "ingress", "networkpolicy"],
    "partitioned": ["statefulset", "gateway"],
    "everything": [],
}
"""What the chart is tried with, and the raw manifests that say the same."""
FOREIGN = {"HTTPRoute", "GCPBackendPolicy", "HealthCheckPolicy"}
"""Kinds that an extension of Kubernetes brings: there is no schema of theirs here."""
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def rendered(variant: str) -> list[Object]:
    """The objects of a variant."""
    return render(values_file(variant))


def of_kind(objects: Iterable[Object], *kinds: str) -> Iterator[Object]:
    """All objects of some kinds."""
    return (each for each in objects if each["kind"] in kinds)


def pods(objects: Iterable[Object]) -> dict[str, Object]:
    """The pods of each workload."""
    found = of_kind(objects, "Deployment", "StatefulSet")
    return {each["metadata"]["name"]: each["spec"]["template"] for each in found}


def secrets(objects: Iterable[Object]) -> dict[str, str]:
    """The Secret that the chart makes, or one that exists."""
    made = [each["stringData"] for each in of_kind(objects, "Secret")]
    return made[0] if made else SECRETS


@each_variant
def test_helm_finds_nothing_wrong(variant: str) -> None:
    """``helm lint`` has no warning."""
    done = helm("lint", "--strict", CHART, "--values", values_file(variant))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(version: str) -> None:
    """The rendered chart and the raw manifests match the strict schemas of Kubernetes."""
    raw = [each for path in (ROOT / "deploy/kubernetes").glob("*.yaml") for each in documents(path)]
    objects = [*raw, *(each for variant in VARIANTS for each in rendered(variant))]
    assert {each["kind"] for each in objects} >= FOREIGN
    schemas = Schemas(version)
    assert not [
        f"{each['kind']}: {problem}"
        for each in objects
        if each["kind"] not in FOREIGN
        for problem in schemas.problems(each)
    ]


def test_the_schemas_notice_a_wrong_field() -> None:
    """The test above would fail for a misspelt field."""
    (policy,) = of_kind(rendered("fanout"), "NetworkPolicy")
    policy = {**policy, "spec": {**policy["spec"], "ingres": []}}
    (problem,) = Schemas(KUBERNETES[-1]).problems(policy)
    assert "ingres" in problem


def _agreeing(each: Object) -> tuple[tuple[str, str], Object]:
    """An object without the labels that only Helm needs; the order of variables means nothing."""
    plain = json.loads(json.dumps(each))
    plain["metadata"].pop("labels", None)
    for pod in pods([plain]).values():
        pod["metadata"]["labels"] = {"app": pod["metadata"]["labels"]["app"]}
        (container,) = pod["spec"]["containers"]
        container["env"] = {variable["name"]: variable for variable in container["env"]}
    return (each["kind"], each["metadata"]["name"]), plain


@pytest.mark.parametrize("variant", ["fanout", "partitioned"])
def test_the_raw_manifests_agree(variant: str) -> None:
    """They equal what the chart renders with the same values, except for Helm's labels."""
    folder = ROOT / "deploy/kubernetes"
    raw = [each for name in VARIANTS[variant] for each in documents(folder / f"{name}.yaml")]
    assert dict(map(_agreeing, rendered(variant))) == dict(map(_agreeing, raw))


@each_variant
def test_every_instance_starts_and_has_time_to_stop(variant: str) -> None:
    """The settings of each kind are valid for production; together the kinds have all roles."""
    objects = rendered(variant)
    roles: list[str] = []
    for name, pod in pods(objects).items():
        workload = of_pod(name, pod["spec"], secrets(objects))
        settings = workload.settings
        assert not settings.dev
        assert settings.jwks_url or settings.roles == {"coordinator"}  # it checks no token
        drain_s = settings.drain_s + Timing().close_timeout_s + 1
        assert drain_s + settings.grace_s < workload.stop_s
        roles += settings.roles
        probes = [
            workload.container[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("liveness", "readiness")
        ]
        assert probes == ["/healthz", "/readyz"]
    assert sorted(roles) == sorted(Settings(dev=True).roles)


@each_variant
def test_every_selector_finds_its_pods(variant: str) -> None:
    """Services, budgets and policies select the pods that they name, and no others."""
    objects = rendered(variant)
    labels = {name: pod["metadata"]["labels"]["app"] for name, pod in pods(objects).items()}
    assert len(set(labels.values())) == len(labels)
    budgets = {
        each["spec"]["selector"]["matchLabels"]["app"]
        for each in of_kind(objects, "PodDisruptionBudget")
    }
    assert budgets == set(labels.values())
    for each in of_kind(objects, "NetworkPolicy"):
        (expression,) = each["spec"]["podSelector"]["matchExpressions"]
        assert set(expression["values"]) == set(labels.values())
    for each in of_kind(objects, "Service"):
        (value,) = each["spec"]["selector"].values()
        assert re.fullmatch(r"pokebridge(-\d)?", value)
    workloads = {
        (each["kind"], each["metadata"]["name"])
        for each in of_kind(objects, "Deployment", "StatefulSet")
    }
    for each in of_kind(objects, "HorizontalPodAutoscaler"):
        target = each["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in workloads


def test_each_pod_that_may_come_has_its_address() -> None:
    """With autoscaling there are as many Services and routes as there can be pods."""
    objects = rendered("everything")
    by_pod = "statefulset.kubernetes.io/pod-name"
    services = [each["spec"]["selector"].get(by_pod) for each in of_kind(objects, "Service")]
    (route,) = of_kind(objects, "HTTPRoute")
    routed = [rule["matches"][0]["path"]["value"] for rule in route["spec"]["rules"]]
    names = [f"pokebridge-{ordinal}" for ordinal in range(5)]
    assert [each for each in services if each] == names
    assert [path for path in routed if path.startswith("/i/")] == [f"/i/{name}" for name in names]


def test_the_values_of_the_guide(tmp_path: Path) -> None:
    """The values that docs/deploy.md shows are all that an installation needs."""
    (block,) = [each for each in blocks(ROOT / "docs/deploy.md") if each.language == "yaml"]
    (tmp_path / "values.yaml").write_text(block.text)
    objects = render(tmp_path / "values.yaml")
    ((_, pod),) = pods(objects).items()
    assert of_pod("guide", pod["spec"]).settings.cluster == "production"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"host": ""}, "host"),
        ({"settings.jwt_secret": "0" * 32}, "jwt_secret"),
        ({"settings.drain": 5}, "drain"),
        ({"gateways": {"replicas": 3}}, "gateways"),
        ({"extraEnv": [{"name": "POKEBRIDGE_DEV", "value": "true"}]}, "extraEnv"),
        ({"gatewayApi.enabled": True}, "parentRefs"),
        ({"terminationGracePeriodSeconds": 41}, "must be more than 41"),
        ({"coordination": "static"}, "static needs mode partitioned"),
        ({"mode": "partitioned"}, "no address for each pod"),
        ({"secret": {"name": ""}}, "the name of a Secret"),
        (
            {"coordinator.enabled": True, "secret.keys": {"coordination": None}},
            "secret.keys.coordination",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_work_is_refused(values: Object, reason: str) -> None:
    """Before anything is installed, with a line that names the value."""
    assert reason in refusal(values)


def test_the_schema_knows_every_setting() -> None:
    """The settings that the values may have are the code's."""
    assert chart_docs.SCHEMA.read_text() == chart_docs.render(), "run `make docs`"


def test_the_version_is_the_projects() -> None:
    """The chart installs the release that it belongs to."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
