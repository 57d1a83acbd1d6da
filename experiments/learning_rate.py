"""The step size: crawl, optimum, bounce, divergence, each where exact theory puts it (C6).

Linear regression on real data (diamonds), where everything about the step size is known in advance: GD contracts
the error along eigenvector k of the Hessian by `1 − ηλₖ` per step, so the number of steps to a target is exact
for every η, and GD converges if and only if `η < 2/λmax`. For SGD the expected gap after any number of steps, its
noise floor, and the step size beyond which its second moment explodes are exact too, on these very data. Lines
are theory; points are runs (float32, the gap evaluated in float64).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import EXACT, ROUNDING, Found, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import geometric, random_keys
from experiments.support.loading import load, some_rows
from jaxgrad import losses, models, statistics
from jaxgrad.descent import log_spaced, trajectory
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch, Sampling


@dataclass(frozen=True)
class Config:
    data: str = "diamonds"
    """A regression data set or a file."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    steps: int = 3000
    """Budget of GD; a target not reached in it is not reached."""
    fractions: tuple[float, ...] = (
        *np.round(geometric(0.005, 0.9, 19, digits=9), 6).tolist(),
        0.95,
        0.98,
        0.99,
        0.998,
        1.002,
        1.01,
        1.02,
        1.05,
    )
    """GD's step sizes, as fractions of the edge 2/λmax."""
    shares: tuple[float, ...] = (0.1, 0.01, 0.001)
    """Targets: these shares of the starting gap."""
    shown: tuple[float, ...] = (0.02, 0.5, 0.99, 1.01)
    """Fractions of the edge whose paths are drawn: crawl, about the best, bounce, divergence."""
    b: int = 32
    """Batch size of SGD."""
    sgd_steps: int = 3000
    sgd_fractions: tuple[float, ...] = tuple(np.round(geometric(0.003, 1.3, 20, digits=9), 6).tolist())
    """SGD's step sizes, as fractions of the edge of its second moment."""
    seeds: int = 20
    rows: int | None = None
    """Use only so many examples (None: all)."""


