"""What the manifests, and what the chart renders, run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pokebridge.settings import Settings, load_settings

# The value that replaces a secret, by its key or its name.
SECRETS = {
    "transport": "nats://user:password@nats:4222",
    "mailbox": "postgresql://user:password@postgres/bridge",
    "pokebridge-mailbox": "postgresql://user:password@/bridge?host=/cloudsql/x",
}


@dataclass(frozen=True)
class Workload:
    """A container of ours in a manifest, and how long it may take to stop."""

    name: str
    container: Mapping[str, Any]
    stop_s: float
    secrets: Mapping[str, str] = field(default_factory=lambda: SECRETS)

    @property
    def settings(self) -> Settings:
        """What an instance makes of the container's environment."""
        environment: dict[str, str] = {}
        for each in self.container["env"]:
            match each:
                case {"name": name, "value": str(value)}:
                    known = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], value)
                    environment[name] = known
                case {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
                    environment[name] = "pokebridge-0"
                case {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}:
                    environment[name] = self.secrets.get(key) or self.secrets[secret]
                case _:
                    raise AssertionError(each)
        return load_settings(environ=environment)


def of_pod(name: str, pod: Mapping[str, Any], secrets: Mapping[str, str] = SECRETS) -> Workload:
    """The container of a pod. Its stop begins when it has slept before."""
    (container,) = pod["containers"]
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    stop_s = pod["terminationGracePeriodSeconds"] - pre_stop_s
    return Workload(name, container, stop_s, secrets)


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects in a manifest."""
    return [each for each in yaml.safe_load_all(path.read_text()) if each]
