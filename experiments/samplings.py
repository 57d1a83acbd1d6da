"""With replacement, distinct or reshuffled: noise floors and bias, and where reshuffling wins and where it does not.

The lecture draws "b indices at random" (F5) and leaves open how. On a handful of real examples all three ways are
computable exactly: with replacement and distinct by the sampling factor γ, a reshuffled pass by averaging over every
order of the examples, through their subsets. For small step sizes reshuffling has by far the lower floor, O(η²) and
not O(η); it pays with a bias (its mean does not tend to the minimum); and for large step sizes it can be the worse
one. Lines are exact, points are thousands of runs.

The last panel is a full real data set, too large for all orders: there the line of the reshuffled runs is the small-η
formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, Found, Mean
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, geometric, random_keys
from experiments.support.loading import few_features, load
from experiments.support.shared import runs_of
from jaxgrad import models, statistics
from jaxgrad.sampling import distinct, is_reshuffled, reshuffled, with_replacement
from jaxgrad.theory import least_squares as theory
from jaxgrad.theory import reshuffling
from jaxgrad.types import Batch, Sampling


@dataclass(frozen=True)
class Config:
    data: str = "diabetes"
    """A regression data set or a file."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    features: int = 2
    """Only the features most correlated with the target."""
    examples: int = 12
    """So few that every order counts: a seeded choice."""
    batch_sizes: tuple[int, ...] = (1, 6)
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Step sizes, as fractions of the second-moment edge of distinct examples."""
    seeds: int = 2000
    large_b: int = 13
    """Batch size on the full data set."""
    large_eta: float = 0.015
    """Its step size, as a fraction of the edge."""
    passes: int = 20


QUICK = Config(examples=10, batch_sizes=(5,), fractions=(0.1, 0.4, 0.8), seeds=1000, large_eta=0.05, passes=4)
NUMBERS = {
    "data": EXACT, "features": EXACT, "n": EXACT, "sizes": EXACT, "seeds": EXACT, "large/n": EXACT,
    "large/b": EXACT, "large/passes": ROUNDING, "* */measured": Mean(error="* */error"),
    "*/bias error": ROUNDING, "* */error": RANDOM, "* */bias": Mean(error="* */bias error"),
    "large/distinct error": RANDOM, "large/reshuffled error": RANDOM,
    "large/distinct": Mean(error="large/distinct error"),
    "large/reshuffled": Mean(error="large/reshuffled error"), "large/*": ROUNDING, "*edge*": ROUNDING,
    "*/etas": ROUNDING, "*/fine": Found(to=1e-5), "*/bias": ROUNDING, "*/bias leading": ROUNDING,
    "*/exact": ROUNDING, "*/exact bias": ROUNDING, "*/floor": ROUNDING, "whole_with_replacement": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
KINDS: dict[str, Callable[[int], Sampling]] = {
    "with replacement": with_replacement,
    "distinct": distinct,
    "reshuffled": reshuffled,
}
LEVEL = 0.99


def run(config: Config, session: Session) -> dict[str, Any]:
    dataset = load(config)
    if dataset.task != "regression":
        raise ValueError(f"samplings needs a regression data set: {dataset.name} is {dataset.task}")
    everything, names = few_features(dataset, config.features, None)
    chosen = np.random.default_rng(1).permutation(len(everything.y))[: config.examples]
    batch = Batch(everything.x[chosen], everything.y[chosen])
    problem, start = theory.problem(batch), models.init_linear(batch.x.shape[1])
    n, edge = len(batch.y), theory.edge(problem)
    keys = random_keys(6, config.seeds)
    numbers: dict[str, Any] = {
        "data": dataset.name,
        "features": list(names),
        "n": n,
        "edge": edge,
        "sizes": np.array(config.batch_sizes),
        "seeds": config.seeds,
        "whole_with_replacement": theory.sgd_edge(problem, with_replacement(n)) / edge,
    }
    for b in config.batch_sizes:
        fresh_edge, tame = theory.sgd_edge(problem, distinct(b)), theory.deviation_edge(problem, distinct(b))
        # Near where the variance of the loss explodes, a sample mean says nothing.
        etas = [float(np.float32(f * fresh_edge)) for f in config.fractions if f * fresh_edge < 0.9 * tame]
        shares = np.append(geometric(config.fractions[0], 0.6, 14), np.linspace(0.65, 0.97, 14))
        fine = decimals(shares * fresh_edge)
        numbers |= {f"{b}/etas": np.array(etas), f"{b}/fine": fine, f"{b}/edge": fresh_edge}
        numbers[f"{b}/edge with replacement"] = theory.sgd_edge(problem, with_replacement(b))
        numbers[f"{b}/edge reshuffled"] = reshuffling.stable_edge(problem, b)
        for kind, make in KINDS.items():
            session.say(f"{config.seeds:,} runs {kind}, b = {b}")
            name = f"{kind} {b}"
            rows = [_settle(problem, start, batch, keys, eta, make(b)) for eta in etas]
            for key in rows[0]:
                numbers[f"{name}/{key}"] = np.array([row[key] for row in rows])
            numbers[f"{name}/floor"] = np.array([exact_floor(problem, eta, make(b)) for eta in fine])
        numbers[f"{b}/bias"] = np.array([np.linalg.norm(reshuffling.bias(problem, eta, b)) for eta in fine])
        leading = [np.linalg.norm(reshuffling.bias_leading(problem, eta, b)) for eta in fine]
        numbers[f"{b}/bias leading"] = np.array(leading)
    return numbers | _large(everything, keys, config, session)


def exact_floor(problem: theory.Problem, eta: float, sampling: Sampling) -> float:
    """The exact expected excess loss in the long run; of a reshuffled pass, its average."""
    if is_reshuffled(sampling):
        return reshuffling.floor(problem, eta, int(sampling.batch_size or 0)).average
    return theory.floor(problem, eta, sampling)


def exact_moments(problem: theory.Problem, start: Any, eta: float, sampling: Sampling, steps: Any) -> theory.Moments:
    if is_reshuffled(sampling):
        return reshuffling.moments(problem, start, eta, int(sampling.batch_size or 0), steps)
    return theory.sgd_moments(problem, start, eta, sampling, steps)


def _settle(
    problem: theory.Problem, start: Any, batch: Batch, keys: Any, eta: float, sampling: Sampling
) -> dict[str, Any]:
    """The last pass of runs long enough to forget their start, beside the exact moments of these very steps."""
    b = int(sampling.batch_size or 0)
    per_pass = len(problem.X) // b
    passes = int(np.ceil(4 / (eta * problem.eigenvalues[-1] * per_pass))) + 1
    record = passes * per_pass - np.arange(per_pass)[::-1]
    runs = np.asarray(runs_of(keys, jnp.float32(eta), batch, jnp.asarray(record, jnp.int32), start, sampling=sampling))
    return compare(problem, start, eta, sampling, record, runs.astype(float))


def compare(
    problem: theory.Problem, start: Any, eta: float, sampling: Sampling, record: np.ndarray, runs: np.ndarray
) -> dict[str, Any]:
    """Of `runs[run, step, p]`: the mean gap over the steps and the mean of the last iterate, beside the exact ones."""
    exact = exact_moments(problem, start, eta, sampling, record)
    gaps = theory.excess_loss(problem, runs.reshape(-1, runs.shape[-1])).reshape(runs.shape[:2]).mean(axis=1)
    away = exact.mean[-1] - problem.minimiser
    variance = np.diag(exact.second[-1]) - away**2
    return {
        "measured": gaps.mean(),
        "error": gaps.std(ddof=1) / np.sqrt(len(gaps)),
        "exact": exact.excess.mean(),
        "bias": runs[:, -1].mean(axis=0) - problem.minimiser,
        "exact bias": away,
        "bias error": np.sqrt(variance / len(runs)),
    }


def _large(batch: Batch, keys: Any, config: Config, session: Session) -> dict[str, Any]:
    """Fresh and reshuffled batches on the full data set, pass by pass."""
    b = config.large_b
    n = len(batch.y) // b * b
    batch = Batch(batch.x[:n], batch.y[:n])
    problem, start = theory.problem(batch), models.init_linear(batch.x.shape[1])
    eta = float(np.float32(config.large_eta * theory.sgd_edge(problem, distinct(b))))
    per_pass = n // b
    # Four places in each pass: what a pass has on average, not at its best moment.
    record = np.unique(np.round(np.arange(1, 4 * config.passes + 1) * per_pass / 4).astype(int))
    numbers: dict[str, Any] = {
        "large/n": n,
        "large/b": b,
        "large/eta": eta,
        "large/passes": record / per_pass,
        "large/exact": theory.sgd_moments(problem, start, eta, distinct(b), record).excess,
        "large/leading": reshuffling.floor_leading(problem, eta, b),
        "large/floor": theory.floor(problem, eta, distinct(b)),
        "large/speed": float(n * eta * problem.eigenvalues[0] / b),
    }
    for kind in ("distinct", "reshuffled"):
        session.say(f"{kind}, n = {n}, b = {b}")
        sampling, some = KINDS[kind](b), keys[:500]
        runs = runs_of(some, jnp.float32(eta), batch, jnp.asarray(record, jnp.int32), start, sampling=sampling)
        gaps = theory.excess_loss(problem, np.asarray(runs, float).reshape(-1, runs.shape[-1])).reshape(runs.shape[:2])
        numbers[f"large/{kind}"], numbers[f"large/{kind} error"] = (
            gaps.mean(axis=0),
            gaps.std(axis=0, ddof=1) / np.sqrt(len(gaps)),
        )
    return numbers


# --- what the numbers say --------------------------------------------------------------------------------------


def floor_z(numbers: dict[str, Any], name: str) -> np.ndarray:
    """(measured − exact floor) in standard errors, per step size."""
    return (numbers[f"{name}/measured"] - numbers[f"{name}/exact"]) / numbers[f"{name}/error"]


def bias_z(numbers: dict[str, Any], name: str) -> np.ndarray:
    """(measured − exact mean of the last iterate) in exact standard errors, per step size and coefficient."""
    return ((numbers[f"{name}/bias"] - numbers[f"{name}/exact bias"]) / numbers[f"{name}/bias error"]).ravel()


def _names(numbers: dict[str, Any]) -> list[str]:
    return [f"{kind} {b}" for b in numbers["sizes"] for kind in KINDS]


def _ratios(numbers: dict[str, Any]) -> list[tuple[float, float, float, int, float]]:
    """Floor of reshuffled over distinct, per b and η: exact, measured, its z beyond 1, b, η over the edge."""
    out = []
    for b in numbers["sizes"]:
        a, d = (lambda key, k=k: numbers[f"{k} {b}/{key}"] for k in ("reshuffled", "distinct"))  # noqa: B023
        z = (a("measured") - d("measured")) / np.hypot(a("error"), d("error"))
        ratio, measured = a("exact") / d("exact"), a("measured") / d("measured")
        out += list(
            zip(ratio, measured, z, [int(b)] * len(z), numbers[f"{b}/etas"] / numbers[f"{b}/edge"], strict=True)
        )
    return out


def claims(numbers: dict[str, Any]) -> list[Claim]:
    floors = np.concatenate([floor_z(numbers, name) for name in _names(numbers)])
    biases = np.concatenate([bias_z(numbers, name) for name in _names(numbers)])
    limit, bias_limit = (statistics.z_limit(len(z), level=LEVEL) for z in (floors, biases))
    ratios = _ratios(numbers)
    best, worst = min(ratios), max(ratios)
    b = numbers["sizes"][-1]
    orders = {
        kind: float(np.polyfit(np.log(numbers[f"{b}/fine"][:4]), np.log(numbers[f"{kind} {b}/floor"][:4]), 1)[0])
        for kind in KINDS
    }
    away = np.abs(numbers[f"reshuffled {b}/bias"] / numbers[f"reshuffled {b}/bias error"]).max()
    fresh = max(float(np.abs(bias_z(numbers, f"{kind} {b}")).max()) for kind in ("with replacement", "distinct"))
    drawn, reshuffled_edge = numbers[f"{b}/edge"], numbers[f"{b}/edge reshuffled"]
    last = slice(-max(4, len(numbers["large/passes"]) // 2), None)
    large = float(numbers["large/reshuffled"][last].mean() / numbers["large/distinct"][last].mean())
    return [
        Claim(
            "F5",
            f"the floors of all three ways of sampling are the exact ones ({len(floors)} pairs of b and η)",
            f"largest deviation {np.abs(floors).max():.2f} standard errors",
            f"at most {limit:.2f} (99 %, all together)",
            bool(np.abs(floors).max() <= limit),
        ),
        Claim(
            "F5",
            "reshuffling wins at small η: its floor is O(η²), that of fresh batches O(η)",
            f"floor ×{best[1]:.3g} of distinct's (exact ×{best[0]:.3g}) at {best[4]:.2g} of the edge, b = {best[3]}; "
            + "; ".join(f"{kind}: order {order:.2f}" for kind, order in orders.items()),
            "below ×1; orders about 1, 1, 2",
            bool(best[1] < 1 and orders["reshuffled"] > 1.7 and orders["distinct"] < 1.3),
        ),
        Claim(
            "F5",
            "reshuffling is not always better: at large η its floor lies above that of distinct examples",
            f"×{worst[1]:.3g} at {worst[4]:.2g} of the edge, b = {worst[3]} ({worst[2]:.1f} standard errors; "
            f"exact ×{worst[0]:.3g})",
            "above ×1",
            bool(worst[0] > 1 and worst[1] > 1),
        ),
        Claim(
            "F5",
            "reshuffled runs are biased: their mean does not tend to the minimum, but to where it is computed to",
            f"reshuffled: {away:.1f} exact standard errors from the minimum (b = {b}); distance from the exact mean, "
            f"all samplings: at most {np.abs(biases).max():.2f}; fresh batches, b = {b}: {fresh:.2f}",
            f"above {bias_limit:.2f}; at most {bias_limit:.2f} (99 %, all together)",
            bool(away > bias_limit >= np.abs(biases).max()),
        ),
        Claim(
            "F5",
            f"with replacement, b = n = {numbers['n']} is not GD: the exact edge of its second moment over that of GD",
            f"{numbers['whole_with_replacement']:.3f} (distinct: 1); at b = {b}: with replacement "
            f"{numbers[f'{b}/edge with replacement'] / numbers['edge']:.3f}, distinct {drawn / numbers['edge']:.3f}, "
            f"reshuffled {reshuffled_edge / numbers['edge']:.3f}",
            "below 1; with replacement below distinct",
            bool(numbers["whole_with_replacement"] < 1 and numbers[f"{b}/edge with replacement"] < drawn),
        ),
        Claim(
            "F5",
            f"n = {numbers['large/n']}, b = {numbers['large/b']}: the floor of reshuffled over that of distinct",
            f"×{large:.3g} (small-η formula ×{numbers['large/leading'] / numbers['large/floor']:.3g})",
            "below ×0.8",
            large < 0.8,
        ),
    ]


def headline(numbers: dict[str, Any]) -> str:
    ratios = _ratios(numbers)
    best, worst = min(ratios), max(ratios)
    return (
        f"**Ways of sampling.** Reshuffling takes the noise floor to ×{best[0]:.2g} that of distinct examples at "
        f"{best[4]:.2g} of the edge, but to ×{worst[0]:.2g} at {worst[4]:.2g} (b = {worst[3]}; exact, measured "
        f"×{best[1]:.2g} and ×{worst[1]:.2g}); its mean is biased. "
        f"n draws with replacement are not GD: stable only up to {numbers['whole_with_replacement']:.2g} of its edge."
    )


def report(numbers: dict[str, Any]) -> str:
    out = [
        f"{numbers['n']} examples of {numbers['data']} ({', '.join(numbers['features'])} and a bias). Edges of the "
        "second moment over GD's 2/λmax, exact, and floors (mean gap over a pass), measured and (exact):\n",
        "| b | sampling | edge | " + " | ".join(f"η = {f:.2g} of the edge" for f in _shown(numbers)) + " |",
        "|---" * (3 + len(_shown(numbers))) + "|",
    ]
    for b in numbers["sizes"]:
        for kind in KINDS:
            at = lambda key, name=f"{kind} {b}": numbers[f"{name}/{key}"]
            edge = numbers[f"{b}/edge" + ("" if kind == "distinct" else f" {kind}")] / numbers["edge"]
            cells = [f"{m:.3g} ({e:.3g})" for m, e in zip(at("measured"), at("exact"), strict=True)]
            cells += ["–"] * (len(_shown(numbers)) - len(cells))
            out.append(f"| {b} | {kind} | {edge:.3f} | " + " | ".join(cells) + " |")
    out.append(
        f"\nOn all {numbers['large/n']} examples (b = {numbers['large/b']}) a pass moves the steepest direction by "
        f"nηλ/b = {numbers['large/speed']:.2g}: the advantage of reshuffling needs this to be at most about 1."
    )
    return "\n".join(out)


def _shown(numbers: dict[str, Any]) -> np.ndarray:
    """The fractions of the edge of the batch size with the most of them."""
    b = max(numbers["sizes"], key=lambda b: len(numbers[f"{b}/etas"]))
    return numbers[f"{b}/etas"] / numbers[f"{b}/edge"]


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (floors, ratio, bias, large) = plots.figure(2, 2, height=7.4)
    sizes = numbers["sizes"]
    styles = dict(zip(sizes, ("-", "--", ":"), strict=False))
    for b in sizes:
        relative = numbers[f"{b}/fine"] / numbers[f"{b}/edge"]
        at = numbers[f"{b}/etas"] / numbers[f"{b}/edge"]
        for kind in KINDS:
            colour, name = plots.sampling_colour(kind), f"{kind} {b}"
            value = np.where(np.isfinite(numbers[f"{name}/floor"]), numbers[f"{name}/floor"], np.nan)
            floors.plot(relative, value, styles[b], color=colour, linewidth=1.3)
            floors.plot(at, numbers[f"{name}/measured"], "o" if b == sizes[0] else "s", color=colour, markersize=4.5)
        colour = plots.CYCLE[(0, 1, 4)[list(sizes).index(b)]]
        exact = numbers[f"reshuffled {b}/floor"] / numbers[f"distinct {b}/floor"]
        ratio.plot(relative, exact, styles[b], color=colour, label=f"b = {b}")
        r, d = (numbers[f"{kind} {b}/measured"] for kind in ("reshuffled", "distinct"))
        error = (
            statistics.z_limit(1)
            * r
            / d
            * np.hypot(numbers[f"reshuffled {b}/error"] / r, numbers[f"distinct {b}/error"] / d)
        )
        ratio.errorbar(at, r / d, yerr=error, fmt="o", color=colour, markersize=4.5, linewidth=1)
        bias.plot(relative, numbers[f"{b}/bias"], styles[b], color=plots.sampling_colour("reshuffled"), linewidth=1.3)
        bias.plot(relative, numbers[f"{b}/bias leading"], ":", color=plots.GREY, linewidth=1.2)
        mark = "o" if b == sizes[0] else "s"
        for kind, face in (("reshuffled", None), ("distinct", "white")):
            size, colour = np.linalg.norm(numbers[f"{kind} {b}/bias"], axis=1), plots.sampling_colour(kind)
            bias.plot(at, size, mark, color=colour, markerfacecolor=face or colour, markersize=5)
    handles = [Line2D([], [], color=plots.sampling_colour(kind), label=kind) for kind in KINDS]
    marks = [
        Line2D([], [], color=plots.GREY, linestyle=styles[b], marker="o" if b == sizes[0] else "s", label=f"b = {b}")
        for b in sizes
    ]
    x = "step size η / edge of distinct"
    n = numbers["n"]
    floors.set(title=f"Noise floor, {n} examples", xlabel=x, ylabel="E L(w∞) − L*, mean over a pass")
    floors.legend(handles=handles + marks, loc="lower right", fontsize=8.5)
    ratio.axhline(1, color=plots.BLACK, linewidth=0.9)
    ratio.set(title="Reshuffled over distinct", xlabel=x, ylabel="ratio of floors")
    ratio.legend(loc="lower right")
    bias.set(title="Bias at the end of a pass", xlabel=x, ylabel="‖E w − w*‖")
    bias_handles = [
        Line2D([], [], color=plots.sampling_colour("reshuffled"), marker="o", label="reshuffled"),
        Line2D([], [], color=plots.GREY, linestyle=":", label="its leading order"),
        Line2D(
            [],
            [],
            color=plots.sampling_colour("distinct"),
            marker="o",
            linestyle="",
            markerfacecolor="white",
            label="distinct: 0, and sampling error",
        ),
    ]
    bias.legend(handles=bias_handles, loc="lower right", fontsize=8.5)
    for axis in (floors, ratio, bias):
        plots.log_scale(axis, "xy")

    passes = numbers["large/passes"]
    blue, green = plots.sampling_colour("distinct"), plots.sampling_colour("reshuffled")
    large.plot(passes, numbers["large/exact"], color=blue, linewidth=1.3, label="distinct, exact")
    large.plot(passes, numbers["large/distinct"], "o", color=blue, markersize=3.5, label="distinct, runs")
    large.plot(passes, numbers["large/reshuffled"], "o", color=green, markersize=3.5, label="reshuffled, runs")
    large.axhline(
        numbers["large/leading"], color=green, linestyle="--", linewidth=1.3, label="reshuffled, small-η formula"
    )
    plots.log_scale(large, "y")
    large.set(title=f"n = {numbers['large/n']}, b = {numbers['large/b']}", xlabel="passes", ylabel="E L(w) − L*")
    large.legend(loc="upper right", fontsize=8.5)
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
