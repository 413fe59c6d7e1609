"""The longest silence after each fault, on real engines: ``python -m tests.silences``.

It runs all tests that use the fixture ``silence``, long ones included, and prints a table for
docs/simulation.md. ``python -m tests.silences tests/ingress`` runs those of one directory.
"""

import sys
from pathlib import Path

import pytest


class Table:
    """A plugin of pytest that selects these tests, and keeps what they note."""

    def __init__(self) -> None:
        self.longest_s: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the other tests out."""
        items[:] = [each for each in items if "silence" in getattr(each, "fixturenames", ())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the longest silence of each fault."""
        if report.when == "call" and report.passed:
            for fault, lasted_s in report.user_properties:
                self.longest_s[fault] = max(float(str(lasted_s)), self.longest_s.get(fault, 0.0))

    def __str__(self) -> str:
        rows = [f"| {fault} | {lasted_s:.1f} s |" for fault, lasted_s in self.longest_s.items()]
        return "\n".join(["| fault | longest silence |", "|---|---|", *rows])


def main() -> int:
    """Run them and print the table. Returns pytest's exit status."""
    table = Table()
    given = sys.argv[1:] or [str(Path(__file__).parent)]
    arguments = ["-q", "-m", "long or not long", "-p", "no:randomly"]
    status = pytest.main([*arguments, *given], plugins=[table])
    print(table)  # noqa: T201 - a program's output
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
