"""The noise of a minibatch gradient: exactly γ tr Σ, for every batch size, way of sampling and model.

A batch gradient deviates from the full one by `E‖g_B − G‖² = γ tr Σ`. Σ is the covariance of the n example
gradients at that point; γ is all that matters of how the batch is drawn: 1/b with replacement, and
`(n − b)/(b (n − 1))` for b different examples, which is 0 at b = n (C3). No approximation is in it, so it must hold
on real data, for any model, anywhere on the path. Three models, three points on the path of GD, three ways of
sampling, b from 1 to n: lines are that law, points are the mean over thousands of gradients of drawn batches.

The lower right panel is what a person with a single batch would see. The noise scale `B = tr Σ/‖G‖²` (up to which a
bigger batch pays) estimated from the b example gradients of one batch with replacement is, in expectation of both
its parts, `B/(1 + B/b)`: never more than b. Two batch sizes and the right γ give it without that bias.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, Mean
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, random_keys, two_layer
from experiments.support.loading import load
from jaxgrad import losses, models, noise, statistics
from jaxgrad.descent import trajectory
from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.types import Batch, Loss, Params, Sampling


@dataclass(frozen=True)
class Config:
    data: str | None = None
    """A data set or a file in place of the three; its task chooses the model (classes: the two-layer net)."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    rows: int = 400
    """Examples of each set, a seeded choice: few enough that b can go all the way to n."""
    batch_sizes: tuple[int, ...] = (1, 5, 25, 100, 200, 400)
    """Those above the number of examples are left out."""
    path: tuple[int, ...] = (0, 10, 300)
    """The points: after so many steps of GD."""
    seeds: int = 2000
    """Batches drawn for each mean."""
    hidden: int = 8
    """Hidden units of the net."""


QUICK = Config(data="diabetes", rows=60, batch_sizes=(6, 60), path=(0, 10, 60), seeds=400)
NUMBERS = {
    "problems": EXACT, "path": EXACT, "*/what": EXACT, "*/n": EXACT, "*/sizes": EXACT, "*/gamma": ROUNDING,
    "*/trace": ROUNDING, "*/gradient_squared": ROUNDING, "*/noise_scale": ROUNDING, "one/scale": ROUNDING,
    "one/expected": ROUNDING, "*/mean": Mean(error="*/error"), "*/error": RANDOM,
    "one/*": RANDOM, "two": RANDOM,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
THREE = ("diabetes", "breast_cancer", "digits")
KINDS = {"with replacement": with_replacement, "distinct": distinct, "reshuffled": reshuffled}
LEVEL = 0.99


class Problem(NamedTuple):
    name: str
    what: str
    loss: Loss
    start: Params
    batch: Batch
    eta: float
    """Of the GD whose path the points are on."""


def run(config: Config, session: Session) -> dict[str, Any]:
    problems = [_problem(name, config) for name in (THREE if config.data is None else (config.data,))]
    numbers: dict[str, Any] = {"problems": [p.name for p in problems], "path": np.array(config.path)}
    for place, problem in enumerate(problems):
        session.say(f"{problem.name}: {config.seeds:,} batches of each size")
        numbers |= {f"{problem.name}/{of}": value for of, value in _measure(problem, place, config).items()}
    session.say(f"{problems[0].name}: the noise scale from one batch, and from two sizes")
    return numbers | _one_batch(problems[0], numbers, config)


def _problem(name: str, config: Config) -> Problem:
    dataset = load(config, name)
    chosen = np.random.default_rng(0).permutation(len(dataset.batch.y))[: config.rows]
    x, y = (jnp.asarray(leaf[chosen]) for leaf in dataset.batch)
    n, d = x.shape
    top = decimals(np.linalg.eigvalsh(np.asarray(x, float).T @ np.asarray(x, float) / n)[-1])
    if dataset.task == "classes":
        k = len(dataset.labels)
        loss = losses.mean_loss(partial(models.two_layer, activation=jnp.tanh), losses.softmax_cross_entropy)
        start = two_layer(0, d, config.hidden, k)
        return Problem(dataset.name, f"net {d}–{config.hidden}–{k}", loss, start, Batch(x, y), 0.5)
    start = models.init_linear(d)
    if dataset.task == "binary":
        loss = losses.mean_loss(models.linear, losses.logloss)
        return Problem(dataset.name, "logistic regression", loss, start, Batch(x, y), 4 / (top + 1))
    loss = losses.mean_loss(models.linear, losses.squared)
    return Problem(dataset.name, "linear regression", loss, start, Batch(x, y), 0.5 / (top + 1))


def _measure(problem: Problem, place: int, config: Config) -> dict[str, Any]:
    """Exact noise at the points, and `‖g_B − G‖²` of many batches there."""
    n = len(problem.batch.y)
    path = _points(problem, np.array(config.path))
    points = [jax.tree.map(lambda leaf, i=i: leaf[i], path) for i in range(len(config.path))]
    exact = [noise.measure(problem.loss, point, problem.batch) for point in points]
    sizes = [b for b in config.batch_sizes if b <= n]
    numbers: dict[str, Any] = {
        "what": problem.what,
        "n": n,
        "sizes": np.array(sizes),
        "trace": np.array([e.trace for e in exact]),
        "gradient_squared": np.array([e.gradient_squared for e in exact]),
        "noise_scale": np.array([e.noise_scale for e in exact]),
    }
    full = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *[e.gradient for e in exact])
    for fold, (name, kind) in enumerate(KINDS.items()):
        mean, error = np.zeros((2, len(points), len(sizes)))
        for column, b in enumerate(sizes):
            indices = _draw(random_keys((1, place, fold, b), config.seeds), sampling=kind(b), n=n)
            values = np.asarray(_deviations(path, full, problem.batch, indices, loss=problem.loss), float)
            mean[:, column] = values.mean(axis=1)
            error[:, column] = values.std(axis=1, ddof=1) / np.sqrt(config.seeds)
        # One batch of a reshuffled pass by itself is b different examples.
        law = np.array([noise.gamma(distinct(b) if name == "reshuffled" else kind(b), n) for b in sizes])
        numbers |= {f"{name}/mean": mean, f"{name}/error": error, f"{name}/gamma": law}
    return numbers


