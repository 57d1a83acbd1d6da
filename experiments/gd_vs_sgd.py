"""Full-batch GD against minibatch SGD on real data: per update, per example seen, per second.

Linear regression on diamonds, logistic regression on shuttle and a two-layer net on mnist5k, each with the full
batch and with b = 1, 8, 64, 512 different examples a step (C2, C3). Nothing differs between two curves but the
batch size and its step size: same start, same data, same loop.

Every batch size has one budget: `epochs` passes over the data, and at least `updates` updates (a few passes of
the full batch would be a few updates). Its step size is tuned under that budget on seeds of its own (the grid
point with the lowest
median final loss), then run again with fresh seeds. All runs of a batch size start from the same parameters, so
what varies over seeds is the order of the examples and nothing else.

The gap `L(w_t) − L*` of the convex problems is evaluated in float64 against a certified minimum; the runs are
float32. Data larger than memory (`--data`, npy) stay on disk: `experiments.support.on_disk` says what is then
different. A second on the third axis is a second of one run alone on this machine, steps and sampling, without
compiling and without evaluating the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.engine import machine, plots
from experiments.engine.kinds import EXACT, ROUNDING, SECONDS, Chosen, Runs, Seconds
from experiments.engine.results import Claim
from experiments.engine.session import Session, side_by_side
from experiments.support import on_disk
from experiments.support.exact import decimals, random_keys, two_layer
from experiments.support.loading import load, some_rows
from experiments.support.shared import brief, finals, first_at_most, label_of, sampling_of, size_of
from jaxgrad import data, losses, models, optimum, parallel, statistics
from jaxgrad.descent import descend, log_spaced
from jaxgrad.types import Batch, Loss, Params, Sampling


@dataclass(frozen=True)
class Config:
    data: str | None = None
    """A data set or a file in place of `problems`; its task chooses the model (classes: the two-layer net)."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    problems: tuple[str, ...] = ("diamonds", "shuttle", "mnist5k")
    """Data sets: a linear regression, a logistic one, a net."""
    seeds: int = 20
    """Fresh runs per batch size, side by side in one program."""
    batch_sizes: tuple[int, ...] = (1, 8, 64, 512)
    """b of SGD; the full batch comes on top."""
    epochs: int = 5
    """Passes over the data: the budget of every batch size."""
    updates: int = 1000
    """No batch size has fewer updates than this (convex problems)."""
    updates_net: int = 200
    """The same for the net, whose full-batch update costs more."""
    tuning_seeds: int = 3
    """Runs per step size while tuning."""
    halvings: int = 14
    """Step sizes tried per batch size: `largest · 2^−j`, j below this (the net: as many, from 8)."""
    hidden: int = 32
    """Hidden units of the net."""
    l2: float = 1e-3
    """Penalty `(l2/2)‖w‖²` of logistic regression, which makes its minimum unique."""
    points: int = 60
    """Record points of a curve, evenly spaced in the logarithm of the update."""
    rows: int | None = None
    """Use only so many training examples (None: all)."""
    memory: float | None = None
    """GiB that a file may take; a larger npy, and any folder of npy shards, stays on disk (None: what is free)."""


