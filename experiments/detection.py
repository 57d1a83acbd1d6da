"""Which gradient checker sees a wrong gradient, and ours also says which step of the derivation is wrong.

A zoo of hand-derived gradients of seven losses: right ones, written on several routes and in both floating
types, and wrong ones, each with one or two mistakes that people make. Every gradient is tried at random
parameters, at trained ones, where the gradient is nearly zero, and at saturated ones. A checker should
refuse every wrong gradient and no right one. `jax.test_util.check_grads` is called as it is, with its own
tolerances for float32 and float64; `scipy.optimize.check_grad` returns a number without a verdict, here
refused above 1e-6; the criteria of `torch.autograd.gradcheck` and of HIPS autograd's `check_grads` are applied
to the same central differences with their default tolerances, since neither package is needed otherwise.
Every checker sees the same gradients, those computed in float32 among them.

For our checker the study also counts how often it names the right cause and the right line.

The zoo and the checker have one author. A second table is about mistakes as people report them, in losses of many
kinds (`support/reported`): what our checker says of each, and how many every other checker refuses. The cases were
written before the checker was mended, a few were corrected when it was first tried on them, and it was then mended
with them in view: the table shows which of them it understands, not how it will do on others.
"""

import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import COUNT, EXACT, ROUNDING, SECONDS
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support import checkers
from experiments.support.exact import dyadic
from experiments.support.reported import table
from experiments.support.zoo import SPECIES, Species, right_gradients, wrong_gradient
from jaxgrad.check import check_gradient


@dataclass(frozen=True)
class Config:
    """Size of the zoo."""

    species: tuple[str, ...] = (
        "linear",
        "logistic",
        "cross entropy",
        "softmax",
        "two-layer net",
        "deep net",
        "poisson",
    )
    """Losses."""
    seeds: int = 12
    """Data and parameters drawn this many times for the right gradients."""
    wrong_seeds: int = 1
    """The same for the wrong ones."""
    examples: int = 24
    """Examples in each data set."""
    train_steps: int = 400
    """Descent steps to the trained point."""
    reported: int = 1
    """Of the mistakes as people report them, every this-many-th."""
    cold: bool = True
    """Whether to time the first check of a fresh process, compile included."""


