"""No guarantee: starts that end in different minima, one that never moves, steps too large to settle (C1).

A two-layer net with three hidden units on real data (breast cancer: two measurements, logloss, a small penalty that
keeps the weights finite). GD from many random starts, each run long enough that its gradient nearly vanishes, ends in
minima of different loss; SGD from the same starts too (its end is rolled down by GD to see which minimum it is in).

Theory draws the lines here. A minimum with largest curvature λmax can hold GD only while `η < 2/λmax`: beyond it the
minimum repels almost every path, however close. So the sharper minimum is out of reach from its own edge on, and
beyond the edge of the flattest no run settles at all. The gradient of the logloss is bounded, so with a penalty l2 the
weights stay bounded up to `η = 2/l2`, and are repelled from zero beyond it: in between, GD bounces for ever.

The start at zero is a saddle for GD and SGD alike: with W1 = W2 = 0 and b1 = 0 **every example's** gradient with
respect to W1, b1 and W2 is exactly 0, so no noise can move them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import EXACT, ROUNDING, Chaotic, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import geometric, random_keys, two_layer
from jaxgrad import data, losses, models, statistics
from jaxgrad.descent import log_spaced, trajectory
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Batch, Params, Sampling, TwoLayer


@dataclass(frozen=True)
class Config:
    seeds: int = 48
    """Random starts."""
    steps: int = 3000
    """Updates of GD, and of SGD before GD rolls it down."""
    hidden: int = 3
    """Hidden units of the net."""
    l2: float = 1e-3
    """Penalty `(l2/2)‖W‖²`."""
    scale: float = 3.0
    """Starts are `N(0, scale²/d_in)`."""
    eta: float = 2.0
    """GD's step size where the minima are told apart: inside the edge of both."""
    b: int = 16
    """Batch size of SGD."""
    sgd_eta: float = 0.5
    sweep: tuple[float, ...] = (1.0, 1.5, 2.0, 2.4, 2.8, 3.2, 3.6, 4.2, 5.0, 7.0, 10.0, 20.0)
    """GD's step sizes where its fate is counted over starts."""
    sweep_starts: int = 12
    rows: int | None = None
    """Use only so many examples (None: all)."""


