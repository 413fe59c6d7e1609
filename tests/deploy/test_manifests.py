"""The manifests, the image and the unit say what the settings, and each other, know."""

import configparser
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pokebridge.session import Timing
from pokebridge.settings import _OTHER_VARIABLES, Settings, load_settings
from tests.deploy.workloads import Workload, documents, of_pod

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
CLOUD_RUN = DEPLOY / "cloud-run/service.yaml"
COMPOSE = DEPLOY / "docker/compose.yaml"
UNIT = DEPLOY / "systemd/pokebridge.service"
GUIDE = ROOT / "docs/deploy.md"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CLOUD_RUN_STOP_S = 10  # from SIGTERM to SIGKILL, and nobody can change it


def of_kind(kind: str, paths: list[Path] = KUBERNETES) -> Iterator[dict[str, Any]]:
    """All objects of a kind."""
    return (each for path in paths for each in documents(path) if each["kind"] == kind)


def workloads() -> Iterator[Workload]:
    """Every container that runs an instance on an orchestrator."""
    for kind in ("Deployment", "StatefulSet"):
        for each in of_kind(kind):
            yield of_pod(kind, each["spec"]["template"]["spec"])
    (service,) = documents(CLOUD_RUN)
    (container,) = service["spec"]["template"]["spec"]["containers"]
    yield Workload("Cloud Run", container, CLOUD_RUN_STOP_S)


WORKLOADS = {each.name: each for each in workloads()}
each_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)


