"""Out of a bad basin: the chance that SGD's noise carries it over the barrier, certified, and 0 for GD.

"Noise in the gradient helps to jump out of local optima" (C5) is measured where it can be known: on two losses of one
parameter with a bad basin, the probability to have crossed the barrier within T steps has a *proven* bracket for
every step size and batch size, and thousands of runs must agree with it. Two facts come with a proof. GD never leaves
a basin at such step sizes. And batches of distinct examples, large enough, never do either, in any number of steps:
their noise is bounded, and at one point of the slope every batch pushes back.

The double well has the same noise everywhere. The other landscape is a regression: the frequency of a sine, fitted to
exact data. Its noise vanishes at the good minimum, so SGD that gets there stays.

The last panel is evidence and not theory: two-layer nets on real data, from the same starts, by GD and by SGD whose
end is then carried into its minimum by GD. In one noise helps, in the other it harms.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, CountOf, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, geometric, random_keys, two_layer
from experiments.support.loading import few_features, load
from jaxgrad import data, losses, models, noise, statistics
from jaxgrad.descent import State, advance, init, trajectory
from jaxgrad.sampling import distinct, full_batch, with_replacement
from jaxgrad.theory import escape
from jaxgrad.types import Batch, Sampling


@dataclass(frozen=True)
class Config:
    seeds: int = 2000
    """Runs per step size and batch size."""
    steps: int = 500
    """T: crossing is counted up to this step."""
    well_with_replacement: tuple[int, ...] = (1, 2, 4, 8)
    """Batch sizes on the double well (n = 16)."""
    well_distinct: tuple[int, ...] = (8, 14)
    well_etas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    frequency_distinct: tuple[int, ...] = (1, 2, 4, 6)
    """Batch sizes on the sine (n = 8)."""
    frequency_etas: tuple[float, ...] = (0.04, 0.08, 0.16)
    grid: int = 4096
    """The bracket is as wide as the spacing of this grid."""
    fine: int = 14
    """Step sizes of a drawn line."""
    data: str = "diabetes"
    """Regression data of the nets."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    nets: tuple[str, ...] = ("wide", "narrow")
    """Which of the two nets."""
    starts: int = 120
    """Starts of the nets."""
    b: int = 2
    """Batch size of the nets' SGD."""
    noisy: int = 4000
    """Steps of SGD, or of GD in its place."""
    calm: int = 8000
    """Steps of GD afterwards, for both."""


