"""How fast, by batch size: steps, examples and seconds to a certified gap, and which batch size is fastest (C2).

Linear regression on diamonds. For every batch size theory gives the constant step size that reaches a target soonest,
and in how many steps the **expected** gap is there, without a single tuning run. Runs with that step size are counted
against it. So nothing is tuned by luck, and the curve of steps against b is exact on these data.

Steps times the measured seconds of a step (one run alone) are the time to the target. From the exact steps for many
targets follows which batch size is fastest where: small batches win coarse targets, and the finer the target the
larger the best batch, because noise must be averaged away.

The critical batch size is where larger batches stop saving steps: fitted to `S(b) = S_min (1 + B γ_b)`, γ_b the
sampling factor (1/b but for large b). Two predictions stand beside it. Usual is the noise scale `tr(HΣ)/GᵀHG`, here its
mean along GD's path: it assumes a step size tuned anew at every step, and on an ill-conditioned problem it is far off.
The other asks when noise stops mattering at GD's own best step size: when the floor is half of the target, which (to
first order in η) is at `B = 2 η mean(rᵢ²‖xᵢ‖²)/target`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, SECONDS, Found, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import geometric, random_keys
from experiments.support.loading import load, some_rows
from experiments.support.shared import brief, first_at_most, label_of, sampling_of
from jaxgrad import losses, models, noise, optimum, statistics
from jaxgrad.descent import advance, init, trajectory
from jaxgrad.sampling import full_batch, with_replacement
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch, Linear


@dataclass(frozen=True)
class Config:
    data: str = "diamonds"
    """A regression data set or a file."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    """b of SGD; the full batch comes on top."""
    shares: tuple[float, ...] = (0.01, 0.001)
    """Targets that are run for, as shares of the starting gap."""
    exact_shares: tuple[float, ...] = (0.1, 0.01, 0.003, 0.001, 0.0003, 0.0001)
    """Targets for which theory counts the steps."""
    most: int = 80_000
    """A target not reached in so many steps is not reached."""
    seeds: int = 1000
    """Runs per batch size and target: gaps are heavy-tailed on these data, and the mean of 50 is far from normal."""
    path_points: int = 8
    """Points of GD's path where the noise scale is measured."""
    repeats: int = 11
    """Rounds of timing."""
    min_seconds: float = 0.005
    """Each contender runs at least this long per round."""
    rows: int | None = None
    """Use only so many examples (None: all)."""