TIMED = True
QUICK = Config(
    problems=("diamonds", "mnist5k"), seeds=5, batch_sizes=(8,), epochs=4, updates=200, updates_net=60, tuning_seeds=2,
    halvings=7, points=25, rows=4000, hidden=16,
)  # fmt: skip
NUMBERS = {
    "problems": EXACT, "*/what": EXACT, "*/n": EXACT, "*/labels": EXACT, "*/kind": EXACT, "*/steps": EXACT,
    "*/examples": EXACT, "*/start": ROUNDING, "*/minimum": ROUNDING, "*/bound": ROUNDING, "*/etas": ROUNDING,
    "*/eta": Chosen(by="*/tuning", of="*/etas"), "*/tuning": ROUNDING, "*/diverged": EXACT,
    "*/excess": Runs(axis=0), "*/test_accuracy": Runs(axis=0), "*/seconds_per_update": SECONDS,
    "*/seconds_per_update_runs": Seconds(axis=-1),
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""


class Problem(NamedTuple):
    name: str
    what: str
    loss: Loss
    start: Params
    batch: Batch
    spread: parallel.Sharded | None
    """The batch on all devices, where there are several."""
    largest: float
    """The largest step size tried."""
    least_updates: int
    minimum: optimum.Optimum | None
    """Certified, for convex problems."""
    accuracy: Callable[[Params], Any] | None
    """Share of held-out examples classified right, for classes."""


IN_PARALLEL = True
"""It spreads its rows over all processes and devices, and saves itself as it goes."""


def run(config: Config, session: Session) -> dict[str, Any]:
    with session.stops_at_checkpoint():
        if config.data is not None and machine.stays_on_disk(config.data, config.memory):
            return on_disk.run(config, session)
        return _run(config, session)


def _run(config: Config, session: Session) -> dict[str, Any]:
    names = config.problems if config.data is None else (config.data,)
    numbers: dict[str, Any] = {"problems": []}
    jobs: list[tuple[Problem, int | None]] = []
    for name in names:
        session.say(f"loading {name}")
        problem = _problem(name, config, session)
        prefix = problem.name
        n = problem.batch.x.shape[0]
        sizes: list[int | None] = [None, *([b for b in config.batch_sizes if b < n] or [max(1, n // 2)])]
        jobs += [(problem, b) for b in sizes]
        numbers["problems"].append(prefix)
        numbers |= {
            f"{prefix}/what": problem.what,
            f"{prefix}/n": n,
            f"{prefix}/labels": [label_of(b) for b in sizes],
            f"{prefix}/kind": "gap to the minimum" if problem.minimum else "training loss",
            f"{prefix}/start": _excess(problem, jax.tree.map(lambda leaf: leaf[None], problem.start))[0],
        }
        if problem.minimum:
            numbers |= {f"{prefix}/minimum": problem.minimum.value, f"{prefix}/bound": problem.minimum.bound}
    found = side_by_side(lambda job: _tuned(job[0], job[1], config, session), jobs)
    for (problem, b), run_numbers in zip(jobs, found, strict=True):
        session.say(f"{problem.name}, {label_of(b)}: seconds per update")
        per_update = _seconds_per_update(problem, sampling_of(b), run_numbers["eta"], jax.random.key(2023), session)
        run_numbers |= {
            "seconds_per_update": float(np.median(per_update)),
            "seconds_per_update_runs": per_update,
        }
        numbers |= {f"{problem.name}/{label_of(b)}/{key}": value for key, value in run_numbers.items()}
    return numbers


def _problem(name: str, config: Config, session: Session) -> Problem:
    """The data set with the model and the loss that its task calls for."""
    dataset = load(config, name)
    train, test = data.split(dataset, 0.2, 0) if dataset.task == "classes" else (dataset, None)
    some = some_rows(train, config.rows, session.say)
    x, y = (jnp.asarray(leaf) for leaf in some.batch)
    batch, (n, d) = Batch(x, y), x.shape
    size = f"n = {n:,}" + ("" if some is train else f" of {len(train.batch.x):,} at random")
    spread = parallel.shard(batch, parallel.mesh()) if len(jax.devices()) > 1 else None
    short = dataset.name
    if test is not None:
        k = len(dataset.labels)
        model = partial(models.two_layer, activation=jnp.tanh)
        start = two_layer(0, d, config.hidden, k)
        x_test, y_test = jnp.asarray(test.batch.x), jnp.asarray(test.batch.y)

        def accuracy(params: Params) -> Any:
            logits = jax.vmap(lambda x: model(params, x))(x_test)
            return jnp.mean(jnp.argmax(logits, axis=-1) == y_test)

        loss = losses.mean_loss(model, losses.softmax_cross_entropy)
        what = f"two-layer net {d}–{config.hidden}–{k}, {size}"
        return Problem(short, what, loss, start, batch, spread, 16.0, config.updates_net, None, accuracy)
    start = models.init_linear(d)
    # Beyond 2/λmax not even the full batch converges; the largest curvature of the logloss is λmax(E x xᵀ)/4.
    ones = np.column_stack([np.asarray(x, float), np.ones(n)])
    top = decimals(np.linalg.eigvalsh(ones.T @ ones / n)[-1])
    if dataset.task == "binary":
        loss = losses.mean_loss(models.linear, losses.logloss, l2=config.l2)
        minimum = optimum.logistic(batch, l2=config.l2)
        what = f"logistic regression, {size}, d = {d}"
        return Problem(short, what, loss, start, batch, spread, 8 / top, config.updates, minimum, None)
    loss = losses.mean_loss(models.linear, losses.squared)
    minimum = optimum.least_squares(batch)
    what = f"linear regression, {size}, d = {d}"
    return Problem(short, what, loss, start, batch, spread, 1 / top, config.updates, minimum, None)


def _tuned(problem: Problem, b: int | None, config: Config, session: Session) -> dict[str, Any]:
    """One problem and batch size: tune the step size, then run with fresh seeds."""
    n = problem.batch.x.shape[0]
    steps = max(-(-config.epochs * n // (b or n)), problem.least_updates)
    session.say(f"{problem.name}, {label_of(b)}: tuning the step size under {steps:,} updates")
    etas = np.ldexp(problem.largest, -np.arange(config.halvings))
    # Without sampling there is nothing random: one run stands for all.
    tuning, runs = (1, 1) if b is None else (config.tuning_seeds, config.seeds)

    def tuned() -> np.ndarray:
        final = finals(
            problem.loss,
            problem.start,
            problem.spread or problem.batch,
            sampling_of(b),
            steps,
            random_keys(2021, tuning),
            etas,
        )
        return np.median(np.where(np.isfinite(final), final, np.inf), axis=1)

    score = session.keep(f"{problem.name} {label_of(b)} tuning", tuned)
    eta = float(etas[np.argmin(score)])
    session.say(f"{problem.name}, {label_of(b)}: {runs} fresh runs with step size {eta:.3g}")
    many = descend(
        problem.loss,
        problem.start,
        problem.spread or problem.batch,
        optimizer=eta,
        sampling=sampling_of(b),
        steps=steps,
        key=random_keys(2022, runs),
        record=log_spaced(steps, config.points),
        observe=(lambda params: params) if problem.minimum else problem.accuracy,
        checkpoint=session.checkpoint(f"{problem.name} {label_of(b)}", steps),
    )
    numbers = {
        "eta": eta,
        "etas": etas,
        "tuning": score,
        "steps": many.steps,
        "examples": many.examples,
        "excess": many.loss if problem.minimum is None else _excess(problem, many.observed),
        "diverged": int(sum(s.startswith("diverged") for s in many.status)),
    }
    return numbers | ({"test_accuracy": many.observed[:, -1]} if problem.accuracy else {})


def _seconds_per_update(
    problem: Problem, sampling: Sampling, eta: float, key: jax.Array, session: Session
) -> np.ndarray:
    """Twelve measurements of one run alone, of a length at which the twelve together take about 0.3 s."""

    def chunks(steps: int, points: int) -> np.ndarray:
        trace = descend(
            problem.loss,
            problem.start,
            problem.spread or problem.batch,
            optimizer=eta,
            sampling=sampling,
            steps=steps,
            key=key,
            record=points,
        )
        return np.diff(trace.seconds) / np.diff(trace.steps)

    own = float(np.median(chunks(40, 5)))  # compiles, too
    # One clock decides for all processes, else they would run different numbers of steps.
    probe = float(np.frombuffer(parallel.from_main(lambda: np.float64(own).tobytes()))[0])
    with session.alone():
        return chunks(int(np.clip(0.3 / probe, 48, 1_000_000)), 13)


def _excess(problem: Problem, params: Params) -> np.ndarray:
    """`L(w) − L*` in float64 for parameters with any leading axes; the loss itself where L* is not known."""
    leading = np.shape(jax.tree.leaves(params)[0])[: -np.ndim(jax.tree.leaves(problem.start)[0])]
    flat = jax.tree.map(lambda leaf, one: np.reshape(leaf, (-1, *np.shape(one))), params, problem.start)
    with jax.enable_x64(True):
        if problem.minimum is None:
            values = jax.jit(lambda p: jax.lax.map(lambda one: problem.loss(one, problem.batch), p))(flat)
            return np.asarray(values).reshape(leading)
        wide = Batch(*(np.asarray(leaf, np.float64) for leaf in problem.batch))
        flat = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), flat)
        values = jax.jit(lambda p, batch: jax.lax.map(lambda one: problem.loss(one, batch), p))(flat, wide)
        return np.asarray(values).reshape(leading) - problem.minimum.value


# --- what the numbers say --------------------------------------------------------------------------------------


def _of(numbers: dict[str, Any], problem: str) -> Callable[[str], Any]:
    """The numbers of one problem, by their names without it."""
    return lambda key: numbers[f"{problem}/{key}"]


class Reached(NamedTuple):
    """Medians over runs of what it took to get to the target."""

    updates: float
    examples: float
    seconds: float


def _reached(numbers: dict[str, Any], problem: str) -> tuple[str, dict[str, Reached]]:
    """The target (1 % of the starting gap; for the net, half its starting loss), and what each batch size took."""
    convex = f"{problem}/minimum" in numbers
    share, words = (0.01, "1 % of the starting gap") if convex else (0.5, "half the starting loss")
    target, out = share * numbers[f"{problem}/start"], {}
    for label in numbers[f"{problem}/labels"]:
        excess, steps = numbers[f"{problem}/{label}/excess"], numbers[f"{problem}/{label}/steps"]
        examples = numbers[f"{problem}/{label}/examples"]
        seconds = steps * numbers[f"{problem}/{label}/seconds_per_update"]
        out[label] = Reached(
            *(float(np.median(first_at_most(excess, axis, target))) for axis in (steps, examples, seconds))
        )
    return words, out


def _after_one_pass(numbers: dict[str, Any], problem: str) -> dict[str, np.ndarray]:
    """Per batch size, the excess of each run at the first record point at or after one pass, or its last."""
    out = {}
    for label in numbers[f"{problem}/labels"]:
        examples = numbers[f"{problem}/{label}/examples"]
        at = min(np.searchsorted(examples, numbers[f"{problem}/n"]), len(examples) - 1)
        out[label] = numbers[f"{problem}/{label}/excess"][:, at]
    return out


def _scatter(values: np.ndarray) -> float:
    """The 90 % quantile of runs over the 10 % quantile."""
    low, high = statistics.quantile_band(values)
    return float(high / low)


def claims(numbers: dict[str, Any]) -> list[Claim]:
    out = []
    for problem in numbers["problems"]:
        gd, *sgd = numbers[f"{problem}/labels"]
        kind = numbers[f"{problem}/kind"]
        passed = _after_one_pass(numbers, problem)
        middle = {label: float(np.median(values)) for label, values in passed.items()}
        best = min(sgd, key=middle.__getitem__)
        out.append(
            Claim(
                "C2",
                f"{problem}: after one pass over the data, one step of GD, SGD is ahead ({kind}, median)",
                f"{best}: {middle[best]:.3g}; {gd}: {middle[gd]:.3g}",
                "SGD lower",
                middle[best] < middle[gd],
            )
        )
        words, reached = _reached(numbers, problem)
        best = min(sgd, key=lambda label: reached[label].seconds)
        out.append(
            Claim(
                "C2",
                f"{problem}: SGD gets to {words} in less time than GD",
                f"{best}: {_time(reached[best].seconds)}; {gd}: {_time(reached[gd].seconds)}",
                "SGD sooner",
                reached[best].seconds < reached[gd].seconds,
            )
        )
        scatter = {label: _scatter(passed[label]) for label in sgd}
        out.append(
            Claim(
                "C3",
                f"{problem}: runs of SGD scatter where runs of GD are one and the same "
                "(90 % over 10 % quantile after one pass, each b at its own η)",
                "; ".join(f"{label}: ×{value:.3g}" for label, value in scatter.items()),
                "above ×1 for each b",
                min(scatter.values()) > 1,
            )
        )
    return out


def headline(numbers: dict[str, Any]) -> str:
    parts = []
    for problem in numbers["problems"]:
        words, reached = _reached(numbers, problem)
        gd, *sgd = numbers[f"{problem}/labels"]
        best = min(sgd, key=lambda label: reached[label].seconds)
        what = numbers[f"{problem}/what"]
        parts.append(
            f"{problem} ({what}): to {words}, {best} takes {_time(reached[best].seconds)} and "
            f"{_count(reached[best].examples)} examples, the full batch {_time(reached[gd].seconds)} and "
            f"{_count(reached[gd].examples)}"
        )
    return "**GD against SGD, each with the step size that ends lowest.** " + "; ".join(parts) + "."


def _time(seconds: float) -> str:
    return brief(seconds, "not within the budget")


def _count(number: float) -> str:
    return f"{number:,.0f}" if np.isfinite(number) else "–"


def report(numbers: dict[str, Any]) -> str:
    out = []
    for problem in numbers["problems"]:
        at = _of(numbers, problem)
        words, reached = _reached(numbers, problem)
        accurate = f"{problem}/{at('labels')[0]}/test_accuracy" in numbers
        out.append(f"\n**{problem}**: {at('what')}. To {words}, and at the end of the budget:\n")
        out.append(
            "| batch | step size | time of an update | updates | examples | time | "
            f"{at('kind')} at the end: median (10 %, 90 %) |" + (" held-out accuracy |" if accurate else "")
        )
        out.append("|---|---|---|---|---|---|---|" + ("---|" if accurate else ""))
        for label in at("labels"):
            end = at(f"{label}/excess")[:, -1]
            low, high = statistics.quantile_band(end)
            row = [
                label,
                f"{at(f'{label}/eta'):.3g}",
                _time(at(f"{label}/seconds_per_update")),
                _count(reached[label].updates),
                _count(reached[label].examples),
                _time(reached[label].seconds),
                f"{np.median(end):.3g} ({low:.3g}, {high:.3g})" if len(end) > 1 else f"{end[0]:.3g}",
            ]
            if accurate:
                row.append(f"{np.median(at(f'{label}/test_accuracy')):.3f}")
            out.append("| " + " | ".join(row) + " |")
    return "\n".join(out).strip()


def draw(numbers: dict[str, Any]) -> Figure:
    problems = numbers["problems"]
    figure, axes = plots.figure(3, len(problems), height=2.75 * len(problems) + 0.55, sharey="row")
    for row, problem in enumerate(problems):
        at = _of(numbers, problem)
        for column in range(3):
            axis = axes[3 * row + column]
            for label in at("labels"):
                steps, excess = at(f"{label}/steps"), at(f"{label}/excess")
                x = (steps, at(f"{label}/examples"), steps * at(f"{label}/seconds_per_update"))[column]
                colour = plots.batch_colour(size_of(label))
                seen = slice(1, None)  # a logarithmic axis has no place for the start
                low, high = statistics.quantile_band(excess)
                axis.plot(x[seen], np.median(excess, axis=0)[seen], color=colour, label=label)
                plots.band(axis, x[seen], low[seen], high[seen], colour)
            plots.log_scale(axis, "xy")
            axis.xaxis.set_major_locator(LogLocator(numticks=5))
            axis.set_xlabel(("updates", "examples seen", "seconds (one run)")[column])
            if "minimum" in at("kind"):
                top = at("start")
                lowest = min(
                    float(np.nanmin(statistics.quantile_band(at(f"{label}/excess"))[0])) for label in at("labels")
                )
                axis.set_ylim(max(lowest, 1e-9 * top) / 2, 3 * top)
            else:
                axis.set_ylim(None, 1.3 * at("start"))
        axes[3 * row].set_ylabel({"gap to the minimum": "L(w) − L*"}.get(at("kind"), at("kind")))
        axes[3 * row].set_title(f"{problem}: {at('what')}", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
