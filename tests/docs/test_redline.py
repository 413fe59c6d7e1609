"""The page about the red line says what the model says, and its sums are right."""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from pokebridge.bench.plot import save_plot
from pokebridge.cli.plan import TITLES
from pokebridge.costs import (
    CPU_COSTS,
    MAX_ADMIN_OPS_PER_MIN,
    MAX_FILTER_BYTES,
    MAX_SUBSCRIPTIONS,
    PRICES,
    SECONDS_A_MONTH,
    Outcome,
    Range,
    Strategy,
    Workload,
    advise,
    evaluate,
    format_share,
    format_usd,
)
from pokebridge.red_line import LOG_RULES, MIGRATE_RULES, WatchRules

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "redline.md").read_text()
EXAMPLES = {
    "1,000 messages/s, 50 instances": Workload(1000, 50),
    "100 messages/s, 10 instances": Workload(100, 10),
}


def table(first_cell: str) -> list[list[str]]:
    """The rows of the table whose heading begins with ``first_cell``, without the heading."""
    block = PAGE.partition(f"\n| {first_cell} |")[2].partition("\n\n")[0]
    rows = block.splitlines()[2:]
    assert rows, first_cell
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def span(value: Range, form: str) -> str:
    """A range as the page writes it."""
    low, high = format(value.low, form), format(value.high, form)
    return low if low == high else f"{low}-{high}"


def row(outcome: Outcome) -> list[str]:
    """An outcome as the page writes it."""
    return [
        outcome.strategy,
        f"{outcome.deliveries_per_s:,.0f}",
        format_share(outcome.discarded_share),
        format_share(outcome.filtered_share),
        span(outcome.cpu_cores_wasted, ".2f"),
        f"{outcome.subscriptions:,}",
        f"{outcome.admin_ops_to_deploy:,}",
        span(outcome.usd_a_month, ",.0f"),
    ]


def drawn(picture: Path) -> str:
    """An SVG with its numbers rounded: the last digits are the processor's."""
    svg = picture.read_text()
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", svg)


# --- the model's figures ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_results_are_the_models(name: str) -> None:
    """Every row of the result tables, and the advice under them."""
    load = EXAMPLES[name]
    assert table(name) == [row(evaluate(load, strategy)) for strategy in Strategy]
    advice = advise(load)
    assert f"\n> {advice.verdict}: {advice.text}\n" in PAGE


def test_the_prices_are_the_models() -> None:
    """Every value in the first table of data."""
    read_on = date.fromisoformat(PRICES.as_of)
    assert f"Prices as of {read_on:%-d %B %Y}, in US dollars." in PAGE
    data = {name: value for name, value, _ in table("datum | value | source")}
    assert data["Pub/Sub, published or delivered"] == f"${PRICES.usd_per_tib:.0f} a TiB"
    assert data["free a month"] == f"{PRICES.free_bytes_a_month / 2**30:.0f} GiB"
    minimum = data["minimum charged for a request"]
    assert minimum == f"{PRICES.min_request_bytes:,.0f} bytes"
    assert data["added to a message's body"] == f"{PRICES.message_overhead_bytes:.0f} bytes"
    limit = data["subscriptions of a topic, and of a project"]
    assert limit == f"{MAX_SUBSCRIPTIONS:,}"
    assert data["administrative calls"] == f"{MAX_ADMIN_OPS_PER_MIN:,} a minute"
    assert data["a filter"].startswith(f"{MAX_FILTER_BYTES} bytes")
    servers = format_usd(PRICES.servers_usd_a_month).replace("-", " to ")
    assert data["NATS or Redis servers"] == f"{servers} a month"
    assert data["a month"] == f"{SECONDS_A_MONTH:,} s"
    load = Workload(1, 1)
    assert data["a poke"] == f"{load.poke_size_bytes:.0f} bytes"
    batch = load.messages_per_request
    assert data["messages in one request"] == f"{batch.low} to {batch.high}"


def test_the_measured_costs_are_the_models() -> None:
    """Every value in the second table of data."""
    costs = [(alone, batched.partition(" (")[0]) for _, alone, batched, _ in table("datum | alone")]
    poke, receive = CPU_COSTS.poke, CPU_COSTS.pubsub_receive
    nats, redis = CPU_COSTS.nats_receive_us, CPU_COSTS.redis_receive_us
    assert costs == [
        (f"{poke.alone_us:g} µs", f"{poke.batched_us:g} µs"),
        (f"{receive.alone_us:g} µs", f"{receive.batched_us:g} µs"),
        (f"{nats.high:g} µs", f"{nats.low:g} µs"),
        (f"{redis.high:g} µs", f"{redis.low:g} µs"),
    ]


def test_the_watchs_rules_are_the_models() -> None:
    """How long the line must be crossed and left."""

    def written(rules: WatchRules) -> list[str]:
        leave = f"{format_share(rules.leave_at)} of it"
        return [f"{rules.over_for_s:,.0f} s", leave, f"{rules.under_for_s:,.0f} s"]

    assert [rules for _, *rules in table("use | crossed when over the line for")] == [
        written(LOG_RULES),
        written(MIGRATE_RULES),
    ]


def test_misplaced_sessions_as_by_hand() -> None:
    """The copies and the deliveries of the worked example."""
    load = Workload(1000, 50, sessions=10_000, misplaced_share=0.01)
    outcome = evaluate(load, Strategy.PUBSUB_TOPIC)
    assert f"= {outcome.deliveries_per_s / 1000:.5f}  " in PAGE
    assert f"= {outcome.deliveries_per_s:,.1f}  " in PAGE


def test_the_picture_is_the_models(tmp_path: Path) -> None:
    """Drawn again it is the same; `pokebridge plan --plot` of the page's example makes it."""
    strategies = [strategy for strategy in Strategy if strategy.engine == "pubsub"]
    save_plot(tmp_path / "plan.svg", Workload(1000, 50), strategies, TITLES)
    assert drawn(tmp_path / "plan.svg") == drawn(DOCS / "img/plan.svg")


# --- the sums -----------------------------------------------------------------------------------

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def sums() -> Iterator[tuple[str, str]]:
    """Each line ``terms = result`` in a block of calculations."""
    for block in re.findall(r"```calc\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            terms, _, rest = line.partition(" = ")
            yield terms, rest.split()[0]


def value_of(terms: str) -> float:
    """What is written with thousands' commas, ``^`` for powers and exp, computed."""
    plain = terms.replace(",", "").replace("^", "**")
    return _value(ast.parse(plain, mode="eval").body)


def _value(node: ast.expr) -> float:
    match node:
        case ast.BinOp(left, kind, right):
            return _OPERATORS[type(kind)](_value(left), _value(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.Call(ast.Name("exp"), [argument]):
            return math.exp(_value(argument))
        case ast.Constant(float() | int() as number):
            return number
    raise AssertionError(ast.dump(node))


@pytest.mark.parametrize(("terms", "result"), list(sums()))
def test_the_sums_are_right(terms: str, result: str) -> None:
    """Each result is what its terms make, to the digits that are written."""
    digits = len(result.partition(".")[2])
    assert abs(value_of(terms) - value_of(result)) <= 0.5001 * 10**-digits
