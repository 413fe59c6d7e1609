"""The names under which a cluster's signals travel, so that clusters on one engine stay apart."""

DEFAULT_TOPIC = "push-notifications"
DEFAULT_CLUSTER = "default"


def topic_of(cluster: str, base: str = DEFAULT_TOPIC) -> str:
    """Return the subject, channel or topic for those signals of ``cluster`` that have no shard.

    The signals of shard 42 have ``.42`` behind it. The cluster ``default`` has the bare name. No
    engine allows ``~`` in a cluster's name or has a meaning for it, so no wildcard of one cluster
    matches a name of another, as ``push-notifications.*`` would match ``push-notifications.red``.

    >>> topic_of("default"), topic_of("red")
    ('push-notifications', 'push-notifications~red')
    """
    return base if cluster == DEFAULT_CLUSTER else f"{base}~{cluster}"
