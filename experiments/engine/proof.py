"""What verify's verdicts are worth: that a sound re-run passes, and how small a mistake does not.

**Left out.** Each environment in turn stands for a machine that nobody has seen: its echo of the study is compared with
what is published, by tolerances made from the other environments only. Nothing may differ.

**Power.** Every step size, or the target of one example, is changed by 1 %, 0.1 %, ... and the study run again: the
smallest change at which verify says *differs*.

Both are kept in `proof.json` in the folder of the results, with the seal of each result that they are about.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.engine import echoes, results, verify
from experiments.engine.results import Result
from jaxgrad import atomic

LEVELS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Relative changes that are tried, until one passes."""


def left_out(old: Result, heard: dict[str, Result], module: Any) -> dict[str, verify.Comparison]:
    """The verdicts on each echo, by tolerances from the others."""
    found = {}
    for label, echo in heard.items():
        others = {name: other for name, other in heard.items() if name != label}
        known = echoes.measure(old, others, module.NUMBERS)
        found[label] = verify.compare(old, echo, module.NUMBERS, known, timed=False, claims=module.claims)
    return found


def power(names: list[str], differs: Callable[[float, list[str]], dict[str, bool]]) -> dict[str, float | None]:
    """The smallest of `LEVELS` at which each differs, from the largest down; None where not even that does.

    `differs(level, names)` runs these experiments, so changed, and says which differ.
    """
    smallest: dict[str, float | None] = dict.fromkeys(names)
    for level in LEVELS:
        if not names:
            break
        seen = differs(level, names)
        names = [name for name in names if seen[name]]
        smallest |= dict.fromkeys(names, level)
    return smallest


# --- what is kept ------------------------------------------------------------------------------------------------


def note(folder: str | Path, kind: str, device: str, found: dict[str, Any]) -> Path:
    """Keep what was found, by experiment, under `left out`, `eta` or `target`, in place of what was there."""
    path = Path(folder) / "proof.json"
    document = noted(folder)
    own = document.setdefault(device, {}).setdefault(kind, {})
    for name, value in found.items():
        own[name] = {"seal": results.seal(folder, name, device), "found": value}
    atomic.write(path, (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
    return path


def noted(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "proof.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _current(folder: Path, device: str, kind: str) -> dict[str, Any]:
    """What was found about the results that are there now."""
    kept = noted(folder).get(device, {}).get(kind, {})
    return {name: one["found"] for name, one in kept.items() if results.has_seal(folder, name, device, one["seal"])}


def tables(folder: str | Path, device: str = "cpu") -> str:
    """Both as Markdown, for the full size and for `--quick`; empty where nothing was proved."""
    blocks = []
    for size, place in (("", Path(folder)), (" with `--quick`", Path(folder) / "quick")):
        if left := _current(place, device, "left out"):
            blocks.append("\n".join(_left_out_lines(left, size)))
        powers = {kind: _current(place, device, kind) for kind in ("eta", "target")}
        if any(powers.values()):
            blocks.append("\n".join(_power_lines(powers, size)))
    return "\n\n".join(blocks)


def _left_out_lines(left: dict[str, Any], size: str) -> Iterator[str]:
    labels = list(dict.fromkeys(label for found in left.values() for label in found))
    yield f"Each environment{size} against tolerances from the others, of {len(left)} experiments:"
    yield ""
    yield f"| environment left out | experiments | {' | '.join(verify.VERDICTS)} |"
    yield "|---|---|---|---|---|---|"
    for label in labels:
        rows = [found[label] for found in left.values() if label in found]
        yield f"| {label} | {len(rows)} | {' | '.join(str(sum(row[v] for row in rows)) for v in verify.VERDICTS)} |"


def _power_lines(powers: dict[str, dict[str, float | None]], size: str) -> Iterator[str]:
    yield f"The smallest change{size}, of {', '.join(f'{level:g}' for level in LEVELS)}, that verify calls *differs*:"
    yield ""
    yield "| experiment | every step size | one example's target (0.01: or one label) |"
    yield "|---|---|---|"
    for name in sorted(set().union(*powers.values())):
        cells: list[float | str | None] = [powers[kind].get(name, "not tried") for kind in ("eta", "target")]
        words = ("not seen" if cell is None else cell if isinstance(cell, str) else f"{cell:g}" for cell in cells)
        yield f"| {name} | {' | '.join(words)} |"
