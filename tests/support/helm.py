"""Helm, as ``make test-deps`` installs it, and the chart."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import yaml

from tests.support.missing import missing

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/pokebridge"
HELM = ROOT / ".venv/helm/helm"


class Schemas:
    """What one release of Kubernetes says of its kinds. A field that it does not know is wrong."""

    def __init__(self, release: str) -> None:
        path = HELM.with_name(f"kubernetes-{release}.json")
        if not path.exists():
            missing("the schemas of Kubernetes (make test-deps)")
        definitions = json.loads(path.read_text())
        self._uri = definitions["$id"]
        self._registry = jsonschema_rs.Registry([(self._uri, definitions)])
        self._names = {
            (each["group"], each["version"], each["kind"]): name
            for name, definition in definitions["$defs"].items()
            for each in definition.get("x-kubernetes-group-version-kind", ())
        }
        self._validator = cache(self._create_validator)

    def _create_validator(self, name: str) -> Any:
        schema = {"$ref": f"{self._uri}#/$defs/{name}"}
        return jsonschema_rs.validator_for(schema, registry=self._registry)

    def problems(self, found: dict[str, Any]) -> list[str]:
        """What is wrong with an object."""
        group, _, version = found["apiVersion"].rpartition("/")
        validator = self._validator(self._names[group, version, found["kind"]])
        return [f"{each.instance_path}: {each.message}" for each in validator.iter_errors(found)]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What ``helm`` says."""
    if not HELM.exists():
        missing("helm (make test-deps)")
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


def values_file(variant: str) -> Path:
    """A file of values that the chart is tried with."""
    return CHART / "ci" / f"{variant}-values.yaml"


def render(values: Path) -> list[dict[str, Any]]:
    """The objects that the release ``pokebridge`` consists of."""
    done = helm("template", "pokebridge", CHART, "--values", values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def refusal(values: dict[str, Any]) -> str:
    """Why the chart can't be rendered with ``values`` beside those of fan-out."""
    sets = [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]
    done = helm("template", "pokebridge", CHART, "--values", values_file("fanout"), *sets)
    assert done.returncode != 0, done.stdout
    return done.stderr