QUICK = Config(seeds=23, steps=600, sweep=(1.0, 2.0, 3.0, 5.0), sweep_starts=6)
NUMBERS = {
    "n": EXACT, "hidden": EXACT, "l2": EXACT, "eta": EXACT, "b": EXACT, "sgd_eta": EXACT, "steps": EXACT,
    "record": EXACT, "sweep": EXACT, "fan": EXACT, "zero_moved": EXACT, "zero_path": ROUNDING,
    "zero_curvature": ROUNDING, "levels": ROUNDING, "curvatures": ROUNDING, "least_curvatures": ROUNDING,
    "fan_steps": Chaotic(axis=2), "paths": Runs(axis=0), "gradient_norms": Runs(axis=0),
    "belongs": Runs(axis=0), "sgd_level": Runs(axis=0), "sweep_final": Runs(axis=1),
    "sweep_step": Runs(axis=1),
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
COLUMNS = ("mean radius", "mean texture")
LAST = 32
"""The last steps of a run, all recorded: does it still bounce?"""
STILL = 1e-3
"""A run whose last steps are all shorter than this has settled, or is about to."""
NEAR = 1e-2
"""Runs whose losses differ by less than this share are in one minimum (after symmetry)."""


def predict(params: TwoLayer, x: Any) -> Any:
    return models.two_layer(params, x, activation=jnp.tanh)[0]


def run(config: Config, session: Session) -> dict[str, Any]:
    cancer = data.load("breast_cancer")
    x = jnp.asarray(cancer.batch.x[: config.rows, [cancer.names.index(name) for name in COLUMNS]])
    batch = Batch(x, jnp.asarray(cancer.batch.y[: config.rows], jnp.float32))
    loss = losses.mean_loss(predict, losses.logloss, l2=config.l2)
    lanes = config.seeds + 1

    def slope(params: Params, batch: Batch) -> Any:
        return optax.tree.norm(jax.grad(loss)(params, batch))

    keys = random_keys(2021, lanes)
    starts = _starts(x.shape[1], config)
    record = np.append(log_spaced(config.steps - LAST, 51), np.arange(config.steps - LAST + 1, config.steps + 1))

    def program(sampling: Sampling) -> Callable[..., Any]:
        """Runs side by side, each with its start, step size and key: final parameters, `(L, ‖∇L‖)` at `record`."""

        def one(start: Params, eta: Any, key: Any) -> Any:
            return trajectory(
                loss,
                start,
                batch,
                optimizer=optax.sgd(eta),
                sampling=sampling,
                key=key,
                record=record,
                observe=lambda params: jnp.stack([loss(params, batch), slope(params, batch)]),
            )

        return jax.jit(jax.vmap(one))

    gd, sgd = program(full_batch()), program(distinct(config.b))

    def at(eta: float) -> np.ndarray:
        return np.full(lanes, eta, np.float32)

    session.say(f"GD from {config.seeds} random starts and from zero, {config.steps:,} steps")
    ends, paths = jax.tree.map(np.asarray, gd(starts, at(config.eta), keys))
    levels, belongs, curvature = _minima(loss, ends, batch, paths[:-1, :, 0])

    session.say(f"SGD (b = {config.b}) from the same starts, then GD from where it ended")
    noisy, sgd_paths = jax.tree.map(np.asarray, sgd(starts, at(config.sgd_eta), keys))
    _, rolled = gd(noisy, at(config.eta), keys)

    session.say(f"GD with {len(config.sweep)} step sizes from {config.sweep_starts} starts each")
    etas = np.repeat(config.sweep, config.sweep_starts)
    which = np.tile(np.arange(config.sweep_starts), len(config.sweep))
    swept = _in_lots(gd, starts, which, etas, keys)[:, -LAST:]

    session.say("GD from one start of each minimum with many step sizes")
    chosen = np.array([np.argmax(belongs == k) for k in range(min(2, len(levels)))])
    each = lanes // len(chosen)
    fan = np.append(geometric(1, 12, each - each // 3), geometric(20, 4 / config.l2, each // 3))
    fanned = _in_lots(gd, starts, np.repeat(chosen, each), np.tile(fan, len(chosen)), keys)[:, -LAST:, 1]

    def by_eta(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(config.sweep), config.sweep_starts)

    moved = max(float(np.abs(leaf[-1]).max()) for end in (ends, noisy) for leaf in (end.W1, end.W2, end.b1))
    saddle = jax.tree.map(lambda leaf: leaf[-1:], ends)
    return {
        "n": len(batch.y), "hidden": config.hidden, "l2": config.l2, "eta": config.eta, "b": config.b,
        "sgd_eta": config.sgd_eta, "steps": config.steps, "record": record, "paths": np.asarray(paths[:-1, :, 0]),
        "gradient_norms": np.asarray(paths[:-1, -1, 1]),
        "levels": levels, "belongs": belongs, "curvatures": curvature[0], "least_curvatures": curvature[1],
        "sgd_level": np.asarray(rolled[:-1, -1, 0]),
        "sweep": np.array(config.sweep), "sweep_final": by_eta(swept[:, -1, 0]),
        "sweep_step": by_eta(etas * swept[:, :, 1].max(axis=1)), "fan": fan,
        "fan_steps": fan[:, None] * fanned.reshape(len(chosen), each, LAST),
        "zero_moved": moved, "zero_path": np.asarray(sgd_paths[-1, :, 0]),
        "zero_curvature": float(_spectrum(loss, saddle, batch)[0, 0]),
    }  # fmt: skip


def _starts(d: int, config: Config) -> TwoLayer:
    """Where the runs begin: at random, and the last one at zero."""
    drawn = two_layer(2021, d, config.hidden, 1, count=config.seeds + 1)
    starts = jax.tree.map(lambda leaf: config.scale * np.asarray(leaf), drawn)
    for leaf in jax.tree.leaves(starts):
        leaf[-1] = 0
    return starts


def _in_lots(program: Callable[..., Any], starts: Params, which: np.ndarray, etas: np.ndarray, keys: Any) -> np.ndarray:
    """`(L, ‖∇L‖)` at the record points for any number of (start, η) pairs, through a program of fixed width."""
    lanes, out = len(keys), []
    for at in range(0, len(etas), lanes):
        lot = np.resize(np.arange(at, min(at + lanes, len(etas))), lanes)
        lot_starts = jax.tree.map(lambda leaf, rows=which[lot]: leaf[rows], starts)
        out.append(np.asarray(program(lot_starts, np.asarray(etas[lot], np.float32), keys)[1]))
    return np.concatenate(out)[: len(etas)]


def _minima(loss: Any, ends: Params, batch: Batch, paths: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct final losses in order, which one each run has, and λmax and λmin of the Hessian at one run of each."""
    final = np.asarray(paths[:, -1], float)
    order = np.argsort(final)
    new = np.r_[True, np.diff(final[order]) > NEAR * final[order][:-1]]
    belongs = np.empty(len(final), int)
    belongs[order] = np.cumsum(new) - 1
    # The lowest run of each group is the one that has come furthest.
    examples = order[new]
    spectrum = _spectrum(loss, jax.tree.map(lambda leaf: leaf[examples], ends), batch)
    return final[examples], belongs, np.stack([spectrum[:, -1], spectrum[:, 0]])


def _spectrum(loss: Any, points: Params, batch: Batch) -> np.ndarray:
    """Eigenvalues of the Hessian at each point, ascending, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (points, batch))

        @jax.jit
        def hessian(points: Params, batch: Batch) -> Any:
            _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], points))
            flat = jax.vmap(lambda params: ravel_pytree(params)[0])(points)
            return jax.vmap(jax.hessian(lambda w: loss(unravel(w), batch)))(flat)

        return np.linalg.eigvalsh(np.asarray(hessian(*wide)))


