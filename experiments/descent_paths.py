"""The lecture's pictures from real runs: the bowl, the jagged path, the two failures of a step size, the graph.

The bowl is the mean squared error of a regression with two parameters on real data (log price of 53,772 diamonds
on carat: slope and intercept), drawn with the paths of GD and of SGD at several batch sizes from one start (F2–F6,
C3, C6). Near the minimum, where SGD at a constant step size never comes to rest, the ellipses are the exact
stationary spread (two standard deviations) that theory computes from these data, and the points are iterates.

The graph is logistic regression on one real example (F16): values go forward, derivatives come back, by the
lecture's own formulas, each checked against autodiff.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, ErrorOfRounding, Mean, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, random_keys
from jaxgrad import data, lecture, losses, models, statistics
from jaxgrad.descent import descend, trajectory
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch, Linear


@dataclass(frozen=True)
class Config:
    steps: int = 150
    """Updates of the drawn paths."""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """b of SGD in the bowl."""
    fraction: float = 0.25
    """Step size of the paths, as a fraction of the edge 2/λmax."""
    too_small: float = 0.01
    """The crawl, as a fraction of the edge."""
    too_large: float = 1.02
    """The divergence, as a fraction of the edge."""
    start: tuple[float, float] = (4.5, 2.5)
    """Slope and intercept of the start."""
    cloud: int = 256_000
    """Iterates near the minimum that the measured spread is taken from."""


QUICK = Config(batch_sizes=(8,), cloud=2000)
NUMBERS = {
    "n": EXACT, "batch_sizes": EXACT, "fraction": EXACT, "steps": EXACT, "too_small": EXACT,
    "too_large": EXACT, "start": EXACT, "stable/*": EXACT, "graph/names": EXACT,
    "graph/derivative_names": EXACT, "graph/example": EXACT, "graph/labels": EXACT,
    "graph/error": ErrorOfRounding(unit=2.3e-16), "graph/*": ROUNDING,
    "minimiser": ROUNDING, "minimum": ROUNDING, "edge": ROUNDING, "condition_number": ROUNDING,
    "hessian": ROUNDING, "gd": ROUNDING, "crawl": ROUNDING, "divergence": ROUNDING, "spread/*": ROUNDING,
    "sgd/*": RANDOM, "spread_error/*": RANDOM, "cloud/*": Runs(axis=0),
    "measured_spread/*": Mean(error="spread_error/*"),
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSS = losses.mean_loss(models.linear, losses.squared)


def run(config: Config, session: Session) -> dict[str, Any]:
    session.say("the bowl of two parameters")
    diamonds = data.load("diamonds", standardise=False)
    carat = diamonds.batch.x[:, [diamonds.names.index("carat")]]
    batch = Batch(jnp.asarray(carat), jnp.asarray(diamonds.batch.y))
    geometry = theory.problem(batch)
    edge = theory.edge(geometry)
    start = Linear(jnp.array([config.start[0]], jnp.float32), jnp.float32(config.start[1]))
    numbers: dict[str, Any] = {
        "n": len(carat),
        "minimiser": geometry.minimiser,
        "minimum": geometry.value,
        "edge": edge,
        "condition_number": theory.condition_number(geometry),
        "start": np.array(config.start),
        "hessian": geometry.directions @ np.diag(geometry.eigenvalues) @ geometry.directions.T,
        "batch_sizes": np.array(config.batch_sizes),
        "fraction": config.fraction,
        "steps": config.steps,
        "too_small": config.too_small,
        "too_large": config.too_large,
    }

    def paths(eta: float, sampling: Any, record: Any, keys: Any, begin: Linear = start) -> np.ndarray:
        """`(slope, intercept)` at the recorded steps: `[keys, record, 2]`."""

        def one(key: Any) -> Any:
            _, seen = trajectory(
                LOSS,
                begin,
                batch,
                optimizer=optax.sgd(eta),
                sampling=sampling,
                key=key,
                record=record,
                observe=lambda params: jnp.append(params.w, params.b),
            )
            return seen

        return np.asarray(jax.jit(jax.vmap(one))(keys), float)

    def path(eta: float, sampling: Any) -> np.ndarray:
        return paths(eta, sampling, np.arange(config.steps + 1), random_keys(3, 1))[0]

    eta = decimals(config.fraction * edge)
    numbers["gd"] = path(eta, full_batch())
    for b in config.batch_sizes:
        numbers[f"sgd/{b}"] = path(eta, distinct(b))
    numbers["crawl"] = path(decimals(config.too_small * edge), full_batch())
    numbers["divergence"] = path(decimals(config.too_large * edge), full_batch())

    session.say("the spread near the minimum")
    best = Linear(jnp.asarray(geometry.minimiser[:1], jnp.float32), jnp.float32(geometry.minimiser[1]))
    for b in config.batch_sizes:
        sampling = distinct(b)
        numbers[f"stable/{b}"] = bool(eta < theory.sgd_edge(geometry, sampling))
        if not numbers[f"stable/{b}"]:
            continue
        numbers[f"spread/{b}"] = theory.stationary_second_moment(geometry, eta, sampling)
        # Many short runs rather than one long: the spread then rests on independent iterates.
        record = 200 + 25 * np.arange(1, 9)
        runs = config.cloud // len(record)
        late = paths(eta, sampling, record, random_keys(b, runs), best)
        away = late - geometry.minimiser
        numbers[f"measured_spread/{b}"] = np.einsum("ski,skj->ij", away, away) / (runs * len(record))
        of_a_run = (away**2).sum(axis=2).mean(axis=1)
        numbers[f"spread_error/{b}"] = float(of_a_run.std(ddof=1) / np.sqrt(runs))
        numbers[f"cloud/{b}"] = late[:400, -1]  # enough to draw

    session.say("the computation graph of logistic regression")
    return numbers | _graph()


def _graph() -> dict[str, Any]:
    """Forward values and derivatives of one example, by F14–F16 and by autodiff."""
    cancer = data.load("breast_cancer")
    columns = [cancer.names.index(name) for name in ("mean radius", "mean texture")]
    x_all, y_all = jnp.asarray(cancer.batch.x[:, columns]), jnp.asarray(cancer.batch.y)
    loss = losses.mean_loss(models.linear, losses.logloss)
    trace = descend(
        loss,
        models.init_linear(2),
        Batch(x_all, y_all),
        optimizer=1.0,
        sampling=full_batch(),
        steps=100,
        key=jax.random.key(0),
        record=2,
    )
    # An example that the fitted model is unsure of: there is something to send back.
    p_all = jax.nn.sigmoid(x_all @ trace.params.w + trace.params.b)
    example = int(jnp.argmin(jnp.abs(p_all - 0.7) + 10 * (y_all == 1)))
    with jax.enable_x64(True):
        w1, w2 = (jnp.asarray(float(w)) for w in trace.params.w)
        b, x1, x2, y = (jnp.asarray(float(v)) for v in (trace.params.b, *x_all[example], y_all[example]))

        def forward(w1: Any, x1: Any, w2: Any, x2: Any, b: Any) -> tuple[Any, ...]:
            u, v = w1 * x1, w2 * x2
            h = u + v + b
            p = lecture.sigmoid_as_printed(h)
            return u, v, h, p, lecture.cross_entropy_as_printed(y, p)

        u, v, h, p, ce = forward(w1, x1, w2, x2, b)
        d_p = lecture.cross_entropy_derivative_as_printed(y, p)
        d_h = d_p * lecture.sigmoid_derivative_as_printed(h)
        by_hand = {"p": d_p, "h": d_h, "u": d_h, "v": d_h, "b": d_h,
                   "w1": d_h * x1, "x1": d_h * w1, "w2": d_h * x2, "x2": d_h * w2}  # fmt: skip
        leaves = jax.grad(lambda *a: forward(*a)[-1], argnums=(0, 1, 2, 3, 4))(w1, x1, w2, x2, b)
        by_autodiff = dict(zip(("w1", "x1", "w2", "x2", "b"), leaves, strict=True))
        error = max(abs(float(by_hand[k] - g)) / max(abs(float(g)), 1e-300) for k, g in by_autodiff.items())
    values = {"w1": w1, "x1": x1, "w2": w2, "x2": x2, "b": b, "u": u, "v": v, "h": h, "p": p, "ce": ce, "y": y}
    return {
        "graph/names": list(values),
        "graph/values": np.array([float(value) for value in values.values()]),
        "graph/derivative_names": list(by_hand),
        "graph/derivatives": np.array([float(value) for value in by_hand.values()]),
        "graph/error": error,
        "graph/example": example,
        "graph/labels": list(cancer.labels),
    }


# --- what the numbers say --------------------------------------------------------------------------------------


def _gap(numbers: dict[str, Any], path: np.ndarray) -> np.ndarray:
    """`L(w) − L* = ½ (w − w*)ᵀ H (w − w*)`."""
    away = path - numbers["minimiser"]
    return 0.5 * np.einsum("ti,ij,tj->t", away, numbers["hessian"], away)


def _lengths(numbers: dict[str, Any]) -> dict[str, float]:
    """Length of each path over the distance from its start to its end: 1 is straight."""
    out = {}
    for name in ("gd", *(f"sgd/{b}" for b in numbers["batch_sizes"])):
        path = numbers[name]
        out[name] = float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum() / np.linalg.norm(path[-1] - path[0]))
    return out


def claims(numbers: dict[str, Any]) -> list[Claim]:
    lengths, steps = _lengths(numbers), numbers["steps"]
    first, last = (_gap(numbers, numbers["divergence"])[i] for i in (0, -1))
    crawl, good = (_gap(numbers, numbers[name])[-1] for name in ("crawl", "gd"))
    stable = [b for b in numbers["batch_sizes"] if numbers[f"stable/{b}"]]
    squares = {b: (np.trace(numbers[f"measured_spread/{b}"]), np.trace(numbers[f"spread/{b}"])) for b in stable}
    off = {b: (measured - exact) / numbers[f"spread_error/{b}"] for b, (measured, exact) in squares.items()}
    limit = statistics.z_limit(max(1, len(stable)))
    return [
        Claim(
            "C3",
            "the path of SGD is jagged: its length over the distance it covers",
            "; ".join(("GD" if k == "gd" else k.replace("sgd/", "b = ")) + f": {v:.3g}" for k, v in lengths.items()),
            "longer for smaller b, GD shortest",
            bool(np.all(np.diff(list(lengths.values())[:1] + list(lengths.values())[:0:-1]) > 0)),
        ),
        Claim(
            "C3",
            "at a constant step size SGD stays spread around the minimum as the exact stationary law says "
            "(mean squared distance, measured over predicted)",
            "; ".join(f"b = {b}: {m / e:.4g} ({off[b]:+.2f} standard errors)" for b, (m, e) in squares.items()),
            f"at most {limit:.3g} standard errors (99 %, all together)",
            all(abs(deviation) <= limit for deviation in off.values()),
        ),
        Claim(
            "C6",
            f"too small a step size ({numbers['too_small']:g} of the edge) crawls: gap after {steps} steps",
            f"{crawl:.3g}, against {good:.3g} at {numbers['fraction']:g} of the edge",
            "more than ten times as far",
            bool(crawl > 10 * good),
        ),
        Claim(
            "C6",
            f"too large a step size ({numbers['too_large']:g} of the edge) leaves the bowl",
            f"gap {first:.3g} at the start, {last:.3g} after {steps} steps",
            "grows",
            bool(last > first),
        ),
        Claim(
            "F16",
            "the derivatives that come back through the graph, by hand, are those of autodiff",
            f"largest relative difference {numbers['graph/error']:.2g}",
            "at most 1e-12",
            numbers["graph/error"] <= 1e-12,
        ),
    ]


def report(numbers: dict[str, Any]) -> str:
    slope, intercept = numbers["minimiser"]
    unstable = [int(b) for b in numbers["batch_sizes"] if not numbers[f"stable/{b}"]]
    beyond = (
        f" At b = {', '.join(map(str, unstable))} this step size is beyond the edge of SGD's second moment: there is "
        "no stationary spread to draw."
        if unstable
        else ""
    )
    return (
        f"log price = {intercept:.4g} + {slope:.4g} carat at the minimum (n = {numbers['n']:,}, condition number "
        f"{numbers['condition_number']:.3g}). Paths take {numbers['steps']} updates with η = {numbers['fraction']:g} "
        f"of the edge 2/λmax = {numbers['edge']:.4g}.{beyond} In the graph, black is the value of a node and red the "
        "derivative of the loss with respect to it; the derivative at h is p − y, as F16 collapses to."
    )


def draw(numbers: dict[str, Any]) -> Figure:
    figure, axes = plots.figure(3, 2, height=7.6, height_ratios=(1.0, 0.92))
    bowl, near, failures = axes[:3]
    grid = axes[3].get_gridspec()
    for axis in axes[3:]:
        axis.remove()
    _draw_bowl(bowl, numbers)
    _draw_near(near, numbers)
    _draw_failures(failures, numbers)
    _draw_graph(figure.add_subplot(grid[1, :]), numbers)
    return figure


def _contours(axis: Axes, numbers: dict[str, Any], x: tuple[float, float], y: tuple[float, float]) -> None:
    w, b = np.meshgrid(np.linspace(*x, 160), np.linspace(*y, 160))
    gap = _gap(numbers, np.column_stack([w.ravel(), b.ravel()])).reshape(w.shape)
    axis.contour(w, b, gap, levels=_levels(gap), colors="#b4b4b4", linewidths=0.8)
    axis.plot(*numbers["minimiser"], "*", color=plots.YELLOW, markeredgecolor="black", markersize=13, zorder=9)
    axis.set(xlim=x, ylim=y, xlabel="slope (per carat)", ylabel="intercept")
    axis.grid(False)


def _levels(gap: np.ndarray) -> np.ndarray:
    return np.geomspace(gap.max() / 3000, gap.max(), 14)


def _draw_bowl(axis: Axes, numbers: dict[str, Any]) -> None:
    _contours(axis, numbers, (0.2, 6.2), (1.5, 7.6))
    for b in numbers["batch_sizes"]:
        path = numbers[f"sgd/{b}"]
        axis.plot(*path.T, color=plots.batch_colour(int(b)), linewidth=1, label=f"SGD, b = {b}")
    axis.plot(*numbers["gd"].T, "o-", color=plots.BLACK, markersize=2.5, linewidth=1.2, label="GD")
    axis.set_title("The bowl and the paths")
    axis.legend(loc="lower left", framealpha=0.85, frameon=True, edgecolor="none")


def _draw_near(axis: Axes, numbers: dict[str, Any]) -> None:
    stable = [b for b in numbers["batch_sizes"] if numbers[f"stable/{b}"]]
    cw, cb = numbers["minimiser"]
    reach = 3.2 * np.sqrt(max(np.linalg.eigvalsh(numbers[f"spread/{b}"])[-1] for b in stable))
    _contours(axis, numbers, (cw - reach, cw + reach), (cb - reach, cb + reach))
    for b in stable:
        colour = plots.batch_colour(int(b))
        axis.plot(*numbers[f"cloud/{b}"].T, ".", color=colour, markersize=3, alpha=0.6)
        sizes, vectors = np.linalg.eigh(numbers[f"spread/{b}"])
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        axis.add_patch(
            Ellipse((cw, cb), 4 * sizes[1] ** 0.5, 4 * sizes[0] ** 0.5, angle=angle, fill=False,
                    edgecolor=plots.ink(colour), linewidth=2, zorder=8, label=f"b = {b}: 2 sd, exact")
        )  # fmt: skip
    axis.set_title("Near the minimum")
    axis.legend(loc="lower left", framealpha=0.85, frameon=True, edgecolor="none")


def _draw_failures(axis: Axes, numbers: dict[str, Any]) -> None:
    _contours(axis, numbers, (-1.5, 7.0), (-0.5, 9.5))
    bounce = numbers["divergence"][:60]
    axis.plot(
        *bounce.T,
        "o-",
        color=plots.VERMILLION,
        markersize=2.5,
        linewidth=0.9,
        label=f"too large: {numbers['too_large']:g} of the edge",
    )
    axis.plot(
        *numbers["crawl"].T,
        "-",
        color=plots.BLUE,
        linewidth=3,
        label=f"too small: {numbers['too_small']:g} of the edge",
    )
    axis.set_title("Two failures of a step size")
    axis.legend(loc="lower left", framealpha=0.85, frameon=True, edgecolor="none")


PLACES = {
    "w1": (0, 3),
    "x1": (0, 2.1),
    "w2": (0, 1.2),
    "x2": (0, 0.3),
    "b": (2.1, 0),
    "u": (2.1, 2.55),
    "v": (2.1, 1.1),
    "h": (4.4, 1.6),
    "p": (6.7, 1.6),
    "ce": (9.2, 1.6),
}
EDGES = (
    ("w1", "u"),
    ("x1", "u"),
    ("w2", "v"),
    ("x2", "v"),
    ("u", "h"),
    ("v", "h"),
    ("b", "h"),
    ("h", "p"),
    ("p", "ce"),
)
TITLES = {
    "w1": "w₁",
    "x1": "x₁",
    "w2": "w₂",
    "x2": "x₂",
    "b": "b",
    "u": "w₁ x₁",
    "v": "w₂ x₂",
    "h": "h = sum",
    "p": "p = s(h)",
    "ce": "CE(y, p)",
}


def _draw_graph(axis: Axes, numbers: dict[str, Any]) -> None:
    values = dict(zip(numbers["graph/names"], numbers["graph/values"].tolist(), strict=True))
    back = dict(zip(numbers["graph/derivative_names"], numbers["graph/derivatives"].tolist(), strict=True))
    red = plots.ink(plots.VERMILLION)
    half = 0.72
    for tail, head in EDGES:
        (x0, y0), (x1, y1) = PLACES[tail], PLACES[head]
        axis.annotate(
            "", (x1 - half, y1), (x0 + half, y0), arrowprops={"arrowstyle": "->", "color": "#555555", "linewidth": 1.2}
        )
    for name, (x, y) in PLACES.items():
        axis.add_patch(
            FancyBboxPatch(
                (x - half + 0.06, y - 0.34),
                2 * half - 0.12,
                0.68,
                boxstyle="round,pad=0.05",
                facecolor="white",
                edgecolor="#555555",
                zorder=3,
            )
        )
        axis.text(x, y + 0.19, TITLES[name], ha="center", va="center", fontsize=9, weight="bold", zorder=4)
        axis.text(x, y - 0.04, f"{values[name]:.4g}", ha="center", va="center", fontsize=9, zorder=4)
        if name in back:
            axis.text(x, y - 0.26, f"{back[name]:.4g}", ha="center", va="center", fontsize=9, color=red, zorder=4)
    label = numbers["graph/labels"][int(values["y"])]
    axis.text(9.2, 0.85, f"y = {values['y']:g} ({label})", ha="center", fontsize=9)
    axis.text(4.4, 2.95, "values go forward  →", fontsize=10, ha="left")
    axis.text(4.4, 2.6, "←  derivatives of CE come back", fontsize=10, color=red, ha="left")
    axis.text(5.55, 2.12, "p(1 − p)", color=red, fontsize=8.5, ha="center")
    axis.text(7.95, 2.12, "−y/p + (1−y)/(1−p)", color=red, fontsize=8.5, ha="center")
    axis.set(xlim=(-0.9, 10.1), ylim=(-0.45, 3.5))
    axis.set_title(f"Logistic regression on one real example (breast_cancer, row {numbers['graph/example']})")
    axis.axis("off")


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
