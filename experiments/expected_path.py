"""The mean path of SGD and the scatter of its runs, predicted exactly at every step, and its noise floor and edge.

SGD on linear regression is noisy (C3), and all of its noise is computable beforehand from the data: the expected
loss after t steps, the standard deviation of single runs about it, the floor it settles at, and the step size
beyond which the mean explodes. Nothing is fitted and no step size is small. Lines are those predictions; points are
means over thousands of runs, which must lie within a simultaneous limit of the lines at every checkpoint.

The data are a few real features (the fourth moments behind the predicted scatter are affordable for up to four
coefficients). The band of single runs has the exact mean and standard deviation; its shape between them, a gamma
distribution, is an approximation, and the share of runs inside is reported.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, CountOf, Mean, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, geometric, random_keys
from experiments.support.loading import few_features, load
from experiments.support.shared import runs_of
from jaxgrad import losses, models, statistics
from jaxgrad.descent import log_spaced
from jaxgrad.sampling import distinct, full_batch, with_replacement
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Sampling


@dataclass(frozen=True)
class Config:
    data: str = "diabetes"
    """A regression data set or a file."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    features: int = 2
    """Only the features most correlated with the target: at most 3."""
    rows: int | None = None
    """Use only so many examples (None: all)."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    eta: float = 0.2
    """Step size of the paths for all b, as a fraction of the second-moment edge at the smallest b."""
    steps: int = 300
    points: int = 13
    """Checkpoints at which means are compared."""
    seeds: int = 2000
    floor_fractions: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.65)
    """Step sizes of the floor, as fractions of each b's own second-moment edge."""
    beyond: float = 1.08
    """A step size beyond the edge at the smallest b."""
    shown: int = 40
    """Single runs that are drawn."""


