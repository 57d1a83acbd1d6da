"""What was recorded once, by commands of its own: `results/scaling/recorded/*.json`, and its tables.

    rows       `python -m experiments.recorded.large_file rows`
    failures   `python -m experiments.recorded.failures`
    engines    `python -m experiments.recorded.launchers`

Too heavy for the study, or in need of programs that few machines have. The tables are made of the files alone.
"""

import json
from pathlib import Path
from typing import Any

from jaxgrad import atomic

FOLDER = Path(__file__).resolve().parents[2] / "results" / "scaling" / "recorded"


def write(name: str, record: dict[str, Any]) -> str:
    """Write a record, sorted and whole or not at all; returns its text."""
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    FOLDER.mkdir(parents=True, exist_ok=True)
    atomic.write(FOLDER / f"{name}.json", text.encode())
    return text


def read(name: str) -> dict[str, Any] | None:
    """A record; None where there is none."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def sections() -> list[str]:
    """Markdown of every record that is there."""
    made = ((record, make) for name, make in _SECTIONS.items() if (record := read(name)) is not None)
    return [make(record) for record, make in made]


def failures(record: dict[str, Any]) -> str:
    """The table of what happens when a process fails."""
    slowest = max(case["seconds_until_all_are_gone"] for case in record["cases"])
    out = [
        f"**When a process fails** (`python -m experiments.recorded.failures`): seconds until all are gone, "
        f"{slowest:.1f} at most (the bar is {record['bar_seconds']}), the exit status of each rank (negative: the "
        "signal that ended it; –: never started), and what the launcher says, or, where one never joins, the others "
        "themselves.\n",
        "| what happens | to rank | of | seconds | exit statuses | what is said |",
        "|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        statuses = ", ".join("–" if status is None else str(status) for status in case["statuses"])
        statuses += f"; launcher {case['status']}" if "status" in case else ""
        out.append(
            f"| {case['what']} | {case['rank']} | {case['processes']} | {case['seconds_until_all_are_gone']:.1f} | "
            f"{statuses} | {case['said']} |"
        )
    return "\n".join([*out, ""])


def engines(record: dict[str, Any]) -> str:
    """How far runs under other launchers are from one process."""
    out = [
        f"**Under schedulers** (`python -m experiments.recorded.launchers`), against `{record['against']}`: "
        "largest difference of a curve, over its start.\n",
        "| engine | command | largest difference | same step sizes |",
        "|---|---|---|---|",
    ]
    for name, engine in record["engines"].items():
        runs = engine["agreement_with_one_process"].values()
        worst = max(run["largest_difference_of_the_excess_over_the_start"] for run in runs)
        same = sum(run["same_step_size"] for run in runs)
        out.append(f"| {name} | `{engine['command']}` | {worst:.1g} | {same} of {len(runs)} |")
    return "\n".join([*out, ""])


def rows(record: dict[str, Any]) -> str:
    """SGD and a full gradient on a file larger than memory should be."""
    disk, memory = record["disk"], record["memory"]
    return (
        f"**{record['rows']:,} rows on disk** ({record['gigabytes']:.1f} GB, "
        f"`python -m experiments.recorded.large_file rows`): SGD (b = {record['b']}) takes "
        f"{disk['steps_per_second']:,.0f} steps a second in {disk['peak_rss_gib']:.2f} GiB, "
        f"{record['steps_per_second_disk_over_memory']:.2f} of the {memory['steps_per_second']:,.0f} in memory "
        f"({memory['peak_rss_gib']:.2f} GiB); a full gradient reads "
        f"{record['gradient']['gigabytes_per_second']:.2f} GB/s, {record['gradient_over_reading']:.2f} of reading it.\n"
    )


_SECTIONS = {"failures": failures, "engines": engines, "rows": rows}
