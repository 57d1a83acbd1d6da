"""Three losses and outliers: MSE follows them, MAE hardly, flipped labels pull logloss; GD on each (F7).

One straight line on real data (diabetes: disease progression on body mass index), and the same data with a slipped
decimal point in a few rows: the target there is ten times too large. MSE and MAE are minimised by GD from one start;
their minima are known by other means, MSE's in closed form and MAE's by linear programming with the dual as a
certificate. Logistic regression on breast cancer gets flipped labels instead.

What theory says about each curve: GD on MSE contracts exactly (the line under the points); on MAE the gradient does
not shrink near the minimum, so a constant step bounces for ever, and the best gap so far obeys
`R²/(2ηt) + ηG²/2` (subgradient method; G bounds the gradient, R is the distance to go); on logloss with `η = 1/λ`, λ
the largest curvature anywhere, the gap obeys `R²/(2ηt)`.

The influence of one point: moving its target by Δ moves the minimum of MSE by exactly `(XᵀX)⁻¹xΔ`, without limit. The
minimum of MAE does not move at all as long as the point stays on its side of the line. For logloss one mislabelled
example is carried away: to first order the minimum moves by `−H⁻¹ (change of its gradient)/n`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy.optimize import linprog

from experiments.engine import plots
from experiments.engine.kinds import EXACT, ROUNDING, Off
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals
from jaxgrad import data, models, optimum
from jaxgrad.descent import log_spaced, trajectory
from jaxgrad.losses import absolute, logloss, mean_loss, squared
from jaxgrad.sampling import full_batch
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch, Linear


@dataclass(frozen=True)
class Config:
    share: float = 0.05
    """Share of the rows with an outlier."""
    factor: float = 10.0
    """The slipped decimal point."""
    steps: int = 20_000
    """Updates of GD."""
    fraction: float = 0.25
    """GD's step size on MSE, as a fraction of the edge 2/λmax."""
    mae_eta: float = 0.5
    """GD's constant step size on MAE; the shrinking one is `1/√t`."""
    furthest: float = 20.0
    """How far one point is carried away, in standard deviations."""
    points: int = 25
    """Places of that point."""
    drawn_with: int = 1
    """The number that the rows with an outlier are drawn with."""