QUICK = Config(
    seeds=500, steps=200, well_with_replacement=(1,), well_distinct=(14,), well_etas=(0.1, 0.2),
    frequency_distinct=(2,), frequency_etas=(0.16,), grid=1024, fine=6, nets=("wide",), starts=40, noisy=300, calm=700,
)  # fmt: skip
NUMBERS = {
    "names": EXACT, "nets": EXACT, "seeds": EXACT, "steps": EXACT, "*/labels": EXACT, "*/etas": EXACT,
    "*/n": EXACT, "*/shown": EXACT, "*/shown steps": EXACT, "net/data": EXACT, "net/b": EXACT,
    "net/starts": EXACT, "net/*/l2": EXACT, "net/*/what": EXACT, "collapse_b": EXACT, "*/gd crossed": EXACT,
    "collapse": ROUNDING, "*/w": ROUNDING, "*/loss": ROUNDING, "*/marks": ROUNDING, "*/fine": ROUNDING,
    "*/lines": ROUNDING, "*/kramers": ROUNDING, "*/impossible_at": ROUNDING, "*/gd impossible_at": ROUNDING,
    "*/gd run": ROUNDING, "*/rows[1]": CountOf("seeds"), "*/rows[*]": ROUNDING,
    "*/runs": Runs(axis=0), "net/*/slope": RANDOM, "net/*/gd": Runs(axis=0),
    "net/*/sgd": Runs(axis=0),
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LEVEL = 0.99
NETS = {"wide": (10, 3, 1e-2), "narrow": (3, 2, 1e-3)}
"""Features, hidden units and l2 penalty of the two nets."""
NET_ETA = 0.3
SAME = 5e-4
"""Final losses within this of each other are taken for one minimum."""


def run(config: Config, session: Session) -> dict[str, Any]:
    numbers: dict[str, Any] = {"steps": config.steps, "seeds": config.seeds, "names": ["well", "frequency"]}
    well = [with_replacement(b) for b in config.well_with_replacement] + [distinct(b) for b in config.well_distinct]
    sine = [distinct(b) for b in config.frequency_distinct]
    numbers |= _landscape("well", escape.double_well(), well, config.well_etas, config, session)
    numbers |= _landscape("frequency", escape.frequency(), sine, config.frequency_etas, config, session)
    numbers["collapse"], numbers["collapse_b"] = _collapse(escape.double_well(), config)
    dataset = load(config)
    if dataset.task != "regression":
        raise ValueError(f"escape needs a regression data set for its nets: {dataset.name} is {dataset.task}")
    for key in config.nets:
        features, hidden, l2 = NETS[key]
        session.say(f"net {features}–{hidden}–1 on {dataset.name}: {config.starts} starts, GD and SGD")
        numbers |= {f"net/{key}/{of}": v for of, v in _net(dataset, features, hidden, l2, config).items()}
    return numbers | {
        "nets": list(config.nets),
        "net/data": dataset.name,
        "net/b": config.b,
        "net/starts": config.starts,
    }


# --- one parameter ---------------------------------------------------------------------------------------------


def _landscape(
    name: str,
    land: escape.Landscape,
    samplings: list[Sampling],
    etas: tuple[float, ...],
    config: Config,
    session: Session,
) -> dict[str, Any]:
    land = _rounded(land)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), land.data)
    stationary = escape.stationary_points(land.loss, land.data, land.bad - 0.01, land.barrier + 0.01)
    w = np.linspace(land.bad - 0.9, land.good + 0.6, 200)
    numbers: dict[str, Any] = {
        "labels": [_label(s) for s in samplings],
        "etas": np.array(etas),
        "n": len(batch.y),
        "w": w,
        "loss": np.asarray(jax.vmap(lambda w: land.loss(w, batch))(jnp.asarray(w, jnp.float32)), float),
        "marks": np.array([land.bad, land.barrier, land.good]),
    }
    ceiling = min(1.0 / land.smoothness, 1.3 * max(etas))
    fine = geometric(0.6 * min(etas), ceiling, config.fine)
    numbers["fine"] = fine
    keys = random_keys(7, config.seeds)
    here = jnp.full(config.seeds, land.bad, jnp.float32)
    rows, lines, guides, walls = [], [], [], []
    for sampling in samplings:
        session.say(f"{name}, {_label(sampling)}: {config.seeds:,} runs for each of {len(etas)} step sizes")
        for eta in etas:
            exact = float(np.float32(eta))
            crossed = _crossed(keys, here, land, batch, exact, config.steps, sampling)
            bound = certified(land, sampling, exact, config.steps, config.grid)
            ends = (float(b[-1]) for b in (bound.low, bound.estimate, bound.high))
            rows.append([exact, int(crossed.sum()), *ends])
        coarse = [certified(land, sampling, float(e), config.steps, max(64, config.grid // 4)) for e in fine]
        lines.append([float(c.estimate[-1]) for c in coarse])
        walls.append(np.nan if coarse[0].impossible_at is None else coarse[0].impossible_at)
        rate = [2 * _kramers(land, stationary, float(e), sampling) for e in fine]
        guides.append(1 - np.exp(-np.array(rate) * config.steps))
    numbers |= {
        "rows": np.array(rows).reshape(len(samplings), len(etas), 5),
        "lines": np.array(lines),
        "kramers": np.array(guides),
        "impossible_at": np.array(walls),
    }

    session.say(f"{name}: GD from {config.seeds:,} starts in the basin")
    left = land.left if land.left is not None else land.bad - 1.0
    spread = jnp.asarray(np.linspace(left + 0.01, land.barrier - 0.01, config.seeds), jnp.float32)
    eta = float(np.float32(max(etas)))
    numbers["gd crossed"] = int(_crossed(keys, spread, land, batch, eta, config.steps, full_batch()).sum())
    wall = escape.impossible(land.loss, land.data, sampling=full_batch(), start=land.bad, exit=land.barrier)
    numbers["gd impossible_at"] = np.nan if wall is None else wall

    # A picture: the first runs, at the step size and batch size whose chance is nearest to one half.
    table = np.array(rows).reshape(len(samplings), len(etas), 5)[:, :, 3]
    which, at = np.unravel_index(np.argmin(np.abs(table - 0.6)), table.shape)
    record = np.unique(np.round(np.linspace(0, config.steps, 120)).astype(int))
    shown = jnp.float32(etas[at])
    some = _path(keys[:6], jnp.float32(land.bad), batch, shown, record, loss=land.loss, sampling=samplings[which])
    gd = _path(keys[:1], jnp.float32(land.bad + 0.2), batch, shown, record, loss=land.loss, sampling=full_batch())
    numbers |= {"shown": f"{_label(samplings[which])}, η = {etas[at]:g}", "shown steps": record}
    numbers |= {"runs": np.asarray(some, float), "gd run": np.asarray(gd, float)[0]}
    return {f"{name}/{key}": value for key, value in numbers.items()}


def _rounded(land: escape.Landscape) -> escape.Landscape:
    """The landscape, its stationary points to nine digits: runs start at one and end at another."""
    left = None if land.left is None else decimals(land.left, 9)
    return land._replace(
        bad=decimals(land.bad, 9), barrier=decimals(land.barrier, 9), good=decimals(land.good, 9), left=left
    )


def certified(land: escape.Landscape, sampling: Sampling, eta: float, steps: int, grid: int) -> escape.Escape:
    """The bracket on the probability to have crossed the barrier to the right, from the bad minimum."""
    return escape.escape_probability(
        land.loss,
        land.data,
        sampling=sampling,
        eta=eta,
        start=land.bad,
        right=land.barrier,
        left=land.left,
        steps=steps,
        smoothness=land.smoothness,
        grid=grid,
    )


def _crossed(
    keys: Any, starts: Any, land: escape.Landscape, batch: Batch, eta: float, steps: int, sampling: Sampling
) -> np.ndarray:
    """Whether each run has crossed the barrier (before the left one, where there is one) within `steps`."""
    left = -np.inf if land.left is None else land.left
    ends = jnp.asarray([left, land.barrier], jnp.float32)
    final = _until(keys, starts, ends, batch, jnp.float32(eta), jnp.int32(steps), loss=land.loss, sampling=sampling)
    return np.asarray(final) >= float(ends[1])


@partial(jax.jit, static_argnames=("loss", "sampling"))
def _until(keys: Any, starts: Any, ends: Any, batch: Batch, eta: Any, steps: Any, *, loss: Any, sampling: Any) -> Any:
    """Where each run is when it first leaves `(ends[0], ends[1])`, or after `steps`."""
    optimizer = optax.sgd(eta)

    def outside(state: State) -> Any:
        return (state.params <= ends[0]) | (state.params >= ends[1])

    def one(key: Any, start: Any) -> Any:
        return advance(
            init(start, optimizer), key, batch, steps, loss=loss, optimizer=optimizer, sampling=sampling, halt=outside
        ).params

    return jax.vmap(one)(keys, starts)


@partial(jax.jit, static_argnames=("loss", "sampling"))
def _path(keys: Any, start: Any, batch: Batch, eta: Any, record: Any, *, loss: Any, sampling: Any) -> Any:
    def one(key: Any) -> Any:
        return trajectory(
            loss,
            start,
            batch,
            optimizer=optax.sgd(eta),
            sampling=sampling,
            key=key,
            record=record,
            observe=lambda w: w,
        )[1]

    return jax.vmap(one)(keys)


def _kramers(land: escape.Landscape, stationary: list[escape.Stationary], eta: float, sampling: Sampling) -> float:
    bad = min(stationary, key=lambda point: abs(point.w - land.bad))
    top = min(stationary, key=lambda point: abs(point.w - land.barrier))
    return escape.kramers_rate(
        eta=eta,
        factor=noise.gamma(sampling, len(land.data.y)),
        variance=bad.variance,
        well_curvature=bad.curvature,
        barrier_curvature=top.curvature,
        height=top.loss - bad.loss,
    )


def _collapse(land: escape.Landscape, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Exact probabilities at equal η/b and equal ηT: rows of η/b, columns of b."""
    land = _rounded(land)
    sizes, ratios, time = np.array([1, 2, 4, 8, 16]), (0.0125, 0.025, 0.05), 60
    return np.array(
        [
            [
                float(certified(land, with_replacement(int(b)), r * b, round(time / (r * b)), 1024).estimate[-1])
                for b in sizes
            ]
            for r in ratios
        ]
    ), sizes


def _label(sampling: Sampling) -> str:
    return f"{sampling.name}, b = {sampling.batch_size}"


# --- nets ------------------------------------------------------------------------------------------------------


def _net(dataset: data.Dataset, features: int, hidden: int, l2: float, config: Config) -> dict[str, Any]:
    """Final losses from the same starts: GD all the way, and SGD for the first `noisy` steps."""
    few, _ = few_features(dataset, features, None)
    chosen = np.random.default_rng(0).permutation(len(few.y))[:60]
    batch = Batch(few.x[chosen], few.y[chosen][:, None])
    loss = losses.mean_loss(partial(models.two_layer, activation=jnp.tanh), losses.half_squared, l2=l2)
    d = batch.x.shape[1]
    starts = two_layer(1, d, hidden, 1, count=config.starts)
    keys = random_keys(2, config.starts)

    @partial(jax.jit, static_argnames=("sampling",))
    def go(starts: Any, steps: Any, sampling: Sampling) -> Any:
        def one(start: Any, key: Any) -> Any:
            params, _ = trajectory(
                loss,
                start,
                batch,
                optimizer=optax.sgd(NET_ETA),
                sampling=sampling,
                key=key,
                record=steps[None],
            )
            return params, loss(params, batch), optax.tree.norm(jax.grad(loss)(params, batch))

        return jax.vmap(one)(starts, keys)

    _, gd, gd_slope = go(starts, jnp.int32(config.noisy + config.calm), full_batch())
    jumped, _, _ = go(starts, jnp.int32(config.noisy), distinct(config.b))
    _, sgd, sgd_slope = go(jumped, jnp.int32(config.calm), full_batch())
    slope = max(float(np.median(gd_slope)), float(np.median(sgd_slope)))
    return {
        "what": f"{d}–{hidden}–1",
        "gd": np.asarray(gd, float),
        "sgd": np.asarray(sgd, float),
        "slope": slope,
        "l2": l2,
        "n": len(batch.y),
    }


# --- what the numbers say --------------------------------------------------------------------------------------


def overlaps(crossed: Any, runs: int, low: Any, high: Any, level: float) -> np.ndarray:
    """Whether the interval of the measured share meets the certified bracket."""
    seen = statistics.proportion_interval(np.asarray(crossed).astype(int), runs, level=level)
    return (seen.low <= np.asarray(high)) & (np.asarray(low) <= seen.high)


def _count_minima(values: np.ndarray) -> int:
    return 1 + int(np.sum(np.diff(np.sort(values)) > SAME))


def _compare_net(numbers: dict[str, Any], key: str) -> dict[str, Any]:
    gd, sgd = numbers[f"net/{key}/gd"], numbers[f"net/{key}/sgd"]
    best = min(gd.min(), sgd.min())
    lower, higher = int(np.sum(sgd < gd - SAME)), int(np.sum(sgd > gd + SAME))
    return {
        "lower": lower,
        "higher": higher,
        "gd minima": _count_minima(gd),
        "sgd minima": _count_minima(sgd),
        "gd best": int(np.sum(gd < best + SAME)),
        "sgd best": int(np.sum(sgd < best + SAME)),
        "best": best,
    }


def _percent(count: int, trials: int) -> str:
    seen = statistics.proportion_interval(count, trials, level=0.95)
    return f"{float(seen.estimate):.0%} ({float(seen.low):.0%} to {float(seen.high):.0%})"


def claims(numbers: dict[str, Any]) -> list[Claim]:
    out = []
    total = sum(numbers[f"{name}/rows"][:, :, 0].size for name in numbers["names"])
    level = 1 - (1 - LEVEL) / total
    for name in numbers["names"]:
        rows = numbers[f"{name}/rows"].reshape(-1, 5)
        met = overlaps(rows[:, 1], numbers["seeds"], rows[:, 2], rows[:, 4], level)
        share = rows[:, 1] / numbers["seeds"]
        off = np.abs(share - rows[:, 3]).max()
        out.append(
            Claim(
                "C5",
                f"{name}: SGD leaves the bad basin as often as proven, {len(rows)} pairs of η and b "
                f"({numbers['seeds']:,} runs each, {numbers['steps']} steps)",
                f"{met.sum()} of {len(met)} intervals meet the certified bracket; shares from {share.min():.3g} to "
                f"{share.max():.3g}, at most {off:.3f} from the estimate within it",
                "all of them (99 %, all together)",
                bool(met.all()),
            )
        )
        out.append(
            Claim(
                "C5",
                f"{name}: GD never leaves, from {numbers['seeds']:,} starts in the basin at the largest η",
                f"{numbers[f'{name}/gd crossed']} crossed; proven by the wall at w = "
                f"{numbers[f'{name}/gd impossible_at']:.3f}",
                "0 crossed, and a proof",
                bool(numbers[f"{name}/gd crossed"] == 0 and np.isfinite(numbers[f"{name}/gd impossible_at"])),
            )
        )
    shut = np.isfinite(numbers["well/impossible_at"])
    if shut.any():
        crossed = int(numbers["well/rows"][shut, :, 1].sum())
        labels = [label for label, is_shut in zip(numbers["well/labels"], shut, strict=True) if is_shut]
        out.append(
            Claim(
                "C5",
                f"well: noise does not always help: {'; '.join(labels)} can never leave, though it is noisy",
                f"{crossed} crossings in {int(shut.sum()) * len(numbers['well/etas']) * numbers['seeds']:,} runs",
                "0",
                crossed == 0,
            )
        )
    table = numbers["collapse"]
    spread = table.max(axis=1) / table.min(axis=1)
    out.append(
        Claim(
            "C5",
            "η/b alone does not decide the chance to escape (well, equal ηT, b = 1 to 16)",
            f"at equal η/b the exact chances differ by up to ×{spread.max():.2f}, while from η/b = 0.0125 to 0.05 they "
            f"grow ×{table[-1].mean() / table[0].mean():,.0f}",
            "above ×1.05, and far less than with η/b",
            bool(1.05 < spread.max() < 0.1 * table[-1].mean() / table[0].mean()),
        )
    )
    results = {key: _compare_net(numbers, key) for key in numbers["nets"]}
    starts = numbers["net/starts"]
    out.append(
        Claim(
            "C5",
            f"evidence, not theory: nets on {numbers['net/data']}, SGD (b = {numbers['net/b']}) and GD from the same "
            f"{starts} starts end in different minima",
            "; ".join(
                f"{numbers[f'net/{key}/what']}: SGD lower from {_percent(r['lower'], starts)} of them, higher from "
                f"{_percent(r['higher'], starts)}"
                for key, r in results.items()
            ),
            "SGD ends lower from some starts, and higher from others",
            all(r["lower"] > 0 and r["higher"] > 0 for r in results.values()),
        )
    )
    return out


def headline(numbers: dict[str, Any]) -> str:
    rows = np.concatenate([numbers[f"{name}/rows"].reshape(-1, 5) for name in numbers["names"]])
    return (
        f"**Escape.** SGD leaves a bad basin with a chance that is proven beforehand: {len(rows)} measured shares, "
        f"from {(rows[:, 1] / numbers['seeds']).min():.2g} to {(rows[:, 1] / numbers['seeds']).max():.2g}, beside "
        "certified brackets. GD never leaves, nor do large batches of distinct examples. In nets it helps or harms."
    )


def report(numbers: dict[str, Any]) -> str:
    out = [f"Share of {numbers['seeds']:,} runs across within {numbers['steps']} steps, and [certified bracket]:\n"]
    for name in numbers["names"]:
        etas = numbers[f"{name}/etas"]
        out.append(f"| {name}, n = {numbers[f'{name}/n']} | " + " | ".join(f"η = {eta:g}" for eta in etas) + " |")
        out.append("|---" * (len(etas) + 1) + "|")
        for label, rows, wall in zip(
            numbers[f"{name}/labels"], numbers[f"{name}/rows"], numbers[f"{name}/impossible_at"], strict=True
        ):
            cells = []
            for _, crossed, low, _, high in rows:
                bracket = "0, exactly" if np.isfinite(wall) else f"{low:.4g}, {high:.4g}"
                cells.append(f"{crossed / numbers['seeds']:.4g} [{bracket}]")
            out.append(f"| {label} | " + " | ".join(cells) + " |")
        out.append("")
    table, sizes = numbers["collapse"], numbers["collapse_b"]
    out.append(
        "η/b organises the picture and does not decide it: exact chances at ηT = 60 for b = "
        + ", ".join(str(b) for b in sizes)
        + ": "
        + "; ".join(
            f"η/b = {ratio:g}: {row[0]:.3g} down to {row[-1]:.3g}"
            for ratio, row in zip((0.0125, 0.025, 0.05), table, strict=True)
        )
        + ". Kramers' formula (dotted) is a limit of small Gaussian noise, drawn as a guide.\n"
    )
    starts = numbers["net/starts"]
    out += [
        f"Two-layer nets on 60 examples of {numbers['net/data']}, {starts} starts, shares with 95 % intervals. "
        f"Final losses within {SAME:g} of each other count as one minimum:\n",
        "| net | minima seen by GD | by SGD | in the lowest: GD | SGD | SGD ends lower | higher | median gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in numbers["nets"]:
        r = _compare_net(numbers, key)
        shares = [_percent(r[of], starts) for of in ("gd best", "sgd best", "lower", "higher")]
        out.append(
            f"| {numbers[f'net/{key}/what']}, l2 = {numbers[f'net/{key}/l2']:g} "
            f"| {r['gd minima']} | {r['sgd minima']} | "
            + " | ".join(shares)
            + f" | {numbers[f'net/{key}/slope']:.1g} |"
        )
    return "\n".join(out)


def draw(numbers: dict[str, Any]) -> Figure:
    figure, axes = plots.figure(2, 3, height=10.6)
    handles: list[Line2D] = []
    titles = {"well": "Double well", "frequency": "Sine frequency"}
    for column, name in enumerate(numbers["names"]):
        handles = _draw_landscape(axes[column], numbers, name, titles[name])
        _draw_chances(axes[2 + column], numbers, name, titles[name])
    for axis, key in zip(axes[4:], numbers["nets"], strict=False):
        _draw_net(axis, numbers, key)
    for axis in axes[4 + len(numbers["nets"]) :]:
        axis.set_visible(False)
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def _draw_landscape(axis: Any, numbers: dict[str, Any], name: str, title: str) -> list[Line2D]:
    at = lambda key: numbers[f"{name}/{key}"]
    w, loss = at("w"), at("loss")
    inside = (at("runs").min() - 0.1, max(at("runs").max(), at("marks")[2]) + 0.1)
    seen = (w > inside[0]) & (w < inside[1])
    low, high = loss[seen].min(), loss[seen].max()
    axis.plot(w[seen], loss[seen], color=plots.BLACK, linewidth=1.6)
    for mark, text, up in zip(at("marks"), ("bad", "barrier", "good"), (-1, 1, -1), strict=True):
        height = np.interp(mark, w, loss)
        axis.plot(mark, height, "o", color=plots.BLACK, markersize=5)
        axis.annotate(
            text,
            (mark, height),
            xytext=(0, 7 * up),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            va="bottom" if up > 0 else "top",
        )
    axis.set_ylim(low - 0.25 * (high - low), high + 1.4 * (high - low))
    axis.set_yticks([tick for tick in axis.get_yticks() if low - 0.1 * (high - low) <= tick <= high])
    axis.set(title=f"{title}: {at('shown')}", xlabel="w", ylabel="L(w)")
    axis.title.set_fontsize(10)
    # Time runs upwards above the landscape, on a scale of its own.
    time = axis.twinx()
    time.grid(False)
    time.spines["right"].set_visible(True)
    steps = at("shown steps")
    for run in at("runs"):
        over = run[-1] > at("marks")[1]
        time.plot(run, steps, color=plots.BLUE if over else plots.ORANGE, linewidth=0.8, alpha=0.8)
    time.plot(at("gd run"), steps, color=plots.BLACK, linewidth=1.6, linestyle="--")
    time.set_ylim(-0.95 * steps[-1], 1.05 * steps[-1])
    time.set_yticks([0, steps[-1] // 2, steps[-1]])
    time.set_ylabel("step of a run", y=0.75)
    handles = [
        Line2D([], [], color=plots.BLUE, label="SGD, out at the end"),
        Line2D([], [], color=plots.ORANGE, label="SGD, in the basin"),
        Line2D([], [], color=plots.BLACK, linestyle="--", label="GD"),
        Line2D([], [], color=plots.GREY, linestyle=":", label="Kramers' guide"),
    ]
    return handles


def _draw_chances(axis: Any, numbers: dict[str, Any], name: str, title: str) -> None:
    at = lambda key: numbers[f"{name}/{key}"]
    for i, (label, colour) in enumerate(zip(at("labels"), _colours(at("labels")), strict=True)):
        style = "--" if label.startswith("distinct") and name == "well" else "-"
        shown = label.replace("with replacement, ", "").replace("distinct, ", "" if name != "well" else "distinct ")
        if np.isfinite(at("impossible_at")[i]):
            shown += ": 0"
        axis.plot(at("fine"), at("lines")[i], style, color=colour, linewidth=1.3, label=shown)
        axis.plot(at("fine"), at("kramers")[i], ":", color=colour, linewidth=0.9)
        eta, crossed, low, _, high = at("rows")[i].T
        axis.vlines(eta, low, high, color=colour, linewidth=5, alpha=0.3)
        seen = statistics.proportion_interval(crossed.astype(int), numbers["seeds"], level=LEVEL)
        error = np.stack([seen.estimate - seen.low, seen.high - seen.estimate])
        axis.errorbar(eta, seen.estimate, yerr=error, fmt="o", color=colour, markersize=4, linewidth=0.9)
    plots.log_scale(axis, "x")
    kind = "with replacement" if name == "well" else "distinct"
    axis.set(title=f"{title}: P(out in {numbers['steps']} steps)", xlabel="step size η", ylabel="probability")
    axis.set_ylim(-0.03, 1.55)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.legend(loc="upper left", fontsize=8, title=kind, title_fontsize=8.5, ncols=3, alignment="left")


def _colours(labels: list[str]) -> list[str]:
    cycle = (plots.VERMILLION, plots.PURPLE, plots.ORANGE, plots.SKY, plots.GREEN, plots.BLACK)
    return list(cycle[: len(labels)])


def _draw_net(axis: Any, numbers: dict[str, Any], key: str) -> None:
    gd, sgd = numbers[f"net/{key}/gd"], numbers[f"net/{key}/sgd"]
    share = (np.arange(len(gd)) + 1) / len(gd)
    top = np.quantile(np.concatenate([gd, sgd]), 0.98)
    axis.step(np.sort(gd), share, where="post", color=plots.BLACK, label="GD")
    axis.step(np.sort(sgd), share, where="post", color=plots.VERMILLION, label=f"SGD, b = {numbers['net/b']}, then GD")
    axis.set_xlim(min(gd.min(), sgd.min()) - 0.05 * (top - gd.min()), top + 0.1 * (top - gd.min()))
    axis.set_ylim(0, 1.03)
    axis.set(
        title=f"Net {numbers[f'net/{key}/what']} on {numbers['net/data']}",
        xlabel="loss at the minimum reached",
        ylabel="share of the starts at or below",
    )
    axis.legend(loc="best")


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
