"""Write into the schema of the Helm chart's values which settings there are."""

import json
from pathlib import Path
from typing import Any

from pokebridge.settings import Settings

SCHEMA = Path(__file__).parents[1] / "deploy/helm/pokebridge/values.schema.json"
# The chart says these itself, or they make no sense in a cluster.
_ITS_OWN = {"dev", "dev_on_network", "host", "port", "instance", "roles", "mode"}
_ITS_OWN |= {"advertise_url", "path_prefix"}
# Their values are secret, or URLs that may hold a password.
_ALWAYS_SECRET = {"transport", "mailbox", "coordination", "jwt_secret", "jwt_previous_secret"}
_ALWAYS_SECRET |= {"push_webhook_secret"}
_OFTEN_SECRET = {"ingress", "push_webhook_url", "jwks_url"}


def render() -> str:
    """The schema, with every setting as a plain one, one of the Secret, or both."""
    schema: dict[str, Any] = json.loads(SCHEMA.read_text())
    values = schema["properties"]
    names = [name for name in Settings.model_fields if name not in _ITS_OWN]
    plain = [name for name in names if name not in _ALWAYS_SECRET]
    secret = [name for name in names if name in _ALWAYS_SECRET | _OFTEN_SECRET]
    values["settings"]["propertyNames"]["enum"] = plain
    values["secret"]["properties"]["keys"]["propertyNames"]["enum"] = secret
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(render())