@pytest.mark.parametrize(
    "path",
    [path for path in [*DEPLOY.rglob("*"), ROOT / "Dockerfile", GUIDE] if path.is_file()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_variable_is_a_setting(path: Path) -> None:
    """No recipe sets, or speaks of, a POKEBRIDGE_ variable that does not exist."""
    named = {name.lower() for name in re.findall(r"POKEBRIDGE_([A-Z_]+)", path.read_text())}
    assert named <= set(Settings.model_fields) | _OTHER_VARIABLES


@each_workload
def test_an_instance_starts_with_the_environment(workload: Workload) -> None:
    """Its settings are valid, for production, and leave nothing to one machine."""
    settings = workload.settings
    assert not settings.dev
    assert settings.jwks_url
    assert settings.jwt_audience
    assert settings.trusted_proxies
    assert not settings.mailbox.startswith(("sqlite:", "memory:"))
    assert not settings.transport.startswith("memory:")


@each_workload
def test_a_stop_has_the_time_that_a_drain_takes(workload: Workload) -> None:
    """SIGKILL comes after the drain, silent clients' time to answer, and the last requests."""
    settings = workload.settings
    answer_s = Timing().close_timeout_s + 1
    assert settings.drain_s + answer_s + settings.grace_s < workload.stop_s


@each_workload
def test_probes_ask_what_they_should(workload: Workload) -> None:
    """Alive is not ready: only readiness may hang on the engine; and the ports are one."""
    container = workload.container
    (port,) = container["ports"]
    assert port["containerPort"] == workload.settings.port
    alive = container["livenessProbe"]["httpGet"]
    ready = (container.get("readinessProbe") or container["startupProbe"])["httpGet"]
    assert (alive["path"], ready["path"]) == ("/healthz", "/readyz")
    assert {alive["port"], ready["port"]} <= {port["name"], port["containerPort"]}


def test_services_select_what_there_is() -> None:
    """Every Service's port is the container's, and every budget and scaler has its workload."""
    pods = [each["spec"]["template"] for kind in WORKLOADS for each in of_kind(kind)]
    (labels,) = {tuple(pod["metadata"]["labels"].items()) for pod in pods}
    names = {port["name"] for pod in pods for port in pod["spec"]["containers"][0]["ports"]}
    for service in of_kind("Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
        selector = service["spec"]["selector"]
        assert selector.keys() == {"statefulset.kubernetes.io/pod-name"} or selector == dict(labels)
    for budget in of_kind("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"] == dict(labels)
    for scaler in of_kind("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert any(target["name"] == each["metadata"]["name"] for each in of_kind(target["kind"]))


def test_each_replica_has_its_address() -> None:
    """The static owners, the Services and the routes agree on number and names."""
    (stateful_set,) = of_kind("StatefulSet")
    name, replicas = stateful_set["metadata"]["name"], stateful_set["spec"]["replicas"]
    pods = {f"{name}-{ordinal}" for ordinal in range(replicas)}
    settings = WORKLOADS["StatefulSet"].settings
    assert f"replicas={replicas}&" in settings.coordination
    assert f"/i/{name}-{{ordinal}}" in settings.coordination
    assert settings.advertise_url == f"wss://bridge.example.com/i/{settings.instance}"
    by_pod = "statefulset.kubernetes.io/pod-name"
    selectors = [each["spec"]["selector"] for each in of_kind("Service")]
    selected = {selector[by_pod] for selector in selectors if by_pod in selector}
    assert selected == pods
    (route,) = of_kind("HTTPRoute")
    routed = {
        rule["matches"][0]["path"]["value"]: rule["backendRefs"][0]["name"]
        for rule in route["spec"]["rules"]
    }
    assert {path: routed[path] for path in routed if path.startswith("/i/")} == {
        f"/i/{pod}": pod for pod in pods
    }
    services = {each["metadata"]["name"] for each in of_kind("Service")}
    assert set(routed.values()) <= services
    for policy in ("GCPBackendPolicy", "HealthCheckPolicy"):
        assert all(each["spec"]["targetRef"]["name"] in services for each in of_kind(policy))


def test_pods_run_as_the_images_user_with_no_rights() -> None:
    """Not root, the image's own user, nothing to write to, no token of the cluster's."""
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    for kind in ("Deployment", "StatefulSet"):
        (workload,) = of_kind(kind)
        pod = workload["spec"]["template"]["spec"]
        security = pod["securityContext"]
        assert [(str(security["runAsUser"]), str(security["runAsGroup"]))] == user
        assert security["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_cloud_run_leaves_room_for_pulls() -> None:
    """Sockets never use up all requests at once, and end before the platform ends them."""
    (service,) = documents(CLOUD_RUN)
    spec = service["spec"]["template"]["spec"]
    settings = WORKLOADS["Cloud Run"].settings
    assert settings.max_sessions is not None
    assert settings.max_sessions < spec["containerConcurrency"] <= 1000
    assert spec["timeoutSeconds"] == 3600
    assert settings.max_session_s is not None
    assert settings.max_session_s < spec["timeoutSeconds"]
    annotations = service["spec"]["template"]["metadata"]["annotations"]
    assert annotations["run.googleapis.com/cpu-throttling"] == "false"


def test_compose_matches_the_proxys_recipe() -> None:
    """The addresses are the recipe's, and a stop has the time it takes."""
    compose = yaml.safe_load(COMPOSE.read_text())
    services = {name: each for name, each in compose["services"].items() if name[0] == "b"}
    recipe = (DEPLOY / "haproxy/fanout.cfg").read_text()
    for name, service in services.items():
        address = service["networks"]["bridge"]["ipv4_address"]
        assert f"server {name} {address}:8080\n" in recipe
        given = service["environment"].items()
        environment = {key: re.sub(r"\$\{.*?\}", "x" * 32, value) for key, value in given}
        settings = load_settings(environ=environment)
        proxy = compose["services"]["haproxy"]["networks"]["bridge"]["ipv4_address"]
        assert [str(network) for network in settings.trusted_proxies] == [f"{proxy}/32"]
        stop_s = int(service["stop_grace_period"].removesuffix("s"))
        assert settings.drain_s + Timing().close_timeout_s + 1 + settings.grace_s < stop_s


def test_the_unit_gives_a_drain_its_time() -> None:
    """Systemd waits longer than the default drain takes."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # as the documentation has it
    unit.read(UNIT)
    settings = Settings(dev=True)
    stop_s = int(unit["Service"]["TimeoutStopSec"])
    assert settings.drain_s + Timing().close_timeout_s + 1 + settings.grace_s < stop_s
    assert int(unit["Service"]["LimitNOFILE"]) > 1024


def test_the_image_is_built_from_what_it_may_see() -> None:
    """All copied files exist and are not ignored. No other project file is sent."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert rules[0] == "*"
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert sources == set(allowed)
    assert all((ROOT / name).exists() for name in sources)
    assert not any(fnmatch.fnmatch("tests", rule) for rule in allowed)
    assert len(set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))) == 1
    assert f"EXPOSE {Settings(dev=True).port}\n" in DOCKERFILE
