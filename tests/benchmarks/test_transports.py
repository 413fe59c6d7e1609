"""The measure of the transports runs, at a size that proves that and measures nothing."""

from benchmarks import transports
from benchmarks.transports import Sizes


async def test_transports() -> None:
    """Every signal is received and every poke delivered, by ours and by the bare client."""
    sizes = {"nats": Sizes(alone=20, bulk=1000)}
    figures = await transports.measure(rounds=1, clients=50, sizes=sizes)
    assert all(figure.value > 0 for figure in figures if "received" in figure.name)
    ratios = [figure.name for figure in figures if figure.unit == "x"]
    assert ratios == [
        "nats: a signal received, one a call, to nats-py",
        "nats: a signal received, 100 a call, to nats-py",
        "nats: a poke delivered, one a signal, to nats-py",
        "nats: a poke delivered, 100 a signal, to nats-py",
    ]