# --- what the numbers say --------------------------------------------------------------------------------------


def _share(count: Any, runs: int) -> str:
    interval = statistics.proportion_interval(count, runs)
    return f"{float(interval.estimate):.0%} ({float(interval.low):.0%}–{float(interval.high):.0%})"


def _sgd_belongs(numbers: dict[str, Any]) -> np.ndarray:
    """The minimum nearest in loss to where GD rolled each end of SGD."""
    return np.argmin(np.abs(numbers["sgd_level"][:, None] - numbers["levels"][None, :]), axis=1)


def _edges(numbers: dict[str, Any]) -> np.ndarray:
    """2/λmax of each minimum."""
    return 2 / numbers["curvatures"]


def _fates(numbers: dict[str, Any]) -> np.ndarray:
    """Shares `[η, minimum or bouncing]` over starts: settled at each minimum (by loss), and not settled."""
    # NaN, where a run overflowed, is not settled.
    still = numbers["sweep_step"] < STILL
    nearest = np.argmin(np.abs(numbers["sweep_final"][..., None] - numbers["levels"]), axis=-1)
    at = [np.mean(still & (nearest == k), axis=1) for k in range(len(numbers["levels"]))]
    return np.stack([*at, np.mean(~still, axis=1)], axis=1)


def claims(numbers: dict[str, Any]) -> list[Claim]:
    levels, counts = numbers["levels"], np.bincount(numbers["belongs"])
    runs, edges = len(numbers["belongs"]), _edges(numbers)
    sgd = np.bincount(_sgd_belongs(numbers), minlength=len(levels))
    fates, sweep, last = _fates(numbers), numbers["sweep"], float(edges.max())
    sharp = int(np.argmin(edges))
    fan, steps, limit = numbers["fan"], numbers["fan_steps"], 2 / numbers["l2"]
    between = (fan > 1.02 * last) & (fan < 0.98 * limit)
    overflows = not np.isfinite(steps[:, fan > limit][..., -1]).any()
    above, beyond = sweep > 1.02 * edges[sharp], sweep > 1.02 * last
    return [
        Claim(
            "C1",
            f"GD from {runs} random starts does not always reach the lowest minimum found (95 % intervals)",
            "; ".join(f"L = {level:.4f}: {_share(count, runs)}" for level, count in zip(levels, counts, strict=True)),
            "at least two levels, each with runs",
            len(levels) > 1 and int(counts[1:].sum()) > 0,
        ),
        Claim(
            "C1",
            f"nor does SGD (b = {numbers['b']}) from the same starts",
            "; ".join(f"L = {level:.4f}: {_share(count, runs)}" for level, count in zip(levels, sgd, strict=True)),
            "runs at more than one level",
            int(sgd[1:].sum()) > 0,
        ),
        Claim(
            "C1",
            f"the sharpest minimum cannot hold GD beyond its edge 2/λmax = {edges[sharp]:.3g}, the flattest beyond "
            f"{last:.3g}: from there on no run settles",
            f"settled at L = {levels[sharp]:.4f} beyond its edge: {fates[above, sharp].sum():.0%} of starts; "
            f"anywhere beyond the last edge: {fates[beyond, :-1].sum():.0%}",
            "0 % and 0 %",
            bool(fates[above, sharp].sum() == 0 and fates[beyond, :-1].sum() == 0),
        ),
        Claim(
            "C1",
            f"beyond the last edge GD bounces without settling; from η = 2/l2 = {limit:,.0f} on its weights diverge",
            f"step length {np.min(steps[:, between]):.2g} to {np.max(steps[:, between]):.2g} for η from "
            f"{fan[between].min():.3g} to {fan[between].max():.3g}; "
            f"{'overflow' if overflows else 'finite'} at {fan.max():,.0f}",
            f"at least {STILL:g} and finite in between; overflow beyond",
            bool(np.min(steps[:, between]) > STILL and np.isfinite(steps[:, between]).all() and overflows),
        ),
        Claim(
            "C1",
            "from zero neither GD nor SGD ever leaves a saddle",
            f"largest |W1|, |W2|, |b1| after {numbers['steps']:,} steps of either: "
            f"{numbers['zero_moved']:g}; smallest curvature there {numbers['zero_curvature']:.3g}",
            "exactly 0; negative (a saddle)",
            bool(numbers["zero_moved"] == 0 and numbers["zero_curvature"] < 0),
        ),
    ]