QUICK = Config(batch_sizes=(1, 16), steps=120, points=9, seeds=400, floor_fractions=(0.2, 0.4), shown=20)
NUMBERS = {
    "data": EXACT, "n": EXACT, "features": EXACT, "sizes": EXACT, "steps": EXACT, "every": EXACT,
    "seeds": EXACT, "beyond/fraction": EXACT, "gd/runs": ROUNDING, "*/runs": EXACT,
    "*/measured": Mean(deviation="*/deviation"), "*/square": Mean(error="*/square_error"),
    "*/square_error": RANDOM, "*/single": Runs(axis=0), "*/inside": CountOf("seeds"),
    "floors[2]": Mean(deviation="floors[4]"), "floors[*]": ROUNDING, "beyond/line": ROUNDING,
    "beyond/eta": ROUNDING, "beyond/*": RANDOM, "gd": ROUNDING, "*edge": ROUNDING, "eta": ROUNDING,
    "value": ROUNDING, "start": ROUNDING, "*/deviation": ROUNDING, "*/fine": ROUNDING, "*/floor": ROUNDING,
    "*/leading": ROUNDING, "*/line": ROUNDING, "*/line_deviation": ROUNDING, "*/mean": ROUNDING,
    "*/tame": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSS = losses.mean_loss(models.linear, losses.squared)
KINDS = {"with replacement": with_replacement, "distinct": distinct}
LEVEL = 0.99


def run(config: Config, session: Session) -> dict[str, Any]:
    dataset = load(config)
    if dataset.task != "regression":
        raise ValueError(f"expected_path needs a regression data set: {dataset.name} is {dataset.task}")
    batch, names = few_features(dataset, config.features, config.rows)
    problem, start = theory.problem(batch), models.init_linear(batch.x.shape[1])
    sizes = [b for b in config.batch_sizes if b <= len(batch.y)]
    smallest = distinct(sizes[0])
    edge = theory.sgd_edge(problem, smallest)
    eta = float(np.float32(config.eta * edge))
    record = log_spaced(config.steps, config.points + 1)[1:]
    every = log_spaced(config.steps, 61)[1:]
    keys = random_keys(5, config.seeds)
    numbers: dict[str, Any] = {
        "data": dataset.name, "n": len(batch.y), "features": list(names), "sizes": np.array(sizes), "eta": eta,
        "edge": edge, "gd_edge": theory.edge(problem), "steps": record, "every": every, "seeds": config.seeds,
        "value": problem.value, "start": float(theory.excess_loss(problem, start)),
        "gd": theory.gd_excess(problem, start, eta, every),
    }  # fmt: skip

    def gaps(eta: float, sampling: Sampling, record: np.ndarray) -> np.ndarray:
        """`L(w_t) − L*[run, checkpoint]`, of float32 runs, in float64."""
        runs = runs_of(keys, jnp.float32(eta), batch, jnp.asarray(record, jnp.int32), start, sampling=sampling)
        with np.errstate(over="ignore", invalid="ignore"):
            return theory.excess_loss(problem, np.asarray(runs, float).reshape(-1, runs.shape[-1])).reshape(
                runs.shape[:2]
            )

    floors, settled = [], np.full(len(record), 0)
    for kind, make in KINDS.items():
        for b in sizes:
            sampling, name = make(b), f"{kind} {b}"
            session.say(f"{config.seeds:,} runs {kind}, b = {b}")
            seen = gaps(eta, sampling, record)
            numbers |= compare(problem, start, eta, sampling, record, seen, name)
            numbers[f"{name}/line"] = theory.sgd_moments(problem, start, eta, sampling, every).excess
            if kind != "distinct":
                continue
            numbers[f"{name}/line_deviation"] = theory.sgd_deviation(problem, start, eta, sampling, every)
            numbers[f"{name}/single"] = seen[: config.shown]
            low, high = gamma_band(numbers[f"{name}/mean"], numbers[f"{name}/deviation"])
            numbers[f"{name}/inside"] = np.sum((low <= seen) & (seen <= high), axis=0)

            # The floor: the end of runs long enough for what is left of the start to be small beside it.
            own_edge, tame = theory.sgd_edge(problem, sampling), theory.deviation_edge(problem, sampling)
            for fraction in config.floor_fractions:
                own = float(np.float32(fraction * own_edge))
                if own > 0.9 * tame:
                    continue  # the variance of the loss is about to explode: a sample mean would say nothing
                ends = settled + 2 * int(np.ceil(5 / (own * problem.eigenvalues[-1])))
                final = gaps(own, sampling, ends)[:, -1]
                exact = theory.sgd_moments(problem, start, own, sampling, ends[-1:]).excess[0]
                deviation = theory.sgd_deviation(problem, start, own, sampling, ends[-1:])[0]
                leading, settles = theory.floor_leading(problem, own, sampling), theory.floor(problem, own, sampling)
                floors.append([b, own, final.mean(), exact, deviation, settles, leading, own / own_edge])
            fine = decimals(geometric(0.02, 0.97, 40) * own_edge)
            numbers[f"{name}/fine"] = fine
            numbers[f"{name}/floor"] = np.array([theory.floor(problem, e, sampling) for e in fine])
            numbers[f"{name}/leading"] = np.array([theory.floor_leading(problem, e, sampling) for e in fine])
            numbers[f"{name}/edge"], numbers[f"{name}/tame"] = own_edge, tame
    numbers["floors"] = np.array(floors)

    session.say(f"beyond the edge: {config.beyond:g} of it")
    over = float(np.float32(config.beyond * edge))
    runs = gaps(over, smallest, record)
    numbers |= {
        "beyond/eta": over,
        "beyond/fraction": config.beyond,
        "beyond/mean": runs.mean(axis=0),
        "beyond/median": np.median(runs, axis=0),
        "beyond/largest": runs.max(axis=0),
        "beyond/quantiles": np.stack(statistics.quantile_band(runs)),
        "beyond/line": theory.sgd_moments(problem, start, over, smallest, every).excess,
    }
    full = runs_of(keys[:2], jnp.float32(eta), batch, jnp.asarray(record, jnp.int32), start, sampling=full_batch())
    numbers["gd/runs"] = theory.excess_loss(problem, np.asarray(full, float).reshape(-1, full.shape[-1])).reshape(2, -1)
    return numbers


def compare(
    problem: theory.Problem,
    start: Any,
    eta: float,
    sampling: Sampling,
    record: np.ndarray,
    gaps: np.ndarray,
    name: str,
) -> dict[str, Any]:
    """Measured mean and mean square of the gap `gaps[run, checkpoint]`, and the exact ones beside them."""
    return {
        f"{name}/measured": gaps.mean(axis=0),
        f"{name}/square": np.mean(gaps**2, axis=0),
        f"{name}/square_error": np.std(gaps**2, axis=0, ddof=1) / np.sqrt(len(gaps)),
        f"{name}/runs": len(gaps),
        f"{name}/mean": theory.sgd_moments(problem, start, eta, sampling, record).excess,
        f"{name}/deviation": theory.sgd_deviation(problem, start, eta, sampling, record),
    }


def gamma_band(mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 10 % and 90 % quantiles of the gamma distribution with that mean and standard deviation."""
    shape = (mean / np.maximum(deviation, 1e-300)) ** 2
    quantiles = [stats.gamma.ppf(q, np.minimum(shape, 1e12)) * mean / np.minimum(shape, 1e12) for q in (0.1, 0.9)]
    return quantiles[0], quantiles[1]


# --- what the numbers say --------------------------------------------------------------------------------------


def mean_z(numbers: dict[str, Any], name: str) -> np.ndarray:
    """`(mean of the runs − exact)/exact standard error` at the checkpoints; nothing in it is estimated."""
    error = numbers[f"{name}/deviation"] / np.sqrt(numbers[f"{name}/runs"])
    return (numbers[f"{name}/measured"] - numbers[f"{name}/mean"])[error > 0] / error[error > 0]


def square_z(numbers: dict[str, Any], name: str) -> np.ndarray:
    """The same for the mean of the squared gap, whose standard error is that of the runs."""
    exact = numbers[f"{name}/deviation"] ** 2 + numbers[f"{name}/mean"] ** 2
    return (numbers[f"{name}/square"] - exact) / numbers[f"{name}/square_error"]


def _configurations(numbers: dict[str, Any]) -> list[str]:
    return [f"{kind} {b}" for kind in KINDS for b in numbers["sizes"]]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    names = _configurations(numbers)
    means = np.concatenate([mean_z(numbers, name) for name in names])
    squares = np.concatenate([square_z(numbers, name) for name in names])
    limit = statistics.z_limit(len(means), level=LEVEL)
    out = [
        Claim(
            "C3",
            f"the mean loss of {numbers['seeds']:,} runs is the exact expectation: {len(names)} ways of sampling, "
            f"{len(numbers['steps'])} checkpoints each",
            f"largest deviation {np.abs(means).max():.2f} exact standard errors of {len(means)}",
            f"at most {limit:.2f} (99 %, all together)",
            bool(np.abs(means).max() <= limit),
        ),
        Claim(
            "C3",
            "the scatter of single runs is the exact one (mean squared gap)",
            f"largest deviation {np.abs(squares).max():.2f} standard errors of {len(squares)}",
            f"at most {limit:.2f} (99 %, all together)",
            bool(np.abs(squares).max() <= limit),
        ),
    ]
    spread = numbers["gd/runs"]
    deviations = [float(numbers[f"distinct {b}/deviation"][-1]) for b in numbers["sizes"]]
    out.append(
        Claim(
            "C3",
            "at one step size the noise falls with b, to nothing for GD: standard deviation of the gap at the end",
            "; ".join(f"b = {b}: {r:.2g}" for b, r in zip(numbers["sizes"], deviations, strict=True))
            + f"; GD: {np.ptp(spread, axis=0).max():g}",
            "falling with b, 0 for GD",
            bool((np.diff(deviations) < 0).all() and np.ptp(spread, axis=0).max() == 0),
        )
    )
    floors = numbers["floors"]
    z = floor_z(numbers)
    ratio = floors[:, 5] / floors[:, 6]
    out.append(
        Claim(
            "C3",
            f"the noise floor is the exact one at {len(z)} pairs of η and b; ηγ tr S/4 is its leading order only",
            f"largest deviation {np.abs(z).max():.2f} exact standard errors; exact over leading order "
            f"{ratio.min():.2f} to {ratio.max():.2f}",
            f"at most {statistics.z_limit(len(z), level=LEVEL):.2f} (99 %, all together)",
            bool(np.abs(z).max() <= statistics.z_limit(len(z), level=LEVEL)),
        )
    )
    share = np.stack([numbers[f"distinct {b}/inside"] for b in numbers["sizes"]]) / numbers["seeds"]
    out.append(
        Claim(
            "C3",
            "single runs lie in the predicted 10–90 % band (exact mean and deviation, gamma shape)",
            f"{share.min():.1%} to {share.max():.1%} of the runs, over all checkpoints",
            "80 %, give or take 8 (the shape is an approximation)",
            bool(np.abs(share - 0.8).max() < 0.08),
        )
    )
    grown = numbers["beyond/line"][-1] / numbers["start"]
    typical = numbers["beyond/median"][-1] / numbers["start"]
    out.append(
        Claim(
            "C3",
            f"at {numbers['beyond/fraction']:g} of the second-moment edge the mean explodes while typical runs do not",
            f"after {numbers['steps'][-1]} steps the exact mean is ×{grown:.3g} the start, the median run "
            f"×{typical:.3g} and the sample mean ×{numbers['beyond/mean'][-1] / numbers['start']:.3g}",
            "mean above ×100, median below ×10",
            bool(grown > 100 and typical < 10),
        )
    )
    return out


def floor_z(numbers: dict[str, Any]) -> np.ndarray:
    """Deviations of the measured floors, in exact standard errors."""
    floors = numbers["floors"]
    return (floors[:, 2] - floors[:, 3]) / floors[:, 4] * np.sqrt(numbers["seeds"])


def headline(numbers: dict[str, Any]) -> str:
    z = np.concatenate([mean_z(numbers, name) for name in _configurations(numbers)])
    b = numbers["sizes"]
    first, last = (numbers[f"distinct {size}/mean"][-1] for size in (b[0], b[-1]))
    return (
        f"**Predicted noise.** On {numbers['data']} the mean loss of {numbers['seeds']:,} runs lies on the exact curve "
        f"at all {len(z)} checkpoints (largest deviation {np.abs(z).max():.1f} standard errors); with one η, "
        f"b = {b[0]} settles {first / last:,.0f} times as high above the minimum as b = {b[-1]}."
    )


def report(numbers: dict[str, Any]) -> str:
    out = [
        f"{numbers['data']}, n = {numbers['n']}: {', '.join(numbers['features'])} and a bias; "
        f"η = {numbers['eta']:.4f}. GD's edge 2/λmax = {numbers['gd_edge']:.4f}. Exact edges of SGD (different "
        "examples), and its floor at this η:\n",
        "| b | edge of the mean (second moment) | edge of its variance (fourth) | floor, exact | floor, ηγ tr S/4 | "
        "sd of a run / mean at the floor |",
        "|---|---|---|---|---|---|",
    ]
    for b in numbers["sizes"]:
        at = lambda key, b=b: numbers[f"distinct {b}/{key}"]
        exact = np.interp(numbers["eta"], at("fine"), at("floor"))
        leading = np.interp(numbers["eta"], at("fine"), at("leading"))
        out.append(
            f"| {b} | {at('edge'):.4f} | {at('tame'):.4f} | {exact:.3g} | {leading:.3g} | "
            f"{at('deviation')[-1] / at('mean')[-1]:.2f} |"
        )
    out.append(
        "\nBetween the two edges the mean exists and its variance does not: no sample mean is to be trusted there. "
        "Beyond the first the mean explodes, by runs so rare that a sample hardly holds them: its mean falls short of "
        "the exact one by orders of magnitude."
    )
    return "\n".join(out)


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (paths, single, floor, beyond) = plots.figure(2, 2, height=7.4)
    every, steps, sizes = numbers["every"], numbers["steps"], numbers["sizes"]
    limit = statistics.z_limit(len(_configurations(numbers)) * len(steps), level=LEVEL)
    for b in sizes:
        colour = plots.batch_colour(int(b))
        for kind, style, mark in (("distinct", "-", "o"), ("with replacement", "--", "s")):
            name = f"{kind} {b}"
            paths.plot(every, numbers[f"{name}/line"], style, color=colour, linewidth=1.2)
            error = limit * numbers[f"{name}/deviation"] / np.sqrt(numbers[f"{name}/runs"])
            paths.errorbar(
                steps,
                numbers[f"{name}/measured"],
                yerr=error,
                fmt=mark,
                color=colour,
                markersize=4,
                linewidth=0.9,
                markerfacecolor=colour if kind == "distinct" else "white",
            )
    paths.plot(every, numbers["gd"], color=plots.BLACK, linewidth=1.2)
    plots.log_scale(paths, "xy")
    paths.set_ylim(0.2 * min(numbers[f"distinct {b}/line"].min() for b in sizes), 2 * numbers["start"])
    paths.set(
        title=f"Mean of {numbers['seeds']:,} runs, η = {numbers['eta']:.3f}", xlabel="steps", ylabel="E L(w) − L*"
    )
    handles = [Line2D([], [], color=plots.batch_colour(int(b)), label=f"b = {b}") for b in sizes]
    handles += [
        Line2D([], [], color=plots.BLACK, label="GD"),
        Line2D([], [], color=plots.GREY, marker="o", label="distinct"),
        Line2D([], [], color=plots.GREY, marker="s", linestyle="--", markerfacecolor="white", label="with replacement"),
    ]
    paths.legend(handles=handles, loc="lower left", fontsize=8.5)

    shown = sizes[len(sizes) // 2]
    colour, name = plots.batch_colour(int(shown)), f"distinct {shown}"
    single.plot(steps, numbers[f"{name}/single"].T, color=plots.GREY, linewidth=0.5, alpha=0.55)
    low, high = gamma_band(numbers[f"{name}/line"], numbers[f"{name}/line_deviation"])
    plots.band(single, every, low, high, colour)
    single.plot(every, numbers[f"{name}/line"], color=colour, linewidth=2)
    plots.log_scale(single, "xy")
    single.set_ylim(0.02 * numbers[f"{name}/line"][-1], 2 * numbers["start"])
    single.set(title=f"Single runs, b = {shown}", xlabel="steps", ylabel="L(w) − L*")
    handles = [
        Line2D([], [], color=plots.GREY, linewidth=0.8, label="runs"),
        Line2D([], [], color=colour, label="exact mean"),
        Line2D([], [], color=colour, alpha=0.25, linewidth=8, label="predicted 10–90 %"),
    ]
    single.legend(handles=handles, loc="lower left")

    floors, edge = numbers["floors"], numbers["gd_edge"]
    for b in sizes:
        colour, name = plots.batch_colour(int(b)), f"distinct {b}"
        floor.plot(numbers[f"{name}/fine"] / edge, numbers[f"{name}/floor"], color=colour, linewidth=1.3)
        floor.plot(numbers[f"{name}/fine"] / edge, numbers[f"{name}/leading"], ":", color=colour, linewidth=1.2)
        rows = floors[floors[:, 0] == b]
        error = statistics.z_limit(len(floors), level=LEVEL) * rows[:, 4] / np.sqrt(numbers["seeds"])
        floor.errorbar(rows[:, 1] / edge, rows[:, 2], yerr=error, fmt="o", color=colour, markersize=4.5)
        floor.axvline(numbers[f"{name}/edge"] / edge, color=colour, linestyle="--", linewidth=0.9)
    handles = [
        Line2D([], [], color=plots.GREY, marker="o", label="exact, and runs"),
        Line2D([], [], color=plots.GREY, linestyle=":", label="leading order ηγ tr S/4"),
        Line2D([], [], color=plots.GREY, linestyle="--", label="edge of the mean"),
    ]
    plots.log_scale(floor, "xy")
    last = numbers[f"distinct {sizes[-1]}/leading"]
    floor.set_ylim(0.7 * last[0], 3 * numbers["start"])
    floor.set(title="Noise floor against η", xlabel="step size η / edge of GD", ylabel="E L(w∞) − L*")
    floor.legend(handles=handles, loc="upper left", fontsize=8.5)

    at = lambda key: numbers[f"beyond/{key}"]
    beyond.plot(every, at("line"), color=plots.VERMILLION, label="exact mean")
    beyond.plot(steps, at("mean"), "o", color=plots.VERMILLION, markerfacecolor="white", label="mean of the runs")
    beyond.plot(steps, at("median"), color=plots.BLUE, label="median run")
    plots.band(beyond, steps, at("quantiles")[0], at("quantiles")[1], plots.BLUE, label="10–90 % of the runs")
    beyond.set(title=f"Beyond the edge: ×{at('fraction'):g}, b = {sizes[0]}", xlabel="steps", ylabel="L(w) − L*")
    plots.log_scale(beyond, "xy")
    beyond.legend(loc="upper left")
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
