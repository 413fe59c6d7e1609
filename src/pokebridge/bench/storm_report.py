"""What a storm has shown: figures for a file, and a table for people."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from math import inf
from typing import Any

from pokebridge.bench.storm_run import Storm, StormPlan
from pokebridge.bench.storm_watch import most_in_a_second, percentile
from pokebridge.bench.storm_witness import PokeTime

# Figures in a file: no more digits than mean something.
_DIGITS = 4


def storm_report(plan: StormPlan, storm: Storm, machine_load: float) -> dict[str, Any]:
    """Everything worth keeping; times in seconds from the kill on, where they are moments."""
    watcher, course, sender = storm.watcher, storm.course, storm.sender
    zero_s = course.killed_s or 0.0

    def moment(at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - zero_s, _DIGITS)

    return {
        "clients": plan.clients,
        "instances": plan.fleet.instances,
        "killed": course.killed,
        "struck": len(watcher.struck),
        "back": storm.back,
        "back_s": moment(course.back_s),
        "restarted_s": moment(course.restarted_s),
        "connected": watcher.connected,
        "messages": {
            "wanted_per_s": plan.messages_per_s,
            "sent": sender.sent,
            "resent": sender.resent,
            "refused": sender.refused,
            "lost": watcher.owed,
        },
        "witnesses": {"sent": storm.testimony.sent, "lost": storm.testimony.lost},
        "handshakes": {
            "limit_per_s": plan.fleet.handshakes_per_s,
            "most_in_a_second": {
                name: most_in_a_second(times) for name, times in sorted(watcher.accepted.items())
            },
            "by_status": {str(status): count for status, count in watcher.statuses.items()},
        },
        "others_poke_ms": _poke_times(storm),
        "silence_s": {
            "struck": round(watcher.silence.struck_s, _DIGITS),
            "others": round(watcher.silence.others_s, _DIGITS),
        },
        "machine": {"cores": os.cpu_count(), "load_before": round(machine_load, 2)},
        "samples": [
            asdict(sample) | {"at_s": moment(sample.at_s)}
            for sample in storm.sampler.samples
            if sample.at_s >= (course.calm_from_s or 0)
        ],
        "pokes_by_second": _pokes_by_second(storm),
    }


def _poke_times(storm: Storm) -> dict[str, Any]:
    """How long pokes took to clients of the other instances, before, during and after."""
    course = storm.course
    killed_s, back_s = course.killed_s or inf, course.back_s or inf
    phases = {
        "before": (course.calm_from_s or 0.0, killed_s),
        "storm": (killed_s, back_s),
        "after": (back_s, inf),
    }
    return {
        name: _percentiles_ms(
            [each for each in storm.testimony.poke_times if since_s <= each.asked_s < until_s]
        )
        for name, (since_s, until_s) in phases.items()
    }


def _pokes_by_second(storm: Storm) -> list[dict[str, Any]]:
    zero_s = storm.course.killed_s or 0.0
    seconds: dict[int, list[PokeTime]] = {}
    for each in storm.testimony.poke_times:
        seconds.setdefault(int((each.asked_s - zero_s) // 1), []).append(each)
    return [{"at_s": second + 0.5, **_percentiles_ms(each)} for second, each in seconds.items()]


def _percentiles_ms(times: Sequence[PokeTime]) -> dict[str, Any]:
    took_s = [each.took_s for each in times]
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {"count": len(took_s)} | {
        name: None if (value_s := percentile(took_s, share)) is None else round(value_s * 1000, 2)
        for name, share in shares.items()
    }


def storm_failures(report: dict[str, Any]) -> Sequence[str]:
    """What a storm must not end with, if it did."""
    failures = []
    if report["back_s"] is None:
        failures.append(
            f"{report['connected']} of {report['clients']} clients are connected, and"
            f" {report['back']} of the {report['struck']} struck have come back and pulled"
        )
    if lost := report["messages"]["lost"] + report["witnesses"]["lost"]:
        failures.append(f"{lost} messages were lost")
    return failures


def storm_table(report: dict[str, Any]) -> str:
    """The summary, a line for each thing."""
    messages, handshakes = report["messages"], report["handshakes"]
    pokes, silence = report["others_poke_ms"], report["silence_s"]
    back = "never" if report["back_s"] is None else f"after {report['back_s']:.1f} s"
    most = ", ".join(f"{each} {name}" for name, each in handshakes["most_in_a_second"].items())
    statuses = ", ".join(f"{each} x {status}" for status, each in handshakes["by_status"].items())
    sent = f"{messages['sent']} sent, {messages['resent']} of them again"
    machine = report["machine"]
    rows = [
        ("clients", f"{report['clients']} on {report['instances']} instances"),
        ("killed", f"{report['killed']}, with {report['struck']} sessions"),
        ("back", f"{report['back']} of {report['struck']} have pulled, all {back}"),
        ("messages", f"{sent}, {messages['refused']} refused, {messages['lost']} lost"),
        ("handshakes", statuses),
        ("", f"at most {most} in a second; the limit is {handshakes['limit_per_s']}"),
        ("poke p50", _phases(pokes, "p50")),
        ("poke p99", _phases(pokes, "p99")),
        ("silence", f"{silence['struck']:.1f} s at most, {silence['others']:.2f} s on the others"),
        ("machine", f"{machine['cores']} cores, load before: {machine['load_before']:g}"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _phases(pokes: dict[str, Any], name: str) -> str:
    figures = [
        "-" if pokes[phase][name] is None else f"{pokes[phase][name]:.1f} ms {phase}"
        for phase in ("before", "storm", "after")
    ]
    return ", ".join(figures)