def headline(numbers: dict[str, Any]) -> str:
    counts = np.bincount(numbers["belongs"])
    return (
        f"**No guarantee.** A net of {numbers['hidden']} hidden units on breast cancer: "
        f"{_share(counts[1:].sum(), len(numbers['belongs']))} of random starts end GD in a minimum that is not the "
        f"lowest; beyond η = {_edges(numbers).max():.3g} no start converges; from zero neither GD nor SGD ever moves."
    )


def report(numbers: dict[str, Any]) -> str:
    counts, sgd = np.bincount(numbers["belongs"]), np.bincount(_sgd_belongs(numbers), minlength=len(numbers["levels"]))
    runs = len(numbers["belongs"])
    rows = [
        f"| {level:.5f} | {_share(gd, runs)} | {_share(noisy, runs)} | {edge:.3g} | {least:.1e} |"
        for level, gd, noisy, edge, least in zip(
            numbers["levels"], counts, sgd, _edges(numbers), numbers["least_curvatures"], strict=True
        )
    ]
    return "\n".join(
        [
            f"Minima told apart by their loss (n = {numbers['n']}, {runs} starts, GD with η = {numbers['eta']:g}, SGD "
            f"with b = {numbers['b']}, η = {numbers['sgd_eta']:g}; 95 % Clopper–Pearson intervals):",
            "",
            "| loss | GD ends here | SGD ends here | edge 2/λmax | smallest curvature |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"After {numbers['steps']:,} steps GD's gradient norm is at most {numbers['gradient_norms'].max():.1e} "
            f"(median {np.median(numbers['gradient_norms']):.1e}), and a positive smallest curvature says minimum, not "
            "saddle. That is evidence of minima, to the precision of the runs, and says nothing of minima that no "
            f"start found. The weights stay bounded up to η = 2/l2 = {2 / numbers['l2']:,.0f}; between the last edge "
            "and there, GD bounces for ever.",
        ]
    )


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (paths, shares, fan, sweep) = plots.figure(2, 2, height=6.6)
    levels, belongs, t = numbers["levels"], numbers["belongs"], np.maximum(numbers["record"], 0.5)
    colours = [plots.BLUE, plots.VERMILLION, plots.ORANGE, plots.PURPLE, plots.SKY, plots.GREEN]
    names = [f"minimum {k + 1}" for k in range(len(levels))]

    def colour(k: int) -> str:
        return colours[min(k, len(colours) - 1)]

    for k in range(len(levels)):
        mine = numbers["paths"][belongs == k][:8]
        for i, path in enumerate(mine):
            paths.plot(t[1:], path[1:], color=colour(k), linewidth=0.9, alpha=0.8, label=None if i else names[k])
    paths.plot(t[1:], numbers["zero_path"][1:], color=plots.BLACK, linewidth=2, label="SGD from zero")
    paths.set(title="Same net, different starts", xlabel="steps", ylabel="training loss")
    plots.log_scale(paths, "xy")
    paths.set_ylim(0.93 * levels.min(), 1.3)
    paths.set_yticks([0.25, 0.3, 0.4, 0.5, 0.7, 1.0], labels=["0.25", "0.3", "0.4", "0.5", "0.7", "1"])
    paths.minorticks_off()
    paths.legend(loc="upper right")

    runs, tallies = len(belongs), (belongs, _sgd_belongs(numbers))
    for row, tally in enumerate(tallies):
        interval = statistics.proportion_interval(np.bincount(tally, minlength=len(levels)), runs)
        for k in range(len(levels)):
            y = row + 0.8 * ((k + 0.5) / len(levels) - 0.5)
            shares.barh(y, interval.estimate[k], 0.7 / len(levels), color=colour(k))
            shares.plot([interval.low[k], interval.high[k]], [y, y], color="black", linewidth=1.3)
    shares.set(
        title="Where the starts end",
        xlim=(0, 1),
        xlabel="share of starts, 95 % interval",
        yticks=[0, 1],
        yticklabels=["GD", f"SGD\nb = {numbers['b']}"],
    )
    shares.invert_yaxis()
    shares.grid(visible=False, axis="y")
    shares.legend(
        [shares.patches[k] for k in range(len(levels))],
        [f"{name}: L = {level:.4f}" for name, level in zip(names, levels, strict=True)],
        loc="upper center",
        bbox_to_anchor=(0.42, -0.2),
        ncols=2,
    )

    for k, steps in enumerate(numbers["fan_steps"]):
        shown = np.where(np.isfinite(steps), steps, np.nan)
        fan.plot(np.repeat(numbers["fan"], LAST), shown.ravel(), ".", color=colour(k), markersize=2.5)
    for k, edge in enumerate(_edges(numbers)):
        fan.axvline(edge, color=colour(k), linewidth=1.2, linestyle="--")
    fan.axvline(2 / numbers["l2"], color=plots.GREY, linewidth=1.2, linestyle="--")
    plots.log_scale(fan, "xy")
    fan.set(title=f"Two starts: the last {LAST} steps", xlabel="step size η", ylabel="length of a step, η‖∇L‖")
    fan.set_ylim(1e-7, 1e6)
    for text, at, shade in (
        ("2/λmax", 0.9 * _edges(numbers).min(), colour(len(levels) - 1)),
        ("2/l2", 0.85 * 2 / numbers["l2"], plots.GREY),
    ):
        fan.text(at, 0.92, text, ha="right", color=plots.ink(shade), fontsize=9, transform=fan.get_xaxis_transform())

    fates, base = _fates(numbers), np.zeros(len(numbers["sweep"]))
    position = np.arange(len(base))
    for k, label in enumerate([*names, "bounces"]):
        shade = "#bdbdbd" if k == len(levels) else colour(k)
        sweep.bar(position, fates[:, k], 0.8, bottom=base, color=shade, label=label)
        base += fates[:, k]
    for k, edge in enumerate(_edges(numbers)):
        x = float(np.interp(np.log(edge), np.log(numbers["sweep"]), position))
        sweep.axvline(x, color=colour(k), linewidth=1.6, linestyle="--")
    sweep.set(title="What becomes of GD", xlabel="step size η", ylabel="share of starts", ylim=(0, 1.0))
    sweep.set_xticks(position, labels=[f"{eta:g}" for eta in numbers["sweep"]])
    sweep.grid(visible=False, axis="x")
    sweep.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