TIMED = True
QUICK = Config(
    batch_sizes=(1, 64),
    shares=(0.01,),
    exact_shares=(0.1, 0.01),
    most=20_000,
    seeds=20,
    path_points=3,
    repeats=6,
    min_seconds=0.001,
    rows=4000,
)
NUMBERS = {
    "data": EXACT, "n": EXACT, "labels": EXACT, "sizes": EXACT, "shares": EXACT, "exact_shares": EXACT,
    "most": EXACT, "seeds": EXACT, "*/steps": EXACT, "exact_steps": EXACT, "*/record": EXACT,
    "seconds": SECONDS, "*/first": Runs(axis=0), "*/mean": RANDOM, "*/z": RANDOM,
    "*/eta": Found(to=0.003), "*/expected": ROUNDING, "exact_etas": Found(to=0.003),
    "bound": ROUNDING,
    "minimum": ROUNDING, "start": ROUNDING, "condition_number": ROUNDING, "gamma": ROUNDING,
    "floor_scale": Found(to=0.003), "noise_scale": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSS = losses.mean_loss(models.linear, losses.squared)
POINTS = 150


def run(config: Config, session: Session) -> dict[str, Any]:
    dataset = load(config)
    if dataset.task != "regression":
        raise ValueError(f"speed_of_convergence needs a regression data set: {dataset.name} is {dataset.task}")
    x, y = (jnp.asarray(leaf) for leaf in some_rows(dataset, config.rows, session.say).batch)
    batch, n = Batch(x, y), len(y)
    geometry, start = theory.problem(batch), models.init_linear(x.shape[1])
    certified = optimum.least_squares(batch)
    gap = float(theory.excess_loss(geometry, start))
    sizes: list[int | None] = [*(b for b in config.batch_sizes if b < n), None]
    numbers: dict[str, Any] = {
        "data": dataset.name,
        "n": n,
        "start": gap,
        "bound": certified.bound,
        "minimum": certified.value,
        "condition_number": theory.condition_number(geometry),
        "labels": [label_of(b) for b in sizes],
        "sizes": np.array([b or n for b in sizes]),
        "gamma": np.array([noise.gamma(sampling_of(b), n) for b in sizes]),
        "shares": np.array(config.shares),
        "exact_shares": np.array(config.exact_shares),
        "most": config.most,
        "seeds": config.seeds,
    }

    session.say("exact steps to each target, at the best step size of each batch size")
    best = {
        share: [theory.best_step(geometry, start, sampling_of(b), share * gap, most=config.most) for b in sizes]
        for share in {*config.exact_shares, *config.shares}
    }
    numbers["exact_steps"] = np.array([[step.steps for step in best[share]] for share in config.exact_shares])
    numbers["exact_etas"] = np.array([[step.eta for step in best[share]] for share in config.exact_shares])

    for k, b in enumerate(sizes):
        session.say(f"{config.seeds} runs to each target, {label_of(b)}")
        numbers |= _runs(config, geometry, batch, {share: (share * gap, best[share][k]) for share in config.shares}, b)

    session.say("seconds of a step")
    took = session.race(
        {label_of(b): _loop(batch, b) for b in sizes}, repeats=config.repeats, min_seconds=config.min_seconds
    )
    numbers["seconds"] = np.array(
        [[t / _timed_steps(b) for t in took[label_of(b)][:3]] for b in sizes]
    )  # median and the ends of its interval

    session.say("the noise scale along GD's path")
    numbers["noise_scale"] = np.array(
        [_path_noise(geometry, batch, share * gap, config.path_points) for share in config.exact_shares]
    )
    # The floor for single examples, to first order; for a batch it is γ_b times that.
    numbers["floor_scale"] = np.array(
        [
            2 * theory.floor_leading(geometry, eta, with_replacement(1)) / (share * gap)
            for eta, share in zip(numbers["exact_etas"][:, -1], config.exact_shares, strict=True)
        ]
    )
    return numbers


def _runs(
    config: Config,
    geometry: theory.Problem,
    batch: Batch,
    targets: dict[float, tuple[float, theory.BestStep]],
    b: int | None,
) -> dict[str, Any]:
    """Runs with the best step size for each target: gaps at record points to one and a half times the exact steps."""
    label, start = label_of(b), models.init_linear(batch.x.shape[1])
    # One run of GD stands for all.
    keys = random_keys(11, 1 if b is None else config.seeds)

    @jax.jit
    def paths(eta: Any, record: Any) -> Any:
        def one(key: Any) -> Any:
            _, seen = trajectory(
                LOSS,
                start,
                batch,
                optimizer=optax.sgd(eta),
                sampling=sampling_of(b),
                key=key,
                record=record,
                observe=lambda params: jnp.append(params.w, params.b),
            )
            return seen

        return jax.vmap(one)(keys)

    numbers: dict[str, Any] = {}
    for share, (target, step) in targets.items():
        numbers[f"{label}/{share:g}/steps"] = step.steps
        numbers[f"{label}/{share:g}/eta"] = step.eta
        if not np.isfinite(step.steps):
            continue
        eta = float(np.float32(step.eta))
        record = np.round(np.linspace(0, max(POINTS, 1.5 * step.steps), POINTS + 1)).astype(int)
        excess = theory.excess_loss(geometry, np.asarray(paths(jnp.float32(eta), jnp.asarray(record))))
        numbers |= {
            f"{label}/{share:g}/record": record,
            f"{label}/{share:g}/mean": excess.mean(axis=0),
            f"{label}/{share:g}/first": first_at_most(excess, record, target),
            f"{label}/{share:g}/expected": theory.sgd_moments(geometry, start, eta, sampling_of(b), record).excess,
        }
        at = int(np.searchsorted(record, step.steps))
        numbers[f"{label}/{share:g}/z"] = _z(excess[:, at], numbers[f"{label}/{share:g}/expected"][at])
    return numbers


def _z(values: np.ndarray, expected: float) -> float:
    """How many standard errors the mean is from what theory expects; for one run, 0 if it agrees in float32."""
    if len(values) == 1:
        return 0.0 if abs(values[0] / expected - 1) < 1e-3 else np.inf
    return float((values.mean() - expected) / (values.std(ddof=1) / np.sqrt(len(values))))


def _timed_steps(b: int | None) -> int:
    return 10 if b is None else max(16, 16_384 // b)


def _loop(batch: Batch, b: int | None) -> Callable[[], Any]:
    """One run alone, so many steps that starting it costs nothing beside them."""
    state, optimizer = init(models.init_linear(batch.x.shape[1]), optax.sgd(1e-3)), optax.sgd(1e-3)
    go = jax.jit(partial(advance, loss=LOSS, optimizer=optimizer, sampling=sampling_of(b), single=True))
    key, until = jax.random.key(0), jnp.int32(_timed_steps(b))
    return lambda: go(state, key, batch, until)


def _path_noise(geometry: theory.Problem, batch: Batch, target: float, points: int) -> float:
    """Mean of the noise scale `tr(HΣ)/GᵀHG` over the steps of GD to the target, each at its best step size."""
    origin = np.zeros(len(geometry.minimiser))
    best = theory.best_step(geometry, origin, full_batch(), target)
    steps = np.unique(np.round(np.linspace(0, max(best.steps - 1, 0), points)).astype(int))
    path = theory.gd_path(geometry, origin, best.eta, steps)
    scales = [noise.measure(LOSS, Linear(w[:-1], w[-1]), batch).noise_scale for w in path]
    return float(np.mean(scales))


# --- what the numbers say --------------------------------------------------------------------------------------


def _tables(numbers: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Exact examples and predicted seconds, `[target, b]`."""
    steps = numbers["exact_steps"]
    return steps * numbers["sizes"][None, :], steps * numbers["seconds"][None, :, 0]


def _winners(numbers: dict[str, Any]) -> list[str]:
    """The fastest batch size, by seconds, at each exact target."""
    return [numbers["labels"][int(np.argmin(row))] for row in _tables(numbers)[1]]


def _crossover(numbers: dict[str, Any]) -> str:
    """Which batch size is fastest where, in words."""
    words, shares, winners = [], numbers["exact_shares"], _winners(numbers)
    at = 0
    while at < len(shares):
        end = at
        while end + 1 < len(shares) and winners[end + 1] == winners[at]:
            end += 1
        span = f"{shares[at]:g}" if at == end else f"{shares[at]:g} down to {shares[end]:g}"
        words.append(f"{winners[at]} for {span}")
        at = end + 1
    return "fastest by the clock to a share of the starting gap: " + "; ".join(words)


def _critical(numbers: dict[str, Any]) -> np.ndarray:
    """B of `S(b) = S_min (1 + B γ_b)` at each exact target, S_min the full batch's, least squares in log S."""
    out = []
    gammas = numbers["gamma"]
    candidates = geometric(0.1, 1e6, 4000)
    for row in numbers["exact_steps"]:
        seen = np.isfinite(row) & (gammas > 0)
        if seen.sum() < 2 or not np.isfinite(row[-1]):
            out.append(np.nan)
            continue
        law = np.log(row[-1] * (1 + candidates[:, None] * gammas[None, seen]))
        out.append(float(candidates[np.argmin(np.sum((law - np.log(row[seen])[None, :]) ** 2, axis=1))]))
    return np.array(out)


def _ran(numbers: dict[str, Any]) -> list[tuple[str, float]]:
    """(batch size, target) pairs that were run."""
    pairs = [(label, share) for share in numbers["shares"] for label in numbers["labels"]]
    return [(label, share) for label, share in pairs if f"{label}/{share:g}/z" in numbers]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    ran = _ran(numbers)
    z = np.array([numbers[f"{label}/{share:g}/z"] for label, share in ran])
    limit = statistics.z_limit(len(ran))
    examples, seconds = _tables(numbers)
    winners = _winners(numbers)
    share = numbers["shares"][0]
    row = int(np.argmin(np.abs(numbers["exact_shares"] - share)))
    best = int(np.argmin(seconds[row]))
    critical, predicted = _critical(numbers), numbers["noise_scale"]
    fit = np.isfinite(critical) & (numbers["exact_shares"] <= 0.01)
    scales = {"noise": critical[fit] / predicted[fit], "floor": critical[fit] / numbers["floor_scale"][fit]}
    finest = float(numbers["exact_shares"].min() * numbers["start"])
    return [
        Claim(
            "C2",
            f"SGD is faster: to {share:g} of the starting gap it takes less time than the full batch",
            f"{numbers['labels'][best]}: {_time(seconds[row, best])}, {_count(examples[row, best])} examples; full "
            f"batch: {_time(seconds[row, -1])}, {_count(examples[row, -1])} examples (exact steps for the mean)",
            "less time and fewer examples",
            bool(seconds[row, best] < seconds[row, -1] and examples[row, best] < examples[row, -1]),
        ),
        Claim(
            "C2",
            "a step of GD gets further than one of SGD: the steps to a target never grow with b",
            f"to {share:g}: "
            + "; ".join(
                f"{label} {_count(steps)}"
                for label, steps in zip(numbers["labels"], numbers["exact_steps"][row], strict=True)
            ),
            "falling with b, at every target",
            bool(all((np.diff(np.where(np.isfinite(r), r, 1e300)) <= 0).all() for r in numbers["exact_steps"])),
        ),
        Claim(
            "C2",
            f"runs are where theory expects them after the exact number of steps: mean gap of {numbers['seeds']} runs, "
            f"{len(ran)} pairs of batch size and target",
            f"largest |z| {np.max(np.abs(z)):.2f}",
            f"at most {limit:.2f} (99 % for all of them together); GD to 0.1 %",
            bool(np.max(np.abs(z)) <= limit),
        ),
        Claim(
            "C2",
            "the finer the target, the larger the fastest batch",
            _crossover(numbers),
            "never smaller at a finer target",
            bool((np.diff([_size(numbers, label) for label in winners]) >= 0).all()),
        ),
        Claim(
            "C2",
            "the critical batch size is the one at which the floor, at GD's best step size, is half of the target",
            "; ".join(
                f"to {share:g}: fitted {c:,.0f}, predicted {p:,.0f}"
                for share, c, p in zip(
                    numbers["exact_shares"][fit], critical[fit], numbers["floor_scale"][fit], strict=True
                )
            ),
            "within a factor of 4, for targets of 1 % and finer",
            bool(fit.any() and scales["floor"].min() > 1 / 4 and scales["floor"].max() < 4),
        ),
        Claim(
            "folklore",
            "refuted: that the critical batch size is the mean noise scale along GD's path, give or take ×3",
            f"too large by a factor of {1 / scales['noise'].max():,.3g} to {1 / scales['noise'].min():,.3g}",
            "too large by more than ×3 at every target",
            bool(fit.any() and scales["noise"].max() < 1 / 3),
        ),
        Claim(
            "C2",
            "every gap is certified: the minimum is known better than the finest target needs",
            f"|value − L*| <= {numbers['bound']:.1e}; finest target {finest:.1e}",
            "a millionth of the finest target",
            bool(numbers["bound"] < 1e-6 * finest),
        ),
    ]


def _size(numbers: dict[str, Any], label: str) -> int:
    return int(numbers["sizes"][numbers["labels"].index(label)])


def headline(numbers: dict[str, Any]) -> str:
    return f"**How fast.** On {numbers['data']}, each batch size with its best step size, {_crossover(numbers)}."


def _time(seconds: float) -> str:
    return brief(seconds, "never")


def _count(number: float) -> str:
    return f"{number:,.0f}" if np.isfinite(number) else "not reached"


def _taken(numbers: dict[str, Any], label: str, share: float) -> tuple[float, float, float]:
    """Median number of steps of the runs to the target, and its 95 % interval; NaN where none was run."""
    if f"{label}/{share:g}/first" not in numbers:
        return np.nan, np.nan, np.nan
    first = numbers[f"{label}/{share:g}/first"]
    if len(first) == 1:
        return float(first[0]), float(first[0]), float(first[0])
    interval = statistics.median_interval(first)
    return float(interval.estimate), float(interval.low), float(interval.high)


def _crossed(numbers: dict[str, Any], label: str, share: float) -> float:
    """Where the mean of the runs first meets the target; NaN where none was run or it does not."""
    if f"{label}/{share:g}/mean" not in numbers:
        return np.nan
    met = numbers[f"{label}/{share:g}/mean"] <= share * numbers["start"]
    return float(numbers[f"{label}/{share:g}/record"][np.argmax(met)]) if met.any() else np.nan


def report(numbers: dict[str, Any]) -> str:
    out = [f'{_crossover(numbers).capitalize()}. "Not reached" means not within {numbers["most"]:,} steps.']
    for share in numbers["shares"]:
        out += [
            "",
            f"To {share:g} of the starting gap (median over {numbers['seeds']} runs with its 95 % interval; seconds of "
            "one run alone):",
            "",
            "| batch | step size | steps, exact for the mean | steps, runs | examples | time |",
            "|---|---|---|---|---|---|",
        ]
        for k, label in enumerate(numbers["labels"]):
            steps, eta = numbers[f"{label}/{share:g}/steps"], numbers[f"{label}/{share:g}/eta"]
            middle, low, high = _taken(numbers, label, share)
            pace, pace_low, pace_high = numbers["seconds"][k]
            if not np.isfinite(middle):
                out.append(f"| {label} | – | {_count(steps)} | – | – | – |")
                continue
            spread = f" ({low:,.0f}–{high:,.0f})" if high > low else ""
            out.append(
                f"| {label} | {eta:.3g} | {_count(steps)} | {middle:,.0f}{spread} | "
                f"{middle * numbers['sizes'][k]:,.0f} | {_time(middle * pace)} ({_time(low * pace_low)}–"
                f"{_time(high * pace_high)}) |"
            )
    return "\n".join(out)


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (steps, seconds, critical) = plots.figure(3, height=4.2)
    sizes, shades = numbers["sizes"], (plots.VERMILLION, plots.BLUE, plots.GREEN)
    for share, colour in zip(numbers["shares"], shades, strict=False):
        row = int(np.argmin(np.abs(numbers["exact_shares"] - share)))
        exact = np.where(np.isfinite(numbers["exact_steps"][row]), numbers["exact_steps"][row], np.nan)
        taken = np.array([_taken(numbers, label, share) for label in numbers["labels"]])
        steps.plot(sizes, exact, color=colour, linewidth=1.2)
        steps.plot(sizes, taken[:, 0], "o", color=colour, markersize=5, fillstyle="none")
        crossed = [_crossed(numbers, label, share) for label in numbers["labels"]]
        steps.plot(sizes, crossed, "o", color=colour, markersize=4.5, label=f"to {100 * share:g} %")
        pace = numbers["seconds"]
        seconds.plot(sizes, exact * pace[:, 0], color=colour, linewidth=1.2)
        _points(seconds, sizes, taken * pace, colour, f"to {100 * share:g} %")
    steps.plot([], [], "o", color=plots.GREY, fillstyle="none", label="median single run")
    finest = numbers["exact_steps"][-1]
    rest = np.where(np.isfinite(finest), finest, np.nan)
    if numbers["exact_shares"][-1] not in numbers["shares"]:
        for axis, values in ((steps, rest), (seconds, rest * numbers["seconds"][:, 0])):
            axis.plot(
                sizes,
                values,
                color=plots.GREY,
                linewidth=1.2,
                label=f"to {100 * numbers['exact_shares'][-1]:g} %, theory",
            )
    for axis in (steps, seconds):
        plots.log_scale(axis, "xy")
        axis.xaxis.set_major_locator(LogLocator(numticks=4))
        axis.set_xlabel("batch size b (last: all)")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * 8)
        axis.legend(loc="upper right")
    steps.set(title="Steps to the target", ylabel="steps; line: exact for the mean")
    seconds.set(title="Time to the target", ylabel="seconds, one run alone")

    fitted, predicted = _critical(numbers), numbers["noise_scale"]
    critical.plot(
        numbers["exact_shares"],
        predicted,
        "s--",
        color=plots.ORANGE,
        markersize=4.5,
        linewidth=1.2,
        label="usual prediction:\nnoise scale along path",
    )
    critical.plot(
        numbers["exact_shares"],
        numbers["floor_scale"],
        "D--",
        color=plots.GREEN,
        markersize=4.5,
        linewidth=1.2,
        label="floor = half the target",
    )
    critical.plot(
        numbers["exact_shares"],
        fitted,
        "o-",
        color=plots.BLACK,
        markersize=4.5,
        linewidth=1.2,
        label="fitted to exact steps",
    )
    best = [_size(numbers, label) for label in _winners(numbers)]
    critical.plot(
        numbers["exact_shares"],
        best,
        "^:",
        color=plots.PURPLE,
        markersize=5,
        linewidth=1.2,
        label="fastest by the clock",
    )
    plots.log_scale(critical, "xy")
    critical.invert_xaxis()
    critical.set(title="Which batch size", xlabel="target, share of the start", ylabel="batch size")
    low, high = critical.get_ylim()
    critical.set_ylim(low, high * 300)
    critical.legend(loc="upper left")
    return figure


def _points(axis: Any, x: np.ndarray, taken: np.ndarray, colour: str, label: str) -> None:
    middle, low, high = np.where(np.isfinite(taken), taken, np.nan).T
    axis.errorbar(
        x, middle, yerr=[middle - low, high - middle], fmt="o", color=colour, markersize=4.5, linewidth=1, label=label
    )


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