def _points(problem: Problem, steps: np.ndarray) -> Params:
    """The parameters of GD after those steps: leaves `[k, ...]`."""
    go = jax.jit(
        lambda record: trajectory(
            problem.loss,
            problem.start,
            problem.batch,
            optimizer=optax.sgd(problem.eta),
            sampling=full_batch(),
            key=jax.random.key(0),
            record=record,
            observe=lambda params: params,
        )[1]
    )
    return go(jnp.asarray(steps, jnp.int32))


@partial(jax.jit, static_argnames=("sampling", "n"))
def _draw(keys: jax.Array, *, sampling: Sampling, n: int) -> jax.Array:
    """Independent batches `int32[draws, b]`: each of its own key, and of any step of a pass."""
    return jax.vmap(lambda key, step: sampling.indices(key, step, n))(keys, jnp.arange(len(keys), dtype=jnp.int32))


@partial(jax.jit, static_argnames=("loss",))
def _deviations(path: Params, full: Params, batch: Batch, indices: jax.Array, *, loss: Loss) -> jax.Array:
    """`‖g_B − G‖²[point, batch]`, the gradient of each batch by reverse mode as a step would take it."""

    def at(point_and_gradient: tuple[Params, Params]) -> jax.Array:
        params, G = point_and_gradient

        def one(rows: jax.Array) -> jax.Array:
            g = jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[rows], batch))
            return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), g, G))

        return jax.lax.map(one, indices, batch_size=50)

    return jax.lax.map(at, (path, full))


def _one_batch(problem: Problem, numbers: dict[str, Any], config: Config) -> dict[str, Any]:
    """tr Σ and ‖G‖² as one batch with replacement shows them, and as two batch sizes do."""
    n, name = len(problem.batch.y), problem.name
    path = _points(problem, np.array(config.path))
    sizes = [int(b) for b in numbers[f"{name}/sizes"] if b > 1]
    estimate, low, high = np.zeros((3, len(config.path), len(sizes)))
    for column, b in enumerate(sizes):
        indices = _draw(random_keys(9, config.seeds), sampling=with_replacement(b), n=n)
        spread, squared = np.asarray(_within(path, problem.batch, indices, loss=problem.loss), float)
        for row in range(len(config.path)):
            interval = statistics.ratio_interval(spread[row], squared[row], level=LEVEL)
            estimate[row, column], low[row, column], high[row, column] = interval[:3]
    scale = numbers[f"{name}/trace"] / numbers[f"{name}/gradient_squared"]
    small, big = sizes[0], max(b for b in sizes if b < n) if len(sizes) > 1 else n
    two = []
    for row in range(len(config.path)):
        point = jax.tree.map(lambda leaf, row=row: leaf[row], path)
        found = noise.estimate_scale(
            problem.loss,
            point,
            problem.batch,
            small=distinct(small),
            big=full_batch() if big == small else distinct(big),
            key=jax.random.key(10),
            draws=config.seeds,
            level=LEVEL,
        ).scale
        two.append([float(found.estimate), float(found.low), float(found.high)])
    return {
        "one/sizes": np.array(sizes),
        "one/scale": scale,
        "one/estimate": estimate,
        "one/low": low,
        "one/high": high,
        "one/expected": scale[:, None] / (1 + scale[:, None] / np.array(sizes)[None, :]),
        "two": np.array(two),
        "two/sizes": np.array([small, big]),
    }


