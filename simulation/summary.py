"""The figures of many runs, and the story of one that failed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Final

from simulation.world import Outcome

_FAILURES_KEPT: Final = 20
_COUNTED: Final = (
    *("callbacks", "messages", "deliveries", "lost", "doubled", "moves"),
    *("listened", "polled", "switched"),
)


class Summary:
    """Adds up outcomes, in whatever order they come."""

    def __init__(self) -> None:
        self.seeds = 0
        self.failures: list[Outcome] = []
        self.virtual_s = 0.0
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._silences_s: list[float] = []
        self._bounded_s: list[float] = []
        self._waits_s: list[float] = []
        self._recoveries_s: list[float] = []
        self._digests: list[tuple[int, str]] = []

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.seeds += 1
        self.virtual_s += outcome.virtual_s
        self._digests.append((outcome.seed, outcome.digest))
        self._faults += outcome.faults
        for name in _COUNTED:
            self._counts[name] += getattr(outcome, name)
        self._silences_s += outcome.silences_s
        self._bounded_s += outcome.bounded_s
        self._waits_s += outcome.waits_s
        if outcome.violation is None:
            self._recoveries_s.append(outcome.recovery_s)
        elif len(self.failures) < _FAILURES_KEPT:
            self.failures.append(outcome)

    def as_dict(self) -> dict[str, Any]:
        """All figures; ``digest`` stands for every trace, so that machines can be compared."""
        digest = blake2b(repr(sorted(self._digests)).encode(), digest_size=8).hexdigest()
        return {
            "seeds": self.seeds,
            "failures": [_as_dict(outcome) for outcome in self.failures],
            "digest": digest,
            "virtual_s": round(self.virtual_s, 1),
            **self._counts,
            "faults": dict(self._faults.most_common()),
            "silence_s": _percentiles(self._silences_s),
            "bounded_s": _percentiles(self._bounded_s),
            "wait_s": _percentiles(self._waits_s),
            "recovery_s": _percentiles(self._recoveries_s),
        }

    def lines(self) -> Iterable[str]:
        """The same for people."""
        figures = self.as_dict()
        yield f"{self.seeds} seeds, {len(self.failures)} failed; digest {figures['digest']}"
        yield (
            f"{self.virtual_s / 3600:,.1f} h of virtual time, {figures['callbacks']:,} callbacks,"
            f" {figures['messages']:,} messages, {figures['moves']:,} shard moves"
        )
        yield (
            f"{figures['deliveries']:,} signals delivered, {figures['lost']:,} lost,"
            f" {figures['doubled']:,} doubled"
        )
        yield (
            f"{figures['listened']:,} times a client began to hear a further recipient,"
            f" {figures['polled']:,} times it polled, and {figures['switched']:,} times it changed"
            " to a WebSocket"
        )
        faults: dict[str, int] = figures["faults"]
        yield f"{sum(faults.values()):,} faults: " + ", ".join(
            f"{name.replace('_', ' ')} {count:,}" for name, count in faults.items()
        )
        for name, meaning in (
            ("silence_s", "silence of clients that nothing of their own disturbed"),
            ("bounded_s", "silence of clients that the broker disturbed, and nothing else"),
            ("wait_s", "wait of every message for every client, faults included"),
            ("recovery_s", "recovery after the last fault"),
        ):
            shown = ", ".join(f"{key} {value:.3f}" for key, value in figures[name].items())
            yield f"{meaning}, in seconds: {shown}"


def report(outcome: Outcome) -> Iterable[str]:
    """The report of a failed run."""
    violation = outcome.violation
    if violation is None:
        return
    yield from outcome.last
    yield f"seed {outcome.seed} broke an invariant at {violation.at_s:.4f} s of virtual time:"
    yield f"  {violation.invariant}: {violation.detail}"
    yield f"replay it with: make simulate FROM={outcome.seed} SEEDS=1"


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    violation = outcome.violation
    return {"seed": outcome.seed, **(violation._asdict() if violation else {})}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: round(ordered[int(last * share)], 3) for name, share in shares.items()}