TIMED = True
QUICK = Config(species=("logistic",), seeds=1, train_steps=100, reported=20, cold=False)
NUMBERS = {
    **table.NUMBERS,
    "seconds_*": SECONDS, "smallest_detectable": ROUNDING, "alarms_of_ours": EXACT, "judges": EXACT,
    "kinds": EXACT, "misjudged": EXACT, "misplaced": EXACT, "missed_by_us": EXACT, "mistakes": EXACT,
    "points": EXACT, "right_*": COUNT, "with_*": COUNT, "caught": COUNT, "confusion": COUNT,
    "correct": EXACT, "false_alarms": COUNT, "planted": EXACT,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
POINTS = ("random", "trained", "saturated")


# ------------------------------------------------------------------------------------------ the judges


JUDGES = ("jaxgrad", *checkers.BY_JAX, *checkers.BY_CRITERION)


def _points(species: Species, seed: int, config: Config) -> list[tuple[str, Any, Any]]:
    """Random, trained and saturated parameters with their data."""
    rng = np.random.default_rng([20210407, seed, sum(map(ord, species.name))])
    p, batch = species.draw(rng, config.examples)
    step = _descent(species.loss, species.train, config.train_steps)
    # Rounded: every machine judges the gradient at the same point.
    trained = {k: dyadic(v, 26) for k, v in step(p, batch).items()}
    # Saturated: what the exponentials see is an order of magnitude larger; counts would overflow sooner.
    factor = 3.0 if species.name == "poisson" else 20.0
    return [
        ("random", p, batch),
        ("trained", trained, batch),
        ("saturated", {k: factor * v for k, v in p.items()}, batch),
    ]


_DESCENTS: dict[Any, Any] = {}


def _descent(loss: Callable[..., Any], eta: float, steps: int) -> Any:
    if (loss, eta, steps) not in _DESCENTS:

        def descend(p: Any, batch: Any) -> Any:
            move = lambda _, q: jax.tree.map(lambda a, g: a - eta * g, q, jax.grad(loss)(q, batch))
            return jax.lax.fori_loop(0, steps, move, p)

        _DESCENTS[loss, eta, steps] = jax.jit(descend)
    return _DESCENTS[loss, eta, steps]


def _lines(loss: Callable[..., Any]) -> dict[str, int]:
    source, first = inspect.getsourcelines(loss)
    return {line.split("# ")[1].strip(): first + i for i, line in enumerate(source) if "  # " in line}


def run(config: Config, session: Session) -> dict[str, Any]:
    """Judge the whole zoo."""
    kinds: list[str] = []
    rows: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        for species in (s for s in SPECIES if s.name in config.species):
            session.say(f"{species.name}: {len(species.bugs)} mistakes, {len(right_gradients(species))} right routes")
            rows += _judge_species(species, config, session)
    wrong = [r for r in rows if r["wrong"]]
    right = [r for r in rows if not r["wrong"]]
    caught = np.array([[sum(not r[j] for r in wrong if r["point"] == p) for p in POINTS] for j in JUDGES])
    alarms = np.array([[sum(not r[j] for r in right if r["point"] == p) for p in POINTS] for j in JUDGES])
    planted = np.array([sum(r["point"] == p for r in wrong) for p in POINTS])
    correct = np.array([sum(r["point"] == p for r in right) for p in POINTS])
    named = [r for r in wrong if r["expected"]]
    kinds = sorted({r["expected"][0] for r in named} | {r["found"] for r in named})
    confusion = np.zeros((len(kinds), len(kinds)), int)
    for r in named:
        truth = r["found"] if r["found"] in r["expected"] else r["expected"][0]
        confusion[kinds.index(truth), kinds.index(r["found"])] += 1
    placed = [r for r in wrong if r["places"]]
    numbers: dict[str, Any] = {
        "judges": list(JUDGES),
        "points": list(POINTS),
        "caught": caught,
        "false_alarms": alarms,
        "planted": planted,
        "correct": correct,
        "kinds": kinds,
        "confusion": confusion,
        "right_cause": int(sum(r["found"] in r["expected"] for r in named)),
        "with_cause": len(named),
        "right_line": int(sum(r["line"] in r["places"] for r in placed)),
        "with_line": len(placed),
        "mistakes": sorted({f"{r['species']}: {r['bug']}" for r in wrong}),
        "misjudged": sorted(
            {
                f"{r['species']}: {r['bug']} ({r['point']}): {r['found']}"
                for r in named
                if r["found"] not in r["expected"]
            }
        ),
        "misplaced": sorted(
            {
                f"{r['species']}: {r['bug']} ({r['point']}): line {r['line']}"
                for r in placed
                if r["line"] not in r["places"]
            }
        ),
        "missed_by_us": sorted({f"{r['species']}: {r['bug']} ({r['point']})" for r in wrong if r["jaxgrad"]}),
        "alarms_of_ours": sorted(
            {f"{r['species']}: {r['bug']} ({r['point']}): {r['found']}" for r in right if not r["jaxgrad"]}
        ),
        "smallest_detectable": float(max(r["smallest"] for r in right if "float32" not in r["bug"])),
        "seconds_warm": float(np.median([r["seconds"] for r in right])),
        "seconds_warm_wrong": float(np.median([r["seconds"] for r in wrong])),
    }
    numbers |= table.judge(config.reported, session)
    if config.cold:
        session.say("the first check of a fresh process, compile included")
        with session.alone():
            numbers["seconds_verdict"] = np.array([_cold("") for _ in range(3)])
            numbers["seconds_diagnosis"] = np.array([_cold("sigmoid' left out") for _ in range(3)])
    return numbers


def _judge_species(species: Species, config: Config, session: Session) -> list[dict[str, Any]]:
    lines = _lines(species.loss)
    value = jax.jit(species.loss)
    rows = []
    for seed in range(max(config.seeds, config.wrong_seeds)):
        for name, p, batch in _points(species, seed, config):
            flat, rebuild = _flatten(p)
            at = lambda x, r=rebuild, b=batch: float(value(r(x), b))
            known = checkers.differences(at, flat, np.random.default_rng(seed))
            zoo = (
                [(bug, True, wrong_gradient(species, bug)) for bug in species.bugs] if seed < config.wrong_seeds else []
            )
            if seed < config.seeds:
                zoo += [(route, False, g) for route, g in right_gradients(species).items()]
            for bug, is_wrong, gradient in zoo:
                row = _one(species, bug, is_wrong, gradient, p, batch, known, value, session)
                row["point"] = name
                row["places"] = {lines.get(tag, 0) for tag in species.bugs[bug][1]} if is_wrong else set()
                rows.append(row)
    return rows


def _one(
    species: Species,
    bug: str,
    is_wrong: bool,
    gradient: Any,
    p: Any,
    batch: Any,
    known: Any,
    value: Any,
    session: Session,
) -> dict[str, Any]:
    with session.alone():
        start = time.perf_counter()
        report = check_gradient(species.loss, gradient, p, batch)
        seconds = time.perf_counter() - start
    with np.errstate(all="ignore"):
        g = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in (dict(gradient(p, batch))[k] for k in p)])
    first = report.findings[0] if report.findings else None
    where = first.where.rpartition(":")[2] if first is not None else ""
    return {
        "species": species.name,
        "bug": bug,
        "wrong": is_wrong,
        "expected": species.bugs[bug][0] if is_wrong else (),
        "found": first.kind if first is not None else "none",
        "line": int(where) if where else 0,
        "jaxgrad": report.ok,
        "smallest": report.smallest_detectable,
        "seconds": seconds,
        **{
            judge: checkers.jax_accepts(value, gradient, p, (batch,), dtype) for judge, dtype in checkers.BY_JAX.items()
        },
        **checkers.accepts(known, g),
    }


