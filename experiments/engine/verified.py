"""What was verified on which machines: kept in `verified.json`, and shown as a table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.engine import results
from experiments.engine.verify import VERDICTS, Comparison
from jaxgrad import atomic

WHERE = ("device_kind", "system", "architecture", "cores", "processor", "instructions")
"""What tells machines apart in the table of re-runs."""


def note(folder: str | Path, rerun: str | Path, device: str, comparisons: Iterable[Comparison]) -> Path:
    """Keep in `folder/verified.json` what was found, in place of what an earlier re-run on the like found."""
    comparisons = [one for one in comparisons if (Path(rerun) / one.name / f"{device}.json").is_file()]
    here = results.read(rerun, comparisons[0].name, device).provenance
    where = {
        "python": here["versions"]["python"],
        "jax": here["versions"]["jax"],
        "device": device,
        **{key: here["machine"].get(key) for key in WHERE},
    }
    found = {
        one.name: {
            "seal": results.seal(folder, one.name, device),
            **{verdict: one.count(verdict) for verdict in VERDICTS},
        }
        for one in comparisons
        if (Path(folder) / one.name / f"{device}.json").is_file()
    }
    path = Path(folder) / "verified.json"
    # What was found about results that are no longer there goes.
    others = [old for old in noted(folder) if old["where"] != where and _current(folder, old)]
    notes = sorted(
        [*others, {"where": where, "found": found}], key=lambda one: json.dumps(one["where"], sort_keys=True)
    )
    atomic.write(path, (json.dumps(notes, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
    return path


def noted(folder: str | Path) -> list[dict[str, Any]]:
    path = Path(folder) / "verified.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _current(folder: str | Path, note: dict[str, Any]) -> list[dict[str, Any]]:
    """What a note says of the results that are there now."""
    device = note["where"]["device"]
    return [found for name, found in note["found"].items() if results.has_seal(folder, name, device, found["seal"])]


def table(folder: str | Path) -> str:
    """What was verified where, as a Markdown table: of the results that are there now, not of those that were."""
    lines = [f"| re-run on | experiments | {' | '.join(VERDICTS)} |", "|---|---|---|---|---|---|"]
    for size, place in (("", Path(folder)), (", `--quick`", Path(folder) / "quick")):
        for one in noted(place):
            where = one["where"]
            if now := _current(place, one):
                kind = f"{where['cores']} cores" if where["device"] == "cpu" else ", ".join(where["device_kind"])
                processor = where.get("processor") or f"{where['system']} {where['architecture']}"
                kind += f", {where['instructions']}" if where.get("instructions") else ""
                machine = f"{processor}, {kind}"
                counts = " | ".join(str(sum(found[verdict] for found in now)) for verdict in VERDICTS)
                lines.append(
                    f"| Python {where['python']}, jax {where['jax']}, {machine}{size} | {len(now)} | {counts} |"
                )
    return "\n".join(lines) if len(lines) > 2 else "Nothing has been verified since these results were recorded."