QUICK = Config(
    steps=400,
    fractions=(0.05, 0.2, 0.5, 0.9, 0.99, 1.01),
    shares=(0.1, 0.03),
    sgd_steps=300,
    sgd_fractions=(0.01, 0.1, 0.5, 0.9),
    seeds=5,
    rows=4000,
)
NUMBERS = {
    "data": EXACT, "n": EXACT, "d": EXACT, "b": EXACT, "steps": EXACT, "sgd_steps": EXACT,
    "shares": EXACT, "fractions": EXACT, "sgd_fractions": EXACT, "shown": EXACT, "shown_steps": EXACT,
    "measured": EXACT, "predicted": EXACT, "grows": EXACT, "predicted_growth": EXACT,
    "sgd_gaps": Runs(axis=1), "edge": ROUNDING, "sgd_edge": ROUNDING, "condition_number": ROUNDING,
    "start": ROUNDING, "etas": ROUNDING, "sgd_etas": ROUNDING, "sgd_fine_etas": Found(to=1e-5),
    "final": ROUNDING,
    "sgd_floor": ROUNDING, "sgd_expected*": ROUNDING, "shown_gaps": ROUNDING, "shown_theory": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSS = losses.mean_loss(models.linear, losses.squared)


def run(config: Config, session: Session) -> dict[str, Any]:
    dataset = load(config)
    if dataset.task != "regression":
        raise ValueError(
            f"learning_rate needs a regression data set: {dataset.name} is {dataset.task}; "
            "try --data diamonds, or --target with a column of numbers"
        )
    x, y = some_rows(dataset, config.rows, session.say).batch
    batch = Batch(jnp.asarray(x), jnp.asarray(y))
    geometry, start = theory.problem(batch), models.init_linear(x.shape[1])
    edge = theory.edge(geometry)
    gap_start = float(theory.excess_loss(geometry, start))
    numbers: dict[str, Any] = {
        "data": dataset.name, "n": len(y), "d": x.shape[1], "edge": edge, "start": gap_start, "b": config.b,
        "condition_number": theory.condition_number(geometry), "shares": np.array(config.shares),
        "fractions": np.array(config.fractions), "shown": np.array(config.shown), "steps": config.steps,
        "sgd_steps": config.sgd_steps, "sgd_fractions": np.array(config.sgd_fractions),
    }  # fmt: skip

    def gaps(etas: np.ndarray, keys: jax.Array, sampling: Sampling, record: np.ndarray) -> np.ndarray:
        """`L(w_t) − L*` of runs `[eta, key]` at the recorded steps, in float64."""

        def one(eta: Any, key: Any) -> Any:
            _, params = trajectory(
                LOSS,
                start,
                batch,
                optimizer=optax.sgd(eta),
                sampling=sampling,
                key=key,
                record=record,
                observe=lambda params: jnp.append(params.w, params.b),
            )
            return params

        runs = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.asarray(etas, jnp.float32), keys)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.stack([[theory.excess_loss(geometry, path) for path in row] for row in np.asarray(runs)])

    session.say(f"GD on {dataset.name} with {len(config.fractions)} step sizes, {config.steps:,} steps each")
    # The step size that the float32 run takes is the one that theory is asked about.
    etas = np.float32(np.array(config.fractions) * edge).astype(float)
    every = np.arange(config.steps + 1)
    one_key = random_keys(0, 1)
    paths = gaps(etas, one_key, full_batch(), every)[:, 0]
    numbers["etas"] = etas
    numbers["measured"] = np.array([[_first(path, share * gap_start) for share in config.shares] for path in paths])
    numbers["predicted"] = np.array(
        [[theory.gd_steps_to(geometry, start, eta, share * gap_start) for share in config.shares] for eta in etas]
    )
    numbers["final"] = paths[:, -1]
    # Does the gap still grow at the end? Just beyond the edge only one component does, slowly.
    top = np.abs(1 - etas * geometry.eigenvalues[0])
    numbers["predicted_growth"] = top > 1
    numbers["grows"] = ~(paths[:, -1] <= paths[:, -1 - config.steps // 10])

    shown = np.float32(np.array(config.shown) * edge).astype(float)
    record = log_spaced(config.steps, 61)[1:]
    numbers["shown_steps"] = record
    numbers["shown_gaps"] = gaps(shown, one_key, full_batch(), record)[:, 0]
    numbers["shown_theory"] = np.stack([theory.gd_excess(geometry, start, eta, record) for eta in shown])

    session.say(f"SGD (b = {config.b}) with {len(config.sgd_fractions)} step sizes, {config.seeds} seeds each")
    sampling = distinct(config.b)
    sgd_edge = theory.sgd_edge(geometry, sampling)
    sgd_etas = np.float32(np.array(config.sgd_fractions) * sgd_edge).astype(float)
    keys = random_keys(1, config.seeds)
    numbers["sgd_edge"], numbers["sgd_etas"] = sgd_edge, sgd_etas
    numbers["sgd_gaps"] = gaps(sgd_etas, keys, sampling, np.array([config.sgd_steps]))[:, :, 0]
    fine = geometric(sgd_etas[0], 0.995 * sgd_edge, 30)
    numbers["sgd_fine_etas"] = fine
    numbers["sgd_floor"] = np.array([theory.floor(geometry, eta, sampling) for eta in fine])
    numbers["sgd_expected"] = np.array(
        [theory.sgd_moments(geometry, start, eta, sampling, [config.sgd_steps]).excess[0] for eta in fine]
    )
    at_runs = [theory.sgd_moments(geometry, start, eta, sampling, [config.sgd_steps]).excess[0] for eta in sgd_etas]
    numbers["sgd_expected_at_runs"] = np.array(at_runs)
    return numbers


def _first(path: np.ndarray, target: float) -> float:
    met = path <= target
    return float(np.argmax(met)) if met.any() else np.inf


# --- what the numbers say --------------------------------------------------------------------------------------


def _reachable(numbers: dict[str, Any]) -> np.ndarray:
    """Which (η, target) pairs theory says are reached within the budget."""
    return numbers["predicted"] <= numbers["steps"]


def _off(numbers: dict[str, Any]) -> np.ndarray:
    """By how many steps the measured count differs from the predicted one, for each pair within the budget."""
    reachable = _reachable(numbers)
    return np.abs(np.where(reachable, numbers["measured"], 0) - np.where(reachable, numbers["predicted"], 0))


def claims(numbers: dict[str, Any]) -> list[Claim]:
    reachable, measured, difference = _reachable(numbers), numbers["measured"], _off(numbers)
    exact = int(np.sum(difference[reachable] == 0))
    both = bool((np.isfinite(measured) == reachable).all())
    share = numbers["shares"][-2]
    column = measured[:, -2]
    best = int(np.argmin(column))
    fractions = numbers["fractions"]
    slowest = int(np.flatnonzero(np.isfinite(column))[0])
    last_stable = float(fractions[~numbers["grows"]].max())
    first_growing = float(fractions[numbers["grows"]].min())
    # The mean of a heavy-tailed gap is only comparable where its variance is tame: up to half the edge.
    tame = numbers["sgd_etas"] <= 0.5 * numbers["sgd_edge"]
    ratio = numbers["sgd_gaps"][tame].mean(axis=1) / numbers["sgd_expected_at_runs"][tame]
    medians = np.median(numbers["sgd_gaps"], axis=1)
    sgd_best = int(np.argmin(np.where(np.isnan(medians), np.inf, medians)))
    return [
        Claim(
            "C6",
            f"too small a step size crawls: steps to {share:.0%} of the starting gap, relative to the best η",
            f"×{column[slowest] / column[best]:.3g} at {fractions[slowest]:.3g} of the edge "
            f"({column[slowest]:,.0f} steps against {column[best]:,.0f})",
            "more than ×5",
            bool(column[slowest] > 5 * column[best]),
        ),
        Claim(
            "C6",
            f"GD takes exactly the predicted number of steps, for {reachable.sum()} pairs of η and target",
            f"{exact} of {reachable.sum()} to the step, the others off by at most {difference.max():.0f}; "
            + ("reached where and only where predicted" if both else "reached elsewhere than predicted"),
            "at most 1 step off (float32 runs), reached where predicted",
            bool(difference.max() <= 1) and both,
        ),
        Claim(
            "C6",
            "too large a step size does not converge: the edge is 2/λmax",
            f"still shrinking at {last_stable:.4g} of it, growing at {first_growing:.4g}",
            "shrinking below 1, growing above",
            bool((numbers["grows"] == numbers["predicted_growth"]).all()),
        ),
        Claim(
            "C6",
            f"SGD (b = {numbers['b']}) bounces: beyond the best η its gap after {numbers['sgd_steps']:,} steps rises "
            "with η to the noise floor that theory computes",
            f"mean gap over exact expectation, η up to half the edge: {ratio.min():.3g} to {ratio.max():.3g}; best "
            f"median gap at {numbers['sgd_fractions'][sgd_best]:.3g} of the edge",
            "0.5 to 2 (a mean of skewed runs)",
            bool(ratio.min() > 0.5 and ratio.max() < 2),
        ),
        *_folklore(numbers),
    ]


def _folklore(numbers: dict[str, Any]) -> list[Claim]:
    """Two things often said of the step size, against the measured counts."""
    fractions, measured = numbers["fractions"], numbers["measured"]
    first_growing = float(fractions[numbers["grows"]].min())
    # In units of the edge 2/λmax: 1/λmax, and the largest η of the grid that is not beyond 2/(λmin + λmax).
    worst_case = numbers["condition_number"] / (numbers["condition_number"] + 1)
    half, near = int(np.argmin(np.abs(fractions - 0.5))), int(np.flatnonzero(fractions <= worst_case)[-1])
    counts = [
        f"{a:,.0f} steps against {b:,.0f}".replace("inf", "too many")
        for a, b in zip(measured[near], measured[half], strict=True)
    ]
    targets = [f"to {share:.2g}: {count}" for share, count in zip(numbers["shares"], counts, strict=True)]
    return [
        Claim(
            "C6",
            "for the mean of (y − ŷ)², H = (2/n) XᵀX: the edge is 1/λmax(XᵀX/n), half of 2/λmax(XᵀX/n), which belongs "
            "to ½(y − ŷ)²",
            f"the gap grows from {first_growing / 2:.4g} of 2/λmax(XᵀX/n) on",
            "from 0.5 on, to 2 %",
            abs(first_growing / 2 - 0.5) <= 0.01,
        ),
        Claim(
            "C6",
            f"η = 2/(λmin + λmax), the best one in the worst case ({worst_case:.4f} of the edge), is not best to "
            "coarse targets: 1/λmax gets there sooner",
            f"at {fractions[near]:.4g} of the edge against {fractions[half]:.3g}, {'; '.join(targets)}",
            "more steps, to some target",
            bool(np.any(measured[near] > measured[half])),
        ),
    ]


def headline(numbers: dict[str, Any]) -> str:
    column, reachable = numbers["measured"][:, -2], _reachable(numbers)
    best = int(np.argmin(column))
    exact = int(np.sum(_off(numbers)[reachable] == 0))
    growing = numbers["fractions"][numbers["grows"]].min()
    return (
        f"**The step size.** On {numbers['data']} (condition number {numbers['condition_number']:,.0f}) GD needs "
        f"{column[best]:,.0f} steps to {numbers['shares'][-2]:.0%} of the starting gap at "
        f"{numbers['fractions'][best]:.2g} of the edge 2/λmax = {numbers['edge']:.4g}; {exact} of {reachable.sum()} "
        f"counts are the predicted ones to the step, and from {growing:.4g} of the edge on the gap grows."
    )


def report(numbers: dict[str, Any]) -> str:
    return (
        f"{numbers['data']}: n = {numbers['n']:,}, d = {numbers['d']} and a bias, condition number of the Hessian "
        f"{numbers['condition_number']:,.0f}; edge of GD 2/λmax = {numbers['edge']:.5g}, edge of SGD's second moment "
        f"at b = {numbers['b']}: {numbers['sgd_edge']:.4g} ({numbers['sgd_edge'] / numbers['edge']:.2g} of GD's). "
        "Near the edge of GD the error flips its sign along one eigenvector each step: the bounce. SGD bounces at "
        "any constant step size, and its floor is (to first order) proportional to η."
    )


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, middle, right) = plots.figure(3, height=4.0)
    edge = numbers["edge"]
    colours = (plots.SKY, plots.BLUE, plots.BLACK)[-len(numbers["shares"]) :]
    for share, colour, measured, predicted in zip(
        numbers["shares"], colours, numbers["measured"].T, numbers["predicted"].T, strict=True
    ):
        inside = predicted <= numbers["steps"]
        left.plot(numbers["fractions"][inside], predicted[inside], color=colour, linewidth=1.2)
        left.plot(numbers["fractions"], measured, "o", color=colour, markersize=4.5, label=f"to {100 * share:g} %")
    left.axvline(1, color=plots.VERMILLION, linewidth=1.2, linestyle="--")
    left.text(
        0.93,
        0.94,
        "edge 2/λmax",
        color=plots.ink(plots.VERMILLION),
        ha="right",
        fontsize=9,
        transform=left.get_xaxis_transform(),
    )
    left.set(title="GD: steps to a target", xlabel="step size η / edge", ylabel="steps")
    plots.log_scale(left, "xy")
    left.legend(title="share of the start", loc="lower left", title_fontsize=9)

    names = ("crawl", "half", "bounce", "diverge")
    shades = (plots.SKY, plots.GREEN, plots.ORANGE, plots.VERMILLION)
    for fraction, gap, exact, name, colour in zip(
        numbers["shown"], numbers["shown_gaps"], numbers["shown_theory"], names, shades, strict=True
    ):
        t = numbers["shown_steps"]
        middle.plot(t, exact, color=colour, linewidth=1.2)
        middle.plot(t[::3], gap[::3], "o", color=colour, markersize=4, label=f"{name}: {fraction:g}")
    middle.set(title="GD: four step sizes", xlabel="steps", ylabel="gap L(w) − L*")
    plots.log_scale(middle, "xy")
    middle.set_ylim(0.3 * np.nanmin(numbers["shown_theory"][:3]), 30 * numbers["start"])
    middle.legend(loc="lower left", title="fraction of the edge", title_fontsize=9)

    gaps = numbers["sgd_gaps"]
    low, high = statistics.quantile_band(gaps.T)
    x = numbers["sgd_etas"] / edge
    spread = np.where(np.isfinite(gaps), gaps, np.inf)
    middle_of = np.median(spread, axis=1)
    right.plot(
        numbers["sgd_fine_etas"] / edge,
        numbers["sgd_expected"],
        color=plots.BLUE,
        linewidth=1.4,
        label="expected, exact",
    )
    right.plot(
        numbers["sgd_fine_etas"] / edge,
        numbers["sgd_floor"],
        "--",
        color=plots.GREY,
        linewidth=1.4,
        label="noise floor, exact",
    )
    seen = np.isfinite(middle_of) & np.isfinite(high)
    right.errorbar(
        x[seen],
        middle_of[seen],
        yerr=[middle_of[seen] - low[seen], high[seen] - middle_of[seen]],
        fmt="o",
        color=plots.BLACK,
        markersize=4,
        linewidth=1,
        label="runs: median, 10–90 %",
    )
    sgd_edge = numbers["sgd_edge"] / edge
    right.axvline(sgd_edge, color=plots.VERMILLION, linewidth=1.2, linestyle="--")
    right.set(
        title=f"SGD, b = {numbers['b']}: the end",
        xlabel="step size η / edge of GD",
        ylabel=f"gap after {numbers['sgd_steps']:,} steps",
    )
    plots.log_scale(right, "xy")
    right.set_ylim(0.3 * np.nanmin(low), numbers["start"])
    right.text(
        sgd_edge * 0.9,
        0.03,
        "edge of SGD",
        color=plots.ink(plots.VERMILLION),
        ha="right",
        fontsize=9,
        transform=right.get_xaxis_transform(),
    )
    right.legend(loc="upper center", bbox_to_anchor=(0.45, 1.0))
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