def _flatten(p: Any) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    names, shapes = list(p), [np.shape(v) for v in p.values()]
    flat = np.concatenate([np.asarray(v).reshape(-1) for v in p.values()])

    def rebuild(x: np.ndarray) -> Any:
        out, at = {}, 0
        for name, shape in zip(names, shapes, strict=True):
            size = int(np.prod(shape))
            out[name] = x[at : at + size].reshape(shape)
            at += size
        return out

    return flat, rebuild


def _cold(bug: str) -> float:
    """Seconds of the first check of the two-layer net in a process of its own, imports not counted."""
    code = (
        "import time, jax, numpy as np\n"
        "from experiments.support.zoo import SPECIES\n"
        "from jaxgrad.check import check_gradient\n"
        "s = next(s for s in SPECIES if s.name == 'two-layer net')\n"
        "p, batch = s.draw(np.random.default_rng(0), 24)\n"
        f"g = lambda p, b: s.hand({bug!r}, p, b)\n"
        "start = time.perf_counter()\n"
        "r = check_gradient(s.loss, g, p, batch)\n"
        "print(time.perf_counter() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """What the zoo shows, and what must hold on mistakes as people report them."""
    caught, planted = np.asarray(numbers["caught"]), np.asarray(numbers["planted"])
    alarms, correct = np.asarray(numbers["false_alarms"]), np.asarray(numbers["correct"])
    cause = numbers["right_cause"] / numbers["with_cause"]
    line = numbers["right_line"] / numbers["with_line"]
    found = [
        Claim(
            "detection",
            f"Our checker refuses every one of {planted.sum()} wrong gradients.",
            f"{caught[0].sum()} refused",
            f"{planted.sum()}",
            bool(caught[0].sum() == planted.sum()),
        ),
        Claim(
            "false alarms",
            f"It refuses none of {correct.sum()} right gradients.",
            f"{alarms[0].sum()} refused",
            "0",
            bool(alarms[0].sum() == 0),
        ),
        Claim(
            "power",
            "In float64 it would have seen an error of 1e-8 in any leaf, at every point.",
            f"{numbers['smallest_detectable']:.1e}",
            "at most 1e-8",
            bool(numbers["smallest_detectable"] <= 1e-8),
        ),
        Claim("cause", "It names the right cause.", f"{cause:.1%}", "at least 95%", bool(cause >= 0.95)),
        Claim("line", "It names the right line of the loss.", f"{line:.1%}", "at least 90%", bool(line >= 0.9)),
    ]
    others = caught[1:].sum(axis=1)
    best = int(np.argmax(others))
    found.append(
        Claim(
            "others",
            "No other checker refuses as many of them.",
            f"{others[best]} by {numbers['judges'][1 + best]}",
            f"fewer than {planted.sum()}",
            bool(others[best] < planted.sum()),
        )
    )
    if "seconds_verdict" in numbers:
        verdict, diagnosis = (
            float(np.median(numbers["seconds_verdict"])),
            float(np.median(numbers["seconds_diagnosis"])),
        )
        found.append(
            Claim(
                "verdict time",
                "The first verdict on a two-layer net, compile included, takes at most 1 s.",
                f"{verdict:.2f} s",
                "at most 1 s",
                verdict <= 1.0,
            )
        )
        found.append(
            Claim(
                "diagnosis time",
                "The first diagnosis, compile included, takes at most 3 s.",
                f"{diagnosis:.2f} s",
                "at most 3 s",
                diagnosis <= 3.0,
            )
        )
    return found + table.claims(numbers)


def draw(numbers: dict[str, Any]) -> Figure:
    """Above: wrong gradients let through, and what was planted against what was named. Below: reported mistakes."""
    figure, axes = plots.figure(2, 2, height=8.6, width_ratios=(1.15, 1), height_ratios=(1.25, 1))
    grid = axes[2].get_gridspec()
    for axis in axes[2:]:
        axis.remove()
    _draw_missed(axes[0], numbers)
    _draw_named(axes[1], numbers)
    table.draw(figure.add_subplot(grid[1, :]), numbers)
    return figure


def _draw_missed(axis: Axes, numbers: dict[str, Any]) -> None:
    judges, points = list(numbers["judges"]), list(numbers["points"])
    caught, planted = np.asarray(numbers["caught"]), np.asarray(numbers["planted"])
    alarms, correct = np.asarray(numbers["false_alarms"]), np.asarray(numbers["correct"])
    rows = np.arange(len(judges))
    colours = (plots.BLUE, plots.ORANGE, plots.VERMILLION)
    height = 0.25
    for i, (point, colour) in enumerate(zip(points, colours, strict=True)):
        missed = 100 * (planted[i] - caught[:, i]) / planted[i]
        at = rows + (i - 1) * height
        axis.barh(at, missed, height * 0.9, color=colour, label=f"{point} parameters")
        for y, share, count in zip(at, missed, planted[i] - caught[:, i], strict=True):
            axis.text(share + 1, y, f"{count}", va="center", fontsize=7.5, color=plots.ink(colour))
    names = [
        f"{judge}\n{alarms[j].sum()} false alarm{'' if alarms[j].sum() == 1 else 's'}" for j, judge in enumerate(judges)
    ]
    axis.set_yticks(rows, names, fontsize=8)
    axis.get_yticklabels()[0].set_fontweight("bold")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    most = float(np.max(100 * (planted[None, :] - caught) / planted[None, :]))
    axis.set_xlim(0, max(10.0, 1.15 * most))
    axis.set_xlabel(f"let through, % of {planted[0]} at each kind of point")
    axis.set_title(f"{planted.sum()} wrong, {correct.sum()} right gradients")
    axis.legend(fontsize=8, loc="upper right")


def _draw_named(axis: Axes, numbers: dict[str, Any]) -> None:
    kinds = list(numbers["kinds"])
    confusion = np.asarray(numbers["confusion"], float)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(len(kinds)):
        for j in range(len(kinds)):
            if confusion[i, j]:
                dark = share[i, j] > 0.6
                axis.text(
                    j,
                    i,
                    f"{int(confusion[i, j])}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else plots.BLACK,
                )
    axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=7.5)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=7.5)
    axis.grid(visible=False)
    axis.set_xlabel("diagnosis", fontsize=9)
    axis.set_title("planted (rows) and named")


def report(numbers: dict[str, Any]) -> str:
    """The detection matrix as a table, what was misjudged, and the table of reported mistakes."""
    judges = list(numbers["judges"])
    caught, planted = np.asarray(numbers["caught"]), np.asarray(numbers["planted"])
    alarms, correct = np.asarray(numbers["false_alarms"]), np.asarray(numbers["correct"])
    head = " | ".join(f"missed, {p}" for p in numbers["points"])
    lines = [f"| checker | {head} | missed in all | false alarms |", "|---|" + "---:|" * (len(numbers["points"]) + 2)]
    for j, judge in enumerate(judges):
        cells = " | ".join(str(int(m)) for m in planted - caught[j])
        lines.append(
            f"| {judge} | {cells} | {int((planted - caught[j]).sum())} of {planted.sum()} "
            f"| {int(alarms[j].sum())} of {correct.sum()} |"
        )
    cause, line = numbers["right_cause"] / numbers["with_cause"], numbers["right_line"] / numbers["with_line"]
    lines += [
        "",
        f"Of {numbers['with_cause']} wrong gradients ({len(numbers['mistakes'])} different mistakes) our checker names "
        f"the right cause for {cause:.1%}, and the right line for {line:.1%} of the {numbers['with_line']} that have "
        f"one. A check takes {1e3 * numbers['seconds_warm']:.0f} ms when the loss is compiled already "
        f"({1e3 * numbers['seconds_warm_wrong']:.0f} ms with a diagnosis).",
    ]
    for key, title in (
        ("missed_by_us", "Missed by us"),
        ("alarms_of_ours", "False alarms of ours"),
        ("misjudged", "Another cause named"),
        ("misplaced", "Another line named"),
    ):
        items: Sequence[str] = list(numbers[key])
        if items:
            lines += ["", f"{title}: " + "; ".join(items) + "."]
    lines += ["", *table.report(numbers)]
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