QUICK = Config(steps=10_000, points=7)
NUMBERS = {
    "factor": EXACT, "steps": EXACT, "record": EXACT, "rows": EXACT, "start": EXACT, "eta/MAE": EXACT,
    "eta/*": ROUNDING, "bound/*": ROUNDING, "distance": ROUNDING, "jump/*": ROUNDING,
    "path/MAE*": Off(by="jump/path/MAE*"), "gap/MAE*": Off(by="jump/gap/MAE*"), "gap/*": ROUNDING,
    "theory/*": ROUNDING, "path/*": ROUNDING, "minimum/*": ROUNDING, "influence/*": ROUNDING,
    "influence_theory/*": ROUNDING, "x": ROUNDING, "y/*": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSSES = {"MSE": squared, "MAE": absolute, "logloss": logloss}
START = (-0.5, 1.0)


def run(config: Config, session: Session) -> dict[str, Any]:
    diabetes = data.load("diabetes")
    # From the smallest upwards: were it centred, slope and intercept would be two problems of one number each.
    bmi = diabetes.batch.x[:, [diabetes.names.index("bmi")]]
    X = theory.design_matrix(bmi - bmi.min())
    rows, targets = _targets(config)
    numbers: dict[str, Any] = {
        "x": X[:, 0],
        "rows": np.sort(rows),
        "factor": config.factor,
        "steps": config.steps,
        "eta/MAE": config.mae_eta,
        "start": np.array(START),
        **{f"y/{kind}": y for kind, y in targets.items()},
    }

    session.say("minima of MSE and MAE, with and without outliers")
    for kind, y in targets.items():
        numbers[f"minimum/MSE/{kind}"] = theory.problem(Batch(X[:, :1], y)).minimiser
        numbers[f"minimum/MAE/{kind}"], numbers[f"bound/MAE/{kind}"] = least_absolute(X, y)

    session.say(f"GD on each loss, {config.steps:,} steps")
    dirty = targets["outliers"]
    geometry = theory.problem(Batch(X[:, :1], dirty))
    record = log_spaced(config.steps, 80)[1:]
    batch = Batch(jnp.asarray(X[:, :1], jnp.float32), jnp.asarray(dirty, jnp.float32))
    mse_eta = float(np.float32(config.fraction * theory.edge(geometry)))
    shrinking = lambda t: 1 / jnp.sqrt(1.0 + t)
    paths = {
        "MSE": _path("MSE", batch, mse_eta, record),
        "MAE": _path("MAE", batch, config.mae_eta, record),
        "MAE, shrinking steps": _path("MAE", batch, shrinking, record),
    }
    start = np.array(START)
    mae = numbers["minimum/MAE/outliers"]
    lowest = float(np.mean(np.abs(dirty - X @ mae)))
    numbers |= {
        "record": record,
        "eta/MSE": mse_eta,
        **{f"path/{name}": path for name, path in paths.items()},
        "gap/MSE": theory.excess_loss(geometry, paths["MSE"]),
        "theory/MSE": theory.gd_excess(geometry, start, mse_eta, record),
    }
    # ‖∇‖ <= mean ‖x‖ wherever it exists.
    steepest, away = float(np.mean(np.linalg.norm(X, axis=1))), float(np.linalg.norm(start - mae))
    numbers["theory/MAE"] = away**2 / (2 * config.mae_eta * record) + config.mae_eta * steepest**2 / 2
    for name, etas in (("MAE", np.full(len(record), config.mae_eta)), ("MAE, shrinking steps", record**-0.5)):
        # What a residual on the other side of 0 moves (slope, intercept) by: near a kink rounding decides its side.
        jump = 2 * etas[:, None] * np.abs(X).max(axis=0) / len(X)
        numbers |= {f"jump/path/{name}": jump, f"jump/gap/{name}": steepest * np.linalg.norm(jump, axis=1)}
        numbers[f"gap/{name}"] = np.abs(dirty[None, :] - paths[name] @ X.T).mean(axis=1) - lowest

    session.say("logloss with flipped labels")
    numbers |= _logistic(config, record)

    session.say("one point carried away")
    clean = targets["clean"]
    # A point far out on the x axis, where it has leverage, moved upwards from above both lines.
    i = int(np.argmax(X[:, 0]))
    above = decimals(max(X[i] @ numbers[f"minimum/{loss}/clean"] for loss in ("MSE", "MAE")) + 0.5)
    distance = np.linspace(0, config.furthest, config.points)
    moved = []
    for far in distance:
        y = clean.copy()
        y[i] = above + far
        moved.append((theory.problem(Batch(X[:, :1], y)).minimiser[0], least_absolute(X, y)[0][0]))
    numbers |= {"distance": distance, "influence/MSE": np.array(moved)[:, 0], "influence/MAE": np.array(moved)[:, 1]}
    numbers["influence_theory/MSE"] = numbers["influence/MSE"][0] + np.linalg.solve(X.T @ X, X[i])[0] * distance
    return numbers


def _targets(config: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The rows whose point slips, and the targets without and with that, in standard deviations of the clean one."""
    raw = np.asarray(data.load("diabetes", standardise=False).batch.y, float)
    centre, unit = raw.mean(), raw.std()
    rows = np.random.default_rng(config.drawn_with).permutation(len(raw))[: round(config.share * len(raw))]
    # A slipped point multiplies the raw number.
    slipped = raw.copy()
    slipped[rows] *= config.factor
    return rows, {"clean": (raw - centre) / unit, "outliers": (slipped - centre) / unit}


def _path(loss: str, batch: Batch, eta: Any, record: np.ndarray) -> np.ndarray:
    """GD's (slope, intercept) at the recorded steps."""
    start = Linear(jnp.array([START[0]], jnp.float32), jnp.float32(START[1]))

    def go() -> Any:
        _, seen = trajectory(
            mean_loss(models.linear, LOSSES[loss]),
            start,
            batch,
            optimizer=optax.sgd(eta),
            sampling=full_batch(),
            key=jax.random.key(0),
            record=record,
            observe=lambda params: jnp.append(params.w, params.b),
        )
        return seen

    return np.asarray(jax.jit(go)(), float)


def least_absolute(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The minimiser of `(1/n) Σ |yᵢ − xᵢ·w|` by linear programming, and the gap between it and the dual's value.

    Dual: `max u·y` over `Xᵀu = 0, |uᵢ| <= 1/n`.
    """
    n, p = X.shape
    # Variables w, and t >= |y − Xw|.
    above = np.block([[-X, -np.eye(n)], [X, -np.eye(n)]])
    bounds = [(None, None)] * p + [(0, None)] * n
    solved = linprog(
        np.r_[np.zeros(p), np.full(n, 1 / n)], A_ub=above, b_ub=np.r_[-y, y], bounds=bounds, method="highs"
    )
    dual = linprog(-y, A_eq=X.T, b_eq=np.zeros(p), bounds=(-1 / n, 1 / n), method="highs")
    w = solved.x[:p]
    return w, abs(float(np.mean(np.abs(y - X @ w)) + dual.fun))


def _logistic(config: Config, record: np.ndarray) -> dict[str, Any]:
    """Logistic regression on one column of breast cancer: minima, GD's gaps, and one mislabelled point."""
    cancer = data.load("breast_cancer")
    x = np.asarray(cancer.batch.x[:, [cancer.names.index("mean texture")]], float)
    y = np.asarray(cancer.batch.y, float)
    n = len(y)
    flips = np.random.default_rng(config.drawn_with).permutation(n)[: round(config.share * n)]
    flipped = y.copy()
    flipped[flips] = 1 - flipped[flips]
    minima = {kind: optimum.logistic(Batch(x, labels)) for kind, labels in (("clean", y), ("outliers", flipped))}

    X = theory.design_matrix(x)
    eta = float(np.float32(1 / (np.linalg.eigvalsh(X.T @ X / n)[-1] / 4)))
    path = _path("logloss", Batch(jnp.asarray(x, jnp.float32), jnp.asarray(flipped, jnp.float32)), eta, record)
    best = minima["outliers"]
    where = np.r_[best.params.w, best.params.b]
    sign = 1 - 2 * flipped

    # One example of the wrong class for its side, carried outwards.
    clean = minima["clean"]
    w = np.r_[clean.params.w, clean.params.b]
    i = int(np.argmin(np.abs(x[:, 0])))
    towards = np.sign(w[0]) * (-1 if y[i] == 1 else 1)
    s = 1 / (1 + np.exp(-(X @ w)))
    hessian = (X * (s * (1 - s))[:, None]).T @ X / n
    distance = np.linspace(0, config.furthest, config.points)
    moved, first_order = [], []
    old = (s[i] - y[i]) * X[i]
    for far in distance:
        there = x.copy()
        there[i] += towards * far
        moved.append(float(optimum.logistic(Batch(there, y)).params.w[0]))
        row = np.r_[there[i], 1.0]
        new = (1 / (1 + np.exp(-(row @ w))) - y[i]) * row
        first_order.append(w[0] - np.linalg.solve(hessian, new - old)[0] / n)
    return {
        "minimum/logloss/clean": w,
        "minimum/logloss/outliers": where,
        "bound/logloss": best.bound,
        "eta/logloss": eta,
        "gap/logloss": np.logaddexp(0, sign[None, :] * (path @ X.T)).mean(axis=1) - best.value,
        "theory/logloss": np.sum((np.array(START) - where) ** 2) / (2 * eta * record),
        "influence/logloss": np.array(moved),
        "influence_theory/logloss": np.array(first_order),
    }


# --- what the numbers say --------------------------------------------------------------------------------------


def _shift(numbers: dict[str, Any], loss: str) -> float:
    """How far outliers move the minimum, relative to its distance from zero."""
    clean, dirty = (numbers[f"minimum/{loss}/{kind}"] for kind in ("clean", "outliers"))
    return float(np.linalg.norm(dirty - clean) / np.linalg.norm(clean))


def _influence(numbers: dict[str, Any], loss: str) -> np.ndarray:
    """Change of the slope by the point carried away, in units of the slope at the start."""
    slope = numbers[f"influence/{loss}"]
    return slope / slope[0] - 1


def claims(numbers: dict[str, Any]) -> list[Claim]:
    shift = {loss: _shift(numbers, loss) for loss in LOSSES}
    gap, exact, t = numbers["gap/MSE"], numbers["theory/MSE"], numbers["record"]
    seen = exact > 1e-9 * exact[0]
    off = float(np.max(np.abs(gap[seen] / exact[seen] - 1)))
    mae, shrinking = numbers["gap/MAE"], numbers["gap/MAE, shrinking steps"]
    late = t > t[-1] / 4
    best = np.minimum.accumulate(mae)
    moved = float(np.max(np.abs(numbers["influence/MAE"] - numbers["influence/MAE"][0])))
    line = float(np.max(np.abs(numbers["influence/MSE"] - numbers["influence_theory/MSE"])))
    far = {loss: float(_influence(numbers, loss)[-1]) for loss in LOSSES}
    certain = max(numbers["bound/MAE/clean"], numbers["bound/MAE/outliers"])
    return [
        Claim(
            "F7",
            f"outliers (target ×{numbers['factor']:g} in {len(numbers['rows'])} of {len(numbers['x'])} rows) move the "
            "minimum of MSE far and that of MAE little",
            f"MSE by {shift['MSE']:.3g} of its length, MAE by {shift['MAE']:.3g}; as many flipped labels move logloss "
            f"by {shift['logloss']:.3g}",
            "MAE less than a fifth of MSE",
            shift["MAE"] < shift["MSE"] / 5,
        ),
        Claim(
            "F7",
            "GD's gap on MSE is the exact one, step by step (float32)",
            f"largest relative difference {off:.1e}, down to 1e-9 of the start",
            "below 1 %",
            off < 0.01,
        ),
        Claim(
            "F7",
            "on MAE a constant step bounces at a floor, within the bound of the subgradient method; 1/√t goes on",
            f"last gaps {mae[late].min():.1e} to {mae[late].max():.1e} (constant), {shrinking[late].min():.1e} to "
            f"{shrinking[late].max():.1e} (1/√t); best gap at most {np.max(best / numbers['theory/MAE']):.2g} of the "
            f"bound; the minimum is certified to {certain:.0e}",
            "constant above 1/√t at the end; at most 1 of the bound",
            bool(np.median(mae[late]) > np.median(shrinking[late]) and (best <= numbers["theory/MAE"]).all()),
        ),
        Claim(
            "F7",
            "GD on logloss keeps within R²/(2ηt)",
            f"at most {np.max(numbers['gap/logloss'] / numbers['theory/logloss']):.2g} of it",
            "at most 1",
            bool((numbers["gap/logloss"] <= numbers["theory/logloss"]).all()),
        ),
        Claim(
            "F7",
            f"one point carried {numbers['distance'][-1]:g} standard deviations away pulls MSE's slope along the exact "
            "line, and MAE's not at all",
            f"MSE: slope {far['MSE']:+.0%}, off the line by {line:.1e}; MAE: moved by {moved:.1e}; logloss, "
            f"mislabelled point: slope {far['logloss']:+.0%}",
            "off the line below 1e-9; MAE below 1e-6",
            line < 1e-9 and moved < 1e-6,
        ),
    ]


def headline(numbers: dict[str, Any]) -> str:
    return (
        f"**Losses and outliers.** {len(numbers['rows'])} targets with a slipped decimal point move the minimum of MSE "
        f"by {_shift(numbers, 'MSE'):.2g} times its length, that of MAE by {_shift(numbers, 'MAE'):.2g}; in return GD "
        "with a constant step never settles on MAE."
    )


def report(numbers: dict[str, Any]) -> str:
    rows = [
        "| {} | {} | {} | {:.3g} | {} |".format(
            loss,
            *("{:.3f}, {:.3f}".format(*numbers[f"minimum/{loss}/{kind}"]) for kind in ("clean", "outliers")),
            _shift(numbers, loss),
            f"{_influence(numbers, loss)[-1]:+.1%}",
        )
        for loss in LOSSES
    ]
    return "\n".join(
        [
            f"Slope and intercept at the minimum. MSE and MAE: diabetes, n = {len(numbers['x'])}; logloss: breast "
            "cancer, whose outliers are flipped labels:",
            "",
            "| loss | clean | with outliers | shift, relative | slope when one point is carried away |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


COLOURS = {"MSE": plots.BLUE, "MAE": plots.VERMILLION, "MAE, shrinking steps": plots.ORANGE, "logloss": plots.GREEN}


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (fit, plane, gaps, influence) = plots.figure(2, 2, height=6.4)
    x, dirty, rows = numbers["x"], numbers["y/outliers"], numbers["rows"]
    sound = np.setdiff1d(np.arange(len(x)), rows)
    fit.plot(x[sound], dirty[sound], ".", color="#b0b0b0", markersize=3)
    fit.plot(x[rows], dirty[rows], "x", color=plots.BLACK, markersize=4, label="slipped point")
    ends = np.array([x.min(), x.max()])
    for loss in ("MSE", "MAE"):
        for kind, style in (("clean", ":"), ("outliers", "-")):
            w = numbers[f"minimum/{loss}/{kind}"]
            label = f"{loss}, {'clean data' if kind == 'clean' else 'all data'}"
            fit.plot(ends, w[0] * ends + w[1], style, color=COLOURS[loss], label=label, linewidth=2)
    fit.set(
        title="The fitted lines", xlabel="body mass index, in sd from the smallest", ylabel="target, in sd of the clean"
    )
    fit.legend(loc="upper left", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")

    for name in ("MSE", "MAE"):
        path = np.vstack([numbers["start"], numbers[f"path/{name}"]])
        plane.plot(path[:, 0], path[:, 1], ".-", color=COLOURS[name], markersize=3, linewidth=1, label=f"GD on {name}")
        for kind, marker in (("clean", "D"), ("outliers", "*")):
            w = numbers[f"minimum/{name}/{kind}"]
            plane.plot(*w, marker, color=COLOURS[name], markersize=6 if kind == "clean" else 12, mec="white")
    plane.plot(*numbers["start"], "o", color=plots.BLACK, markersize=5)
    plane.annotate("start", numbers["start"], xytext=(6, 4), textcoords="offset points", fontsize=9)
    plane.plot([], [], "*", color=plots.GREY, markersize=10, label="minimum")
    plane.plot([], [], "D", color=plots.GREY, markersize=5, label="minimum, clean data")
    plane.set(title="The paths of GD", xlabel="slope", ylabel="intercept")
    plane.legend(loc="best", fontsize=8.5)

    t = numbers["record"]
    for name, colour in COLOURS.items():
        gap = numbers[f"gap/{name}"]
        gaps.plot(t, np.where(gap > 1e-9, gap, np.nan), ".", color=colour, markersize=4, label=name)
        if f"theory/{name}" in numbers:
            exact = numbers[f"theory/{name}"]
            gaps.plot(t, exact, "-" if name == "MSE" else "--", color=colour, linewidth=1.1)
    plots.log_scale(gaps, "xy")
    gaps.set_ylim(1e-9, 1e5)
    gaps.set(title="GD with outliers: line exact, dashes bound", xlabel="steps", ylabel="gap L(w) − L*")
    gaps.legend(loc="upper right", fontsize=8.5, ncols=2)

    for loss in LOSSES:
        share = 100 * _influence(numbers, loss)
        influence.plot(numbers["distance"], share, "o", color=COLOURS[loss], markersize=4, label=loss)
        if (key := f"influence_theory/{loss}") in numbers:
            exact = 100 * (numbers[key] / numbers[f"influence/{loss}"][0] - 1)
        else:
            exact = np.zeros_like(share)
        style = "--" if loss == "logloss" else "-"
        influence.plot(numbers["distance"], exact, style, color=COLOURS[loss], linewidth=1.1)
    influence.set(
        title="One point carried away", xlabel="distance, standard deviations", ylabel="change of the slope, %"
    )
    influence.legend(loc="best")
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