@partial(jax.jit, static_argnames=("loss",))
def _within(path: Params, batch: Batch, indices: jax.Array, *, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """Of each batch `[point, batch]`: `Σ ‖gᵢ − g_B‖²/(b − 1)` over its own examples, and `‖g_B‖²`."""

    def at(params: Params) -> tuple[jax.Array, jax.Array]:
        each = noise.example_gradients(loss, params, batch)
        table = jnp.concatenate([jnp.reshape(leaf, (len(batch.y), -1)) for leaf in jax.tree.leaves(each)], axis=1)

        def one(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            g = table[rows]
            mean = g.mean(axis=0)
            return jnp.sum((g - mean[None, :]) ** 2) / (len(rows) - 1), jnp.sum(mean**2)

        return jax.lax.map(one, indices, batch_size=50)

    return jax.lax.map(at, path)


# --- what the numbers say --------------------------------------------------------------------------------------


def deviations(numbers: dict[str, Any], kind: str) -> np.ndarray:
    """`(measured − γ tr Σ)/standard error` for every model, point and batch size at which there is noise."""
    out = []
    for name in numbers["problems"]:
        law = numbers[f"{name}/{kind}/gamma"]
        exact = numbers[f"{name}/trace"][:, None] * law[None, :]
        z = (numbers[f"{name}/{kind}/mean"] - exact) / numbers[f"{name}/{kind}/error"]
        out.append(z[:, law > 0].ravel())
    return np.concatenate(out)


def claims(numbers: dict[str, Any]) -> list[Claim]:
    every = {kind: deviations(numbers, kind) for kind in KINDS}
    limit = statistics.z_limit(sum(len(z) for z in every.values()), level=LEVEL)
    out = [
        Claim(
            "C3",
            f"{kind}: the gradient's noise is γ tr Σ, on {', '.join(numbers['problems'])}, at {len(numbers['path'])} "
            f"points of the path and every b ({len(z)} means)",
            f"largest deviation {np.abs(z).max():.2f} standard errors; "
            f"{np.mean(np.abs(z) <= statistics.z_limit(1, level=LEVEL)):.0%} of 99 % intervals hold it",
            f"at most {limit:.2f} (99 %, all together)",
            bool(np.abs(z).max() <= limit),
        )
        for kind, z in every.items()
    ]
    left, whole = 0.0, True
    for name in numbers["problems"]:
        at_n = numbers[f"{name}/sizes"] == numbers[f"{name}/n"]
        whole &= bool(at_n.any())
        if at_n.any():
            share = numbers[f"{name}/distinct/mean"][:, at_n] / numbers[f"{name}/trace"][:, None]
            left = max(left, float(share.max()))
    if whole:
        ratio = [
            float(numbers[f"{name}/with replacement/mean"][0, -1] / numbers[f"{name}/trace"][0] * numbers[f"{name}/n"])
            for name in numbers["problems"]
        ]
        out.append(
            Claim(
                "C3",
                "b = n different examples have no noise (they are GD), n draws with replacement still have tr Σ/n",
                f"distinct: {left:.1g} of tr Σ; with replacement: {min(ratio):.3g} to {max(ratio):.3g} of tr Σ/n",
                "below 1e-9 (float32); about 1",
                left < 1e-9 and min(ratio) > 0.5 and max(ratio) < 1.5,
            )
        )
    estimate, expected = numbers["one/estimate"], numbers["one/expected"]
    inside = (numbers["one/low"] <= expected) & (expected <= numbers["one/high"])
    scale, two = numbers["one/scale"], numbers["two"]
    out.append(
        Claim(
            "C3",
            "the noise scale seen by one batch saturates: it is B/(1 + B/b), never above b",
            f"largest estimate over b: {np.max(estimate / numbers['one/sizes'][None, :]):.2f}; true B up to "
            f"{scale.max():.3g}; {np.sum(inside)} of {inside.size} intervals (99 %) hold the exact value",
            "at most about 1; at least 90 % of intervals",
            bool(np.max(estimate / numbers["one/sizes"][None, :]) < 1.1 and inside.mean() >= 0.9),
        )
    )
    held = (two[:, 1] <= scale) & (scale <= two[:, 2])
    out.append(
        Claim(
            "C3",
            f"two batch sizes ({numbers['two/sizes'][0]} and {numbers['two/sizes'][1]}), with the right γ, show the "
            "noise scale B that one cannot: estimate (99 % interval) at each point",
            "; ".join(
                f"{_number(row[0])} ({_number(row[1])} to {_number(row[2])}), true {b:.3g}"
                for row, b in zip(two, scale, strict=True)
            ),
            "99 % intervals hold the true B",
            bool(held.all()),
        )
    )
    return [*out, _with_the_wrong_factor(numbers)]


def _with_the_wrong_factor(numbers: dict[str, Any]) -> Claim:
    """What an estimate of ‖G‖² from two sizes is off by if distinct examples are taken for independent draws.

    From the full batch and batches of b it is `(n ‖G‖² − b E‖g_b‖²)/(n − b)`: right if the noise were `tr Σ/b`. It is
    `γ tr Σ`, with `bγ = (n − b)/(n − 1)`.
    """
    b, z, last = int(numbers["two/sizes"][0]), [], []
    for name in numbers["problems"]:
        n, column = numbers[f"{name}/n"], list(numbers[f"{name}/sizes"]).index(b)
        bias, error = (
            scale * b / (n - b) * numbers[f"{name}/distinct/{part}"][:, column]
            for scale, part in ((-1, "mean"), (1, "error"))
        )
        z += ((bias + numbers[f"{name}/trace"] / (n - 1)) / error).tolist()
        squared = numbers[f"{name}/gradient_squared"][-1]
        last.append(f"{name} {squared + bias[-1]:.2g} for {squared:.2g}")
    limit = statistics.z_limit(len(z), level=LEVEL)
    return Claim(
        "C3",
        f"with 1/b for γ, b = {b} distinct examples and the full batch miss ‖G‖² by −tr Σ/(n − 1): {len(z)} means",
        f"largest deviation {np.abs(z).max():.2f} standard errors; at the last point they see {'; '.join(last)}",
        f"at most {limit:.3g} (99 %, all together)",
        bool(np.abs(z).max() <= limit),
    )


def _number(value: float) -> str:
    return "∞" if value == np.inf else "−∞" if value == -np.inf else f"{value:.3g}"


def headline(numbers: dict[str, Any]) -> str:
    z = np.concatenate([deviations(numbers, kind) for kind in KINDS])
    return (
        f"**Gradient noise.** E‖g_B − G‖² = γ tr Σ in all {len(z)} cases measured ({', '.join(numbers['problems'])}; "
        f"{len(numbers['path'])} points, three ways of sampling): largest deviation {np.abs(z).max():.1f} standard "
        "errors. b = n different examples have no noise; n draws with replacement still do."
    )


def report(numbers: dict[str, Any]) -> str:
    out = [
        "The exact noise at the points, and the largest deviation of a measured mean from the law there:\n",
        "| problem | GD steps | ‖G‖² | tr Σ | B_simple | B_noise | with replacement | distinct | reshuffled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in numbers["problems"]:
        at = lambda key, name=name: numbers[f"{name}/{key}"]
        for i, step in enumerate(numbers["path"]):
            trace, squared = at("trace")[i], at("gradient_squared")[i]
            cells = []
            for kind in KINDS:
                law = at(f"{kind}/gamma")
                ratio = (at(f"{kind}/mean")[i] / (trace * np.where(law > 0, law, 1)))[law > 0]
                cells.append(f"{ratio[np.argmax(np.abs(ratio - 1))] - 1:+.1%}")
            curved = at("noise_scale")[i]
            scale = f"{curved:,.3g}" if np.isfinite(curved) else "– (no curvature along G)"
            row = [f"{name}, {at('what')}, n = {at('n')}", f"{step}", f"{squared:.3g}", f"{trace:.3g}"]
            out.append("| " + " | ".join([*row, f"{trace / squared:,.3g}", scale, *cells]) + " |")
    out.append(
        "\nB_simple = tr Σ/‖G‖² and B_noise = tr(HΣ)/GᵀHG, both said to be *the* critical batch size, differ, and both "
        "grow without limit towards a minimum."
    )
    return "\n".join(out)


def draw(numbers: dict[str, Any]) -> Figure:
    figure, axes = plots.figure(2, 2, height=7.2)
    marks = "os^Dv"
    for axis, name in zip(axes, numbers["problems"], strict=False):
        sizes, n = numbers[f"{name}/sizes"], numbers[f"{name}/n"]
        b = np.append(np.geomspace(1, 0.98 * n, 80), np.linspace(0.98 * n, n - 0.02, 30))
        for i in range(len(numbers["path"])):
            trace = numbers[f"{name}/trace"][i]
            axis.plot(b, trace / b, color=plots.sampling_colour("with replacement"), linewidth=1.1)
            axis.plot(b, trace * (n - b) / (b * (n - 1)), color=plots.sampling_colour("distinct"), linewidth=1.1)
            for kind, size, face in (("with replacement", 6, True), ("distinct", 6, True), ("reshuffled", 9, False)):
                seen = numbers[f"{name}/{kind}/gamma"] > 0
                colour = plots.sampling_colour(kind)
                axis.plot(
                    sizes[seen],
                    numbers[f"{name}/{kind}/mean"][i, seen],
                    marks[i],
                    color=colour,
                    markersize=size,
                    markerfacecolor=colour if face else "none",
                    alpha=1 if face else 0.9,
                )
        plots.log_scale(axis, "xy")
        lowest = numbers[f"{name}/trace"].min() / n
        axis.set_ylim(0.15 * lowest, 2.5 * numbers[f"{name}/trace"].max())
        axis.set(title=f"{name}: {numbers[f'{name}/what']}", xlabel="b, examples in the batch", ylabel="E‖g_B − G‖²")
    for axis in axes[len(numbers["problems"]) : 3]:
        axis.set_visible(False)
    _draw_one_batch(axes[3], numbers, marks)
    laws = {"with replacement": ": tr Σ/b", "distinct": ": tr Σ (n−b)/(b(n−1))", "reshuffled": ", one batch"}
    handles = [Line2D([], [], color=plots.sampling_colour(kind), marker="o", label=kind + laws[kind]) for kind in KINDS]
    handles[2].set(linestyle="none", markerfacecolor="none")
    handles += [
        Line2D([], [], color=plots.GREY, marker=mark, linestyle="", label=f"{step} steps" if step else "start")
        for mark, step in zip(marks, numbers["path"], strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _draw_one_batch(axis: Any, numbers: dict[str, Any], marks: str) -> None:
    sizes, scale = numbers["one/sizes"], numbers["one/scale"]
    b = np.geomspace(sizes.min() / 1.5, sizes.max() * 1.3, 80)
    colours = (plots.SKY, plots.BLUE, plots.BLACK)
    axis.plot(b, b, color=plots.GREY, linestyle=":", linewidth=1.2)
    axis.annotate(
        "b itself",
        (b[25], b[25]),
        xytext=(-6, 6),
        textcoords="offset points",
        fontsize=9,
        ha="right",
        color=plots.ink(plots.GREY),
    )
    top = axis.get_yaxis_transform()
    for i, colour in zip(range(len(scale)), colours, strict=False):
        axis.plot(b, scale[i] / (1 + scale[i] / b), color=colour, linewidth=1.2)
        axis.axhline(scale[i], color=colour, linestyle="--", linewidth=0.9)
        bars = np.abs(np.stack([numbers["one/low"][i], numbers["one/high"][i]]) - numbers["one/estimate"][i][None])
        bars[~np.isfinite(bars)] = 0
        axis.errorbar(sizes, numbers["one/estimate"][i], yerr=bars, fmt=marks[i], color=colour, markersize=5)
        text = f"true B = {scale[i]:,.0f}"
        axis.text(0.02, scale[i] * 1.08, text, color=plots.ink(colour), fontsize=9, transform=top, va="bottom")
    plots.log_scale(axis, "xy")
    axis.set_ylim(0.7 * min(sizes.min() / 2, scale.min()), 2.5 * max(scale.max(), sizes.max()))
    axis.set(
        title="The noise scale B from one batch", xlabel="b, examples in the batch", ylabel="estimate of B = tr Σ/‖G‖²"
    )


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
